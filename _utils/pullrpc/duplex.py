# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests and answers over one channel: several requests may be on their way, their answers come in the same order.

The other side is hostile: an answer out of turn, over its bound, or late ends it all, and so does a byte that nobody
asked for. What is held in memory is one frame at most, and what the callers send.
"""

from __future__ import annotations

import asyncio
import collections
import os

from .errors import FrameError, SessionBroken
from .frames import FrameReader, encode_frame

_WRITE_SIZE = 1 << 16


class Duplex:
    """Requests and answers over a pair of non-blocking descriptors; made and used within one event loop.

    Args:
        in_fd: int, takes requests.
        out_fd: int, gives answers.
        answer_wait: float, seconds within which each answer must come once those before it are there.
    """

    def __init__(self, in_fd, out_fd, answer_wait):
        self._loop = asyncio.get_running_loop()
        self._in_fd = in_fd
        self._reader = FrameReader(out_fd)
        self._answer_wait = answer_wait
        self._number = 0
        #: (number, future, largest payload, seconds it may take beside answer_wait) of each request without an answer.
        self._expected = collections.deque()
        self._unsent = bytearray()
        self._is_writing = False
        self._timer = None
        self._broken = None
        self._loop.add_reader(out_fd, self._on_readable)

    @property
    def requests(self):
        """How many requests were sent."""
        return self._number

    def ask(self, request, payload=b"", payload_max=0, patience=0):
        """Send a request.

        Args:
            request: dict.
            payload: bytes.
            payload_max: int, largest payload its answer may have, bytes.
            patience: float, seconds the answer may take beside ``answer_wait`` while no other request follows.

        Returns:
            asyncio.Future of (dict, bytes): the answer, checked for its number only. It fails with SessionBroken.
        """
        future = self._loop.create_future()
        # Not everybody who asks stays to hear that the session broke.
        future.add_done_callback(_look_at)
        if self._broken is not None:
            future.set_exception(self._broken)
            return future
        self._number += 1
        try:
            self._unsent += encode_frame({**request, "n": self._number}, payload)
        except FrameError as err:
            future.set_exception(err)
            return future
        self._expected.append((self._number, future, payload_max, patience))
        if len(self._expected) == 1:
            self._set_timer(patience)
        elif self._expected[0][3]:
            # The one that may take its time is to end now that there is something else.
            self._expected[0] = (*self._expected[0][:3], 0)
            self._set_timer(0)
        self._write()
        return future

    def close(self):
        """Have done with both descriptors; requests that wait fail."""
        self._fail(SessionBroken("the session was ended"))

    def _write(self):
        try:
            while self._unsent:
                del self._unsent[: os.write(self._in_fd, self._unsent[:_WRITE_SIZE])]
        except BlockingIOError:
            if not self._is_writing:
                self._is_writing = True
                self._loop.add_writer(self._in_fd, self._write)
            return
        except OSError:
            self._fail(SessionBroken("the session was closed by the other side"))
            return
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._in_fd)

    def _on_readable(self):
        try:
            self._reader.poll()
            while self._expected:
                frame = self._reader.try_frame(self._expected[0][2])
                if frame is None:
                    return
                self._settle(*frame)
            if self._reader.pending():
                raise FrameError("the agent sent something nobody asked for")
            # Raises if this was the end.
            self._reader.try_frame(0)
        except SessionBroken as err:
            self._fail(err)

    def _settle(self, untrusted_header, payload):
        number, future, _, _ = self._expected.popleft()
        # To Python 1, 1.0 and true are equal.
        if type(untrusted_header.get("n")) is not int or untrusted_header["n"] != number:
            self._expected.appendleft((number, future, 0, 0))
            raise FrameError("the agent answered out of turn")
        if self._expected:
            self._set_timer(self._expected[0][3])
        else:
            self._timer.cancel()
        if not future.done():
            future.set_result((untrusted_header, payload))

    def _set_timer(self, patience):
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._answer_wait + patience, self._fail, FrameError("the agent did not answer in time"))

    def _fail(self, error):
        if self._broken is not None:
            return
        self._broken = error
        self._loop.remove_reader(self._reader.fileno())
        if self._is_writing:
            self._loop.remove_writer(self._in_fd)
        if self._timer is not None:
            self._timer.cancel()
        self._unsent.clear()
        while self._expected:
            future = self._expected.popleft()[1]
            if not future.done():
                future.set_exception(error)


def _look_at(future):
    if not future.cancelled():
        future.exception()
