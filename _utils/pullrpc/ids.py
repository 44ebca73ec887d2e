# SPDX-License-Identifier: GPL-2.0-or-later
"""Command ids and VM names: the only two words from outside that ever become part of a path.

Checked byte by byte against an allow-list before any other use; nothing is ever repaired or normalised.
"""

import os
import time

from .errors import PullError, Refused

_DIGITS = frozenset(b"0123456789")
_HEX = frozenset(b"0123456789abcdef")
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_NAME_TAIL = _LETTERS | _DIGITS | frozenset(b"_.-")
#: Names that Qubes keeps for itself (qubes/vm: validate_name); never a VM that may ask for something.
_RESERVED = frozenset((b"dom0", b"domain-0", b"none", b"default"))
#: Longest VM name in Qubes, characters.
_NAME_MAX = 31
#: Longest pid we accept, digits (Linux: pid_max is at most 2**22, 7 digits; 10 leaves room).
_PID_DIGITS = 10


def new_cid(now=None):
    """Make a command id: UTC time, our pid, 8 hex digits of the system's CSPRNG.

    Args:
        now: seconds since the epoch (default: now).

    Returns:
        str, for example ``20260131-235959-4711-0badcafe``.
    """
    # Not gmtime's own idea of now: that is the kernel's coarse clock, in which the last second may go on for some milliseconds.
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(time.time() if now is None else now))
    return f"{stamp}-{os.getpid()}-{os.urandom(4).hex()}"


def is_cid(untrusted_name):
    """Say whether some bytes are exactly a command id.

    Args:
        untrusted_name: bytes.

    Returns:
        bool
    """
    if not isinstance(untrusted_name, bytes) or len(untrusted_name) > 64:
        return False
    parts = untrusted_name.split(b"-")
    if len(parts) != 4:
        return False
    day, clock, pid, rand = parts
    if (len(day), len(clock), len(rand)) != (8, 6, 8) or not 1 <= len(pid) <= _PID_DIGITS:
        return False
    return _DIGITS.issuperset(day + clock + pid) and _HEX.issuperset(rand)


def check_cid(untrusted_name):
    """Turn bytes (or ASCII text) from a VM into a command id.

    Args:
        untrusted_name: bytes or str.

    Returns:
        str, safe as a file name, in a log line and in an event tag.

    Raises:
        Refused: it is anything but a command id (code ``id``). The text doesn't repeat it.
    """
    if isinstance(untrusted_name, str):
        untrusted_name = untrusted_name.encode("utf-8", "surrogatepass")
    if not is_cid(untrusted_name):
        raise Refused("id", "this is not a command id (YYYYMMDD-HHMMSS-PID-8HEX)")
    return untrusted_name.decode("ascii")


def cid_time(cid):
    """Say when a command id was made.

    Args:
        cid: str, checked by :func:`check_cid`.

    Returns:
        int, seconds since the epoch.

    Raises:
        Refused: its digits are no date (code ``id``).
    """
    # Imported here: only dom0 needs it, and the client starts sooner without.
    import datetime

    day, clock = cid.split("-")[:2]
    try:
        when = datetime.datetime(
            int(day[:4]), int(day[4:6]), int(day[6:]), int(clock[:2]), int(clock[2:4]), int(clock[4:]), tzinfo=datetime.timezone.utc
        )
    except ValueError:
        raise Refused("id", "the date in this command id does not exist") from None
    return int(when.timestamp())


def check_vm_name(untrusted_name):
    """Check a VM's name against what Qubes allows.

    Args:
        untrusted_name: str.

    Returns:
        str, the same name; safe as a file name, an argument and in a log line.

    Raises:
        PullError: it is no name a VM can have.
    """
    raw = untrusted_name.encode("utf-8", "surrogatepass") if isinstance(untrusted_name, str) else b""
    if not raw or len(raw) > _NAME_MAX or raw[0] not in _LETTERS or not _NAME_TAIL.issuperset(raw) or raw.lower() in _RESERVED:
        raise PullError("not a VM's name: a letter, then at most 30 letters, digits, '_', '.' or '-'; never dom0, none or default")
    return untrusted_name
