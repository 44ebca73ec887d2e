# Included by all others: a mistake in pillar fails here, in one line, and nothing else is rendered.
{%- from "qvm-remote/map.jinja" import plan with context %}
{%- if plan.problem is defined %}
qvm-remote-pillar-valid:
  test.fail_without_changes:
    - name: {{ plan.problem | json }}
{%- else %}
qvm-remote-pillar-valid:
  test.succeed_without_changes:
    - name: {{ (["pillar qvm-remote is as it should be"] + plan.notes) | join("; but ") | json }}
    - comment: {{ (plan.notes | join("; ") or "pillar qvm-remote is as it should be") | json }}
{%- endif %}
