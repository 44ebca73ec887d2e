# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's spool: a folder for each accepted command, with its request and later its result.

Nothing gets here before its token was checked. A result stays until its VM has it, or until it is too old.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil

from .errors import SpoolError
from .files import forget, read_bounded, write_whole

#: Files of one command.
COMMAND, TOKEN, STDIN, OUT, ERR, META = "command", "token", "in", "out", "err", "meta"
_CHUNK = 1 << 18


class Spool:
    """The spool folder.

    Args:
        folder: str; created 0700.
    """

    def __init__(self, folder):
        self._folder = folder

    def path(self, vm, cid, part=""):
        """Path of a command's folder, or of a file in it.

        Args:
            vm, cid: str, checked.
            part: one of the names above.

        Returns:
            str
        """
        return os.path.join(self._folder, vm, cid, part) if part else os.path.join(self._folder, vm, cid)

    def used(self, vm):
        """Bytes kept for a VM.

        Returns:
            int
        """
        total = 0
        for folder, _, names in os.walk(os.path.join(self._folder, vm)):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:
                    continue
        return total

    def store_request(self, vm, cid, command, token_line):
        """Keep an authenticated request.

        Args:
            vm, cid: str, checked.
            command, token_line: bytes.

        Raises:
            SpoolError: the disk is full or can't be written.
        """
        self.remove(vm, cid)
        with _disk_errors(vm):
            os.makedirs(self.path(vm, cid), mode=0o700, exist_ok=True)
            write_whole(self.path(vm, cid, COMMAND), command)
            write_whole(self.path(vm, cid, TOKEN), token_line)

    def load_request(self, vm, cid, command_max, token_max):
        """Read a request back.

        Returns:
            (bytes, bytes, str or None): command, token line, and the path of its stdin if it has one.

        Raises:
            SpoolError: it isn't there.
        """
        with _disk_errors(vm):
            command = read_bounded(self.path(vm, cid, COMMAND), command_max)
            token_line = read_bounded(self.path(vm, cid, TOKEN), token_max)
        stdin_path = self.path(vm, cid, STDIN)
        return command, token_line, stdin_path if os.path.exists(stdin_path) else None

    def store_stdin(self, vm, cid, chunks):
        """Keep a request's stdin.

        Args:
            vm, cid: str, checked.
            chunks: iterable of bytes, bounded by whoever makes it.

        Returns:
            bytes, the SHA-256 of it all.

        Raises:
            SpoolError: the disk is full or can't be written.
        """
        digest = hashlib.sha256()
        with _disk_errors(vm):
            fd = os.open(self.path(vm, cid, STDIN), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
        return digest.digest()

    def store_text(self, vm, cid, part, data):
        """Keep a small file of a result.

        Raises:
            SpoolError: the disk is full or can't be written.
        """
        with _disk_errors(vm):
            os.makedirs(self.path(vm, cid), mode=0o700, exist_ok=True)
            write_whole(self.path(vm, cid, part), data)

    def digest(self, vm, cid, part):
        """SHA-256 of a file, read in parts.

        Returns:
            bytes

        Raises:
            SpoolError: it can't be read.
        """
        digest = hashlib.sha256()
        for chunk in self.chunks(vm, cid, part):
            digest.update(chunk)
        return digest.digest()

    def size(self, vm, cid, part):
        """Size of a file, bytes; 0 when there is none.

        Returns:
            int
        """
        try:
            return os.lstat(self.path(vm, cid, part)).st_size
        except FileNotFoundError:
            return 0

    def chunks(self, vm, cid, part):
        """Read a file in parts.

        Yields:
            bytes, at most 256 KiB each.

        Raises:
            SpoolError: it can't be read.
        """
        with _disk_errors(vm):
            if not os.path.exists(self.path(vm, cid, part)):
                return
            with open(self.path(vm, cid, part), "rb") as file:
                while True:
                    chunk = file.read(_CHUNK)
                    if not chunk:
                        return
                    yield chunk

    def append(self, vm, cid, part, data):
        """Add to a file of a result.

        Raises:
            SpoolError: the disk is full or can't be written.
        """
        with _disk_errors(vm), open(self.path(vm, cid, part), "ab") as file:
            file.write(data)

    def remove_part(self, vm, cid, part):
        """Remove one file of a command, if it is there."""
        with _disk_errors(vm):
            forget(self.path(vm, cid, part))

    def remove_inputs(self, vm, cid):
        """Remove what a finished command no longer needs."""
        for part in (COMMAND, TOKEN, STDIN):
            self.remove_part(vm, cid, part)

    def remove(self, vm, cid):
        """Remove all of a command."""
        shutil.rmtree(self.path(vm, cid), ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(vm):
    try:
        yield
    except OSError as err:
        raise SpoolError(f"dom0 can't keep the commands of {vm}: {err.strerror or err}") from err
