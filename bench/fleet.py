# SPDX-License-Identifier: GPL-2.0-or-later
"""What one apply costs for each VM: the time of ``state.apply qvm-remote.vm`` with no, 10 and 50 VMs: make bench-fleet.

The first apply makes the keys, the second finds everything as it should be. VMs that run are asked in a session each;
those that are shut down cost no program start.
"""

import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "sim"))

from qubes_sim.stand import Stand  # noqa: E402

_HALTED, _RUNNING = 50, 10


def main():
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="qvm-remote-bench-") as folder, Stand(os.path.join(folder, "sim")) as stand:
        stand.prepare(["debian-13"])
        stand.set_pillar({"client": {"templates": ["debian-13"]}})
        stand.salt("saltutil.sync_all")
        stand.salt("state.apply", "qvm-remote.client")
        empty = min(_apply(stand, []) for _ in range(3))
        halted = [f"halted-{number}" for number in range(_HALTED)]
        running = [f"running-{number}" for number in range(_RUNNING)]
        for vm in (*halted, *running):
            stand.create(f"{vm}:debian-13")
        for vm in running:
            stand.start(vm)
        print(f"state.apply without a VM: {empty:.2f} s")
        print(f"{'':24}{'first apply':>16}{'second apply':>16}   (ms for each VM)")
        for name, vms in ((f"{_HALTED} VMs shut down", halted), (f"{_RUNNING} VMs running", running)):
            costs = [(_apply(stand, vms) - empty) * 1000 / len(vms) for _ in range(2)]
            print(f"{name:24}{costs[0]:16.0f}{costs[1]:16.0f}")


def _apply(stand, vms):
    stand.set_pillar({"vms": {vm: {} for vm in vms}})
    started = time.monotonic()
    stand.salt("state.apply", "qvm-remote.vm", timeout=300)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
