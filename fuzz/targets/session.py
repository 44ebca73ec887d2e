# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole session with a hostile agent (pullrpc.session, duplex): an answer is of the documented kind, or the session ends."""

import asyncio
import contextlib
import functools
import os

from pullrpc.config import make_config
from pullrpc.errors import SessionBroken
from pullrpc.session import Chunk, Delivery, Session

from .found import check_found
from .poll import check_list

_CID = "20260131-235959-4711-0badcafe"
_ROOM, _FETCH_MAX = 4, 10
#: As often does the loop turn after some bytes came, before the next ones do.
_TURNS = 6
_QUESTIONS_MAX = 16
WORDS = (b'{"n":', b"}\n", b'"v":2', b'"stream":1', b'"items":[]', b'"cancels":[]', b'"problems":[]', b'"fingerprint":null', b'"error":""', b'"gone":1', b"\xfe")


def seeds():
    """A line of letters, the questions that dom0 asks in turn, and a line for each answer: its header, and behind FE the payload. A line
    that begins with an FE is sent as it is, as no frame.
    """
    hello, key = b'{"n":1,"v":2,"stream":1}', b'{"n":1,"fingerprint":"0123:4567:89ab:cdef","problems":["key-mode"]}'
    item = b'{"n":2,"items":[["%s",4,3,-1,1]],"cancels":["%s"]}\xfetruetok' % ((_CID.encode(),) * 2)
    yield b"\n".join((b"hp", hello, item))
    yield b"\n".join((b"i", key))
    yield b"\n".join((b"hftsd", hello, b'{"n":2}\xfe0123456789', b'{"n":3}', b'{"n":4,"gone":1}', b'{"n":5}'))
    yield b"\n".join((b"hp", hello, b'\xfe\x00\x00\x00\x07\x00\x00\x00\x01{"n":2}'))
    yield b"\n".join((b"k", b'{"n":1,"error":"\x1b"}'))


def check(data):
    """Have a session."""
    questions, *answers = data.split(b"\n")
    with contextlib.suppress(SessionBroken):
        _loop().run_until_complete(_play(questions[:_QUESTIONS_MAX], answers))


async def _play(questions, answers):
    requests_read, requests_write = os.pipe2(os.O_NONBLOCK)
    answers_read, answers_write = os.pipe2(os.O_NONBLOCK)
    session = Session(_config(), _Channel(requests_write, answers_read))
    asking = asyncio.ensure_future(_ask_all(session, questions))
    try:
        for answer in answers:
            await _turn(asking)
            if asking.done():
                break
            os.write(answers_write, _sent(answer))
        await _turn(asking)
        os.close(answers_write)
        answers_write = None
        await asking
    finally:
        asking.cancel()
        await session.close()
        for fd in (requests_read, *([answers_write] if answers_write is not None else [])):
            os.close(fd)


async def _turn(asking):
    for _ in range(_TURNS):
        if asking.done():
            return
        await asyncio.sleep(0)


def _sent(answer):
    header, _, payload = answer.partition(b"\xfe")
    return payload if not header else len(header).to_bytes(4, "big") + len(payload).to_bytes(4, "big") + header + payload


async def _ask_all(session, questions):
    for question in questions:
        await _QUESTIONS.get(question, _take)(session)


async def _hello(session):
    await session.hello()
    assert type(session.streams) is bool


async def _inspect(session):
    check_found(await session.inspect())


async def _poll(session):
    check_list(*await session.poll(1, _ROOM), _ROOM)


async def _fetch(session):
    assert len(await session.fetch(_CID, "command", 0, _FETCH_MAX)) <= _FETCH_MAX


async def _take(session):
    await session.take([_CID, _CID])


async def _stream(session):
    assert type(await session.stream(_CID, Chunk("out", 0, 0, b"x", "0" * 64))) is bool


async def _deliver(session):
    parts = {part: (1, lambda offset: [b"x"[offset:]]) for part in ("out", "err", "meta")}
    results = [Delivery(_CID, 0, parts), Delivery(_CID[:-1] + "0", 0, parts, {"out": 1})]
    assert [cid async for cid in session.deliver(results)] == [result.cid for result in results]


async def _set_key(session):
    await session.set_key(bytes(32))


_QUESTIONS = dict(zip(b"hipfsdk", (_hello, _inspect, _poll, _fetch, _stream, _deliver, _set_key)))


class _Channel:
    """A channel of pipes."""

    def __init__(self, in_fd, out_fd):
        self.in_fd, self.out_fd = in_fd, out_fd

    async def end(self):
        os.close(self.in_fd)
        os.close(self.out_fd)
        return 0


@functools.lru_cache(maxsize=1)
def _loop():
    return asyncio.new_event_loop()


@functools.lru_cache(maxsize=1)
def _config():
    return make_config({}).for_vm("work")
