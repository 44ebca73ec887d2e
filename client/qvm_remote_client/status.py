# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``status``: what this qube knows without asking dom0. Changes nothing."""

import os
import time

from pullrpc import __version__
from pullrpc.errors import PullError
from pullrpc.tokens import fingerprint

from .advice import advice, trouble_here, trouble_on_the_way
from .history import last
from .leftovers import PENDING, RESULT, RUNNING, requests_in
from .request import connected, limits, load_key, vm_name
from .terminal import one_line, put, put_json


def status(queue, as_json):
    """Say how things are.

    Args:
        queue: Queue.
        as_json: bool.

    Returns:
        int, 0 when there is a key and dom0 is connected, else 1.
    """
    found = _look(queue)
    put_json(found) if as_json else put(_as_text(found))
    return 0 if found["problem"] is None else 1


def _look(queue):
    requests = requests_in(queue)
    try:
        latest, no_history = last(queue, 1), None
    except OSError as err:
        latest, no_history = [], f"can't read the history {queue.history}: {err.strerror}{advice(err)}"
    try:
        key = fingerprint(load_key(queue))
    except PullError:
        key = None
    return {
        "qube": vm_name(),
        "version": __version__,
        "folder": queue.base,
        "key": key,
        "connected": connected(queue),
        "seen_seconds_ago": _seen(queue),
        "pending": sum(one["state"] == PENDING for one in requests),
        "running": sum(one["state"] == RUNNING for one in requests),
        "unfetched": sum(one["state"] == RESULT for one in requests),
        "left_by_clients": sum(not one["client"] for one in requests),
        "limits": limits(queue),
        "last": latest[0] if latest else None,
        "problem": trouble_here(queue) or trouble_on_the_way(queue) or no_history,
    }


def _seen(queue):
    """When dom0 last began a session, or looked without one; seconds ago, None if it never did."""
    times = []
    for path in (queue.limits, queue.seen):
        try:
            times.append(os.stat(path).st_mtime)
        except OSError:
            continue
    return max(0, int(time.time() - max(times))) if times else None


def _as_text(found):
    seen = "never seen here" if found["seen_seconds_ago"] is None else f"last session began {found['seen_seconds_ago']} s ago"
    lines = [
        f"qube:     {found['qube']}",
        f"version:  {found['version']}",
        f"key:      {found['key'] or 'none that can be used'}",
        f"dom0:     {'connected' if found['connected'] else f'not connected, {seen}'}",
        f"waiting:  {found['pending']}",
        f"running:  {found['running']}",
        f"results:  {found['unfetched']} not fetched",
        f"limits:   {found['limits']['timeout_max']} s a command, {found['limits']['command_max']} bytes of it, {found['limits']['stdin_max']} bytes of stdin",
    ]
    if found["last"]:
        # Whoever made a folder in the history gave it its name.
        cid = one_line(os.fsencode(found["last"]["id"]), 64)
        lines.append(f"last:     {cid}, exit code {found['last']['exit']}: {one_line(found['last']['command'].encode('utf-8'), 60)}")
    if found["left_by_clients"]:
        lines.append(f"left:     {found['left_by_clients']} by clients that are gone; put away by: qvm-remote queue clean")
    if found["problem"]:
        lines.append(f"problem:  {found['problem']}")
    return "\n".join(lines) + "\n"
