# SPDX-License-Identifier: GPL-2.0-or-later
"""Tells dom0's user on the screen that a VM was refused something, or that a question to that user ran out of time; if dom0 wants that.

It informs, and never holds anything up: a helper shows one notification after the other, what comes too fast is only counted. The
text says which VM and why, in words of ours; nothing of the command is in it.
"""

from __future__ import annotations

import queue
import threading
import time

from .helper import Helper, why_it_failed
from .question import TIMEOUT

#: One notification of a VM, and no more than so many of all, within so many seconds.
_EVERY, _MOST = 60.0, 10
#: How long the helper may take, seconds.
_HELPER_WAIT = 15.0
#: Notifications that wait for the helper; beyond that they are dropped.
_WAITING_MAX = 4


class Notifier:
    """Hears of all events, and tells of some.

    Args:
        log: callable of a str, for what dom0's administrator should know.
        clock: callable that gives seconds; they only go forward.
    """

    def __init__(self, log, clock=time.monotonic):
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._told, self._counts = {}, {}
        self._queue = queue.Queue(_WAITING_MAX)
        self._thread = None

    def note(self, config, vm, cid, what, data):
        """Hear of an event; returns at once.

        Args:
            config: Config.
            vm, cid, what, data: as the engine's events have them.
        """
        if not config.notify_refusals:
            return
        if what == "refused":
            text = f"dom0 refused what {vm} asked for: {data['code']}"
        elif what == "answered" and data["answer"] == TIMEOUT:
            text = f"{vm} asked for something that dom0 runs only after a yes, and nobody answered in time"
        else:
            return
        with self._lock:
            count = self._counts.pop(vm, 0) + 1
            if not self._may_tell(vm):
                self._counts[vm] = count
                return
        more = f"It is the last of {count} since the last notification. " if count > 1 else ""
        self._put(config.notify_helper, vm, cid, f"qvm-remote: {vm} was refused\n{text}. {more}See: qvm-remote-dom0 history {vm}\n")

    def close(self):
        """End; waits for a moment for what is being told."""
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(1.0)

    def _may_tell(self, vm):
        now = self._clock()
        self._told = {one: then for one, then in self._told.items() if now - then < _EVERY}
        if vm in self._told or len(self._told) >= _MOST:
            return False
        self._told[vm] = now
        return True

    def _put(self, *notification):
        with self._lock:
            if self._thread is None:
                # Only now: where nothing is to be told, there is none.
                thread = threading.Thread(target=self._work, name="qvm-remote-notifier", daemon=True)
                try:
                    thread.start()
                except RuntimeError as err:
                    self._log(_untold(notification[1], err))
                    return
                self._thread = thread
        try:
            self._queue.put_nowait(notification)
        except queue.Full:
            return

    def _work(self):
        while True:
            item = self._queue.get()
            if item is None:
                return
            problem = _tell(*item)
            if problem:
                self._log(_untold(item[1], problem))


def _untold(vm, why):
    return f"{vm}: dom0's user could not be told of a refusal: {why}"


def _tell(setting, vm, cid, text):
    """Run the helper.

    Returns:
        str, what was wrong with it; empty if nothing was.
    """
    helper = Helper(setting, "tell_on_screen", {"QVM_REMOTE_VM": vm, "QVM_REMOTE_ID": cid})
    try:
        helper.start()
    except OSError as err:
        return f"{helper.argv[0]}: {err.strerror}"
    ended = helper.finish(text, _HELPER_WAIT)
    if ended is None:
        return f"the helper was not done within {_HELPER_WAIT:.0f} s"
    code, _, complaint = ended
    return why_it_failed(code, complaint) if code else ""
