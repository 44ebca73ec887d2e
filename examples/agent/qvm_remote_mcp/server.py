# SPDX-License-Identifier: GPL-2.0-or-later
"""The server's command line: what it offers, and to which qubes it looks."""

from __future__ import annotations

import argparse

from mcp.server import MCPServer

from . import manage, observe
from .remote import Dom0

_INSTRUCTIONS = """\
Operations of Qubes OS's dom0, for the qubes that dom0's rules give you. The tools titled observe only look; those titled manage
change something. A refusal is a decision of the user's: report it, and do not look for a way round it. Read before you change.
For whatever destroys something use plan: dom0's user sees all of it and answers once.
"""


def main(argv):
    """Serve until stdin ends.

    Args:
        argv: list of str, without the program's name.

    Returns:
        int, the exit code.
    """
    parser = argparse.ArgumentParser(prog="qvm-remote-mcp", description="Offer dom0's operations to an AI agent, over MCP on stdin and stdout.")
    parser.add_argument("--tag", default="", help="list the qubes with this tag; it has to be the one in dom0's rules (default: list all qubes)")
    parser.add_argument("--observe-only", action="store_true", help="offer only the tools that look")
    parser.add_argument("--timeout", type=int, default=120, metavar="SEC", help="how long a command may run in dom0 (default: %(default)s)")
    options = parser.parse_args(argv)
    server = MCPServer("qvm-remote", instructions=_INSTRUCTIONS, log_level="WARNING")
    dom0 = Dom0(options.timeout)
    observe.offer(server, dom0, options.tag)
    if not options.observe_only:
        manage.offer(server, dom0)
    server.run()
    return 0
