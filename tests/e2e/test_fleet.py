# SPDX-License-Identifier: GPL-2.0-or-later
"""Fifty VMs over five templates, from one pillar that names hardly any of them."""

import os

import pytest
from qubes_sim.stand import Stand

pytestmark = pytest.mark.long

TEMPLATES = [f"template-{number}" for number in range(5)]
VMS = [f"vm-{number:02}" for number in range(50)]
RUNNING = VMS[::10]
PILLAR = {
    "service": {"running": False},
    "client": {"templates": TEMPLATES},
    "defaults": {"timeout": 30},
    "select": [{"tag": "fleet"}, {"template": "template-?", "name": "vm-4?", "timeout": 60}],
    "vms": {"vm-07": {"timeout": 90}, "vm-08": {"state": "absent"}},
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """dom0 with Salt and the formula's files, five templates with the client, fifty VMs of which five run."""
    with Stand(os.path.join(str(tmp_path_factory.mktemp("fleet")), "sim"), warm=True) as one:
        one.prepare(TEMPLATES)
        one.set_pillar(PILLAR)
        one.salt("saltutil.sync_all")
        one.salt("state.apply", "qvm-remote.client", timeout=300)
        for number, vm in enumerate(VMS):
            one.create(f"{vm}:{TEMPLATES[number % 5]}")
        # Those up to vm-39 by tag; the last ten by their name.
        one.dom0("sh", "-c", f"for vm in {' '.join(VMS[:40])}; do qvm-tags $vm add fleet; done", check=True)
        for vm in RUNNING:
            one.start(vm)
        yield one


def _apply(machine, *words):
    return {key.split("_|-")[1]: ret for key, ret in machine.salt("state.apply", *words, timeout=300).items()}


def _changed(states):
    return {name for name, ret in states.items() if ret["changes"]}


def test_fifty_vms_are_authorized_in_one_apply(machine):
    states = _apply(machine, "qvm-remote")
    in_dom0 = {f"qvm-remote-dom0-{what}" for what in ("command", "config", "service")}
    assert _changed(states) == {f"qvm-remote-vm-{vm}" for vm in VMS if vm != "vm-08"} | in_dom0
    assert [ret["comment"] for ret in states.values() if ret["result"] is not True] == []
    keys = machine.dom0("sh", "-c", "cat /etc/qubes/remote.d/*.key").stdout.split()
    assert len(set(keys)) == 49
    for vm in RUNNING:
        assert machine.vm(vm, "cat", ".qvm-remote/auth.key").stdout.strip() in keys
    assert len([ret for ret in states.values() if "shut down" in ret["comment"]]) == 49 - len(RUNNING)
    assert machine.dom0("sh", "-c", "qvm-ls --running --raw-list | wc -l").stdout.strip() == str(len(RUNNING) + 1).encode()


def test_the_settings_are_those_of_defaults_tags_names_and_own_entries(machine):
    vms = machine.salt("qvm_remote.plan")["settings"]["vms"]
    assert {vms[vm].get("timeout_max") for vm in VMS[:7]} == {30}
    assert (vms["vm-07"]["timeout_max"], vms["vm-44"]["timeout_max"]) == (90, 60)
    assert sorted(vms) == VMS


def test_one_vm_more_touches_that_vm_only(machine):
    machine.create(f"vm-50:{TEMPLATES[0]}")
    before = machine.dom0("sh", "-c", "stat -c '%n %Z' /etc/qubes/remote.d/* /var/lib/qvm-remote/handover/*").stdout.splitlines()
    machine.dom0("qvm-tags", "vm-50", "add", "fleet", check=True)
    states = _apply(machine, "qvm-remote")
    assert _changed(states) == {"qvm-remote-vm-vm-50", "qvm-remote-dom0-config"}
    after = machine.dom0("sh", "-c", "stat -c '%n %Z' /etc/qubes/remote.d/* /var/lib/qvm-remote/handover/*").stdout.splitlines()
    key = b"/etc/qubes/remote.d/vm-50.key"
    assert {line.split()[0] for line in set(before) ^ set(after)} == {key, key + b".uuid"}
    assert _changed(_apply(machine, "qvm-remote")) == set()
