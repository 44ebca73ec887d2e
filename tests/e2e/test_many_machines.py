# SPDX-License-Identifier: GPL-2.0-or-later
"""Many machines: a salt-master, three machines with an engine in their minion and two VMs each, and nothing of our own between.

A dom0 has no network. Each has one socket as its channel to the master, as a qrexec service would give it one.
"""

import json
import os
import shutil
import subprocess
import time

import pytest
import salt.utils.yaml
from conftest import ROOT, Dom0Minion
from qubes_sim.stand import Stand

pytestmark = pytest.mark.long

MACHINES = ("laptop-1", "laptop-2", "laptop-3")
SETTINGS = {"discover_interval": 1, "poll_wait": 5, "max_age": 60, "events": "all"}


class Machine(Stand):
    """One of the machines."""

    def __init__(self, folder, name):
        super().__init__(os.path.join(folder, name, "sim"), vms=["work", "dev"])
        self.name = name
        self.folder = os.path.join(folder, name)
        self._relays = []

    def connect(self, ports):
        """Lay the channel to the master: each of its ports is one socket in dom0."""
        for port in ports:
            path = os.path.join(self.folder, "channel", str(port))
            self._relays.append(subprocess.Popen(["socat", f"UNIX-LISTEN:{path},fork", f"TCP:127.0.0.1:{port}"]))
            inner = ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", f"UNIX-CONNECT:{path}"]
            self._relays.append(self.popen_dom0(*inner, stdin=subprocess.DEVNULL))

    def down(self):
        """End the machine and its channel."""
        for relay in self._relays:
            relay.kill()
            relay.wait()
        super().down()


@pytest.fixture(scope="module")
def master(tmp_path_factory, salt_factories):
    """A master that has the formula, pillar for each machine, and the example's reactor."""
    folder = str(tmp_path_factory.mktemp("master"))
    roots, pillar = os.path.join(folder, "states"), os.path.join(folder, "pillar")
    os.makedirs(roots)
    os.makedirs(pillar)
    # As an installed formula: without what else lies in a checkout.
    for name in ("_modules", "_states", "_engines", "_utils", "client", "dom0"):
        shutil.copytree(os.path.join(ROOT, name), os.path.join(roots, name))
    shutil.copytree(os.path.join(ROOT, "qvm-remote-formula", "qvm-remote"), os.path.join(roots, "qvm-remote"))
    shutil.copytree(os.path.join(ROOT, "examples", "reactor"), os.path.join(roots, "reactor"))
    _write(roots, "top.sls", {"base": {"laptop-*": ["qvm-remote"]}})
    _write(pillar, "top.sls", {"base": {name: [name] for name in MACHINES}})
    for number, name in enumerate(MACHINES):
        vms = {"work": {"timeout": 10 + number}, "dev": {}}
        engine = {"engine": {key: SETTINGS[key] for key in ("discover_interval", "poll_wait", "events")}, "max_age": SETTINGS["max_age"]}
        _write(pillar, f"{name}.sls", {"qvm-remote": {"service": {"running": False}, "client": {"templates": ["debian-13"]}, "vms": vms, **engine}})
    with open(os.path.join(ROOT, "examples", "reactor", "master.conf"), encoding="utf-8") as file:
        reactor = salt.utils.yaml.safe_load(file)
    overrides = {"file_roots": {"base": [roots]}, "pillar_roots": {"base": [pillar]}, "auto_accept": True, "open_mode": True, **reactor}
    factory = salt_factories.salt_master_daemon("fleet-master", overrides=overrides, start_timeout=90)
    with factory.started():
        yield factory


@pytest.fixture(scope="module")
def machines(master, salt_factories, tmp_path_factory):
    """Three machines, each with the formula applied by the master and its engine at work."""
    folder = str(tmp_path_factory.mktemp("machines"))
    made = {}
    try:
        for name in MACHINES:
            one = made[name] = Machine(folder, name)
            os.makedirs(os.path.join(one.folder, "path"))
            os.makedirs(os.path.join(one.folder, "channel"))
            one.prepare(["debian-13"], [f"{one.folder}:{one.folder}:rw", f"{salt_factories.root_dir}:{salt_factories.root_dir}:rw"])
            one.connect([master.config["publish_port"], master.config["ret_port"]])
            _minion(one, master)
        cli = master.salt_cli(timeout=120)
        _all(cli, "test.ping", seconds=60)
        _all(cli, "saltutil.sync_all")
        _states(cli, "qvm-remote.client")
        for one in made.values():
            for vm in ("work", "dev"):
                one.create(f"{vm}:debian-13")
                one.start(vm)
        yield made
    finally:
        for one in made.values():
            one.dom0("pkill", "-KILL", "-f", "salt-minion")
            one.factory.terminate()
            one.down()


def _write(folder, name, data):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(data, file)


def _minion(machine, master):
    wrapper = os.path.join(machine.folder, "salt_minion_in_dom0.py")
    with open(wrapper, "w", encoding="utf-8") as file:
        words = machine.command("dom0", "--", "salt-minion")
        file.write(f"import os, sys\nwords = {words!r} + sys.argv[1:]\nos.execv(words[0], words)\n")
    # The engine is there from the start and serves nobody yet: it has no key.
    overrides = {"engines": [{"qvm_remote": SETTINGS}], "user": "root", "log_level": "warning"}
    machine.factory = master.salt_minion_daemon(machine.name, factory_class=Dom0Minion, overrides=overrides, start_timeout=60, max_start_attempts=1)
    machine.factory.script_name = wrapper
    machine.factory.start()


def _all(cli, function, *words, seconds=0):
    deadline = time.monotonic() + seconds
    while True:
        done = cli.run(function, *words, minion_tgt="laptop-*")
        if set(done.data or {}) == set(MACHINES) and "Minion did not return" not in str(done.data):
            return done.data
        assert time.monotonic() < deadline, done
        time.sleep(1)


def _states(cli, *sls):
    answers = _all(cli, "state.apply", *sls)
    failed = {name: [ret for ret in answer.values() if ret["result"] is not True] if isinstance(answer, dict) else answer for name, answer in answers.items()}
    assert failed == {name: [] for name in MACHINES}
    return answers


def _keys(machine):
    return machine.dom0("sh", "-c", "cat /etc/qubes/remote.d/*.key").stdout.split()


def test_a_targeted_highstate_brings_up_every_machine(machines, master):
    cli = master.salt_cli(timeout=120)
    _states(cli)
    keys = [key for machine in machines.values() for key in _keys(machine)]
    assert len(set(keys)) == 6
    # The engine was there before the formula's modules: it comes with them.
    for machine in machines.values():
        machine.dom0("pkill", "-KILL", "-f", "salt-minion")
        machine.factory.terminate()
        machine.factory.start()
    for machine in machines.values():
        machine.wait_served("work", "dev")
        assert machine.vm("work", "qvm-remote", "hostname").stdout == b"dom0\n"
    _all(cli, "test.ping", seconds=60)
    again = _states(cli)
    assert [key for answer in again.values() for key, ret in answer.items() if ret["changes"]] == []


def test_every_machine_has_its_own_pillar_and_shows_its_status(machines, master):
    cli = master.salt_cli(timeout=60)
    plans = _all(cli, "qvm_remote.plan")
    assert [plans[name]["settings"]["vms"]["work"]["timeout_max"] for name in MACHINES] == [10, 11, 12]
    shown = _all(cli, "qvm_remote.status")
    assert {name: (status["engine"], sorted(status["sessions"])) for name, status in shown.items()} == {
        name: ("running", ["dev", "work"]) for name in MACHINES
    }


def test_the_engines_events_are_on_the_masters_bus_and_the_reactor_hears_them(machines, master, event_listener):
    machine = machines["laptop-2"]
    machine.dom0("sh", "-c", "printf '#!/bin/sh\\necho \"$@\" >> /var/log/noticed\\n' > /usr/local/bin/logger; chmod 755 /usr/local/bin/logger", check=True)
    started = time.time()
    assert machine.vm("work", "qvm-remote", "true").returncode == 0
    machine.vm("work", "sh", "-c", f"echo {'0123456789abcdef' * 4} > .qvm-remote/auth.key", check=True)
    assert machine.vm("work", "qvm-remote", "true").returncode == 125
    wanted = [(master.id, f"qvm-remote/work/*/{what}") for what in ("accepted", "running", "done", "delivered", "refused", "key-altered")]
    found = event_listener.wait_for_events(wanted, after_time=started, timeout=30)
    assert not found.missed
    refused = next(event for event in found if event.tag.endswith("/refused"))
    assert (refused.data["id"], refused.data["data"]["vm"], refused.data["data"]["code"]) == ("laptop-2", "work", "token")
    deadline = time.monotonic() + 30
    while b"work refused token" not in machine.dom0("cat", "/var/log/noticed").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert machines["laptop-1"].dom0("test", "-e", "/var/log/noticed").returncode != 0
    master.salt_cli(timeout=60).run("state.apply", "qvm-remote.vm", minion_tgt="laptop-2")


def test_an_orchestration_rotates_machine_by_machine_and_stops_at_the_first_failure(machines, master):
    before = {name: _keys(machine) for name, machine in machines.items()}
    run = master.salt_run_cli(timeout=180)
    order = "pillar=" + json.dumps({"machines": list(MACHINES)})
    assert run.run("state.orchestrate", "qvm-remote.orch.rotate", order).returncode == 0
    rotated = {name: _keys(machine) for name, machine in machines.items()}
    for name, machine in machines.items():
        assert not set(before[name]) & set(rotated[name])
        assert machine.vm("work", "qvm-remote", "hostname").stdout == b"dom0\n"
    machines["laptop-2"].dom0("chmod", "0644", "/etc/qubes/remote.d/work.key", check=True)
    assert run.run("state.orchestrate", "qvm-remote.orch.rotate", order).returncode != 0
    after = {name: _keys(machine) for name, machine in machines.items()}
    assert not set(after["laptop-1"]) & set(rotated["laptop-1"])
    assert after["laptop-3"] == rotated["laptop-3"]
    assert run.run("state.orchestrate", "qvm-remote.orch.rotate").returncode != 0
