# SPDX-License-Identifier: GPL-2.0-or-later
"""A part of a result as it lies in the queue, where other programs of this user may change it at any moment.

What is shown of it is what was hashed: a small one is kept in memory, and of a larger one each block is hashed anew.
"""

import os
import stat

from pullrpc.digests import hasher
from pullrpc.errors import PullError

_CHUNK = 1 << 18
#: A part up to this size is kept in memory from the check of its proof until it is shown, bytes.
_HELD_MAX = 16 << 20
#: dom0 keeps no larger output (the bound of its setting ``output_max``), and adds a line of its own at most, bytes.
_SIZE_MAX = (1 << 30) + 4096


class Part:
    """A part of a result; empty if there is no such file.

    Args:
        path: str.

    Attributes:
        size: int, bytes; what is added to the file later is not looked at.

    Raises:
        PullError: it is no plain file, or too large to be dom0's.
        OSError: it can't be opened.
    """

    def __init__(self, path):
        self._fd, self.size = None, 0
        self._held, self._marks = [], []
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _SIZE_MAX:
            os.close(fd)
            raise PullError(f"{os.path.basename(path)} is no plain file, or larger than any result")
        self._fd, self.size = fd, info.st_size

    def digest(self, begun=0, digest=None):
        """Hash all of it, going on where some of it has been hashed.

        Args:
            begun: int, bytes that have been.
            digest: hash object over them; None for none.

        Returns:
            bytes, the SHA-256; None when it is shorter than that.

        Raises:
            OSError: it can't be read.
        """
        if self.size < begun:
            return None
        digest = digest.copy() if digest else hasher(self.size)
        self._held, self._marks = [], [(begun, digest.copy())]
        holds = self.size - begun <= _HELD_MAX
        at = begun
        while at < self.size:
            block = os.pread(self._fd, min(_CHUNK, self.size - at), at)
            if not block:
                # It was cut off meanwhile: this is not what dom0 has proven.
                break
            digest.update(block)
            at += len(block)
            if holds:
                self._held.append(block)
            else:
                self._marks.append((at, digest.digest()))
        return digest.digest()

    def blocks(self, start):
        """Give what :meth:`digest` hashed.

        Args:
            start: int, how many of its bytes to leave out.

        Yields:
            bytes

        Raises:
            PullError: it was changed since.
            OSError: it can't be read.
        """
        at = self._marks[0][0] if self._marks else 0
        for block in self._held or self._read_again():
            if at + len(block) > start:
                yield block[max(0, start - at) :]
            at += len(block)

    def _read_again(self):
        if not self._marks:
            return
        (at, digest), *marks = self._marks
        digest = digest.copy()
        for end, proven in marks:
            block = os.pread(self._fd, end - at, at)
            digest.update(block)
            if digest.digest() != proven:
                raise PullError("the result was changed in the queue while it was shown; what is above is dom0's, but not all of it")
            yield block
            at = end

    def unproven(self):
        """Give all of it, whatever it is, and hold none: nothing proves it.

        Yields:
            bytes

        Raises:
            OSError: it can't be read.
        """
        at = 0
        while at < self.size:
            block = os.pread(self._fd, min(_CHUNK, self.size - at), at)
            if not block:
                return
            yield block
            at += len(block)

    def beginning(self, size):
        """Read the first bytes, whatever they are: nothing proves them.

        Args:
            size: int, bytes, at most.

        Returns:
            bytes

        Raises:
            OSError: it can't be read.
        """
        return b"" if self._fd is None else os.pread(self._fd, size, 0)
