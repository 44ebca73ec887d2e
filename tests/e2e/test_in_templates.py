# SPDX-License-Identifier: GPL-2.0-or-later
"""States applied inside templates and VMs, by qubesctl --targets, where no module of ours is; and top files."""

import os

import pytest
from pullrpc.package import CLIENT_PATHS, client_files
from qubes_sim.stand import ROOT, Stand

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """dom0 with Salt and the formula's files, two templates, a VM."""
    with Stand(os.path.join(str(tmp_path_factory.mktemp("templates")), "sim"), warm=True) as one:
        one.prepare(["fedora-41", "debian-13-minimal"])
        one.set_pillar({"client": {"templates": ["fedora-41"]}, "vms": {"work": {}}})
        one.create("work:fedora-41")
        one.salt("saltutil.sync_all")
        yield one


def _manage(machine, *words, targets="fedora-41"):
    done = machine.dom0("qubesctl", "--skip-dom0", "--show-output", f"--targets={targets}", *words, timeout=120)
    return done.returncode, (done.stdout + done.stderr).decode()


def _client(machine, template):
    machine.start(template)
    places = " ".join(CLIENT_PATHS)
    script = f"find {places} -type f ! -name '*.pyc' -printf '%P %m %u %g ' -exec sha256sum {{}} \\;"
    shown = machine.vm(template, "sh", "-c", script, user="root").stdout.decode().splitlines()
    machine.shutdown(template)
    return sorted(line.split()[-1] + " " + " ".join(line.split()[-5:-1]) for line in shown)


def test_the_client_by_salt_in_a_template_is_the_one_that_dom0_installs(machine):
    code, text = _manage(machine, "state.apply", "qvm-remote.client")
    assert code == 0, text
    assert "(changed=" in text
    assert machine.dom0("qvm-check", "--running", "fedora-41").returncode == 1
    machine.set_pillar({"client": {"templates": ["debian-13-minimal"]}, "vms": {"work": {}}})
    machine.salt("state.apply", "qvm-remote.client")
    by_salt, by_dom0 = _client(machine, "fedora-41"), _client(machine, "debian-13-minimal")
    assert by_salt == by_dom0
    assert [line.split()[0] for line in by_salt] == sorted("/" + target for target, _, _ in client_files(os.path.join(ROOT, "client")))


def test_a_second_apply_in_the_template_changes_nothing(machine):
    code, text = _manage(machine, "state.apply", "qvm-remote.client")
    assert code == 0
    assert "(changed=" not in text


def test_the_queue_by_salt_in_a_vm_is_its_users_and_no_link_is_followed(machine):
    machine.start("work")
    code, text = _manage(machine, "state.apply", "qvm-remote.vm", targets="work")
    assert code == 0, text
    shown = machine.vm("work", "stat", "-c", "%a %U", ".qvm-remote", ".qvm-remote/queue/pending").stdout
    assert shown == b"700 user\n700 user\n"
    assert "(changed=" not in _manage(machine, "state.apply", "qvm-remote.vm", targets="work")[1]
    machine.vm("work", "sh", "-c", "rm -r .qvm-remote && ln -s /etc .qvm-remote", check=True)
    before = machine.vm("work", "stat", "-c", "%a %U", "/etc").stdout
    code, text = _manage(machine, "state.apply", "qvm-remote.vm", targets="work")
    assert code != 0
    assert "symbolic link" in text
    assert machine.vm("work", "stat", "-c", "%a %U", "/etc").stdout == before


def test_the_top_files_bring_the_right_states_to_the_right_place(machine):
    assert machine.dom0("qubesctl", "top.enable", "qvm-remote").returncode == 0
    assert machine.salt("state.show_top") == {"base": ["qvm-remote"]}
    assert "qvm-remote" not in _manage(machine, "state.show_top")[1]
    assert machine.dom0("qubesctl", "top.enable", "qvm-remote.client").returncode == 0
    assert machine.salt("state.show_top") == {}
    assert "- qvm-remote.client" in _manage(machine, "state.show_top")[1]
    assert "qvm-remote" not in _manage(machine, "state.show_top", targets="work")[1]
    machine.dom0("rm", "/srv/salt/top.sls", check=True)


def test_the_example_of_a_pillar_can_be_applied_as_it_is(machine):
    with open(os.path.join(ROOT, "pillar.example"), encoding="utf-8") as file:
        machine.put("/srv/pillar/qvm-remote.sls", file.read())
    for vm in ("builder", "dev", "helper"):
        # As whoever writes them into pillar has them.
        machine.create(f"{vm}:fedora-41")
    machine.start("work")
    # The link of an earlier test, if that ran.
    machine.vm("work", "rm", "-f", ".qvm-remote", check=True)
    machine.dom0("qvm-tags", "work", "add", "qvm-remote", check=True)
    machine.salt("state.apply", "qvm-remote")
    # Its template has got the client just now, if no earlier test ran.
    machine.shutdown("work")
    machine.start("work")
    machine.wait_served("work")
    assert machine.vm("work", "qvm-remote", "hostname").stdout == b"dom0\n"
    shown = [name for name in machine.dom0("ls", "/etc/qubes/remote.d").stdout.split() if name.endswith(b".key")]
    assert shown == [b"builder.key", b"dev.key", b"helper.key", b"work.key"]
    assert b"timeout_max 60" in machine.vm("work", "cat", ".qvm-remote/dom0-limits").stdout
    machine.stop_engine()


def test_a_dom0_without_the_modules_says_what_to_do(machine):
    machine.dom0("rm", "-rf", "/var/cache/salt", check=True)
    done = machine.dom0("qubesctl", "--retcode-passthrough", "state.apply", "qvm-remote", timeout=120)
    assert done.returncode != 0
    assert b"run: qubesctl saltutil.sync_all refresh=true" in done.stdout
