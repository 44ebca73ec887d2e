# SPDX-License-Identifier: GPL-2.0-or-later
"""As much of dom0's library qubesadmin as qvm-remote uses, in the simulator: the list of qubes, and run_service."""

import subprocess

from . import exc


class Qubes:
    """The machine."""

    def __init__(self):
        self.cache_enabled = False

    @property
    def domains(self):
        """All qubes, dom0 among them, with the states of this moment."""
        done = subprocess.run(["qvm-ls", "--raw-data", "--fields", "name,class,state"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise exc.QubesException("Failed to connect to qubesd service")
        return [_Qube(*line.split("|")) for line in done.stdout.splitlines()]

    def run_service(self, dest, service, *, user=None, autostart=True, **kwargs):
        """Start a service in a qube.

        Returns:
            subprocess.Popen
        """
        if autostart:
            subprocess.run(["qvm-start", "--", dest], capture_output=True, check=False)
        elif not any(vm.name == dest and vm.get_power_state() == "Running" for vm in self.domains):
            raise exc.QubesVMNotRunningError(f"{dest} is not running")
        for stream in ("stdin", "stdout", "stderr"):
            kwargs.setdefault(stream, subprocess.PIPE)
        return subprocess.Popen(["qrexec-client", "-d", dest, f"{user or 'DEFAULT'}:QUBESRPC {service} dom0"], **kwargs)


class _Qube:
    def __init__(self, name, klass, state):
        self.name = name
        self.klass = klass
        self._state = state

    def get_power_state(self):
        return self._state
