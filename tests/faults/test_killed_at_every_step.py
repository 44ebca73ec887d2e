# SPDX-License-Identifier: GPL-2.0-or-later
"""Whoever takes part in a command dies at every step of its life: it ends as a result, refused or interrupted, runs at most once,
never after its client was told that it would not, and leaves nothing behind.
"""

import itertools

import pytest
from fault_stand import FaultStand

_numbers = itertools.count(1)
#: What the service comes to on the way of a command, in this order; see service_process.
_ON_THE_WAY = ("queued", "fetched", "kept", "stdin", "claiming", "claimed", "submitted", "starting", "started", "running", "telling", "told", "streamed")
_AT_ITS_END = ("ended", "proven", "finishing", "done", "delivering", "half-delivered", "sent", "answered", "delivered", "closed")
#: The steps that another one than the service dies at: one of each part of a command's life.
_STEPS_OF_OTHERS = ("queued", "fetched", "claimed", "running", "done", "delivering", "delivered")
#: Of both, those at which what is on the disk changes: the others take minutes.
_SHORT = ("claiming", "claimed", "started", "running", "proven", "finishing", "half-delivered", "delivered")
_SHORT_OF_OTHERS = ("claimed", "running", "delivering")


def _steps(all_of_them, short):
    return [step if step in short else pytest.param(step, marks=pytest.mark.long) for step in all_of_them]


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """The service, and VMs that have their keys."""
    with FaultStand(str(tmp_path_factory.mktemp("faults"))) as one:
        one.set_up()
        yield one


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


def _finish(stand, keys, dead=()):
    ended = [end for vm, some in keys.items() if vm not in dead for end in stand.clients[vm].wait_ended(some).values()]
    stand.check(ended, dead)
    return ended


@pytest.mark.parametrize("step", _steps(_ON_THE_WAY + _AT_ITS_END, _SHORT))
def test_the_service_is_killed(stand, step):
    stand.service.hold(step, "work")
    keys = _start(stand, *_kinds_for(step))
    stand.service.wait_for(f"at {step}")
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


@pytest.mark.parametrize("step", _steps(_STEPS_OF_OTHERS, _SHORT_OF_OTHERS))
def test_sessions_are_cut_at_either_end(stand, step):
    stand.service.hold(step, "work")
    keys = _start(stand, *_kinds_for(step))
    stand.service.wait_for(f"at {step}")
    stand.clients["work"].kill_agent()
    stand.service.order("kill-session dev")
    stand.service.wait_for("killed")
    stand.service.order("go")
    assert {end.code for end in _finish(stand, keys)} == {7}


@pytest.mark.parametrize("step", _steps(_STEPS_OF_OTHERS, _SHORT_OF_OTHERS))
def test_clients_of_one_vm_and_all_of_another_one_are_killed(stand, step):
    stand.service.hold(step, "work")
    keys = _start(stand, *_kinds_for(step))
    stand.service.wait_for(f"at {step}")
    for key in keys["dev"]:
        stand.clients["dev"].kill(key)
    assert {end.code for end in stand.clients["dev"].wait_ended(keys["dev"]).values()} == {-9}
    stand.power_cut("work")
    stand.service.order("go")
    stand.service.wait_for("connected work")
    _finish(stand, {}, dead=["work", "dev"])
