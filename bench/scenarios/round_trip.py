# SPDX-License-Identifier: GPL-2.0-or-later
"""There and back: ``true``, a listing, 10 MiB out, a script of 1 MiB in; and ``true`` with tools that cost what the real ones do."""

import measure
import modes
from place import POLL_INTERVAL, WORK

TRUE, COSTLY = "round trip of true", "the same, with tools that cost what the real ones do"
LISTING, OUT, IN = "qvm-ls", "10 MiB out", "script of 1 MiB in"
_TRANSFERS = {"ls": LISTING, "out": OUT, "in": IN}


def run(place):
    """Measure it.

    Returns:
        list of dict, rows.
    """
    samples = {}
    for turn in range(place.size.turns):
        place.serve()
        _fast(place, samples)
        # A VM without the agent keeps dom0 busy: it runs while it is measured, and only then.
        for interval, name in ((POLL_INTERVAL, modes.POLLING), (0, modes.AGENTLESS)):
            place.serve(polled=interval)
            _polled(place, modes.polled(place, name), turn, samples)
    scenarios = (TRUE, COSTLY, *_TRANSFERS.values())
    return [measure.timed(scenario, mode, some) for wanted in scenarios for (scenario, mode), some in samples.items() if scenario == wanted]


def _fast(place, samples):
    size, all_modes = place.size, modes.fast(place)
    bare = modes.Mode(modes.INTERPRETER, place.probe(WORK), {"true": ["/usr/bin/python3", "-IS", "-c", "pass"]})
    starting = modes.Mode("qvm-remote --version (in the VM)", place.probe(WORK), {"true": ["qvm-remote", "--version"]})
    _add(samples, TRUE, measure.interleave([*all_modes, bare, starting], "true", _share(size.rounds, size)))
    for kind, scenario in _TRANSFERS.items():
        _add(samples, scenario, measure.interleave(all_modes, kind, _share(size.transfer_rounds, size)))
    place.set_costs(True)
    costly = [mode for mode in all_modes if mode.name in (modes.SPAWN, modes.QVM_RUN, modes.SESSION)]
    _add(samples, COSTLY, measure.interleave(costly, "true", _share(size.cost_rounds, size)))
    place.set_costs(False)


def _polled(place, mode, turn, samples):
    size = place.size
    _add(samples, TRUE, measure.interleave([mode], "true", size.poll_rounds))
    if turn == 0:
        for kind, scenario in _TRANSFERS.items():
            _add(samples, scenario, measure.interleave([mode], kind, size.poll_transfer_rounds))
    place.set_costs(True)
    _add(samples, COSTLY, measure.interleave([mode], "true", size.cost_poll_rounds))
    place.set_costs(False)


def _share(rounds, size):
    return max(1, rounds // size.turns)


def _add(samples, scenario, new):
    for mode, some in new.items():
        samples.setdefault((scenario, mode), []).extend(some)
