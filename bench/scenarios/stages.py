# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a round trip's time goes, as far as it can be seen from outside: what the client says with -v, and when, and the engine's events
on Salt's bus, which carry the time of what they tell. For this the engine fires all of them, as it does not by default.
"""

import contextlib
import json
import re
import subprocess
import time

import measure
from place import WORK

NAME = "where a round trip's time goes"
SANDBOX = "sandbox (event running to done)"
_EVENTS = ("accepted", "running", "done", "delivered")
_STAGES = (
    "client starts, signs and queues (start to 'sent')",
    "wake, fetch, verify, claim ('sent' to event accepted)",
    "waits its turn (event accepted to running)",
    SANDBOX,
    "result to the VM (event done to delivered)",
    "client checks, prints, ends (event delivered to exit)",
)
_SENT = re.compile(r"sent (\S+)")
_LISTEN = ("salt-call", "--local", "--config-dir=/etc/qubes/remote", "state.event", "tagmatch=qvm-remote/*", "count=-1")
_LISTEN_WAIT, _EVENT_WAIT = 30, 5


def run(place):
    """Measure it.

    Returns:
        list of dict, rows.
    """
    place.serve(events="all")
    probe = place.probe(WORK)
    listener = place.stand.popen_dom0(*_LISTEN, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    events = {}
    try:
        _await_listener(listener, probe, events)
        traces = [probe.ask("trace", argv=["qvm-remote", "-v", "-n", "true"]) for _ in range(place.size.traces)]
        times = [_times(trace, listener, events) for trace in traces]
    finally:
        listener.terminate()
        listener.wait()
        listener.stdout.close()
    rows = [
        measure.timed(NAME, stage, [max(0.0, times[at + 1] - times[at]) * 1000 for times in times]) for at, stage in enumerate(_STAGES)
    ]
    return [*rows, measure.timed(NAME, "the whole, with -v", [(one[-1] - one[0]) * 1000 for one in times])]


def _await_listener(listener, probe, events):
    """Ask until the first event comes: it may not listen yet."""
    deadline = time.monotonic() + _LISTEN_WAIT
    import selectors

    with contextlib.closing(selectors.DefaultSelector()) as selector:
        selector.register(listener.stdout, selectors.EVENT_READ)
        while not selector.select(0.2):
            if time.monotonic() > deadline:
                raise RuntimeError("no event of the engine's came")
            probe.ask("run", argv=["qvm-remote", "-n", "true"])


def _times(trace, listener, events):
    """When one command's stages began and ended, seconds since the epoch."""
    noted, text = trace["lines"][0]
    cid = _SENT.search(text).group(1)
    deadline = time.monotonic() + _EVENT_WAIT
    while set(events.get(cid, ())) < set(_EVENTS):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the events of {cid} did not come: {sorted(events.get(cid, ()))}")
        tag, _, data = listener.stdout.readline().partition("\t")
        parts = tag.split("/")
        if len(parts) == 4:
            events.setdefault(parts[2], {})[parts[3]] = json.loads(data)["time"]
    # dom0 may have it before the client has said so.
    sent = min(noted, events[cid]["accepted"])
    return [trace["begun"], sent, *(events[cid][what] for what in _EVENTS), trace["ended"]]
