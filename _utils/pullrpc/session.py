# SPDX-License-Identifier: GPL-2.0-or-later
"""A session with the agent in one VM, seen from dom0: requests go out, each gets one answer, everything else ends it.

The agent is hostile until its answer is checked: wrong order, wrong size, too late, too much, or a byte that
nobody asked for ends the session (see duplex).
"""

from __future__ import annotations

import collections
import dataclasses
import re

from .duplex import Duplex
from .errors import AgentUnable, FrameError, SessionBroken, SpoolError
from .frames import PAYLOAD_MAX
from .layout import PROBLEMS
from .transport import open_channel

_AGENT_COMMAND = "qvm-remote agent"
#: Exit code of a shell that does not find a program (POSIX).
_NOT_FOUND = 127
#: Commands up to this size come with the poll's answer, bytes in all.
INLINE_MAX = 1 << 16
ITEMS_MAX = 24
#: No file is as long, bytes.
_SIZE_END = 1 << 63
_VERSION = re.compile(r"[0-9a-z][0-9a-z.+~-]{0,31}\Z")
_FINGERPRINT = re.compile(r"[0-9a-f]{4}(:[0-9a-f]{4}){3}\Z")
CANCELS_MAX = 16
#: Most of results that is on its way without an answer.
_WINDOW_FRAMES, _WINDOW_BYTES = 32, 1 << 20
_UNABLE = "the agent could not do what it was asked (is the disk of the VM full?)"


@dataclasses.dataclass(frozen=True)
class Item:
    """What a VM says lies in its queue. Nothing of it is checked but the types and the signs.

    Attributes:
        untrusted_cid: str.
        command_size, token_size, stdin_size: int, bytes; -1 when there is none.
        command, token: bytes, or None when they must be fetched.
    """

    untrusted_cid: str
    command_size: int
    token_size: int
    stdin_size: int
    command: bytes | None = None
    token: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """What a VM says of its key and its queue.

    Attributes:
        fingerprint: str, the key's; None when there is none that can be used.
        problems: tuple of str, words of :data:`pullrpc.layout.PROBLEMS`.
    """

    fingerprint: str | None
    problems: tuple


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of what a command wrote, on its way while it runs.

    Attributes:
        part: str, ``out`` or ``err``.
        offset: int, bytes of that part before it.
        seq: int, pieces of both parts before it.
        data: bytes.
        mac: str, hex; see :func:`pullrpc.tokens.chunk_mac`.
    """

    part: str
    offset: int
    seq: int
    data: bytes
    mac: str


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A result to hand over.

    Attributes:
        cid: str.
        exit_code: int.
        parts: dict of ``out``, ``err`` and ``meta`` to (size in bytes, callable of an offset that yields bytes).
        sent: dict of part to bytes that the VM has already, and that are the beginning of that part.
    """

    cid: str
    exit_code: int
    parts: dict
    sent: dict = dataclasses.field(default_factory=dict)


class NoAgent(SessionBroken):
    """The VM has no agent: qvm-remote is not installed in its template."""


class Session:
    """An open session. Every method that gives an answer raises SessionBroken when the session ends before that came.

    Args:
        config: Config that holds for the VM.
        channel: Channel, with the agent at its other end.
    """

    #: What a user reads in the status.
    kind = "agent"
    #: Most that one :meth:`fetch` gives, bytes.
    fetch_max = PAYLOAD_MAX

    def __init__(self, config, channel):
        self._config = config
        self._channel = channel
        self._duplex = Duplex(channel.in_fd, channel.out_fd, config.answer_wait)
        #: Whether the agent takes output of commands that still run.
        self.streams = False
        #: Which version of qvm-remote the agent says it is.
        self.version = "unknown"

    @classmethod
    async def open(cls, config, vm):
        """Start the agent in a VM.

        Args:
            config: Config that holds for the VM.
            vm: str, a checked name.

        Returns:
            Session

        Raises:
            TransportError: qvm-run can't be started.
        """
        return cls(config, await open_channel(config, vm, _AGENT_COMMAND))

    async def hello(self):
        """Begin.

        Raises:
            NoAgent: the program is not installed there.
            SessionBroken: the VM isn't running, or its answer is no agent's.
        """
        config = self._config
        limits = {name: getattr(config, name) for name in ("timeout_max", "command_max", "stdin_max", "max_age")}
        answer = await self._begin({"op": "hello", "v": 2, "limits": limits})
        if answer.get("v") != 2:
            raise FrameError("the agent speaks another version of the protocol")
        self.streams = answer.get("stream") == 1
        untrusted_version = answer.get("agent")
        self.version = untrusted_version if isinstance(untrusted_version, str) and _VERSION.match(untrusted_version) else "unknown"

    async def inspect(self):
        """Ask what key the VM has, and whether its queue is in order; nothing is changed there.

        Returns:
            Found

        Raises:
            NoAgent: the program is not installed there.
        """
        answer = await self._begin({"op": "key"})
        untrusted_print, untrusted_problems = answer.get("fingerprint"), answer.get("problems")
        if not isinstance(untrusted_problems, list) or any(word not in PROBLEMS for word in untrusted_problems):
            raise FrameError("the agent's view of the queue is malformed")
        if untrusted_print is not None and not (isinstance(untrusted_print, str) and _FINGERPRINT.match(untrusted_print)):
            raise FrameError("the agent's view of the key is malformed")
        return Found(untrusted_print, tuple(sorted(set(untrusted_problems))))

    async def set_key(self, key):
        """Give the VM its key; folders that are missing are made, rights that others have are taken away.

        Args:
            key: bytes, 32.

        Raises:
            AgentUnable: it can't store it.
        """
        await self._ask({"op": "set-key"}, key.hex().encode("ascii"))

    async def _begin(self, request):
        try:
            return await self._ask(request)
        except AgentUnable:
            raise
        except SessionBroken:
            if self._duplex.requests == 1 and await self.close() == _NOT_FOUND:
                raise NoAgent("qvm-remote is not installed there") from None
            raise

    async def close(self):
        """End the session.

        Returns:
            int, the exit code of qvm-run; None when it was ended before.
        """
        channel, self._channel = self._channel, None
        if channel is None:
            return None
        self._duplex.close()
        return await channel.end()

    async def bye(self):
        """Tell the agent that the session ends, so that it cleans up."""
        await self._ask({"op": "bye"})

    async def poll(self, wait, room):
        """Ask what lies in the queue; the answer may take as long as nothing does, and dom0 asks for nothing else.

        Args:
            wait: int, seconds the agent may wait.
            room: int, most commands wanted.

        Returns:
            (list of Item, list of str): commands, and ids (not checked) that their clients gave up.
        """
        request = {"op": "poll", "wait": wait, "max": room, "inline": INLINE_MAX}
        header, payload = await self._duplex.ask(request, payload_max=INLINE_MAX, patience=wait)
        return read_poll(_checked(header), payload, room)

    async def fetch(self, cid, part, offset, size):
        """Fetch a part of a request.

        Args:
            cid: str, checked.
            part: str: ``command``, ``auth`` or ``in``.
            offset, size: int, bytes.

        Returns:
            bytes, at most ``size``.
        """
        size = min(size, PAYLOAD_MAX)
        request = {"op": "fetch", "id": cid, "part": part, "offset": offset, "size": size}
        header, payload = await self._duplex.ask(request, payload_max=size)
        _checked(header)
        return payload

    async def take(self, cids):
        """Tell the VM that dom0 has some commands and will answer them.

        Args:
            cids: list of str.
        """
        await self._ask_all([{"op": "take", "id": cid} for cid in cids])

    async def drop(self, cids):
        """Tell the VM that commands which their clients gave up are done with.

        Args:
            cids: list of str.
        """
        await self._ask_all([{"op": "drop", "id": cid} for cid in cids])

    async def stream(self, cid, chunk):
        """Hand over a piece of what a command that runs has written.

        Args:
            cid: str.
            chunk: Chunk.

        Returns:
            bool, whether somebody in the VM still waits for it.
        """
        request = {"op": "put", "id": cid, "part": chunk.part, "offset": chunk.offset, "seq": chunk.seq, "mac": chunk.mac}
        return (await self._ask(request, chunk.data)).get("gone") != 1

    async def deliver(self, results):
        """Hand results over. One that the VM can't take, or dom0 can't read, is no matter of the others.

        Args:
            results: iterable of Delivery.

        Yields:
            str, an id whose result the VM now has in whole.

        Raises:
            AgentUnable: in the end, if there are some that did not reach it: ``failed``.
        """
        failed = {}
        async for untrusted_answer, cid, is_last in self._answers(_frames_of_all(results, failed)):
            try:
                _checked(untrusted_answer)
            except AgentUnable:
                # Whatever it says of the rest of it: that has to be sent again from its beginning.
                failed.setdefault(cid, _UNABLE)
            if is_last and cid not in failed:
                yield cid
        if failed:
            raise AgentUnable("; ".join(sorted(set(failed.values()))), failed)

    async def _answers(self, frames):
        """Send requests, some of them without waiting for the answers to those before.

        Args:
            frames: iterable of (request, payload, id, whether it is its last one); None where all answers are to be waited for.

        Yields:
            (dict, str, bool): an answer, not checked, the id, and whether it was its last one.
        """
        unanswered, size = collections.deque(), 0
        for frame in frames:
            if frame is not None:
                request, payload, *which = frame
                unanswered.append((self._duplex.ask(request, payload), len(payload), which))
                size += len(payload)
            while unanswered and (frame is None or size > _WINDOW_BYTES or len(unanswered) > _WINDOW_FRAMES):
                answer, answered, which = unanswered.popleft()
                size -= answered
                yield ((await answer)[0], *which)
        for answer, _, which in unanswered:
            yield ((await answer)[0], *which)

    async def _ask(self, request, payload=b""):
        return _checked((await self._duplex.ask(request, payload))[0])

    async def _ask_all(self, requests):
        for answer in [self._duplex.ask(request) for request in requests]:
            _checked((await answer)[0])


def _frames_of_all(results, failed):
    """Results as requests, see :meth:`Session._answers`; nothing more is sent of those that have failed meanwhile."""
    for result in results:
        begun = []
        try:
            for request, payload, delivered in _frames_of(result):
                if result.cid in failed:
                    break
                if request["op"] == "put" and request["part"] not in begun:
                    begun.append(request["part"])
                yield request, payload, result.cid, delivered is not None
        except SpoolError as err:
            failed[result.cid] = str(err)
        if not begun:
            continue
        # Before the next one is sent it must be known whether this one had room: there is none for whatever comes behind one that had not.
        yield None
        if result.cid in failed:
            for part in begun:
                # Makes the part empty, so that the others have its room.
                yield {"op": "put", "id": result.cid, "part": part, "offset": 0}, b"", result.cid, False


def _frames_of(result):
    """A result as requests: (request, payload, its id if that is its last one)."""
    sizes = {part: size for part, (size, _) in result.parts.items()}
    inline = not any(result.sent.values()) and sum(sizes.values()) <= PAYLOAD_MAX
    payload = b""
    for part in ("out", "err", "meta"):
        offset = result.sent.get(part, 0)
        for chunk in result.parts[part][1](offset):
            if inline:
                payload += chunk
            else:
                yield {"op": "put", "id": result.cid, "part": part, "offset": offset}, chunk, None
            offset += len(chunk)
    yield {"op": "result", "id": result.cid, "exit": result.exit_code, "inline": int(inline), **sizes}, payload, result.cid


def _checked(untrusted_answer):
    if "error" in untrusted_answer:
        # Its words stay there: nothing a VM wrote belongs into dom0's log.
        raise AgentUnable(_UNABLE)
    return untrusted_answer


def read_poll(untrusted_answer, payload, room):
    """Take the answer to a poll apart.

    Args:
        untrusted_answer: dict.
        payload: bytes.
        room: int, most commands that were asked for.

    Returns:
        (list of Item, list of str)

    Raises:
        FrameError: it is malformed, or too much.
    """
    untrusted_items, untrusted_cancels = untrusted_answer.get("items"), untrusted_answer.get("cancels")
    if not isinstance(untrusted_items, list) or not isinstance(untrusted_cancels, list):
        raise FrameError("the agent's list is malformed")
    if len(untrusted_items) > min(room, ITEMS_MAX) or len(untrusted_cancels) > CANCELS_MAX:
        raise FrameError("the agent's list is too long")
    items, at = [], 0
    for untrusted_item in untrusted_items:
        if not isinstance(untrusted_item, list) or len(untrusted_item) != 5 or not isinstance(untrusted_item[0], str):
            raise FrameError("the agent's list is malformed")
        name, *numbers = untrusted_item
        if any(type(number) is not int or not -1 <= number < _SIZE_END for number in numbers):
            raise FrameError("the agent's list is malformed")
        command_size, token_size, stdin_size, inline = numbers
        if not inline:
            items.append(Item(name, command_size, token_size, stdin_size))
            continue
        middle, end = at + command_size, at + command_size + token_size
        if command_size < 0 or token_size < 0 or end > len(payload):
            raise FrameError("the agent's list does not fit its data")
        items.append(Item(name, command_size, token_size, stdin_size, payload[at:middle], payload[middle:end]))
        at = end
    if at != len(payload) or not all(isinstance(cid, str) for cid in untrusted_cancels):
        raise FrameError("the agent's list does not fit its data")
    return items, untrusted_cancels
