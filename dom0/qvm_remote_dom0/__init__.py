# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's command ``qvm-remote-dom0``. What only looks works on pullrpc directly, and is there at once; what changes something
is done by the execution module, through Salt.
"""
