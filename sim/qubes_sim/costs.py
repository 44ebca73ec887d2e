# SPDX-License-Identifier: GPL-2.0-or-later
"""What the real tools in dom0 cost, for measurements: off, unless a benchmark asks for it.

Measured on 2 cores with the real qubes-core-admin-client and the real qrexec: a ``qvm-*`` tool takes 0.28 s of processor time and 26 MB
for its imports alone, before it talks to qubesd; qrexec-client starts ``true`` in a VM within 9 ms, the simulator's way within 5.
"""

#: Processor time (seconds) and memory (bytes) of each qvm-* tool; how much longer qrexec takes to start something in a VM (seconds).
REAL = {"cpu": 0.28, "memory": 26 << 20, "qrexec": 0.004}
#: Where dom0's tools look for them.
PATH = "/usr/lib/qubes/simulated/costs"
