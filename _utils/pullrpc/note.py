# SPDX-License-Identifier: GPL-2.0-or-later
"""The note that a running service leaves for whoever asks for the status: how each VM is served, since when, and under which settings."""

from __future__ import annotations

import json
import os

from .errors import PullError
from .files import forget, read_bounded, write_whole

_NOTE_MAX = 1 << 20


def write(config, note):
    """Leave it.

    Args:
        config: Config.
        note: dict, JSON data.

    Raises:
        OSError: it can't be written.
    """
    write_whole(_path(config), json.dumps(note).encode("ascii"))


def read(config):
    """Read what was left last.

    Args:
        config: Config.

    Returns:
        dict; empty when there is none: a service that has just started has found no VM yet.
    """
    try:
        note = json.loads(read_bounded(_path(config), _NOTE_MAX))
    except (OSError, ValueError, PullError):
        return {}
    return note if isinstance(note, dict) else {}


def remove(config):
    """Take it back.

    Args:
        config: Config.
    """
    forget(_path(config))


def _path(config):
    return os.path.join(config.run_dir, "sessions.json")
