# SPDX-License-Identifier: GPL-2.0-or-later
"""The plan of a soak: who is killed, halted, attacked or out of disk, and when. The same seed makes the same plan."""

import collections
import random

#: A thing that happens: after how many seconds, its name, the VM, for how many seconds (if it has an end), and a number to choose by.
Step = collections.namedtuple("Step", "pause name vm seconds number")

#: What happens, and how often as compared with the others.
WEIGHTS = {
    "service killed": 4,
    "service stopped and started": 1,
    "agent killed": 3,
    "qvm-run killed": 3,
    "client killed": 4,
    "VM killed": 1,
    "VM halted": 1,
    "VM paused": 1,
    "dom0's disk full": 4,
    "dom0's disk read-only": 2,
    "VM's disk full": 2,
    "hostile agent": 2,
    "forged request": 16,
    "signed request replayed": 12,
    "another VM's request": 4,
}
_PAUSES, _LASTING = (0.05, 1.0), (0.2, 3.0)


def steps(seed, vms):
    """Make a plan.

    Args:
        seed: int.
        vms: list of str.

    Yields:
        Step, without end.
    """
    dice = random.Random(seed)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    while True:
        name = dice.choices(names, weights)[0]
        yield Step(dice.uniform(*_PAUSES), name, dice.choice(vms), dice.uniform(*_LASTING), dice.randrange(1 << 30))
