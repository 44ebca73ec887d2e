# SPDX-License-Identifier: GPL-2.0-or-later
"""Pieces of a running command's output at the client (qvm_remote_client.stream): whatever lies in the queue, what is shown is a
beginning of what dom0 sent.
"""

import functools
import os
import tempfile

from pullrpc.layout import Queue
from pullrpc.tokens import chunk_mac
from qvm_remote_client.stream import Stream, Tampered

_KEY = bytes(range(32))
_CID = "20260131-235959-4711-0badcafe"
_PIECES = [("out", b"one\n"), ("err", b"warn\n"), ("out", b""), ("out", b"two\nthree\n"), ("err", b"\x00\xff")]
_LINES = [f"{seq} {part} {len(data)} {chunk_mac(_KEY, _CID, seq, part, data)}\n".encode() for seq, (part, data) in enumerate(_PIECES)]
_PARTS = {name: b"".join(data for part, data in _PIECES if part == name) for name in ("out", "err")}
_OTHER = f"1 err 5 {chunk_mac(_KEY, '20260131-235959-4711-0badcaff', 1, 'err', b'warn' + b'!')}\n".encode()
WORDS = (*_LINES, _OTHER, b" out ", b" err ", b"\n", b"\xfe", b"262145")


def seeds():
    """The list of pieces, and behind FE stdout and stderr; a byte in front says how much is there at first."""
    whole = b"\xfe".join((b"".join(_LINES), _PARTS["out"], _PARTS["err"]))
    yield b"\xff" + whole
    yield b"\x40" + whole
    yield b"\x80" + b"\xfe".join((b"".join([_LINES[0], *_LINES]), _PARTS["out"], _PARTS["err"]))
    yield b"\xff" + b"\xfe".join((_LINES[0] + _OTHER, _PARTS["out"], b"warn!"))


def check(data):
    """Show what lies in a queue."""
    if not data:
        return
    listed, out, err = (data[1:].split(b"\xfe", 2) + [b"", b""])[:3]
    first = len(listed) * data[0] // 255
    queue = _queue()
    _write(queue.part(_CID, "out"), out)
    _write(queue.part(_CID, "err"), err)
    _write(queue.stream(_CID), listed[:first])
    shown = []
    stream = Stream(queue, _CID, _KEY)
    try:
        shown += stream.pieces()
        _write(queue.stream(_CID), listed[first:], "ab")
        # As when nobody takes the second piece: it is not lost, and no other is shown in its place.
        for piece in stream.pieces():
            shown.append(piece)
            break
        shown += stream.pieces()
    except Tampered:
        pass
    finally:
        stream.close()
    assert shown == _PIECES[: len(shown)], "something was shown that dom0 did not send, or in another order"
    for part in ("out", "err"):
        count, digest = stream.shown.get(part, (0, None))
        assert count <= len(_PARTS[part]) and (digest is None or digest.digest_size == 32)


@functools.lru_cache(maxsize=1)
def _queue():
    queue = Queue(os.path.join(tempfile.mkdtemp(), ".qvm-remote"))
    queue.make_folders()
    return queue


def _write(path, data, mode="wb"):
    with open(path, mode) as file:
        file.write(data)
