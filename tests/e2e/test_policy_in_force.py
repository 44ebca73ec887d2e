# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM may run, from pillar to its refusal, by the service as a user has it."""

import datetime
import json
import os
import time

import pytest
from qubes_sim.stand import Stand

#: Answers as the file beside it says, and keeps what it was asked.
_HELPER = "#!/bin/sh\ncat > /tmp/asked\nread answer < /tmp/answer\necho $answer\n[ $answer = yes ]\n"
POLICY = {
    "allow": ["observe", {"manage": "mine"}, ["qvm-prefs", "work", "memory", "*"]],
    "ask": [["qvm-remove", "--force", "@tag:mine"]],
    "deny": [["qvm-kill", "@tag:mine"]],
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine on which dev has rules, and work may run anything."""
    with Stand(os.path.join(str(tmp_path_factory.mktemp("policy")), "sim"), warm=True) as stand:
        stand.set_up(_pillar(POLICY))
        stand.create("build")
        stand.dom0("sh", "-c", "cat > /tmp/helper && chmod 700 /tmp/helper", data=_HELPER.encode(), check=True)
        stand.dom0("sh", "-c", "cat > /tmp/tell && chmod 700 /tmp/tell", data=b"#!/bin/sh\ncat > /tmp/told.new && mv /tmp/told.new /tmp/told\n", check=True)
        stand.dom0("qvm-tags", "build", "add", "mine", check=True)
        stand.wait_served("work", "dev")
        yield stand


def _pillar(policy, **more):
    ask = {"helper": "/tmp/helper", "timeout": 20}
    notify = {"refusals": True, "helper": "/tmp/tell"}
    return {"ask": ask, "notify": notify, "vms": {"work": {}, "dev": {"policy": policy, **more}}, "engine": {"discover_interval": 1, "poll_wait": 5}}


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
    assert _remote(machine, "qvm-shutdown", "build") == (0, b"")
    machine.dom0("qvm-shutdown", "--wait", "build", check=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("qvm-start work", b"no rule allows it"),
        ("qvm-kill build", b"the rule 'deny: qvm-kill @tag:mine' forbids it"),
        # It kills what does not shut down in time.
        ("qvm-shutdown --wait build", b"the rule 'deny: qvm-kill @tag:mine' forbids it"),
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


def test_the_user_is_told_of_a_refusal_with_nothing_of_the_command(machine):
    # Of those that the tests before have had, or, if they were not asked for, of this.
    assert _remote(machine, "touch /tmp/policy-broken")[0] == 125
    deadline = time.monotonic() + 20
    while machine.dom0("test", "-e", "/tmp/told").returncode:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    told = machine.dom0("cat", "/tmp/told").stdout.decode()
    assert told.startswith("qvm-remote: dev was refused\ndom0 refused what dev asked for: policy. ")
    assert "touch" not in told


def test_a_script_runs_if_each_of_its_lines_may_and_not_at_all_if_one_may_not(machine):
    code, text = _remote(machine, data=b"# what runs\nqvm-ls --raw-list\nqvm-prefs work memory\n")
    assert (code, b"work\n444\n" in text) == (0, True)
    code, text = _remote(machine, data=b"qvm-prefs work memory 400\nqvm-prefs dev memory 400\n")
    assert (code, b"line 2: no rule allows it" in text) == (125, True)
    assert _remote(machine, "qvm-prefs work memory") == (0, b"444\n")


def _answer(machine, word):
    machine.dom0("sh", "-c", f"echo {word} > /tmp/answer", check=True)


def test_what_the_user_is_asked_about_runs_after_a_yes_alone_and_what_was_asked_is_all_of_it(machine):
    machine.create("old")
    machine.dom0("qvm-tags", "old", "add", "mine", check=True)
    # Who has a tag is looked up once a second at most.
    time.sleep(1.5)
    _answer(machine, "no")
    code, text = _remote(machine, "qvm-remove --force old")
    assert (code, b"was asked and said no" in text) == (125, True)
    assert machine.dom0("qvm-check", "old").returncode == 0
    code, text = _remote(machine, "qvm-remove --force old")
    assert (code, b"dom0 asks again in" in text) == (125, True)
    time.sleep(5)
    _answer(machine, "yes")
    assert _remote(machine, data=b"qvm-ls --raw-list\nqvm-remove --force old\nqvm-ls --raw-list\n")[0] == 0
    assert machine.dom0("qvm-check", "old").returncode == 1
    asked = machine.dom0("cat", "/tmp/asked").stdout.decode()
    assert "The qube dev asks dom0 to run, as root, these 3 commands" in asked
    assert "    2  qvm-remove --force old\n" in asked


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
    assert status["keys"]["dev"]["access"] == "may run what 3 rules allow and 1 do not forbid, as root; dom0's user is asked about what 1 others name"


def test_commands_run_as_the_user_of_dom0_that_pillar_names(machine):
    assert "may run anything in dom0, as user (policy: full)" in _apply(machine, "full", run_as="user")
    machine.wait_served("dev")
    # Neither a key nor root's services can be asked for by somebody who isn't root.
    machine.dom0("mkdir", "-p", "/run/dbus", check=True)
    code, text = _remote(machine, "-n", "id -un; stat -c %U .; ls /etc/qubes/remote.d /run/dbus; echo $HOME")
    assert (code, text.split(b"\n")[:2]) == (0, [b"user", b"user"])
    assert text.count(b"Permission denied") == 2 and b"/home/user\n" in text
    assert machine.vm("work", "qvm-remote", "-q", "-n", "id -un").stdout == b"root\n"
    assert "as nobody-there (but nothing runs: dom0 has no user nobody-there)" in _apply(machine, "full", run_as="nobody-there")
    machine.wait_served("dev")
    code, text = _remote(machine, "-n", "id")
    assert (code, b"dom0 has no user nobody-there; in dom0's pillar, run_as says" in text) == (125, True)


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


def test_a_qube_made_anew_under_a_name_does_not_get_what_the_one_before_had(machine):
    _apply(machine, "full")
    assert _remote(machine, "-n", "echo a") == (0, b"a\n")
    key = machine.vm("dev", "cat", "/home/user/.qvm-remote/auth.key").stdout
    machine.dom0("qvm-shutdown", "--wait", "dev", check=True)
    machine.dom0("qvm-remove", "--force", "dev", check=True)
    machine.create("dev")
    machine.dom0("qvm-start", "dev", check=True)
    # Whoever has the old one's disk has its key, too.
    machine.vm("dev", "sh", "-c", "mkdir -p -m 700 ~/.qvm-remote && umask 077 && cat > ~/.qvm-remote/auth.key", data=key)
    code, text = _remote(machine, "-n", "echo a")
    assert (code, b"another qube than the one that got access" in text) == (125, True)
    assert "another qube than the one that had access under this name, which lost it" in _apply(machine, "full")
    assert machine.vm("dev", "cat", "/home/user/.qvm-remote/auth.key").stdout != key
    # No id of the second in which dom0 forgot the one before is taken any more.
    time.sleep(1)
    assert _remote(machine, "-n", "echo a") == (0, b"a\n")


def test_a_renamed_qube_has_access_only_as_another_one(machine):
    _apply(machine, "full")
    base, key = "/home/user/.qvm-remote", machine.vm("dev", "cat", "/home/user/.qvm-remote/auth.key").stdout
    # As Qubes OS does it: a clone under the new name, and the one under the old name is removed.
    machine.create("moved")
    machine.dom0("qvm-start", "moved", check=True)
    kept = machine.vm("dev", "tar", "-c", "-C", "/home/user", ".qvm-remote/auth.key", check=True).stdout
    machine.vm("moved", "sh", "-c", f"umask 077 && tar -x -C /home/user && chmod 700 {base}", data=kept, check=True)
    machine.dom0("qvm-shutdown", "--wait", "dev", check=True)
    machine.dom0("qvm-remove", "--force", "dev", check=True)
    # Nobody takes its key for one: there is none under its name, and no session.
    done = machine.vm("moved", "qvm-remote", "ping", "-t", "3")
    assert (done.returncode, machine.dom0("pgrep", "-f", "qvm-run .* moved ").returncode) == (125, 1), done.stderr
    pillar = _pillar("full")
    pillar["vms"]["moved"] = pillar["vms"].pop("dev")
    machine.set_pillar(pillar)
    machine.salt("state.apply", "qvm-remote")
    machine.wait_served("moved")
    own = machine.vm("moved", "cat", f"{base}/auth.key").stdout
    assert own != key
    assert machine.vm("moved", "qvm-remote", "-n", "echo a").stdout == b"a\n"
    # The old name's key is no key of the new one's.
    machine.vm("moved", "sh", "-c", f"cat > {base}/auth.key", data=key, check=True)
    done = machine.vm("moved", "qvm-remote", "-n", "echo a")
    assert (done.returncode, done.stdout, b"the token does not fit" in done.stderr) == (125, b"", True), done.stderr
