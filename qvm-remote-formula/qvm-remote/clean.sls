# Takes back all that the other states did: qubesctl state.apply qvm-remote.clean
# Keeps the audit log, and the histories in the VMs, unless pillar says qvm-remote:clean:logs: true. Works without pillar as well:
# the service's configuration says where it kept its things.
{%- from "qvm-remote/map.jinja" import plan with context %}
{%- if plan.settings is not defined %}
include:
  - qvm-remote.pillar
{%- else %}

qvm-remote-clean-clients:
  qvm_remote.clients_absent:
    - settings: {{ plan.settings | json }}

qvm-remote-clean-dom0:
  qvm_remote.absent:
    - logs: {{ plan.clean_logs | json }}
    - settings: {{ plan.settings | json }}
    - require:
      - qvm_remote: qvm-remote-clean-clients
{%- endif %}
