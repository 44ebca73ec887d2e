# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service costs while nobody asks for anything, with few and with many VMs, and whether many make one slower.

dom0's tools cost what the real ones do. Processes are counted by the numbers that the kernel has given in dom0's PID namespace: those of
threads are among them, so it is never too few. What the simulator's hypervisor needs is in no figure: Xen and qrexec stand there.
"""

import time

import measure
import modes
from place import WORK

_SERVICE = "salt-minion"
ENGINE = "of that, the engine without Salt's minion and its sessions"
#: Settle before nothing is measured, seconds.
_SETTLE = 3
#: How long to wait until all is still, at most, seconds.
_CALM_WAIT = 120


def idle(count):
    """Name a scenario's part.

    Args:
        count: int, running VMs.
    """
    return f"idle with {count} running VM{'s' if count > 1 else ''}"


def true_with(count):
    """Name a scenario's part.

    Args:
        count: int, connected VMs.
    """
    return f"round trip of true, {count} VM{'s' if count > 1 else ''} connected"


def run_one(place):
    """Measure it with one running VM, before and after there are many others that are halted.

    Returns:
        list of dict, rows.
    """
    place.set_costs(True)
    place.serve()
    # Its session's program is to be one of those that cost what the real ones do.
    place.begin_anew()
    place.serve()
    rows = _idle(place, idle(1))
    place.have_fleet(1)
    rows += _idle(place, f"idle with 1 running VM and {place.size.most} halted ones")
    rows += _true(place, 1)
    place.set_costs(False)
    return rows


def run_many(place):
    """Measure it with many running VMs, and with all of them.

    Returns:
        list of dict, rows.
    """
    place.set_costs(True)
    rows = []
    for count in (place.size.many, place.size.most):
        running = len(place.have_fleet(count))
        rows += _idle(place, idle(running))
        if count == place.size.many:
            place.serve(transport="qubesadmin")
            place.await_fleet()
            rows += _idle(place, f"{idle(running)}, transport: qubesadmin")
            place.serve()
    rows += _true(place, running)
    place.set_costs(False)
    return rows


def _true(place, count):
    able = [mode for mode in modes.fast(place) if mode.name in (modes.SPAWN, modes.SESSION)]
    samples = measure.interleave(able, "true", place.size.rounds)
    return [measure.timed(true_with(count), mode, some) for mode, some in samples.items()]


def _idle(place, scenario):
    place.say(f"{scenario}: doing nothing for {place.size.idle_seconds} s")
    # Whatever is measured, the probes themselves are there before.
    place.probe("dom0"), place.probe(WORK)
    time.sleep(min(_SETTLE, place.size.idle_seconds))
    _await_calm(place)
    before, agent_before, begun = _usage(place, "dom0"), _usage(place, WORK), time.monotonic()
    time.sleep(place.size.idle_seconds)
    after, agent_after, minutes = _usage(place, "dom0"), _usage(place, WORK), (time.monotonic() - begun) / 60
    in_dom0 = "service (minion, engine, sessions)"
    return [
        measure.figure(scenario, f"{in_dom0}: CPU", (after["cpu"] - before["cpu"]) / minutes, "s/min"),
        measure.figure(scenario, ENGINE, (after["engine_cpu"] - before["engine_cpu"]) / minutes, "s/min"),
        measure.figure(scenario, f"{in_dom0}: processes and threads started", (after["pids"] - before["pids"]) / minutes, "/min"),
        measure.figure(scenario, f"{in_dom0}: processes", after["processes"], ""),
        measure.figure(scenario, f"{in_dom0}: memory (PSS)", after["pss"] / (1 << 20), "MiB"),
        measure.figure(scenario, "of that, programs of sessions", after["sessions_pss"] / (1 << 20), "MiB"),
        measure.figure(scenario, "agent in one VM: CPU", (agent_after["cpu"] - agent_before["cpu"]) / minutes, "s/min"),
        measure.figure(scenario, "agent in one VM: processes and threads started", (agent_after["pids"] - agent_before["pids"]) / minutes, "/min"),
        measure.figure(scenario, "agent in one VM: memory (PSS)", agent_after["pss"] / (1 << 20), "MiB"),
    ]


def _await_calm(place):
    """Wait until the events of what ran before have been fired; Salt starts a thread for each."""
    deadline, last = time.monotonic() + _CALM_WAIT, None
    while time.monotonic() < deadline:
        now = _usage(place, "dom0")["pids"]
        if now == last:
            return
        last = now
        time.sleep(1)


def _usage(place, where):
    return place.probe(where).ask("usage", service=_SERVICE)
