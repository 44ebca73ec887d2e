# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens, told to the system's log, where there is one. It never waits: what that does not take at once is not sent."""

from __future__ import annotations

import contextlib
import os
import socket
import time

_SOCKET = "/dev/log"
#: Facility authpriv, severity info (syslog(3)).
_PRIORITY = 10 << 3 | 6
_TEXT_MAX = 900


class Syslog:
    """The system's log.

    Args:
        path: str, its socket.
    """

    def __init__(self, path=_SOCKET):
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def send(self, text):
        """Send a line, if the log takes it at once.

        Args:
            text: str, printable ASCII; its beginning is sent when it is long.
        """
        # asctime has the months' English names whatever the locale is, as syslog wants them.
        stamp = time.asctime()[4:19]
        with contextlib.suppress(OSError):
            self._socket.sendto(f"<{_PRIORITY}>{stamp} qvm-remote[{os.getpid()}]: {text[:_TEXT_MAX]}".encode("ascii", "replace"), self._path)
