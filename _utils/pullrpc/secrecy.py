# SPDX-License-Identifier: GPL-2.0-or-later
"""What keeps keys in a process: whoever has read one leaves no core dump, on disk or with the program that collects them."""

from __future__ import annotations

import ctypes
import os

from .errors import KeyringError

#: prctl(2).
_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)


def keep_out_of_dumps():
    """Have this process, and those that it forks, never dump its memory, whatever the limits say; what it executes is not concerned.

    Raises:
        KeyringError: the kernel does not do that.
    """
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise KeyringError(f"this process can't be kept from dumping its memory: {os.strerror(ctypes.get_errno())}")
