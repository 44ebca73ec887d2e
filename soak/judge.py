# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges a soak by its evidence, which comes from those who don't know of each other: what the clients ended with, what the commands
themselves left in dom0, dom0's ledger, and dom0's audit log. Plain data in, figures and sentences out.
"""

import collections
import dataclasses
import re

from fault_stand import FAILED, INTERRUPTED, KINDS, REFUSED, RESULT, UNCLEAR, is_one_run, outcome, read_beats

#: What must be none, as it is called in the table.
ZEROES = (
    "lost",
    "run twice",
    "unauthenticated runs",
    "run against what the client was told",
    "ledger and audit log disagree",
    "service died by itself",
    "lines of exceptions in the service",
    "VMs not served at the end",
    "leaked processes",
    "leaked files",
    "leaked fds",
)
_MARK = re.compile(r"echo ([a-z]+-[0-9]+) ")


@dataclasses.dataclass
class Evidence:
    """What is known of a soak.

    Attributes:
        started: dict of key to (vm, kind): the clients.
        ended: dict of key to Ended.
        killed: set of keys whose client did not live to be told.
        replayed: set of marks of requests that the VM's key did sign, and that attackers showed again and again.
        attacks: int, requests that attackers made.
        marks: list of (mark, id) that commands left in dom0.
        ran: list of lines that commands left in dom0 as they went on.
        ledger: list of (vm, id, state, status, exit).
        audit: list of dict, the lines of the audit log.
        audit_problems: list of sentences on a log that is not whole.
        deaths: list of sentences, ends of the service that nobody wanted.
        complaints: list of lines that the service wrote to its stderr.
        unserved: list of VMs that were not served at the end.
        processes, files, fds: lists of what is there and was not before.
        peak_memory: int, bytes, of all in dom0.
    """

    started: dict = dataclasses.field(default_factory=dict)
    ended: dict = dataclasses.field(default_factory=dict)
    killed: set = dataclasses.field(default_factory=set)
    replayed: set = dataclasses.field(default_factory=set)
    attacks: int = 0
    marks: list = dataclasses.field(default_factory=list)
    ran: list = dataclasses.field(default_factory=list)
    ledger: list = dataclasses.field(default_factory=list)
    audit: list = dataclasses.field(default_factory=list)
    audit_problems: list = dataclasses.field(default_factory=list)
    deaths: list = dataclasses.field(default_factory=list)
    complaints: list = dataclasses.field(default_factory=list)
    unserved: list = dataclasses.field(default_factory=list)
    processes: list = dataclasses.field(default_factory=list)
    files: list = dataclasses.field(default_factory=list)
    fds: list = dataclasses.field(default_factory=list)
    peak_memory: int = 0


def judge(evidence):
    """Count.

    Args:
        evidence: Evidence.

    Returns:
        (dict, dict): rows of the table, name to number, in their order; and for each of :data:`ZEROES` a list of sentences.
    """
    beats = read_beats(evidence.ran)
    ids = collections.defaultdict(set)
    for mark, cid in evidence.marks:
        ids[mark].add(cid)
    outcomes = collections.Counter(dict.fromkeys((RESULT, REFUSED, INTERRUPTED, FAILED), 0))
    problems = {name: [] for name in ZEROES}
    for key in evidence.started:
        if key in evidence.killed:
            continue
        found, problem = _end_of(evidence.ended.get(key))
        if problem:
            problems["lost"].append(f"{key}: {problem}")
        else:
            outcomes[found] += 1
            problems["run against what the client was told"] += _against(key, evidence.ended[key], found, ids[key], beats)
    problems["run twice"] += _twice(evidence.marks, beats)
    problems["unauthenticated runs"] += _unauthenticated(evidence, ids)
    problems["ledger and audit log disagree"] += evidence.audit_problems + _disagreements(evidence, beats)
    problems["service died by itself"] += evidence.deaths
    problems["lines of exceptions in the service"] += evidence.complaints
    problems["VMs not served at the end"] += evidence.unserved
    for name in ("processes", "files", "fds"):
        problems[f"leaked {name}"] += getattr(evidence, name)
    rows = {
        "commands submitted": len(evidence.started),
        "results": outcomes[RESULT],
        "refused": outcomes[REFUSED],
        "interrupted": outcomes[INTERRUPTED],
        "ended, result not kept (disk full)": outcomes[FAILED],
        "client killed": len(evidence.killed),
        "attackers' requests": evidence.attacks,
        **{name: len(problems[name]) for name in ZEROES},
        "peak memory of dom0's processes, MiB": round(evidence.peak_memory / (1 << 20)),
    }
    return rows, problems


def _end_of(end):
    """What a client ended with, and what is wrong with that."""
    if end is None:
        return None, "its client never ended"
    found = outcome(end)
    if found == UNCLEAR:
        return None, f"neither result nor clear error: {end.code}, {end.err!r}"
    if found == RESULT and end.out != KINDS[end.kind][2]:
        return None, f"another output than its command's ({len(end.out)} characters)"
    return found, None


def _against(key, end, found, ids, beats):
    went_on = [at for cid in ids for _, at in beats.get(cid, [])]
    if found == RESULT and not ids:
        return [f"{key} has a result and never ran"]
    if end.cid and ids - {end.cid}:
        return [f"{key} was sent as {end.cid} and ran as {', '.join(sorted(ids))}"]
    if found == REFUSED and ids:
        return [f"{key} was told that it does not run, and ran: {end.err!r}"]
    if any(at > end.at for at in went_on):
        return [f"{key} went on after its client was told: {end.err!r}"]
    return []


def _twice(marks, beats):
    by_mark = collections.Counter(mark for mark, _ in marks)
    by_id = collections.Counter(cid for _, cid in set(map(tuple, marks)))
    return [
        *(f"{mark} ran {count} times" for mark, count in by_mark.items() if count > 1),
        *(f"the id {cid} ran as {count} commands" for cid, count in by_id.items() if count > 1),
        *(f"{cid} went on as more than one run: {found}" for cid, found in beats.items() if not is_one_run(found)),
    ]


def _unauthenticated(evidence, ids):
    known = set(evidence.started) | evidence.replayed
    found = [f"{mark} ran, and nobody of ours signed it" for mark in ids if mark not in known]
    accepted = {line["id"]: line.get("command", "") for line in evidence.audit if line.get("what") == "accepted"}
    for line in evidence.audit:
        if line.get("what") == "run":
            mark = _MARK.match(accepted.get(line["id"], ""))
            if mark is None or mark.group(1) not in known:
                found.append(f"dom0's log has run {line['id']}, which none of ours signed: {accepted.get(line['id'])!r}")
    return found


def _disagreements(evidence, beats):
    """Where ledger and audit log do not say the same, or not what the commands themselves left."""
    lines = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in evidence.audit:
        lines[line.get("vm"), line.get("id")][line.get("what")].append(line)
    rows = {(vm, cid): (state, status, code) for vm, cid, state, status, code in evidence.ledger}
    found = []
    for (vm, cid), (state, status, code) in rows.items():
        whats = lines.get((vm, cid), {})
        if "accepted" not in whats:
            found.append(f"{cid} is in the ledger, and the log does not have it as accepted")
        if status and (status, code) not in [(line.get("status"), line.get("exit")) for line in whats.get("ended", [])]:
            found.append(f"{cid} ended with {status} ({code}) in the ledger, and not in the log")
        if state != "delivered":
            found.append(f"{cid} is {state} in the ledger, and nothing is on its way any more")
    for (vm, cid), whats in lines.items():
        if (whats.get("run") or whats.get("ended")) and (vm, cid) not in rows:
            found.append(f"{cid} is in the log as run or ended, and not in the ledger")
        if len(whats.get("run", [])) > 1:
            found.append(f"{cid} is in the log as run {len(whats['run'])} times")
    logged = {cid for (_, cid), whats in lines.items() if whats.get("run")}
    ran = set(beats) | {cid for _, cid in evidence.marks}
    return found + [f"{cid} ran, and the log does not have it" for cid in sorted(ran - logged)]
