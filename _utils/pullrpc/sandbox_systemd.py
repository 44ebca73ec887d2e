# SPDX-License-Identifier: GPL-2.0-or-later
"""The sandbox's backend for machines that systemd runs, dom0 among them: a transient unit for each command.

The supervisor is the unit's main process, so that whatever happens to it, the unit's cgroup ends with it.
What a command is must never be on systemd-run's command line: everybody can read that, and the journal keeps it.
"""

import os
import shutil
import subprocess

#: Exists exactly while systemd is the init system (sd_booted(3)).
_BOOTED = "/run/systemd/system"
#: How much longer than timeout and killing a unit may last before systemd ends it, seconds: the last line of defence.
_SPARE = 5
#: How long systemctl may take, seconds.
_KILL_WAIT = 10


def is_available():
    """Say whether transient units can be made.

    Returns:
        bool
    """
    return os.path.isdir(_BOOTED) and shutil.which("systemd-run") is not None


class Scope:
    """What bounds one command on this machine.

    Args:
        vm, cid: str, checked: every character of theirs may be in a unit's name.

    Attributes:
        prefix: list of str, what to start the supervisor with.
        environment: dict, for that.
        settings: dict, the backend's part of the supervisor's specification.
    """

    def __init__(self, vm, cid):
        self._unit = f"qvm-remote-job-{vm}-{cid}.service"
        self.prefix = []
        # systemd-run finds the system's bus without any; PATH is for finding systemd-run itself.
        self.environment = {"PATH": os.environ.get("PATH", os.defpath)}
        # The supervisor is systemd's child, not ours: it learns from its stdin that the engine is gone.
        self.settings = {"cgroup": None, "data_max": None, "watch_parent": False}

    def prepare(self, timeout, limits):
        """Make the command line; nothing else is needed.

        Args:
            timeout: int, seconds.
            limits: sandbox.Limits.
        """
        grace = max(1, int(limits.kill_grace))
        properties = {
            "RuntimeMaxSec": f"{timeout + grace + _SPARE}s",
            "TimeoutStopSec": f"{grace}s",
            "KillMode": "control-group",
            # The command that took too much memory is killed; its supervisor must live to tell.
            "OOMPolicy": "continue",
            "MemoryMax": limits.memory_max,
            # One more for the supervisor.
            "TasksMax": limits.tasks_max + 1,
            "CPUWeight": limits.cpu_weight,
        }
        self.prefix = [
            "systemd-run",
            "--pipe",
            "--wait",
            "--collect",
            "--quiet",
            "--no-ask-password",
            "--service-type=exec",
            "--slice=qvm-remote.slice",
            f"--unit={self._unit}",
            *(f"--property={name}={value}" for name, value in properties.items()),
            "--",
        ]

    def kill(self, session):
        """Kill all that is in the unit.

        Args:
            session: int or None; not needed here.
        """
        try:
            subprocess.run(
                ["systemctl", "kill", "--signal=SIGKILL", self._unit],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_KILL_WAIT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            # Its supervisor ends by itself when the engine lets go of its stdin, and RuntimeMaxSec is still there.
            return

    def close(self):
        """Nothing to remove: systemd collects the unit."""
