# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of an audit log: the one that is written, those that were rotated away, and what lies beside them."""

from __future__ import annotations

import os
import re

from .chain import head_path

#: What logrotate puts behind a name: a number or a date, and .gz.
_ROTATED = re.compile(r"[.-][0-9]{1,14}(\.gz)?\Z")
#: The word for a whole command that is removed, by its age or because there are too many.
LET_GO = "command-let-go"
_LOGROTATE = """\
# Written by Salt (qvm-remote.dom0). By renaming alone: the next line goes to a new file, which qvm-remote makes itself.
{path} {{
    weekly
    maxsize 256M
    rotate {files}
    missingok
    notifempty
    nodateext
    noolddir
    nocopy
    nocopytruncate
    nocreate
    compress
    delaycompress
}}
"""


def commands_folder(path):
    """Where whole commands are kept.

    Args:
        path: str, the audit log.

    Returns:
        str
    """
    return f"{path}.commands"


def rotated(path):
    """List the files that were rotated away.

    Args:
        path: str, the audit log.

    Returns:
        list of str, the one that was rotated away last first.

    Raises:
        OSError: the folder can't be read.
    """
    folder, name = os.path.split(path)
    found = {}
    for other in os.listdir(folder):
        if other.startswith(name) and _ROTATED.match(other[len(name) :]):
            full = os.path.join(folder, other)
            try:
                found[full] = os.lstat(full).st_mtime_ns
            except FileNotFoundError:
                continue
    # While logrotate compresses a file, what it has made of it so far lies beside it.
    return sorted((one for one in found if one.removesuffix(".gz") == one or one[:-3] not in found), key=found.get, reverse=True)


def last_rotated(path):
    """Find the file that was rotated away last.

    Args:
        path: str, the audit log.

    Returns:
        str; None when there is none, or it is compressed already.

    Raises:
        OSError: the folder can't be read.
    """
    found = rotated(path)
    return found[0] if found and not found[0].endswith(".gz") else None


def belongings(path):
    """List all that there is of an audit log.

    Args:
        path: str, the audit log.

    Returns:
        list of str: files, and the folder of whole commands.

    Raises:
        OSError: the folder can't be read.
    """
    if not os.path.isdir(os.path.dirname(path)):
        return []
    return [one for one in (path, *rotated(path), head_path(path), commands_folder(path)) if os.path.lexists(one)]


def logrotate_config(path, files):
    """Make the configuration by which logrotate rotates an audit log.

    Args:
        path: str, the audit log.
        files: int, how many old files stay.

    Returns:
        str
    """
    return _LOGROTATE.format(path=path, files=files)
