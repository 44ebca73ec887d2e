# Notes what happened in the system log of the machine where it happened. A minion that fell into wrong hands can send its master
# any event, under any name: what is no plain word is not acted upon, no shell reads it, and all that it gets is one line.
{%- set words = tag.split("/") %}
{%- set machine, code = data.get("id", "") | string, data.get("data", {}).get("code", "-") | string %}
{%- set plain = "[A-Za-z0-9_.-]+\\Z" %}
{%- if words | length == 4 and words[1] is match(plain) and words[3] is match(plain) and machine is match(plain) and code is match(plain) %}
qvm-remote-notice:
  local.cmd.run:
    - tgt: {{ machine | json }}
    - args:
      - cmd: {{ ["logger", "-t", "qvm-remote", "--", words[1] ~ " " ~ words[3] ~ " " ~ code] | json }}
      - python_shell: false
{%- endif %}
