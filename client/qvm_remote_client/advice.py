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
#: What has dom0 put its key into this qube, as it is typed there.
_HAND_OVER = "sudo qubesctl qvm_remote.hand_over"
_ROOT = "root has no key here; run qvm-remote without sudo, as the qube's user (root's own is what pillar's user: root makes)"


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
            f"dom0 has never looked into this qube; have it named in dom0's pillar (qvm-remote: vms: {vm_name()}: {{}}), then, in dom0: "
            "sudo qubesctl state.apply qvm-remote"
        )
    return "dom0 is not connected to this qube; in dom0: sudo qubesctl state.apply qvm-remote.dom0"


def authorize_again():
    """What to type in dom0 when the keys differ.

    Returns:
        str
    """
    vm = vm_name()
    return f"in dom0: {_HAND_OVER} {vm}, which puts dom0's key here; or, to have dom0 take the one that is here: {_AUTHORIZE} {vm}"


def authorize_new():
    """What to type in dom0 for a key that was made here.

    Returns:
        str
    """
    return (
        f"in dom0: {_AUTHORIZE} {vm_name()}; and pillar should say key: own for this qube: "
        "by key: generate, the default, dom0 makes keys by itself, and puts its own in place of another"
    )


def no_key(queue):
    """Say that there is no key, and where one comes from.

    Args:
        queue: Queue.

    Returns:
        str
    """
    if os.geteuid() == 0:
        return _ROOT
    return (
        f"this qube has no key; if pillar gives it access, dom0 hands one over within a minute (at once by, in dom0: {_HAND_OVER} {vm_name()}); "
        "where pillar says key: own, make one: qvm-remote key gen"
    )


def exposed_key(queue):
    """Say that others may have the key, and how it is changed: a rotation lets the old one work until the new one is used.

    Args:
        queue: Queue.

    Returns:
        str
    """
    return f"others may have read the key {queue.key}; run: chmod 600 {queue.key}; and for another key, {key_anew(queue)}"


def key_anew(queue):
    """What to type for another key, where the one that is here is of no use.

    Args:
        queue: Queue.

    Returns:
        str
    """
    vm = vm_name()
    return f"in dom0: sudo qvm-remote-dom0 revoke {vm}; sudo qubesctl state.apply qvm-remote.vm (with key: own, before that, here: qvm-remote key gen --force)"


def roots_mistake(queue):
    """Say that root has no queue here, as it is when a user typed sudo; to make one would help nobody.

    Args:
        queue: Queue.

    Returns:
        str; None when it is another user, or root's queue (``user: root`` in pillar) is here.
    """
    old = os.path.join(os.path.dirname(queue.base), ".qubes-remote")
    return None if os.geteuid() != 0 or os.path.lexists(queue.base) or os.path.lexists(old) else _ROOT
