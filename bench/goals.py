# SPDX-License-Identifier: GPL-2.0-or-later
"""What the figures should be, as ratios of two of them, and whether they are."""

import modes
from scenarios import fleet, round_trip, stages, throughput


def judge(rows, size):
    """Compare the rows with the goals.

    Args:
        rows: list of dict.
        size: Size.

    Returns:
        list of dict: ``goal``, ``figure`` (float), ``limit`` (float), ``at_least`` (bool), ``reached`` (bool); goals whose rows are not
        all there are left out.
    """
    known = {(row["scenario"], row["mode"]): row for row in rows}

    def get(scenario, mode, what="median"):
        return known[scenario, mode][what]

    def true(mode, what="median"):
        return get(round_trip.TRUE, mode, what)

    most, many = fleet.idle(size.most), throughput.from_vms(size.many)
    service = "service (minion, engine, sessions)"
    goals = (
        ("session: p99 / median of true", 2, False, lambda: true(modes.SESSION, "p99") / true(modes.SESSION)),
        ("true: polling each second / session", 15, True, lambda: true(modes.POLLING) / true(modes.SESSION)),
        (
            "session: median / (bare interpreter + true in the sandbox)",
            1.3,
            False,
            lambda: true(modes.SESSION) / (true(modes.INTERPRETER) + get(stages.NAME, stages.SANDBOX)),
        ),
        ("true: session / ssh localhost", 1, False, lambda: true(modes.SESSION) / true(modes.SSH)),
        (
            f"from {size.many} VMs: pipeline / plain loop of fork, exec, fsync",
            0.6,
            True,
            lambda: get(many, throughput.PIPELINE, "value") / get(many, throughput.LOOP, "value"),
        ),
        ("10 MiB out: speed of session / of ssh localhost", 0.5, True, lambda: get(round_trip.OUT, modes.SSH) / get(round_trip.OUT, modes.SESSION)),
        (f"{most}: cores used by the engine", 0.01, False, lambda: get(most, fleet.ENGINE, "value") / 60),
        (f"{most}: processes started a minute", 0, False, lambda: get(most, f"{service}: processes and threads started", "value")),
        (
            f"median of true: {size.most} VMs connected / 1",
            1.3,
            False,
            lambda: get(fleet.true_with(size.most), modes.SESSION) / get(fleet.true_with(1), modes.SESSION),
        ),
    )
    judged = []
    for goal, limit, at_least, ratio in goals:
        try:
            figure = ratio()
        except KeyError:
            continue
        reached = figure >= limit if at_least else figure <= limit
        judged.append({"goal": goal, "figure": figure, "limit": limit, "at_least": at_least, "reached": reached})
    return judged
