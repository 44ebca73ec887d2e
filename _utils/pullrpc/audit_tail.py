# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of the audit log: its newest lines, and those that are being written. Changes nothing, and never reads all of it."""

from __future__ import annotations

import os

from .audit_files import last_rotated
from .audit_read import open_log, shown, unreadable
from .chain import LINE_MAX, read_line

#: How much of the end of a log is looked at for its newest lines, bytes: some thousand lines.
_RECENT = 1 << 20
_CHUNK = 1 << 16


def recent(path):
    """Read the newest lines of an audit log, a bounded part of it however long it is.

    Args:
        path: str, the audit log.

    Returns:
        list of dict, oldest first, as they stand there: nothing in them is escaped.

    Raises:
        AuditError: it can't be read.
    """
    try:
        data = _end(path, _RECENT)
        older = last_rotated(path) if len(data) < _RECENT and os.path.isdir(os.path.dirname(path)) else None
        if older:
            data = _end(older, _RECENT - len(data)) + data
    except OSError as err:
        raise unreadable(path, err) from err
    return [line for line in map(read_line, data.split(b"\n")) if line]


def follow(path, count, pause, vm=None):
    """Give the newest lines of an audit log, then each new one as it is written, across rotation. It never ends by itself.

    Args:
        path: str, the audit log.
        count: int, most old lines.
        pause: callable, called while there is nothing new.
        vm: str; None for all.

    Yields:
        dict. Text in it can be shown on a terminal.

    Raises:
        AuditError: it can't be read.
    """
    begins = True
    while True:
        try:
            fd = open_log(path)
        except FileNotFoundError:
            # Nothing was ever written, or it was just rotated away.
            begins = False
            pause()
            continue
        except OSError as err:
            raise unreadable(path, err) from err
        with os.fdopen(fd, "rb", buffering=0) as file:
            if begins:
                old = [line for line in _last_lines(file) if _is_of(line, vm)]
                yield from map(shown, old[len(old) - count :] if count < len(old) else old)
            yield from (shown(line) for line in _new_lines(file, path, pause) if _is_of(line, vm))
        begins = False


def _end(path, size):
    """The last bytes of a file, so many of them or a few less: from the beginning of a line on. None of a file that is not there."""
    try:
        with os.fdopen(open_log(path), "rb", buffering=0) as file:
            return _read_end(file, size)
    except FileNotFoundError:
        return b""


def _read_end(file, size):
    start = max(0, os.fstat(file.fileno()).st_size - size)
    file.seek(start)
    data = file.read(size)
    return data[data.find(b"\n") + 1 :] if start else data


def _last_lines(file):
    """The lines at the end of a file; what comes next is read from behind the last of them on."""
    data = _read_end(file, _RECENT)
    whole = data[: data.rfind(b"\n") + 1]
    file.seek(len(whole) - len(data), os.SEEK_CUR)
    return [line for line in map(read_line, whole.split(b"\n")) if line]


def _new_lines(file, path, pause):
    """Lines as they are written to a file, until another one has its name and this one was read to its end."""
    pending = b""
    while True:
        # Asked before it is read: whatever was written to it until then is read.
        is_last = _has_another_file(path, file)
        chunk = file.read(_CHUNK)
        if chunk:
            *whole, pending = (pending + chunk).split(b"\n")
            # What is longer than that is no line of ours.
            pending = pending[-LINE_MAX:]
            yield from filter(None, map(read_line, whole))
        elif is_last:
            return
        else:
            pause()


def _has_another_file(path, file):
    try:
        return not os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_of(line, vm):
    return vm is None or line.get("vm") == vm
