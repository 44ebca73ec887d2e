#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that may go wrong, mixed, for as long as is wanted, and one table of what came of it: make soak. See docs/reliability.rst."""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(_ROOT, *folder) for folder in (("_utils",), ("client",), ("sim",), ("tests", "faults"), ("tests", "security"))]

import table  # noqa: E402
from fault_stand import FaultStand  # noqa: E402
from judge import ZEROES, judge  # noqa: E402
from soaking import HONEST_VMS, HOSTILE_VM, Soaking  # noqa: E402


def main(argv):
    """Run the command line.

    Args:
        argv: list of str.

    Returns:
        int, 1 if anything is not zero that must be.
    """
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--seed", type=int, help="make the same plan again")
    options = parser.parse_args(argv)
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    print(f"make soak SECONDS={options.seconds} SEED={seed}", flush=True)
    # A kill must not leave a simulator behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    folder = tempfile.mkdtemp(prefix="qvm-remote-soak-")
    try:
        with FaultStand(folder, (*HONEST_VMS, HOSTILE_VM), parallel=4) as stand:
            soaking = Soaking(stand, folder, seed)
            evidence = soaking.run(options.seconds, table.progress())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows, problems = judge(evidence)
    table.show({"VMs with clients, and an attacker's": f"{len(HONEST_VMS)} + 1", **soaking.done(), **rows})
    table.tell(problems)
    return 1 if any(rows[name] for name in ZEROES) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
