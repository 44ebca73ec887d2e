# SPDX-License-Identifier: GPL-2.0-or-later
"""What is wrong with a command line."""

from pullrpc.errors import PullError


class UsageError(PullError):
    """It was called in a way that never works; the exit code says so."""


def checked(check, value):
    """Check a value of the command line.

    Args:
        check: callable of the value that raises PullError if it is none.
        value: str; None when it was not given.

    Returns:
        the value.

    Raises:
        UsageError: it is none; the text is that of the check.
    """
    try:
        if value is not None:
            check(value)
    except PullError as err:
        raise UsageError(str(err)) from None
    return value
