# SPDX-License-Identifier: GPL-2.0-or-later
"""All that is measured of qvm-remote, in one run, side by side: make bench. With BENCH="--short" in less than a minute."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "sim"))

import goals  # noqa: E402
import machine  # noqa: E402
import measure  # noqa: E402
import modes  # noqa: E402
import report  # noqa: E402
from place import Place  # noqa: E402
from scenarios import clients, fleet, round_trip, stages, start, throughput  # noqa: E402
from size import FULL, SHORT  # noqa: E402

#: In this order: each leaves at least as many VMs running as it found.
_STEPS = (
    ("start", start.run),
    ("round-trip", round_trip.run),
    ("clients", clients.run),
    ("stages", stages.run),
    ("fleet", fleet.run_one),
    ("throughput", throughput.run),
    ("fleet", fleet.run_many),
)
_NAMES = list(dict(_STEPS))


def main(argv):
    """Measure, print, and write the results.

    Returns:
        int, the exit code.
    """
    parser = argparse.ArgumentParser(prog="make bench BENCH=...", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few rounds of everything")
    parser.add_argument("--only", action="append", choices=_NAMES, help="one scenario; may be given again")
    parser.add_argument("--json", metavar="FILE", help="where to write the results, instead of a new file under bench/results/")
    options = parser.parse_args(argv)
    # A kill must not leave a simulator behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    result = _measure(SHORT if options.short else FULL, options.only or _NAMES)
    report.show(result)
    print(f"\n{report.store(result, options.json)}")
    return 0


def _measure(size, names):
    begun = time.monotonic()

    def say(text):
        print(f"[{time.monotonic() - begun:5.0f} s] {text}", file=sys.stderr, flush=True)

    described = machine.describe()
    folder = tempfile.mkdtemp(prefix="qvm-remote-bench-")
    place = Place(folder, size, say)
    rows = []
    if size is SHORT:
        place.notes.append("the short form shows that all is measured; its figures are of too few rounds to judge by")
    try:
        place.set_up()
        for name, step in _STEPS:
            if name in names:
                say(f"measuring: {name}")
                rows += step(place)
    finally:
        place.close()
        shutil.rmtree(folder, ignore_errors=True)
    rows = measure.with_ratios(rows, modes.FLOORS)
    return {"machine": {**described, "seconds": round(time.monotonic() - begun)}, "rows": rows, "goals": goals.judge(rows, size), "notes": place.notes}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
