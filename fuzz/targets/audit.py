# SPDX-License-Identifier: GPL-2.0-or-later
"""The audit log (pullrpc.audit_read, chain): whatever stands in it, it can be read, what is told of it is fit for a terminal, and the
next line covers nothing up.
"""

import functools
import json
import os
import tempfile

from pullrpc import audit_read
from pullrpc.audit import AuditLog, describe_command
from pullrpc.chain import head_path, unpack_head
from pullrpc.errors import AuditError

_CID = "20260131-235959-4711-0badcafe"
_FILES = 12
#: One input takes as long as so many of the others.
COST = 10
WORDS = (b'{"seq":1,"prev":"', b"0" * 64, b'"log":{"file":1,"keep":12}', b'"vm":"work"', b'"id":[]', b'"whole":false', b'"what":"ended"')
WORDS += (b'"ahead":', b'"lost":', b'"torn":', b'"headless":true', b"\xfe", b"\n", b"9" * 40, b"\\u001b[2J", b"[[[[[[[[", b"]]]]]]]]")


@functools.lru_cache(maxsize=1)
def seeds():
    """The head, the file that was rotated away last, and the one that is written, an FE between them."""
    return tuple(_some_logs())


def _some_logs():
    path = _path()
    log = AuditLog(path)
    log.write("accepted", "work", _CID, by="full", **describe_command("echo \x1b[2J\u202e"))
    log.write("ended", "work", _CID, exit=0, status="done", seconds=0.5, out=3, err=0)
    yield _packed(path)
    os.rename(path, f"{path}.1")
    log.write("refused", "work", "-", code="token")
    log.write("accepted", "dev", _CID, **describe_command("x" * 1025))
    yield _packed(path)
    with open(path, "ab") as file:
        file.write(b'{"seq":5,"pre')
    yield _packed(path)
    log.write("run", "dev", _CID)
    yield _packed(path)
    head, older, current = _packed(path).split(b"\xfe")
    yield b"\xfe".join((b"", older, current))


def _packed(path):
    return b"\xfe".join(_read(one) for one in (head_path(path), f"{path}.1", path))


def check(data):
    """Read a log, write a line to it, read it again."""
    path = _path()
    head, older, current = (data.split(b"\xfe", 2) + [b"", b""])[:3]
    for one, content in ((head_path(path), head), (f"{path}.1", older), (path, current)):
        with open(one, "wb") as file:
            file.write(content)
    before = _look(path)
    try:
        AuditLog(path).write("refused", "work", "-", code="size")
    except AuditError:
        return
    after = _look(path)
    if unpack_head(head) or before["lines"]:
        # Whoever removed all of it, the head too, can begin anew: see chain.py.
        assert bool(after["problems"]) >= bool(before["problems"]), "what was wrong before is not found any more"
    lines = audit_read.query(path, what="refused", vm="work", limit=10000)
    assert any(line.get("code") == "size" for line in lines), "the line that was written is not found"


def _look(path):
    verified = audit_read.verify(path, _FILES)
    rows = audit_read.history(path, limit=50)
    lines = audit_read.query(path, limit=50)
    _check_shown([verified, rows, lines])
    # As Salt prints it.
    json.dumps([verified, rows, lines])
    return verified


def _check_shown(data):
    todo = [data]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            todo += [*one, *one.values()]
        elif isinstance(one, (list, tuple)):
            todo += one
        else:
            assert not isinstance(one, str) or one.isprintable(), "what is told does something on a terminal"


@functools.lru_cache(maxsize=1)
def _path():
    return os.path.join(tempfile.mkdtemp(), "audit.log")


def _read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""
