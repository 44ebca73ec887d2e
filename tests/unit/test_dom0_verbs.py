# SPDX-License-Identifier: GPL-2.0-or-later
"""The command lines of qvm-remote-dom0 and install-dom0.sh: each verb is done somewhere, and by a function of the module as well."""

import ast
import os
import subprocess
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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "say what to do"),
        (["frob"], "invalid choice: 'frob'"),
        (["status", "--wat"], "unrecognized arguments: --wat"),
        (["status", "--js"], "unrecognized arguments: --js"),
        (["--once", "status"], "--once and --dry-run go without a verb"),
        (["--dry-run"], "say what to do"),
        (["tail", "-n", "many"], "must be a number"),
        (["tail", "-n", "0"], "must be a number"),
    ],
)
def test_wrong_usage_is_one_line_after_the_usage(words, line, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(words)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    said = shown.err.splitlines()
    assert (shown.out, line in said[-1]) == ("", True)
    assert all(text.startswith(("usage: ", " ")) for text in said[:-1])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "say from which VM"),
        (["work", "a", "b"], "one VM and one PATH"),
        (["wo rk"], "not a VM's name"),
        (["a" * 32], "not a VM's name"),
        (["work", "$(reboot)"], "PATH may have"),
        (["work", "-v"], "no such option: -v"),
        (["work", "--digest"], "--digest needs a SHA-256 digest"),
        (["--digest", "12", "work"], "--digest needs 64 hex digits"),
    ],
)
def test_wrong_usage_of_the_installation_is_one_line_that_says_how(words, line):
    # It ends before it looks where it runs.
    done = subprocess.run(["sh", os.path.join(_ROOT, "install-dom0.sh"), *words], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert line in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
