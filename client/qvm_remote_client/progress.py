# SPDX-License-Identifier: GPL-2.0-or-later
"""Shows that a long wait is alive: a line on a terminal's stderr, rewritten in place, and taken away before anything else is shown there."""

import os
import time

from pullrpc.files import write_fully

#: Nothing is shown for what takes no longer than this, seconds.
_SHOW_AFTER = 1.0
_SPINNER = "|/-\\"
_TEXTS = {
    "queued": "waiting for dom0 to take the request",
    "running": "running in dom0",
    "unconnected": "waiting for dom0 to connect",
    "stdin": "reading stdin (use -n to send none)",
}


class Progress:
    """The line.

    Args:
        started: float, monotonic seconds.
    """

    def __init__(self, started):
        self._started = started
        self._turn = 0
        self._shown = False

    def tick(self, what):
        """Show how long it has taken, once that is worth it.

        Args:
            what: str, a key of the texts.
        """
        waited = time.monotonic() - self._started
        if waited <= _SHOW_AFTER or not _is_ours():
            return
        self._turn += 1
        text = f"{_SPINNER[self._turn % len(_SPINNER)]} qvm-remote: {_TEXTS[what]}, {waited:.0f} s"
        # A line that wraps could not be taken away again. A terminal that does not know its size says 0.
        width = _width() or 80
        _write(f"\r\033[K{text[: width - 1]}".encode("ascii"))
        self._shown = True

    def clear(self):
        """Take the line away."""
        # In the background, since it was shown, it is another's line that would go.
        if self._shown and _is_ours():
            _write(b"\r\033[K")
        self._shown = False


def is_wanted():
    """Whether stderr is a terminal that can take a line away again.

    Returns:
        bool
    """
    return os.isatty(2) and os.environ.get("TERM") != "dumb"


def _write(data):
    try:
        write_fully(2, data)
    except OSError:
        # The terminal is gone; that is no reason to give the command up.
        pass


def _width():
    try:
        return os.get_terminal_size(2).columns
    except OSError:
        return 0


def _is_ours():
    """Whether we are in the foreground: in the background the terminal is another's."""
    try:
        return os.tcgetpgrp(2) == os.getpgrp()
    except OSError:
        # It is not our controlling terminal; nobody else's job is there.
        return True
