# SPDX-License-Identifier: GPL-2.0-or-later
"""Constants of the simulator's qubesadmin, named as in the real one."""

QUBESD_SOCKET = "/run/qubesd.sock"
#: Seconds.
QUBESD_RECONNECT_DELAY = 1.0
