# SPDX-License-Identifier: GPL-2.0-or-later
"""As much of dom0's library qubesadmin as qvm-remote uses, in the simulator: the qubes, run_service, and events.

Starts no program but ``qrexec-client``, and keeps states no longer than the real one does: not at all, unless ``cache_enabled``
is set, and then until an event tells of a change, if somebody listens to events at all.
"""

import logging
import subprocess

from . import config, exc, wire


class Qubes:
    """The machine."""

    def __init__(self):
        self.cache_enabled = False
        self.domains = _Qubes(self)
        self.log = logging.getLogger("app")

    def ask(self, message, fds=()):
        """Ask the simulator's hypervisor; the real library has ``qubesd_call`` here.

        Returns:
            dict

        Raises:
            exc.QubesException
        """
        try:
            with wire.connect(config.QUBESD_SOCKET) as sock:
                wire.send(sock, message, fds)
                answer = wire.receive(sock)[0]
        except OSError as err:
            raise exc.QubesDaemonCommunicationError(f"Failed to connect to qubesd service: {err}") from err
        if answer is None or "error" in answer:
            raise exc.QubesException(answer["error"] if answer else "qubesd has ended")
        return answer

    def run_service(self, dest, service, *, user=None, autostart=True, **kwargs):
        """Start a service in a qube.

        Returns:
            subprocess.Popen

        Raises:
            exc.QubesException
        """
        if autostart:
            self.ask({"op": "start", "name": dest})
        elif not self.domains.get_blind(dest).is_running():
            raise exc.QubesVMNotRunningError(f"{dest} is not running")
        for stream in ("stdin", "stdout", "stderr"):
            kwargs.setdefault(stream, subprocess.PIPE)
        return subprocess.Popen(["qrexec-client", "-d", dest, f"{user or 'DEFAULT'}:QUBESRPC {service}+ dom0"], **kwargs)

    def _update_power_state_cache(self, subject, event):
        if self.cache_enabled:
            states = {"domain-pre-start": "Transient", "domain-start": "Running", "domain-shutdown": "Halted"}
            states.update({"domain-paused": "Paused", "domain-unpaused": "Running", "domain-start-failed": "Halted"})
            subject._state = states[event]

    def _invalidate_cache_all(self):
        self.domains.clear_cache()
        for vm in self.domains._objects.values():
            vm._state = None


class _Qubes:
    """The collection of all qubes, dom0 among them. As in the real one, the list of names is kept until an event clears it."""

    def __init__(self, app):
        self._app = app
        self._rows = None
        self._objects = {}

    def clear_cache(self, invalidate_name=None):
        """Forget the list, and one object."""
        self._rows = None
        self._objects.pop(invalidate_name, None)

    def refresh_cache(self, force=False):
        """Get the list, if it isn't there."""
        if self._rows is None or force:
            self._rows = {row["name"]: row for row in self._app.ask({"op": "status"})["domains"]}
            self._objects = {name: vm for name, vm in self._objects.items() if name in self._rows}

    def get_blind(self, name):
        """The object of a qube that may or may not be there."""
        if name not in self._objects:
            row = (self._rows or {}).get(name, {})
            self._objects[name] = _Qube(self._app, name, row.get("class"), row.get("state") if self._app.cache_enabled else None)
        return self._objects[name]

    def __contains__(self, name):
        self.refresh_cache()
        return str(name) in self._rows

    def __getitem__(self, name):
        if name not in self:
            raise KeyError(name)
        return self.get_blind(str(name))

    def __iter__(self):
        self.refresh_cache()
        return iter([self.get_blind(name) for name in sorted(self._rows)])


class _Qube:
    def __init__(self, app, name, klass, state):
        self.app = app
        self.name = name
        self._klass = klass
        self._state = state

    def __str__(self):
        return self.name

    def __eq__(self, other):
        return self.name == str(other)

    def __hash__(self):
        return hash(self.name)

    @property
    def klass(self):
        if self._klass is None:
            self._klass = self._row()["class"]
        return self._klass

    @property
    def uuid(self):
        return self._row()["uuid"]

    def get_power_state(self):
        if self._state is not None:
            return self._state
        state = self._row().get("state", "NA")
        if self.app.cache_enabled:
            self._state = state
        return state

    def is_running(self):
        return self.get_power_state() not in ("Halted", "NA")

    def _row(self):
        return next((row for row in self.app.ask({"op": "status"})["domains"] if row["name"] == self.name), {})
