# SPDX-License-Identifier: GPL-2.0-or-later
"""An MCP server that reaches dom0 through qvm-remote, and by nothing else.

It decides nothing. Whoever controls the qube it runs in can go round it and call qvm-remote: what that qube may do is what
dom0's policy for it says. The checks in here only give an agent a better message, sooner.
"""
