# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM's side of the audit: one line for each request, in ``~/.qvm-remote/audit.log``; and what ``log`` and ``status`` show of it."""

import os
import time

from pullrpc.errors import PullError
from pullrpc.tokens import fingerprint

from .request import connected, limits, load_key, vm_name

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


def show(queue, words, out):
    """The subcommand ``log``.

    Args:
        queue: Queue.
        words: list of str, the number of lines or nothing.
        out: text file to print to.

    Raises:
        PullError: bad usage.
    """
    if len(words) > 1 or (words and not (words[0].isascii() and words[0].isdigit())):
        raise PullError("use: qvm-remote log [NUMBER]; for a program of that name in dom0: qvm-remote -- log ...")
    count = int(words[0]) if words else 20
    try:
        with open(queue.audit, encoding="ascii", errors="replace") as file:
            lines = file.readlines()
    except FileNotFoundError:
        return
    out.writelines(lines[-count:] if count else [])


def status(queue, words, out):
    """The subcommand ``status``.

    Args:
        queue: Queue.
        words: list of str, empty.
        out: text file to print to.

    Returns:
        int, 0 when there is a key and dom0 is connected, else 1.

    Raises:
        PullError: bad usage.
    """
    if words:
        raise PullError("status takes no argument; for a program of that name in dom0: qvm-remote -- status ...")
    try:
        key, has_key = fingerprint(load_key(queue)), True
    except PullError as err:
        key, has_key = str(err), False
    online = connected(queue)
    waiting = [name for name in os.listdir(queue.pending()) if "." not in name]
    out.write(f"qube:     {vm_name()}\nkey:      {key}\n")
    out.write(f"dom0:     {'connected' if online else 'not connected'}\n")
    out.write(f"waiting:  {len(waiting)}\nrunning:  {len(os.listdir(queue.running()))}\n")
    out.write(f"limits:   {limits(queue)['timeout_max']} s a command\n")
    return 0 if has_key and online else 1
