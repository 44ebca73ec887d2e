# SPDX-License-Identifier: GPL-2.0-or-later
"""One version for all that is packaged, and what the packages' sources say about each other."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from building import NEXT, ROOT, Tree, packages, version
from pullrpc import __version__, package
from qubes_sim import stand

sys.path.insert(0, os.path.join(ROOT, "tools"))

import install  # noqa: E402

#: The version, and where copies of it are.
_PLACES = ["version", "_utils/pullrpc/__init__.py", "FORMULA", "debian/changelog"]


@pytest.fixture(scope="module")
def tree():
    """A copy of the source tree."""
    with Tree() as one:
        yield one


def _run(root, *words):
    return subprocess.run([sys.executable, os.path.join(root, "tools", "version.py"), *words], capture_output=True, text=True, check=False)


def _texts(root):
    texts = {}
    for path in _PLACES:
        with open(os.path.join(root, path), encoding="utf-8") as file:
            texts[path] = file.read()
    return texts


def test_every_copy_of_the_version_is_the_version():
    assert version.differing() == []
    assert version.read() == __version__
    with open(os.path.join(ROOT, "FORMULA"), encoding="utf-8") as file:
        assert yaml.safe_load(file)["version"] == version.read()


@pytest.mark.parametrize("path", _PLACES)
def test_a_copy_that_differs_is_named(path, tmp_path):
    with Tree() as tree:
        file = os.path.join(tree.root, path)
        with open(file, encoding="utf-8") as source:
            text = source.read()
        with open(file, "w", encoding="utf-8") as target:
            target.write(text.replace(__version__, "9.9.9", 1))
        done = _run(tree.root)
    assert done.returncode == 1
    assert path == "version" or f"{path} says 9.9.9" in done.stderr


def test_one_command_sets_it_everywhere(tree):
    assert _run(tree.root, NEXT).returncode == 0
    done = _run(tree.root)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{NEXT}\n", "")
    shown = subprocess.run([sys.executable, "-c", "import pullrpc; print(pullrpc.__version__)"], cwd=os.path.join(tree.root, "_utils"), capture_output=True, check=True)
    assert shown.stdout == f"{NEXT}\n".encode()
    with open(os.path.join(tree.root, "debian", "changelog"), encoding="utf-8") as file:
        entries = packages._rpm_changelog(file.read()).split("\n\n")
    assert re.fullmatch(rf"\* \w{{3}} \w{{3}} \d\d \d{{4}} qvm-remote maintainers <[^>]+> - {re.escape(NEXT)}-1\n- Version {re.escape(NEXT)}; .*", entries[0])
    assert entries[-1] == "* Tue Nov 24 2026 qvm-remote maintainers <maintainers@qvm-remote.example> - 2.0.0-1\n- First package."


@pytest.mark.parametrize("wrong", ["9", "9.1", "v9.1.0", "9.1.0-rc1", "9.01.0", "0.0.1", "9.1.0\n", "\n9.1.0", "٩.٠.٠", __version__])
def test_what_is_no_later_version_changes_nothing(wrong, tree):
    before = _texts(tree.root)
    with pytest.raises(ValueError, match=" is no"):
        version.bump(wrong, tree.root)
    assert _texts(tree.root) == before


def test_the_command_says_what_is_wrong(tree):
    done = _run(tree.root, "0.0.1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: 0.0.1 is not later than {version.read(tree.root)}\n"


def test_qubes_builder_finds_what_it_is_told_to_build():
    with open(os.path.join(ROOT, ".qubesbuilder"), encoding="utf-8") as file:
        wanted = yaml.safe_load(file)
    assert wanted == {
        "host": {"rpm": {"build": ["rpm/qvm-remote-formula.spec"]}},
        "vm": {"rpm": {"build": ["rpm/qvm-remote.spec"]}, "deb": {"build": ["debian"]}, "archlinux": {"build": ["archlinux"]}},
    }
    # It makes each from a template of that name, and knows these words in one; @REL@ in a spec file would need a file named rel.
    templates = {"rpm/qvm-remote-formula.spec.in": {"@VERSION@", "@CHANGELOG@"}, "rpm/qvm-remote.spec.in": {"@VERSION@", "@CHANGELOG@"}}
    templates["archlinux/PKGBUILD.in"] = {"@VERSION@", "@REL@"}
    for path, words in templates.items():
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            assert set(re.findall(r"@\w+@", file.read())) == words
    # By these names it looks for the archives that it makes of the source tree.
    with open(os.path.join(ROOT, "archlinux", "PKGBUILD.in"), encoding="utf-8") as file:
        assert 'source=("$pkgname-$pkgver-$pkgrel.tar.gz")' in file.read()
    for name in ("qvm-remote-formula", "qvm-remote"):
        with open(os.path.join(ROOT, "rpm", f"{name}.spec.in"), encoding="utf-8") as file:
            text = file.read()
        assert f"\nName:           {name}\n" in text
        assert "\nSource0:        %{name}-%{version}.tar.gz\n" in text
    assert os.access(os.path.join(ROOT, "debian", "rules"), os.X_OK)


def test_the_templates_own_salt_has_the_same_lists_as_dom0():
    with open(os.path.join(ROOT, "qvm-remote-formula", "qvm-remote", "client.yaml"), encoding="utf-8") as file:
        assert yaml.safe_load(file) == {"protocol": list(package._SHARED), "is_package": package.IS_PACKAGE}


def test_bytecode_is_made_by_the_same_command_wherever_no_distribution_makes_it():
    command = package.COMPILE.removeprefix("umask 022; ")
    with open(os.path.join(ROOT, "archlinux", "qvm-remote.hook"), encoding="utf-8") as file:
        assert command in file.read()
    with open(os.path.join(ROOT, "rpm", "qvm-remote.spec.in"), encoding="utf-8") as file:
        text = file.read()
    macros = dict(re.findall(r"^%global (\w+) (.*)$", text, re.MULTILINE))
    for _ in macros:
        for name, value in {**macros, "_prefix": "/usr"}.items():
            macros = {key: other.replace(f"%{{{name}}}", value) for key, other in macros.items()}
    assert macros["make_bytecode"] == command


def test_the_formula_has_all_of_the_source_tree_that_dom0_needs():
    targets = [target for target, _, _ in install.formula_files()]
    prefix = "srv/formulas/base/qvm-remote-formula/"
    for path in ("_modules/qvm_remote.py", "_engines/qvm_remote.py", "_states/qvm_remote.py", "_utils/pullrpc/puller.py", "client/qvm-remote", "pillar.example"):
        assert prefix + path in targets
    # The simulator's dom0 has what the package installs.
    assert sorted(install._FORMULA_PARTS) == sorted(stand.PACKAGED)
    tracked = [name for name in packages.Source(ROOT, 0).files if name.partition("/")[0] in install._FORMULA_PARTS]
    assert sorted(targets) == sorted(["etc/salt/minion.d/qvm-remote.conf", *(prefix + name for name in tracked)])
