# SPDX-License-Identifier: GPL-2.0-or-later
"""When to look again which VMs run: at a fixed pace, or, where dom0 has the library ``qubesadmin``, when it tells of a change.

Every look starts a program (``qvm-ls``), which costs a third of a second of CPU time on a real dom0.
"""

from __future__ import annotations

import asyncio
import time

#: What changes the list of running VMs (core-admin's documentation of events).
_EVENTS = ("domain-start", "domain-shutdown", "domain-pre-shutdown", "domain-start-failed", "domain-paused", "domain-unpaused", "domain-delete")
#: After a change: look at once, and again, since a VM that starts is listed as running a moment later, seconds.
_LOOKS = (0.0, 1.0, 4.0, 12.0)
#: With events, how often to look all the same, seconds.
_GUARD = 600.0
#: Without the library, or when it fails: how long until it is tried again, seconds.
_RETRY = 60.0


class Watcher:
    """Tells when VMs start or end.

    Args:
        changed: callable without arguments, called in the loop.
        log: callable of str.
    """

    def __init__(self, changed, log):
        self._changed = changed
        self._log = log
        self._connected = False
        self._change = float("-inf")
        self._ending = False
        self._task = None

    def next_look(self, looked, interval):
        """When the list of running VMs is to be looked at again.

        Args:
            looked: float, when it was, seconds of ``time.monotonic()``.
            interval: float, seconds between looks where nobody tells of changes.

        Returns:
            float, seconds of ``time.monotonic()``.
        """
        if not self._connected:
            return looked + interval
        looks = (self._change + after for after in _LOOKS)
        return next((look for look in looks if look > looked), looked + _GUARD)

    def start(self):
        """Begin to listen."""
        self._task = asyncio.ensure_future(self._run())

    async def stop(self):
        """Have done."""
        # The library takes being cancelled for the end of its connection, and does not pass it on.
        self._ending = True
        self._task.cancel()
        await asyncio.wait((self._task,))

    async def _run(self):
        while not self._ending:
            try:
                await self._listen()
            except ImportError:
                return
            except Exception as err:  # noqa: BLE001 - whatever fails in there, looking at a fixed pace goes on
                self._log(f"qubesadmin does not tell of VMs that start or end: {err}; they are looked for instead")
            if self._ending:
                return
            self._connected = False
            self._changed()
            await asyncio.sleep(_RETRY)

    async def _listen(self):
        import qubesadmin
        import qubesadmin.events

        dispatcher = qubesadmin.events.EventsDispatcher(qubesadmin.Qubes(), enable_cache=False)
        dispatcher.add_handler("connection-established", self._on_connected)
        for event in _EVENTS:
            dispatcher.add_handler(event, self._on_change)
        await dispatcher.listen_for_events(reconnect=False)

    def _on_connected(self, *_args, **_kwargs):
        self._connected = True
        self._on_change()

    def _on_change(self, *_args, **_kwargs):
        self._change = time.monotonic()
        self._changed()
