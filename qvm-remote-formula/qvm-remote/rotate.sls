# New keys for all VMs of pillar whose keys dom0 makes, now: qubesctl state.apply qvm-remote.rotate
# No command is lost: the old keys work until the VMs have used the new ones. This state changes something each time.
{%- from "qvm-remote/map.jinja" import plan with context %}
include:
  - qvm-remote.pillar
{%- if plan.problem is not defined %}
{%-   for vm, wanted in plan.vms.items() if wanted.state == "present" and wanted.key == "generate" %}

qvm-remote-rotate-{{ vm }}:
  qvm_remote.key_rotated:
    - name: {{ vm | json }}
    - days: 0
    - settings: {{ plan.settings | json }}
{%-   endfor %}
{%- endif %}
