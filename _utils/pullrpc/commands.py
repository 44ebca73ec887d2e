# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole commands, kept beside the audit log where a line has room for the beginning only: a bounded number of bytes and days.

Written by one process at a time, the engine (or ``run_once``); the oldest go first.
"""

from __future__ import annotations

import collections
import os
import threading
import time

from .errors import AuditError
from .files import forget, make_private, write_durably

#: A file takes whole blocks of the disk.
_BLOCK = 4096


class Commands:
    """The folder of whole commands.

    Args:
        folder: str; created 0700.
    """

    def __init__(self, folder):
        self._folder = folder
        self._lock = threading.Lock()
        #: (time, bytes, path) of each file, oldest first; None until they are needed.
        self._known = None
        self._total = 0

    def path(self, vm, cid):
        """Where a command is kept.

        Args:
            vm, cid: str, checked.

        Returns:
            str
        """
        return os.path.join(self._folder, vm, cid)

    def keep(self, vm, cid, raw, bytes_max, days):
        """Keep a command; on return it is on the disk.

        Args:
            vm, cid: str, checked.
            raw: bytes.
            bytes_max: int, most that all of them may take.
            days: int, for how long they are kept.

        Raises:
            AuditError: it can't be kept.
        """
        path = self.path(vm, cid)
        try:
            with self._lock:
                self._look()
                # Before it is written: it must not be pruned itself, and the disk may have room only then.
                self._prune(bytes_max - _size(len(raw)), days)
                make_private(os.path.dirname(path))
                write_durably(path, raw)
                self._known.append((time.time(), _size(len(raw)), path))
                self._total += _size(len(raw))
        except OSError as err:
            raise AuditError(f"the whole command can't be kept in {self._folder}: {err.strerror}") from err

    def prune(self, bytes_max, days):
        """Remove what is too old or too much.

        Args:
            bytes_max, days: as for :meth:`keep`.

        Raises:
            AuditError: it can't be removed.
        """
        try:
            with self._lock:
                self._look()
                self._prune(bytes_max, days)
        except OSError as err:
            raise AuditError(f"old commands in {self._folder} can't be removed: {err.strerror}") from err

    def _look(self):
        if self._known is None:
            self._known = collections.deque(sorted(list_kept(self._folder)))
            self._total = sum(size for _, size, _ in self._known)

    def _prune(self, bytes_max, days):
        before = time.time() - days * 86400
        while self._known and (self._total > bytes_max or self._known[0][0] < before):
            _, size, path = self._known[0]
            forget(path)
            self._known.popleft()
            self._total -= size


def list_kept(folder):
    """List the commands that are kept.

    Args:
        folder: str.

    Returns:
        list of (float, int, str): time of its writing, bytes of disk, path.

    Raises:
        OSError: the folder can't be read.
    """
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            try:
                info = os.lstat(path)
            except FileNotFoundError:
                continue
            found.append((info.st_mtime, _size(info.st_size), path))
    return found


def _size(length):
    return -(-length // _BLOCK) * _BLOCK
