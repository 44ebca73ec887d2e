# SPDX-License-Identifier: GPL-2.0-or-later
"""How a command may be, or have ended, in one word: what a history is asked for."""

from __future__ import annotations

from .errors import PullError

OUTCOMES = ("done", "timeout", "cancelled", "interrupted", "failed", "refused", "accepted", "running")
_EXIT_MAX = 255


def check_outcome(outcome):
    """Check that something is an outcome.

    Args:
        outcome: one of :data:`OUTCOMES`, an exit code, as str or int, or None.

    Raises:
        PullError: it is none.
    """
    word = str(outcome)
    if outcome is not None and word not in OUTCOMES and not (word.isascii() and word.isdigit() and int(word[:4]) <= _EXIT_MAX):
        raise PullError(f"an outcome is {', '.join(OUTCOMES)}, or an exit code")
