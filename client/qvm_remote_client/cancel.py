# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``cancel``: have dom0 kill a command that another client of this qube asked for."""

import os
import time

from pullrpc.errors import PullError

from .history import find
from .leftovers import RESULT, requests_in
from .request import connected, take_back
from .terminal import one_line, put

#: A dom0 that is connected hears of it at once; seconds.
_HEARD_WITHIN = 10


def cancel(queue, wanted, quiet):
    """Cancel a command.

    Args:
        queue: Queue.
        wanted: str, its id or how that ends.
        quiet: bool, print nothing when it worked.

    Raises:
        PullError: there is no such command, or it has ended.
    """
    cid = _on_its_way(queue, wanted)
    if not take_back(queue, cid):
        raise PullError(f"can't ask dom0 to cancel {cid}: nothing can be written to the queue {queue.pending()}; is the disk full?")
    while connected(queue):
        if _is_heard(queue, cid):
            if not quiet:
                put(f"{cid} is cancelled\n")
            return
    put(f"{cid} is taken back; if dom0 runs it, it is told to kill it as soon as it connects to this qube\n")


def _is_heard(queue, cid):
    """Whether dom0 has done with it; waits for that for a while."""
    end = time.monotonic() + _HEARD_WITHIN
    while os.path.exists(queue.pending(f"{cid}.cancel")):
        if time.monotonic() > end:
            raise PullError(f"dom0 is connected, but has not cancelled {cid} within {_HEARD_WITHIN} s; see: qvm-remote ping")
        if not connected(queue):
            return False
        time.sleep(0.05)
    return True


def _on_its_way(queue, wanted):
    found = [one for one in requests_in(queue) if one["id"] == wanted or (len(wanted) >= 8 and one["id"].endswith(wanted))]
    shown = one_line(os.fsencode(wanted), 64)
    if len(found) > 1:
        raise PullError(f"the ids of several commands end with {shown}; see: qvm-remote queue status")
    if found and found[0]["state"] != RESULT:
        return found[0]["id"]
    try:
        has_ended = bool(found or find(queue, wanted))
    except PullError:
        has_ended = False
    if has_ended:
        raise PullError(f"{shown} has ended already; see: qvm-remote history show {shown}")
    raise PullError(f"no command {shown} waits or runs; those that do are shown by: qvm-remote queue status")
