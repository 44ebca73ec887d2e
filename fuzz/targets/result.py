# SPDX-License-Identifier: GPL-2.0-or-later
"""A result at the client (qvm_remote_client.request, pullrpc.tokens.read_meta): only what dom0 made is believed, and an unproven
refusal is fit for a terminal.
"""

import functools
import hashlib
import os
import tempfile

from pullrpc.layout import Queue
from pullrpc.tokens import make_meta
from qvm_remote_client.main import reason_of
from qvm_remote_client.request import NoResult, Request

_KEY = bytes(range(32))
_CID = "20260131-235959-4711-0badcafe"


def _make(exit_code, out, err, **more):
    digests = [hashlib.sha256(part).digest() for part in (out, err)]
    return b"%d\n" % exit_code, make_meta(_KEY, _CID, *digests, {"id": _CID, "exit": exit_code, "status": "done", **more}), out, err


_GENUINE = (_make(0, b"", b""), _make(7, b"out", b"err", seconds="0.5"))
_REFUSED = (b"125\n", b"mac -\nexit 125\n", b"", "qvm-remote: refused: \x1b[2Jno \u202e\x9b".encode())
WORDS = (b"mac ", b"exit ", b"status ", b"id " + _CID.encode(), b"\n", b"\xfe", b"\x1b[", _GENUINE[0][1])


def seeds():
    """Exit code, meta, stdout and stderr, an FE between them."""
    yield from (b"\xfe".join(parts) for parts in (*_GENUINE, _REFUSED))


def check(data):
    """Read a result."""
    exit_code, meta, out, err = (data.split(b"\xfe", 3) + [b""] * 3)[:4]
    request = _request()
    path = request._queue.results(_CID)
    for part, content in (("exit", exit_code), ("meta", meta), ("out", out), ("err", err)):
        with open(f"{path}.{part}", "wb") as file:
            file.write(content)
    try:
        result = request.read_result()
    except NoResult:
        return
    is_genuine = any((result.exit_code, *parts[1:]) == (int(parts[0]), meta, out, err) for parts in _GENUINE)
    assert bool(result.authentic) is is_genuine, "a result is believed that dom0 did not make, or not believed though it did"
    assert all(type(text) is str for pair in result.fields.items() for text in pair)
    assert result.shown == {"out": 0, "err": 0}
    text = reason_of(result)
    assert len(text) <= 4000 and text.isascii() and (text.isprintable() or not text)


@functools.lru_cache(maxsize=1)
def _request():
    queue = Queue(os.path.join(tempfile.mkdtemp(), ".qvm-remote"))
    queue.make_folders()
    with open(os.open(queue.key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(_KEY.hex().encode())
    request = Request(queue, "shell", b"true", 5)
    request.cid = _CID
    return request
