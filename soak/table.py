# SPDX-License-Identifier: GPL-2.0-or-later
"""What a soak shows: how far it is, its table, and what is wrong."""

import sys

from judge import ZEROES

#: Most sentences on one row of the table.
_TOLD_MAX = 20


def progress():
    """Where to tell how far it is: a terminal, or nowhere.

    Returns:
        callable of str
    """
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[K{text}", end="" if text else "\r", file=sys.stderr, flush=True)


def show(rows):
    """Print the table.

    Args:
        rows: dict of name to what is there.
    """
    named = {f"{name} (0)" if name in ZEROES else name: value for name, value in rows.items()}
    width = max(map(len, named))
    for name, value in named.items():
        print(f"  {name:{width}}  {value:>7}")


def tell(problems):
    """Print what is wrong.

    Args:
        problems: dict of row to list of sentences.
    """
    for name, told in problems.items():
        for text in told[:_TOLD_MAX]:
            print(f"{name}: {text}")
        if len(told) > _TOLD_MAX:
            print(f"{name}: and {len(told) - _TOLD_MAX} more")
