# SPDX-License-Identifier: GPL-2.0-or-later
"""A part of a result: what is shown of it is what was hashed, however its file is changed in between."""

import hashlib
import os

import pytest
from pullrpc.errors import PullError
from qvm_remote_client import part as module
from qvm_remote_client.part import Part

DATA = os.urandom(3 * module._CHUNK + 17)


@pytest.fixture(params=["in memory", "read again"])
def path(request, tmp_path, monkeypatch):
    """A file that is kept in memory, or is too large for that."""
    if request.param == "read again":
        monkeypatch.setattr(module, "_HELD_MAX", 1000)
    path = tmp_path / "out"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("start", [0, 1, module._CHUNK, len(DATA) - 1, len(DATA)])
@pytest.mark.parametrize("begun", [0, 1000])
def test_it_is_what_was_hashed_from_any_place(path, start, begun):
    part = Part(str(path))
    whole = hashlib.sha256(DATA).digest()
    assert part.digest(begun, hashlib.sha256(DATA[:begun])) == whole
    assert b"".join(part.blocks(max(start, begun))) == DATA[max(start, begun) :]


def _exchange(path):
    with open(path, "r+b") as file:
        file.seek(2 * module._CHUNK)
        file.write(b"EVIL")


def _replace(path):
    path.unlink()
    path.write_bytes(b"EVIL" * 100)


@pytest.mark.parametrize(
    "change", [_exchange, _replace, lambda path: os.truncate(path, 5), lambda path: path.open("ab").write(b"EVIL")], ids=["exchanged", "replaced", "cut", "longer"]
)
def test_a_change_is_never_shown(path, change):
    part = Part(str(path))
    assert part.digest() == hashlib.sha256(DATA).digest()
    change(path)
    shown = b""
    try:
        for block in part.blocks(0):
            shown += block
    except PullError as err:
        assert "was changed" in str(err)
        assert len(shown) < len(DATA)
    else:
        assert len(shown) == len(DATA)
    assert DATA.startswith(shown)


def test_what_was_cut_before_it_is_hashed_has_another_digest(path):
    part = Part(str(path))
    os.truncate(path, 5)
    assert part.digest() == hashlib.sha256(DATA[:5]).digest()


def test_what_is_added_before_it_is_hashed_is_not_looked_at(path):
    part = Part(str(path))
    with path.open("ab") as file:
        file.write(b"EVIL")
    assert part.digest() == hashlib.sha256(DATA).digest()
    assert b"".join(part.blocks(0)) == DATA


def test_no_file_is_an_empty_part_and_a_shorter_one_is_known(tmp_path):
    part = Part(str(tmp_path / "none"))
    assert part.digest() == hashlib.sha256().digest()
    assert list(part.blocks(0)) == []
    assert part.digest(5, hashlib.sha256(b"12345")) is None
    assert part.beginning(10) == b""


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["folder", "fifo", "link"])
def test_only_a_plain_file_is_opened(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises((PullError, OSError)):
        Part(str(tmp_path / "out"))


def test_more_than_dom0_ever_sends_is_not_read(tmp_path):
    with open(tmp_path / "out", "wb") as file:
        file.truncate(module._SIZE_MAX + 1)
    with pytest.raises(PullError, match="larger"):
        Part(str(tmp_path / "out"))
