# SPDX-License-Identifier: GPL-2.0-or-later
"""The listing of a VM without an agent (pullrpc.agentless): every line of it is accounted for, or all of it is refused."""

import base64

from pullrpc.agentless import _read_listing
from pullrpc.errors import FrameError

from .poll import check_list

_CID = b"20260131-235959-4711-0badcafe"
WORDS = (b"I " + _CID + b" ", b"C " + _CID + b"\n", b"\nEND\n", b"A\nEND\n", b"\nD ", b" -1", b"dHJ1ZQ==", b"\xfe")


def seeds():
    """A byte for how many commands were asked for, and the listing."""
    yield b"\x18END\n"
    yield b"\x18A\nEND\n"
    data = b" ".join(base64.b64encode(one) for one in (b"true", b"token"))
    yield b"\x18I " + _CID + b" 4 5 -1\nD " + data + b"\nC " + _CID + b"\nI " + _CID + b" 1000000 151 7\nA\nEND\n"


def check(data):
    """Read a listing."""
    room = data[0] if data else 0
    try:
        items, cancels, has_agent = _read_listing(data[1:], room)
    except FrameError:
        return
    check_list(items, cancels, room)
    assert type(has_agent) is bool
    # Data of another size than was listed is left out, and fetched.
    of_data = sum(line.startswith(b"D ") for line in data[1:].split(b"\n"))
    assert of_data >= sum(item.command is not None for item in items)
    assert data[1:].count(b"\n") == len(items) + of_data + len(cancels) + has_agent + 1, "a line was skipped"
