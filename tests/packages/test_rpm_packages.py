# SPDX-License-Identifier: GPL-2.0-or-later
"""The RPMs: dom0's and a qube's, built by a user without rights; what they bring, need and do."""

import os
import shutil
import subprocess

import pytest
from building import NEXT, ROOT, VERSION, Tree, folders_of, need, packages, packed, said
from install import formula_files
from pullrpc.package import client_files

_FORMULA = "/srv/formulas/base/qvm-remote-formula"


@pytest.fixture(scope="module")
def tree():
    """A copy of the source tree, and the RPMs built of it."""
    need("rpmbuild")
    with Tree() as one:
        one.rpms = one.build("rpm")
        yield one


@pytest.fixture(scope="module")
def client(tree):
    """The path of a qube's package."""
    return tree.rpms[f"qvm-remote-{VERSION}-1.noarch.rpm"]


@pytest.fixture(scope="module")
def formula(tree):
    """The path of dom0's package."""
    return tree.rpms[f"qvm-remote-formula-{VERSION}-1.noarch.rpm"]


def _files(rpm):
    """All that a package brings: its path to its mode and owner."""
    lines = said("rpm", "-qp", "--qf", "[%{FILENAMES}\t%{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME}\n]", rpm)
    return dict(line.split("\t") for line in lines)


def _expected(files, top):
    """What install.py puts there, with its folders from ``top`` on."""
    modes = {f"/{target}": f"-{'rwxr-xr-x' if mode == 0o755 else 'rw-r--r--'} root:root" for target, _, mode in files}
    return {**dict.fromkeys(folders_of(modes, top), "drwxr-xr-x root:root"), **modes}


def _documents(name, *files):
    texts = {f"/usr/share/doc/{name}/{file}": "-rw-r--r-- root:root" for file in files}
    licence = f"/usr/share/licenses/{name}"
    folders = dict.fromkeys([licence, *folders_of(texts, f"/usr/share/doc/{name}")], "drwxr-xr-x root:root")
    return {**folders, **texts, f"{licence}/LICENSE": "-rw-r--r-- root:root"}


def test_all_packages_are_there(tree):
    assert sorted(tree.rpms) == [
        f"qvm-remote-{VERSION}-1.noarch.rpm",
        f"qvm-remote-{VERSION}-1.src.rpm",
        f"qvm-remote-formula-{VERSION}-1.noarch.rpm",
        f"qvm-remote-formula-{VERSION}-1.src.rpm",
    ]


def test_a_qubes_package_brings_exactly_the_client(client):
    files = [(packed(target), source, mode) for target, source, mode in client_files(os.path.join(ROOT, "client"))]
    expected = _expected(files, "/usr/lib/qvm-remote")
    assert _files(client) == {**expected, **_documents("qvm-remote", "README.rst", "CHANGELOG.md")}


def test_dom0s_package_brings_exactly_the_formula(formula):
    documents = ["README.rst", "CHANGELOG.md", "SECURITY.md", *(name for name in packages.Source(ROOT, 0).files if name.startswith("docs/"))]
    assert _files(formula) == {**_expected(formula_files(), _FORMULA), **_documents("qvm-remote-formula", *documents)}
    assert said("rpm", "-qp", "--configfiles", formula) == ["/etc/salt/minion.d/qvm-remote.conf"]


def test_they_need_what_they_use_and_no_more(client, formula):
    def needs(rpm):
        return sorted({line for line in said("rpm", "-qp", "--requires", rpm) if not line.startswith(("rpmlib(", "config("))})

    assert needs(client) == ["/bin/sh", "/usr/bin/python3", "python3 >= 3.9"]
    others = ["python3-pyyaml", "qubes-core-admin-client", "qubes-mgmt-salt-dom0", "salt-minion"]
    assert needs(formula) == ["/bin/sh", "/usr/bin/python3", "python3 >= 3.9", *others]


@pytest.mark.long
def test_rpmlint_has_nothing_to_say(tree):
    need("rpmlint")
    done = subprocess.run(["rpmlint", "--config", os.path.join(ROOT, "rpm", "rpmlint.toml"), *tree.rpms.values()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors, 0 warnings" in done.stdout


def test_two_builds_in_different_places_give_the_same_bytes(tree):
    with Tree() as other:
        other.build("rpm", into="elsewhere/and/deeper", TZ="Asia/Tokyo", LANG="de_DE.UTF-8")
        assert other.digests("elsewhere/and/deeper") == tree.digests()


class Root:
    """A root folder with a shell, Python's place, and a database of RPMs; what else there is, a test puts there."""

    _DOES = '#!/bin/sh\necho "${0##*/} $*" >> /calls\n'

    def __init__(self, folder):
        self.folder = str(folder)
        for path in ("usr/bin", "tmp", "run/systemd/system", "etc/systemd/system", "dev"):
            os.makedirs(self.path(path))
        for name in ("bin", "lib", "lib64"):
            os.makedirs(self.path("usr", name), exist_ok=True)
            os.symlink(f"usr/{name}", self.path(name))
        for program in ("sh", "rm"):
            self._program(program)
        self.rpm("--initdb")

    def path(self, *parts):
        """A path in it."""
        return os.path.join(self.folder, *(part.lstrip("/") for part in parts))

    def record(self, *programs):
        """Have programs that note how they are called."""
        for name in programs:
            self.write(f"usr/bin/{name}", self._DOES, 0o755)

    def write(self, path, text, mode=0o644):
        """Write a file."""
        os.makedirs(os.path.dirname(self.path(path)), exist_ok=True)
        with open(self.path(path), "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.path(path), mode)

    def calls(self):
        """The programs that were called since this was last asked."""
        try:
            with open(self.path("calls"), encoding="utf-8") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
        os.unlink(self.path("calls"))
        return lines

    def rpm(self, *words, warns=()):
        """Run rpm on it; as root in namespaces of its own when the tests are no root's.

        Returns:
            list of str: the lines of its stdout. It must succeed, and write to stderr what ``warns`` says.
        """
        as_root = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
        done = subprocess.run([*as_root, "rpm", "--root", self.folder, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        # Debian's rpm warns of itself.
        errors = [line for line in done.stderr.splitlines() if not line.startswith(("rpm: RPM should not", "rpm: However"))]
        assert (done.returncode, errors) == (0, list(warns))
        return done.stdout.splitlines()

    def files(self, *tops):
        """All files below some folders."""
        return sorted(
            os.path.join("/", os.path.relpath(os.path.join(folder, name), self.folder)) for top in tops for folder, _, names in os.walk(self.path(top)) for name in names
        )

    def _program(self, name):
        real = os.path.realpath(shutil.which(name))
        shutil.copy(real, self.path("usr/bin", name))
        for line in said("ldd", real):
            for word in line.split():
                if word.startswith("/") and not os.path.exists(self.path(word)):
                    os.makedirs(os.path.dirname(self.path(word)), exist_ok=True)
                    shutil.copy(os.path.realpath(word), self.path(word))


@pytest.fixture(scope="module")
def newer(tree):
    """The folder of the same packages in the next version, which has one file less and one more."""
    with Tree() as one:
        said("/usr/bin/python3", os.path.join(one.root, "tools", "version.py"), NEXT)
        os.rename(os.path.join(one.root, "_utils/pullrpc/syslog.py"), os.path.join(one.root, "_utils/pullrpc/sislog.py"))
        os.rename(os.path.join(one.root, "client/qvm_remote_client/journal.py"), os.path.join(one.root, "client/qvm_remote_client/jurnal.py"))
        one.build("rpm")
        yield one.path("packages")


#: What qvm-remote makes in dom0 while it works: none of it is the package's.
_STATE = ("etc/qubes/remote.d/work.key", "etc/qubes/remote/minion", "var/lib/qvm-remote/ledger.sqlite", "var/log/qvm-remote/audit.log")
_UNITS = ("run/systemd/system/qvm-remote.service", "etc/systemd/system/qvm-remote.service")
_SYNC = "qubesctl saltutil.sync_all refresh=true -l quiet --out quiet"


def test_dom0s_package_is_installed_upgraded_and_removed_and_touches_no_key_and_no_log(formula, newer, tmp_path):
    root = Root(tmp_path)
    root.record("qubesctl", "systemctl")
    root.rpm("-i", "--nodeps", formula)
    # Salt learns of the modules; nothing else is done, nothing started or enabled.
    assert root.calls() == [_SYNC]
    assert root.files("run", "etc/systemd", "usr/lib/systemd", "etc/qubes", "var/lib/qvm-remote") == []
    assert root.rpm("-V", "--nodeps", "qvm-remote-formula") == []
    for path in (*_STATE, *_UNITS):
        root.write(path, "kept")
    root.write("etc/salt/minion.d/qvm-remote.conf", "changed by the user\n")
    root.rpm("-U", "--nodeps", os.path.join(newer, f"qvm-remote-formula-{NEXT}-1.noarch.rpm"))
    assert root.calls() == [_SYNC]
    assert f"{_FORMULA}/_utils/pullrpc/sislog.py" in root.files("srv")
    assert f"{_FORMULA}/_utils/pullrpc/syslog.py" not in root.files("srv")
    with open(root.path("etc/salt/minion.d/qvm-remote.conf"), encoding="utf-8") as file:
        assert file.read() == "changed by the user\n"
    assert {f"/{path}" for path in (*_STATE, *_UNITS)} <= set(root.files("etc", "run", "var"))
    config = "/etc/salt/minion.d/qvm-remote.conf"
    root.rpm("-e", "--nodeps", "qvm-remote-formula", warns=[f"warning: {config} saved as {config}.rpmsave"])
    # Nobody is served any more, today or after the next boot, and Salt forgets the modules.
    assert root.calls() == ["systemctl stop qvm-remote.service", "systemctl disable qvm-remote.service", "systemctl daemon-reload", _SYNC]
    assert root.files("srv", "run", "etc/systemd", "usr/share") == []
    assert not os.path.exists(root.path(_FORMULA))
    assert {f"/{path}" for path in _STATE} <= set(root.files("etc", "var"))


def test_dom0s_package_is_installed_where_there_is_no_salt_that_works_yet(formula, tmp_path):
    root = Root(tmp_path)
    root.rpm("-i", "--nodeps", formula)
    root.rpm("-e", "--nodeps", "qvm-remote-formula")
    root.write("usr/bin/qubesctl", "#!/bin/sh\necho noise; echo noise >&2; exit 3\n", 0o755)
    assert root.rpm("-i", "--nodeps", formula) == []


def test_a_qubes_package_leaves_no_file_of_its_own_and_none_of_an_older_version(client, newer, tmp_path):
    root = Root(tmp_path)
    # Python is not here, but what it would make is.
    root.write("usr/bin/python3", '#!/bin/sh\necho "python3 $*" >> /calls; for d in /usr/lib/qvm-remote/*/; do echo > ${d}made; done\n', 0o755)
    compiled = ["python3 -m compileall -q /usr/lib/qvm-remote"]
    root.rpm("-i", "--nodeps", client)
    assert root.calls() == compiled
    root.write("usr/lib/qvm-remote/pullrpc/__pycache__/ids.cpython-313.pyc", "old")
    os.unlink(root.path("usr/lib/qvm-remote/pullrpc/made"))
    os.unlink(root.path("usr/lib/qvm-remote/qvm_remote_client/made"))
    assert root.rpm("-V", "--nodeps", "qvm-remote") == []
    root.rpm("-U", "--nodeps", os.path.join(newer, f"qvm-remote-{NEXT}-1.noarch.rpm"))
    assert root.calls() == compiled
    found = root.files("usr/lib/qvm-remote")
    assert "/usr/lib/qvm-remote/pullrpc/__pycache__/ids.cpython-313.pyc" not in found
    assert "/usr/lib/qvm-remote/qvm_remote_client/journal.py" not in found
    for folder in ("pullrpc", "qvm_remote_client"):
        os.unlink(root.path("usr/lib/qvm-remote", folder, "made"))
        root.write(f"usr/lib/qvm-remote/{folder}/__pycache__/x.pyc", "made by Python")
    root.rpm("-e", "--nodeps", "qvm-remote")
    assert not os.path.exists(root.path("usr/lib/qvm-remote"))
    assert root.files("usr/share") == []


def test_another_python_has_the_bytecode_made_anew(client, tmp_path):
    spec = "Name: python3\nVersion: 3.14.0\nRelease: 1\nSummary: x\nLicense: x\nBuildArch: noarch\n%description\nx\n%files\n"
    (tmp_path / "python3.spec").write_text(spec)
    said("rpmbuild", "-bb", "--define", f"_topdir {tmp_path}/build", str(tmp_path / "python3.spec"))
    (tmp_path / "root").mkdir()
    root = Root(tmp_path / "root")
    root.record("python3")
    root.rpm("-i", "--nodeps", client)
    root.calls()
    root.rpm("-i", str(tmp_path / "build/RPMS/noarch/python3-3.14.0-1.noarch.rpm"))
    assert root.calls() == ["python3 -m compileall -q /usr/lib/qvm-remote"]
