# SPDX-License-Identifier: GPL-2.0-or-later
"""Where systemd is PID 1 (dom0): the supervisor runs in a transient unit of its own, in ``qvm-remote.slice``.

systemd then bounds memory, processes and CPU of all that the command starts, and ends what the supervisor can't.
"""

import os

#: The supervisor is a child of systemd; it sees the engine's end by the end of its stdin.
IS_CHILD = False
_SLICE = "qvm-remote.slice"
#: systemd's own time limit comes this long after the supervisor's, which keeps partial output, seconds.
_AFTER = 5


def wrap(command, name, timeout, limits):
    """The command line that starts the supervisor.

    Args:
        command: list of str.
        name: str, the job's: letters, digits, ``_``, ``.`` and ``-`` only.
        timeout: int, seconds.
        limits: sandbox.Limits.

    Returns:
        list of str
    """
    properties = {
        "RuntimeMaxSec": int(timeout + limits.kill_grace) + _AFTER,
        "TasksMax": limits.tasks_max,
        "MemoryMax": limits.memory_max,
        "CPUWeight": limits.cpu_weight,
        "KillMode": "control-group",
        "TimeoutStopSec": 2,
        "OOMPolicy": "continue",
    }
    unit = f"qvm-remote-{name}-{os.urandom(4).hex()}"
    options = ["--pipe", "--wait", "--collect", "--quiet", "--service-type=exec", f"--slice={_SLICE}", f"--unit={unit}"]
    return ["systemd-run", *options, *(f"--property={key}={value}" for key, value in properties.items()), "--", *command]


def data_max(limits):
    """Limit of one process's data, bytes; 0: the unit's MemoryMax does it.

    Args:
        limits: sandbox.Limits.

    Returns:
        int
    """
    return 0
