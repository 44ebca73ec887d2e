# SPDX-License-Identifier: GPL-2.0-or-later
"""Where systemd is not PID 1: the supervisor is our child; subreaper, process groups and rlimits do what cgroups would."""

#: Whether the supervisor has a unit of its own, whose limits hold for all that runs in it.
IN_UNIT = False


def fixed(limits):
    """What of the limits holds for all commands of a supervisor.

    Args:
        limits: sandbox.Limits.

    Returns:
        tuple
    """
    return ()


def wrap(command, name, limits, folder):
    """The command line that starts the supervisor.

    Args:
        command: list of str.
        name: str, the supervisor's.
        limits: sandbox.Limits.
        folder: str, which the supervisor makes.

    Returns:
        list of str
    """
    return command


def data_max(limits):
    """Limit of one process's data, bytes; 0 for none.

    Args:
        limits: sandbox.Limits.

    Returns:
        int
    """
    return limits.memory_max


def processes_max(limits):
    """Limit of all processes of a user who isn't root, 0 for none. The kernel counts none of root's.

    Args:
        limits: sandbox.Limits.

    Returns:
        int
    """
    return limits.tasks_max


def kill(name):
    """Kill the supervisor's unit: there is none.

    Args:
        name: str, the supervisor's.
    """


def has_ended(name):
    """Say whether nothing runs any more in the supervisor's unit: there is none.

    Args:
        name: str, the supervisor's.

    Returns:
        bool
    """
    return True
