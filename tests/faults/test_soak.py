# SPDX-License-Identifier: GPL-2.0-or-later
"""The soak comes to its end with all zeroes, in its short form; and its judge finds what must not be."""

import os
import re
import subprocess
import sys

import pytest
from fault_stand import KINDS, Ended

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.append(os.path.join(ROOT, "soak"))

import judge  # noqa: E402
import plan  # noqa: E402

_ONE, _TWO, _THREE = (f"20261124-00000{number}-1-0badcafe" for number in (1, 2, 3))


def test_a_short_soak_finds_nothing_and_says_what_it_did():
    words = [sys.executable, os.path.join(ROOT, "soak", "run.py"), "--seconds", "20", "--seed", "7"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # No terminal, no progress.
    assert done.stderr == ""
    rows = dict(re.findall(r"^  (\S.*?) +(\d+)$", done.stdout, re.MULTILINE))
    assert {name: rows[f"{name} (0)"] for name in judge.ZEROES} == dict.fromkeys(judge.ZEROES, "0")
    ways = ("results", "refused", "interrupted", "ended, result not kept (disk full)", "client killed")
    assert sum(int(rows[way]) for way in ways) == int(rows["commands submitted"])
    assert int(rows["results"]) > 20
    assert all(int(rows[name]) > 0 for name in ("forged request", "signed request replayed", "attackers' requests"))
    assert int(rows["peak memory of dom0's processes, MiB"]) > 10
    assert done.stdout.startswith("make soak SECONDS=20 SEED=7\n")


def test_the_same_seed_makes_the_same_plan_and_every_plan_has_everything_in_it():
    def some(seed):
        steps = plan.steps(seed, ["work", "dev"])
        return [next(steps) for _ in range(500)]

    assert some(1) == some(1) != some(2)
    assert {step.name for step in some(3)} == {*plan.DISTURBANCES, *plan.ATTACKS}


def _line(what, cid, **more):
    return {"what": what, "vm": "work", "id": cid, **more}


def _evidence():
    """Of three clients: one has a result, one was refused, one interrupted; and of an attacker who showed a true request again."""

    def end(kind, code, err, cid, out=""):
        return Ended("work", kind, code, out, f"qvm-remote: sent {cid} (shell)\n{err}", 10.0, cid)

    accepted = [_line("accepted", cid, command=f"echo {mark} $QVM_REMOTE_ID >> x; ") for mark, cid in (("work-1", _ONE), ("work-3", _TWO), ("replayed-1", _THREE))]
    return judge.Evidence(
        started={"work-1": ("work", "short"), "work-2": ("work", "short"), "work-3": ("work", "beats"), "work-4": ("work", "beats")},
        ended={
            "work-1": end("short", 7, "", _ONE, KINDS["short"][2]),
            "work-2": end("short", 125, "qvm-remote: error: dom0 refused it\n", "20261124-000009-1-0badcafe"),
            "work-3": end("beats", 125, "qvm-remote: interrupted: the service was stopped\n", _TWO),
        },
        killed={"work-4"},
        replayed={"replayed-1"},
        attacks=3,
        marks=[["work-1", _ONE], ["work-3", _TWO], ["replayed-1", _THREE]],
        ran=[f"{_ONE} 1 5.0", f"{_TWO} 1 6.0", f"{_TWO} 2 7.0"],
        ledger=[["work", _ONE, "delivered", "done", 7], ["work", _TWO, "delivered", "interrupted", 125], ["work", _THREE, "delivered", "done", 0]],
        audit=[
            *accepted,
            *(_line("run", cid) for cid in (_ONE, _TWO, _THREE)),
            _line("ended", _ONE, status="done", exit=7),
            _line("ended", _TWO, status="interrupted", exit=125),
            _line("ended", _THREE, status="done", exit=0),
        ],
    )


def _found(evidence):
    rows, problems = judge.judge(evidence)
    assert {name: rows[name] for name in judge.ZEROES} == {name: len(told) for name, told in problems.items()}
    return rows, {name: told for name, told in problems.items() if told}


def test_the_judge_counts_and_finds_nothing_in_good_evidence():
    rows, found = _found(_evidence())
    assert found == {}
    assert [rows[name] for name in ("commands submitted", "results", "refused", "interrupted", "client killed")] == [4, 1, 1, 1, 1]


def _never_ended(evidence):
    del evidence.ended["work-2"]


def _said_nothing(evidence):
    evidence.ended["work-2"] = evidence.ended["work-2"]._replace(err=f"qvm-remote: sent {_THREE} (shell)\n")


def _nobody_knows(evidence):
    evidence.ended["work-2"] = evidence.ended["work-2"]._replace(err="qvm-remote: error: the command may have run\n")


def _other_output(evidence):
    evidence.ended["work-1"] = evidence.ended["work-1"]._replace(out="don")


def _mark_twice(evidence):
    evidence.marks.append(["replayed-1", _THREE])


def _went_on_twice(evidence):
    evidence.ran.append(f"{_ONE} 1 5.5")


def _under_another_id(evidence):
    evidence.marks.append(["work-3", _ONE])


def _forged_mark(evidence):
    evidence.marks.append(["forged-1", _THREE])


def _forged_in_the_log(evidence):
    evidence.audit[2]["command"] = "poweroff"


def _refused_and_ran(evidence):
    evidence.marks[0][0] = "work-2"
    evidence.audit[0]["command"] = "echo work-2 x"


def _went_on(evidence):
    evidence.ran.append(f"{_TWO} 3 11.0")


def _result_without_run(evidence):
    evidence.marks.pop(0)


def _not_in_the_ledger(evidence):
    evidence.ledger.pop()


def _not_in_the_log(evidence):
    evidence.audit = [line for line in evidence.audit if (line["what"], line["id"]) != ("ended", _ONE)]


def _log_is_cut(evidence):
    evidence.audit_problems.append("line 3 is missing")


@pytest.mark.parametrize(
    ("spoil", "row"),
    [
        *((spoil, "lost") for spoil in (_never_ended, _said_nothing, _nobody_knows, _other_output)),
        *((spoil, "run twice") for spoil in (_mark_twice, _went_on_twice, _under_another_id)),
        *((spoil, "unauthenticated runs") for spoil in (_forged_mark, _forged_in_the_log)),
        *((spoil, "run against what the client was told") for spoil in (_refused_and_ran, _went_on, _result_without_run)),
        *((spoil, "ledger and audit log disagree") for spoil in (_not_in_the_ledger, _not_in_the_log, _log_is_cut)),
        (lambda evidence: evidence.deaths.append("with 1"), "service died by itself"),
        (lambda evidence: evidence.complaints.append("Traceback"), "lines of exceptions in the service"),
        (lambda evidence: evidence.unserved.append("work"), "VMs not served at the end"),
        (lambda evidence: evidence.processes.append("sleep 600"), "leaked processes"),
        (lambda evidence: evidence.files.append("/tmp/x"), "leaked files"),
        (lambda evidence: evidence.fds.append("socket"), "leaked fds"),
    ],
)
def test_the_judge_finds_what_must_not_be(spoil, row):
    evidence = _evidence()
    spoil(evidence)
    assert row in _found(evidence)[1]
