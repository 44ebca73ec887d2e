# SPDX-License-Identifier: GPL-2.0-or-later
"""The pull protocol of qvm-remote: what dom0 and a VM say to each other, and what dom0 believes.

Standard library only and no Salt, so that each part can be read, tested and fuzzed by itself.
The VM's client is deployed with the part of it that both sides need: errors, ids, tokens, frames, layout.
"""

__version__ = "2.0.0"

#: Name of the wire protocol; part of every MAC, so that a token of another version never fits.
PROTOCOL = "qvm-remote/2"
