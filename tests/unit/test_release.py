# SPDX-License-Identifier: GPL-2.0-or-later
"""A release: anybody makes the same tarball of a tag, and what was altered does not pass as the page for users says to verify it."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_MAINTAINER = "a maintainer <maintainer@example.org>"


def _run(words, cwd, env, **options):
    return subprocess.run(words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options)


def _unless_gone(_call, _path, what):
    """The agent was told to end, and takes its sockets away when it does: before or while the folder is removed."""
    if not issubclass(what[0], FileNotFoundError):
        raise what[1]


@contextlib.contextmanager
def _gnupg_home():
    """A folder for GnuPG that is thrown away, and the agent with it."""
    # Not in pytest's folder: the agent's socket has to have a short name.
    home = tempfile.mkdtemp(prefix="gnupg-")
    try:
        yield home
    finally:
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
        shutil.rmtree(home, onerror=_unless_gone)


class Maker:
    """Somebody with a clone, a GnuPG key that is thrown away, and settings of their own."""

    def __init__(self, folder, keys):
        self.clone = os.path.join(folder, "clone")
        self.env = {"PATH": os.environ["PATH"], "HOME": folder, "GNUPGHOME": keys, "GIT_CONFIG_NOSYSTEM": "1"}
        self.do("git", "clone", "-q", "--shared", ROOT, self.clone, cwd=folder)
        # As it is here, committed or not.
        os.makedirs(os.path.join(self.clone, "tools"), exist_ok=True)
        shutil.copy(os.path.join(ROOT, "tools", "release.sh"), os.path.join(self.clone, "tools"))
        for name, value in (("user.name", "a maintainer"), ("user.email", "maintainer@example.org")):
            self.do("git", "config", name, value)
        self.do("gpg", "--batch", "--passphrase", "", "--quick-generate-key", _MAINTAINER, "ed25519", "sign", "never")
        with open(os.path.join(self.clone, "_utils", "pullrpc", "__init__.py"), encoding="utf-8") as file:
            self.version = re.search(r'__version__ = "(.*)"', file.read())[1]
        self.tag = f"v{self.version}"
        self.name = f"qvm-remote-formula-{self.version}.tar.gz"

    def do(self, *words, cwd=None):
        """Run a program that has to succeed."""
        done = _run(words, cwd or self.clone, self.env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def release(self, folder, tag=None, umask=0o022, **env):
        """Make a release."""
        words = ["sh", "-c", f'umask {umask:o}; exec tools/release.sh "$@"', "sh", tag or self.tag, str(folder)]
        return _run(words, self.clone, {**self.env, **env})


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    with _gnupg_home() as keys:
        one = Maker(str(tmp_path_factory.mktemp("release")), keys)
        one.do("git", "tag", "-s", "-m", "a release", one.tag)
        yield one


@pytest.fixture(scope="module")
def released(maker, tmp_path_factory):
    """A folder with a release, and the key in it."""
    folder = tmp_path_factory.mktemp("released")
    done = maker.release(folder)
    assert done.returncode == 0, done.stderr
    (folder / "qvm-remote-release.asc").write_text(maker.do("gpg", "--armor", "--export", "maintainer@example.org"))
    return folder


def _verify(folder, tmp_path):
    """Do what the page says, in a copy, as somebody who has no keys."""
    with open(os.path.join(ROOT, "docs", "release.rst"), encoding="utf-8") as file:
        blocks = re.findall(r"\.\. code-block:: sh\n\n((?:   .*\n|\n)+)", file.read())
    (commands,) = [block for block in blocks if "gpgv" in block]
    home = tmp_path / "home"
    home.mkdir(mode=0o700, exist_ok=True)
    return _run(["sh", "-c", commands], folder, {"PATH": os.environ["PATH"], "HOME": str(home)})


def _copy(released, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(released, folder)
    return folder


def test_a_release_is_verified_as_the_page_says(released, tmp_path):
    done = _verify(_copy(released, tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "OK" in done.stdout
    assert "Good signature" in done.stderr


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _sign_with_another_key(folder, maker, tmp_path):
    with _gnupg_home() as home:
        env = {**maker.env, "GNUPGHOME": home}
        for words in (
            ["--passphrase", "", "--quick-generate-key", _MAINTAINER, "ed25519", "sign", "never"],
            ["--yes", "--armor", "--detach-sign", "--output", "SHA256SUMS.asc", "SHA256SUMS"],
        ):
            assert _run(["gpg", "--batch", *words], folder, env).returncode == 0


def _replace(folder, maker, tmp_path):
    """The tarball and its sum are another's; the signature is not."""
    _flip(folder / maker.name, 100)
    (folder / "SHA256SUMS").write_text(maker.do("sha256sum", maker.name, cwd=folder))


@pytest.mark.parametrize(
    "tamper",
    [
        lambda folder, maker, tmp_path: _flip(folder / maker.name, 100),
        lambda folder, maker, tmp_path: _flip(folder / "SHA256SUMS", 80),
        lambda folder, maker, tmp_path: (folder / "SHA256SUMS.asc").unlink(),
        lambda folder, maker, tmp_path: (folder / maker.name).unlink(),
        _replace,
        _sign_with_another_key,
    ],
    ids=["tarball", "sums", "no-signature", "no-tarball", "tarball-and-sums", "another-key"],
)
def test_what_was_tampered_with_is_not_verified(released, maker, tmp_path, tamper):
    folder = _copy(released, tmp_path)
    tamper(folder, maker, tmp_path)
    assert _verify(folder, tmp_path).returncode != 0


def test_the_same_tag_gives_the_same_bytes_under_other_settings(released, maker, tmp_path):
    maker.do("git", "config", "tar.umask", "0077")
    maker.do("git", "config", "core.autocrlf", "true")
    done = maker.release(tmp_path / "again", umask=0o077, TZ="Asia/Tokyo", LANG="C.UTF-8")
    assert done.returncode == 0, done.stderr
    for name in (maker.name, "SHA256SUMS"):
        assert (tmp_path / "again" / name).read_bytes() == (released / name).read_bytes()
    listed = maker.do("tar", "-tf", str(released / maker.name)).splitlines()
    assert f"qvm-remote-formula-{maker.version}/_utils/pullrpc/tokens.py" in listed
    # rpmbuild's %autosetup goes into this folder.
    assert {name.partition("/")[0] for name in listed} == {f"qvm-remote-formula-{maker.version}"}


def test_nothing_is_released_that_was_not_signed_or_has_another_version(maker, tmp_path):
    maker.do("git", "tag", "-f", "v0.1")
    maker.do("git", "tag", "-f", "-s", "-m", "a release", "v9.9.9")
    (tmp_path / "SHA256SUMS").touch()
    for tag, text in (("v0.1", "no signature"), ("v0.2", "no tag"), ("--output=x", "a tag is v"), ("v9.9.9", "another version"), (maker.tag, "is there already")):
        done = maker.release(tmp_path, tag)
        assert done.returncode == 1
        assert text in done.stderr
    assert os.listdir(tmp_path) == ["SHA256SUMS"]


def test_without_a_key_nothing_is_left(maker, tmp_path):
    done = maker.release(tmp_path / "none", QVM_REMOTE_RELEASE_KEY="nobody@example.org")
    assert (done.returncode, "GnuPG could not sign" in done.stderr) == (1, True)
    assert os.listdir(tmp_path / "none") == []
