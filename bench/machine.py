# SPDX-License-Identifier: GPL-2.0-or-later
"""On what it was measured."""

import os
import platform
import subprocess

import salt.version

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def describe():
    """Say what machine and what versions these are.

    Returns:
        dict
    """
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory("MemTotal"),
        "kernel": platform.release(),
        "python_of_salt": platform.python_version(),
        "python_of_client": _first_line("/usr/bin/python3", "--version"),
        "salt": salt.version.__version__,
        "commit": _first_line("git", "-C", _ROOT, "describe", "--always", "--dirty"),
        "load_at_start": os.getloadavg()[0],
    }


def memory(name):
    """One of the numbers that the kernel tells of memory.

    Args:
        name: str, as in /proc/meminfo.

    Returns:
        int, bytes.
    """
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def _first_line(*argv):
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    except OSError:
        return ""
