# On a master, for many machines: new keys, machine by machine; the first failure stops it before the next machine.
# salt-run state.orchestrate qvm-remote.orch.rotate pillar='{"machines": ["laptop-1", "laptop-2"]}'
{%- set machines = salt["pillar.get"]("machines", []) %}
{%- if not machines %}

qvm-remote-rotate-machines-named:
  test.fail_without_changes:
    - name: "say which machines, in their order: pillar='{\"machines\": [\"laptop-1\", \"laptop-2\"]}'"
{%- endif %}
{%- for machine in machines %}

qvm-remote-rotate-on-{{ machine }}:
  salt.state:
    - tgt: {{ machine | json }}
    - sls: qvm-remote.rotate
    - failhard: true
  {%- if not loop.first %}
    - require:
      - salt: qvm-remote-rotate-on-{{ machines[loop.index0 - 1] }}
  {%- endif %}
{%- endfor %}
