# SPDX-License-Identifier: GPL-2.0-or-later
"""What others wrote, fit for a terminal: control characters can move its cursor, and more. Into a pipe or file every byte goes as it is."""

import codecs
import os

from pullrpc.files import write_fully

_KEPT = frozenset("\n\t")


def printable(raw):
    """Escape what a terminal would obey, or not show.

    Args:
        raw: bytes.

    Returns:
        str; newlines and tabs are kept.
    """
    return _escaped(raw.decode("utf-8", "backslashreplace"))


def _escaped(text):
    if text.isprintable():
        return text
    return "".join(char if char in _KEPT or char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def one_line(raw, limit):
    """The same on one line, and no longer than fits.

    Args:
        raw: bytes.
        limit: int, characters.

    Returns:
        str
    """
    # Nobody sees more of it, and it may be long.
    text = printable(raw[: limit * 4].strip()).replace("\n", "\\n").replace("\t", " ")
    return text if len(text) <= limit and len(raw.strip()) <= limit * 4 else text[: limit - 3] + "..."


def put(text):
    """Write a text of ours to stdout.

    Args:
        text: str.
    """
    write_fully(1, text.encode("utf-8", "backslashreplace"))


def put_raw(raw):
    """Write bytes of others to stdout: as they are, or escaped if that is a terminal.

    Args:
        raw: bytes.
    """
    put_blocks([raw])


def put_blocks(blocks):
    """The same, of what is too long to be held.

    Args:
        blocks: iterable of bytes.
    """
    if not os.isatty(1):
        for block in blocks:
            write_fully(1, block)
        return
    # A character may lie in two blocks.
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    for block in blocks:
        write_fully(1, _escaped(decoder.decode(block)).encode("utf-8"))
    write_fully(1, _escaped(decoder.decode(b"", True)).encode("utf-8"))


def put_json(data):
    """Write data to stdout as JSON.

    Args:
        data: dict or list.
    """
    import json

    put(json.dumps(data, indent=2, ensure_ascii=True) + "\n")


def warn(text):
    """Write a line to stderr.

    Args:
        text: str, without the newline.
    """
    write_fully(2, f"qvm-remote: {text}\n".encode("utf-8", "backslashreplace"))
