# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of packages share: the source tree somewhere else, and packages built of it by a user without rights."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "tools"))

import packages  # noqa: E402
import version  # noqa: E402

VERSION = version.read()
#: One that is later than any that the source tree may have.
NEXT = f"{int(VERSION.partition('.')[0]) + 1}.0.0"
#: Who builds when the tests run as root.
NOBODY = 65534


def need(*programs):
    """Leave the tests out that a machine lacks programs for; where they must run, fail.

    Args:
        programs: str, names of programs.
    """
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        text = f"{', '.join(missing)} not here; run: python3 tools/bootstrap.py --packages"
        if os.environ.get("QVM_REMOTE_PACKAGES") == "required":
            pytest.fail(text)
        pytest.skip(text)


@contextlib.contextmanager
def _for_all_to_read():
    """Whatever umask the tests are run with: the builder may be somebody else."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


class Tree:
    """A copy of the source tree, as an unpacked archive of it, in a folder that nobody else has."""

    def __init__(self):
        self._folder = tempfile.mkdtemp(prefix="qvm-remote-test-")
        # pytest's own folders are closed to others, and the builder may be somebody else.
        os.chmod(self._folder, 0o755)
        self.root = os.path.join(self._folder, "source")
        with _for_all_to_read():
            packages.Source(ROOT, packages.source_time(ROOT)).unpack(self.root)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self._folder)

    def path(self, *parts):
        """A path beside the tree."""
        return os.path.join(self._folder, *parts)

    def build(self, kind, into="packages", **environment):
        """Build packages, as nobody if that can be.

        Args:
            kind: str, as for tools/packages.py.
            into: str, the name of a folder beside the tree.
            environment: str by name, what is set beside the path.

        Returns:
            dict of str to str: a file's name without its version to its path.
        """
        folder = self.path(into)
        with _for_all_to_read():
            os.makedirs(folder, exist_ok=True)
        as_nobody = {}
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
            as_nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        argv = ["/usr/bin/python3", os.path.join(self.root, "tools", "packages.py"), "--into", folder, kind]
        done = subprocess.run(argv, capture_output=True, env={"PATH": os.environ["PATH"], **environment}, text=True, check=False, **as_nobody)
        assert done.returncode == 0, done.stdout + done.stderr
        listed = dict(line.split()[::-1] for line in done.stdout.splitlines())
        assert sorted(os.listdir(folder)) == sorted([*listed, "SHA256SUMS"])
        return {name: os.path.join(folder, name) for name in listed}

    def digests(self, into="packages"):
        """What was built, as sha256sum sees it.

        Returns:
            str
        """
        folder = self.path(into)
        subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=folder, check=True)
        with open(os.path.join(folder, "SHA256SUMS"), encoding="ascii") as file:
            return file.read()


def said(*argv, **options):
    """Run a program that has to succeed.

    Returns:
        list of str: the lines of its stdout.
    """
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def packed(target):
    """Where a distribution's package has a file: with its man pages compressed.

    Args:
        target: str, where ``install.py`` puts it.

    Returns:
        str
    """
    return f"{target}.gz" if "/man/man" in target else target


def folders_of(paths, top):
    """The folders between a top and files, both without a leading slash where the files have none.

    Returns:
        set of str: those below ``top``, and ``top`` itself.
    """
    found = set()
    for path in paths:
        folder = os.path.dirname(path)
        while folder.startswith(top):
            found.add(folder)
            folder = os.path.dirname(folder)
    return found
