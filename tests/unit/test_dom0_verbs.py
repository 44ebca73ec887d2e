# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of qvm-remote-dom0's verbs: each is done somewhere, and by a function of the execution module as well."""

import ast
import os
import sys

import pytest

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(_ROOT, "dom0"))

from qvm_remote_dom0 import change, look, main, verbs  # noqa: E402


def _functions_of_the_module():
    with open(os.path.join(_ROOT, "_modules", "qvm_remote.py"), encoding="utf-8") as file:
        return {node.name for node in ast.parse(file.read()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("verb", verbs.VERBS, ids=lambda verb: verb.name)
def test_each_verb_is_done_and_can_be_done_by_salt(verb):
    assert callable(getattr(look, verb.name, None) or getattr(change, verb.name))
    assert verb.function in _functions_of_the_module()


@pytest.mark.parametrize("verb", verbs.VERBS, ids=lambda verb: verb.name)
def test_the_help_of_each_verb_has_its_options(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main([verb.name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    words = shown.replace("[", " ").replace("]", " ").split()
    for option in verb.options:
        name = option.names[-1]
        assert ((name if name.startswith("-") else option.metavar) in words) is not option.hidden
    assert f"qubesctl qvm_remote.{verb.function}" in shown


def test_help_lists_all_verbs(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {verb.name} " in shown for verb in verbs.VERBS)
