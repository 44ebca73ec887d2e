# The engine's configuration, its service, how its audit log is rotated, and the command qvm-remote-dom0.
{%- from "qvm-remote/map.jinja" import plan with context %}
include:
  - qvm-remote.pillar
{%- if plan.problem is not defined %}

qvm-remote-dom0-config:
  qvm_remote.engine_configured:
    - name: /etc/qubes/remote
    - settings: {{ plan.settings | json }}
    - minion: {{ plan.minion | json }}

qvm-remote-dom0-logrotate:
  qvm_remote.audit_rotated:
    - settings: {{ plan.settings | json }}

qvm-remote-dom0-command:
  qvm_remote.command_installed: []

qvm-remote-dom0-service:
  qvm_remote.service:
    - running: {{ plan.service.running | json }}
    - enable: {{ plan.service.enable | json }}
    - accept_risk: {{ plan.service.accept_risk | json }}
    - settings: {{ plan.settings | json }}
    - minion: {{ plan.minion | json }}
    - require:
      - qvm_remote: qvm-remote-dom0-config
{%- endif %}
