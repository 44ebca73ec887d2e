# SPDX-License-Identifier: GPL-2.0-or-later
"""Token lines and keys (pullrpc.tokens): what is taken apart is all that was there, and no other token fits a request."""

import hashlib

from pullrpc.errors import KeyringError, Refused
from pullrpc.tokens import FORMS, TOKEN_MAX, make_token, parse_key, parse_token, token_matches

_KEY = bytes(range(32))
_REQUEST = ("work", "20260131-235959-4711-0badcafe")
_COMMAND = b"true"
_GENUINE = (
    make_token(_KEY, *_REQUEST, 30, "shell", _COMMAND),
    make_token(_KEY, *_REQUEST, 3600, "argv", _COMMAND, hashlib.sha256(b"in").digest()),
)
#: As it stands in memory: where a line may have two forms (hex of either case), it counts as the same.
_FITTING = {line.rstrip(b"\n").lower() for line in _GENUINE}
WORDS = (b"v2 ", b" - ", *(b" " + form.encode() + b" " for form in FORMS), b"0" * 64, b"F" * 64, b"\n")


def seeds():
    """Token lines, and keys."""
    yield from _GENUINE
    yield make_token(bytes(32), *_REQUEST, 1, "ping", b"ping")
    yield b"ab" * 32 + b"\n"
    yield _KEY.hex().encode() + b"\n"
    # Nearly ones.
    yield _GENUINE[0].replace(b" 30 ", b" 030 ")
    yield _GENUINE[0].replace(b" - ", b"  ")
    yield _GENUINE[1].upper()


def check(data):
    """Take bytes for a token line, and for a key."""
    try:
        token = parse_token(data)
    except Refused as refused:
        assert refused.code == "token"
    else:
        assert len(data) <= TOKEN_MAX
        line = data.removesuffix(b"\n").lower()
        if token.version == 1:
            assert (token.timeout, token.form, token.stdin_digest) == (None, "script", b"") and token.mac.hex().encode() == line
        else:
            assert token.version == 2 and token.form in FORMS and 1 <= token.timeout <= 9999999
            assert f"v2 {token.timeout} {token.form} {token.stdin_digest.hex() or '-'} {token.mac.hex()}".encode() == line, "part of the line was overlooked"
            assert token_matches(_KEY, *_REQUEST, token, _COMMAND) is (line in _FITTING), "a token that was never made fits, or one that was does not"
    _check_key(data)


def _check_key(data):
    try:
        assert parse_key(data).hex().encode() == data.removesuffix(b"\n").lower()
    except KeyringError as err:
        assert len(data) < 16 or data.strip().decode("utf-8", "replace") not in str(err), "an error shows a key"
