# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames of a session: a bounded JSON header and a bounded payload, length-prefixed.

Both sides use it. What is read is bounded before it is read: a reader never holds more than one header and one
payload of the size its caller allowed, whatever the other side sends.
"""

import os
import select
import time

from .errors import FrameError, SessionBroken

#: Longest header, bytes.
HEADER_MAX = 4096
#: Longest payload anyone may allow, bytes; a larger one is sent in parts.
PAYLOAD_MAX = 1 << 18
_PREFIX = 8
_READ_SIZE = 1 << 16


def encode_frame(header, payload=b""):
    """Make a frame.

    Args:
        header: dict of JSON data, at most :data:`HEADER_MAX` bytes when encoded.
        payload: bytes, at most :data:`PAYLOAD_MAX`.

    Returns:
        bytes

    Raises:
        FrameError: it would be over a bound.
    """
    # Imported here, as below: a client needs nothing of this file but a bound, and is to start at once.
    import json

    raw = json.dumps(header, separators=(",", ":")).encode("ascii")
    if len(raw) > HEADER_MAX or len(payload) > PAYLOAD_MAX:
        raise FrameError("a frame over its bound was to be sent")
    return len(raw).to_bytes(4, "big") + len(payload).to_bytes(4, "big") + raw + payload


class FrameReader:
    """Reads frames from a file descriptor, which it makes non-blocking.

    Args:
        fd: int.
    """

    def __init__(self, fd):
        os.set_blocking(fd, False)
        self._fd = fd
        self._buffer = bytearray()
        self._eof = False

    def fileno(self):
        """The descriptor, so that the reader can be polled."""
        return self._fd

    def pending(self):
        """Say whether bytes were read that belong to no frame yet asked for."""
        return bool(self._buffer)

    def poll(self):
        """Read what is there now, without waiting, at most one read's worth beyond what is buffered.

        Raises:
            SessionBroken: the other side closed the session.
        """
        if len(self._buffer) >= _PREFIX + HEADER_MAX + PAYLOAD_MAX:
            return
        try:
            chunk = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._eof = True
        self._buffer += chunk

    def try_frame(self, payload_max):
        """Take the next frame out of the buffer, if it is complete.

        Args:
            payload_max: int, bytes; a frame that announces more is refused at once.

        Returns:
            (dict, bytes) or None.

        Raises:
            FrameError: the frame is over its bound or its header is no JSON object.
            SessionBroken: the other side closed the session and no frame is complete.
        """
        if len(self._buffer) >= _PREFIX:
            header_size = int.from_bytes(self._buffer[:4], "big")
            payload_size = int.from_bytes(self._buffer[4:8], "big")
            if header_size > HEADER_MAX or payload_size > min(payload_max, PAYLOAD_MAX):
                raise FrameError("the other side sent a frame over its bound")
            end = _PREFIX + header_size + payload_size
            if len(self._buffer) >= end:
                untrusted_header = bytes(self._buffer[_PREFIX : _PREFIX + header_size])
                payload = bytes(self._buffer[_PREFIX + header_size : end])
                del self._buffer[:end]
                return _parse_header(untrusted_header), payload
        if self._eof:
            raise SessionBroken("the session was closed by the other side")
        return None

    def read(self, payload_max, deadline):
        """Wait for the next frame.

        Args:
            payload_max: int, bytes.
            deadline: float, seconds of ``time.monotonic()``, or None to wait for ever; the *whole* frame must be there by then,
                so that dripping bytes gains nothing.

        Returns:
            (dict, bytes)

        Raises:
            FrameError: over a bound, malformed or late.
            SessionBroken: closed.
        """
        while True:
            frame = self.try_frame(payload_max)
            if frame is not None:
                return frame
            wait_readable([self._fd], deadline)
            if deadline is not None and time.monotonic() >= deadline:
                raise FrameError("the other side did not answer in time")
            self.poll()


def _parse_header(untrusted_header):
    import json

    try:
        header = json.loads(untrusted_header.decode("ascii"))
    except (ValueError, RecursionError):
        raise FrameError("the other side sent a header that is not JSON") from None
    if not isinstance(header, dict):
        raise FrameError("the other side sent a header that is not a JSON object")
    return header


def wait_readable(fds, deadline):
    """Wait until a descriptor can be read (or is closed), or the deadline has come.

    Args:
        fds: list of int.
        deadline: float, seconds of ``time.monotonic()``, or None.

    Returns:
        set of int, those that are ready.
    """
    # poll, not select: a dom0 with many VMs has descriptors beyond select's 1024.
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN | select.POLLHUP)
    timeout = None if deadline is None else max(0, (deadline - time.monotonic()) * 1000)
    return {fd for fd, _ in poller.poll(timeout)}


def write_all(fd, data, deadline):
    """Write everything to a non-blocking descriptor.

    Args:
        fd: int.
        data: bytes.
        deadline: float, seconds of ``time.monotonic()``, or None.

    Raises:
        SessionBroken: the other side closed it, or did not take the data in time.
    """
    view = memoryview(data)
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    while view:
        try:
            view = view[os.write(fd, view[:_READ_SIZE]) :]
            continue
        except BlockingIOError:
            pass
        except OSError as err:
            raise SessionBroken("the session was closed by the other side") from err
        timeout = None if deadline is None else max(0, (deadline - time.monotonic()) * 1000)
        if not poller.poll(timeout):
            raise SessionBroken("the other side does not read what it is sent")
