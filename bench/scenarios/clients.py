# SPDX-License-Identifier: GPL-2.0-or-later
"""Many clients at once, in one VM: what each of them waits, and how long it takes until all are through."""

import measure
import modes


def run(place):
    """Measure it.

    Returns:
        list of dict, rows.
    """
    place.serve()
    size, rows = place.size, []
    able = modes.fast(place)
    samples = {mode.name: [] for mode in able}
    for _ in range(size.client_rounds):
        for mode in able:
            samples[mode.name].append(mode.sample("true", count=size.clients, parallel=size.clients))
    for mode in able:
        rows.append(measure.timed(f"{size.clients} clients at once, each", mode.name, [one for some in samples[mode.name] for one in some]))
    for mode in able:
        rows.append(measure.timed(f"{size.clients} clients at once, the last", mode.name, [max(some) for some in samples[mode.name]]))
    return rows
