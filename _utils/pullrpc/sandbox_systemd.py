# SPDX-License-Identifier: GPL-2.0-or-later
"""Where systemd is PID 1 (dom0): each supervisor runs in a transient unit of its own, in ``qvm-remote.slice``.

systemd then bounds memory, processes and CPU of all that its command starts (one at a time, so the unit's limits are the
command's), and ends what the supervisor can't.
"""

import logging
import subprocess

log = logging.getLogger(__name__)

#: Whether the supervisor has a unit of its own, whose limits hold for all that runs in it.
IN_UNIT = True
_SLICE = "qvm-remote.slice"
#: How long systemd may take to answer, seconds.
_ASK_WAIT = 5.0


def fixed(limits):
    """What of the limits holds for all commands of a supervisor.

    Args:
        limits: sandbox.Limits.

    Returns:
        tuple
    """
    return (limits.memory_max, limits.tasks_max, limits.cpu_weight)


def wrap(command, name, limits, folder):
    """The command line that starts the supervisor.

    Args:
        command: list of str.
        name: str, the supervisor's: letters, digits and ``-`` only.
        limits: sandbox.Limits.
        folder: str, which the supervisor makes: no character in it that a shell or systemd reads in a way of its own.

    Returns:
        list of str
    """
    properties = {
        "TasksMax": limits.tasks_max,
        "MemoryMax": limits.memory_max,
        "CPUWeight": limits.cpu_weight,
        "KillMode": "control-group",
        "TimeoutStopSec": 2,
        "OOMPolicy": "continue",
        # A supervisor that was killed leaves its file system behind, and the engine may unmount nothing.
        "ExecStopPost": f"-/bin/sh -c 'test ! -d {folder} || {{ umount -l {folder}; rmdir {folder}; }}'",
    }
    options = ["--pipe", "--wait", "--collect", "--quiet", "--service-type=exec", f"--slice={_SLICE}", f"--unit={_unit(name)}"]
    return ["systemd-run", *options, *(f"--property={key}={value}" for key, value in properties.items()), "--", *command]


def data_max(limits):
    """Limit of one process's data, bytes; 0: the unit's MemoryMax does it.

    Args:
        limits: sandbox.Limits.

    Returns:
        int
    """
    return 0


def processes_max(limits):
    """Limit of all processes of a user who isn't root, 0 for none: the unit's TasksMax counts those of its command alone.

    Args:
        limits: sandbox.Limits.

    Returns:
        int
    """
    return 0


def kill(name):
    """Kill all that runs in the supervisor's unit.

    Args:
        name: str, the supervisor's.
    """
    try:
        _systemctl("kill", "--signal=KILL", _unit(name))
    except (OSError, subprocess.TimeoutExpired) as err:
        log.warning("%s: could not be killed: %s", _unit(name), err)


def has_ended(name):
    """Say whether nothing runs any more in the supervisor's unit.

    Args:
        name: str, the supervisor's.

    Returns:
        bool; False also when systemd does not say.
    """
    try:
        done = _systemctl("show", "--property=ActiveState", "--value", _unit(name))
    except (OSError, subprocess.TimeoutExpired):
        return False
    # What is not known to systemd any more is inactive.
    return done.returncode == 0 and done.stdout.strip() in (b"inactive", b"failed")


def _systemctl(*words):
    return subprocess.run(["systemctl", *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_WAIT, check=False)


def _unit(name):
    return f"qvm-remote-{name}.service"
