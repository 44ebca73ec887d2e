# SPDX-License-Identifier: GPL-2.0-or-later
"""Command ids and VM names (pullrpc.ids): exactly the documented patterns, as bytes and as text."""

import re
import time

from pullrpc.errors import PullError, Refused
from pullrpc.ids import check_cid, check_vm_name, cid_time, is_cid

_CID = re.compile(rb"[0-9]{8}-[0-9]{6}-[0-9]{1,10}-[0-9a-f]{8}")
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]{0,30}")
_RESERVED = ("dom0", "domain-0", "none", "default")
WORDS = (b"20260131-235959-4711-0badcafe", b"-0badcafe", b"00000000-", b"Domain-0", b"\xc2\xb2", b"\xd9\xa1")


def seeds():
    """Ids and names."""
    yield from (b"20260131-235959-4711-0badcafe", b"20260229-000000-1-00000000", b"99991231-235960-4294967295-ffffffff")
    # Nearly ones.
    yield from (b"20260131-235959-4711-0BADCAFE", b"20260131-235959-4711-0badcafe\n", b"20260131-235959--0badcafe", b"20260131-235959-\xc2\xb2-0badcafe")
    yield from (b"work", b"sys-usb", b"a" * 31, b"Domain-0", b"default")


def check(data):
    """Take bytes for an id, and for a name."""
    is_one = bool(_CID.fullmatch(data))
    assert is_cid(data) is is_one
    text = data.decode("utf-8", "surrogateescape")
    for untrusted in (data, text):
        try:
            cid = check_cid(untrusted)
        except Refused as refused:
            assert not is_one and refused.code == "id"
        else:
            assert is_one and cid == data.decode("ascii")
    if is_one:
        _check_time(data.decode("ascii"))
    try:
        assert check_vm_name(text) == text and _NAME.fullmatch(text) and text.lower() not in _RESERVED
    except PullError:
        assert not _NAME.fullmatch(text) or text.lower() in _RESERVED


def _check_time(cid):
    try:
        made = cid_time(cid)
    except Refused as refused:
        assert refused.code == "id"
        return
    assert type(made) is int
    year, *rest = time.gmtime(made)[:6]
    assert f"{year:04d}{rest[0]:02d}{rest[1]:02d}-{rest[2]:02d}{rest[3]:02d}{rest[4]:02d}" == cid[:15]
