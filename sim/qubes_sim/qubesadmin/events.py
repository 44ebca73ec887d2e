# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of the simulator's qubesadmin: what becomes of the qubes, as it happens. Behaves as qubesadmin.events does."""

import asyncio
import fnmatch
import socket

from . import config, exc

_OF_POWER = ("domain-pre-start", "domain-start", "domain-shutdown", "domain-paused", "domain-unpaused", "domain-start-failed")


class EventsDispatcher:
    """Receives events and calls handlers.

    Args:
        app: qubesadmin.Qubes.
        api_method: str, there is one in the simulator.
        enable_cache: bool, let the application keep states, which the events keep up to date.
    """

    def __init__(self, app, api_method="admin.Events", enable_cache=True):
        if api_method != "admin.Events":
            raise NotImplementedError(f"no {api_method} in the simulator")
        self.app = app
        self.handlers = {}
        self._reader_task = None
        if enable_cache:
            self.app.cache_enabled = True

    def add_handler(self, event, handler):
        """Have a handler called as ``handler(subject, event, **details)``: subject is a qube's object or None.

        Args:
            event: str, a name, or a pattern as of fnmatch.
            handler: callable.
        """
        self.handlers.setdefault(event, set()).add(handler)

    def remove_handler(self, event, handler):
        """Take a handler back.

        Raises:
            KeyError: there is none.
        """
        self.handlers[event].remove(handler)

    async def listen_for_events(self, vm=None, reconnect=True):
        """Call handlers until stopped.

        Args:
            vm: the one qube whose events are wanted, or None for all.
            reconnect: bool, connect again, after a moment, when the connection ends.
        """
        while True:
            try:
                self._reader_task = asyncio.create_task(self._listen(vm))
                await self._reader_task
            except (OSError, exc.QubesDaemonCommunicationError):
                pass
            except asyncio.CancelledError:
                break
            finally:
                self._reader_task = None
            if not reconnect:
                break
            self.app.log.warning(f"Connection to qubesd terminated, reconnecting in {config.QUBESD_RECONNECT_DELAY} seconds")
            await asyncio.sleep(config.QUBESD_RECONNECT_DELAY)

    def stop(self):
        """End listen_for_events()."""
        if self._reader_task:
            self._reader_task.cancel()

    async def _listen(self, vm):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self.app.ask({"op": "events", "name": None if vm is None else vm.name}, [theirs.fileno()])
            except exc.QubesException:
                ours.close()
                raise
        reader, writer = await asyncio.open_unix_connection(sock=ours)

        async def word():
            return (await reader.readuntil(b"\0"))[:-1].decode("utf-8")

        try:
            while not reader.at_eof():
                try:
                    header = await word()
                except asyncio.IncompleteReadError as err:
                    if err.partial == b"":
                        break
                    raise
                if header != "1":
                    raise exc.QubesDaemonCommunicationError(f"Non-event received on events connection: {header!r}")
                subject, event, details = await word(), await word(), {}
                while True:
                    key = await word()
                    if not key:
                        break
                    details[key] = await word()
                self.handle(subject or None, event, **details)
        finally:
            writer.close()

    def handle(self, subject_name, event, **details):
        """Bring what the application keeps up to date, then call the handlers of an event."""
        subject = self.app.domains.get_blind(subject_name) if subject_name else None
        if subject is None and event in ("domain-add", "domain-delete"):
            self.app.domains.clear_cache(invalidate_name=details["vm"])
        if event in _OF_POWER:
            self.app._update_power_state_cache(subject, event)
        elif event == "connection-established":
            self.app._invalidate_cache_all()
        for handler in [one for pattern, some in self.handlers.items() for one in some if fnmatch.fnmatch(event, pattern)]:
            try:
                handler(subject, event, **details)
            except Exception:  # noqa: BLE001 - as the real one: a handler's mistake reaches nobody else
                self.app.log.exception("Failed to handle event: %s, %s, %s", subject, event, details)
