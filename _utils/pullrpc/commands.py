# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole commands, kept beside the audit log where a line has room for the beginning only: a bounded number of bytes and days.

Written by one process at a time, the engine (or ``run_once``); of the VM that has most of them the oldest go first.
"""

from __future__ import annotations

import collections
import itertools
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
        #: VM to its files, oldest first: id to time and bytes; None until they are needed.
        self._known = None
        #: Those of which it was said that they go, and which are there still: their disk may be read-only.
        self._told = set()

    def path(self, vm, cid):
        """Where a command is kept.

        Args:
            vm, cid: str, checked.

        Returns:
            str
        """
        return os.path.join(self._folder, vm, cid)

    def keep(self, vm, cid, raw, bytes_max, days, on_let_go):
        """Keep a command; on return it is on the disk.

        Args:
            vm, cid: str, checked.
            raw: bytes.
            bytes_max: int, most that all of them may take.
            days: int, for how long they are kept.
            on_let_go: callable of a list of (vm, cid): told which ones go for it, before they do; what it raises keeps them there.

        Raises:
            AuditError: it can't be kept.
        """
        path, size = self.path(vm, cid), _size(len(raw))
        try:
            with self._lock:
                self._look()
                # Before it is written: it must not be pruned itself, and the disk may have room only then.
                self._prune(bytes_max, days, {vm: size}, on_let_go)
                make_private(os.path.dirname(path))
                write_durably(path, raw)
                files = self._known.setdefault(vm, {})
                files.pop(cid, None)
                files[cid] = (time.time(), size)
                self._told.discard((vm, cid))
        except OSError as err:
            raise AuditError(f"the whole command can't be kept in {self._folder}: {err.strerror}") from err

    def prune(self, bytes_max, days, on_let_go):
        """Remove what is too old or too much.

        Args:
            bytes_max, days, on_let_go: as for :meth:`keep`.

        Raises:
            AuditError: it can't be removed.
        """
        try:
            with self._lock:
                self._look()
                self._prune(bytes_max, days, {}, on_let_go)
        except OSError as err:
            raise AuditError(f"old commands in {self._folder} can't be removed: {err.strerror}") from err

    def _look(self):
        if self._known is not None:
            return
        known = {}
        for at, size, path in sorted(list_kept(self._folder)):
            folder, cid = os.path.split(path)
            known.setdefault(os.path.basename(folder), {})[cid] = (at, size)
        self._known = known

    def _prune(self, bytes_max, days, wanted, on_let_go):
        """Let go what is older than it may be, and what is too much beside what is ``wanted`` (VM to bytes)."""
        before = time.time() - days * 86400
        sizes = collections.Counter(wanted)
        goes = {}
        for vm, files in self._known.items():
            goes[vm] = sum(at < before for at, _ in files.values())
            sizes[vm] += sum(size for _, size in itertools.islice(files.values(), goes[vm], None))
        total = sum(sizes.values())
        # In the order in which they go, as far as they do.
        left = {vm: itertools.islice(files.values(), goes[vm], None) for vm, files in self._known.items()}
        while total > bytes_max:
            # Whoever fills the room loses its own: no VM makes what another one had run unseen.
            full = [vm for vm, files in self._known.items() if goes[vm] < len(files)]
            if not full:
                break
            vm = max(full, key=sizes.__getitem__)
            _, size = next(left[vm])
            goes[vm] += 1
            sizes[vm] -= size
            total -= size
        names = [(vm, cid) for vm, count in goes.items() for cid in itertools.islice(self._known[vm], count)]
        untold = [name for name in names if name not in self._told]
        if untold:
            on_let_go(untold)
            self._told.update(untold)
        for vm, cid in names:
            forget(self.path(vm, cid))
            del self._known[vm][cid]
            self._told.discard((vm, cid))


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
