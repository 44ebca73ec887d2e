# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's spool: a folder for each accepted command, with its request and later its result.

Nothing gets here before its token was checked. A result stays until its VM has it, or until it is too old.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time

from .errors import SpoolError
from .files import forget, make_private, read_bounded, write_whole

#: Files of one command.
COMMAND, TOKEN, STDIN, OUT, ERR, META = "command", "token", "in", "out", "err", "meta"
_CHUNK = 1 << 18
#: How long a count of what is kept holds, seconds: to count it takes time for each file.
_COUNT_HOLDS = 1.0


class Spool:
    """The spool folder.

    Args:
        folder: str; created 0700.
    """

    def __init__(self, folder):
        self._folder = folder
        self._lock = threading.Lock()
        #: When what is kept for each VM was counted: how many bytes they were, of how many commands.
        self._counted = {}
        #: What could not be removed: the disk was read-only then, or failed.
        self._left = set()

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
        """What is kept for a VM, as it was a moment ago: what came and went since is counted, as far as it is known.

        Args:
            vm: str, checked.

        Returns:
            (int, int): bytes, and of how many commands.
        """
        with self._lock:
            counted, total, commands = self._counted.get(vm, (float("-inf"), 0, 0))
        return (total, commands) if time.monotonic() - counted <= _COUNT_HOLDS else self.used_now(vm)

    def used_now(self, vm):
        """The same, counted anew.

        Args:
            vm: str, checked.

        Returns:
            (int, int), as from :meth:`used`.
        """
        now = time.monotonic()
        total, commands = self._count(vm)
        with self._lock:
            self._counted[vm] = (now, total, commands)
        return total, commands

    def wrote(self, vm, size):
        """Count what a command has written.

        Args:
            vm: str, checked.
            size: int, bytes.
        """
        self._count_in(vm, size, 0)

    def _count(self, vm):
        total, commands = 0, -1
        for folder, _, names in os.walk(os.path.join(self._folder, vm)):
            commands += 1
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:
                    continue
        return total, max(0, commands)

    def _count_in(self, vm, size, more=1):
        with self._lock:
            if vm in self._counted:
                counted, total, commands = self._counted[vm]
                self._counted[vm] = (counted, total + size, commands + more)

    def sweep(self, known):
        """Remove what was left of commands that nobody knows any more: the engine died just before it claimed them, or just after
        they were delivered.

        Args:
            known: set of (vm, cid) whose files are kept.
        """
        for vm, cid in self.kept():
            if (vm, cid) not in known:
                self.remove(vm, cid)

    def kept(self):
        """List the commands of which something is kept.

        Returns:
            list of (vm, cid)
        """
        return [(vm, cid) for vm in _names(self._folder) for cid in _names(os.path.join(self._folder, vm))]

    def store_request(self, vm, cid, command, token_line):
        """Keep an authenticated request.

        Args:
            vm, cid: str, checked.
            command, token_line: bytes.

        Raises:
            SpoolError: the disk is full or can't be written.
        """
        self.remove(vm, cid)
        with self._lock:
            # From here on it is another command's, if it was ever one's.
            self._left.discard((vm, cid))
        with _disk_errors(vm):
            make_private(self.path(vm, cid))
            write_whole(self.path(vm, cid, COMMAND), command)
            write_whole(self.path(vm, cid, TOKEN), token_line)
        self._count_in(vm, len(command) + len(token_line))

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

    def stdin_writer(self, vm, cid):
        """Begin to keep a request's stdin.

        Args:
            vm, cid: str, checked.

        Returns:
            StdinWriter

        Raises:
            SpoolError: the disk is full or can't be written.
        """
        with _disk_errors(vm):
            return StdinWriter(vm, self.path(vm, cid, STDIN))

    def store_text(self, vm, cid, part, data):
        """Keep a small file of a result.

        Raises:
            SpoolError: the disk is full or can't be written.
        """
        with _disk_errors(vm):
            make_private(self.path(vm, cid))
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

        Raises:
            SpoolError: that can't be told.
        """
        with _disk_errors(vm):
            try:
                return os.lstat(self.path(vm, cid, part)).st_size
            except FileNotFoundError:
                return 0

    def piece(self, vm, cid, part, offset, size):
        """Read a piece of a file.

        Args:
            vm, cid: str, checked.
            part: str.
            offset, size: int, bytes.

        Returns:
            bytes, as many unless the file ends before.

        Raises:
            SpoolError: it can't be read.
        """
        with _disk_errors(vm), open(self.path(vm, cid, part), "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def chunks(self, vm, cid, part, offset=0):
        """Read a file in parts.

        Args:
            vm, cid: str, checked.
            part: str.
            offset: int, bytes, where to begin.

        Yields:
            bytes, at most 256 KiB each.

        Raises:
            SpoolError: it can't be read.
        """
        with _disk_errors(vm):
            if not os.path.exists(self.path(vm, cid, part)):
                return
            with open(self.path(vm, cid, part), "rb", buffering=0) as file:
                file.seek(offset)
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
        path = self.path(vm, cid)
        is_there = os.path.isdir(path)
        shutil.rmtree(path, ignore_errors=True)
        if is_there and not os.path.lexists(path):
            # Its bytes are seen to be gone by the next count.
            self._count_in(vm, 0, -1)
        elif is_there:
            with self._lock:
                self._left.add((vm, cid))

    def remove_left(self):
        """Remove what could not be removed when it was to go. Nothing is done where that is not possible yet."""
        for vm, cid in list(self._left):
            with self._lock:
                # Held, so that no command of this id is begun meanwhile.
                if (vm, cid) not in self._left:
                    continue
                shutil.rmtree(self.path(vm, cid), ignore_errors=True)
                if not os.path.lexists(self.path(vm, cid)):
                    self._left.discard((vm, cid))


def _names(folder):
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


class StdinWriter:
    """Keeps a request's stdin as it comes.

    Args:
        vm: str.
        path: str, a file that is not there yet.
    """

    def __init__(self, vm, path):
        self._vm = vm
        self._digest = hashlib.sha256()
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")
        self.size = 0

    def write(self, data):
        """Add to it; whoever fetches it bounds it.

        Args:
            data: bytes.

        Raises:
            SpoolError: the disk is full or can't be written.
        """
        with _disk_errors(self._vm):
            self._digest.update(data)
            self._file.write(data)
            self.size += len(data)

    def close(self):
        """End it.

        Returns:
            bytes, the SHA-256 of it all.

        Raises:
            SpoolError: the disk is full or can't be written.
        """
        with _disk_errors(self._vm):
            self._file.close()
        return self._digest.digest()


@contextlib.contextmanager
def _disk_errors(vm):
    try:
        yield
    except OSError as err:
        raise SpoolError(f"dom0 can't keep the commands of {vm}: {err.strerror or err}") from err
