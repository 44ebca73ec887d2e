# SPDX-License-Identifier: GPL-2.0-or-later
"""The service holds nothing open once it has ended, however it did: the engine makes a new one each few seconds while it can't serve.
There is only ever one, whatever becomes of its lock's file; and what goes wrong with one command does not end it.
"""

import errno
import fcntl
import gc
import os
import shutil
import threading
import types

import pytest
from boxes import eventually
from pullrpc import lock, note
from pullrpc import service as module
from pullrpc.config import digest, make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import EngineBusy, LedgerError
from pullrpc.lock import EngineLock
from pullrpc.service import Service


@pytest.fixture
def service(tmp_path, monkeypatch):
    """A service in a dom0 without VMs."""
    qvm_ls = tmp_path / "qvm-ls"
    qvm_ls.write_text("#!/bin/sh\n")
    qvm_ls.chmod(0o700)
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "audit.log"}
    dom0 = Dom0(make_config({"qvm_ls": str(qvm_ls), "syslog": False, **{name: str(tmp_path / folder) for name, folder in names.items()}}))
    monkeypatch.setattr(dom0.execution, "warm", lambda: None)
    # Made once, and kept.
    dom0.execution.recover()
    return lambda: Service(dom0, None, None, lambda *_: None, lambda text: None)


def _open():
    # What other tests have left goes first.
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def _is_busy(service, monkeypatch):
    with EngineLock(service.dom0.config.run_dir), pytest.raises(EngineBusy):
        service.run()


def _is_busy_once(service, monkeypatch):
    with EngineLock(service.dom0.config.run_dir), pytest.raises(EngineBusy):
        service.run_once()


def _is_damaged(service, monkeypatch):
    def fail():
        raise LedgerError("damaged")

    with monkeypatch.context() as damaged, pytest.raises(LedgerError):
        damaged.setattr(service.dom0.execution, "recover", fail)
        service.run()


def _is_stopped_before(service, monkeypatch):
    service.stop()
    service.run()


def _runs_once(service, monkeypatch):
    assert service.run_once() == {}


def _is_never_run(service, monkeypatch):
    service.close()


@pytest.mark.parametrize("end", [_is_busy, _is_busy_once, _is_damaged, _is_stopped_before, _runs_once, _is_never_run])
def test_a_service_that_has_ended_holds_nothing_open(service, monkeypatch, end):
    end(service(), monkeypatch)
    before = _open()
    for _ in range(10):
        end(service(), monkeypatch)
    assert _open() < before + 10


def test_the_note_of_a_service_is_believed_of_no_other(service, monkeypatch):
    config = service().dom0.config
    seen = []
    for _ in range(2):
        one = service()
        write = one.dom0.audit.write

        def look(what, *args, write=write, **fields):
            seen.append((what, note.read(config)))
            if what == "started":
                note.write(config, {"settings": digest(config)})
            return write(what, *args, **fields)

        # What one that was killed leaves.
        os.makedirs(config.run_dir, 0o700, exist_ok=True)
        note.write(config, {"settings": digest(config)})
        with monkeypatch.context() as looking:
            looking.setattr(one.dom0.audit, "write", look)
            one.stop()
            one.run()
        assert not note.read(config)
    assert [what for what, _ in seen] == ["started", "stopped"] * 2
    assert not any(known for _, known in seen)


def test_to_stop_a_service_that_has_ended_reaches_nobody_else(service):
    one = service()
    one.close()
    # One of these has its number.
    pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(8)]
    try:
        one.stop()
        one.reload()
        for read, _ in pipes:
            with pytest.raises(BlockingIOError):
                os.read(read, 1)
        one.close()
        for read, write in pipes:
            os.fstat(read), os.fstat(write)
    finally:
        for pipe in pipes:
            for fd in pipe:
                os.close(fd)


def test_a_signal_that_comes_as_a_service_ends_finds_it_ended(service, monkeypatch):
    one, close, written = service(), os.close, []

    def close_and_be_interrupted(fd):
        close(fd)
        one.stop()

    with monkeypatch.context() as interrupted:
        interrupted.setattr(module.os, "close", close_and_be_interrupted)
        interrupted.setattr(module.os, "write", lambda *args: written.append(args))
        one.close()
    assert written == []


def test_one_that_stops_a_service_from_elsewhere_as_it_ends_writes_into_no_other_descriptor(service):
    for _ in range(200):
        one = service()
        stopping = threading.Thread(target=lambda one=one: [one.stop() for _ in range(20)])
        stopping.start()
        one.close()
        read, write = os.pipe2(os.O_NONBLOCK)
        other, another = os.pipe2(os.O_NONBLOCK)
        stopping.join()
        try:
            for fd in (read, other):
                with pytest.raises(BlockingIOError):
                    os.read(fd, 1)
        finally:
            for fd in (read, write, other, another):
                os.close(fd)


@pytest.fixture
def take_away(tmp_path, monkeypatch):
    """Have the lock's folder removed between the opening of its file and the locking of it, so many times; gives how many are left."""

    def begin(times):
        left = [times]

        def flock(fd, how):
            if left[0]:
                left[0] -= 1
                shutil.rmtree(tmp_path / "run")
            fcntl.flock(fd, how)

        monkeypatch.setattr(lock, "fcntl", types.SimpleNamespace(**{**vars(fcntl), "flock": flock}))
        return left

    return begin


def test_a_lock_that_was_taken_away_as_it_was_taken_is_none(tmp_path, take_away):
    left = take_away(1)
    with EngineLock(str(tmp_path / "run")):
        assert left == [0]
        assert lock.is_held(str(tmp_path / "run"))
        with pytest.raises(EngineBusy), EngineLock(str(tmp_path / "run")):
            pass


def test_a_lock_that_is_taken_away_again_and_again_is_not_tried_for_ever(tmp_path, take_away):
    take_away(1000)
    before = _open()
    with pytest.raises(EngineBusy), EngineLock(str(tmp_path / "run")):
        pass
    assert _open() < before + 10


class _Failing:
    """What can't be done for one command as long as there are no descriptors."""

    def __init__(self):
        self.has_descriptors = False
        self.tried, self.done = [], []

    def __call__(self, vm, cid, reason=None):
        self.tried.append(cid)
        if cid == "first" and not self.has_descriptors:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/a/folder")
        self.done.append(cid)


def test_an_end_that_can_not_be_recorded_for_whatever_reason_is_said_once_and_tried_again(service, monkeypatch):
    one, said, failing = service(), [], _Failing()
    one.log = said.append
    monkeypatch.setattr(one.dom0.execution, "finish_lost", failing)
    for cid in ("first", "second"):
        one.lose("work", cid, "it was lost")
    at_work = threading.Thread(target=one.run)
    at_work.start()
    try:

        def look_again():
            one.reload()
            return failing.tried.count("first") > 2

        assert eventually(look_again)
        assert failing.done == ["second"]
        assert [text for text in said if "first" in text] == ["work: first: [Errno 24] Too many open files: '/a/folder'"]
        failing.has_descriptors = True
        one.reload()
        assert eventually(lambda: "first" in failing.done)
        assert at_work.is_alive()
    finally:
        one.stop()
        at_work.join(30)
    assert not at_work.is_alive()
    assert sorted(failing.done) == ["first", "second"]


def test_a_service_that_can_not_end_one_command_ends_the_others(service, monkeypatch):
    one, said, failing = service(), [], _Failing()
    one.log = said.append
    monkeypatch.setattr(one.dom0.execution, "interrupt_queued", failing)
    monkeypatch.setattr(one.lines, "close", lambda: [("work", "first"), ("work", "second")])
    one.stop()
    one.run()
    assert failing.done == ["second"]
    assert len([text for text in said if "first" in text]) == 1


def test_a_service_without_descriptors_looks_again_who_is_to_be_served(service, monkeypatch):
    one, said, failing = service(), [], _Failing()
    one.log = said.append
    monkeypatch.setattr(one.dom0.keyring, "names", lambda: failing("work", "first") or [])
    at_work = threading.Thread(target=one.run)
    at_work.start()
    try:
        assert eventually(lambda: said)
        failing.has_descriptors = True
        one.reload()
        assert eventually(lambda: failing.done)
    finally:
        one.stop()
        at_work.join(30)
    assert not at_work.is_alive()
