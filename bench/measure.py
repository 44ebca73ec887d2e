# SPDX-License-Identifier: GPL-2.0-or-later
"""Samples, and what is made of them: rows of the table."""

import math
import statistics


def timed(scenario, mode, milliseconds):
    """A row of times.

    Args:
        scenario, mode: str.
        milliseconds: list of float.

    Returns:
        dict
    """
    ranked = sorted(milliseconds)
    # The nearest rank: a time that was measured, never one between two.
    p99 = ranked[math.ceil(0.99 * len(ranked)) - 1]
    return {"scenario": scenario, "mode": mode, "unit": "ms", "n": len(ranked), "median": statistics.median(ranked), "p99": p99}


def figure(scenario, mode, value, unit):
    """A row of one number.

    Args:
        scenario, mode: str.
        value: float.
        unit: str.

    Returns:
        dict
    """
    return {"scenario": scenario, "mode": mode, "unit": unit, "value": value}


def interleave(modes, kind, rounds):
    """Take turns, so that whatever else the machine does hits all modes alike.

    Args:
        modes: list of Mode.
        kind: str, what each is to do.
        rounds: int.

    Returns:
        dict of a mode's name to list of float, milliseconds; modes that can't do this are left out.
    """
    able = [mode for mode in modes if mode.can(kind)]
    samples = {mode.name: [] for mode in able}
    for _ in range(rounds):
        for mode in able:
            samples[mode.name] += mode.sample(kind)
    return samples


def with_ratios(rows, floors):
    """Add to each row of times how many times its floor it takes.

    Args:
        rows: list of dict.
        floors: list of str, modes that are floors; of those that a scenario has, the first one counts.

    Returns:
        list of dict
    """
    medians = {(row["scenario"], row["mode"]): row["median"] for row in rows if "median" in row}
    for row in rows:
        floor = next((floor for floor in floors if (row["scenario"], floor) in medians), None)
        if "median" in row and floor:
            row["floor"], row["ratio"] = floor, row["median"] / medians[row["scenario"], floor]
    return rows
