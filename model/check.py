#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Check the model: what the design promises holds in every order of events within the budgets, and each mutation breaks the promise
that it should. Prints one table; exits with 1 when a line is not as expected. Standard library, spin and a C compiler.

    check.py             all of it
    check.py --bounded   what holds, with smaller budgets, and the mutations
"""

import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

_MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "qvm_remote.pml")
#: A search that takes longer is an error, seconds.
_TIME_MAX = 600
#: The model's assertions, by what each is there for.
PROMISES = {
    "runs twice": r"runs\[c\]<=1",
    "runs what nobody signed": r"spool_body\[c\]==",
    "takes a stale request in": r"fresh\[",
    "begins after it was cancelled": r"dropped\[c\]",
    "runs though refused": r"told\[c\](!=3|==3)",
    "runs though its client said not": r"said_did_not_run",
    "a result in place of another": r"told\[c\]!=4",
    "told is not what is recorded": r"ledger\[c\]>=3",
    "a client waits for ever": r"client\[c\]>=5",
    "a row never comes to rest": r"ledger\[c\]==4",
    "it goes on for ever": r"non-progress cycle",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One search.

    Attributes:
        what: str, for the table.
        switches: str, of the model.
        breaks: str, the promise that must be broken (a key of :data:`PROMISES`); empty when all must hold.
        bounded: str, switches for the bounded form; None to leave the search out there.
    """

    what: str
    switches: str
    breaks: str = ""
    bounded: str = None


_LIFE = "-DCRASHES=2 -DBREAKS=2 -DTICKS=1 -DPRUNES=1 -DINTERRUPTS -DCLIENT_DIES"
_LIFE_BOUNDED = "-DCRASHES=1 -DBREAKS=1 -DINTERRUPTS"
_ATTACK = "-DTICKS=1 -DPRUNES=1 -DATTACKS=2"
#: The design. Every promise holds.
HOLDS = (
    Check("one command; engine, session, client may end at each step", _LIFE, bounded=_LIFE_BOUNDED),
    Check(
        "one command; the same, and power cuts",
        "-DCRASHES=1 -DBREAKS=1 -DTICKS=1 -DPRUNES=1 -DINTERRUPTS -DCLIENT_DIES -DPOWERCUTS=1",
        bounded=f"{_LIFE_BOUNDED} -DPOWERCUTS=1",
    ),
    Check("one command; the same, and dom0's disk is full twice", "-DCRASHES=1 -DBREAKS=1 -DINTERRUPTS -DCLIENT_DIES -DFILLS=2"),
    Check("two commands; the engine may end at each step", "-DNC=2 -DCRASHES=1", bounded="-DNC=2"),
    Check("two commands; sessions break", "-DNC=2 -DBREAKS=1"),
    Check("the VM's disk and agent are somebody else's, but not its key", "-DTICKS=1 -DPRUNES=1 -DATTACKS=3", bounded=_ATTACK),
    Check("the VM's disk and agent, and the engine may end", f"{_ATTACK} -DCRASHES=1"),
    Check("the VM's disk and agent, and sessions break", "-DATTACKS=2 -DBREAKS=1"),
    Check("the VM's disk and agent, with the token of another command", "-DNC=2 -DSECOND_DIES -DATTACKS=1"),
)
#: One thing is taken away. A promise must break, or the model shows nothing.
MUTATIONS = (
    Check("no claim in the ledger", "-DATTACKS=2 -DNO_CLAIM", "runs twice"),
    Check("a claim that is not on disk, and a power cut", "-DBREAKS=1 -DINTERRUPTS -DCLIENT_DIES -DPOWERCUTS=1 -DCLAIM_NOT_SYNCED", "runs twice"),
    Check("the body is not in the MAC", f"{_ATTACK} -DBODY_NOT_IN_MAC", "runs what nobody signed"),
    Check("recover() runs again", "-DCRASHES=1 -DRECOVER_RUNS_AGAIN", "runs twice"),
    Check("a result is delivered before finish() has recorded it", "-DCRASHES=1 -DDELIVERS_BEFORE_FINISH", "told is not what is recorded"),
    Check("no check for freshness", f"{_ATTACK} -DNO_FRESHNESS", "takes a stale request in"),
    Check("no check for freshness, and the ledger is pruned", f"{_ATTACK} -DNO_FRESHNESS -DSTALE_IS_ALLOWED", "runs twice"),
    # How the code once was.
    Check("a poll is sent while a result waits and its request still lies there", "-DPOLLS_BEFORE_DELIVERY", "a result in place of another"),
    Check("a command that is listed with its own cancel is taken in", "-DINTERRUPTS -DCANCELLED_ITEMS_ARE_TAKEN", "begins after it was cancelled"),
    Check("the client says 'did not run' when it has no session", "-DBREAKS=1 -DSAYS_DID_NOT_RUN", "runs though its client said not"),
    Check("a refusal of what is not authentic is signed", f"{_ATTACK} -DSIGNS_ALL_REFUSALS", "runs though refused"),
)


def _stuck(what, switch, breaks, hold=HOLDS[0]):
    """Take one thing away in the very search that says that every client has its end.

    Args:
        what: str.
        switch: str, the mutation.
        breaks: str, the promise.
        hold: Check, the search.

    Returns:
        Check.
    """
    # In most of these a row stays as well, and a search ends at the first that it finds.
    switch = f"{switch} -DROWS_ARE_NOT_JUDGED" if breaks == "a client waits for ever" else switch
    return Check(what, f"{hold.switches} {switch}", breaks, f"{hold.bounded} {switch}" if hold.bounded else None)


#: A result is lost, or something hangs. Without these "every client has its end" could hold because no search ever asks.
STUCK = (
    # How the code once was.
    _stuck("_open() replaces the outbox by what expire() saw before", "-DOPEN_REPLACES_OUTBOX", "a client waits for ever"),
    _stuck("_open() does not look for results that wait", "-DOPEN_LOOKS_FOR_NOTHING", "a client waits for ever"),
    _stuck("recover() leaves what it finds as it is", "-DRECOVER_LEAVES_ROWS", "a client waits for ever"),
    _stuck("a result is closed before it is sent", "-DCLOSES_BEFORE_SENDING", "a client waits for ever"),
    _stuck("what is cancelled while it waits stays in the ledger", "-DLEDGER_IS_NOT_TOLD_OF_CANCELS", "a row never comes to rest"),
    _stuck("the agent does not put a cancel away that dom0 is done with", "-DCANCELS_STAY", "it goes on for ever"),
    # In each search, so that none of them is one that can't fail.
    *(_stuck(f"nobody hears of an end; {hold.what}", "-DNOBODY_HEARS_OF_THE_END", "a client waits for ever", hold) for hold in HOLDS),
)
#: What the code does not promise though one may think so. See README.rst beside this.
NOT_PROMISED = (Check("a refusal for want of room, and the request shown again", "-DATTACKS=2 -DFILLS=1 -DREFUSES_FOR_GOOD", "runs though refused"),)
#: What the design rests on: without it, it does not hold.
ASSUMED = (Check("dom0's clock goes back by more than ledger_keep_days", f"{_ATTACK} -DCLOCK_BACK=1", "runs twice"),)


def run(check, switches):
    """Search.

    Args:
        check: Check.
        switches: str.

    Returns:
        (bool, str, str, float): whether it is as expected, what was found, the number of states, seconds.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # A mutation is found at once: what takes time there is the compiler.
        level = "-O0" if check.breaks else "-O1"
        # Cycles, besides assertions: nothing in the model is marked as progress, so that whatever could go on for ever is found.
        cycles = check.breaks in ("", "it goes on for ever")
        steps = (
            ["spin", "-a", *switches.split(), _MODEL],
            ["gcc", level, "-w", "-DNP" if cycles else "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"],
            ["./pan", "-m100000", *(["-l"] if cycles else [])],
        )
        for step in steps:
            try:
                done = subprocess.run(step, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIME_MAX, check=False)
            except subprocess.TimeoutExpired:
                return False, f"{step[0]} took more than {_TIME_MAX} s", "-", time.monotonic() - began
            if step[0] != "./pan" and done.returncode:
                return False, f"{step[0]} failed: {(done.stdout + done.stderr).strip()[:200]}", "-", time.monotonic() - began
    found = _found(done.stdout)
    states = re.search(r"(\d+) states, stored", done.stdout)
    return found == (check.breaks or "holds"), found, states.group(1) if states else "-", time.monotonic() - began


def _found(output):
    if "errors: 0" in output and "Search not completed" not in output and "max search depth too small" not in output:
        return "holds"
    for line in output.splitlines():
        if line.startswith("pan:") and ("assertion violated" in line or "non-progress cycle" in line):
            # The promise whose assertion this is; the first that matches, since they are told apart by what they begin with.
            return next((name for name, pattern in PROMISES.items() if re.search(pattern, line)), line)
        if line.startswith("pan:") and ("error" in line or "invalid" in line):
            return line
    return f"no answer: {output.strip()[:200]}"


def main(argv):
    """Check all, print the table.

    Args:
        argv: list of str.

    Returns:
        int, the exit code.
    """
    if argv not in ([], ["--bounded"]):
        print("use: check.py [--bounded]", file=sys.stderr)
        return 2
    missing = [program for program in ("spin", "gcc") if not shutil.which(program)]
    if missing:
        print(f"error: {' and '.join(missing)} not found; 'make model' installs what is missing", file=sys.stderr)
        return 2
    groups = (("it holds", HOLDS), ("a mutation is caught", MUTATIONS + STUCK), ("not promised", NOT_PROMISED), ("assumed", ASSUMED))
    todo = []
    for group, checks in groups:
        for check in checks:
            # In the bounded form, what holds and what each mutation breaks, but for the searches that have none.
            if argv and (group not in ("it holds", "a mutation is caught") or (check not in MUTATIONS and check.bounded is None)):
                continue
            todo.append((group, check, check.bounded if argv and check.bounded else check.switches))
    good = True
    print(f"{'':22}{'what':88}{'found':34}{'states':>9}{'s':>6}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for (group, check, _), (is_expected, found, states, took) in zip(todo, threads.map(lambda job: run(*job[1:]), todo)):
            good = good and is_expected
            verdict = found if is_expected else f"NOT AS EXPECTED: {found}"
            print(f"{group:22}{check.what:88}{verdict:34}{states:>9}{took:6.1f}", flush=True)
    print("all as expected" if good else "error: not all is as expected")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
