# SPDX-License-Identifier: GPL-2.0-or-later
"""Results on their way into a VM whose disk is almost full: one that does not fit is no matter of the others."""

import asyncio
import os
import types

import pytest
from pullrpc.aio import run
from pullrpc.config import make_config
from pullrpc.errors import AgentUnable, SessionBroken, SpoolError
from pullrpc.frames import FrameReader, encode_frame
from pullrpc.ids import new_cid
from pullrpc.results import of_bytes
from pullrpc.session import Delivery, Session

_MIB = 1 << 20


class _SmallVm:
    """The agent of a VM with little room, and a session with it; what does not fit fills the disk as far as that goes, as a write does."""

    def __init__(self, room):
        self.room = room
        self.parts, self.whole, self.refuses = {}, [], set()
        requests, self._in_fd = os.pipe2(os.O_NONBLOCK)
        self._out_fd, self._answers = os.pipe2(os.O_NONBLOCK)
        self._reader = FrameReader(requests)
        self._fds = [requests, self._in_fd, self._out_fd, self._answers]
        self.session = Session(make_config({}), types.SimpleNamespace(in_fd=self._in_fd, out_fd=self._out_fd, end=None))

    async def serve(self):
        while True:
            self._reader.poll()
            frame = self._reader.try_frame(1 << 18)
            if frame is None:
                await asyncio.sleep(0.001)
                continue
            request, payload = frame
            is_done = {"put": self._put, "result": self._result}[request["op"]](request, payload)
            os.write(self._answers, encode_frame({"n": request["n"], **({} if is_done else {"error": "no space"})}, b""))

    def left(self):
        return self.room - sum(len(data) for data in self.parts.values())

    def _put(self, request, payload):
        name = request["id"], request["part"]
        before = self.parts.pop(name, b"")
        if len(before) < request["offset"]:
            self.parts[name] = before
            return False
        before = before[: request["offset"]]
        self.parts[name] = before + payload[: max(0, self.left() - len(before))]
        return len(self.parts[name]) == len(before) + len(payload)

    def _result(self, request, payload):
        cid = request["id"]
        sizes = {part: request[part] for part in ("out", "err", "meta")}
        if cid in self.refuses:
            return False
        if request["inline"]:
            if len(payload) > self.left():
                return False
            self.parts[cid, "all"] = payload
        elif any(len(self.parts.get((cid, part), b"")) != size for part, size in sizes.items()):
            return False
        self.whole.append(cid)
        return True

    def close(self):
        self.session._duplex.close()
        for fd in self._fds:
            os.close(fd)


def _result(size):
    def chunks(offset):
        for at in range(offset, size, 1 << 18):
            yield b"x" * min(1 << 18, size - at)

    return Delivery(new_cid(), 0, {"out": (size, chunks), "err": of_bytes(b""), "meta": of_bytes(b"meta")})


def _deliver(results, room, refuses=()):
    """What was delivered, what failed, and the VM."""

    async def play():
        vm, reached = _SmallVm(room), []
        vm.refuses = set(refuses)
        serving = asyncio.ensure_future(vm.serve())
        try:
            async for cid in vm.session.deliver(results):
                reached.append(cid)
        except AgentUnable as err:
            return reached, err.failed, vm
        finally:
            serving.cancel()
            vm.close()
        return reached, {}, vm

    return run(asyncio.wait_for(play(), 20))


@pytest.mark.parametrize("room", [5 * _MIB, 8 * _MIB - 1000, 8 * _MIB - 300_000])
def test_a_result_that_does_not_fit_holds_up_no_other_and_leaves_them_its_room(room):
    large, *small = results = [_result(8 * _MIB), *(_result(20_000) for _ in range(50))]
    reached, failed, vm = _deliver(results, room)
    assert list(failed) == [large.cid]
    assert reached == vm.whole == [result.cid for result in small]
    assert not vm.parts.get((large.cid, "out"))


def test_what_is_left_of_a_result_that_failed_is_not_sent():
    large = _result(64 * _MIB)
    taken = []

    def chunks(offset):
        for _ in range(64):
            taken.append(1)
            yield b"x" * (1 << 18)

    large.parts["out"] = (64 << 18, chunks)
    _, failed, _ = _deliver([large], 1000)
    assert list(failed) == [large.cid]
    # No more than may be on its way without an answer.
    assert len(taken) <= 6


@pytest.mark.parametrize("before", [0, 2])
def test_a_result_that_dom0_can_not_read_holds_up_no_other_and_leaves_them_its_room(before):
    first, bad, last = results = [_result(20_000), _result(3 * _MIB), _result(3 * _MIB)]

    def chunks(offset):
        for _ in range(before):
            yield b"x" * (1 << 18)
        raise SpoolError("can't read it")

    bad.parts["out"] = (3 * _MIB, chunks)
    reached, failed, vm = _deliver(results, 3 * _MIB + 300_000)
    assert failed == {bad.cid: "can't read it"}
    assert reached == vm.whole == [first.cid, last.cid]


def test_several_results_may_fail_each_for_itself():
    results = [_result(size) for size in (100, 300_000, 100, 300_000, 100)]
    refused = [results[at].cid for at in (1, 2, 4)]
    reached, failed, _ = _deliver(results, 100 * _MIB, refused)
    assert list(failed) == refused
    assert reached == [results[at].cid for at in (0, 3)]


def test_a_vm_that_takes_all_of_them_is_given_all_of_them():
    results = [_result(size) for size in (100, 3 * _MIB, 0, 300_000, *[5000] * 300)]
    reached, failed, vm = _deliver(results, 100 * _MIB)
    assert failed == {}
    assert reached == vm.whole == [result.cid for result in results]


def test_a_session_that_breaks_meanwhile_is_not_taken_for_a_full_disk():
    async def play():
        vm = _SmallVm(100)
        delivering = asyncio.ensure_future(vm.session.deliver([_result(100)]).__anext__())
        await asyncio.sleep(0.01)
        os.write(vm._answers, b"garbage" * 100)
        try:
            with pytest.raises(SessionBroken) as caught:
                await delivering
            assert not isinstance(caught.value, AgentUnable)
        finally:
            vm.close()

    run(asyncio.wait_for(play(), 20))
