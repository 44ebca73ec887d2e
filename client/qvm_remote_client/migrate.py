# SPDX-License-Identifier: GPL-2.0-or-later
"""The folder of qubes-remote, as qvm-remote was called before 1.0, becomes ours: once, and only where there is none of ours."""

import os
import stat


def adopt(queue):
    """Move ``~/.qubes-remote`` to where the queue is to be, with its key, its log and its history.

    Args:
        queue: Queue, whose folder does not exist.

    Returns:
        str, a line for the user; empty when there was nothing to move.
    """
    old = os.path.join(os.path.dirname(queue.base), ".qubes-remote")
    try:
        info = os.lstat(old)
        # A link may lead anywhere; what is another's is not ours to take.
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            return ""
        os.rename(old, queue.base)
    except (FileNotFoundError, NotADirectoryError):
        # The home that is none is said where the queue is made.
        return ""
    except OSError as err:
        return f"can't move {old} to {queue.base}: {err.strerror}; its key and history are not used"
    return f"moved {old} to {queue.base}: its key, log and history are used from there now"
