# SPDX-License-Identifier: GPL-2.0-or-later
"""A newcomer's way, by packages alone: a dom0 that never heard of qvm-remote, and a template that is a minimal Debian of its own.

The template is made of Debian's packages, so that what the client needs is what its package says and nothing of this machine's.
Steps of one story, in their order, each what a person types.
"""

import glob
import json
import os
import subprocess

import pytest
from building import VERSION, Tree, need, said
from qubes_sim.stand import Stand
from terminals import Terminal

TEMPLATE = "debian-12-minimal"
_RPM = f"qvm-remote-formula-{VERSION}-1.noarch.rpm"
_DEB = f"qvm-remote_{VERSION}-1_all.deb"
#: A package that says what dom0 of Qubes OS has; the simulator has it without a package.
_DOM0 = """Name: dom0
Version: 1
Release: 1
Summary: What is here
License: None
BuildArch: noarch
Provides: python3 = 3.11, python3-pyyaml, salt-minion, qubes-mgmt-salt-dom0, qubes-core-admin-client, /bin/sh, /usr/bin/python3
%description
%files
"""
#: All of a domain's files and folders that stay, but for those that any program may write.
_FILES = "find / -xdev ! -path '/proc/*' ! -path '/tmp/*' ! -path '/var/cache/*' ! -name '*.pyc' ! -path '/var/lib/rpm/*' ! -path '/usr/lib/sysimage/*'"


@pytest.fixture(scope="module")
def packages():
    """Both packages: a dict of file name to path."""
    need("rpmbuild", "dpkg-buildpackage", "dh", "dh_python3", "mmdebstrap")
    if os.geteuid() != 0:
        pytest.skip("only root can install Debian into a folder")
    with Tree() as tree:
        spec = tree.path("dom0.spec")
        with open(spec, "w", encoding="ascii") as file:
            file.write(_DOM0)
        said("rpmbuild", "-bb", "--define", f"_topdir {tree.path('dom0')}", spec)
        found = glob.glob(tree.path("dom0", "RPMS", "noarch", "*.rpm"))
        yield {**tree.build("rpm", into="rpms"), **tree.build("deb", into="debs"), "dom0.rpm": found[0]}


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """A minimal Debian with apt and a Qubes user; the machine's own sources of packages say where from."""
    folder = str(tmp_path_factory.mktemp("debian") / "root")
    sources = [path for path in ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list") if os.path.exists(path) and os.path.getsize(path)]
    user = 'chroot "$1" useradd --create-home --uid 1000 --shell /bin/bash user'
    words = ["mmdebstrap", "--quiet", "--variant=apt", "--include=python3", f"--customize-hook={user}", "", folder, sources[0]]
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return folder


@pytest.fixture(scope="module")
def machine(packages, system, tmp_path_factory):
    """A Qubes OS where nobody has done anything yet: a template, a qube, the packages in the qube."""
    with Stand(os.path.join(str(tmp_path_factory.mktemp("newcomer")), "sim"), warm=True) as one:
        one.prepare_bare([f"{TEMPLATE}={system}"])
        one.create(f"work:{TEMPLATE}")
        one.start("work")
        for path in (packages[_RPM], packages[_DEB], "install-dom0.sh"):
            source = path if os.path.isabs(path) else os.path.join(os.path.dirname(__file__), "..", "..", path)
            with open(source, "rb") as file:
                one.vm("work", "sh", "-c", 'cat > "$1"', "sh", os.path.basename(path), data=file.read(), check=True)
        one.dom0("rpm", "--initdb", check=True)
        with open(packages["dom0.rpm"], "rb") as file:
            one.dom0("sh", "-c", "cat > /tmp/dom0.rpm && rpm --install /tmp/dom0.rpm", data=file.read(), check=True)
        # What Salt itself makes when it first runs is none of ours.
        one.salt("test.ping")
        one.before = {name: _files(one, name) for name in ("dom0", TEMPLATE)}
        yield one


def _run(machine, name, *words, **options):
    return machine.dom0(*words, **options) if name == "dom0" else machine.vm(name, *words, user="root", **options)


def _files(machine, name):
    if name != "dom0":
        machine.start(name)
    found = _run(machine, name, "sh", "-c", f"{_FILES} 2>/dev/null").stdout.decode().splitlines()
    if name != "dom0":
        machine.shutdown(name)
    return set(found)


def _left(machine, name):
    """What is there that was not before."""
    return sorted(_files(machine, name) - machine.before[name])


def test_the_template_has_nothing_of_this_machine(machine, system):
    with open(f"{system}/etc/debian_version", encoding="ascii") as file:
        assert machine.vm("work", "cat", "/etc/debian_version").stdout.decode() == file.read()
    assert machine.vm("work", "sh", "-c", "command -v git gcc salt-call").stdout == b""
    assert machine.vm("work", "qvm-remote", "true").returncode == 127


def test_the_templates_package_is_installed_by_its_own_apt(machine):
    machine.start(TEMPLATE)
    pulled = machine.vm("work", "cat", _DEB, check=True).stdout
    machine.vm(TEMPLATE, "sh", "-c", f"cat > /tmp/{_DEB}", user="root", data=pulled, check=True)
    done = machine.vm(TEMPLATE, "apt-get", "install", "--yes", f"/tmp/{_DEB}", user="root", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.vm(TEMPLATE, "qvm-remote", "--version").stdout == f"qvm-remote {VERSION}\n".encode()
    machine.shutdown(TEMPLATE)


def test_dom0s_package_comes_from_the_qube_when_its_digest_was_accepted(machine, packages):
    machine.dom0("sh", "-c", "qvm-run --pass-io work 'cat install-dom0.sh' > /root/install-dom0.sh", check=True)
    terminal = Terminal(machine.command("dom0", "--", "sh", "/root/install-dom0.sh", "work", _RPM))
    terminal.until("Is it the one that you expect? Type yes: ")
    (line,) = said("sha256sum", packages[_RPM])
    assert line.split()[0] in terminal.shown
    assert machine.dom0("rpm", "--query", "qvm-remote-formula").returncode != 0
    terminal.type("yes\n")
    terminal.until("Install this package? Type yes: ")
    assert machine.dom0("rpm", "--query", "qvm-remote-formula").returncode != 0
    terminal.type("yes\n")
    assert terminal.end() == 0, terminal.shown
    assert machine.dom0("rpm", "--query", "qvm-remote-formula").stdout.decode().startswith(f"qvm-remote-formula-{VERSION}-1")
    # It is the template's package that was left alone, and not overwritten.
    machine.start(TEMPLATE)
    assert machine.vm(TEMPLATE, "dpkg", "--verify", "qvm-remote", user="root").stdout == b""
    machine.shutdown(TEMPLATE)


def test_the_first_command_runs_once_the_qube_was_started_anew(machine):
    machine.shutdown("work")
    machine.dom0("qvm-start", "work", check=True)
    machine.wait_served("work")
    done = machine.vm("work", "qvm-remote", "hostname; id -un", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"dom0\nroot\n", b"")
    assert machine.vm("work", "qvm-remote", "exit 3", timeout=60).returncode == 3
    assert machine.vm("work", "qvm-remote", "-q", "ping", timeout=60).returncode == 0
    history = json.dumps(machine.salt("qvm_remote.history", "work"))
    assert "hostname; id -un" in history


def test_when_all_is_removed_nothing_is_left_but_the_logs(machine):
    machine.salt("state.apply", "qvm-remote.clean")
    machine.dom0("rpm", "--erase", "qvm-remote-formula", check=True)
    machine.start(TEMPLATE)
    done = machine.vm(TEMPLATE, "apt-get", "purge", "--yes", "qvm-remote", user="root", timeout=120)
    assert done.returncode == 0, done.stderr
    machine.shutdown(TEMPLATE)
    machine.shutdown("work")
    machine.start("work")
    assert machine.vm("work", "qvm-remote", "true").returncode == 127
    assert machine.dom0("pgrep", "-f", "qvm|salt-minion").stdout == b""
    # Pillar is its writer's.
    own = ["/root/install-dom0.sh", "/srv/pillar", "/srv/pillar/qvm-remote.sls", "/srv/pillar/qvm-remote.top", "/srv/pillar/top.sls"]
    logs = ["/var/log/qvm-remote", "/var/log/qvm-remote/audit.log", "/var/log/qvm-remote/audit.log.head"]
    assert _left(machine, "dom0") == own + logs
    assert [path for path in _left(machine, TEMPLATE) if not path.startswith(("/var/log/", "/var/lib/apt/", "/var/lib/dpkg/"))] == []
    kept = machine.vm("work", "sh", "-c", "cd ~/.qvm-remote && find . ! -path './history/*' | sort").stdout.decode().split()
    assert kept == [".", "./audit.log", "./history"]
