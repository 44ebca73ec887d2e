# SPDX-License-Identifier: GPL-2.0-or-later
"""What to do about what is wrong: about an error of the system, and about the first thing that stands between this qube and dom0."""

import errno
import os

from pullrpc.errors import PullError

from .request import connected, load_key, vm_name

_FULL = "the disk is full: free some space and try again"
_NOT_ALLOWED = "run qvm-remote as the owner of that place, or have its owner give you the right"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "your quota is used up: free some space and try again",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: "that place is mounted read-only: have it mounted for writing and try again",
}
#: What to do about a word of layout.PROBLEMS; a key's are said by load_key.
_PROBLEMS = {
    "folder-symlink": "it, or a folder in it, is no folder but a symbolic link or a file; move that away, then run: qvm-remote queue make",
    "folder-owner": "it, or a folder in it, belongs to another user; run qvm-remote as its owner",
}
#: What has dom0 take this qube's key, as it is typed there.
_AUTHORIZE = "sudo qvm-remote-dom0 authorize --from-vm"


def advice(error):
    """Say what to do about an error of the system.

    Args:
        error: OSError.

    Returns:
        str, to be put behind the error; empty when there is nothing to say.
    """
    return f"; {_ADVICE[error.errno]}" if error.errno in _ADVICE else ""


def trouble_here(queue):
    """Find what is wrong in this qube, before dom0 is asked for anything. Changes nothing.

    Args:
        queue: Queue.

    Returns:
        str, what is wrong first, and what to do; None when nothing is.
    """
    for problem in queue.problems():
        if problem in _PROBLEMS:
            return f"the queue {queue.base} can't be used: {_PROBLEMS[problem]}"
    try:
        load_key(queue)
    except PullError as err:
        return str(err)
    try:
        if os.statvfs(queue.base).f_bavail == 0:
            return f"can't write to the queue {queue.base}; {_FULL}"
    except OSError as err:
        return f"can't look at the queue {queue.base}: {err.strerror}{advice(err)}"
    return None


def trouble_on_the_way(queue):
    """Find what keeps dom0 from taking requests, as far as it shows in this qube.

    Args:
        queue: Queue.

    Returns:
        str, what is wrong, and what to type where; None when dom0 is connected.
    """
    if connected(queue):
        return None
    if not os.path.exists(queue.limits) and not os.path.exists(queue.seen):
        return (
            f"dom0 has never looked into this qube; have it named in dom0's pillar (qvm-remote:vms:{vm_name()}), authorized, and the service "
            f"started, in dom0: {_AUTHORIZE} {vm_name()}; sudo qubesctl state.apply qvm-remote.dom0"
        )
    return "dom0 is not connected to this qube; in dom0: sudo qubesctl state.apply qvm-remote.dom0"


def authorize_again():
    """What to type in dom0 when the keys differ.

    Returns:
        str
    """
    return f"in dom0: {_AUTHORIZE} {vm_name()}"
