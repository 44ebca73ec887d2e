# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands in a second, from one VM and from many: with a client program for each command, which is what a shell script does, and from one
process in each VM with the client's library, which is what the way to dom0 and back carries by itself.
"""

import concurrent.futures

import measure
import modes
from place import WORK

LOOP, PIPELINE = "plain loop in dom0: fork, exec true, fsync", "requests from one process in each VM (library)"
_CLIENT = "qvm-remote processes, 8 at a time in each VM"
_PARALLEL = 8
#: Requests of one process on their way at once; dom0 keeps 64 of a VM waiting.
_WINDOW = 32


def from_vms(count):
    """Name a scenario's part.

    Args:
        count: int, VMs.

    Returns:
        str
    """
    return f"commands a second from {count} VM{'s' if count > 1 else ''}"


def run(place):
    """Measure it.

    Returns:
        list of dict, rows.
    """
    size, rows = place.size, []
    for count in (1, size.many):
        vms = place.have_fleet(count) if count > 1 else [WORK]
        if count == 1:
            place.serve()
        name = from_vms(len(vms))
        # Before and after, for whatever else the machine does.
        loop = place.probe("dom0").ask("loop", count=size.commands, folder="/var/lib")["seconds"]
        sent = _all(place, vms, "pipeline", count=size.commands // len(vms), window=_WINDOW)
        loop += place.probe("dom0").ask("loop", count=size.commands, folder="/var/lib")["seconds"]
        rows.append(measure.figure(name, LOOP, 2 * size.commands / loop, "/s"))
        rows.append(measure.figure(name, PIPELINE, size.commands // len(vms) * len(vms) / sent, "/s"))
        each = max(1, size.client_commands // len(vms))
        words = {"argv": ["qvm-remote", "-n", "true"], "count": each, "parallel": _PARALLEL}
        rows.append(measure.figure(name, _CLIENT, each * len(vms) / _all(place, vms, "run", **words), "/s"))
        if count == 1:
            for mode in modes.fast(place):
                if mode.name in (modes.SSH, modes.SSH_MASTER):
                    seconds = mode.seconds("true", size.client_commands, _PARALLEL)
                    rows.append(measure.figure(name, f"{mode.name}, {_PARALLEL} at a time", size.client_commands / seconds, "/s"))
    return rows


def _all(place, vms, do, **request):
    """Have the same done in some VMs at once; how long the longest took, seconds."""
    probes = [place.probe(vm) for vm in vms]
    with concurrent.futures.ThreadPoolExecutor(len(probes)) as pool:
        return max(answer["seconds"] for answer in pool.map(lambda probe: probe.ask(do, **request), probes))
