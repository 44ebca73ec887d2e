# SPDX-License-Identifier: GPL-2.0-or-later
"""How many commands a VM may have accepted in a minute: bounds what it makes dom0's disk, log and user bear."""

from __future__ import annotations

import threading
import time

from .errors import Refused

_MINUTE = 60.0


class Rates:
    """One allowance for each VM, which fills up steadily and holds a minute's commands at most."""

    def __init__(self):
        self._lock = threading.Lock()
        self._left = {}

    def check(self, vm, rate):
        """Take one command from a VM's allowance.

        Args:
            vm: str.
            rate: int, commands a minute.

        Raises:
            Refused: nothing is left of it (code ``rate``).
        """
        with self._lock:
            now = time.monotonic()
            left, at = self._left.get(vm, (float(rate), now))
            left = min(float(rate), left + (now - at) * rate / _MINUTE)
            is_over = left < 1
            self._left[vm] = (left if is_over else left - 1, now)
        if is_over:
            wait = (1 - left) * _MINUTE / rate
            raise Refused("rate", f"dom0 takes at most {rate} commands a minute from this qube; send it again in {max(1, round(wait))} s")
