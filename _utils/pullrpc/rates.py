# SPDX-License-Identifier: GPL-2.0-or-later
"""How many commands a VM may have accepted in a minute, and in a day: bounds what it makes dom0's disk, log and user bear."""

from __future__ import annotations

import threading
import time

from .errors import Refused

#: Name of each allowance, and for how long it lasts, seconds.
_PERIODS = (("minute", 60.0), ("day", 86400.0))


class Rates:
    """Two allowances for each VM; each fills up steadily, and holds at most the commands of its period."""

    def __init__(self):
        self._lock = threading.Lock()
        self._left = {}

    def check(self, vm, rate, rate_day):
        """Take one command from a VM's allowances.

        Args:
            vm: str.
            rate: int, commands a minute.
            rate_day: int, commands a day.

        Raises:
            Refused: nothing is left of one of them (code ``rate``).
        """
        with self._lock:
            now = time.monotonic()
            limits = (rate, rate_day)
            lefts, at = self._left.get(vm, (tuple(map(float, limits)), now))
            lefts = [min(float(limit), left + (now - at) * limit / seconds) for left, limit, (_, seconds) in zip(lefts, limits, _PERIODS)]
            over = next((place for place, left in enumerate(lefts) if left < 1), None)
            self._left[vm] = (lefts if over is not None else [left - 1 for left in lefts], now)
        if over is not None:
            (name, seconds), limit = _PERIODS[over], limits[over]
            wait = max(1, round((1 - lefts[over]) * seconds / limit))
            raise Refused("rate", f"dom0 takes at most {limit} commands a {name} from this qube; send it again in {wait} s")
