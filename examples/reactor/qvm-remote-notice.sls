# Notes what happened in the system log of the machine where it happened. All of these words are dom0's own: a VM's name as
# Qubes allows it, and what the event says; nothing that a VM wrote is in an event.
{%- set parts = tag.split("/") %}
qvm-remote-notice:
  local.cmd.run:
    - tgt: {{ data["id"] }}
    - args:
      - cmd: logger -t qvm-remote -- "{{ parts[1] }} {{ parts[3] }} {{ data["data"].get("code", "") }}"
