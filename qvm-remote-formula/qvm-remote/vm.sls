# In dom0: the VMs of pillar, their keys and queues. In a VM (qubesctl --targets=...): its user's queue.
{%- if salt["pillar.get"]("qubes:type", "admin") == "admin" %}
{%-   from "qvm-remote/map.jinja" import plan with context %}
include:
  - qvm-remote.pillar
{%-   if plan.problem is not defined %}
{%-     for vm, wanted in plan.vms.items() %}

qvm-remote-vm-{{ vm }}:
{%-       if wanted.state == "absent" %}
  qvm_remote.key_absent:
    - name: {{ vm | json }}
    - settings: {{ plan.settings | json }}
    # Before the service forgets what it was let have.
    - order: 1
{%-       else %}
  qvm_remote.authorized:
    - name: {{ vm | json }}
    - key: {{ wanted.key | json }}
    - rotate_days: {{ wanted.rotate_days | json }}
    - settings: {{ plan.settings | json }}
{%-       endif %}
{%-     endfor %}

qvm-remote-unlisted:
  qvm_remote.unlisted:
    - listed: {{ plan.vms | list | json }}
    - remove: {{ (plan.unlisted == "absent") | json }}
    - settings: {{ plan.settings | json }}
    - order: 1
{%-   endif %}
{%- else %}
{%-   set wanted = salt["pillar.get"]("qvm-remote:vms:" ~ grains["id"], {}) or {} %}
{%-   set user = wanted.get("user") or salt["pillar.get"]("qvm-remote:defaults:user", "user") %}

# By the client, as the user whose queue it is: what root would follow a symbolic link to, a user can't.
qvm-remote-vm-queue:
  cmd.run:
    - name: /usr/bin/qvm-remote queue make
    - unless: /usr/bin/qvm-remote queue check
    - runas: {{ user | json }}
{%- endif %}
