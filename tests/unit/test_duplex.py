# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests and answers over one channel: order, bounds and deadlines hold whatever the other side does."""

import asyncio
import json
import os

import pytest
from pullrpc.aio import run
from pullrpc.duplex import Duplex
from pullrpc.errors import FrameError, SessionBroken
from pullrpc.frames import FrameReader, encode_frame


class _Agent:
    """The other side, which the test plays: reads requests and answers as it likes."""

    def __init__(self, answer_wait=5.0):
        requests_read, requests_write = os.pipe2(os.O_NONBLOCK)
        answers_read, self.out_fd = os.pipe2(os.O_NONBLOCK)
        self._reader = FrameReader(requests_read)
        self._fds = [requests_read, requests_write, answers_read]
        self.duplex = Duplex(requests_write, answers_read, answer_wait)

    async def request(self):
        """The next request."""
        while True:
            self._reader.poll()
            frame = self._reader.try_frame(1 << 18)
            if frame is not None:
                return frame
            await asyncio.sleep(0.001)

    def answer(self, header, payload=b""):
        """Send an answer."""
        os.write(self.out_fd, encode_frame(header, payload))

    def close(self):
        """Close all that is open."""
        self.duplex.close()
        for fd in (*self._fds, *([self.out_fd] if self.out_fd is not None else [])):
            os.close(fd)


def _play(scene, **agent):
    async def play():
        other = _Agent(**agent)
        try:
            await asyncio.wait_for(scene(other), 20)
        finally:
            other.close()

    run(play())


def test_answers_come_in_the_order_of_their_requests():
    async def scene(agent):
        asked = [agent.duplex.ask({"op": str(number)}, b"x" * number, payload_max=4) for number in range(3)]
        seen = [await agent.request() for _ in range(3)]
        assert [(header["op"], len(payload)) for header, payload in seen] == [("0", 0), ("1", 1), ("2", 2)]
        for header, payload in seen:
            agent.answer({"n": header["n"], "to": header["op"]}, payload)
        assert [((await one)[0]["to"], len((await one)[1])) for one in asked] == [("0", 0), ("1", 1), ("2", 2)]

    _play(scene)


def _attack(send):
    """A scene: two requests wait, and the other side sends something that is no answer."""

    async def scene(agent):
        first, second = agent.duplex.ask({"op": "a"}, payload_max=10), agent.duplex.ask({"op": "b"})
        await agent.request()
        send(agent)
        with pytest.raises(FrameError):
            await first
        with pytest.raises(FrameError):
            await second
        # Nothing goes on after that, and nothing hangs.
        with pytest.raises(SessionBroken):
            await agent.duplex.ask({"op": "c"})

    return scene


@pytest.mark.parametrize(
    "send",
    [
        lambda agent: agent.answer({"n": 2}),
        lambda agent: agent.answer({"n": "1"}),
        lambda agent: agent.answer({}),
        lambda agent: agent.answer({"n": 1}, b"eleven long"),
        lambda agent: os.write(agent.out_fd, b"\0\0\0\x05\0\0\0\0nojsn"),
        lambda agent: os.write(agent.out_fd, b"\x7f\xff\xff\xff\0\0\0\0"),
        lambda agent: os.write(agent.out_fd, b"\0\0\0\x02\x7f\xff\xff\xff{}"),
        lambda agent: os.write(agent.out_fd, b"\0\0\0\x02\0\0\0\0[]"),
    ],
    ids=["out-of-turn", "text-number", "no-number", "payload", "no-json", "huge-header", "huge-payload", "no-object"],
)
def test_an_answer_that_is_none_ends_it_for_all(send):
    _play(_attack(send))


def test_a_byte_nobody_asked_for_ends_it():
    async def scene(agent):
        asked = agent.duplex.ask({"op": "a"})
        header, _ = await agent.request()
        agent.answer({"n": header["n"]})
        await asked
        agent.answer({"n": 2})
        await asyncio.sleep(0.05)
        with pytest.raises(FrameError, match="nobody asked"):
            await agent.duplex.ask({"op": "b"})

    _play(scene)


def test_dripping_bytes_gain_no_time():
    async def scene(agent):
        asked = agent.duplex.ask({"op": "a"})
        await agent.request()
        for byte in encode_frame({"n": 1}):
            os.write(agent.out_fd, bytes([byte]))
            await asyncio.sleep(0.05)
            if asked.done():
                break
        with pytest.raises(FrameError, match="in time"):
            await asked

    _play(scene, answer_wait=0.3)


def test_an_answer_may_take_its_time_until_something_else_is_asked():
    async def scene(agent):
        patient = agent.duplex.ask({"op": "poll"}, patience=60)
        header, _ = await agent.request()
        await asyncio.sleep(0.6)
        assert not patient.done()
        agent.duplex.ask({"op": "other"})
        await asyncio.sleep(0.6)
        with pytest.raises(FrameError, match="in time"):
            await patient
        assert header["n"] == 1

    _play(scene, answer_wait=0.3)


def test_the_other_sides_end_is_no_breach():
    async def scene(agent):
        asked = agent.duplex.ask({"op": "a"})
        os.close(agent.out_fd)
        agent.out_fd = None
        with pytest.raises(SessionBroken) as caught:
            await asked
        assert not isinstance(caught.value, FrameError)

    _play(scene)


def test_much_is_sent_while_answers_are_read():
    async def scene(agent):
        asked = [agent.duplex.ask({"op": "put"}, bytes(200_000), payload_max=200_000) for _ in range(20)]
        for _ in asked:
            header, payload = await agent.request()
            view = memoryview(encode_frame({"n": header["n"]}, payload))
            while view:
                try:
                    view = view[os.write(agent.out_fd, view) :]
                except BlockingIOError:
                    await asyncio.sleep(0.001)
        assert [len((await one)[1]) for one in asked] == [200_000] * 20

    _play(scene)


def test_a_frame_that_is_too_large_is_an_error_of_ours_and_ends_nothing():
    async def scene(agent):
        with pytest.raises(FrameError):
            await agent.duplex.ask({"op": "x" * 5000})
        asked = agent.duplex.ask({"op": "a"})
        header, _ = await agent.request()
        agent.answer({"n": header["n"]})
        assert json.dumps((await asked)[0])

    _play(scene)
