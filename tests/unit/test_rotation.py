# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys that change: both work for a while, and then one; what a VM has is seen; what was forgotten stays unusable."""

import concurrent.futures
import hashlib
import os
import threading
import time

import pullrpc.keyring
import pytest
from pullrpc.audit import AuditLog
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import KeyringError, Refused
from pullrpc.gate import Request, check_new
from pullrpc.handover import Handover
from pullrpc.ids import new_cid
from pullrpc.keyring import Keyring
from pullrpc.ledger import Ledger
from pullrpc.session import Found
from pullrpc.tokens import fingerprint, make_token, read_meta

OVERLAP = 300


@pytest.fixture
def keyring(tmp_path):
    """A key folder with a key for work."""
    one = Keyring(str(tmp_path / "keys"))
    one.put("work", os.urandom(32).hex())
    return one


class _Vm:
    """A VM as its session shows it."""

    def __init__(self):
        self.key = None
        self.given = 0

    def inspect(self):
        return Found(None if self.key is None else fingerprint(self.key), ())

    def set_key(self, key):
        self.key = key
        self.given += 1


@pytest.fixture
def handover(keyring, tmp_path):
    """The handing over of that folder's keys."""
    return Handover(str(tmp_path / "notes"), keyring, AuditLog(str(tmp_path / "audit.log")))


def _look(handover, vm, policy):
    """Look at a VM and hand it its key if that is due, as the pull loop does."""
    key = handover.wanted("work")
    is_due, news = handover.look("work", vm.inspect(), key, policy)
    if is_due:
        vm.set_key(key)
        handover.handed("work", key)
    return news


def _stage(keyring):
    old, new = keyring.get("work"), os.urandom(32)
    keyring.stage("work", new)
    return old, new


def test_a_staged_key_works_beside_the_old_one(keyring):
    old, new = _stage(keyring)
    assert keyring.accepted("work", OVERLAP) == [old, new]
    assert keyring.newest("work") == new


def test_once_handed_the_new_key_is_the_key_and_the_old_one_works_for_the_overlap(keyring, tmp_path):
    old, new = _stage(keyring)
    assert keyring.handed("work", new) is True
    assert keyring.accepted("work", OVERLAP) == [new, old]
    path = tmp_path / "keys" / "work.key.old"
    os.utime(path, (time.time() - OVERLAP - 1,) * 2)
    assert keyring.accepted("work", OVERLAP) == [new]
    assert keyring.held("work") == [new, old]
    keyring.drop_old("work", OVERLAP)
    assert not path.exists()


def test_a_clock_that_was_set_back_gives_no_old_key_a_second_life(keyring, tmp_path):
    _, new = _stage(keyring)
    keyring.handed("work", new)
    os.utime(tmp_path / "keys" / "work.key.old", (time.time() + 3600,) * 2)
    assert keyring.accepted("work", OVERLAP) == [new]


def test_the_first_use_of_the_new_key_shortens_the_old_ones_life(keyring, tmp_path):
    began = time.time()
    old, new = _stage(keyring)
    keyring.handed("work", new)
    keyring.retire_old("work", old, OVERLAP)
    # The clock of files is a little behind.
    assert os.stat(tmp_path / "keys" / "work.key.old").st_mtime > began - 1
    used = time.time()
    keyring.retire_old("work", new, OVERLAP)
    assert used + 29 < os.stat(tmp_path / "keys" / "work.key.old").st_mtime + OVERLAP < time.time() + 31
    assert keyring.accepted("work", OVERLAP) == [new, old]


def test_a_staged_key_that_the_vm_signs_with_was_handed(keyring):
    old, new = _stage(keyring)
    assert keyring.handed("work", new) is True
    assert keyring.get("work") == new
    assert keyring.staged("work") is None
    assert keyring.accepted("work", OVERLAP) == [new, old]


def test_a_key_that_is_staged_or_replaced_can_be_no_other_vms(keyring):
    old, new = _stage(keyring)
    for key in (old, new):
        with pytest.raises(KeyringError, match="already the key of work"):
            keyring.put("dev", key.hex())
    keyring.handed("work", new)
    with pytest.raises(KeyringError, match="already the key of work"):
        keyring.put("dev", old.hex())


def test_revoking_takes_all_keys(keyring, tmp_path):
    _, new = _stage(keyring)
    keyring.handed("work", new)
    keyring.stage("work", os.urandom(32))
    assert keyring.remove("work") is True
    assert os.listdir(tmp_path / "keys") == []


def test_a_vm_without_a_key_can_not_be_rotated(keyring):
    with pytest.raises(KeyringError, match="no key for dev"):
        keyring.stage("dev", os.urandom(32))


def test_a_pending_key_is_handed_once(keyring, handover):
    vm = _Vm()
    assert handover.known("work") == "pending"
    assert _look(handover, vm, "generate") == "key-handed"
    assert _look(handover, vm, "generate") is None
    assert (vm.key, vm.given, handover.known("work")) == (keyring.get("work"), 1, "fits")


@pytest.mark.parametrize(("found", "word"), [(None, "lost"), (b"another key of thirty-two bytes.", "altered")])
def test_a_key_that_is_gone_is_mended_if_dom0_makes_it_and_told_once_if_not(keyring, handover, found, word):
    vm = _Vm()
    _look(handover, vm, "given")
    vm.key = found
    assert _look(handover, vm, "given") == f"key-{word}"
    assert _look(handover, vm, "given") is None
    assert (vm.key, handover.known("work")) == (found, word)
    assert _look(handover, vm, "generate") == "key-mended"
    assert vm.key == keyring.get("work")


def test_a_rotated_key_is_pending_until_the_vm_has_it(keyring, handover):
    vm = _Vm()
    _look(handover, vm, "own")
    _, new = _stage(keyring)
    assert handover.known("work") == "pending"
    assert _look(handover, vm, "own") == "key-handed"
    assert vm.key == new == keyring.get("work")


def test_no_note_holds_a_key(keyring, handover, tmp_path):
    _look(handover, _Vm(), "generate")
    kept = b"".join(path.read_bytes() for path in (*(tmp_path / "notes").iterdir(), tmp_path / "audit.log"))
    assert keyring.get("work").hex().encode() not in kept


def test_what_a_forgotten_vm_had_run_can_not_be_replayed(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    cid = new_cid()
    ledger.claim_all([("work", cid, b"mac", "")])
    ledger.start("work", cid)
    ledger.finish("work", cid, 0, "done")
    assert ledger.forget("work") == 1
    assert (ledger.state("work", cid), ledger.count_of("work")) == (None, 0)
    request = Request("work", cid, "true", None, "shell", 5, b"", b"mac", b"k" * 32)
    with pytest.raises(Refused) as caught:
        check_new(make_config({}), ledger, request)
    assert caught.value.code == "replay"
    # Another VM's ids are not touched.
    assert check_new(make_config({}), ledger, Request("dev", cid, "true", None, "shell", 5, b"", b"mac", b"k" * 32)) is None


def test_what_runs_is_not_forgotten(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    cid = new_cid()
    ledger.claim_all([("work", cid, b"mac", "")])
    assert ledger.forget("work") == 0
    assert ledger.state("work", cid)[0] == "claimed"


def test_a_request_shows_no_key():
    assert "kkkk" not in repr(Request("work", "c", "true", None, "shell", 5, b"", b"mac", b"k" * 32))


def test_two_that_see_the_new_key_arrive_at_once_keep_the_old_one_working(keyring):
    for _ in range(20):
        old, new = _stage(keyring)
        start = threading.Barrier(4)

        def see(new=new, start=start):
            start.wait()
            return keyring.handed("work", new)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            outcomes = [future.result() for future in [pool.submit(see) for _ in range(4)]]
        assert sorted(outcomes) == [False, False, False, True]
        assert keyring.accepted("work", OVERLAP) == [new, old]


def test_a_second_rotation_before_the_first_is_over_keeps_the_key_before_working(keyring):
    old, new = _stage(keyring)
    keyring.handed("work", new)
    newer = os.urandom(32)
    keyring.stage("work", newer)
    assert keyring.accepted("work", OVERLAP) == [new, newer, old]


def test_a_staged_key_that_can_not_be_used_locks_nobody_out(keyring, handover, tmp_path):
    key = keyring.get("work")
    staged = tmp_path / "keys" / "work.key.new"
    # As a power cut may leave it.
    staged.write_bytes(b"")
    staged.chmod(0o600)
    assert keyring.accepted("work", OVERLAP) == [key]
    vm = _Vm()
    assert _look(handover, vm, "own") == "key-handed"
    assert vm.key == key
    assert keyring.fingerprints() == {"work": {"fingerprint": fingerprint(key)}}
    keyring.drop_old("work", OVERLAP)
    assert not staged.exists()


def test_a_vm_that_is_revoked_while_its_new_key_arrives_has_none(keyring, monkeypatch):
    _, new = _stage(keyring)
    linked, removed_first, arrived = threading.Event(), threading.Event(), threading.Event()
    rename, forget = os.rename, pullrpc.keyring.forget

    def slow_rename(*paths, **options):
        # Between the two steps of the key's arrival, the other thread may go on, if it can.
        linked.set()
        removed_first.wait(0.5)
        rename(*paths, **options)

    def slow_forget(path):
        forget(path)
        if path.endswith("/work.key"):
            removed_first.set()
            arrived.wait(0.5)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr("pullrpc.keyring.os.rename", slow_rename)
        monkeypatch.setattr("pullrpc.keyring.forget", slow_forget)
        arriving = pool.submit(keyring.handed, "work", new)
        arriving.add_done_callback(lambda _: arrived.set())
        assert linked.wait(60)
        assert keyring.remove("work") is True
        arriving.result()
    assert keyring.names() == []
    with pytest.raises(KeyringError, match="no key for work"):
        keyring.accepted("work", OVERLAP)


def test_who_looks_at_the_moment_of_the_change_sees_the_new_key(keyring):
    ended = threading.Event()
    missing = []

    def look():
        while not ended.is_set():
            newest = keyring.newest("work")
            if newest not in keyring.accepted("work", OVERLAP) and newest == keyring.newest("work"):
                missing.append(newest)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        for _ in range(200):
            _, new = _stage(keyring)
            keyring.handed("work", new)
        ended.set()
        for future in looking:
            future.result()
    assert missing == []


def test_a_key_that_is_staged_while_another_is_handed_over_stays_staged(keyring, handover):
    class Slow(_Vm):
        def set_key(self, key):
            super().set_key(key)
            keyring.stage("work", newer)

    newer = os.urandom(32)
    key = keyring.get("work")
    vm = Slow()
    assert _look(handover, vm, "generate") == "key-handed"
    assert vm.key == key
    assert keyring.accepted("work", OVERLAP) == [key, newer]
    assert handover.known("work") == "pending"


@pytest.fixture
def dom0(tmp_path):
    """dom0's side with a key for work, everything in a folder of this test."""
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "audit.log"}
    one = Dom0(make_config({name: str(tmp_path / folder) for name, folder in names.items()}))
    one.keyring.put("work", os.urandom(32).hex())
    return one


def _accept(dom0, key):
    cid = new_cid()
    token = make_token(key, "work", cid, 10, "ping", b"ping")
    assert dom0.intake.claim([(dom0.intake.admit("work", cid.encode(), b"ping", token, -1), 0)]) == {}
    return cid


def test_a_command_that_waits_while_its_key_is_replaced_is_run_and_answered_under_that_key(dom0, tmp_path):
    old = dom0.keyring.get("work")
    cid = _accept(dom0, old)
    dom0.access.rotate("work")
    new = dom0.keyring.staged("work")
    dom0.keyring.handed("work", new)
    # Its time is long over: the old key is good for nothing new, and kept for what waits.
    path = tmp_path / "qvm-remote-keys" / "work.key.old"
    os.utime(path, (time.time() - 7200,) * 2)
    dom0.access.drop_old_key("work")
    with pytest.raises(Refused):
        _accept(dom0, old)
    with pytest.raises(KeyringError, match="signed before its last rotation"):
        dom0.access.rotate("work")
    assert dom0.execution.execute("work", cid)["status"] == "done"
    parts = dom0.results.result("work", cid)[1]
    out, meta = (b"".join(parts[name][1](0)) for name in ("out", "meta"))
    assert read_meta(old, cid, hashlib.sha256(out).digest(), hashlib.sha256(b"").digest(), meta)[1] is True
    dom0.access.drop_old_key("work")
    assert not path.exists()


def test_a_revoked_vms_waiting_command_is_not_run(dom0):
    cid = _accept(dom0, dom0.keyring.get("work"))
    dom0.access.forget("work")
    assert dom0.execution.execute("work", cid)["status"] == "refused"


def test_the_new_key_does_not_shorten_the_old_ones_life_while_commands_wait(dom0, tmp_path):
    began = time.time()
    old = dom0.keyring.get("work")
    first = _accept(dom0, old)
    dom0.access.rotate("work")
    new = dom0.keyring.staged("work")
    second = _accept(dom0, new)
    path = tmp_path / "qvm-remote-keys" / "work.key.old"
    assert path.stat().st_mtime > began - 1
    for cid in (first, second):
        dom0.execution.execute("work", cid)
    used = time.time()
    _accept(dom0, new)
    assert used + 29 < path.stat().st_mtime + OVERLAP < time.time() + 31


def test_a_rotation_that_waits_is_not_replaced_by_another(dom0):
    old, new = dom0.access.rotate("work")
    assert dom0.access.rotate("work") == (old, new)
    given = os.urandom(32)
    assert dom0.access.rotate("work", given) == (old, fingerprint(given))


@pytest.mark.parametrize("given", [None, bytes(range(32, 64))], ids=["made-in-dom0", "given"])
def test_two_rotations_at_once_have_the_same_new_key(dom0, given):
    other = Dom0(dom0.config)
    write, turned = dom0.audit.write, []

    def slow_write(*words, **fields):
        # The other one goes on meanwhile, if it can.
        rotating.start()
        rotating.join(0.5)
        write(*words, **fields)

    rotating = threading.Thread(target=lambda: turned.append(other.access.rotate("work", given)))
    dom0.audit.write = slow_write
    turned.append(dom0.access.rotate("work", given))
    rotating.join()
    assert turned[0] == turned[1]
    assert turned[0][1] == fingerprint(dom0.keyring.staged("work"))
