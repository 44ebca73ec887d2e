# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM's side of the audit, ``~/.qvm-remote/audit.log``: a line before each request, and one for its end; and the command ``log``.

Their words are those of qvm-remote 1.x, whose log goes on here: ``SUBMIT id= size= cmd=`` and ``DONE id= exit=``. Its times were local.
"""

import os
import stat
import time

from pullrpc.errors import PullError

#: The log is turned over once it is longer, bytes; one older one is kept.
_LOG_MAX = 1 << 20
_COMMAND_SHOWN, _PATH_SHOWN = 400, 400
#: Most of a log that is read, its end; ours is turned over long before, bytes.
_READ_MAX = 4 * _LOG_MAX


def submitted(queue, cid, form, command):
    """Note that a request is about to be queued.

    Args:
        queue: Queue.
        cid, form: str.
        command: bytes.
    """
    shown = _escaped(command[:_COMMAND_SHOWN].decode("utf-8", "replace"))
    _append(queue, f"SUBMIT id={cid} size={len(command)}B form={form} cmd={shown}")


def ended(queue, cid, exit_code, status):
    """Note how a request ended.

    Args:
        queue: Queue.
        cid: str.
        exit_code: int.
        status: str, dom0's word for it, or why there is none.
    """
    _append(queue, f"DONE id={cid} exit={exit_code} status={_escaped(status)}")


def _escaped(text):
    """A text as ASCII without control characters, whatever it is: one line stays one."""
    return text.encode("unicode_escape").decode("ascii")


def _unescaped(raw):
    try:
        return raw.decode("unicode_escape").encode("utf-8", "replace")
    except UnicodeDecodeError:
        # It is none of ours.
        return raw


def _append(queue, text):
    line = f"[{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}] {text}\n"
    try:
        fd = os.open(queue.audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
                # Another program of this user has put something else there, another name of the key for example. It is not written into.
                return
            os.write(fd, line.encode("ascii", "backslashreplace"))
            # Another client may have turned it over since it was opened.
            if info.st_size > _LOG_MAX and os.path.samestat(info, os.lstat(queue.audit)):
                os.rename(queue.audit, queue.audit + ".1")
        finally:
            os.close(fd)
    except OSError:
        # The VM's disk is full. dom0's log, the one that counts, has the request; the user still gets the result.
        return


def show(queue, count):
    """The command ``log``.

    Args:
        queue: Queue.
        count: int, lines.

    Raises:
        PullError: what lies in the log's place is no file.
    """
    from .terminal import put_raw

    lines = []
    for path in (queue.audit, queue.audit + ".1"):
        if len(lines) >= count:
            break
        lines[:0] = _last_lines(path)
    put_raw(b"".join(lines[-count:] if count else []))


def commands(queue):
    """What requests asked for, as far as the log has them.

    Args:
        queue: Queue.

    Returns:
        dict of id (bytes) to bytes, ``...`` at the end of a command that is longer.
    """
    found = {}
    for path in (queue.audit + ".1", queue.audit):
        try:
            lines = _last_lines(path)
        except (OSError, PullError):
            continue
        for line in lines:
            before, is_there, shown = line.rstrip(b"\n").partition(b" cmd=")
            _, is_ours, about = before.partition(b"] SUBMIT id=")
            if is_there and is_ours:
                command = _unescaped(shown)
                found[about.partition(b" ")[0]] = command if b" size=%dB " % len(command) in before else command + b"..."
    return found


def _last_lines(path):
    """The lines at the end of a log, whole ones; none when there is no log."""
    try:
        # Other programs of this user may write there, too: nothing is waited for, and no more is read than there can be of ours.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            from .terminal import one_line

            raise PullError(f"{one_line(os.fsencode(path), _PATH_SHOWN)} is no plain file; move it away")
        # That of qvm-remote 1.x may be of any length.
        start = max(0, info.st_size - _READ_MAX)
        lines = os.pread(fd, _READ_MAX, start).splitlines(keepends=True)
    finally:
        os.close(fd)
    return lines[1:] if start else lines
