# SPDX-License-Identifier: GPL-2.0-or-later
"""Plain data as text for a person. Whatever a qube may have had a hand in was made fit to be shown before it comes here."""

import json
import sys
import time

from pullrpc.errors import PullError

_AGES = ((86400, "d"), (3600, "h"), (60, "m"))
#: Room between columns.
_GAP = "  "


def put(text="", now=False):
    """Print.

    Args:
        text: str.
        now: bool, let nothing of it wait.

    Raises:
        PullError: it can't be written; BrokenPipeError: nobody reads it any more.
    """
    try:
        sys.stdout.write(text)
        if now:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        raise PullError(f"the output can't be written: {err.strerror}") from None


def as_json(data):
    """Print data for programs.

    Args:
        data: JSON data.
    """
    put(json.dumps(data, indent=2, sort_keys=True) + "\n")


def as_json_line(data):
    """Print data for programs that read it line by line.

    Args:
        data: JSON data.
    """
    put(json.dumps(data) + "\n")


def table(titles, rows, width=None):
    """Lay rows out in columns; the last one takes what room is left.

    Args:
        titles: list of str.
        rows: list of lists of str, as long.
        width: int, columns of the terminal; None for no bound.

    Returns:
        list of str, lines.
    """
    widths = [max(len(row[at]) for row in (titles, *rows)) for at in range(len(titles) - 1)]
    lines = [_GAP.join([*(cell.ljust(size) for cell, size in zip(row, widths)), row[-1]]).rstrip() for row in (titles, *rows)]
    return [cut(line, width) for line in lines]


def cut(text, width):
    """Cut a text.

    Args:
        text: str.
        width: int, most characters; None for no bound.

    Returns:
        str
    """
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def age(seconds):
    """Say how long ago something was.

    Args:
        seconds: float.

    Returns:
        str, like ``3h``.
    """
    for size, unit in _AGES:
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def duration(seconds):
    """Say how long something took.

    Args:
        seconds: float; None when it is not known.

    Returns:
        str, like ``32 ms`` or ``4.2 s``.
    """
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def event(line):
    """A line of the audit log.

    Args:
        line: dict, fit to be shown.

    Returns:
        str
    """
    rest = [f"{name}={_word(value)}" for name, value in line.items() if name not in ("seq", "prev", "log", "time", "what", "vm", "id", "sha256")]
    return " ".join([str(line.get(name, "-")) for name in ("time", "vm", "what", "id")] + rest)


def _word(value):
    if not isinstance(value, str):
        return json.dumps(value)
    return value if value and " " not in value else f'"{value}"'


def now():
    """The time, as the audit log writes it, to the second.

    Returns:
        str
    """
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
