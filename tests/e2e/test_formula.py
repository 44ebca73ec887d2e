# SPDX-License-Identifier: GPL-2.0-or-later
"""The formula as a user has it: pillar is written, states are applied by qubesctl, and dom0, templates and VMs follow.

One machine for all of it, from a dom0 that has nothing of qvm-remote but its files to one that has nothing of it again:
the tests are steps of that story and run in their order.
"""

import json
import os
import re
import secrets
import subprocess
import time

import pytest
from attackers import LIB
from pullrpc.package import CLIENT_PATHS, COMMAND_PATHS
from qubes_sim.stand import Stand

#: What is not looked at: Salt's own, what the simulator's systemctl knows, and the checkout that stands in for the installed formula.
_SALTS_OWN = "-path /srv/formulas/base -o -path /var/cache/salt -o -path /var/log/salt -o -path /run/salt -o -path /run/systemd/simulated -o -name __pycache__"
_PLACES = " ".join(("/etc /var /srv /root /run /home /rw /tmp /usr/local /usr/bin /usr/lib/qvm-remote", *COMMAND_PATHS[1:]))
_VM_PLACES = " ".join(("/home /rw /etc /var /usr/bin", *CLIENT_PATHS[1:]))
GIVEN = secrets.token_hex(32)


class Machine(Stand):
    """A machine that users' hands set up: pillar and qubesctl."""

    def apply(self, *words, sls="qvm-remote", **options):
        """Apply a state.

        Returns:
            dict of state id to its return.
        """
        answer = self.salt("state.apply", sls, *words, **options)
        return {key.split("_|-")[1]: value for key, value in answer.items()}

    def fail(self, sls="qvm-remote"):
        """Apply a state that has to fail.

        Returns:
            (dict of state id to its return, str: all that it printed).
        """
        done = self.dom0("qubesctl", "--out=json", "--retcode-passthrough", "state.apply", sls, timeout=180)
        assert done.returncode != 0
        return {key.split("_|-")[1]: value for key, value in json.loads(done.stdout)["local"].items()}, (done.stdout + done.stderr).decode()

    def listing(self, vm=None, times=True):
        """All files of a domain that a state could touch, with owner, mode, size and, on demand, time."""
        shown = "%p %y %m %u %l" + (" %s %T@" if times else "") + "\\n"
        # A folder's time changes with Salt's own files in it.
        script = f"find {_PLACES if vm is None else _VM_PLACES} \\( {_SALTS_OWN} \\) -prune -o -printf '{shown}' 2>/dev/null"
        done = self.dom0("sh", "-c", script) if vm is None else self.vm(vm, "sh", "-c", script, user="root")
        return [line for line in done.stdout.decode().splitlines() if not (times and line.split()[1] == "d")]

    def listing_at_rest(self):
        """All files of dom0, without times, once nothing of a command is kept there: that is a moment after its client has the result."""
        assert _until(lambda: self.dom0("find", "/var/lib/qvm-remote/spool", "-mindepth", "2").stdout == b"")
        return self.listing(times=False)

    def remote(self, *words, vm="work", **options):
        """Run qvm-remote in a VM."""
        return self.vm(vm, "qvm-remote", *words, **options)

    def called(self, function, *words):
        """How a call of such a function went."""
        return self.dom0("salt-call", "--local", "-c", "/etc/qubes/remote", "--out=json", "--log-level=quiet", f"qvm_remote.{function}", *words)

    def call(self, function, *words):
        """Call a function of the module with the service's settings."""
        done = self.called(function, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)["local"]

    def key(self, vm):
        """The key that a VM has."""
        return self.vm(vm, "cat", ".qvm-remote/auth.key").stdout.decode().strip()

    def dom0_key(self, vm):
        """The key that dom0 has for a VM."""
        return self.dom0("cat", f"/etc/qubes/remote.d/{vm}.key").stdout.decode().strip()


def _differences(before, after):
    return sorted(set(before) ^ set(after))


def _changed(states):
    return {name for name, ret in states.items() if ret["changes"]}


def _pillar(**more):
    vms = {"work": {"key": "generate"}, "dev": {"key": GIVEN}, **more.pop("vms", {})}
    return {"client": {"templates": ["debian-13"]}, "max_age": 60, "engine": {"discover_interval": 1, "poll_wait": 5}, "vms": vms, **more}


def _until(check, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """dom0 with Salt and the formula's files, a template, and VMs that were never told of qvm-remote."""
    with Machine(os.path.join(str(tmp_path_factory.mktemp("formula")), "sim"), vms=["work", "dev"], warm=True) as one:
        one.prepare(["debian-13"])
        for vm in ("work", "dev", "idle", "spare"):
            one.create(f"{vm}:debian-13")
        for vm in ("work", "dev"):
            one.start(vm)
        one.set_pillar(_pillar())
        one.salt("saltutil.sync_all")
        one.start("debian-13")
        one.before = {vm: one.listing(vm, times=False) for vm in (None, "debian-13")}
        one.shutdown("debian-13")
        yield one


def test_a_test_run_on_a_clean_machine_changes_nothing_and_predicts_what_the_apply_does(machine):
    before = {vm: machine.listing(vm) for vm in (None, "work", "dev")}
    predicted = machine.apply("test=True")
    for vm, lines in before.items():
        assert _differences(lines, machine.listing(vm)) == []
    assert {name for name, ret in predicted.items() if ret["result"] is None} == _changed(predicted)
    done = machine.apply()
    assert _changed(done) == _changed(predicted)
    assert {name: set(ret["changes"]) for name, ret in done.items()} == {name: set(ret["changes"]) for name, ret in predicted.items()}
    # The VMs were started before their template had the client.
    for vm in ("work", "dev"):
        machine.shutdown(vm)
        machine.start(vm)
    machine.wait_served("work", "dev")
    for vm in ("work", "dev"):
        assert machine.remote("hostname", vm=vm).stdout == b"dom0\n"
    # The engine served them without an agent at first, and sees that they have one now.
    assert _until(lambda: machine.call("status")["sessions"] == {"dev": "agent", "work": "agent"})


def test_a_second_apply_changes_nothing(machine):
    before = machine.listing(), machine.listing("work")
    states = machine.apply()
    assert _changed(states) == set()
    assert all(ret["result"] is True for ret in states.values())
    after = machine.listing(), machine.listing("work")
    # Logs, ledger and queue live on by themselves.
    living = "/var/(log|lib|cache)/qvm-remote|/run/qvm-remote|[.]qvm-remote/"
    assert [line for old, new in zip(before, after) for line in _differences(old, new) if not re.search(living, line)] == []


@pytest.mark.parametrize(
    ("pillar", "line"),
    [
        ({"limits": {"paralel": 3}}, "pillar qvm-remote:limits:paralel: unknown; allowed here: timeout,"),
        ({"vms": {"spare": {"key": GIVEN}}}, "pillar qvm-remote:vms:spare:key: is also the key of dev"),
        ({"vms": {"Domain-0": {}}}, "pillar qvm-remote:vms:Domain-0: not a VM's name"),
        ({"service": {"enable": True}}, "pillar qvm-remote:service:enable: true lets every authorized qube command dom0"),
    ],
)
def test_a_mistake_in_pillar_fails_in_one_line_and_nothing_is_applied(machine, pillar, line):
    before = machine.listing_at_rest()
    machine.set_pillar(_pillar(**pillar))
    # Each of them once with the first mistake; the others are found by the same lines.
    for sls in ("qvm-remote", "qvm-remote.vm", "qvm-remote.clean") if "limits" in pillar else ("qvm-remote",):
        states, text = machine.fail(sls)
        assert list(states) == ["qvm-remote-pillar-valid"]
        assert states["qvm-remote-pillar-valid"]["name"].startswith(line)
        assert GIVEN not in text
        assert "Traceback" not in text
    machine.set_pillar(_pillar())
    assert _differences(before, machine.listing(times=False)) == []
    assert machine.remote("true").returncode == 0


def test_pillar_that_is_missing_or_unreadable_is_no_wish_for_no_qubes(machine):
    before = machine.listing_at_rest()
    for content in ("", "qvm_remote: {vms: {}}\n"):
        machine.put("/srv/pillar/qvm-remote.sls", content)
        states, _ = machine.fail()
        assert [(name, ret["name"][:34]) for name, ret in states.items()] == [("qvm-remote-pillar-valid", "dom0's pillar has no qvm-remote; i")]
    # What it takes back it finds without pillar.
    cleaned = machine.apply("test=True", sls="qvm-remote.clean")
    assert {ret["result"] for ret in cleaned.values()} == {None}
    machine.put("/srv/pillar/qvm-remote.sls", "qvm-remote: {vms: {work: {}}\n")
    done = machine.dom0("qubesctl", "--retcode-passthrough", "state.apply", "qvm-remote", timeout=180)
    assert (done.returncode != 0, b"qvm-remote-vm" in done.stdout) == (True, False)
    assert machine.salt("qvm_remote.plan") == {
        "problem": "Salt can't read dom0's pillar, and applies nothing; what is wrong there says: qubesctl pillar.items"
    }
    assert "render" in machine.dom0("qubesctl", "pillar.items").stdout.decode().lower()
    machine.set_pillar(_pillar())
    assert _differences(before, machine.listing(times=False)) == []


def test_a_misspelt_qube_fails_alone_and_a_tag_that_nobody_has_is_said(machine):
    rules = {"deny": [["qvm-kill", "@tag:nosuchtag"]]}
    machine.set_pillar(_pillar(vms={"wrok": {}, "dev": {"key": GIVEN, "policy": rules}}))
    states, _ = machine.fail("qvm-remote")
    assert [name for name, ret in states.items() if ret["result"] is False] == ["qvm-remote-vm-wrok"]
    assert states["qvm-remote-vm-wrok"]["comment"].startswith("there is no qube wrok; mend its name in pillar (vms: wrok)")
    assert states["qvm-remote-pillar-valid"]["comment"] == "no qube has the tag nosuchtag, which rules of dev name"
    assert machine.call("access", "dev").startswith("may run what 0 rules allow and 1 do not forbid")
    assert machine.dom0("ls", "/etc/qubes/remote.d/wrok.key").returncode != 0
    machine.set_pillar(_pillar())
    machine.apply()


def test_no_key_is_in_salts_output_logs_caches_or_in_any_process(machine):
    done = machine.dom0("qubesctl", "--log-level=info", "--log-file-level=info", "state.apply", "qvm-remote", timeout=180)
    keys = [machine.dom0_key("work"), GIVEN]
    assert [machine.key(vm) for vm in ("work", "dev")] == keys
    for key in keys:
        assert key.encode() not in done.stdout + done.stderr
        for path in ("/var", "/etc", "/srv", "/run", "/tmp", "/root"):
            found = machine.dom0("grep", "-rlsaF", "--", key, path).stdout.decode().split()
            allowed = ["/etc/qubes/remote.d/work.key", "/etc/qubes/remote.d/dev.key", "/srv/pillar/qvm-remote.sls"]
            assert [path for path in found if path not in allowed] == []
        for name in ("cmdline", "environ"):
            shown = machine.dom0("sh", "-c", f"cat /proc/[0-9]*/{name}").stdout
            assert len(shown) > 100
            assert key.encode() not in shown


def test_a_halted_vm_gets_its_key_when_it_runs_and_is_not_started_for_it(machine):
    machine.set_pillar(_pillar(vms={"idle": {}}))
    first = machine.apply()
    assert _changed(first) == {"qvm-remote-vm-idle", "qvm-remote-dom0-config", "qvm-remote-dom0-service"}
    assert "it is shut down and gets its key when it runs next" in first["qvm-remote-vm-idle"]["comment"]
    again = machine.apply()
    assert _changed(again) == set()
    assert "it is shut down" in again["qvm-remote-vm-idle"]["comment"]
    assert machine.dom0("qvm-check", "--running", "idle").returncode == 1
    assert machine.call("status")["keys"]["idle"]["in_vm"] == "pending"
    machine.start("idle")
    machine.wait_served("idle")
    assert machine.remote("hostname", vm="idle").stdout == b"dom0\n"
    assert machine.call("status")["keys"]["idle"]["in_vm"] == "fits"
    machine.shutdown("idle")


@pytest.mark.long
def test_a_vm_that_is_shut_down_in_the_middle_of_an_apply_gets_its_key_later(machine):
    machine.create("fleeting:debian-13")
    machine.start("fleeting")
    # It is in the list of running VMs, and is gone when it is asked.
    shim = '#!/bin/sh\ncase "$*" in *" fleeting "*) qvm-shutdown fleeting ;; esac\nexec /usr/bin/qvm-run "$@"\n'
    machine.put("/usr/local/bin/qvm-run", shim)
    machine.dom0("chmod", "0755", "/usr/local/bin/qvm-run", check=True)
    machine.set_pillar(_pillar(vms={"idle": {}, "fleeting": {}}))
    states = machine.apply(sls="qvm-remote.vm")
    machine.dom0("rm", "/usr/local/bin/qvm-run", check=True)
    assert machine.dom0("qvm-check", "--running", "fleeting").returncode == 1
    assert states["qvm-remote-vm-fleeting"]["result"] is True
    assert "it is shut down and gets its key when it runs next" in states["qvm-remote-vm-fleeting"]["comment"]
    assert _changed(machine.apply()) == {"qvm-remote-dom0-config", "qvm-remote-dom0-service"}
    machine.start("fleeting")
    machine.wait_served("fleeting")
    machine.set_pillar(_pillar(vms={"idle": {}, "fleeting": {"state": "absent"}}))
    assert _changed(machine.apply(sls="qvm-remote.vm")) == {"qvm-remote-vm-fleeting"}
    machine.shutdown("fleeting")


def test_one_vm_more_touches_that_vm_only(machine):
    machine.start("spare")
    before = machine.listing("work")
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {}}))
    states = machine.apply("--", sls="qvm-remote.vm")
    assert _changed(states) == {"qvm-remote-vm-spare"}
    # But for the queue, which lives on by itself, there is nothing new in another VM.
    assert [line for line in _differences(before, machine.listing("work")) if "/.qvm-remote/" not in line] == []
    machine.wait_served("spare")


def test_a_queue_that_is_out_of_order_is_mended_and_no_symbolic_link_is_followed(machine):
    machine.vm("spare", "sh", "-c", "chmod 755 .qvm-remote/queue; chmod 644 .qvm-remote/auth.key; rmdir .qvm-remote/queue/results || true", check=True)
    shown = machine.call("inspect", "spare")
    assert {"folder-mode", "key-mode"} <= set(shown["problems"])
    assert _changed(machine.apply(sls="qvm-remote.vm")) == {"qvm-remote-vm-spare"}
    modes = machine.vm("spare", "stat", "-c", "%a %U", ".qvm-remote", ".qvm-remote/queue", ".qvm-remote/auth.key").stdout.decode().splitlines()
    assert modes == ["700 user", "700 user", "600 user"]
    machine.vm("spare", "sh", "-c", "mv .qvm-remote/queue/running elsewhere && chmod 755 elsewhere && ln -s ~/elsewhere .qvm-remote/queue/running", check=True)
    states, _ = machine.fail("qvm-remote.vm")
    assert states["qvm-remote-vm-spare"]["result"] is False
    assert states["qvm-remote-vm-work"]["result"] is True
    assert machine.vm("spare", "stat", "-c", "%a", "elsewhere").stdout == b"755\n"
    machine.vm("spare", "sh", "-c", "rm .qvm-remote/queue/running && mv elsewhere .qvm-remote/queue/running", check=True)
    assert _changed(machine.apply(sls="qvm-remote.vm")) == {"qvm-remote-vm-spare"}


def test_a_lost_key_is_seen_and_mended_by_the_next_apply(machine):
    for vm in ("work", "dev"):
        machine.vm(vm, "rm", ".qvm-remote/auth.key", check=True)
    assert machine.call("inspect", "dev")["key"] == "lost"
    states = machine.apply(sls="qvm-remote.vm")
    # The engine may have mended work's by itself already: it is dom0's to make.
    assert {"qvm-remote-vm-dev"} <= _changed(states) <= {"qvm-remote-vm-dev", "qvm-remote-vm-work"}
    assert machine.key("dev") == GIVEN
    assert machine.key("work") == machine.dom0_key("work")


def test_an_altered_key_is_refused_and_mended_by_the_engine(machine):
    def refused():
        machine.vm("work", "sh", "-c", f"echo {secrets.token_hex(32)} > .qvm-remote/auth.key", check=True)
        return machine.remote("true")

    done = refused()
    if done.returncode == 0:
        # The engine, which looks at it once a minute by itself, has just mended it.
        done = refused()
    assert (done.returncode, b"token does not fit" in done.stderr) == (125, True)
    assert _until(lambda: machine.key("work") == machine.dom0_key("work"))
    assert machine.remote("hostname").stdout == b"dom0\n"
    assert b'"what":"key-handed"' in machine.dom0("tail", "-n", "20", "/var/log/qvm-remote/audit.log").stdout


def test_an_altered_key_that_pillar_gives_waits_for_the_next_apply(machine):
    machine.vm("dev", "sh", "-c", f"echo {secrets.token_hex(32)} > .qvm-remote/auth.key", check=True)
    assert machine.remote("true", vm="dev").returncode == 125
    assert _until(lambda: machine.call("status")["keys"]["dev"]["in_vm"] == "altered")
    assert machine.key("dev") != GIVEN
    assert _changed(machine.apply(sls="qvm-remote.vm")) == {"qvm-remote-vm-dev"}
    assert machine.remote("hostname", vm="dev").stdout == b"dom0\n"


@pytest.mark.long
def test_a_key_that_a_vm_has_made_anew_is_fetched_and_never_overwritten(machine):
    machine.start("idle")
    machine.set_pillar(_pillar(vms={"idle": {"key": "own"}, "spare": {}}))
    machine.apply()
    machine.vm("idle", "qvm-remote", "key", "gen", "--force", check=True)
    made = machine.key("idle")
    assert machine.remote("true", vm="idle").returncode == 125
    assert _changed(machine.apply()) == {"qvm-remote-vm-idle"}
    assert machine.dom0_key("idle") == machine.key("idle") == made
    assert _changed(machine.apply()) == set()
    machine.wait_served("idle")
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {}}))
    machine.apply()
    machine.shutdown("idle")


def test_a_template_that_was_installed_anew_gets_the_client_again(machine):
    machine.dom0("qvm-features", "debian-13", "template-installtime", "2026-11-24 10:00:00", check=True)
    assert _changed(machine.apply(sls="qvm-remote.client")) == {"qvm-remote-client-debian-13"}
    assert _changed(machine.apply(sls="qvm-remote.client")) == set()


def _rotated(machine):
    done = machine.called("rotate", "work")
    if done.returncode:
        assert b"may have signed before its last rotation; rotate again when they have run" in done.stdout + done.stderr
        return False
    return json.loads(done.stdout)["local"]["handed"] is True


@pytest.mark.long
def test_rotation_under_load_loses_no_command(machine):
    asking = "until [ -e /tmp/enough ]; do qvm-remote -n echo fine >> /tmp/said 2>&1 || echo failed >> /tmp/said; done"
    clients = [machine.popen_vm("work", "sh", "-c", asking) for _ in range(3)]
    keys = [machine.dom0_key("work")]

    def said():
        return machine.vm("work", "cat", "/tmp/said").stdout.splitlines()

    for _ in range(3):
        before = len(said())
        assert _until(lambda before=before: len(said()) >= before + 10)
        # Refused while a command waits that may be of before the last rotation.
        assert _until(lambda: _rotated(machine))
        keys.append(machine.dom0_key("work"))
    before = len(said())
    assert _until(lambda: len(said()) >= before + 10)
    machine.vm("work", "touch", "/tmp/enough", check=True)
    assert [client.wait(60) for client in clients] == [0, 0, 0]
    assert len(set(keys)) == 4
    assert set(said()) == {b"fine"}
    assert machine.key("work") == keys[-1]


def test_a_changed_pillar_key_is_rotated_in(machine):
    new = secrets.token_hex(32)
    machine.set_pillar(_pillar(vms={"dev": {"key": new}, "idle": {}, "spare": {}}))
    states = machine.apply(sls="qvm-remote.vm")
    assert _changed(states) == {"qvm-remote-vm-dev"}
    assert machine.remote("hostname", vm="dev").stdout == b"dom0\n"
    assert (machine.key("dev"), machine.dom0_key("dev")) == (new, new)
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {}}))
    machine.apply(sls="qvm-remote.vm")
    assert machine.key("dev") == GIVEN


def test_an_old_key_is_rotated_by_the_apply_and_a_fresh_one_is_not(machine):
    machine.set_pillar(_pillar(vms={"work": {"rotate_days": 30}, "idle": {}, "spare": {}}))
    before = machine.dom0_key("work")
    assert _changed(machine.apply(sls="qvm-remote.vm")) == set()
    machine.dom0("touch", "-d", "31 days ago", "/etc/qubes/remote.d/work.key", check=True)
    assert _changed(machine.apply(sls="qvm-remote.vm")) == {"qvm-remote-vm-work"}
    assert machine.dom0_key("work") != before
    assert machine.remote("hostname").stdout == b"dom0\n"


def test_new_settings_are_taken_over_without_losing_what_runs(machine):
    with machine.popen_vm("work", "qvm-remote", "-n", "sleep 6; echo still here", stdout=subprocess.PIPE) as running:
        assert _until(lambda: machine.dom0("pgrep", "-fx", "sleep 6").returncode == 0)
        machine.set_pillar(_pillar(limits={"timeout": 50}, vms={"idle": {}, "spare": {}}))
        states = machine.apply()
        assert _changed(states) == {"qvm-remote-dom0-config", "qvm-remote-dom0-service"}
        assert set(states["qvm-remote-dom0-service"]["changes"]) == {"settings"}
        refused = machine.remote("-t", "51", "true")
        assert refused.returncode == 125
        assert b"limit of 50 s" in refused.stderr
        assert running.communicate(timeout=30)[0] == b"still here\n"
        assert running.returncode == 0
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {}}))
    machine.apply()


@pytest.mark.long
def test_a_service_of_another_setup_or_older_code_is_restarted_once(machine):
    more = {"vms": {"idle": {}, "spare": {}}}
    machine.set_pillar(_pillar(minion={"id": "remote-dom0"}, **more))
    assert "setup" in machine.apply()["qvm-remote-dom0-service"]["changes"]
    assert _changed(machine.apply()) == set()
    machine.wait_served("work")
    machine.set_pillar(_pillar(**more))
    assert "setup" in machine.apply()["qvm-remote-dom0-service"]["changes"]
    # As an upgrade does; Salt syncs the modules with each apply.
    newer = "cd /srv/salt && mkdir -p _utils/pullrpc && (cat ../formulas/base/*/_utils/pullrpc/puller.py; echo '# newer') > _utils/pullrpc/puller.py"
    for change in (newer, "rm -r /srv/salt/_utils"):
        machine.dom0("sh", "-c", change, check=True)
        machine.salt("saltutil.sync_all")
        assert "setup" in machine.apply()["qvm-remote-dom0-service"]["changes"]
        assert _changed(machine.apply()) == set()
    machine.wait_served("work", "dev")


def test_an_apply_killed_half_way_is_completed_by_the_next(machine):
    machine.set_pillar(_pillar(limits={"timeout": 40}, vms={"idle": {}, "spare": {"state": "absent"}, "extra": {}}))
    machine.create("extra:debian-13")
    machine.start("extra")
    for wait in (1.2, 1.6, 2.0):
        # Killed at several places of its way: so from nothing, as it is on a real machine.
        with machine.popen_dom0("env", "PLAIN_SALT=1", "qubesctl", "state.apply", "qvm-remote", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            time.sleep(wait)
            machine.dom0("pkill", "-KILL", "-f", "state.apply")
    states = machine.apply()
    assert all(ret["result"] is True for ret in states.values())
    assert _changed(machine.apply()) == set()
    machine.wait_served("extra", "work")


def test_a_removed_vm_is_refused_and_forgotten(machine):
    assert "spare" not in machine.call("keys")
    assert machine.call("remembered", "spare") == 0
    refused = machine.remote("true", vm="spare")
    assert refused.returncode == 125
    assert b"dom0 has no key for spare" in refused.stderr
    assert machine.dom0("grep", "-c", '"what":"revoked","vm":"spare"', "/var/log/qvm-remote/audit.log").stdout.strip() == b"1"


def test_keys_that_pillar_does_not_name_are_shown_and_taken_on_demand(machine):
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {"state": "absent"}}))
    states = machine.apply(sls="qvm-remote.vm")
    assert _changed(states) == set()
    assert "extra may run nothing (policy: none)" in states["qvm-remote-unlisted"]["comment"]
    machine.set_pillar(_pillar(unlisted="absent", vms={"idle": {}}))
    assert set(machine.apply(sls="qvm-remote.vm")["qvm-remote-unlisted"]["changes"]) == {"extra"}
    assert "extra" not in machine.call("keys")


def test_a_vm_gets_no_key_before_the_service_knows_what_it_may_do(machine):
    # Until then those that are not named may do anything.
    machine.start("spare")
    machine.set_pillar(_pillar(unlisted="keep", vms={"idle": {}}))
    machine.apply()
    machine.set_pillar(_pillar(unlisted="keep", vms={"idle": {}, "spare": {"policy": "none"}}))
    states, _ = machine.fail(sls="qvm-remote.vm")
    assert "the service does not know yet what spare may do" in states["qvm-remote-vm-spare"]["comment"]
    assert "spare" not in machine.call("keys")
    states = machine.apply()
    order = [name for name, ret in sorted(states.items(), key=lambda one: one[1]["__run_num__"])]
    assert order.index("qvm-remote-dom0-service") < order.index("qvm-remote-vm-spare")
    assert b"policy: none" in machine.remote("id", vm="spare").stderr
    machine.set_pillar(_pillar(unlisted="keep", vms={"idle": {}, "spare": {"state": "absent"}}))
    states = machine.apply()
    order = [name for name, ret in sorted(states.items(), key=lambda one: one[1]["__run_num__"])]
    assert order.index("qvm-remote-vm-spare") < order.index("qvm-remote-dom0-service")
    assert "spare" not in machine.call("keys")


def test_a_qube_made_anew_gets_no_key_before_the_service_knows_what_it_may_do(machine):
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {}}))
    machine.apply()
    machine.shutdown("spare")
    machine.dom0("qvm-remove", "--force", "spare", check=True)
    machine.create("spare:debian-13")
    machine.start("spare")
    # The service lets whoever has that name do anything, and can't be told otherwise.
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {"policy": "none"}}))
    machine.dom0("sh", "-c", "mount --bind /etc/qubes/remote /etc/qubes/remote && mount -o remount,ro,bind /etc/qubes/remote", check=True)
    try:
        states, _ = machine.fail()
    finally:
        machine.dom0("umount", "/etc/qubes/remote", check=True)
    assert {name for name, ret in states.items() if ret["result"] is False} == {"qvm-remote-dom0-config", "qvm-remote-dom0-service", "qvm-remote-vm-spare"}
    assert "which lost it; the service does not know yet what spare may do" in states["qvm-remote-vm-spare"]["comment"]
    assert "spare" not in machine.call("keys")
    assert machine.apply()["qvm-remote-vm-spare"]["comment"].endswith("; it may run nothing (policy: none)")
    assert b"policy: none" in machine.remote("id", vm="spare").stderr
    # That it may run nothing is said only where it is so.
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {"policy": "full"}}))
    machine.apply()
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {"policy": "none"}}))
    said = machine.apply(sls="qvm-remote.vm")["qvm-remote-vm-spare"]["comment"]
    assert said.endswith("; it may run nothing (policy: none), once the service knows that (sudo qubesctl state.apply qvm-remote)")
    machine.set_pillar(_pillar(vms={"idle": {}, "spare": {"state": "absent"}}))
    machine.apply()


@pytest.mark.long
def test_salts_own_tools_work_beside_the_service_and_a_wiped_cache_does_not_hurt_it(machine):
    machine.dom0("sh", "-c", "rm -rf /var/cache/salt /var/cache/qvm-remote/*", check=True)
    assert machine.remote("hostname").stdout == b"dom0\n"
    assert machine.salt("test.ping") is True
    machine.salt("saltutil.sync_all")
    machine.apply()
    assert machine.remote("hostname").stdout == b"dom0\n"
    machine.dom0("systemctl", "restart", "qvm-remote", timeout=120, check=True)
    machine.wait_served("work", "dev")


def test_a_killed_minion_is_started_again(machine):
    before = machine.dom0("pgrep", "-f", "salt-minion").stdout.split()
    machine.dom0("pkill", "-KILL", "-f", "salt-minion", check=True)
    assert _until(lambda: set(machine.dom0("pgrep", "-f", "salt-minion").stdout.split()) - set(before), 60)
    machine.wait_served("work")


def test_the_lock_stays_where_it_is_whatever_becomes_of_the_service(machine):
    def place():
        return machine.dom0("stat", "-c", "%i", "/run/qvm-remote/engine.lock", check=True).stdout

    before = place()
    machine.dom0("systemctl", "stop", "qvm-remote", timeout=60, check=True)
    # run_once may hold it: who makes another one in its place would be at work beside it.
    assert place() == before
    machine.dom0("systemctl", "start", "qvm-remote", check=True)
    assert place() == before
    machine.wait_served("work")


def test_a_stopped_service_tells_whom_it_interrupts(machine):
    with machine.popen_vm("work", "qvm-remote", "-n", "echo begun; sleep 7614", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert _until(lambda: machine.dom0("pgrep", "-fx", "sleep 7614").returncode == 0)
        machine.dom0("systemctl", "stop", "qvm-remote", timeout=60, check=True)
        # Not only when another service starts.
        output, errors = running.communicate(timeout=20)
        assert (running.returncode, output) == (125, b"begun\n")
        assert b"interrupted" in errors
    assert machine.dom0("pgrep", "-f", "salt-minion|sleep 7614").returncode == 1
    machine.dom0("systemctl", "start", "qvm-remote", check=True)
    machine.wait_served("work")


def test_the_service_is_gone_after_a_reboot(machine):
    machine.reboot()
    machine.start("work")
    assert machine.dom0("systemctl", "is-active", "qvm-remote").stdout == b"inactive\n"
    assert machine.dom0("pgrep", "-f", "salt-minion").returncode == 1
    # Who waits hears of it.
    assert machine.dom0("ls", "/run/systemd/system/qvm-remote.service").returncode != 0


def test_with_the_risk_accepted_it_survives_one(machine):
    work = {"key": "generate", "policy": {"allow": [["hostname"], ["echo", "**"]]}}
    machine.set_pillar(_pillar(service={"enable": True, "accept_risk": True}, transport="qubesadmin", vms={"work": work}))
    assert "enabled" in machine.apply()["qvm-remote-dom0-service"]["changes"]
    machine.reboot()
    machine.start("work")
    machine.wait_served("work")
    assert machine.remote("hostname").stdout == b"dom0\n"


#: Asks dom0 for things, by hand; gives exit code and stderr of each.
_ASKS = """
def ask(command, cid=None, line=None):
    cid = cid or new_cid()
    put(cid, command, line)
    code = wait(lambda: exit_of(cid) is not None and [exit_of(cid)])[0]
    with open(f"{QUEUE}/results/{cid}.err", errors="replace") as file:
        answer = [code, file.read()]
    for part in ("out", "err", "meta", "exit"):
        os.unlink(f"{QUEUE}/results/{cid}.{part}")
    return answer

cid = new_cid()
asks = {
    "forged": lambda: ask(b"echo forged", cid, token(cid, b"echo forged", os.urandom(32))),
    "allowed": lambda: ask(b"echo allowed", cid),
    "replayed": lambda: ask(b"echo allowed", cid),
    "denied": lambda: ask(b"touch /srv/attacked"),
    "malformed": lambda: ask(b"echo \\x1b[2J"),
    "unrecorded": lambda: ask(b"echo unrecorded"),
}
print(json.dumps({name: asks[name]() for name in sys.argv[1:]}))
"""


def _ask(machine, *names):
    program = f"import sys; sys.path.insert(0, '/usr/lib/qvm-remote')\n{LIB}{_ASKS}"
    return json.loads(machine.vm("work", "/usr/bin/python3", "-", *names, data=program.encode(), check=True).stdout)


def test_without_transience_the_other_layers_hold(machine):
    answers = _ask(machine, "forged", "allowed", "replayed", "denied", "malformed")
    assert answers.pop("allowed") == [0, ""]
    why = {"forged": "token does not fit", "replayed": "used before", "denied": "policy", "malformed": "control bytes"}
    assert {name: (code, why[name] in text) for name, (code, text) in answers.items()} == dict.fromkeys(why, (125, True)), answers
    assert machine.dom0("test", "-e", "/srv/attacked").returncode == 1
    # Whoever is root may write to any file, but to no folder.
    log = "/var/log/qvm-remote/audit.log"
    machine.dom0("sh", "-c", f"mv {log} {log}.away && mkdir {log}", check=True)
    try:
        ((code, text),) = _ask(machine, "unrecorded").values()
    finally:
        machine.dom0("sh", "-c", f"rmdir {log} && mv {log}.away {log}", check=True)
    assert (code, "the audit log" in text) == (125, True), text
    assert _ask(machine, "allowed")["allowed"] == [0, ""]
    # That one after it was the last that ran, and the first one had run once.
    assert [row["command"] for row in machine.call("history", "work", "outcome=done")].count("echo allowed") == 2


def test_through_the_library_no_qvm_run_stays_behind(machine):
    # What was changed before has its session made anew.
    assert _until(lambda: machine.call("status")["sessions"]["work"] == "agent")
    shown = machine.dom0("ps", "-e", "-o", "args").stdout.decode()
    assert "qvm-run" not in shown
    assert "qrexec-client -d work" in shown


def test_clean_leaves_everything_as_it_was_but_the_audit_log(machine):
    for vm in ("work", "dev"):
        machine.start(vm)
    machine.wait_served("work", "dev")
    machine.dom0("touch", "/etc/qubes/remote.d/somebody-elses", check=True)
    # A qube in which nothing can be done keeps nothing else from being removed.
    machine.vm("dev", "mv", "/usr/bin/bash", "/usr/bin/away", user="root", check=True)
    for path in COMMAND_PATHS:
        assert machine.dom0("test", "-e", path).returncode == 0, path
    states = machine.apply(sls="qvm-remote.clean", timeout=300)
    assert _changed(states) == {"qvm-remote-clean-clients", "qvm-remote-clean-dom0"}
    assert "/etc/qubes/remote.d stays" in states["qvm-remote-clean-dom0"]["comment"]
    assert "dev keeps its queue" in states["qvm-remote-clean-dom0"]["comment"]
    assert machine.dom0("ls", "-A", "/etc/qubes/remote.d").stdout == b"somebody-elses\n"
    machine.dom0("rm", "/etc/qubes/remote.d/somebody-elses", check=True)
    assert _changed(machine.apply(sls="qvm-remote.clean")) == {"qvm-remote-clean-dom0"}
    assert _changed(machine.apply(sls="qvm-remote.clean")) == set()
    left = _differences(machine.before[None], machine.listing(times=False))
    assert {line.split()[0] for line in left} == {"/var/log/qvm-remote", "/var/log/qvm-remote/audit.log", "/var/log/qvm-remote/audit.log.head"}
    assert machine.dom0("pgrep", "-f", "salt-minion").returncode == 1
    machine.start("debian-13")
    assert _differences(machine.before["debian-13"], machine.listing("debian-13", times=False)) == []
    machine.shutdown("debian-13")
    kept = machine.vm("work", "ls", "-A", ".qvm-remote").stdout.decode().split()
    assert sorted(kept) == ["audit.log", "history"]


def test_clean_without_pillar_takes_the_keys_where_the_service_was_told_to_keep_them(machine):
    folder = "/var/lib/kept/qvm-remote-keys"
    machine.put("/srv/pillar/qvm-remote.sls", "")
    machine.put("/etc/qubes/remote/minion", json.dumps({"engines": [{"qvm_remote": {"key_dir": folder}}]}))
    machine.put(f"{folder}/old.key", f"{GIVEN}\n", "0600")
    machine.dom0("chmod", "0700", folder, check=True)
    assert set(machine.apply(sls="qvm-remote.clean")["qvm-remote-clean-dom0"]["changes"]) == {"folders", "/etc/qubes/remote"}
    assert machine.dom0("rmdir", "/var/lib/kept").returncode == 0


def test_clean_takes_the_logs_too_if_pillar_says_so(machine):
    machine.set_pillar(_pillar(clean={"logs": True}))
    machine.apply(sls="qvm-remote.clean")
    assert _differences(machine.before[None], machine.listing(times=False)) == []
