# SPDX-License-Identifier: GPL-2.0-or-later
"""Whoever takes part in a command dies at every step of its life: it ends as a result, refused or interrupted, runs at most once,
never after its client was told that it would not, and leaves nothing behind.
"""

import itertools
import time

import pytest
from fault_stand import INTERRUPTED, PATIENCE, RAN, FaultStand, outcome

_numbers = itertools.count(1)
_PIDS = "/var/tmp/pids"
#: Says who its supervisor and itself are, and goes on until somebody ends it.
_ENDLESS = f"echo $PPID $$ > {_PIDS}; for ((i = 1; ; i++)); do echo $QVM_REMOTE_ID $i $EPOCHREALTIME >> {RAN}; sleep 0.05; done"
#: What the service comes to on the way of a command, in this order; see service_process.
_ON_THE_WAY = ("queued", "fetched", "kept", "stdin", "claiming", "claimed", "submitted", "starting", "started", "running", "telling", "told", "streamed")
_AT_ITS_END = ("ended", "proven", "finishing", "done", "delivering", "half-delivered", "sent", "answered", "delivered", "closed")
_ALL = _ON_THE_WAY + _AT_ITS_END
#: Those of them at which the VM has the result.
_ANSWERED = ("sent", "answered", "delivered", "closed")
#: Those at which what is on the disk changes: the others take minutes.
_SHORT = ("claiming", "claimed", "started", "running", "proven", "finishing", "half-delivered", "delivered")
#: Of those, one of each part of a command's life: for the others who die.
_SHORT_OF_OTHERS = ("claimed", "running", "half-delivered")


def _steps(all_of_them, short):
    return [step if step in short else pytest.param(step, marks=pytest.mark.long) for step in all_of_them]


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """The service, and VMs that have their keys."""
    with FaultStand(str(tmp_path_factory.mktemp("faults"))) as one:
        one.set_up()
        yield one


@pytest.fixture(autouse=True)
def _let_go(stand):
    """Have nobody stand at a step any more, however a test ended: the next one needs the service."""
    yield
    stand.service.order("go")


def _start(stand, *kinds):
    """Start clients in work, whose commands come to the step, and one in dev beside them; give their keys."""
    keys = {"work": [], "dev": []}
    for vm, kind in [*(("work", kind) for kind in kinds), ("dev", "beats")]:
        key = f"{kind}-{next(_numbers)}"
        stand.clients[vm].start(key, kind)
        keys[vm].append(key)
    return keys


def _kinds_for(step):
    return {"stdin": ("stdin",), "half-delivered": ("large",), "streamed": ("beats",)}.get(step, ("short", "beats"))


def _finish(stand, keys):
    ended = [end for vm, some in keys.items() for end in stand.clients[vm].wait_ended(some).values()]
    stand.check(ended)
    return ended


def _hold(stand, step):
    """Bring a command of work to a step, at which the service stands; give the keys of all clients."""
    stand.service.hold(step, "work")
    keys = _start(stand, *_kinds_for(step))
    stand.service.wait_for(f"at {step}")
    return keys


@pytest.mark.parametrize("step", _steps(_ALL, _SHORT))
def test_the_service_is_killed(stand, step):
    keys = _hold(stand, step)
    stand.restart_service()
    _finish(stand, keys)


@pytest.mark.parametrize("step", ["recovering", "interrupting", "recovered"])
def test_the_service_is_killed_while_it_cleans_up_after_one_that_was_killed(stand, step):
    stand.service.hold("running")
    keys = _start(stand, "beats")
    stand.service.wait_for("at running")
    stand.restart_service(step).wait_for(f"at {step}")
    stand.restart_service()
    _finish(stand, keys)


def _pids(stand):
    deadline = time.monotonic() + PATIENCE
    while True:
        pids = stand.dom0("cat", _PIDS).stdout.decode().split()
        if len(pids) == 2:
            return pids
        assert time.monotonic() < deadline, "the command did not begin"
        time.sleep(0.05)


def test_what_a_dead_service_left_running_is_ended_before_it_is_called_interrupted(stand):
    stand.dom0("rm", "-f", _PIDS)
    stand.clients["work"].start("endless", "endless", ["-n", _ENDLESS])
    supervisor, command = _pids(stand)
    # Now nobody but the next service ends it.
    stand.dom0("kill", "-STOP", supervisor, check=True)
    service = stand.restart_service("interrupting")
    service.wait_for("at interrupting")
    # Nothing is recorded, and nobody was told. What was killed may wait for somebody to hear of it.
    assert stand.dom0("sh", "-c", f"test -e /proc/{command} && ! grep -q 'State:.[ZX]' /proc/{command}/status").returncode
    written = service.ran()
    service.order("go")
    (end,) = _finish(stand, {"work": ["endless"]})
    assert outcome(end) == INTERRUPTED
    assert service.ran() == written


def test_a_result_whose_row_was_not_written_is_delivered_all_the_same(stand):
    stand.service.hold("finishing")
    stand.clients["work"].start("only", "short")
    stand.service.wait_for("at finishing")
    stand.restart_service()
    (end,) = _finish(stand, {"work": ["only"]})
    assert (end.code, end.out) == (7, "done\n")


@pytest.mark.parametrize("step", ["claimed", "running", "ended"])
def test_a_command_is_interrupted_by_the_key_that_it_was_signed_with(stand, step):
    stand.service.hold(step)
    stand.clients["work"].start("rotated", "short")
    stand.service.wait_for(f"at {step}")
    stand.service.order("rotate work")
    stand.service.wait_for("rotated")
    stand.service.order("hand work")
    stand.service.wait_for("handed")
    service = stand.restart_service("delivering")
    # Its client has the key of before; dom0 has another one for this VM by now.
    service.wait_for("key-handed work")
    service.wait_for("at delivering")
    service.order("go")
    (end,) = _finish(stand, {"work": ["rotated"]})
    assert "no proof" not in end.err
    assert "interrupted" in end.err


def _kill_agent(stand, vm):
    stand.clients[vm].kill_agent()


def _kill_session(stand, vm):
    stand.service.kill_session(vm)


#: An end of a session to who kills it, and who kills the other end.
_ENDS = {"agent": (_kill_agent, _kill_session), "qvm-run": (_kill_session, _kill_agent)}


@pytest.mark.parametrize("end", sorted(_ENDS))
@pytest.mark.parametrize("step", _steps(_ALL, _SHORT_OF_OTHERS))
def test_sessions_are_cut_at_either_end(stand, step, end):
    kill, kill_other_end = _ENDS[end]
    # One that was cut after its last command may not be there again yet.
    stand.vm("dev", "qvm-remote", "-q", "ping", "-t", str(PATIENCE), timeout=2 * PATIENCE, check=True)
    keys = _hold(stand, step)
    kill(stand, "work")
    # Its command is on its way too, wherever it is.
    kill_other_end(stand, "dev")
    stand.service.order("go")
    assert {end.code for end in _finish(stand, keys)} == {7}


def _kill_clients(stand, vm, keys):
    """Kill clients; give the ends of those that had ended by themselves, with the result that they had just got."""
    for key in keys:
        stand.clients[vm].kill(key)
    ended = stand.clients[vm].wait_ended(keys).values()
    assert {end.code for end in ended} <= {-9, 7}
    return [end for end in ended if end.code == 7]


@pytest.mark.parametrize("step", _steps(_ALL, _SHORT_OF_OTHERS))
def test_clients_are_killed_and_what_they_leave_harms_no_later_one(stand, step):
    keys = _hold(stand, step)
    ended = _kill_clients(stand, "work", keys["work"])
    # Of the one that stands at the step no result can have come yet.
    assert step in _ANSWERED or len(ended) < len(keys["work"])
    stand.service.order("go")
    later = _start(stand, "short", "beats")
    for vm, more in later.items():
        ended += stand.clients[vm].wait_ended(more if vm == "work" else keys[vm] + more).values()
    assert {end.code for end in ended} == {7}
    # That no command has run twice is seen from what all of them wrote, those of killed clients too.
    stand.check(ended, dead=["work"])


@pytest.mark.parametrize("step", _steps(_ALL, _SHORT_OF_OTHERS))
def test_all_of_a_vm_and_clients_of_another_one_are_killed(stand, step):
    keys = _hold(stand, step)
    ended = _kill_clients(stand, "dev", keys["dev"])
    stand.power_cut("work")
    stand.service.order("go")
    stand.service.wait_for("connected work")
    stand.check(ended, dead=["work", "dev"])
