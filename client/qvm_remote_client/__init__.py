# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs in a VM: the ``qvm-remote`` command, and the agent that answers dom0's session. Standard library only."""
