# The VM's side. In dom0: into each template of pillar. In a template or standalone (qubesctl --targets=...): into that one.
{%- if salt["pillar.get"]("qubes:type", "admin") == "admin" %}
{%-   from "qvm-remote/map.jinja" import plan with context %}
include:
  - qvm-remote.pillar
{%-   if plan.problem is not defined %}
{%-     for template in plan.templates %}

qvm-remote-client-{{ template }}:
  qvm_remote.client_installed:
    - name: {{ template | json }}
    - settings: {{ plan.settings | json }}
{%-     endfor %}
{%-   endif %}
{%- else %}
{%-   import_yaml "qvm-remote/client.yaml" as client %}
{%-   if salt["cmd.retcode"](client["is_package"], python_shell=true, ignore_retcode=true, output_loglevel="quiet") == 0 %}

qvm-remote-client-package:
  test.succeed_without_changes:
    - name: The client here is a package, which is left alone
{%-   else %}

qvm-remote-client-command:
  file.managed:
    - name: /usr/bin/qvm-remote
    - source: salt://client/qvm-remote
    - user: root
    - group: root
    - mode: '0755'

qvm-remote-client-library:
  file.recurse:
    - name: /usr/lib/qvm-remote/qvm_remote_client
    - source: salt://client/qvm_remote_client
    - include_pat: '*.py'
    - exclude_pat: '*__pycache__*'
    - clean: true
    - user: root
    - group: root
    - dir_mode: '0755'
    - file_mode: '0644'

# Man page and completion.
qvm-remote-client-share:
  file.recurse:
    - name: /usr/share
    - source: salt://client/share
    - user: root
    - group: root
    - dir_mode: '0755'
    - file_mode: '0644'
{%-   for module in client["protocol"] %}

qvm-remote-client-protocol-{{ module }}:
  file.managed:
    - name: /usr/lib/qvm-remote/pullrpc/{{ module }}.py
    - source: salt://_utils/pullrpc/{{ module }}.py
    - makedirs: true
    - user: root
    - group: root
    - mode: '0644'
{%-   endfor %}

# A user can't write bytecode there, and would compile the source at each start.
qvm-remote-client-bytecode:
  cmd.run:
    - name: umask 022; /usr/bin/python3 -m compileall -q /usr/lib/qvm-remote >/dev/null 2>&1 || true
    - onchanges:
      - file: qvm-remote-client-library
{%-   for module in client["protocol"] %}
      - file: qvm-remote-client-protocol-{{ module }}
{%-   endfor %}
{%-   endif %}
{%- endif %}
