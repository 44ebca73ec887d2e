# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulator as a Python object, for tests, the demo and the benchmark. Works through the command line alone."""

import json
import os
import subprocess
import sys

from . import costs

_PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "qubes-sim")
#: Longest that starting many VMs may take, seconds.
_OPERATION_WAIT = 300


class Sim:
    """A simulator.

    Args:
        root: str, its folder.
    """

    def __init__(self, root):
        self.root = str(root)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.down()

    def command(self, name, *words):
        """The command line of one of qubes-sim's commands.

        Returns:
            list of str
        """
        # Without what is installed beside Python: it needs nothing of it, and starts in half the time.
        return [sys.executable, "-IS", _PROGRAM, name, "--root", self.root, *words]

    def up(self, templates=(), vms=(), dom0_binds=(), vm_binds=()):
        """Start everything.

        Raises:
            subprocess.CalledProcessError: it could not be started.
        """
        words = []
        for option, values in (("--template", templates), ("--vm", vms), ("--dom0-bind", dom0_binds), ("--vm-bind", vm_binds)):
            for value in values:
                words += [option, value]
        self._do("up", *words)

    def down(self):
        """End everything."""
        self._do("down")

    def create(self, *names):
        """Make VMs, each ``NAME`` or ``NAME:TEMPLATE``."""
        self._do("create", *names)

    def start(self, *names):
        """Start VMs."""
        self._do("start", *names)

    def shutdown(self, *names):
        """Shut VMs down."""
        self._do("shutdown", *names)

    def kill(self, name):
        """End a VM as a power cut does."""
        self._do("kill", name)

    def pause(self, name):
        """Freeze a VM."""
        self._do("pause", name)

    def unpause(self, name):
        """Let a paused VM go on."""
        self._do("unpause", name)

    def remove(self, *names):
        """Remove VMs that do not run."""
        self._do("remove", *names)

    def set_real_costs(self, on):
        """Have dom0's tools cost what the real ones do, or as little as they can.

        Args:
            on: bool; programs that run already go on as they are.
        """
        if on:
            self.dom0("sh", "-c", f"cat > {costs.PATH}", data=json.dumps(costs.REAL).encode("ascii"), check=True)
        else:
            self.dom0("rm", "-f", costs.PATH, check=True)

    def restart_qubesd(self):
        """End the connections of all that listen to events in dom0."""
        self._do("restart-qubesd")

    def reboot(self):
        """End all domains and start dom0 anew."""
        self._do("reboot")

    def dom0(self, *argv, user="root", data=None, timeout=60, check=False):
        """Run a command in dom0.

        Returns:
            subprocess.CompletedProcess, with bytes.
        """
        return _run(self.command("dom0", "-u", user, "--", *argv), data, timeout, check)

    def vm(self, name, *argv, user="user", data=None, timeout=60, check=False):
        """Run a command in a VM.

        Returns:
            subprocess.CompletedProcess, with bytes.
        """
        return _run(self.command("vm", name, "-u", user, "--", *argv), data, timeout, check)

    def popen_dom0(self, *argv, **options):
        """Start a command in dom0; its session ends when the process is killed."""
        return subprocess.Popen(self.command("dom0", "--", *argv), **options)

    def in_vms_root(self, name, *argv):
        """Do what no root of a VM may: with the rights of whoever runs the simulator, in the VM's place."""
        status = subprocess.run(self.command("status"), capture_output=True, check=True).stdout.decode().splitlines()
        pid = next(line.split()[-1] for line in status if line.split()[0] == name)
        own = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
        subprocess.run(["nsenter", "--target", pid, "--mount", *own, *argv], check=True)

    def popen_vm(self, name, *argv, user="user", **options):
        """Start a command in a VM; its session ends when the process is killed."""
        return subprocess.Popen(self.command("vm", name, "-u", user, "--", *argv), **options)

    def _do(self, name, *words):
        subprocess.run(self.command(name, *words), check=True, stdin=subprocess.DEVNULL, timeout=_OPERATION_WAIT)


def _run(command, data, timeout, check):
    # Without data there is no stdin: a test must never read the terminal it was started from.
    given = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    return subprocess.run(command, capture_output=True, timeout=timeout, check=check, **given)
