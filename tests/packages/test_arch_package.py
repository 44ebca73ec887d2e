# SPDX-License-Identifier: GPL-2.0-or-later
"""The package for Arch Linux, built by makepkg and installed by pacman in a folder of its own."""

import os
import subprocess

import pytest
from building import ROOT, VERSION, Tree, need, packed, said
from pullrpc.package import client_files

pytestmark = pytest.mark.long
_PACKAGE = f"qvm-remote-{VERSION}-1-any.pkg.tar.zst"


@pytest.fixture(scope="module")
def tree():
    """A copy of the source tree, and the package built of it."""
    need("makepkg", "pacman", "fakeroot", "bsdtar", "zstd")
    with Tree() as one:
        one.package = one.build("arch")[_PACKAGE]
        yield one


def _pacman(root, *words):
    as_root = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
    database = os.path.join(root, "var/lib/pacman")
    os.makedirs(database, exist_ok=True)
    return said(*as_root, "pacman", "--root", str(root), "--dbpath", database, "--noconfirm", *words)


def test_it_brings_exactly_the_client(tree):
    files = [packed(target) for target, _, _ in client_files(os.path.join(ROOT, "client"))]
    files += ["usr/share/libalpm/hooks/qvm-remote.hook", "usr/share/licenses/qvm-remote/LICENSE", ".BUILDINFO", ".INSTALL", ".MTREE", ".PKGINFO"]
    shown = [line.split() for line in said("tar", "-tvf", tree.package)]
    assert sorted(row[5] for row in shown if row[0][0] != "d") == sorted(files)
    assert {(row[0], row[1]) for row in shown} == {("drwxr-xr-x", "root/root"), ("-rw-r--r--", "root/root"), ("-rwxr-xr-x", "root/root")}
    assert [row[5] for row in shown if row[0] == "-rwxr-xr-x"] == ["usr/bin/qvm-remote"]


def test_it_is_installed_and_removed_without_a_trace(tree, tmp_path):
    _pacman(tmp_path, "--upgrade", "--nodeps", "--nodeps", "--noscriptlet", tree.package)
    assert "qvm-remote" in _pacman(tmp_path, "--query", "--owns", str(tmp_path / "usr/bin/qvm-remote"))[0]
    assert "0 missing files" in _pacman(tmp_path, "--query", "--check", "qvm-remote")[0]
    _pacman(tmp_path, "--remove", "--nodeps", "--nodeps", "--noscriptlet", "qvm-remote")
    assert [name for name in os.listdir(tmp_path) if name not in ("var", "etc")] == []


def test_its_scriptlet_is_of_shell_and_removes_the_bytecode(tree, tmp_path):
    text = subprocess.run(["tar", "-xOf", tree.package, ".INSTALL"], capture_output=True, text=True, check=True).stdout
    folder = tmp_path / "usr/lib/qvm-remote/pullrpc/__pycache__"
    folder.mkdir(parents=True)
    said("sh", "-c", text.replace("/usr/lib", f"{tmp_path}/usr/lib") + "\npre_remove")
    assert not folder.exists()


def test_two_builds_in_different_places_give_the_same_bytes_of_it(tree):
    with Tree() as other:
        other.build("arch", into="elsewhere", TZ="Asia/Tokyo", LANG="de_DE.UTF-8")
        assert other.digests("elsewhere") == tree.digests()
