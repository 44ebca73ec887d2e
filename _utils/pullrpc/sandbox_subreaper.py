# SPDX-License-Identifier: GPL-2.0-or-later
"""Where systemd is not PID 1: the supervisor is our child; subreaper, process groups and rlimits do what cgroups would."""

#: The supervisor is a child of the engine, so that it can see it die.
IS_CHILD = True


def wrap(command, name, timeout, limits):
    """The command line that starts the supervisor.

    Args:
        command: list of str.
        name: str, the job's.
        timeout: int, seconds.
        limits: sandbox.Limits.

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
