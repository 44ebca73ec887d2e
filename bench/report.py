# SPDX-License-Identifier: GPL-2.0-or-later
"""The table on stdout, and the same as JSON under bench/results/."""

import json
import os
import time

_RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")


def show(result):
    """Print a result.

    Args:
        result: dict: ``machine``, ``rows``, ``goals``, ``notes``.
    """
    print(", ".join(f"{name}: {value}" for name, value in result["machine"].items()))
    scenario = None
    for row in result["rows"]:
        if row["scenario"] != scenario:
            scenario = row["scenario"]
            ratio = f"{'ratio':>8}  to {row['floor']}" if "floor" in row else ""
            print(f"\n{scenario:68}" + (f"{'median':>10}{'p99':>10}{'n':>6}{ratio}" if "median" in row else ""))
        if "median" in row:
            ratio = f"{row['ratio']:8.2f}" if "ratio" in row else ""
            print(f"  {row['mode']:66}{row['median']:10.1f}{row['p99']:10.1f}{row['n']:6}{ratio}")
        else:
            print(f"  {row['mode']:66}{row['value']:10.2f} {row['unit']}")
    if result["goals"]:
        print(f"\n{'goals':68}{'figure':>10}{'limit':>10}")
    for goal in result["goals"]:
        limit = f"{'>=' if goal['at_least'] else '<='} {goal['limit']:g}"
        print(f"  {goal['goal']:66}{goal['figure']:10.3f}{limit:>10}  {'reached' if goal['reached'] else 'NOT reached'}")
    for note in result["notes"]:
        print(f"\nnote: {note}")


def store(result, path=None):
    """Write a result as JSON.

    Args:
        result: dict.
        path: str; None for a new file under bench/results/.

    Returns:
        str, the path.
    """
    path = path or os.path.join(_RESULTS, time.strftime("%Y%m%d-%H%M%S.json"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    return path
