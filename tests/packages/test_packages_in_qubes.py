# SPDX-License-Identifier: GPL-2.0-or-later
"""The packages where they belong: dom0's in a dom0 with Salt and nothing else of ours, a qube's in a template of Debian.

Steps of one story, in their order: what is installed here is there in the next test.
"""

import json
import os
import subprocess
import time

import pytest
from building import NEXT, NOBODY, ROOT, VERSION, Tree, folders_of, need, packed, said
from pullrpc.package import client_files
from qubes_sim.stand import FORMULA, Stand

_RPM = f"qvm-remote-formula-{VERSION}-1.noarch.rpm"
_PYCS = "cd /usr/lib/qvm-remote && for f in */*.py; do ls -l ${f%/*}/__pycache__/$(basename $f .py).*.pyc || exit 1; done"


@pytest.fixture(scope="module")
def tree():
    """A copy of the source tree, with the Debian package built of it."""
    need("rpmbuild", "dpkg-buildpackage", "dh", "dh_python3")
    with Tree() as one:
        one.debs = one.build("deb", into="debs")
        yield one


@pytest.fixture(scope="module")
def deb(tree):
    """The path of a qube's package."""
    return tree.debs[f"qvm-remote_{VERSION}-1_all.deb"]


class Machine(Stand):
    """A machine that gets packages."""

    def send(self, path, target, vm=None):
        """Copy a file into dom0 or a VM."""
        with open(path, "rb") as file:
            words = ("sh", "-c", 'cat > "$1"', "sh", target)
            if vm is None:
                self.dom0(*words, data=file.read(), check=True)
            else:
                self.vm(vm, *words, user="root", data=file.read(), check=True)

    def rpm(self, *words):
        """Run rpm in dom0. It knows of none of its programs as packages."""
        done = self.dom0("rpm", *words, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().splitlines()

    def states(self, sls):
        """Apply states.

        Returns:
            dict of state id to its return.
        """
        return {key.split("_|-")[1]: value for key, value in self.salt("state.apply", sls).items()}

    def install_formula(self):
        """Install dom0's package."""
        self.rpm("--install", "--nodeps", f"/root/{_RPM}")

    def install_client(self, deb):
        """Install a qube's package in the template, which runs then."""
        self.start("debian-13")
        self.send(deb, "/root/client.deb", vm="debian-13")
        self.dpkg("--install", "/root/client.deb")

    def apply(self):
        """Have pillar name the template and the VM, and apply what that means for both.

        Returns:
            dict of state id to its return.
        """
        self.set_pillar({"client": {"templates": ["debian-13"]}, "vms": {"work": {}}, "service": {"running": False}})
        self.start("work")
        return self.states("qvm-remote")

    def dpkg(self, *words):
        """Run dpkg in the template."""
        done = self.vm("debian-13", "dpkg", *words, user="root", timeout=120)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
        return done.stdout.decode()


@pytest.fixture(scope="module")
def machine(tree, tmp_path_factory):
    """dom0 with Salt, a template that knows what Debian has installed here, a VM."""
    rpms = tree.build("rpm", into="rpms")
    with Machine(os.path.join(str(tmp_path_factory.mktemp("packages")), "sim"), warm=True) as one:
        one.prepare_bare(["debian-13"])
        one.put("/srv/pillar/top.sls", json.dumps({"base": {"dom0": ["qvm-remote"]}}))
        one.rpm("--initdb")
        one.send(rpms[_RPM], f"/root/{_RPM}")
        one.create("work:debian-13")
        one.start("debian-13")
        one.send("/var/lib/dpkg/status", "/root/status", vm="debian-13")
        one.vm("debian-13", "sh", "-c", "mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates && mv /root/status /var/lib/dpkg/", user="root", check=True)
        one.shutdown("debian-13")
        yield one


@pytest.fixture(scope="module")
def applied(machine, deb):
    """The same with both packages and their states, by the tests before or, if they were not asked for, by this."""
    if machine.dom0("rpm", "--query", "qvm-remote-formula").returncode:
        machine.install_formula()
        machine.install_client(deb)
        machine.shutdown("debian-13")
        machine.apply()
    return machine


def _listing(deb):
    packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], capture_output=True, check=True).stdout
    shown = subprocess.run(["tar", "-tv"], input=packed, capture_output=True, check=True).stdout.decode().splitlines()
    rows = (line.split() for line in shown)
    return {row[5].rstrip("/").lstrip("."): f"{row[0]} {row[1]}" for row in rows}


def test_a_debian_package_brings_exactly_the_client(deb):
    # Debian's zsh has a folder of its own for packages.
    files = {packed(f"/{target}").replace("/site-functions/", "/vendor-completions/"): mode for target, _, mode in client_files(os.path.join(ROOT, "client"))}
    files.update(dict.fromkeys((f"/usr/share/doc/qvm-remote/{name}" for name in ("changelog.Debian.gz", "changelog.gz", "copyright")), 0o644))
    # By this Debian's Python has bytecode made when another one becomes the default.
    files["/usr/share/python3/runtime.d/qvm-remote.rtupdate"] = 0o755
    listing = _listing(deb)
    overrides = listing.pop("/usr/share/lintian/overrides/qvm-remote")
    assert overrides == "-rw-r--r-- root/root"
    expected = {path: f"-{'rwxr-xr-x' if mode == 0o755 else 'rw-r--r--'} root/root" for path, mode in files.items()}
    folders = {*folders_of(expected, "/usr"), "/usr/share/lintian", "/usr/share/lintian/overrides", ""}
    assert listing == {**dict.fromkeys(folders, "drwxr-xr-x root/root"), **expected}


def test_a_debian_package_needs_python_alone(deb):
    assert said("dpkg-deb", "--field", deb, "Depends") == ["python3 (>= 3.9), python3:any"]


@pytest.mark.long
def test_lintian_has_nothing_to_say(tree, deb):
    need("lintian")
    environment = {"PATH": os.environ["PATH"], "HOME": tree.path("debs")}
    words = ["lintian", "--pedantic", "--display-info", "--fail-on", "error,warning", "--suppress-tags", "package-does-not-install-examples"]
    as_nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    shown = said(*words, deb, tree.debs[f"qvm-remote_{VERSION}-1.dsc"], env=environment, **as_nobody)
    # Whether a newer version exists, Debian asks only those that it has from elsewhere.
    assert [line for line in shown if "debian-watch-file-is-missing" not in line] == []


@pytest.mark.long
def test_two_builds_of_the_debian_package_give_the_same_bytes(tree):
    with Tree() as other:
        other.build("deb", into="elsewhere", TZ="Asia/Tokyo", LANG="de_DE.UTF-8", DEB_BUILD_OPTIONS="parallel=7")
        assert other.digests("elsewhere") == tree.digests("debs")


def test_installing_dom0s_package_tells_salt_and_starts_nothing(machine):
    before = machine.dom0("sh", "-c", "ls -R /etc/systemd /run/systemd").stdout
    machine.install_formula()
    shown = machine.dom0("sh", "-c", "cd /var/cache/salt/minion/extmods && ls modules states engines utils/pullrpc").stdout.decode().split()
    assert shown.count("qvm_remote.py") == 3
    assert "puller.py" in shown
    assert machine.dom0("sh", "-c", "ls -R /etc/systemd /run/systemd").stdout == before
    assert machine.dom0("systemctl", "is-active", "qvm-remote.service").returncode != 0
    assert machine.dom0("sh", "-c", "ls -d /etc/qubes/remote* /var/lib/qvm-remote /var/log/qvm-remote").stdout == b""


def test_a_template_has_the_client_with_bytecode_by_its_package(machine, deb):
    machine.install_client(deb)
    compiled = machine.vm("debian-13", "sh", "-c", _PYCS)
    assert compiled.returncode == 0
    assert {line.split()[0] for line in compiled.stdout.decode().splitlines()} == {"-rw-r--r--"}
    assert machine.dpkg("--verify", "qvm-remote") == ""
    assert machine.vm("debian-13", "qvm-remote", "--version").stdout == f"qvm-remote {VERSION}\n".encode()
    machine.shutdown("debian-13")


def test_the_formula_leaves_a_package_alone_and_a_command_runs_by_it(machine):
    states = machine.apply()
    state = states["qvm-remote-client-debian-13"]
    assert (state["result"], state["changes"]) == (True, {})
    assert state["comment"] == f"debian-13 has the client as a package, version {VERSION}, which is left alone"
    assert states["qvm-remote-vm-work"]["changes"]
    noted = machine.dom0("qvm-features", "debian-13", "qvm-remote-client").stdout.decode()
    assert noted.partition("@")[0].endswith("+package")
    # A ledger takes no command from before it was made.
    machine.salt("qvm_remote.run_once")
    with machine.popen_vm("work", "qvm-remote", "-n", "hostname; echo $QVM_REMOTE_VM", stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as client:
        deadline = time.monotonic() + 30
        while not machine.vm("work", "sh", "-c", "ls .qvm-remote/queue/pending").stdout:
            assert time.monotonic() < deadline
        machine.salt("qvm_remote.run_once")
        assert client.communicate(timeout=30)[0] == b"dom0\nwork\n"
        assert client.returncode == 0


@pytest.mark.long
def test_the_template_is_not_asked_again_until_the_formula_has_another_client(applied, machine):
    machine.dom0("sh", "-c", "mv /usr/bin/qvm-start /usr/bin/qvm-start.real", check=True)
    try:
        state = machine.states("qvm-remote.client")["qvm-remote-client-debian-13"]
    finally:
        machine.dom0("sh", "-c", "mv /usr/bin/qvm-start.real /usr/bin/qvm-start", check=True)
    assert (state["result"], state["changes"], state["comment"]) == (True, {}, "debian-13 has the client as a package, which is left alone")
    changed = "sed -i 's/^__version__ = .*/__version__ = \"" + NEXT + "\"/' " + f"{FORMULA}/_utils/pullrpc/__init__.py"
    machine.dom0("sh", "-c", changed, check=True)
    machine.salt("saltutil.sync_all")
    state = machine.states("qvm-remote.client")["qvm-remote-client-debian-13"]
    text = f"debian-13 has the client as a package, version {VERSION}, which is left alone; this formula is version {NEXT}: have both the same"
    assert (state["result"], state["changes"], state["comment"]) == (True, {}, text)
    machine.rpm("--install", "--nodeps", "--force", f"/root/{_RPM}")
    machine.start("debian-13")
    assert machine.dpkg("--verify", "qvm-remote") == ""
    machine.shutdown("debian-13")


@pytest.mark.long
def test_the_templates_own_salt_leaves_a_package_alone(applied, machine):
    done = machine.dom0("qubesctl", "--skip-dom0", "--show-output", "--targets=debian-13", "state.apply", "qvm-remote.client", timeout=180)
    text = done.stdout.decode()
    assert done.returncode == 0, text
    assert "The client here is a package, which is left alone" in text
    assert "qvm-remote-client-command" not in text


@pytest.mark.long
def test_who_removes_dom0s_package_has_nobody_served_and_keeps_keys_ledger_and_log(applied, machine):
    machine.salt("state.apply", "qvm-remote")
    machine.wait_served("work")
    assert machine.vm("work", "qvm-remote", "-n", "echo before").stdout == b"before\n"
    places = "/etc/qubes/remote.d/work.key /etc/qubes/remote/minion /var/lib/qvm-remote/ledger.sqlite /var/log/qvm-remote/audit.log"
    key = machine.dom0("cat", "/etc/qubes/remote.d/work.key").stdout
    machine.rpm("--erase", "--nodeps", "qvm-remote-formula")
    assert machine.dom0("systemctl", "is-active", "qvm-remote.service").returncode != 0
    assert machine.dom0("pgrep", "-f", "salt-minion").returncode == 1
    assert machine.dom0("sh", "-c", f"find /run/systemd/system /etc/systemd/system -name 'qvm-remote*'; ls -d {FORMULA}").stdout == b""
    assert machine.dom0("sh", "-c", f"ls {places}").returncode == 0
    assert machine.dom0("sh", "-c", "ls /var/cache/salt/minion/extmods/modules/qvm_remote.py").returncode != 0
    refused = machine.dom0("qubesctl", "--out=json", "--retcode-passthrough", "qvm_remote.status", timeout=60)
    assert refused.returncode != 0
    # Installed again, it goes on with the same keys once its states are applied.
    machine.install_formula()
    assert machine.dom0("systemctl", "is-active", "qvm-remote.service").returncode != 0
    machine.salt("state.apply", "qvm-remote")
    machine.wait_served("work")
    assert machine.dom0("cat", "/etc/qubes/remote.d/work.key").stdout == key
    assert "echo before" in json.dumps(machine.salt("qvm_remote.history", "work"))


@pytest.mark.long
def test_cleaning_leaves_a_templates_package_to_its_package_manager(applied, machine):
    states = machine.states("qvm-remote.clean")
    clients = states["qvm-remote-clean-clients"]
    assert (clients["changes"], clients["comment"]) == ({}, "debian-13 has the client as a package, which stays: remove it there")
    assert machine.dom0("qvm-features", "debian-13", "qvm-remote-client").stdout == b""
    machine.start("debian-13")
    assert machine.dpkg("--verify", "qvm-remote") == ""
    machine.dpkg("--remove", "qvm-remote")
    assert machine.vm("debian-13", "sh", "-c", "ls -d /usr/bin/qvm-remote /usr/lib/qvm-remote").stdout == b""
    machine.shutdown("debian-13")
    # And once it is gone there, the formula brings its own.
    machine.salt("state.apply", "qvm-remote.client")
    machine.start("debian-13")
    assert machine.vm("debian-13", "qvm-remote", "--version").returncode == 0
    machine.shutdown("debian-13")
