# SPDX-License-Identifier: GPL-2.0-or-later
"""Access for a time ends, whatever becomes of clocks, engines and machines; and what was stopped serves nobody."""

import json
import os
import signal
import time

import pytest
import salt.utils.yaml
from attackers import agents, wait

_LEDGER = "/var/lib/qvm-remote/ledger.sqlite"
_SQL = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], timeout=20); db.execute(sys.argv[2]); db.commit()"


@pytest.fixture
def granted(dom0):
    """Gives a function that has the engine at work give dev access until a time; None for ever."""
    path = dom0.factory.config["conf_file"]
    before = dom0.dom0("cat", path, check=True).stdout

    def grant(until):
        config = salt.utils.yaml.safe_load(before)
        if until is not None:
            config["engines"][0]["qvm_remote"]["vms"] = {"work": {}, "dev": {"until": int(until)}}
        dom0.put(path, json.dumps(config))
        told = dom0.dom0("sh", "-c", "stat -c %Y.%y /run/qvm-remote/sessions.json").stdout
        dom0.dom0("sh", "-c", "kill -HUP $(cat /run/qvm-remote/engine.lock)", check=True)
        # The note of the settings in force is written anew.
        wait(lambda: dom0.dom0("sh", "-c", "stat -c %Y.%y /run/qvm-remote/sessions.json").stdout != told)

    yield grant
    dom0.dom0("sh", "-c", f"cat > {path}", data=before, check=True)
    dom0.dom0("sh", "-c", "kill -HUP $(cat /run/qvm-remote/engine.lock)")
    dom0.wait_served("work", "dev")


def _ask(dom0, vm="dev"):
    done = dom0.remote("-n", "echo let-in", vm=vm)
    return "let in" if (done.returncode, done.stdout) == (0, b"let-in\n") else done.stderr.decode()


def test_access_for_a_time_ends_over_clocks_reboots_and_a_second_grant(dom0, granted):
    end = time.time() + 3600
    granted(end)
    assert _ask(dom0) == "let in"
    # dom0 is off, and comes back with a clock that is half an hour behind what this grant has seen.
    dom0.stop_engine()
    dom0.dom0("/usr/bin/python3", "-c", _SQL, _LEDGER, "UPDATE passed SET latest = latest + 1800 WHERE vm = 'dev'", check=True)
    dom0.reboot()
    dom0.start("work", "dev")
    dom0.start_engine()
    assert "clock was set back" in _ask(dom0)
    assert _ask(dom0, "work") == "let in"
    # The same grant once more is the same grant.
    granted(None)
    granted(end)
    assert "clock was set back" in _ask(dom0)
    # It was seen to end, if only while nobody asked: no clock makes it begin again.
    dom0.dom0("/usr/bin/python3", "-c", _SQL, _LEDGER, f"UPDATE passed SET latest = {int(end) + 1} WHERE vm = 'dev'", check=True)
    granted(None)
    granted(end)
    assert "access to dom0 ended at" in _ask(dom0)
    # Another end is another grant, which somebody has to give.
    granted(end + 60)
    assert _ask(dom0) == "let in"
    # Its end comes while nobody asks for anything, and the engine has noted so.
    granted(time.time() + 2)
    soon = int(time.time()) + 2
    wait(lambda: time.time() > soon + 1)
    assert "access to dom0 ended at" in _ask(dom0)


def _engine(dom0):
    return dom0.dom0("cat", "/run/qvm-remote/engine.lock").stdout.decode()


def _fields(dom0, pid):
    """What proc_pid_stat(5) has after the name: the state is the first of it, the parent the second, the exit status the last."""
    return dom0.dom0("cat", f"/proc/{pid}/stat", check=True).stdout.rpartition(b")")[2].decode().split()


#: Crashes a program without secrets in a folder, and says whether the kernel took a dump of it, wherever to.
_CONTROL = """
import os, resource, signal, subprocess, sys
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
process = subprocess.Popen(["sleep", "60"], cwd=sys.argv[1])
process.send_signal(signal.SIGABRT)
print(os.WCOREDUMP(os.waitpid(process.pid, 0)[1]))
"""


def _crash(dom0, engine):
    """End the engine by a signal that dumps; give the status by which it ended, as waitpid(2) has it."""
    minion = _fields(dom0, engine)[1]
    # Who stands still does not take the status away.
    dom0.dom0("kill", "-STOP", minion, check=True)
    try:
        dom0.dom0("kill", "-ABRT", engine, check=True)
        wait(lambda: _fields(dom0, engine)[0] == "Z")
        return int(_fields(dom0, engine)[-1])
    finally:
        dom0.dom0("kill", "-CONT", minion, check=True)


def test_a_stopped_engine_stays_stopped_even_if_it_crashes_and_leaves_no_core_dump(dom0):
    engine = _engine(dom0)
    folder = dom0.dom0("readlink", f"/proc/{engine}/cwd").stdout.decode().strip()
    code, answer = dom0.call("qvm_remote.stop")
    assert (code, answer) == (0, True)
    # It ends as it sees that nobody asks any more.
    wait(lambda: agents(dom0) == [])
    # The kernel is to dump all of its memory, with the keys in it.
    dom0.dom0("prlimit", "--pid", engine, "--core=unlimited", check=True)
    try:
        status = _crash(dom0, engine)
        assert (os.WTERMSIG(status), os.WCOREDUMP(status)) == (signal.SIGABRT, False)
        # Its minion starts another one in its place, which knows that it is to serve nobody.
        log = dom0.factory.config["log_file"]
        wait(lambda: b"qvm-remote was stopped" in dom0.dom0("cat", log).stdout)
        assert dom0.dom0("flock", "-n", "/run/qvm-remote/engine.lock", "true").returncode == 0
        assert agents(dom0) == []
        assert dom0.dom0("sh", "-c", f"ls {folder} | grep -x 'core.*'").stdout == b""
    finally:
        dom0.stop_engine()
    # Its minion, started anew by somebody, serves again.
    dom0.start_engine()
    assert dom0.remote("hostname").stdout == b"dom0\n"
    control = dom0.dom0("sh", "-c", f"/usr/bin/python3 -c \"$1\" {folder}; rm -f {folder}/core*", "sh", _CONTROL).stdout
    if control != b"True\n":
        pytest.skip("nothing leaves a core dump on this machine")
