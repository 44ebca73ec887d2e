# SPDX-License-Identifier: GPL-2.0-or-later
"""The shape of a command: what dom0 checks before it looks at keys or runs anything.

Pure functions on bytes, no I/O, so that they can be fuzzed.
"""

import json

from .errors import Refused

#: The control bytes a command may hold: tab, newline, carriage return.
_ALLOWED_CONTROLS = frozenset(b"\t\n\r")
_FORBIDDEN = bytes(b for b in range(0x20) if b not in _ALLOWED_CONTROLS) + b"\x7f"
#: Terminals obey the second set of control characters as well, two bytes each in UTF-8.
_C1 = frozenset(chr(code) for code in range(0x80, 0xA0))
_FORBIDDEN_CHARS = frozenset(chr(b) for b in _FORBIDDEN) | _C1
#: Most arguments of an exact argument vector.
ARGV_MAX = 4096


def check_size(size, limit, what, code="size"):
    """Refuse what is too large before it is fetched.

    Args:
        size: int, bytes, as the VM says.
        limit: int, bytes.
        what: str, its name for the message.
        code: str, another one where the token is known to fit by now.

    Raises:
        Refused: too large.
    """
    if size > limit:
        raise Refused(code, f"the {what} is too large: {size} bytes, dom0 takes at most {limit}")


def check_command(untrusted_command, limit):
    """Check a command's bytes.

    Args:
        untrusted_command: bytes.
        limit: int, bytes.

    Returns:
        str, the command.

    Raises:
        Refused: empty, too large, control bytes, or not UTF-8 (codes ``empty``, ``size``, ``bytes``).
    """
    check_size(len(untrusted_command), limit, "command")
    if not untrusted_command.strip(b" \t\r\n"):
        raise Refused("empty", "the command is empty")
    if untrusted_command.translate(None, _FORBIDDEN) != untrusted_command:
        raise Refused("bytes", "the command contains NUL or other control bytes; only tab, newline and carriage return are allowed")
    try:
        command = untrusted_command.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused("bytes", "the command is not UTF-8 text") from None
    if not command.isascii() and not _C1.isdisjoint(command):
        raise Refused("bytes", "the command contains control characters (U+0080 to U+009F)")
    return command


def parse_argv(text):
    """Read an exact argument vector.

    Args:
        text: str, a JSON array of strings, checked by :func:`check_command`.

    Returns:
        tuple of str, at least one.

    Raises:
        Refused: it is anything else, or an argument hides control characters behind JSON escapes (code ``argv``).
    """
    try:
        untrusted_argv = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("argv", "the argument vector is not JSON") from None
    if not isinstance(untrusted_argv, list) or not 1 <= len(untrusted_argv) <= ARGV_MAX:
        raise Refused("argv", f"the argument vector must be an array of 1 to {ARGV_MAX} strings")
    for untrusted_word in untrusted_argv:
        if not isinstance(untrusted_word, str) or not _FORBIDDEN_CHARS.isdisjoint(untrusted_word):
            raise Refused("argv", "an argument is not a string, or contains control characters")
        try:
            untrusted_word.encode("utf-8")
        except UnicodeEncodeError:
            raise Refused("argv", "an argument is not valid text") from None
    if not untrusted_argv[0]:
        raise Refused("argv", "the argument vector names no program")
    return tuple(untrusted_argv)
