# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark runs through, in its short form, and leaves no row out. What the figures are is no matter here."""

import json
import math
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_SSH = ("ssh localhost", "ssh localhost, ControlMaster")
_SPAWN, _QVM_RUN, _SESSION = "spawn in dom0", "qvm-run (dom0 to VM)", "qvm-remote, session"
_POLLED = ("qvm-remote, agentless", "qvm-remote, agentless, polling each 1 s")
_FAST = (_SPAWN, _QVM_RUN, *_SSH, _SESSION)
_IDLE = (
    *(f"service (minion, engine, sessions): {what}" for what in ("CPU", "processes and threads started", "processes", "memory (PSS)")),
    "of that, programs of sessions",
    "of that, the engine without Salt's minion and its sessions",
    *(f"agent in one VM: {what}" for what in ("CPU", "processes and threads started", "memory (PSS)")),
)
_RATES = (
    "plain loop in dom0: fork, exec true, fsync",
    "requests from one process in each VM (library)",
    "qvm-remote processes, 8 at a time in each VM",
)
_STAGES = (
    "client starts, signs and queues (start to 'sent')",
    "wake, fetch, verify, claim ('sent' to event accepted)",
    "waits its turn (event accepted to running)",
    "sandbox (event running to done)",
    "result to the VM (event done to delivered)",
    "client checks, prints, ends (event delivered to exit)",
    "the whole, with -v",
)
#: Of the short form: 3 VMs for many, 5 for most.
EXPECTED = {
    "engine start to first result": ("systemctl start to the end of qvm-remote true",),
    "round trip of true": (*_FAST, *_POLLED, "python3 -IS -c pass (in the VM)", "qvm-remote --version (in the VM)"),
    "the same, with tools that cost what the real ones do": (_SPAWN, _QVM_RUN, _SESSION, *_POLLED),
    "qvm-ls": (_SPAWN, _SESSION, *_POLLED),
    "10 MiB out": (*_FAST, *_POLLED),
    "script of 1 MiB in": (*_FAST, *_POLLED),
    "8 clients at once, each": _FAST,
    "8 clients at once, the last": _FAST,
    "where a round trip's time goes": _STAGES,
    "idle with 1 running VM": _IDLE,
    "idle with 1 running VM and 5 halted ones": _IDLE,
    "round trip of true, 1 VM connected": (_SPAWN, _SESSION),
    "commands a second from 1 VM": (*_RATES, *(f"{mode}, 8 at a time" for mode in _SSH)),
    "commands a second from 3 VMs": _RATES,
    "idle with 3 running VMs": _IDLE,
    "idle with 3 running VMs, transport: qubesadmin": _IDLE,
    "idle with 5 running VMs": _IDLE,
    "round trip of true, 5 VMs connected": (_SPAWN, _SESSION),
}
#: What may be nothing at all, when nothing is done or when it is too short to be seen.
_MAY_BE_ZERO = ("idle ", "where a round")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the short form wrote."""
    return _run(tmp_path_factory.mktemp("bench"))


def _run(folder, *options):
    path = folder / "result.json"
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "bench", "run.py"), "--short", "--json", str(path), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    for row in found["rows"]:
        assert row["mode"] in done.stdout
    return found


def test_a_scenario_runs_by_itself(tmp_path):
    found = _run(tmp_path, "--only", "clients")
    assert {row["scenario"] for row in found["rows"]} == {name for name in EXPECTED if "clients" in name}
    assert all(row.get("value", row.get("median")) > 0 for row in found["rows"])


@pytest.mark.long
def test_every_row_is_there_and_no_other(result):
    expected = {(scenario, mode) for scenario, modes in EXPECTED.items() for mode in modes}
    if any(note.startswith("no rows of ssh: ") for note in result["notes"]):
        expected = {(scenario, mode) for scenario, mode in expected if not mode.startswith("ssh")}
    assert {(row["scenario"], row["mode"]) for row in result["rows"]} == expected
    assert len(result["rows"]) == len(expected)


@pytest.mark.long
def test_all_figures_are_finite_positive_numbers(result):
    for row in result["rows"]:
        for name in ("median", "p99", "ratio", "value", "n"):
            figure = row.get(name, 1)
            assert math.isfinite(figure), row
            assert figure > 0 or (figure == 0 and row["scenario"].startswith(_MAY_BE_ZERO)), row


@pytest.mark.long
def test_every_goal_is_judged_and_the_machine_described(result):
    has_ssh = not any(note.startswith("no rows of ssh: ") for note in result["notes"])
    assert len(result["goals"]) == (9 if has_ssh else 7)
    for goal in result["goals"]:
        assert math.isfinite(goal["figure"])
        assert goal["reached"] == (goal["figure"] >= goal["limit"] if goal["at_least"] else goal["figure"] <= goal["limit"])
    assert {"cpu", "cores", "kernel", "python_of_salt", "python_of_client", "salt"} <= set(result["machine"])
