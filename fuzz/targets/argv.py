# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands and argument vectors (pullrpc.validate): text without control characters, and exactly the words that were sent."""

import json

from pullrpc.errors import Refused
from pullrpc.validate import ARGV_MAX, check_command, parse_argv

_LIMIT = 4096
_CODES = ("empty", "size", "bytes")
WORDS = (b'["', b'","', b'"]', b"\\u0000", b"\\ud800", b"\\n", b"1e999", b"[[[[[[", b"NaN")


def seeds():
    """JSON arrays of words."""
    for words in (["true"], ["qvm-ls", "--raw-data"], ["echo", "", "a b", "é\U0001f600", '"\\'], ["a\0"]):
        yield json.dumps(words).encode()
        yield json.dumps(words, ensure_ascii=False).encode()
    yield b"echo hello\n"


def check(data):
    """Take bytes for a command, and that for an argument vector."""
    try:
        text = check_command(data, _LIMIT)
    except Refused as refused:
        assert refused.code in _CODES
        return
    assert text.encode("utf-8") == data and text.strip()
    assert not any((char < " " and char not in "\t\n\r") or char == "\x7f" for char in text)
    try:
        words = parse_argv(text)
    except Refused as refused:
        assert refused.code == "argv"
        return
    assert type(words) is tuple and 1 <= len(words) <= ARGV_MAX and words[0]
    assert list(words) == json.loads(text) and parse_argv(json.dumps(words)) == words
    assert all(type(word) is str and word.encode("utf-8").isascii() <= word.isascii() for word in words)
    assert not any((char < " " and char not in "\t\n\r") or char == "\x7f" for word in words for char in word)
