# Everything: qubesctl state.apply qvm-remote
{%- from "qvm-remote/map.jinja" import plan with context %}
include:
  - qvm-remote.pillar
  - qvm-remote.client
{%- if plan.problem is defined or salt["qvm_remote.is_safe"](plan.vms | list, config=plan.settings) %}
  - qvm-remote.vm
  - qvm-remote.dom0
{%- else %}
  # The service, or the one that begins next, would let a VM do more than it is to: it must know it before that one has a key.
  - qvm-remote.dom0
  - qvm-remote.vm
{%- endif %}
