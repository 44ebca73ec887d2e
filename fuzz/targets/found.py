# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM without an agent says of its key and queue (pullrpc.agentless): known words and a fingerprint, or nothing is believed."""

import re

from pullrpc.agentless import _read_found
from pullrpc.errors import FrameError
from pullrpc.layout import PROBLEMS

WORDS = (*(b"P " + word.encode() + b"\n" for word in PROBLEMS), b"K ", b"\n\nEND\n", b"0123456789abcdef" * 4)
_FINGERPRINT = re.compile(r"[0-9a-f]{4}(:[0-9a-f]{4}){3}")


def seeds():
    """What the script prints."""
    yield b"\nEND\n"
    yield b"P folder-mode\nP key-missing\n\nEND\n"
    yield b"K " + bytes(range(32)).hex().encode() + b"\n\nEND\n"
    yield b"P key-mode\nK short\n\nEND\n"


def check(data):
    """Read an answer."""
    try:
        found = _read_found(data)
    except FrameError:
        return
    check_found(found)
    listed = data[:-5].partition(b"K ")[0]
    said = b"".join(b"P " + word.encode() + b"\n" for word in found.problems if word != "key-malformed")
    assert set(said.split(b"\n")) - {b""} <= set(listed.split(b"\n")), "a problem that the VM did not name"
    assert all(line[2:].decode() in found.problems for line in listed.splitlines()), "a problem was dropped"
    assert all(line.startswith(b"P ") for line in listed.splitlines()), "a line that the script never prints was believed"


def check_found(found):
    """What holds for what a VM says of itself, whatever it sent."""
    assert found.fingerprint is None or _FINGERPRINT.fullmatch(found.fingerprint)
    assert type(found.problems) is tuple and list(found.problems) == sorted(set(found.problems)) and set(found.problems) <= set(PROBLEMS)
