# SPDX-License-Identifier: GPL-2.0-or-later
"""Tells whoever in dom0 listens what becomes of the domains, in the bytes in which qubesd does (admin.Events)."""

import contextlib
import socket
import threading


class Events:
    """All that listen, each over a stream of their own. A listener that does not read is dropped: nothing waits for it."""

    def __init__(self):
        #: Held while a domain changes and its event is sent, so that events come in the order of the changes.
        self.lock = threading.RLock()
        self._listeners = []

    def subscribe(self, fd, name):
        """Send events from now on.

        Args:
            fd: descriptor of a stream socket, owned from now on.
            name: str, of the one domain that is meant; None for all, and for what concerns no domain.
        """
        stream = socket.socket(fileno=fd)
        stream.setblocking(False)
        with self.lock:
            self._listeners.append((stream, name))
            self._send(stream, "", "connection-established", {})

    def emit(self, subject, event, **details):
        """Tell that something has happened.

        Args:
            subject: str, a domain's name; empty for what concerns the machine.
            event: str.
            details: str to str.
        """
        with self.lock:
            for stream, name in list(self._listeners):
                if name in (None, subject):
                    self._send(stream, subject, event, details)

    def drop_all(self):
        """End all streams, as a restart of qubesd does."""
        with self.lock:
            while self._listeners:
                self._listeners.pop()[0].close()

    def _send(self, stream, subject, event, details):
        words = ["1", subject, event, *(word for pair in details.items() for word in pair), ""]
        data = b"".join(word.encode("utf-8") + b"\0" for word in words)
        with contextlib.suppress(OSError):
            if stream.send(data) == len(data):
                return
        stream.close()
        self._listeners = [one for one in self._listeners if one[0] is not stream]
