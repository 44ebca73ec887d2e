# SPDX-License-Identifier: GPL-2.0-or-later
"""What a running command writes, as dom0 hands it over piece by piece. No byte leaves here before dom0's proof for it is checked.

The agent lists the pieces in ``results/.<cid>.stream`` and appends their bytes to the parts of the result that is to come.
"""

import os
import stat

from pullrpc.digests import equal, hasher
from pullrpc.errors import PullError
from pullrpc.frames import PAYLOAD_MAX
from pullrpc.tokens import chunk_mac

#: Longest line of the list, bytes: three words and a MAC need at most 88.
_LINE_MAX = 128
_READ_SIZE = 4096
_HEX = frozenset(b"0123456789abcdef")


class Tampered(PullError):
    """The list of pieces, or a piece, is not what dom0 made. Nothing more of it may be shown."""


class Stream:
    """The output of a command that still runs.

    Args:
        queue: Queue.
        cid: str.
        key: bytes.

    Attributes:
        shown: dict of ``out`` and ``err`` to (bytes given so far, hash object over them); only parts of which there was some.

    Raises:
        Tampered: what lies in the list's place is no file.
        FileNotFoundError: the list is gone: the result is there.
    """

    def __init__(self, queue, cid, key):
        self._queue = queue
        self._cid = cid
        self._key = key
        self._next = 0
        self._unread = b""
        # Kept open: the result takes the list away, and gives the parts other names.
        self._list = _open_plain(queue.stream(cid))
        self._parts = {}
        self.shown = {}

    def pieces(self):
        """Give what has come since the last call, in the order in which dom0 read it.

        Yields:
            (str, bytes): ``out`` or ``err``, and what the command wrote there.

        Raises:
            Tampered: something was altered, left out, or comes from elsewhere.
        """
        for untrusted_line in self._lines():
            seq, part, size, untrusted_mac = _parse(untrusted_line)
            if seq < self._next:
                # dom0 did not see the answer to this one, and sent it again.
                continue
            data = self._read(part, size) if seq == self._next else b""
            if data is None:
                return
            if seq != self._next or not equal(untrusted_mac, chunk_mac(self._key, self._cid, seq, part, data)):
                raise Tampered("a piece of the output is not as dom0 sent it; nothing more is shown, and dom0 is asked to kill the command")
            self._next += 1
            count, digest = self.shown.get(part) or (0, hasher(size))
            digest.update(data)
            self.shown[part] = (count + size, digest)
            yield part, data

    def close(self):
        """Close what is open."""
        for fd in (self._list, *self._parts.values()):
            os.close(fd)

    def _lines(self):
        """Give complete lines; one at which the reader stops is given again next time."""
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if len(line) > _LINE_MAX:
                raise Tampered("the list of the output's pieces is damaged; dom0 is asked to kill the command")
            if newline:
                yield line
                self._unread = rest
                continue
            more = os.read(self._list, _READ_SIZE)
            if not more:
                return
            self._unread += more

    def _read(self, part, size):
        """Read the next bytes of a part; None while they are not all there."""
        if part not in self._parts:
            try:
                self._parts[part] = _open_plain(self._queue.part(self._cid, part))
            except FileNotFoundError:
                # The result has come in this moment.
                return None
        data = os.pread(self._parts[part], size, self.shown[part][0] if part in self.shown else 0)
        return data if len(data) == size else None


def _open_plain(path):
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as err:
        raise Tampered(f"the command's output can't be read ({err.strerror}); dom0 is asked to kill it") from err
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Tampered("the command's output lies in no plain file; dom0 is asked to kill it")
    return fd


def _parse(untrusted_line):
    """Take a line of the list apart: (int, str, int, str)."""
    words = untrusted_line.split(b" ")
    if len(words) == 4:
        seq, part, size, mac = words
        numbers = seq.isdigit() and size.isdigit() and len(seq) <= 10 and int(size) <= PAYLOAD_MAX
        if numbers and part in (b"out", b"err") and len(mac) == 64 and _HEX.issuperset(mac):
            return int(seq), part.decode("ascii"), int(size), mac.decode("ascii")
    raise Tampered("the list of the output's pieces is damaged; dom0 is asked to kill the command")
