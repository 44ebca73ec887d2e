# SPDX-License-Identifier: GPL-2.0-or-later
"""The real minion and its engine are killed, together and one without the other, at several moments of a command, and at random ones
under load: none is lost or run twice, and none outlives its answer.
"""

import json
import subprocess
import time
import types

import pytest
from fault_stand import INTERRUPTED, MARKS, RAN, RESULT, Clients, Ended, check_end, is_one_run, outcome, read_beats
from load import Load, seeded_dice
from pullrpc.config import Config

_MARKS, _HELD = "/tmp/minion-marks", "/tmp/minion-held"
#: Has its mark made, and goes on when somebody writes to the FIFO.
_HOLDS = f"echo $QVM_REMOTE_ID >> {_MARKS}; cat {_HELD}; echo done; exit 7"
_ENDS = f"echo $QVM_REMOTE_ID >> {_MARKS}; echo done; exit 7"
_STATES = """
import json, sqlite3
db = sqlite3.connect("file:/var/lib/qvm-remote/ledger.sqlite?mode=ro", uri=True, timeout=20)
print(json.dumps([state for state, in db.execute("SELECT state FROM command WHERE state <> 'delivered'")]))
"""


#: What there is of commands that are not done with, as JSON. A supervisor that waits has a folder; one that nobody holds was left.
_LEFT = """
import json, os, sqlite3
db = sqlite3.connect("file:/var/lib/qvm-remote/ledger.sqlite?mode=ro", uri=True, timeout=20)
rows = db.execute("SELECT vm, cid, state FROM command WHERE state <> 'delivered'").fetchall()
spool = [os.path.join(folder, name) for folder, _, names in os.walk("/var/lib/qvm-remote/spool") for name in names]
words = set()
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            words.update(file.read().split(chr(0)))
    except OSError:
        continue
jobs = "/run/qvm-remote/jobs"
slots = [os.path.join(jobs, name) for name in os.listdir(jobs)]
left = [slot for slot in slots if os.path.isdir(slot) and (slot not in words or any(names or files for _, names, files in os.walk(slot)))]
print(json.dumps(rows + spool + left))
"""


def _wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def _engine(dom0):
    # Empty for a moment while another engine begins.
    return int(_wait(lambda: dom0.dom0("cat", "/run/qvm-remote/engine.lock", check=True).stdout))


def _marks(dom0):
    return dom0.dom0("cat", _MARKS).stdout.decode().split()


def _has_rows(dom0, state, count):
    return json.loads(dom0.dom0("/usr/bin/python3", "-c", _STATES, check=True).stdout).count(state) == count


def _start(dom0, line):
    return dom0.popen_vm("work", "qvm-remote", "-v", "-n", line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _start_held(dom0, count):
    clients = [_start(dom0, _HOLDS) for _ in range(count)]
    _wait(lambda: len(_marks(dom0)) == count)
    return clients


# Each brings commands to a moment, and gives their clients and what is to be undone once somebody was killed then.


def _queued(dom0):
    engine = str(_engine(dom0))
    # Whoever stands still takes nothing in.
    dom0.dom0("kill", "-STOP", engine, check=True)
    client = _start(dom0, _ENDS)
    _wait(lambda: b"1" in dom0.vm("work", "sh", "-c", "ls ~/.qvm-remote/queue/pending | grep -c auth").stdout)
    return [client], lambda: dom0.dom0("kill", "-CONT", engine)


def _claimed(dom0):
    clients = _start_held(dom0, Config.vm_parallel)
    # One more than may run at a time.
    clients.append(_start(dom0, _HOLDS))
    _wait(lambda: _has_rows(dom0, "claimed", 1))
    return clients, lambda: None


def _running(dom0):
    return _start_held(dom0, 1), lambda: None


def _undelivered(dom0):
    clients = _start_held(dom0, 1)
    dom0.pause("work")
    dom0.dom0("sh", "-c", f": > {_HELD}", check=True)
    _wait(lambda: _has_rows(dom0, "done", 1))
    return clients, lambda: dom0.unpause("work")


#: Name to what brings it about, and what may become of its commands.
_MOMENTS = {
    # An engine that loses its minion may still take it in.
    "queued": (_queued, {RESULT, INTERRUPTED}),
    "claimed": (_claimed, {INTERRUPTED}),
    "running": (_running, {INTERRUPTED}),
    "undelivered": (_undelivered, {RESULT}),
}
#: The others take as long, and are much the same.
_SHORT = (("engine", "claimed"), ("engine", "undelivered"), ("minion", "queued"), ("minion", "claimed"))


def _kill_engine(dom0, undo):
    """The minion starts another one."""
    engine = _engine(dom0)
    dom0.dom0("kill", "-9", str(engine), check=True)
    _wait(lambda: _engine(dom0) != engine)
    undo()


def _kill_minion(dom0, undo):
    """The engine ends by itself."""
    stat = dom0.dom0("cat", f"/proc/{_engine(dom0)}/stat", check=True).stdout
    dom0.dom0("kill", "-9", stat.rpartition(b")")[2].split()[1].decode(), check=True)
    undo()
    _wait(lambda: dom0.dom0("flock", "-n", "/run/qvm-remote/engine.lock", "true").returncode == 0)
    dom0.kill_engine()
    dom0.start_engine()


_KILLS = {"engine": _kill_engine, "minion": _kill_minion}


def _kill_both(dom0, _):
    """At once, as the kernel does when memory is short."""
    dom0.kill_engine()
    dom0.start_engine()


#: Who is killed at random moments, and how often as compared with the others.
_KILLS_UNDER_LOAD = {_kill_engine: 3, _kill_minion: 1, _kill_both: 1}


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        pytest.param(victim, moment, marks=() if (victim, moment) in _SHORT else pytest.mark.long)
        for victim in sorted(_KILLS)
        for moment in _MOMENTS
    ],
)
def test_each_command_ends_once_whoever_of_both_is_killed_when(dom0, victim, moment):
    dom0.dom0("sh", "-c", f"rm -f {_MARKS} {_HELD}; mkfifo {_HELD}", check=True)
    bring_about, may_become = _MOMENTS[moment]
    try:
        clients, undo = bring_about(dom0)
        _KILLS[victim](dom0, undo)
        for client in clients:
            out, err = (text.decode() for text in client.communicate(timeout=90))
            cid = err.partition("qvm-remote: sent ")[2].partition(" ")[0]
            found = outcome(Ended("work", "short", client.returncode, out, err, time.time(), cid))
            assert found in may_become, err
            assert out == ("done\n" if found == RESULT else "")
            # One that waited for its turn never runs any more.
            ran = 0 if moment == "claimed" and client is clients[-1] else 1
            assert _marks(dom0).count(cid) in {ran, int(found == RESULT)}
        assert dom0.dom0("pgrep", "-f", f"cat {_HELD}").returncode == 1
        dom0.wait_served("work", "dev")
        # What was told is final.
        assert len(_marks(dom0)) == len(set(_marks(dom0)))
    finally:
        dom0.vm("work", "pkill", "-TERM", "-f", "qvm-remote -v")
        dom0.dom0("rm", "-f", _MARKS, _HELD)


def _lines(dom0, path):
    return dom0.dom0("cat", path).stdout.decode().splitlines()


def _left(dom0, clients):
    """What there is in dom0 and in the queues, as (where, what)."""
    found = {("dom0", str(one)) for one in json.loads(dom0.dom0("/usr/bin/python3", "-c", _LEFT, check=True).stdout)}
    return found | {(vm, name) for vm, one in clients.items() for name in one.look()}


def _wait_clean(dom0, clients, known, seconds=60):
    end = time.monotonic() + seconds
    while True:
        left = _left(dom0, clients) - known
        if not left:
            return
        assert time.monotonic() < end, f"this is left: {left}"
        time.sleep(0.1)


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.long)])
def test_each_command_ends_once_whichever_of_both_is_killed_at_random_moments_under_load(dom0, kills):
    dice = seeded_dice()
    dom0.dom0("rm", "-f", MARKS, RAN)
    clients = {vm: Clients(dom0, vm) for vm in ("work", "dev")}
    load = Load(types.SimpleNamespace(clients=clients), list(clients), dice, 3)
    try:
        # Other tests in this dom0 leave things there for clients that they have killed.
        known = _left(dom0, clients)
        for _ in range(kills):
            load.fill()
            # Also while the engine of before is being cleaned up after.
            load.take(dice.uniform(0.02, 1.5))
            dice.choices(list(_KILLS_UNDER_LOAD), list(_KILLS_UNDER_LOAD.values()))[0](dom0, lambda: None)
        assert not load.finish()
        dom0.wait_served(*clients)
        _wait_clean(dom0, clients, known)
    finally:
        for one in clients.values():
            one.end()
    beats = read_beats(_lines(dom0, RAN))
    assert all(map(is_one_run, beats.values()))
    for end in load.ended.values():
        check_end(end, [at for _, at in beats.get(end.cid, [])])
    # Key and id of each that began: no client's twice, and none under another one's id.
    marks = [line.split() for line in _lines(dom0, MARKS)]
    assert len(marks) == len({key for key, _ in marks}) == len({cid for _, cid in marks})
    assert {(key, end.cid) for key, end in load.ended.items() if outcome(end) == RESULT} <= set(map(tuple, marks))
    assert len(load.ended) == len(load.started)
    assert RESULT in map(outcome, load.ended.values()), "nothing came through"


@pytest.mark.long
def test_an_engine_with_a_damaged_ledger_serves_nobody_until_that_was_set_aside(dom0):
    dom0.stop_engine()
    ledger = "/var/lib/qvm-remote/ledger.sqlite"
    dom0.dom0("sh", "-c", f"rm -f {ledger}-*; echo garbage > {ledger}", check=True)
    dom0.factory.start()
    _, found = dom0.call("qvm_remote.ledger_check")
    assert len(found["problems"]) == 1
    assert dom0.remote("-t", "5", "true", timeout=90).returncode == 125
    code, found = dom0.call("qvm_remote.ledger_check", "set_aside=True")
    assert (code, found["problems"]) == (0, [])
    # The engine tries again by itself.
    dom0.wait_served("work", "dev")
