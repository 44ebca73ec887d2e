# SPDX-License-Identifier: GPL-2.0-or-later
"""The plan of a soak: who is killed, halted, attacked or out of disk, and when. The same seed makes the same plan."""

import collections
import random

#: A thing that happens: after how many seconds, its name, the VM, for how many seconds (if it has an end), and a number to choose by.
Step = collections.namedtuple("Step", "pause name vm seconds number")

#: What happens, and how often as compared with the others.
DISTURBANCES = {
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
}
#: What attackers do between two of them.
ATTACKS = {"forged request": 4, "signed request replayed": 3, "another VM's request": 1}
_PAUSES, _ATTACK_PAUSES, _LASTING = (0.05, 0.8), (0.02, 0.25), (0.2, 3.0)


def steps(seed, vms):
    """Make a plan: in the beginning each disturbance once, in some order, then by their weights.

    Args:
        seed: int.
        vms: list of str.

    Yields:
        Step, without end.
    """
    dice = random.Random(seed)
    first = dice.sample(list(DISTURBANCES), len(DISTURBANCES))
    while True:
        for known, pauses in ((ATTACKS, _ATTACK_PAUSES), (DISTURBANCES, _PAUSES)):
            is_first = known is DISTURBANCES and first
            name = first.pop() if is_first else dice.choices(list(known), list(known.values()))[0]
            yield Step(dice.uniform(*pauses), name, dice.choice(vms), dice.uniform(*_LASTING), dice.randrange(1 << 30))
