# SPDX-License-Identifier: GPL-2.0-or-later
"""From the start of the service to the first result, for a client that waits already."""

import concurrent.futures
import time

import measure
from place import WORK

NAME = "engine start to first result"
#: Until the client waits, seconds.
_CLIENT_STARTS = 0.5


def run(place):
    """Measure it; the service does not run before the first time, and does after the last.

    Returns:
        list of dict, rows.
    """
    samples = [_start(place)]
    for _ in range(place.size.starts - 1):
        place.stop_service()
        samples.append(_start(place))
    return [measure.timed(NAME, "systemctl start to the end of qvm-remote true", samples)]


def _start(place):
    probe = place.probe(WORK)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(probe.ask, "trace", argv=["qvm-remote", "-n", "true"])
        time.sleep(_CLIENT_STARTS)
        begun = time.time()
        place.start_service()
        return (waiting.result()["ended"] - begun) * 1000
