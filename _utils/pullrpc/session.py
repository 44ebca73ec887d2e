# SPDX-License-Identifier: GPL-2.0-or-later
"""A session with the agent in one VM, seen from dom0: requests go out, each gets one answer, everything else ends it.

The agent is hostile until its answer is checked: wrong order, wrong size, too late, too much, or a byte that
nobody asked for ends the session. Memory per session is bounded by one frame.
"""

from __future__ import annotations

import dataclasses
import re
import time

from .errors import AgentUnable, FrameError, SessionBroken
from .frames import PAYLOAD_MAX, FrameReader, encode_frame, wait_readable, write_all
from .layout import PROBLEMS
from .transport import Channel

_AGENT_COMMAND = "qvm-remote agent"
#: Exit code of a shell that does not find a program (POSIX).
_NOT_FOUND = 127
#: Commands up to this size come with the poll's answer, bytes in all.
INLINE_MAX = 1 << 16
ITEMS_MAX = 24
_FINGERPRINT = re.compile(r"[0-9a-f]{4}(:[0-9a-f]{4}){3}\Z")
CANCELS_MAX = 16


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


class NoAgent(SessionBroken):
    """The VM has no agent: qvm-remote is not installed in its template."""


class Session:
    """An open session.

    Args:
        config: Config that holds for the VM.
        vm: str, a checked name.

    Raises:
        TransportError: qvm-run can't be started.
    """

    #: What a user reads in the status.
    kind = "agent"
    #: Most that one :meth:`fetch` gives, bytes.
    fetch_max = PAYLOAD_MAX

    def __init__(self, config, vm):
        self._config = config
        self._number = 0
        self._channel = Channel(config, vm, _AGENT_COMMAND)
        self._reader = FrameReader(self._channel.out_fd)

    def hello(self):
        """Begin.

        Raises:
            NoAgent: the program is not installed there.
            SessionBroken: the VM isn't running, or its answer is no agent's.
        """
        config = self._config
        limits = {name: getattr(config, name) for name in ("timeout_max", "command_max", "stdin_max", "max_age")}
        answer = self._begin({"op": "hello", "v": 2, "limits": limits})
        if answer.get("v") != 2:
            raise FrameError("the agent speaks another version of the protocol")

    def inspect(self):
        """Ask what key the VM has, and whether its queue is in order; nothing is changed there.

        Returns:
            Found

        Raises:
            NoAgent: the program is not installed there; SessionBroken
        """
        answer = self._begin({"op": "key"})
        untrusted_print, untrusted_problems = answer.get("fingerprint"), answer.get("problems")
        if not isinstance(untrusted_problems, list) or any(word not in PROBLEMS for word in untrusted_problems):
            raise FrameError("the agent's view of the queue is malformed")
        if untrusted_print is not None and not (isinstance(untrusted_print, str) and _FINGERPRINT.match(untrusted_print)):
            raise FrameError("the agent's view of the key is malformed")
        return Found(untrusted_print, tuple(sorted(set(untrusted_problems))))

    def set_key(self, key):
        """Give the VM its key; folders that are missing are made, rights that others have are taken away.

        Args:
            key: bytes, 32.

        Raises:
            AgentUnable: it can't store it; SessionBroken
        """
        self._ask({"op": "set-key"}, key.hex().encode("ascii"))

    def _begin(self, request):
        try:
            return self._ask(request)[0]
        except AgentUnable:
            raise
        except SessionBroken:
            if self._number == 1 and self.close() == _NOT_FOUND:
                raise NoAgent("qvm-remote is not installed there") from None
            raise

    def abort(self):
        """End the session from another thread; whoever works with it finds it broken."""
        self._channel.kill()

    def close(self):
        """End the session.

        Returns:
            int, the exit code of qvm-run.
        """
        return self._channel.end()

    def bye(self):
        """Tell the agent that the session ends, so that it cleans up."""
        self._ask({"op": "bye"})

    def poll(self, wait, room, wake_fd):
        """Ask what lies in the queue; the answer may take as long as nothing does.

        Args:
            wait: int, seconds the agent may wait.
            room: int, most commands wanted.
            wake_fd: int, a descriptor that becomes readable when dom0 has something else to say.

        Returns:
            (list of Item, list of str): commands, and ids (not checked) that their clients gave up.

        Raises:
            SessionBroken
        """
        number = self._send({"op": "poll", "wait": wait, "max": room, "inline": INLINE_MAX})
        deadline = time.monotonic() + wait + self._config.answer_wait
        woken = False
        while True:
            frame = self._reader.try_frame(INLINE_MAX)
            if frame is not None:
                break
            ready = wait_readable([self._reader.fileno()] + ([] if woken else [wake_fd]), deadline)
            if wake_fd in ready:
                woken = True
                deadline = time.monotonic() + self._config.answer_wait
                woken_number = self._send({"op": "wake"})
            if time.monotonic() >= deadline:
                raise FrameError("the agent did not answer in time")
            if self._reader.fileno() in ready:
                self._reader.poll()
        answer = self._checked(frame[0], number)
        if woken:
            self._receive(woken_number, 0)
        return _read_poll(answer, frame[1])

    def fetch(self, cid, part, offset, size):
        """Fetch a part of a request.

        Args:
            cid: str, checked.
            part: str: ``command``, ``auth`` or ``in``.
            offset, size: int, bytes.

        Returns:
            bytes, at most ``size``.

        Raises:
            SessionBroken
        """
        size = min(size, PAYLOAD_MAX)
        number = self._send({"op": "fetch", "id": cid, "part": part, "offset": offset, "size": size})
        return self._receive(number, size)[1]

    def take(self, cid):
        """Tell the VM that dom0 has a command and will answer it.

        Raises:
            SessionBroken
        """
        self._ask({"op": "take", "id": cid})

    def drop(self, cid):
        """Tell the VM that a command its client gave up is done with.

        Raises:
            SessionBroken
        """
        self._ask({"op": "drop", "id": cid})

    def deliver(self, results):
        """Hand results over.

        Args:
            results: iterable of (cid, exit code, parts); parts is a dict of ``out``, ``err`` and ``meta`` to
                (size in bytes, callable that yields bytes).

        Yields:
            str, an id whose result the VM now has in whole.

        Raises:
            SessionBroken
        """
        for cid, exit_code, parts in results:
            self._deliver_one(cid, exit_code, parts)
            yield cid

    def _deliver_one(self, cid, exit_code, parts):
        sizes = {part: size for part, (size, _) in parts.items()}
        inline = sum(sizes.values()) <= PAYLOAD_MAX
        payload = b""
        for part in ("out", "err", "meta"):
            offset = 0
            for chunk in parts[part][1]():
                if inline:
                    payload += chunk
                else:
                    self._ask({"op": "put", "id": cid, "part": part, "offset": offset}, chunk)
                offset += len(chunk)
        self._ask({"op": "result", "id": cid, "exit": exit_code, "inline": int(inline), **sizes}, payload)

    def _ask(self, request, payload=b""):
        return self._receive(self._send(request, payload), 0)

    def _send(self, request, payload=b""):
        if self._reader.pending():
            raise FrameError("the agent sent something nobody asked for")
        self._number += 1
        frame = encode_frame({**request, "n": self._number}, payload)
        write_all(self._channel.in_fd, frame, time.monotonic() + self._config.answer_wait)
        return self._number

    def _receive(self, number, payload_max):
        header, payload = self._reader.read(payload_max, time.monotonic() + self._config.answer_wait)
        return self._checked(header, number), payload

    def _checked(self, untrusted_answer, number):
        if untrusted_answer.get("n") != number:
            raise FrameError("the agent answered out of turn")
        if "error" in untrusted_answer:
            # Its words stay there: nothing a VM wrote belongs into dom0's log.
            raise AgentUnable("the agent could not do what it was asked (is the disk of the VM full?)")
        return untrusted_answer


def _read_poll(untrusted_answer, payload):
    untrusted_items, untrusted_cancels = untrusted_answer.get("items"), untrusted_answer.get("cancels")
    if not isinstance(untrusted_items, list) or not isinstance(untrusted_cancels, list):
        raise FrameError("the agent's list is malformed")
    if len(untrusted_items) > ITEMS_MAX or len(untrusted_cancels) > CANCELS_MAX:
        raise FrameError("the agent's list is too long")
    items, at = [], 0
    for untrusted_item in untrusted_items:
        if not isinstance(untrusted_item, list) or len(untrusted_item) != 5 or not isinstance(untrusted_item[0], str):
            raise FrameError("the agent's list is malformed")
        name, *numbers = untrusted_item
        if any(type(number) is not int or number < -1 for number in numbers):
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
