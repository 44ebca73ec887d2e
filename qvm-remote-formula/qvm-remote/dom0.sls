{%- from "qvm-remote/map.jinja" import settings with context %}
qvm-remote-dom0-config:
  qvm_remote.engine_configured:
    - name: /etc/qubes/remote
    - settings: {{ settings | json }}
