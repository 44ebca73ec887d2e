{%- from "qvm-remote/map.jinja" import qvm_remote, settings with context %}
{%- for vm, own in qvm_remote["vms"].items() %}
qvm-remote-key-{{ vm }}:
  {%- if (own or {}).get("state", "present") == "absent" %}
  qvm_remote.key_absent:
  {%- else %}
  qvm_remote.key_present:
  {%- endif %}
    - name: {{ vm }}
    - settings: {{ settings | json }}
{%- endfor %}
