# SPDX-License-Identifier: GPL-2.0-or-later
"""Full and read-only disks, wherever something is written: one clear line, nothing that was acknowledged is lost, and all goes on
when there is room again.
"""

import itertools
import re
import time

import pytest
from fault_stand import AUDIT, KEYS, STATE, FaultStand, told_by

SPOOL, NOTES, COMMANDS, RUN = f"{STATE}/spool", f"{STATE}/handover", f"{AUDIT}/audit.log.commands", "/run/qvm-remote"
#: More than a line of the audit log has room for.
_LONG = ["-n", "true " + "x" * 2000 + "; exit 7"]
_SHORT = ["-n", "exit 7"]
_QUEUE = "/home/user/.qvm-remote"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """The service with each of its folders on a small disk of its own, and a VM with its queue on one."""
    with FaultStand(str(tmp_path_factory.mktemp("faults")), ("work",), output_max=1 << 20) as one:
        one.set_up([STATE, SPOOL, NOTES, AUDIT, COMMANDS, KEYS, RUN])
        yield one


@pytest.fixture(scope="module")
def small_vm(stand):
    """The stand, with the VM's queue on a small disk, and its history and log on another one."""
    stand.service.kill()
    uid = stand.vm("work", "stat", "-c", "%u", "/home/user", check=True).stdout.decode().strip()
    for path in (_QUEUE, f"{_QUEUE}/history"):
        stand.in_vms_root("work", "mkdir", "-p", path)
        stand.in_vms_root("work", "mount", "-t", "tmpfs", "-o", f"size=1m,mode=700,uid={uid},gid={uid}", "tmpfs", path)
    stand.start_service().wait_for("key-mended", "key-lost", "key-handed", "connected")
    # The key was on the disk that is hidden now; dom0 hands it over as a new one.
    stand.service.order("rotate work")
    stand.service.wait_for("rotated")
    stand.service.order("kill-session work")
    stand.service.wait_for("key-handed work")
    return stand


def _remote(stand, words=_SHORT, stdin=""):
    key = f"client-{next(_numbers)}"
    stand.clients["work"].start(key, "short", words, stdin)
    return stand.clients["work"].wait_ended([key])[key]


def _start(stand, words=_SHORT):
    key = f"client-{next(_numbers)}"
    stand.clients["work"].start(key, "short", words, "")
    return key


def _wait(stand, key):
    return stand.clients["work"].wait_ended([key])[key]


def _check_told(end, text):
    """One line says what is wrong."""
    assert end.code == 125
    told = told_by(end)
    assert len(told) == 1, end.err
    assert re.search(text, told[0]), told[0]


_CAUSES = {"full": "No space left on device|disk is full", "read-only": "Read-only file system|readonly database"}


def _spoil(stand, path, cause):
    if cause == "read-only":
        _set_read_only(stand, path, True)
        return
    if path == AUDIT:
        stand.service.order("align-audit")
        stand.service.wait_for("aligned")
    stand.fill(path)


def _mend(stand, path, cause):
    stand.free(path) if cause == "full" else _set_read_only(stand, path, False)


def _set_read_only(stand, path, on):
    """While the service runs, which has the ledger and the audit log open."""
    if path == STATE:
        stand.service.order(f"ledger-read-only {int(on)}")
        stand.service.wait_for("ledger read-only")
    elif path == AUDIT:
        stand.cover(path, on)
    else:
        stand.make_read_only(path, on)


@pytest.mark.parametrize(
    ("path", "words", "stdin", "text", "causes"),
    [
        (SPOOL, _SHORT, "", "dom0 can't keep the commands of work", _CAUSES),
        pytest.param(SPOOL, ["wc -c; exit 7"], "x" * 300_000, "dom0 can't keep the commands of work", _CAUSES, marks=pytest.mark.long),
        pytest.param(COMMANDS, _LONG, "", "the whole command can't be kept", _CAUSES, marks=pytest.mark.long),
        (STATE, _SHORT, "", "the ledger failed", _CAUSES),
        (AUDIT, _SHORT, "", "the audit log .* can't be written", _CAUSES),
    ],
    ids=["spool", "stdin", "commands", "ledger", "audit"],
)
def test_what_dom0_can_not_write_down_is_refused_and_not_run(stand, path, words, stdin, text, causes):
    for cause in causes:
        _spoil(stand, path, cause)
        end = _remote(stand, words, stdin)
        _check_told(end, text)
        _check_told(end, _CAUSES[cause])
        _mend(stand, path, cause)
        assert _remote(stand, words, stdin).code == 7
    stand.check([])


@pytest.mark.parametrize("cause", _CAUSES)
@pytest.mark.parametrize(("step", "path"), [("finishing", STATE), ("proven", AUDIT), ("starting", STATE)])
def test_an_end_that_can_not_be_recorded_is_told_and_recorded_later(stand, step, path, cause):
    stand.service.hold(step)
    key = _start(stand)
    stand.service.wait_for(f"at {step}")
    _spoil(stand, path, cause)
    stand.service.order("go")
    _check_told(_wait(stand, key), f"its end could not be recorded: .*({_CAUSES[cause]})")
    # As the ledger has it, it has not ended.
    assert [row[2] for row in stand.service.look()["ledger"] if row[2] != "delivered"] in (["running"], ["claimed"])
    _mend(stand, path, cause)
    # Not by a restart: by the service that runs.
    stand.check([])
    assert _remote(stand).code == 7


def test_a_result_whose_end_can_not_be_recorded_reaches_a_vm_that_was_away_meanwhile(stand):
    stand.service.hold("finishing")
    _start(stand, ["-n", "echo here; exit 7"])
    stand.service.wait_for("at finishing")
    stand.fill(STATE)
    stand.power_cut("work")
    stand.service.order("go")
    stand.service.wait_for("log work: ")
    stand.free(STATE)
    stand.wait_settled(dead=["work"])
    assert _remote(stand).code == 7


def test_output_that_can_not_be_kept_ends_its_command_and_says_so(stand):
    stand.service.hold("started")
    key = _start(stand, ["-n", "head -c 700000 /dev/zero; sleep 600"])
    stand.service.wait_for("at started")
    stand.fill(SPOOL)
    stand.service.order("go")
    _check_told(_wait(stand, key), "can't be kept|could not keep")
    stand.free(SPOOL)
    stand.check([])
    assert _remote(stand).code == 7


@pytest.mark.parametrize("cause", _CAUSES)
def test_a_key_that_can_not_be_stored_leaves_the_one_before_at_work(stand, cause):
    _forget_replaced_keys(stand)
    _spoil(stand, KEYS, cause)
    stand.service.order("rotate work")
    assert re.search(_CAUSES[cause], stand.service.wait_for("rotated not: "))
    assert _remote(stand).code == 7
    _mend(stand, KEYS, cause)
    stand.service.order("rotate work")
    stand.service.wait_for("rotated")
    assert _remote(stand).code == 7
    stand.service.order("kill-session work")
    stand.service.wait_for("key-handed work")
    assert _remote(stand).code == 7


def _forget_replaced_keys(stand):
    """What another test replaced is to be noted or removed as well, which would be what fails."""
    stand.dom0("sh", "-c", f"rm -f {KEYS}/*.key.old", check=True)


def test_a_handed_key_whose_place_can_not_be_written_is_refused_until_it_can(stand):
    _forget_replaced_keys(stand)
    stand.service.order("rotate work")
    stand.service.wait_for("rotated")
    stand.make_read_only(KEYS)
    stand.service.order("kill-session work")
    stand.service.wait_for("log work: can't store the new key of work")
    _check_told(_remote(stand), "can't store the new key of work: Read-only")
    stand.make_read_only(KEYS, on=False)
    assert _remote(stand).code == 7


@pytest.mark.parametrize("cause", _CAUSES)
def test_without_notes_of_keys_vms_are_served_all_the_same(stand, cause):
    _spoil(stand, NOTES, cause)
    stand.service.order("rotate work")
    stand.service.wait_for("rotated")
    stand.service.order("kill-session work")
    assert re.search(_CAUSES[cause], stand.service.wait_for("log work: can't note what key"))
    assert _remote(stand).code == 7
    _mend(stand, NOTES, cause)


@pytest.mark.parametrize(
    ("path", "text"),
    [(STATE, "the ledger .* (readonly|unable)"), (AUDIT, "the audit log .*Read-only"), (RUN, "can't use /run/qvm-remote: Read-only")],
    ids=["ledger", "audit", "run"],
)
def test_a_service_that_can_not_write_ends_with_one_line_and_begins_when_it_can(stand, path, text):
    stand.service.hold("running")
    key = _start(stand)
    stand.service.wait_for("at running")
    stand.service.kill()
    stand.make_read_only(path)
    assert re.search(text, stand.start_service().wait_for("failed"))
    stand.make_read_only(path, on=False)
    stand.start_service()
    _check_told(_wait(stand, key), "interrupted")
    stand.check([])


def test_a_vm_whose_disk_is_full_hears_so_and_queues_nothing(small_vm):
    small_vm.fill(_QUEUE, "work")
    _check_told(_remote(small_vm), "can't write to the queue .*No space")
    assert small_vm.clients["work"].look() == []
    small_vm.free(_QUEUE, "work")
    assert _remote(small_vm).code == 7


def _has_another_session(stand):
    """Have the session end, and another one begin; what was said before is heard."""
    stand.service.waiting_lines()
    stand.service.order("kill-session work")
    stand.service.wait_for("killed")


def test_a_session_begins_though_its_vms_disk_is_full(small_vm):
    assert _remote(small_vm).code == 7
    small_vm.fill(_QUEUE, "work")
    _has_another_session(small_vm)
    small_vm.service.wait_for("connected work")
    small_vm.free(_QUEUE, "work")
    # In the same session, without a wait for another one.
    assert _remote(small_vm).code == 7
    assert [line for line in small_vm.service.waiting_lines() if line.startswith(("connected", "unable", "log"))] == []


def test_a_key_that_its_vm_has_no_room_for_is_told_once_and_handed_over_when_there_is(small_vm):
    assert _remote(small_vm).code == 7
    small_vm.service.order("rotate work")
    small_vm.service.wait_for("rotated")
    small_vm.fill(_QUEUE, "work")
    _has_another_session(small_vm)
    small_vm.service.wait_for("log work: its key could not be handed over: ")
    small_vm.service.wait_for("key-not-handed work")
    # It is tried again meanwhile, and not told again.
    time.sleep(12)
    assert [line for line in small_vm.service.waiting_lines() if line.startswith(("key-", "log"))] == []
    small_vm.free(_QUEUE, "work")
    small_vm.service.wait_for("key-handed work")
    assert _remote(small_vm).code == 7


def test_a_vm_that_can_do_nothing_that_it_is_asked_is_told_of_once_and_served_when_it_can(small_vm):
    assert _remote(small_vm).code == 7
    small_vm.cover(f"{_QUEUE}/queue", where="work")
    _has_another_session(small_vm)
    small_vm.service.wait_for("log work: not served: the agent could not do what it was asked")
    small_vm.service.wait_for("unable work")
    time.sleep(8)
    assert [line for line in small_vm.service.waiting_lines() if line.startswith(("connected", "unable", "log"))] == []
    small_vm.cover(f"{_QUEUE}/queue", on=False, where="work")
    small_vm.service.wait_for("connected work")
    assert _remote(small_vm).code == 7


@pytest.mark.parametrize("words", [_SHORT, ["-n", "head -c 400000 /dev/zero | tr '\\0' y; exit 7"]], ids=["small", "large"])
def test_a_result_waits_until_its_vm_has_room(small_vm, words):
    small_vm.service.hold("ended")
    key = _start(small_vm, words)
    small_vm.service.wait_for("at ended")
    small_vm.fill(_QUEUE, "work")
    small_vm.service.order("go")
    small_vm.service.wait_for("log work: its results wait")
    small_vm.free(_QUEUE, "work")
    end = _wait(small_vm, key)
    assert (end.code, end.out) == (7, "y" * 400_000 if words != _SHORT else "")
    small_vm.check([])


def test_a_result_waits_until_its_vms_disk_is_not_read_only_any_more(small_vm):
    small_vm.service.hold("ended")
    key = _start(small_vm, ["-n", "echo here; exit 7"])
    small_vm.service.wait_for("at ended")
    small_vm.cover(f"{_QUEUE}/queue/results", where="work")
    small_vm.service.order("go")
    small_vm.service.wait_for("log work: its results wait")
    small_vm.cover(f"{_QUEUE}/queue/results", on=False, where="work")
    end = _wait(small_vm, key)
    assert (end.code, end.out) == (7, "here\n")
    small_vm.check([])


def test_a_read_only_history_costs_nobody_the_output(small_vm):
    small_vm.in_vms_root("work", "mount", "-o", "remount,ro", f"{_QUEUE}/history")
    end = _remote(small_vm, ["-n", "echo here; exit 7"])
    assert (end.code, end.out) == (7, "here\n")
    small_vm.in_vms_root("work", "mount", "-o", "remount,rw", f"{_QUEUE}/history")
    small_vm.check([])


def test_a_full_history_costs_nobody_the_output(small_vm):
    small_vm.fill(f"{_QUEUE}/history", "work")
    end = _remote(small_vm, ["-n", "echo here; exit 7"])
    assert (end.code, end.out) == (7, "here\n")
    small_vm.free(f"{_QUEUE}/history", "work")
    small_vm.check([])


def test_a_vm_whose_disk_is_read_only_hears_so_and_is_served_when_it_is_not(small_vm):
    small_vm.service.stop()
    small_vm.in_vms_root("work", "mount", "-o", "remount,ro", _QUEUE)
    _check_told(_remote(small_vm), "can't write to the queue .*Read-only|Read-only file system")
    small_vm.start_service()
    small_vm.in_vms_root("work", "mount", "-o", "remount,rw", _QUEUE)
    assert _remote(small_vm).code == 7
