# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VMs have a tag, as it was a moment ago: a VM that asks for much does not have as many programs started.

What was let in by this is looked at anew before it runs.
"""

from __future__ import annotations

import threading
import time

from .errors import TransportError
from .transport import vms_with_tag

#: How long the list of the VMs that have a tag holds, seconds.
_HOLDS = 1.0


class Tags:
    """The tags that somebody asked for."""

    def __init__(self):
        self._lock = threading.Lock()
        self._tags = {}

    def names(self, tag):
        """The VMs that have a tag.

        Args:
            tag: str.

        Returns:
            set of str

        Raises:
            TransportError: that can't be told.
        """
        with self._lock:
            known = self._tags.setdefault(tag, _Tagged())
        return known.names(tag)


class _Tagged:
    """The VMs that have a tag, or why that can't be told, for a moment."""

    def __init__(self):
        self._lock = threading.Lock()
        self._at = float("-inf")
        self._names = self._problem = None

    def names(self, tag):
        with self._lock:
            if time.monotonic() - self._at > _HOLDS:
                try:
                    self._names, self._problem = vms_with_tag(tag), None
                except TransportError as err:
                    self._problem = str(err)
                # From its end on: while it lasted, whoever asked waited for it.
                self._at = time.monotonic()
            if self._problem:
                raise TransportError(self._problem)
            return self._names
