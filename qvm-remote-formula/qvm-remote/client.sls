{%- from "qvm-remote/map.jinja" import qvm_remote, settings with context %}
{%- for template in qvm_remote["client"]["templates"] %}
qvm-remote-client-{{ template }}:
  qvm_remote.client_installed:
    - name: {{ template }}
    - settings: {{ settings | json }}
{%- endfor %}
