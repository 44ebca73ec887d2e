# SPDX-License-Identifier: GPL-2.0-or-later
"""What qvm-remote leaves in dom0, and how that is removed: by its names, so that a setting which points at a folder of
somebody else's costs nobody their files.
"""

from __future__ import annotations

import fnmatch
import os

from . import supervisor
from .config import Config
from .errors import PullError
from .ids import check_vm_name

#: Names of ours in each folder that the settings name; temporary ones of a process that was killed among them.
_OURS = {
    "key_dir": ("*.key", "*.key.new", "*.key.old", "*.key.uuid", ".*.key*.*"),
    "state_dir": ("ledger.sqlite*", "spool", "handover", "pki"),
    "run_dir": ("engine.lock", "stopped", "sessions.json", ".sessions.json.*", "jobs", "minion"),
}


def leftovers(config):
    """List the folders that hold something of ours.

    Args:
        config: Config. Where the service's minion keeps its own things, the default folders, is looked at in any case.

    Returns:
        list of str, sorted; folders of ours that are empty among them.

    Raises:
        OSError: a folder can't be read.
    """
    return sorted({folder for folder, _ in _ours(config)})


def remove(config):
    """Remove what is ours, and each folder in which nothing else is left.

    Args:
        config: Config, as for :func:`leftovers`.

    Returns:
        list of str, the folders that stay because they hold other files.

    Raises:
        PullError: something can't be removed; OSError: the same, of a file.
    """
    found = list(_ours(config))
    for _, paths in found:
        for path in paths:
            if os.path.isdir(path) and not os.path.islink(path):
                remove_folder(path, unmount=True)
            else:
                os.unlink(path)
    kept = []
    for folder in sorted({folder for folder, _ in found}):
        if os.listdir(folder):
            kept.append(folder)
        else:
            os.rmdir(folder)
    return kept


def remove_folder(path, unmount=False):
    """Remove a folder, and nothing that is behind a mount on it or in it. What can't be removed stays in it, to be found by the next try.

    Args:
        path: str.
        unmount: bool, whether what is mounted on the folders in it is unmounted, as an engine that was killed leaves it.

    Raises:
        PullError: something can't be removed; OSError: the same, of a file.
    """
    problems = []
    for name in os.listdir(path):
        within = os.path.join(path, name)
        if os.path.isdir(within) and not os.path.islink(within):
            problems += supervisor.remove_place(within, unmount)
        else:
            os.unlink(within)
    if problems:
        raise PullError(f"{path} can't be removed: {problems[0]}")
    os.rmdir(path)


def _ours(config):
    for setting, patterns in _OURS.items():
        for folder in {getattr(config, setting), getattr(Config, setting)}:
            try:
                names = sorted(os.listdir(folder))
            except FileNotFoundError:
                continue
            paths = [os.path.join(folder, name) for name in names if _is_ours(name, patterns) and (setting != "key_dir" or _is_vms(name))]
            if paths or not names:
                yield folder, paths


def _is_ours(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_vms(name):
    """Whether a key file's name begins with that of a VM."""
    try:
        return bool(check_vm_name(name.lstrip(".").partition(".key")[0]))
    except PullError:
        return False
