# SPDX-License-Identifier: GPL-2.0-or-later
"""What is wrong with a command line beyond its grammar."""

from pullrpc.errors import PullError


class UsageError(PullError):
    """It was called in a way that never works; the exit code says so."""
