# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's salt-call from a warm interpreter does what the plain one does."""

import json
import os
import subprocess
import time

import pytest
from qubes_sim.stand import Stand


@pytest.fixture(scope="module")
def dom0(tmp_path_factory):
    """A dom0 with Salt, warm."""
    with Stand(os.path.join(str(tmp_path_factory.mktemp("warm")), "sim"), warm=True) as one:
        one.prepare(["debian-13"])
        yield one


def _both(dom0, *words, data=None):
    """A call from the warm interpreter, and a plain one: exit code, stdout, and the program that ran it."""
    text = 'cd /srv; umask 027; export MARK=marked; exec "$@"'
    return [
        (done.returncode, done.stdout)
        for done in (dom0.dom0("sh", "-c", text, "sh", *plain, "salt-call", "--local", "--out=json", *words, data=data) for plain in ((), ("env", "PLAIN_SALT=1")))
    ]


def test_the_warm_interpreter_runs_it_and_the_plain_one_is_there_on_demand(dom0):
    warm, plain = _both(dom0, "cmd.run", "tr '\\0' ' ' < /proc/$PPID/cmdline", "python_shell=True")
    assert b"warm_salt.py" in warm[1]
    assert b"warm_salt.py" not in plain[1]
    assert b"/salt-call --local" in plain[1]


def test_folder_umask_environment_stdin_and_identity_are_the_callers(dom0):
    shown = "readlink /proc/$PPID/cwd; grep Umask /proc/$PPID/status; wc -c < /proc/$PPID/fd/0; id -u; hostname; env | grep -vE '^(PLAIN_SALT|SHLVL|_)=' | sort"
    warm, plain = _both(dom0, "cmd.run", shown, "python_shell=True", data=b"12345")
    assert warm == plain
    lines = json.loads(warm[1])["local"].splitlines()
    assert lines[0] == "/srv"
    assert "5" in lines
    assert "MARK=marked" in lines


@pytest.mark.parametrize("words", [["test.arg_clean", "a b", "c=ü"], ["--retcode-passthrough", "test.retcode", "7"], ["--nonsense"]])
def test_answer_and_exit_code_are_those_of_the_plain_one(dom0, words):
    warm, plain = _both(dom0, *words)
    assert warm == plain


def test_a_call_ends_with_its_caller(dom0):
    with dom0.popen_dom0("salt-call", "--local", "cmd.run", "sleep 9654", stdin=subprocess.DEVNULL):
        _until(lambda: dom0.dom0("pgrep", "-fx", "sleep 9654").returncode == 0)
        dom0.dom0("pkill", "-KILL", "-f", "bin/salt-call --local cmd.run", check=True)
    # Only the server is left, while what the call has started goes on, as it does after a kill of the plain one.
    _until(lambda: len(dom0.dom0("pgrep", "-f", "warm_salt.py").stdout.split()) == 1)
    assert dom0.dom0("pkill", "-fx", "sleep 9654").returncode == 0


def _until(check, seconds=30):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
