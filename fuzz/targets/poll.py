# SPDX-License-Identifier: GPL-2.0-or-later
"""The answer to a poll (pullrpc.session.read_poll): what is listed is of the documented types, within its bounds, and uses up the payload."""

import json

from pullrpc.errors import FrameError
from pullrpc.frames import _parse_header
from pullrpc.session import CANCELS_MAX, ITEMS_MAX, read_poll

_CID = "20260131-235959-4711-0badcafe"
WORDS = (b'{"items":[', b'],"cancels":[', _CID.encode(), b",-1,", b",1]", b"true", b"1e400", b"\xfe")
#: No file is longer, bytes.
SIZE_MAX = 1 << 63


def seeds():
    """A byte for how many commands were asked for, the header, and behind an FE the payload."""
    for items, cancels, payload in (
        ([], [], b""),
        ([[_CID, 4, 3, -1, 1], [_CID, 1 << 20, 151, 5, 0]], [_CID], b"truetok"),
        ([[_CID, 0, 0, -1, 1], [_CID, -1, -1, -1, 0]], [], b""),
    ):
        header = json.dumps({"n": 1, "items": items, "cancels": cancels}, separators=(",", ":")).encode()
        yield b"\x18" + header + b"\xfe" + payload


def check(data):
    """Take an answer apart."""
    header, _, payload = data[1:].partition(b"\xfe")
    room = data[0] if data else 0
    try:
        items, cancels = read_poll(_parse_header(header), payload, room)
    except FrameError:
        return
    check_list(items, cancels, room)
    assert b"".join(item.command + item.token for item in items if item.command is not None) == payload, "bytes of the payload are left over or used twice"


def check_list(items, cancels, room):
    """What holds for the items that a VM lists, whatever it sent."""
    assert len(items) <= min(room, ITEMS_MAX) and len(cancels) <= CANCELS_MAX
    assert all(type(cid) is str for cid in cancels)
    for item in items:
        assert type(item.untrusted_cid) is str
        sizes = (item.command_size, item.token_size, item.stdin_size)
        assert all(type(size) is int and -1 <= size < SIZE_MAX for size in sizes), "a size that no file has"
        assert (item.command is None) == (item.token is None)
        if item.command is not None:
            assert (len(item.command), len(item.token)) == sizes[:2]
