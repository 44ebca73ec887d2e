# SPDX-License-Identifier: GPL-2.0-or-later
"""Time of ``qvm-remote true`` in a VM of the simulator, beside a bare ``qvm-run true`` from dom0.

Medians of one run on this machine, and their ratio: make bench.
"""

import os
import statistics
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "sim"))

from qubes_sim.stand import Stand  # noqa: E402

_ROUNDS = 50
#: Runs a command many times where it stands and prints the milliseconds of each.
_TIMER = """\
import subprocess, sys, time
for _ in range(int(sys.argv[1])):
    started = time.perf_counter()
    subprocess.run(sys.argv[2:], stdin=subprocess.DEVNULL, check=True)
    print((time.perf_counter() - started) * 1000)
"""


def main():
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="qvm-remote-bench-") as folder, Stand(os.path.join(folder, "sim"), vms=["work"]) as stand:
        stand.set_up()
        timer = ["/usr/bin/python3", "-c", _TIMER, str(_ROUNDS)]
        remote = _median(stand.vm("work", *timer, "qvm-remote", "-n", "true"))
        direct = _median(stand.dom0(*timer, "qvm-run", "--pass-io", "work", "true"))
        stand.stop_engine()
    print(f"{'median of ' + str(_ROUNDS):44}{'ms':>8}{'ratio':>8}")
    for name, value in (
        ("qvm-remote true (VM to dom0 and back)", remote),
        ("qvm-run true (dom0 to VM, simulator)", direct),
    ):
        print(f"{name:44}{value:8.1f}{value / remote:8.2f}")


def _median(done):
    if done.returncode:
        raise SystemExit(done.stderr.decode("utf-8", "replace"))
    return statistics.median(float(line) for line in done.stdout.splitlines())


if __name__ == "__main__":
    main()
