# SPDX-License-Identifier: GPL-2.0-or-later
"""Ids, tokens, frames, shapes: pure functions, and the nearest an attacker comes to them."""

import hashlib
import hmac
import os
import time
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pullrpc import tokens
from pullrpc.errors import FrameError, KeyringError, PullError, Refused, SessionBroken
from pullrpc.frames import HEADER_MAX, PAYLOAD_MAX, FrameReader, encode_frame
from pullrpc.ids import check_cid, check_vm_name, cid_time, is_cid, new_cid
from pullrpc.validate import check_command, parse_argv

KEY = bytes(range(32))


def test_a_new_id_is_an_id_and_of_now():
    began = int(time.time())
    cid = new_cid()
    assert check_cid(cid.encode()) == cid
    assert began <= cid_time(cid) <= time.time()


@given(st.binary(max_size=80))
def test_what_is_taken_as_an_id_has_only_harmless_bytes(raw):
    if is_cid(raw):
        assert set(raw) <= set(b"0123456789abcdef-")


@pytest.mark.parametrize("bad", [b"", b"x", b"20261124-000000-1-0BADCAFE", b"20261124-000000--0badcafe", b"20261124-000000-1-0badcafe\n", b"../../etc"])
def test_what_is_not_exactly_an_id_is_refused(bad):
    with pytest.raises(Refused):
        check_cid(bad)


@pytest.mark.parametrize("date", ["20260230-000000", "20261301-000000", "20260101-250000", "00000101-000000"])
def test_an_id_whose_date_does_not_exist_is_refused(date):
    with pytest.raises(Refused):
        cid_time(f"{date}-1-0badcafe")


@pytest.mark.parametrize("bad", ["", "dom0", "Domain-0", "none", "default", "1vm", "a/b", "a b", "-a", "x" * 32, "é", "a\n", None, "..", "a$"])
def test_what_qubes_does_not_allow_as_a_vms_name_is_refused(bad):
    with pytest.raises(PullError):
        check_vm_name(bad)


@given(st.lists(st.binary(max_size=20), max_size=5), st.lists(st.binary(max_size=20), max_size=5))
def test_no_two_lists_of_fields_are_encoded_alike(one, other):
    assert (tokens.encode(*one) == tokens.encode(*other)) == (one == other)


def test_a_token_fits_only_its_own_request():
    fields = {"vm": "work", "cid": "c", "command": b"x"}
    token = tokens.parse_token(tokens.make_token(KEY, "work", "c", 30, "shell", b"x", hashlib.sha256(b"in").digest()))
    assert tokens.token_matches(KEY, fields["vm"], fields["cid"], token, fields["command"])
    for name, value in (("vm", "dev"), ("cid", "d"), ("command", b"y")):
        changed = {**fields, name: value}
        assert not tokens.token_matches(KEY, changed["vm"], changed["cid"], token, changed["command"])
    for name, value in (("timeout", 31), ("form", "script"), ("stdin_digest", b"")):
        other = tokens.parse_token(tokens.make_token(KEY, "work", "c", 30, "shell", b"x", hashlib.sha256(b"in").digest()))
        setattr(other, name, value)
        assert not tokens.token_matches(KEY, "work", "c", other, b"x")


def test_the_mac_is_hmac_sha256_over_the_documented_fields():
    line = tokens.make_token(KEY, "work", "c", 30, "shell", b"x").split()
    fields = (b"qvm-remote/2 request", b"work", b"c", b"30", b"shell", hashlib.sha256(b"x").digest(), b"")
    message = len(fields).to_bytes(4, "big") + b"".join(len(field).to_bytes(8, "big") + field for field in fields)
    assert line[-1].decode() == hmac.new(KEY, message, "sha256").hexdigest()


def test_a_v1_token_is_that_of_qvm_remote_1():
    line = hmac.new(KEY.hex().encode(), b"c", "sha256").hexdigest().encode()
    token = tokens.parse_token(line)
    assert token.version == 1
    assert tokens.token_matches(KEY, "work", "c", token, b"anything")
    assert not tokens.token_matches(KEY, "work", "d", token, b"anything")


@given(st.binary(max_size=300))
def test_any_token_line_is_parsed_or_refused(raw):
    try:
        tokens.parse_token(raw)
    except Refused as refused:
        assert refused.code == "token"


@pytest.mark.parametrize("bad", [b"", b"\n", b"ab", b"0x" + b"1" * 62, b"a_" * 32, b"g" * 64, b" " + b"ab" * 31 + b"a", b"00" * 32, b"ab" * 33])
def test_a_key_that_is_no_key_is_refused_without_being_shown(bad):
    with pytest.raises(KeyringError) as error:
        tokens.parse_key(bad)
    assert len(bad) < 8 or bad.decode() not in str(error.value)


def test_a_result_is_believed_only_as_dom0_made_it():
    out, err = hashlib.sha256(b"out").digest(), hashlib.sha256(b"err").digest()
    meta = tokens.make_meta(KEY, "c", out, err, {"exit": 0, "status": "done"})
    assert tokens.read_meta(KEY, "c", out, err, meta) == ({"exit": "0", "status": "done"}, True)
    for changed in (meta.replace(b"exit 0", b"exit 1"), meta + b"x 1\n", b"mac -\n" + meta.split(b"\n", 1)[1], b""):
        assert tokens.read_meta(KEY, "c", out, err, changed)[1] is False
    assert tokens.read_meta(KEY, "d", out, err, meta)[1] is False
    assert tokens.read_meta(KEY, "c", err, out, meta)[1] is False


@given(st.text(min_size=1))
def test_a_command_that_passes_has_no_control_bytes(text):
    try:
        assert check_command(text.encode("utf-8", "surrogatepass"), 1 << 20) == text
    except Refused:
        return
    # Terminals obey those of U+0080 to U+009F as well.
    assert not any(category(char) == "Cc" and char not in "\t\n\r" for char in text)


@pytest.mark.parametrize("bad", ["", "{}", "[]", '[""]', "[1]", '["a\\u0000b"]', '["\\ud800"]', "[" * 100000, '["a"'])
def test_what_is_no_argument_vector_is_refused(bad):
    with pytest.raises(Refused):
        parse_argv(bad)


def _reader(data):
    read_end, write_end = os.pipe()
    os.write(write_end, data)
    os.close(write_end)
    return FrameReader(read_end)


def test_a_frame_comes_out_as_it_went_in():
    assert _reader(encode_frame({"n": 1}, b"x" * 1000)).read(1000, time.monotonic() + 5) == ({"n": 1}, b"x" * 1000)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_end_the_session(data):
    try:
        header, payload = _reader(data).read(100, time.monotonic() + 5)
    except SessionBroken:
        return
    assert isinstance(header, dict)
    assert len(payload) <= 100


@pytest.mark.parametrize("sizes", [(HEADER_MAX + 1, 0), (2, PAYLOAD_MAX + 1), (2, 101), (1 << 31, 0)])
def test_a_frame_over_its_bound_is_refused_before_it_is_read(sizes):
    with pytest.raises(FrameError):
        _reader(sizes[0].to_bytes(4, "big") + sizes[1].to_bytes(4, "big")).read(100, time.monotonic() + 5)


def test_a_frame_that_drips_in_is_late_as_a_whole():
    read_end, write_end = os.pipe()
    os.write(write_end, encode_frame({"n": 1})[:-1])
    with pytest.raises(FrameError, match="in time"):
        FrameReader(read_end).read(0, time.monotonic() + 0.05)
    os.close(write_end)
