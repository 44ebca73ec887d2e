# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM may run, from pillar to its refusal, by the service as a user has it."""

import datetime
import json
import os

import pytest
from qubes_sim.stand import Stand

POLICY = {"allow": ["observe", {"manage": "mine"}, ["qvm-prefs", "work", "memory", "*"]], "deny": [["qvm-kill", "@tag:mine"]]}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine on which dev has rules, and work may run anything."""
    with Stand(os.path.join(str(tmp_path_factory.mktemp("policy")), "sim")) as stand:
        stand.set_up(_pillar(POLICY))
        stand.create("build")
        stand.dom0("qvm-tags", "build", "add", "mine", check=True)
        stand.wait_served("work", "dev")
        yield stand


def _pillar(policy, **more):
    return {"vms": {"work": {}, "dev": {"policy": policy, **more}}, "engine": {"discover_interval": 1, "poll_wait": 5}}


def _apply(machine, policy, **more):
    machine.set_pillar(_pillar(policy, **more))
    states = machine.salt("state.apply", "qvm-remote")
    return next(ret["comment"] for key, ret in states.items() if "qvm-remote-vm-dev" in key)


def _remote(machine, *words, data=None):
    done = machine.vm("dev", "qvm-remote", "-q", *words, data=data)
    return done.returncode, done.stdout + done.stderr


def test_what_the_rules_allow_runs(machine):
    code, text = _remote(machine, "qvm-ls --raw-list")
    assert (code, b"work\n" in text) == (0, True)
    assert _remote(machine, "qvm-prefs work memory 444") == (0, b"")
    assert _remote(machine, "--exec", "qvm-prefs", "work", "memory") == (0, b"444\n")
    assert _remote(machine, "qvm-start build") == (0, b"")
    assert machine.dom0("qvm-check", "--running", "build").returncode == 0
    assert _remote(machine, "qvm-shutdown", "--wait", "build") == (0, b"")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("qvm-start work", b"no rule allows it"),
        ("qvm-kill build", b"the rule 'deny: qvm-kill @tag:mine' forbids it"),
        ("qvm-ls; touch /tmp/policy-broken", b"no shell"),
        ("qvm-ls $(touch /tmp/policy-broken)", b"no shell"),
        ("qvm-ls | tee /tmp/policy-broken", b"no shell"),
        ("touch /tmp/policy-broken", b"no rule allows it"),
    ],
)
def test_all_else_is_refused_and_says_why(machine, line, reason):
    code, text = _remote(machine, line)
    assert code == 125
    assert reason in text
    assert machine.dom0("test", "-e", "/tmp/policy-broken").returncode == 1


def test_a_script_is_refused(machine):
    code, text = _remote(machine, data=b"qvm-ls\n")
    assert (code, b"no scripts" in text) == (125, True)


def test_a_tag_that_is_taken_away_takes_the_right_with_it(machine):
    machine.dom0("qvm-tags", "build", "del", "mine", check=True)
    code, text = _remote(machine, "qvm-start build")
    assert (code, b"no rule allows it" in text) == (125, True)
    machine.dom0("qvm-tags", "build", "add", "mine", check=True)


def test_another_vm_is_not_touched_by_it_and_all_is_said(machine):
    assert machine.vm("work", "qvm-remote", "-n", "echo $((1 + 1)) | cat").stdout == b"2\n"
    config = "/etc/qubes/remote"
    done = machine.dom0("salt-call", "--local", "-c", config, "--out=json", "qvm_remote.explain", "dev", "qvm-kill build", check=True)
    shown = json.loads(done.stdout)["local"]
    assert (shown["allowed"], shown["rule"], shown["words"]) == (False, "deny: qvm-kill @tag:mine", ["qvm-kill", "build"])
    status = json.loads(machine.dom0("salt-call", "--local", "-c", config, "--out=json", "qvm_remote.status", check=True).stdout)["local"]
    assert status["keys"]["work"]["access"] == "may run anything in dom0, as root (policy: full)"
    assert status["keys"]["dev"]["access"] == "may run what 3 rules allow and 1 do not forbid"


def test_access_for_a_time_ends_and_a_new_policy_is_taken_over(machine):
    ahead = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
    comment = _apply(machine, "full", until=ahead.isoformat())
    assert "may run anything in dom0, as root (policy: full), until" in comment
    machine.wait_served("dev")
    assert _remote(machine, "-n", "echo a | cat") == (0, b"a\n")
    behind = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=1)
    assert "which ended" in _apply(machine, "full", until=behind.isoformat())
    code, text = _remote(machine, "-n", "echo a")
    assert (code, b"access to dom0 ended at" in text) == (125, True)
    _apply(machine, "none")
    code, text = _remote(machine, "-n", "echo a")
    assert (code, b"lets this qube run nothing" in text) == (125, True)
