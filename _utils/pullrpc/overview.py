# SPDX-License-Identifier: GPL-2.0-or-later
"""How things are in dom0: the engine, the keys, and for each VM how it is served and what it had done lately.

Whatever is told of commands comes from the ledger and from the end of the audit log: how long either has grown does not count.
"""

from __future__ import annotations

import collections
import time

from . import __version__, note
from .audit_read import shown
from .audit_tail import recent
from .errors import LedgerError
from .lock import is_held
from .policy import FULL, NONE, describe

#: Ends of a command whose time says how fast dom0 is.
_RAN = ("done", "timeout")
#: Most characters of a command that are shown.
_COMMAND_SHOWN = 200


def overview(dom0):
    """Describe the present state.

    Args:
        dom0: Dom0.

    Returns:
        dict: ``version``, ``engine`` (running or stopped), ``sessions`` (VM name to agent, agentless, connecting, waiting,
        stranger), ``asking`` (the question that dom0's user sees now, or None), ``ledger`` (``sound``, or what is wrong with it),
        ``commands`` (state to count, of those not delivered yet; empty when the ledger can't be read), ``keys`` (as
        :meth:`pullrpc.keyring.Keyring.fingerprints` gives them, with ``in_vm`` and ``access``), ``recent`` (when the lines begin that
        the figures are from; None without any), and ``vms``: VM name to a dict of ``session`` (None without one), ``since`` (seconds
        since the epoch), ``policy`` (full, none, rules or ended), ``open`` (state to count), ``ran``, ``refused`` (counts), ``p50``,
        ``p99`` (seconds; None without commands), ``last`` (dict of ``time``, ``id``, ``command``, ``outcome``; None).

    Raises:
        PullError: the keys or the audit log can't be read.
    """
    config = dom0.config
    running = is_held(config.run_dir)
    known = dom0.keyring.fingerprints()
    for vm, one in known.items():
        one["in_vm"] = dom0.handover.known(vm)
        one["access"] = describe(config.for_vm(vm))
    news = note.read(config) if running else {}
    sessions, since = news.get("sessions", {}), news.get("since", {})
    lines = recent(config.audit_log)
    figures = _figures(lines)
    try:
        ledger, open_counts = "sound", dom0.ledger.open_counts()
    except LedgerError as err:
        # Whoever asks how things are is to hear of the rest, too.
        ledger, open_counts = str(err), {}
    commands = collections.Counter()
    for counts in open_counts.values():
        commands.update(counts)
    vms = {}
    for vm in sorted({*known, *config.vms, *sessions}):
        vms[vm] = {
            "session": sessions.get(vm),
            "since": since.get(vm),
            "policy": _policy(config.for_vm(vm)),
            "open": open_counts.get(vm, {}),
            **figures.get(vm, _Figures()).shown(),
        }
    return {
        "version": __version__,
        "engine": "running" if running else "stopped",
        "sessions": sessions,
        "asking": news.get("asking"),
        "ledger": ledger,
        "commands": dict(commands),
        "keys": known,
        "recent": lines[0].get("time") if lines else None,
        "vms": vms,
    }


def _policy(config):
    if config.until and time.time() >= config.until:
        return "ended"
    return config.policy_in_force if config.policy_in_force in (FULL, NONE) else "rules"


class _Figures:
    """What the audit log's end says of one VM."""

    def __init__(self):
        self.ran = self.refused = 0
        self.seconds = []
        self.last = None

    def take(self, line):
        """Count a line."""
        what = line.get("what")
        if what == "accepted":
            self.last = {"time": line.get("time"), "id": line.get("id"), "command": str(line.get("command", ""))[:_COMMAND_SHOWN], "outcome": "accepted"}
        elif what == "ended":
            self.ran += 1
            if line.get("status") in _RAN and isinstance(line.get("seconds"), (int, float)):
                self.seconds.append(line["seconds"])
            if self.last and self.last["id"] == line.get("id"):
                self.last["outcome"] = line.get("status")
        elif what == "refused":
            self.refused += 1
        elif what == "refusals-not-shown" and type(line.get("count")) is int:
            self.refused += line["count"]

    def shown(self):
        """The figures as plain data."""
        self.seconds.sort()
        return {
            "ran": self.ran,
            "refused": self.refused,
            "p50": _percentile(self.seconds, 50),
            "p99": _percentile(self.seconds, 99),
            "last": shown(self.last),
        }


def _figures(lines):
    figures = {}
    for line in lines:
        vm = line.get("vm")
        if isinstance(vm, str):
            figures.setdefault(vm, _Figures()).take(line)
    return figures


def _percentile(values, percent):
    """The smallest of some sorted values that so many percent of them do not exceed; None of none."""
    return values[max(0, -(-len(values) * percent // 100) - 1)] if values else None
