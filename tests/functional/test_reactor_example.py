# SPDX-License-Identifier: GPL-2.0-or-later
"""The reactor of the examples, in Salt's own rendering: what a minion in wrong hands sends becomes nothing."""

import os

import pytest
import salt.config
import salt.loader
import salt.state
from conftest import ROOT

_SLS = os.path.join(ROOT, "examples", "reactor", "qvm-remote-notice.sls")


def _render(tmp_path, tag, data):
    opts = salt.config.minion_config(None)
    opts.update(cachedir=str(tmp_path), file_client="local")
    compiler = salt.state.Compiler(opts, salt.loader.render(opts, {}))
    return compiler.render_template(_SLS, tag=tag, data=data)


def test_an_event_of_the_engine_becomes_one_line_in_its_own_machines_log(tmp_path):
    rendered = _render(tmp_path, "qvm-remote/work/20261124-000000-1-0badcafe/refused", {"id": "laptop-1", "data": {"vm": "work", "code": "token"}})
    (calls,) = rendered.values()
    (words,) = calls.values()
    assert words[-1] == "cmd.run"
    given = {name: value for word in words[:-1] for name, value in word.items()}
    assert given["tgt"] == "laptop-1"
    assert [dict(word) for word in given["args"]] == [{"cmd": ["logger", "-t", "qvm-remote", "--", "work refused token"]}, {"python_shell": False}]


@pytest.mark.parametrize(
    ("tag", "data"),
    [
        ("qvm-remote/work/-/refused", {"id": "'*'", "data": {"code": "token"}}),
        ("qvm-remote/work/-/refused", {"id": "*", "data": {"code": "token"}}),
        ("qvm-remote/work/-/refused", {"id": "laptop-1\n", "data": {"code": "token"}}),
        ("qvm-remote/work/-/refused", {"id": "laptop-1", "data": {"code": '"; id > /tmp/owned; "'}}),
        ("qvm-remote/work/-/refused", {"id": "laptop-1", "data": {"code": "a\nb: c"}}),
        ("qvm-remote/$(id)/-/refused", {"id": "laptop-1", "data": {}}),
        ("qvm-remote/work/-/key-{{ 1 }}", {"id": "laptop-1", "data": {}}),
        ("qvm-remote/work/-/refused/more", {"id": "laptop-1", "data": {}}),
        ("qvm-remote/work/-/refused", {"data": {}}),
    ],
)
def test_a_forged_event_becomes_nothing(tmp_path, tag, data):
    assert not _render(tmp_path, tag, data)
