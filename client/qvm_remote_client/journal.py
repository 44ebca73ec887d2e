# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM's side of the audit: one line for each request, in ``~/.qvm-remote/audit.log``, and the command ``log``."""

import os
import time

#: The log is turned over once it is longer, bytes; one older one is kept.
_LOG_MAX = 1 << 20
_COMMAND_SHOWN = 400


def append(queue, cid, form, command, exit_code, status):
    """Add a request to the log.

    Args:
        queue: Queue.
        cid, form, status: str.
        command: bytes.
        exit_code: int.
    """
    shown = command[:_COMMAND_SHOWN].decode("utf-8", "replace").encode("unicode_escape").decode("ascii")
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {cid} {form} exit={exit_code} {status} {shown}\n"
    try:
        fd = os.open(queue.audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode("ascii"))
            if os.fstat(fd).st_size > _LOG_MAX:
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
    """
    from .terminal import put_raw

    lines = []
    for path in (queue.audit, queue.audit + ".1"):
        if len(lines) >= count:
            break
        try:
            with open(path, "rb") as file:
                lines[:0] = file.readlines()
        except FileNotFoundError:
            continue
    put_raw(b"".join(lines[-count:] if count else []))
