# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM's pull loop on the real ledger, spool and keyring: no ending of a command at an awkward moment loses or garbles its result."""

import asyncio
import dataclasses
import hashlib
import os
import subprocess
import threading
import time
import types

import pytest
from pullrpc import execution, sandbox, tags
from pullrpc import puller as puller_module
from pullrpc import service as service_module
from pullrpc.aio import run
from pullrpc.audit_read import history, query
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import AgentUnable, AuditError, FrameError, LedgerError, Refused, SpoolError, ThreadError
from pullrpc.execution import _Running
from pullrpc.ids import new_cid
from pullrpc.lines import Lines
from pullrpc.puller import Finished, Puller
from pullrpc.results import INTERRUPTED, Result, of_bytes
from pullrpc.session import Found, Item, Session, _frames_of, _frames_of_all, read_poll
from pullrpc.tokens import fingerprint, make_token

KEY = bytes(range(32))


@pytest.fixture
def dom0(tmp_path):
    """dom0's side with a key for work, everything in a folder of this test."""
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "audit.log"}
    one = Dom0(make_config({name: str(tmp_path / folder) for name, folder in names.items()}))
    one.keyring.put("work", KEY.hex())
    return one


class _Hub:
    """What the loops share; its pool runs nothing until it is let."""

    def __init__(self, dom0):
        self.dom0 = dom0
        self.may_run = threading.Event()
        self.uuid = "one"
        self.logged = []
        self.log = self.logged.append
        self.lines = Lines(dom0, lambda vm, cid: self.may_run.wait(60), self._nobody, self.emit, self.log, self._nobody)

    def verify(self, vm, cid, command, token):
        self.dom0.intake.verify(vm, cid, command, token)
        return {"verified": True}

    def call(self, function, *args):
        return asyncio.get_running_loop().run_in_executor(None, function, *args)

    def close_deliveries(self, results):
        if results:
            self.dom0.results.close_deliveries(results)

    def served(self):
        return 1

    async def uuid_of(self, vm):
        return self.uuid

    def lost_of(self, vm):
        return {}

    def spawn(self, coroutine):
        asyncio.ensure_future(coroutine)

    def emit(self, *_):
        """Nobody listens."""

    def _nobody(self, *_):
        """Nobody waits for it."""


class _Vm:
    """A session with an agent that keeps what it is given, as ours does."""

    kind = "agent"
    streams = True
    fetch_max = 1 << 18

    def __init__(self):
        self.delivered, self.parts, self.dropped, self.taken = [], {}, [], []
        self.is_full, self.too_large = False, set()

    async def hello(self):
        """Nothing to say."""

    async def inspect(self):
        return Found(fingerprint(KEY), ())

    async def take(self, cids):
        self.taken += cids

    async def drop(self, cids):
        self.dropped += cids
        for cid in cids:
            self.parts.pop(cid, None)

    async def stream(self, cid, chunk):
        self.parts.setdefault(cid, {})[chunk.part] = chunk.offset + len(chunk.data)
        return True

    async def deliver(self, results):
        failed = {}
        for result in results:
            if self.is_full or result.cid in self.too_large:
                failed[result.cid] = "no space"
                continue
            for request, payload, done in _frames_of(result):
                if request["op"] == "put":
                    has = self.parts.setdefault(result.cid, {})
                    assert request["offset"] <= has.get(request["part"], 0)
                    has[request["part"]] = request["offset"] + len(payload)
                if done:
                    self.delivered.append((result.cid, result.exit_code))
                    yield done
        if failed:
            raise AgentUnable("no space", failed)

    async def bye(self):
        """Nothing to say."""

    async def close(self):
        """Nothing is open."""


def _folders(dom0):
    return {name: getattr(dom0.config, name) for name in ("key_dir", "state_dir", "run_dir", "audit_log")}


def _item(form="shell", command=b"true"):
    cid = new_cid()
    token = make_token(KEY, "work", cid, 10, form, command)
    return cid, Item(cid, len(command), len(token), -1, command, token)


def _started(dom0):
    """A command that runs, as far as the ledger goes."""
    cid, item = _item("ping", b"ping")
    request = dom0.intake.admit("work", cid, item.command, item.token, -1)
    assert dom0.intake.claim([(request, 0)]) == {}
    dom0.ledger.start("work", cid)
    return cid, request


def _play(dom0, scene, monkeypatch):
    async def play():
        hub, vm = _Hub(dom0), _Vm()

        async def opened(config, name):
            return vm

        monkeypatch.setattr(Session, "open", staticmethod(opened))
        try:
            await asyncio.wait_for(scene(Puller(hub, "work"), hub, vm), 60)
        finally:
            hub.may_run.set()
            hub.lines.close()

    run(play())


def test_a_command_that_ends_while_a_session_begins_is_delivered(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        cid, request = _started(dom0)
        loop, expire = asyncio.get_running_loop(), dom0.results.expire

        def expire_while_it_ends(*args):
            found = expire(*args)
            dom0.execution._finish_ping(request, time.monotonic())
            loop.call_soon_threadsafe(puller.finished, cid, Finished(status="done"))
            time.sleep(0.05)
            return found

        monkeypatch.setattr(dom0.results, "expire", expire_while_it_ends)
        await puller._open()
        await puller._deliver()
        assert vm.delivered == [(cid, 0)]
        assert dom0.ledger.state("work", cid)[0] == "delivered"

    _play(dom0, scene, monkeypatch)


def test_why_there_is_no_result_survives_a_session_that_breaks(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        cid, _ = _started(dom0)
        puller.finished(cid, Finished(lost="nobody knows"))
        await puller._open()
        await puller._deliver()
        assert vm.delivered == [(cid, 125)]

    _play(dom0, scene, monkeypatch)


def test_a_result_that_waited_too_long_is_answered_with_that(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        cid, request = _started(dom0)
        dom0.execution._finish_ping(request, time.monotonic())
        dom0.ledger._db.execute("UPDATE command SET done_at = done_at - 90000")
        await puller._open()
        await puller._deliver()
        assert vm.delivered == [(cid, 125)]

    _play(dom0, scene, monkeypatch)


def test_a_command_that_comes_with_its_own_cancel_does_not_run(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        cid, item = _item()
        await puller._take_in([item], [cid])
        assert vm.dropped == [cid]
        assert dom0.ledger.state("work", cid) is None

    _play(dom0, scene, monkeypatch)


def test_a_claimed_command_that_no_thread_can_be_started_for_ends_as_failed_and_the_next_one_runs(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        (first, one), (second, other), (third, last) = _item(), _item(), _item()
        start = threading.Thread.start

        def start_others(thread):
            if thread.name == "qvm-remote-run":
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as full:
            full.setattr(threading.Thread, "start", start_others)
            await puller._take_in([one, other], [])
        for cid in (first, second):
            assert dom0.ledger.state("work", cid)[0] == "done"
            assert b"can't start a thread" in b"".join(dom0.results.result("work", cid)[1]["err"][1](0))
        await puller._deliver()
        assert sorted(vm.delivered) == sorted([(first, 125), (second, 125)])
        await puller._take_in([last], [])
        assert dom0.ledger.state("work", third)[0] == "claimed"
        assert not hub.lines.is_done("work")

    _play(dom0, scene, monkeypatch)


def test_a_vm_that_lists_more_than_was_asked_for_breaks_the_protocol():
    cid, item = _item()
    row = [cid, item.command_size, item.token_size, -1, 0]
    assert len(read_poll({"items": [row], "cancels": []}, b"", 1)[0]) == 1
    with pytest.raises(FrameError, match="too long"):
        read_poll({"items": [row, row], "cancels": []}, b"", 1)
    with pytest.raises(FrameError, match="too long"):
        read_poll({"items": [row], "cancels": []}, b"", 0)


def test_a_poll_never_shows_again_what_has_ended_and_is_not_delivered(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        cid, item = _item()
        await puller._take_in([item], [])
        puller.finished(cid, Finished(status="done"))
        await puller._tell_taken()
        assert vm.taken == [cid]

    _play(dom0, scene, monkeypatch)


class _Ending:
    """A command that has just ended by itself: to cancel it comes too late."""

    def cancel(self):
        """Nothing happens any more."""


def test_a_client_that_gives_up_as_its_command_ends_holds_nothing_up(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        cid, request = _started(dom0)
        await puller._open()
        for part, data in (("out", b"x" * 100), ("err", b"")):
            with open(dom0.spool.path("work", cid, part), "wb") as file:
                file.write(data)
        dom0.execution._running["work", cid] = running = _Running(_Ending(), KEY)
        puller.wrote(cid, 100, 0)
        puller._stream()
        while cid not in vm.parts or puller._outflows[cid]._unanswered:
            await asyncio.sleep(0.01)
        assert vm.parts[cid] == {"out": 100}
        with open(dom0.spool.path("work", cid, "out"), "ab") as file:
            file.write(b"y" * 50)
        await puller._cancel(cid)
        outcome = sandbox.Outcome(0, None, False, False, 150, 0, False, False, 0.1)
        del dom0.execution._running["work", cid]
        dom0.execution._finish_run(request, (outcome, running.why_stopped))
        puller.finished(cid, Finished(status="done"))
        await puller._deliver()
        assert vm.delivered == [(cid, 0)]

    _play(dom0, scene, monkeypatch)


def test_a_vm_whose_disk_is_full_is_still_heard_and_gets_its_results_later(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        cid, request = _started(dom0)
        dom0.execution._finish_ping(request, time.monotonic())
        puller.finished(cid, Finished(status="done"))
        vm.is_full = True
        await puller._deliver()
        assert vm.delivered == []
        _let_time_pass(puller)
        await puller._deliver()
        # It is said once, however often the VM does not take them.
        assert [text for text in hub.logged if "its results wait" in text] == hub.logged
        assert len(hub.logged) == 1
        vm.is_full = False
        _let_time_pass(puller)
        await puller._deliver()
        assert vm.delivered == [(cid, 0)]
        assert not puller._not_before

    _play(dom0, scene, monkeypatch)


def _let_time_pass(puller):
    for cid in puller._not_before:
        puller._not_before[cid] -= 60


def test_a_result_that_its_vm_can_not_take_holds_up_none_of_the_others(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        large, *small = cids = [_done(dom0) for _ in range(3)]
        vm.too_large = {large}
        for cid in cids:
            puller.finished(cid, Finished(status="done"))
        await puller._deliver()
        assert vm.delivered == [(cid, 0) for cid in small]
        # What comes meanwhile does not wait for it, and it is not tried again with each of them.
        vm.too_large.clear()
        later = _done(dom0)
        puller.finished(later, Finished(status="done"))
        await puller._deliver()
        assert vm.delivered == [(cid, 0) for cid in (*small, later)]
        _let_time_pass(puller)
        await puller._deliver()
        assert vm.delivered == [(cid, 0) for cid in (*small, later, large)]
        assert not puller._outbox and not puller._not_before
        assert len(hub.logged) == 1

    _play(dom0, scene, monkeypatch)


@pytest.mark.parametrize("part", ["meta", "row"])
def test_a_result_that_dom0_can_not_read_holds_up_none_of_the_others(dom0, monkeypatch, part):
    async def scene(puller, hub, vm):
        await puller._open()
        bad, *good = cids = [_done(dom0) for _ in range(3)]
        for cid in cids:
            puller.finished(cid, Finished(status="done"))
        with monkeypatch.context() as failing:
            if part == "row":
                read = dom0.results.result
                failing.setattr(dom0.results, "result", lambda vm, cid: _fail() if cid == bad else read(vm, cid))
            else:
                os.rename(dom0.spool.path("work", bad, part), dom0.spool.path("work", bad, "aside"))
                os.mkdir(dom0.spool.path("work", bad, part))
                failing.setattr(_Vm, "deliver", _as_a_session_does)
            await puller._deliver()
        assert vm.delivered == [(cid, 0) for cid in good]
        assert list(puller._outbox) == list(puller._not_before) == [bad]
        assert len(hub.logged) == 1
        assert "dom0 can't keep" in hub.logged[0]
        if part != "row":
            os.rmdir(dom0.spool.path("work", bad, part))
            os.rename(dom0.spool.path("work", bad, "aside"), dom0.spool.path("work", bad, part))
        _let_time_pass(puller)
        await puller._deliver()
        assert vm.delivered == [(cid, 0) for cid in (*good, bad)]

    def _fail():
        raise SpoolError("dom0 can't keep the commands of work: Input/output error")

    async def _as_a_session_does(vm, results):
        failed = {}
        for _, _, cid, is_last in filter(None, _frames_of_all(results, failed)):
            if is_last:
                vm.delivered.append((cid, 0))
                yield cid
        if failed:
            raise AgentUnable("; ".join(failed.values()), failed)

    _play(dom0, scene, monkeypatch)


def test_what_a_vm_does_not_take_is_given_up_while_its_session_lasts(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        monkeypatch.setattr(puller_module, "_EXPIRE_EVERY", 0.2)
        monkeypatch.setattr(puller_module, "_DELIVER_AGAIN", 0.1)
        monkeypatch.setattr(_Vm, "poll", _answer_when_the_session_ends, raising=False)
        old, recorded = _done(dom0), _done(dom0)
        vm.is_full = True
        serving = asyncio.ensure_future(puller.run())
        while not puller._not_before:
            await asyncio.sleep(0.01)
        # This one was delivered; that can't be recorded now.
        puller._done_with(recorded)
        dom0.ledger._db.execute("UPDATE command SET done_at = done_at - 90000")
        while dom0.ledger.waiting_end("work", old)[1] != "expired":
            await asyncio.sleep(0.01)
        vm.is_full = False
        while not vm.delivered:
            await asyncio.sleep(0.01)
        puller.ending = True
        puller.wake()
        await serving
        assert vm.delivered == [(old, 125)]

    _play(dom0, scene, monkeypatch)


async def _answer_when_the_session_ends(vm, wait, room):
    await asyncio.sleep(60)


def _done(dom0):
    cid, request = _started(dom0)
    dom0.execution._finish_ping(request, time.monotonic())
    return cid


def test_a_vm_that_takes_no_results_does_not_fill_dom0s_memory_with_them(dom0, monkeypatch):
    outbox = {}

    async def scene(puller, hub, vm):
        for number in range(40):
            parts = {"out": of_bytes(b"x" * 60000), "err": of_bytes(b""), "meta": of_bytes(b"m")}
            puller.finished(f"20260101-000000-1-{number:08x}", Finished(status="done", result=Result(0, parts)))
        outbox.update(puller._outbox)

    _play(dom0, scene, monkeypatch)
    assert sum(60001 for end in outbox.values() if end.result) <= 1 << 20
    # Known all the same, and read again when the VM takes it.
    assert len(outbox) == 40 and sum(1 for end in outbox.values() if end.result) == 17


def test_a_refusal_is_recorded_with_what_was_refused(dom0, monkeypatch):
    dom0.config = make_config({**_folders(dom0), "vms": {"work": {"policy": {"allow": [["true"]]}}}})
    cid, item = _item(command=b"qvm-remove -f vault")

    async def scene(puller, hub, vm):
        await puller._open()
        await puller._take_in([item], [])

    _play(dom0, scene, monkeypatch)
    (row,) = history(dom0.config.audit_log, outcome="refused")
    assert (row["id"], row["code"], row["command"]) == (cid, "policy", "qvm-remove -f vault")
    assert "no rule allows it" in row["reason"]


def test_what_is_refused_together_is_answered_in_one_go(dom0, monkeypatch):
    # Without the agent each delivery has dom0 start a program.
    deliveries = []

    async def deliver(vm, results):
        results = list(results)
        deliveries.append([result.cid for result in results])
        for result in results:
            yield result.cid

    async def scene(puller, hub, vm):
        await puller._open()
        monkeypatch.setattr(_Vm, "deliver", deliver)
        items = [dataclasses.replace(_item()[1], token=b"none", token_size=4) for _ in range(20)]
        await puller._take_in(items, [])
        assert deliveries == [[item.untrusted_cid for item in items]]

    _play(dom0, scene, monkeypatch)


def test_that_refusals_can_not_be_recorded_is_said_once_and_each_is_answered(dom0, monkeypatch):
    emitted = []

    def no_room(*_):
        raise AuditError("the audit log can't be written: No space left on device")

    async def scene(puller, hub, vm):
        await puller._open()
        with monkeypatch.context() as patched:
            patched.setattr(dom0.audit, "refusal", no_room)
            patched.setattr(hub, "emit", lambda _vm, _cid, what, _data: emitted.append(what))
            for _ in range(5):
                await puller._take_in([dataclasses.replace(_item()[1], token=b"none", token_size=4)], [])
        assert len(vm.delivered) == 5
        assert [line for line in hub.logged if "No space left" in line] == ["the audit log can't be written: No space left on device"]
        assert emitted.count("refused") == 1

    _play(dom0, scene, monkeypatch)


def test_nothing_is_kept_of_commands_that_ended_while_there_was_no_session(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        for _ in range(3):
            cid = new_cid()
            puller.wrote(cid, 10, 0)
            await puller._close()
            puller.finished(cid, Finished(status="cancelled"))
            await puller._open()
            await puller._deliver()
        assert not puller._outflows
        assert not puller._outbox
        assert not puller._untold

    _play(dom0, scene, monkeypatch)


def test_a_cancel_before_the_start_is_remembered_no_longer_than_the_command(dom0):
    cid, item = _item("ping", b"ping")
    assert dom0.intake.claim([(dom0.intake.admit("work", cid, item.command, item.token, -1), 0)]) == {}
    dom0.execution.cancel("work", cid)
    dom0.execution.execute("work", cid)
    assert not dom0.execution._cancelled_early
    # Its client gave up: nobody waits for the result.
    assert dom0.ledger.state("work", cid)[0] == "delivered"
    assert not os.path.exists(dom0.spool.path("work", cid))


def test_a_start_removes_what_belongs_to_no_command_and_nothing_else(dom0):
    orphan, item = _item()
    dom0.intake.admit("work", orphan, item.command, item.token, -1)
    kept, request = _started(dom0)
    dom0.execution._finish_ping(request, time.monotonic())
    dom0.execution.recover()
    assert not os.path.exists(dom0.spool.path("work", orphan))
    assert dom0.results.result("work", kept)[0] == 0


def test_an_id_that_was_forgotten_with_age_is_never_taken_again(dom0):
    cid, request = _started(dom0)
    dom0.execution._finish_ping(request, time.monotonic())
    dom0.results.close_delivery("work", cid)
    # dom0's clock ran ahead, and an engine started.
    dom0.ledger._db.execute("UPDATE command SET claimed_at = claimed_at - 100 * 86400")
    dom0.execution.recover()
    assert dom0.ledger.state("work", cid) is None
    assert dom0.ledger.forgotten_before("work") > 0
    token = make_token(KEY, "work", cid, 10, "ping", b"ping")
    with pytest.raises(Refused):
        dom0.intake.admit("work", cid, b"ping", token, -1)


def test_dom0_signs_no_refusal_for_whoever_may_not_have_the_key(dom0):
    cid = new_cid()
    assert dom0.results.refusal("work", cid, "no", is_proven=False)[1].startswith(b"mac -\n")
    assert not dom0.results.refusal("work", cid, "no")[1].startswith(b"mac -\n")


def test_another_qube_under_the_same_name_gets_nothing_and_is_given_nothing(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        cid, request = _started(dom0)
        dom0.execution._finish_ping(request, time.monotonic())
        dom0.keyring.bind("work", "the one before")
        await puller._open()
        fresh, item = _item()
        # It asks for something, and would have the result of the one before thrown away.
        await puller._take_in([item], [cid])
        await puller._deliver()
        # Nothing but the refusal, which proves nothing: no result of the one before, no key.
        assert vm.delivered == [(fresh, 125)]
        assert dom0.ledger.state("work", fresh) is None
        assert dom0.ledger.state("work", cid)[0] == "done"
        assert not hasattr(vm, "given_key")
        # Somebody says that it is the right one.
        dom0.keyring.bind("work", "one")
        await puller._look_at_key()
        await puller._deliver()
        assert vm.delivered == [(fresh, 125), (cid, 0)]

    monkeypatch.setattr(_Vm, "inspect", _inspect_no_key)
    monkeypatch.setattr(_Vm, "set_key", _note_key, raising=False)
    _play(dom0, scene, monkeypatch)


async def _inspect_no_key(vm):
    return Found("", ())


async def _note_key(vm, key):
    vm.given_key = key


def test_the_first_qube_seen_under_a_name_is_the_one_the_key_is_for(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        assert dom0.keyring.bound("work") == "one"
        assert dom0.access.stranger("work", "two")
        dom0.keyring.remove("work")
        assert dom0.keyring.bound("work") == ""

    _play(dom0, scene, monkeypatch)


def test_a_note_of_whom_the_key_is_for_that_can_not_be_read_lets_nobody_in(dom0, tmp_path):
    os.mkfifo(tmp_path / "qvm-remote-keys" / "work.key.uuid")
    assert "can't tell" in dom0.access.stranger("work", "one")


def _claimed(dom0, command, uuid=""):
    cid, item = _item(command=command)
    request = dom0.intake.admit("work", cid, item.command, item.token, -1, uuid)
    assert dom0.intake.claim([(request, 0)]) == {}
    return cid


def _given_another_key(dom0):
    dom0.keyring.put("work", os.urandom(32).hex(), uuid="two")


def _revoked(dom0):
    dom0.keyring.remove("work")


def _revoked_and_given_the_same_key(dom0):
    dom0.keyring.remove("work")
    dom0.keyring.put("work", KEY.hex(), uuid="two")


def _forgotten_and_given_another_key(dom0):
    dom0.access.forget("work")
    _given_another_key(dom0)


@pytest.mark.parametrize("moment", ["done", "runs", "at hand", "waits"])
@pytest.mark.parametrize("change", [_given_another_key, _revoked, _revoked_and_given_the_same_key, _forgotten_and_given_another_key])
def test_another_qube_under_the_same_name_gets_nothing_of_the_one_before(dom0, monkeypatch, change, moment):
    async def scene(puller, hub, vm):
        dom0.keyring.bind("work", "one")
        cid = _claimed(dom0, f"echo secret; while [ -e {dom0.config.state_dir}/wait ]; do sleep 0.05; done; echo rest".encode(), "one")
        wait, running = os.path.join(dom0.config.state_dir, "wait"), None
        if moment == "runs":
            open(wait, "w").close()
            running = asyncio.ensure_future(hub.call(dom0.execution.execute, "work", cid))
            while not (dom0.spool.size("work", cid, "out") and ("work", cid) in dom0.execution._running):
                await asyncio.sleep(0.02)
        elif moment != "waits":
            await hub.call(dom0.execution.execute, "work", cid)
        end = Finished(status="done", result=dom0.results.result("work", cid) if moment == "at hand" else None)
        change(dom0)
        hub.uuid = "two"
        await puller._open()
        if running is not None:
            puller.wrote(cid, 7, 0)
            puller._stream()
            await puller._cancel(cid)
            os.unlink(wait)
            assert (await running)["status"] == "done"
        if moment == "waits":
            assert (await hub.call(dom0.execution.execute, "work", cid))["status"] == "refused"
        puller.finished(cid, end)
        await puller._deliver()
        assert (vm.delivered, vm.parts) == ([], {})
        # It waits for its own qube, unless all of that was forgotten.
        known = dom0.ledger.state("work", cid)
        assert known is None or known[0] == "done"

    monkeypatch.setattr(_Vm, "set_key", _note_key, raising=False)
    _play(dom0, scene, monkeypatch)


def test_an_id_of_the_qube_that_had_this_name_before_is_not_on_its_way(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        dom0.keyring.bind("work", "one")
        cid, item = _item()
        await puller._open()
        await puller._take_in([item], [])
        _revoked_and_given_the_same_key(dom0)
        hub.uuid = "two"
        await puller._open()
        await puller._take_in([item], [])
        assert (vm.delivered, puller._untold) == ([(cid, 125)], set())
        assert [line["code"] for line in query(dom0.config.audit_log) if line["what"] == "refused"] == ["replay"]

    _play(dom0, scene, monkeypatch)


def test_a_result_waits_for_its_qube_whoever_has_the_name_meanwhile(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        cid = _claimed(dom0, b"echo secret", "one")
        await hub.call(dom0.execution.execute, "work", cid)
        dom0.keyring.bind("work", "two")
        hub.uuid = "two"
        await puller._open()
        await puller._deliver()
        assert vm.delivered == []
        dom0.keyring.bind("work", "one")
        hub.uuid = "one"
        await puller._open()
        await puller._deliver()
        assert vm.delivered == [(cid, 0)]

    _play(dom0, scene, monkeypatch)


def test_what_a_vm_keeps_in_dom0_is_bounded_also_if_all_of_it_was_let_in_before(dom0):
    mib = 1 << 20
    dom0.config = make_config({**_folders(dom0), "output_max": mib, "stdin_max": 0, "spool_bytes_max": 5 * mib})
    cids = [_claimed(dom0, b"head -c 1048576 /dev/zero; head -c 1048576 /dev/zero >&2") for _ in range(6)]
    ends = [dom0.execution.execute("work", cid)["status"] for cid in cids]
    assert ends == ["done", "done", "refused", "refused", "refused", "refused"]
    assert sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(dom0.spool.path("work", "")) for name in names) < 5 * mib
    # Each of them is told why.
    err = b"".join(dom0.results.result("work", cids[-1])[1]["err"][1](0))
    assert b"dom0 keeps too many unfinished commands and results" in err


def test_a_vm_keeps_no_more_stdin_in_dom0_than_it_may(dom0):
    mib = 1 << 20
    dom0.config = make_config({**_folders(dom0), "output_max": mib, "stdin_max": mib, "spool_bytes_max": 6 * mib})
    taken = 0
    for _ in range(12):
        cid, item = _item()
        data = os.urandom(mib)
        token = make_token(KEY, "work", cid, 10, "shell", item.command, hashlib.sha256(data).digest())
        try:
            request = dom0.intake.admit("work", cid, item.command, token, len(data))
        except Refused as refused:
            assert refused.code == "room"
            continue
        writer = dom0.intake.stdin_writer(request)
        writer.write(data)
        dom0.intake.end_stdin(request, writer)
        assert dom0.intake.claim([(request, len(data))]) == {}
        taken += 1
    # Each may write as much as two outputs take, too.
    assert taken == 3


@pytest.mark.parametrize(
    ("is_new", "sessions", "waits"),
    [
        # What it shows again and again is no reason to come soon.
        (False, 7, [1, 2, 4, 8, 15, 15, 15]),
        # Who asks for something in each is served soon in the next one, unless there is no end to that.
        (True, 106, [1] * 100 + [2, 4, 8, 15, 15, 15]),
    ],
)
def test_a_vm_that_breaks_each_session_waits_longer_each_time(dom0, monkeypatch, is_new, sessions, waits):
    async def scene(puller, hub, vm):
        waited, item = [], _item("ping", b"ping")[1]

        async def wait(seconds=None):
            waited.append(seconds)
            puller.ending = len(waited) == sessions

        async def session():
            await puller._open()
            await puller._take_in([_item("ping", b"ping")[1] if is_new else item], [])
            # Not to be waited for in this test.
            monkeypatch.setattr(puller, "_bell", types.SimpleNamespace(wait=wait, ring=lambda: None))
            return False

        monkeypatch.setattr(puller, "_try_session", session)
        dom0.config = make_config({**_folders(dom0), "vm_queue": 1000})
        await puller.run()
        assert waited == waits

    _play(dom0, scene, monkeypatch)


def test_what_is_at_hand_for_one_qube_is_not_for_the_next_one_of_its_name(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        dom0.keyring.bind("work", "one")
        await puller._open()
        puller.finished(new_cid(), Finished(lost="nobody knows"))
        _given_another_key(dom0)
        hub.uuid = "two"
        await puller._open()
        await puller._deliver()
        assert vm.delivered == []

    monkeypatch.setattr(_Vm, "set_key", _note_key, raising=False)
    _play(dom0, scene, monkeypatch)


def test_a_vm_that_asks_for_much_has_a_tag_looked_up_once_and_its_commands_looked_at_anew(dom0, monkeypatch):
    asked, tagged = [], {"build"}

    def vms_with_tag(tag):
        asked.append(tag)
        return set(tagged)

    for module in (execution, tags):
        monkeypatch.setattr(module, "vms_with_tag", vms_with_tag)
    dom0.config = make_config({**_folders(dom0), "vms": {"work": {"policy": {"allow": [["echo", "@tag:mine"]]}}}})
    cids = [_claimed(dom0, b"echo build") for _ in range(5)]
    assert asked == ["mine"]
    assert dom0.execution.execute("work", cids[0])["status"] == "done"
    # A lookup that takes long is not made for each of those who wait for it.
    monkeypatch.setattr(tags, "vms_with_tag", lambda tag: (time.sleep(1.2), vms_with_tag(tag))[1])
    known = tags.Tags()
    threads = [threading.Thread(target=known.names, args=("mine",)) for _ in range(5)]
    before = len(asked)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == before + 1
    tagged.clear()
    # What was let in before the tag was taken away.
    assert dom0.execution.execute("work", cids[1])["status"] == "refused"


def test_what_is_old_goes_while_the_service_runs(dom0, tmp_path, monkeypatch):
    qvm_ls = tmp_path / "qvm-ls"
    qvm_ls.write_text("#!/bin/sh\n")
    qvm_ls.chmod(0o700)
    dom0.config = make_config({**_folders(dom0), "qvm_ls": str(qvm_ls), "discover_interval": 1})
    monkeypatch.setattr(service_module, "_PRUNE_EVERY", 0.5)
    service = service_module.Service(dom0, None, None, lambda *_: None, lambda text: None)
    cid, _ = _started(dom0)
    dom0.ledger.finish("work", cid, 0, "done")
    dom0.ledger.delivered([("work", cid)])
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while service._loop is None and time.monotonic() < deadline:
            time.sleep(0.05)
        # It has begun, and looked through all there was then.
        with dom0.ledger._transaction():
            dom0.ledger._db.execute("UPDATE command SET claimed_at = claimed_at - 91 * 86400")
        while dom0.ledger.state("work", cid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert dom0.ledger.state("work", cid) is None
    finally:
        service.stop()
        thread.join(20)
    words = [line["what"] for line in query(dom0.config.audit_log)]
    assert "started" in words and words[-1] == "stopped"


def test_what_could_not_be_removed_while_the_disk_was_read_only_is_removed_later(dom0, tmp_path):
    folder = dom0.spool.path("work", "")
    os.makedirs(folder, mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        delivered, again = _claimed(dom0, b"echo a"), _claimed(dom0, b"echo b")
        dom0.execution.execute("work", delivered)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        dom0.results.close_delivery("work", delivered)
        dom0.spool.remove("work", again)
        dom0.spool.remove_left()
        assert sorted(os.listdir(folder)) == sorted([delivered, again])
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        # One of them has come back meanwhile: what is kept of it now is not what was to go.
        dom0.spool.store_request("work", again, b"echo b", b"token")
        dom0.spool.remove_left()
        assert os.listdir(folder) == [again]
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_delivery_that_could_not_be_recorded_is_recorded_as_soon_as_it_can_be(dom0, tmp_path):
    qvm_ls = tmp_path / "qvm-ls"
    qvm_ls.write_text("#!/bin/sh\n")
    qvm_ls.chmod(0o700)
    dom0.config = make_config({**_folders(dom0), "qvm_ls": str(qvm_ls), "discover_interval": 1})
    logged, log = [], dom0.config.audit_log
    cid, request = _started(dom0)
    service = service_module.Service(dom0, None, None, lambda *_: None, logged.append)
    thread = threading.Thread(target=service.run)
    thread.start()

    def until(check):
        deadline = time.monotonic() + 20
        while not check() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert check()

    try:
        # The start of a service closes what another one left.
        until(lambda: service._loop is not None and dom0.ledger.state("work", cid)[0] == "done")
        os.rename(log, f"{log}.aside")
        os.mkdir(log)
        service._loop.call_soon_threadsafe(service.close_deliveries, [("work", cid)])
        until(lambda: any("audit log" in text for text in logged))
        assert dom0.ledger.state("work", cid)[0] == "done"
        os.rmdir(log)
        os.rename(f"{log}.aside", log)
        until(lambda: dom0.ledger.state("work", cid)[0] == "delivered")
        assert not os.path.exists(dom0.spool.path("work", cid))
    finally:
        service.stop()
        thread.join(20)


@pytest.mark.parametrize("is_known", [True, False])
def test_why_a_command_has_no_result_is_for_its_own_qube_alone(dom0, monkeypatch, is_known):
    async def scene(puller, hub, vm):
        told, closed = [], []
        monkeypatch.setattr(hub, "emit", lambda vm, cid, what, data: told.append((cid, what)))
        monkeypatch.setattr(hub, "close_deliveries", closed.extend)
        cid = _claimed(dom0, b"echo secret", "one")
        dom0.keyring.bind("work", "two")
        hub.uuid = "two"
        await puller._open()
        puller.finished(cid, Finished(lost="the command was taken, but ...", uuid="one" if is_known else None))
        await puller._deliver()
        assert (vm.delivered, closed, puller._outbox) == ([], [], {})
        assert (cid, "delivered") not in told

    _play(dom0, scene, monkeypatch)


def test_why_a_command_has_no_result_waits_until_it_can_be_told_whose_it_is(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        cid, other = _claimed(dom0, b"echo secret", "one"), _done(dom0)
        await puller._open()
        puller.finished(cid, Finished(lost="the command was taken, but ...", uuid=None))
        with monkeypatch.context() as unreadable:
            unreadable.setattr(dom0.ledger, "uuid", _can_not_tell(dom0.ledger.uuid, cid))
            await puller._deliver()
        # It holds up no other one.
        assert vm.delivered == [(other, 0)]
        assert list(puller._outbox) == [cid]
        _let_time_pass(puller)
        await puller._deliver()
        assert vm.delivered == [(other, 0), (cid, 125)]

    _play(dom0, scene, monkeypatch)


def _can_not_tell(uuid, unreadable):
    def look_up(vm, cid):
        if cid == unreadable:
            raise LedgerError("it can't be read")
        return uuid(vm, cid)

    return look_up


@pytest.mark.parametrize(("is_readable", "uuid"), [(True, "one"), (False, None)])
def test_what_has_no_recorded_end_is_told_with_the_qube_that_it_is_of(dom0, monkeypatch, is_readable, uuid):
    def execute(vm, cid):
        raise LedgerError("it can't be written")

    service, told = service_module.Service(dom0, None, execute, lambda *_: None, lambda text: None), []
    service._loop = types.SimpleNamespace(call_soon_threadsafe=lambda function, *args: function(*args))
    service._pullers["work"] = types.SimpleNamespace(finished=lambda cid, end: told.append((cid, end.uuid, "can't be written" in end.lost)))
    cid = _claimed(dom0, b"echo a", "one")
    if not is_readable:
        monkeypatch.setattr(dom0.ledger, "uuid", _can_not_tell(dom0.ledger.uuid, cid))
    service._run_one("work", cid)
    assert told == [(cid, uuid, True)]


def test_what_a_dead_service_left_is_closed_though_the_files_of_one_command_can_not_be_touched(dom0, monkeypatch):
    monkeypatch.setattr(dom0.execution, "warm", lambda: None)
    bad, other = cids = [_claimed(dom0, b"echo a", "one") for _ in range(2)]
    for cid in cids:
        dom0.ledger.start("work", cid)
    os.mkdir(dom0.spool.path("work", bad, "out"))
    logged = []
    service = service_module.Service(dom0, None, None, lambda *_: None, logged.append)
    service._begin()
    assert dom0.ledger.state("work", other)[0] == "done"
    assert dom0.ledger.unfinished() == [("work", bad)]
    assert [line for line in logged if bad in line and "can't be closed yet" in line]

    async def record():
        service.call = _Hub(dom0).call
        last = _claimed(dom0, b"echo a", "one")
        service.lose("work", last, "as it was")
        await service._record_lost()
        assert dom0.ledger.state("work", last)[0] == "done"
        os.rmdir(dom0.spool.path("work", bad, "out"))
        await service._record_lost()

    run(record())
    service.close()
    assert dom0.ledger.unfinished() == []
    assert b"interrupted: dom0's service ended" in b"".join(dom0.spool.chunks("work", bad, "err"))


def test_a_result_that_can_not_be_read_at_once_is_not_told_to_be_lost(dom0, monkeypatch):
    cid, request = _started(dom0)
    told, logged = [], []
    service = service_module.Service(dom0, None, lambda *_: dom0.execution._finish_ping(request, time.monotonic()), lambda *_: None, logged.append)
    service._loop = types.SimpleNamespace(call_soon_threadsafe=lambda function, *args: function(*args))
    service._pullers["work"] = types.SimpleNamespace(finished=lambda cid, end: told.append((cid, end)))

    def fail(*_):
        raise SpoolError("Input/output error")

    monkeypatch.setattr(dom0.spool, "chunks", fail)
    service._run_one("work", cid)
    service.close()
    assert told == [(cid, Finished(status="done"))]
    assert not logged and not service._lost


@pytest.mark.parametrize("trouble", ["the log is full after the first", "the service is restarted before they are told"])
def test_each_client_whose_result_was_given_up_is_told(dom0, monkeypatch, trouble):
    async def scene(puller, hub, vm):
        cids = [_done(dom0) for _ in range(2)]
        vm.is_full = True
        await puller._open()
        await puller._deliver()
        dom0.ledger._db.execute("UPDATE command SET done_at = done_at - 90000")
        with monkeypatch.context() as full:
            if trouble.startswith("the log"):
                write, written = dom0.audit.write, []

                def fail_the_second(what, vm, cid="-", **fields):
                    written.append(what)
                    if len(written) == 2:
                        raise AuditError("full")
                    write(what, vm, cid, **fields)

                full.setattr(dom0.audit, "write", fail_the_second)
            await puller._expire()
            _let_time_pass(puller)
            await puller._deliver()
        await puller._close()
        if not trouble.startswith("the log"):
            dom0.execution.recover()
            puller = Puller(hub, "work")
        vm.is_full = False
        await puller._open()
        _let_time_pass(puller)
        await puller._deliver()
        assert sorted(vm.delivered) == [(cid, 125) for cid in sorted(cids)]

    _play(dom0, scene, monkeypatch)


@pytest.mark.parametrize("is_heard_first", [True, False])
def test_a_result_whose_client_cancels_it_before_it_was_delivered_is_not_delivered(dom0, monkeypatch, is_heard_first):
    async def scene(puller, hub, vm):
        await puller._open()
        cid = _done(dom0)
        end = Finished(status="done", result=Result(0, {part: of_bytes(b"") for part in ("out", "err", "meta")}))
        if is_heard_first:
            puller.finished(cid, end)
        await puller._cancel(cid)
        if not is_heard_first:
            # It was on its way from the thread that ran it.
            puller.finished(cid, end)
        await puller._deliver()
        assert (vm.dropped, vm.delivered) == ([cid], [])
        assert not puller._given_up and not puller._outbox
        assert [line["what"] for line in query(dom0.config.audit_log, "work") if line["id"] == cid][-1] == "given-up"

    _play(dom0, scene, monkeypatch)


def test_nothing_is_kept_of_a_command_that_is_cancelled_after_its_end(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        cid = _done(dom0)
        puller.wrote(cid, 0, 0)
        puller.finished(cid, Finished(status="done"))
        await puller._cancel(cid)
        await puller._deliver()
        assert not (puller._outflows or puller._outbox or puller._given_up)

    _play(dom0, scene, monkeypatch)


def test_a_cancel_that_comes_too_late_leaves_a_result_to_be_delivered(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        cid, request = _started(dom0)
        await puller._open()
        for part in ("out", "err"):
            dom0.spool.store_text("work", cid, part, b"")
        dom0.execution._running["work", cid] = running = _Running(_Ending(), KEY)
        cancel = dom0.execution.cancel

        def end_meanwhile(vm_name, cancelled):
            done = cancel(vm_name, cancelled)
            del dom0.execution._running["work", cid]
            dom0.execution._finish_run(request, (sandbox.Outcome(0, None, False, False, 0, 0, False, False, 0.1), running.why_stopped))
            puller.finished(cid, Finished(status="done"))
            return done

        monkeypatch.setattr(dom0.execution, "cancel", end_meanwhile)
        await puller._cancel(cid)
        await puller._deliver()
        assert vm.delivered == [(cid, 0)]
        assert not puller._outbox

    _play(dom0, scene, monkeypatch)


def test_what_was_streamed_of_a_result_is_no_beginning_of_why_it_was_given_up(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        cid = _done(dom0)
        puller.wrote(cid, 0, 8)
        puller._outflows[cid].next()
        puller._outflows[cid].answered()
        puller.finished(cid, Finished(status="done"))
        dom0.ledger._db.execute("UPDATE command SET done_at = done_at - 90000")
        dom0.results.expire_all()
        results, _ = puller._results(puller._outbox)
        assert [(result.exit_code, result.sent) for result in results] == [(125, {})]

    _play(dom0, scene, monkeypatch)


def test_what_is_given_up_takes_no_room_though_it_could_not_be_removed_then(dom0, monkeypatch):
    cid = _done(dom0)
    dom0.ledger._db.execute("UPDATE command SET done_at = done_at - 90000")
    with monkeypatch.context() as killed:
        killed.setattr(dom0.spool, "remove", lambda *_: pytest.exit("killed"))
        with pytest.raises(BaseException, match="killed"):
            dom0.results.expire_all()
    assert os.path.exists(dom0.spool.path("work", cid))
    dom0.execution.recover()
    assert not os.path.exists(dom0.spool.path("work", cid))
    assert dom0.ledger.waiting_end("work", cid) == (0, "expired")


def test_what_was_delivered_meanwhile_is_not_given_up(dom0, monkeypatch):
    cid = _done(dom0)
    dom0.ledger._db.execute("UPDATE command SET done_at = done_at - 90000")
    listed = dom0.ledger.undelivered

    def deliver_meanwhile(vm):
        rows = listed(vm)
        dom0.results.close_delivery("work", cid)
        return rows

    monkeypatch.setattr(dom0.ledger, "undelivered", deliver_meanwhile)
    assert dom0.results.expire("work") == ([], [])
    assert [line["what"] for line in query(dom0.config.audit_log, "work") if line["id"] == cid][-1] == "delivered"


def test_the_daily_look_leaves_those_that_are_served_to_their_own_turn(dom0):
    cid = _done(dom0)
    dom0.ledger._db.execute("UPDATE command SET done_at = done_at - 90000")
    dom0.results.expire_all(["work"])
    assert dom0.ledger.waiting_end("work", cid) == (0, "done")


def test_a_cancelled_command_has_one_end_though_that_it_is_closed_can_not_be_written_at_once(dom0, monkeypatch):
    cid = _claimed(dom0, b"touch /nowhere")
    write, write_all = dom0.audit.write, dom0.audit.write_all

    def note(what, *args, **fields):
        assert what != "run" or dom0.execution.cancel("work", cid)
        return write(what, *args, **fields)

    def fail(records, sync=False):
        if records[0][0] == "delivered":
            raise AuditError("full")
        return write_all(records, sync)

    monkeypatch.setattr(sandbox, "start", lambda *_: pytest.fail("it began"))
    with monkeypatch.context() as full:
        full.setattr(dom0.audit, "write", note)
        full.setattr(dom0.audit, "write_all", fail)
        with pytest.raises(AuditError):
            dom0.execution.execute("work", cid)
    dom0.execution.finish_lost("work", cid, "as it was")
    assert [line["what"] for line in query(dom0.config.audit_log, "work") if line["id"] == cid][-3:] == ["run", "ended", "given-up"]


@pytest.mark.parametrize("is_told", [False, True])
def test_what_is_lost_is_told_in_a_session_that_begins_later_once(dom0, monkeypatch, is_told):
    async def scene(puller, hub, vm):
        service = _service_of(dom0, hub)
        hub.lost_of = service.lost_of
        monkeypatch.setattr(hub, "close_deliveries", service.close_deliveries)
        cid = _claimed(dom0, b"echo a", "one")
        service.lose("work", cid, INTERRUPTED)
        service._pullers["work"] = puller
        for _ in range(1 + is_told):
            # Paused, and served again by another loop.
            puller = service._pullers["work"] = Puller(hub, "work")
            await puller._open()
            await puller._deliver()
        assert vm.delivered == [(cid, 125)]
        await service._record_lost()
        while dom0.ledger.state("work", cid)[0] != "delivered":
            await asyncio.sleep(0.01)
        await puller._deliver()
        assert vm.delivered == [(cid, 125)]
        (end,) = [line for line in query(dom0.config.audit_log, "work") if line["id"] == cid and line["what"] == "ended"]
        assert end["status"] == "interrupted"

    _play(dom0, scene, monkeypatch)


def test_once_serves_a_full_queue_in_turns_of_one(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        hub.may_run.set()
        dom0.config = make_config({**_folders(dom0), "vm_queue": 1})
        queue = dict(_item("ping", b"ping") for _ in range(30))
        vm.poll = _showing(queue, vm)

        async def all_ran():
            while not hub.lines.is_done("work"):
                await asyncio.sleep(0.01)

        assert await puller.run_once(all_ran) is True
        # Some are refused: nothing of what ran is finished here, and so much may wait.
        assert not queue.keys() - {*vm.taken, *dict(vm.delivered)}

    _play(dom0, scene, monkeypatch)


def test_once_serves_all_that_waits_and_says_so_if_there_is_no_end_of_it(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        hub.may_run.set()
        queue = dict(_item("ping", b"ping") for _ in range(30))
        vm.poll = poll = _showing(queue, vm)
        assert await puller.run_once(_nothing) is True
        assert len(dom0.ledger.open_commands()) == 30

        async def ask_again(wait, room):
            queue.update([_item("ping", b"ping")])
            return await poll(wait, room)

        vm.poll = ask_again
        monkeypatch.setattr(puller_module, "_ONCE_MAX", 10)
        assert await puller.run_once(_nothing) is False

    async def _nothing():
        await asyncio.sleep(0.01)

    _play(dom0, scene, monkeypatch)


def _showing(queue, vm):
    """A poll that shows a part of what is in a queue and was not taken, as an agent does."""

    async def poll(wait, room):
        seen = {*vm.taken, *dict(vm.delivered)}
        return [item for cid, item in queue.items() if cid not in seen][: min(24, room)], []

    return poll


@pytest.mark.parametrize("cancel_at", ["looked up", "written down"])
def test_a_command_that_is_cancelled_before_it_begins_does_not_begin(dom0, monkeypatch, cancel_at):
    cid = _claimed(dom0, b"touch /nowhere")
    check_room, write = dom0.check_room, dom0.audit.write

    def check(vm, *args, **more):
        assert cancel_at != "looked up" or dom0.execution.cancel(vm, cid)
        return check_room(vm, *args, **more)

    def note(what, *args, **fields):
        assert (cancel_at, what) != ("written down", "run") or dom0.execution.cancel("work", cid)
        return write(what, *args, **fields)

    with monkeypatch.context() as patched:
        patched.setattr(dom0, "check_room", check)
        patched.setattr(dom0.audit, "write", note)
        patched.setattr(sandbox, "start", lambda *_: pytest.fail("it began"))
        assert dom0.execution.execute("work", cid)["status"] == "cancelled"
    assert dom0.ledger.state("work", cid)[0] == "delivered"
    assert not os.path.exists(dom0.spool.path("work", cid))


def test_an_end_that_is_recorded_is_one_though_the_request_can_not_be_removed(dom0):
    cid, request = _started(dom0)
    path = dom0.spool.path("work", cid, "command")
    os.unlink(path)
    os.mkdir(path)
    assert dom0.execution._finish_ping(request, time.monotonic())["status"] == "done"
    dom0.results.close_delivery("work", cid)
    assert not os.path.exists(dom0.spool.path("work", cid))


class _Unwritable:
    """An audit log, or a ledger, that can't be written for a while: what is asked of it fails."""

    def __init__(self, monkeypatch, target, name, error):
        self._monkeypatch, self._args = monkeypatch.context(), (target, name, self._fail)
        self._error = error

    def __enter__(self):
        self._monkeypatch.__enter__().setattr(*self._args)

    def __exit__(self, *caught):
        return self._monkeypatch.__exit__(*caught)

    def _fail(self, *_, **__):
        raise self._error


def _failing(dom0):
    """What may fail of dom0 as it records the end of a command that waited, one after the other."""
    return {
        "audit": (dom0.audit, "write", AuditError("full")),
        "start": (dom0.ledger, "start", LedgerError("full")),
        "finish": (dom0.ledger, "finish", LedgerError("full")),
        "close": (dom0.ledger, "delivered", LedgerError("full")),
    }


def _service_of(dom0, hub):
    """A service that stands in for the loops' own, for what it records later."""
    service = service_module.Service(dom0, None, None, lambda *_: None, hub.log)
    service.call, service.spawn = hub.call, hub.spawn
    hub.lose = service.lose
    return service


@pytest.mark.parametrize("fails", ["audit", "start", "finish", "close"])
def test_a_waiting_command_that_is_cancelled_while_nothing_can_be_recorded_ends_when_it_can(dom0, monkeypatch, fails):
    async def scene(puller, hub, vm):
        service = _service_of(dom0, hub)
        service._pullers["work"] = puller
        await puller._open()
        (_, one), (cid, item) = _item(), _item()
        dom0.config = make_config({**_folders(dom0), "parallel": 1})
        await puller._take_in([one, item], [])
        while not hub.lines._pool.busy():
            await asyncio.sleep(0.01)
        with _Unwritable(monkeypatch, *_failing(dom0)[fails]):
            await puller._cancel(cid)
            await service._record_lost()
        assert vm.dropped == [cid]
        # That it begins need not be recorded any more where it ends.
        assert (dom0.ledger.state("work", cid)[0] == "delivered") is (fails == "start")
        await service._record_lost()
        assert dom0.ledger.state("work", cid)[0] == "delivered"
        assert not os.path.exists(dom0.spool.path("work", cid))
        assert not dom0.execution._cancelled_early
        # Nobody waits for it.
        await puller._deliver()
        assert vm.delivered == []
        assert service._lost == {}

    _play(dom0, scene, monkeypatch)


@pytest.mark.parametrize("end", ["late", ThreadError("no thread")])
@pytest.mark.parametrize("fails", ["audit", "finish"])
def test_a_command_that_can_not_be_started_while_nothing_can_be_recorded_is_told_at_once_and_recorded_when_it_can_be(dom0, monkeypatch, end, fails):
    async def scene(puller, hub, vm):
        service = _service_of(dom0, hub)
        await puller._open()
        cid, item = _item()
        request = dom0.intake.admit("work", cid, item.command, item.token, -1, "one")
        assert dom0.intake.claim([(request, 0)]) == {}
        monkeypatch.setattr(hub, "close_deliveries", service.close_deliveries)
        with _Unwritable(monkeypatch, *_failing(dom0)[fails]):
            await puller._took(cid, end)
            await puller._deliver()
            await service._record_lost()
        assert vm.delivered == [(cid, 125)]
        assert dom0.ledger.state("work", cid)[0] in ("claimed", "running")
        await service._record_lost()
        while dom0.ledger.state("work", cid)[0] != "delivered":
            await asyncio.sleep(0.01)
        await puller._deliver()
        assert vm.delivered == [(cid, 125)]

    _play(dom0, scene, monkeypatch)


@pytest.mark.parametrize("reason", [None, "no thread"])
def test_a_command_that_was_answered_and_can_not_be_started_is_recorded_when_it_can_be(dom0, monkeypatch, reason):
    async def scene(puller, hub, vm):
        service = _service_of(dom0, hub)
        service._loop = asyncio.get_running_loop()
        service._pullers["work"] = puller
        monkeypatch.setattr(hub, "close_deliveries", service.close_deliveries)
        await puller._open()
        cid = _claimed(dom0, b"echo a", "one")
        with _Unwritable(monkeypatch, *_failing(dom0)["audit"]):
            await hub.call(service._end_unstarted, "work", cid, reason)
            await asyncio.sleep(0)
            await puller._deliver()
        assert vm.delivered == [(cid, 125)]
        await service._record_lost()
        while dom0.ledger.state("work", cid)[0] != "delivered":
            await asyncio.sleep(0.01)

    _play(dom0, scene, monkeypatch)


def test_nobody_is_told_of_a_cancel_of_what_is_not_on_its_way(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        told = []
        monkeypatch.setattr(hub, "emit", lambda vm, cid, what, data: told.append(cid) if what == "cancelled" else None)
        await puller._open()
        delivered, done, never, (cid, item) = _done(dom0), _done(dom0), new_cid(), _item()
        dom0.results.close_delivery("work", delivered)
        running, _ = _started(dom0)
        await puller._take_in([item], [])
        ids = [never, delivered, cid, running, done, never, cid]
        for one in ids:
            await puller._cancel(one)
        assert told[:3] == [cid, running, done]
        # Whatever it is, the VM hears that it is done with.
        assert vm.dropped == ids
        assert never not in told and delivered not in told
        assert dom0.ledger.state("work", done)[0] == "delivered"

    _play(dom0, scene, monkeypatch)


@pytest.mark.parametrize(("what", "code"), [("question", "question"), ("stdin", "stdin"), ("command", "size")])
def test_what_is_refused_after_its_token_was_found_to_fit_is_refused_with_a_proof(dom0, monkeypatch, what, code):
    dom0.config = make_config({**_folders(dom0), "stdin_max": 10, "command_max": 50_000, "vms": {"work": {"policy": {"ask": [["echo", "**"]]}}}})
    sent = {}

    async def deliver(vm, results):
        for result in results:
            sent[result.cid] = b"".join(result.parts["meta"][1](0))
            yield result.cid

    async def scene(puller, hub, vm):
        await puller._open()
        command = b"echo " + b"a" * {"question": 40_000, "command": 50_000}.get(what, 1)
        cid = new_cid()
        token = make_token(KEY, "work", cid, 10, "shell", command, b"x" * 32 if what == "stdin" else b"")
        item = Item(cid, len(command), len(token), 11 if what == "stdin" else -1, command, token)
        await puller._take_in([item], [])
        assert list(sent) == [cid]
        # For what was not looked at yet dom0 vouches for nothing.
        assert sent[cid].startswith(b"mac -\n") is (what == "command")
        (row,) = history(dom0.config.audit_log, outcome="refused")
        assert (row["code"], "command" in row) == (code, what != "command")

    monkeypatch.setattr(_Vm, "deliver", deliver)
    _play(dom0, scene, monkeypatch)


def test_what_was_claimed_and_can_not_be_started_is_ended_though_the_session_breaks_over_a_refusal(dom0, monkeypatch):
    async def scene(puller, hub, vm):
        await puller._open()
        refused, (cid, item) = _item()[1], _item()
        hub.lines.close()
        vm.is_full = True
        with pytest.raises(AgentUnable):
            await puller._take_in([dataclasses.replace(refused, token=b"none", token_size=4), item], [])
        assert dom0.ledger.state("work", cid)[0] == "done"

    _play(dom0, scene, monkeypatch)
