# SPDX-License-Identifier: GPL-2.0-or-later
"""The command lines of qvm-remote-dom0 and install-dom0.sh: each verb is done somewhere, and by a function of the module as well."""

import ast
import json
import os
import signal
import subprocess
import sys

import pytest
from pullrpc.files import write_whole
from pullrpc.outcomes import OUTCOMES

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(_ROOT, "dom0"))

from qvm_remote_dom0 import change, look, main, verbs  # noqa: E402

_COMMAND = [sys.executable, "-I", os.path.join(_ROOT, "dom0", "qvm-remote-dom0")]
_MINION = """\
engines:
  - qvm_remote:
      key_dir: {0}/qvm-remote-keys
      state_dir: {0}/qvm-remote
      run_dir: {0}/qvm-remote-run
      audit_log: {0}/audit.log
      syslog: false
      qvm_run: no-qvm-run
      qvm_ls: no-qvm-ls
      vms: {{guest: {{until: 1767225600}}, dev: {{run_as: nobody}}}}
"""


def _run(*words):
    return subprocess.run([*_COMMAND, *words], stdin=subprocess.DEVNULL, capture_output=True, check=False)


@pytest.fixture
def config_dir(tmp_path):
    """The configuration of a service that keeps everything in a folder of this test."""
    (tmp_path / "minion").write_text(_MINION.format(tmp_path))
    return str(tmp_path)


def _functions_of_the_module():
    with open(os.path.join(_ROOT, "_modules", "qvm_remote.py"), encoding="utf-8") as file:
        return {node.name for node in ast.parse(file.read()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("verb", verbs.VERBS, ids=lambda verb: verb.name)
def test_each_verb_is_done_and_can_be_done_by_salt(verb):
    assert callable(getattr(look, verb.name, None) or getattr(change, verb.name))
    assert verb.function in _functions_of_the_module()


@pytest.mark.parametrize("verb", verbs.VERBS, ids=lambda verb: verb.name)
def test_the_help_of_each_verb_has_its_options(verb, capsys):
    assert main.main([verb.name, "--help"]) == 0
    shown = capsys.readouterr().out
    words = shown.replace("[", " ").replace("]", " ").split()
    for option in verb.options:
        name = option.names[-1]
        assert ((name if name.startswith("-") else option.metavar) in words) is not option.hidden
    assert f"qubesctl qvm_remote.{verb.function}" in shown


def test_help_lists_all_verbs(capsys):
    assert main.main(["--help"]) == 0
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
        (["tail", "a\nb", "c\nd"], "unrecognized arguments: c d"),
        (["tail", "@@"], "not a VM's name"),
        (["history", "@@"], "not a VM's name"),
        (["history", "--since", "bogus"], "a time looks like"),
        (["history", "--outcome", "bogus"], "an outcome is done, timeout"),
        (["history", "--outcome", "256"], "or an exit code"),
        (["explain", "dom0", "ls"], "not a VM's name"),
        (["explain", "work"], "say which command"),
        (["revoke", "../x"], "not a VM's name"),
    ],
)
def test_wrong_usage_is_one_line(words, line):
    done = _run(*words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert line in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("word", [*OUTCOMES, "0", "255"])
def test_what_the_help_of_outcome_lists_is_taken(word, config_dir):
    assert _run("--config-dir", config_dir, "history", "--outcome", word).returncode == 0


def test_keys_and_status_of_one_qube(config_dir):
    _give_keys(config_dir, "work", "dev")
    assert set(json.loads(_run("--config-dir", config_dir, "keys", "work", "--json").stdout)) == {"work"}
    found = json.loads(_run("--config-dir", config_dir, "status", "dev", "--json").stdout)
    assert (set(found["vms"]), set(found["keys"])) == ({"dev"}, {"dev"})
    shown = _run("--config-dir", config_dir, "status", "guest").stdout.decode()
    assert ("guest" in shown, "work" in shown) == (True, False)
    for verb, text in (("keys", "has no key"), ("status", "has no key, and pillar does not name it")):
        done = _run("--config-dir", config_dir, verb, "nosuch")
        assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", f"qvm-remote-dom0: error: nosuch {text}\n")


def test_explain_takes_options_before_the_qube_and_no_empty_command(config_dir):
    _give_keys(config_dir, "work")
    for word in ("--exec", "--json", "-x"):
        done = _run("--config-dir", config_dir, "explain", "work", word, "ls")
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.decode().startswith(f"qvm-remote-dom0: error: options go before VM: qvm-remote-dom0 explain {word} work COMMAND; ")
    assert _run("--config-dir", config_dir, "explain", "work", "--", "-x").returncode == 0
    for words, reason in ((["work", ""], "the command is empty"), (["work", " "], "the command is empty"), (["--exec", "work", ""], "names no program")):
        done = _run("--config-dir", config_dir, "explain", *words)
        assert (done.returncode, reason in done.stdout.decode()) == (1, True)


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ('"$@" keys >&-', 0, None),
        ('"$@" keys > /dev/full', 1, "the output can't be written: No space left on device"),
        ('"$@" --help > /dev/full', 1, "the output can't be written: No space left on device"),
        ('"$@" keys --wat 2> /dev/full', 2, None),
        ('"$@" enable <&-', 1, "nobody is there to be asked"),
        ('"$@" authorize work <&-', 1, "salt-call can't be started"),
        ('"$@" authorize work <&- >&- 2>&-', 1, None),
        # Nobody reads it.
        ('exec > >(:); wait $!; "$@" --help', 141, None),
    ],
)
def test_a_standard_stream_that_is_closed_or_full_is_one_line(script, code, line, config_dir):
    words = ["/bin/bash", "-c", script, "bash", *_COMMAND, "--config-dir", config_dir]
    # There is no Salt.
    done = subprocess.run(words, env={"PATH": "/nowhere"}, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (code, b"")
    assert [line in text for text in done.stderr.decode().splitlines()] == ([True] if line else [])


def _give_keys(config_dir, *vms):
    keys = os.path.join(config_dir, "qvm-remote-keys")
    os.mkdir(keys, 0o700)
    for vm in vms:
        write_whole(os.path.join(keys, f"{vm}.key"), os.urandom(32).hex().encode())


def test_doctor_names_what_a_dom0_without_a_network_has_and_as_whom_a_qube_may_run_anything(config_dir):
    _give_keys(config_dir, "work", "dev")
    found = json.loads(_run("--config-dir", config_dir, "doctor", "--json").stdout)
    (text,) = (one["text"] for one in found if one["part"] == "policy")
    assert text == "may run anything in dom0 (policy: full): dev as nobody, work as root"
    mends = [one["mend"] for one in found if one["part"] in ("transport", "logrotate")]
    assert any(mend.startswith("qubes-dom0-update qubes-core-admin-client; ") for mend in mends)
    assert not any("dnf" in mend for mend in mends)


def _examined(config_dir, part, **path):
    done = subprocess.run([*_COMMAND, "--config-dir", config_dir, "doctor", "--json"], stdin=subprocess.DEVNULL, capture_output=True, check=False, env=path or None)
    return [(one["level"], one["text"], one["mend"]) for one in json.loads(done.stdout) if one["part"] == part]


def _set(config_dir, lines):
    with open(os.path.join(config_dir, "minion"), "a", encoding="utf-8") as file:
        file.write(f"      {lines}\n")


def _program(folder, name, text="#!/bin/sh\n"):
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, 0o755)
    return path


def test_doctor_says_that_no_qube_has_a_tag_that_rules_name(config_dir, tmp_path):
    _set(config_dir, "default_policy: none")
    with open(os.path.join(config_dir, "minion"), encoding="utf-8") as file:
        text = file.read()
    rules = "{guest: {policy: {allow: [{manage: there}], deny: [[qvm-kill, '@tag:nosuchtag']]}}}"
    with open(os.path.join(config_dir, "minion"), "w", encoding="utf-8") as file:
        file.write(text.replace("{guest: {until: 1767225600}, dev: {run_as: nobody}}", rules))
    path = _program(tmp_path / "bin", "qvm-ls", '#!/bin/sh\ncase "$*" in *there) echo web;; esac\n')
    found = _examined(config_dir, "policy", PATH=f"{os.path.dirname(path)}:/usr/bin:/bin")
    assert [(level, text) for level, text, _ in found] == [
        ("note", "no qube has the tag nosuchtag, which rules of guest name: they fit nothing, what they deny included")
    ]


def test_doctor_looks_for_the_programs_that_ask_and_tell_dom0s_user(config_dir, tmp_path):
    assert _examined(config_dir, "questions") == [("ok", "nobody is to be asked or told", "")]
    with open(os.path.join(config_dir, "minion"), encoding="utf-8") as file:
        text = file.read().replace("dev: {run_as: nobody}", "dev: {policy: {ask: [[xl, list]]}}")
    with open(os.path.join(config_dir, "minion"), "w", encoding="utf-8") as file:
        file.write(text)
    _set(config_dir, "notify_refusals: true")
    path = f"{tmp_path}/bin"
    first, second = _examined(config_dir, "questions", PATH=path)
    assert first[:2] == ("problem", "zenity, which shows it on the screen, is not here: every question of dev is a no")
    assert first[2] == "qubes-dom0-update zenity; or a program of yours, in pillar: qvm-remote: ask: helper"
    assert second[:2] == ("problem", "notify-send, which shows it on the screen, is not here: nobody is told of what is refused")
    for name in ("zenity", "notify-send"):
        _program(path, name)
    assert _examined(config_dir, "questions", PATH=path) == [("ok", "who is to be asked or told can be", "")]
    _set(config_dir, "ask_helper: /nowhere/ask")
    ((level, text, mend),) = _examined(config_dir, "questions", PATH=path)
    assert (level, text) == ("problem", "/nowhere/ask is not there, or can't be run: every question of dev is a no")
    assert mend.endswith("in pillar: qvm-remote: ask: helper")


def test_tail_of_a_qube_that_dom0_does_not_know_says_so_and_goes_on(config_dir):
    _give_keys(config_dir, "work")
    for vm, said in (("nosuch", b"qvm-remote-dom0: nosuch has no key, and pillar does not name it; what the log may say of it is waited for\n"), ("work", b"")):
        command = [*_COMMAND, "--config-dir", config_dir, "tail", vm]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tail:
            try:
                assert tail.stderr.read(len(said)) == said
                line = b'{"seq":0,"prev":"","time":"2026-03-01T10:11:12.000Z","vm":"%s","id":"20260301-101112-4711-0badcafe","what":"refused"}\n' % vm.encode()
                with open(os.path.join(config_dir, "audit.log"), "ab") as log:
                    log.write(line)
                assert vm.encode() in tail.stdout.readline()
                tail.send_signal(signal.SIGINT)
                assert tail.communicate(timeout=30)[1] == b"\n"
            finally:
                tail.kill()


def test_a_qube_without_a_key_or_whose_access_has_ended_may_run_nothing(config_dir):
    _give_keys(config_dir, "work", "guest")
    for vm, said in (("work", "allowed: "), ("guest", "refused: this qube's access to dom0 ended at 2026-01-01T00:00:00Z\n"), ("nosuch", "refused: ")):
        done = _run("--config-dir", config_dir, "explain", vm, "ls")
        assert done.stdout.decode().startswith(said)
        assert done.returncode == (0 if vm == "work" else 1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "say from which VM"),
        (["work", "a", "b"], "one VM and one PATH"),
        (["wo rk"], "not a VM's name"),
        (["a" * 32], "not a VM's name"),
        (["work", "$(reboot)"], "PATH may have"),
        (["work", "-v"], "no such option: -v"),
        (["-\x1b[2J\x07\nx"], "no such option: -[2Jx; "),
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
