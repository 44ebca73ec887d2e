# SPDX-License-Identifier: GPL-2.0-or-later
"""Keyring, ledger, config, audit log, pool: the parts that dom0's safety rests on, each by itself."""

import asyncio
import errno
import fcntl
import functools
import json
import os
import sqlite3
import threading
import time

import pullrpc.keyring
import pytest
from pullrpc.agentless import _read_listing
from pullrpc.aio import Threads, run
from pullrpc.audit import AuditLog
from pullrpc.config import make_config
from pullrpc.errors import AuditError, ConfigError, EngineBusy, FrameError, KeyringError, LedgerError, PullError, ThreadError
from pullrpc.keyring import Keyring
from pullrpc.ledger import Ledger
from pullrpc.lock import EngineLock, is_held
from pullrpc.scheduler import FairPool

CID = "20261124-000000-1-0badcafe"


@pytest.fixture
def keyring(tmp_path):
    return Keyring(str(tmp_path / "keys"))


def test_a_key_can_be_stored_used_and_removed(keyring):
    raw = os.urandom(32)
    keyring.put("work", raw.hex())
    assert keyring.get("work") == raw
    assert keyring.remove("work") is True
    with pytest.raises(KeyringError, match="no key for work"):
        keyring.get("work")


def test_without_a_folder_there_is_no_key(keyring):
    with pytest.raises(KeyringError, match="does not exist"):
        keyring.get("work")


def test_a_shared_key_is_refused_when_stored_and_when_used(keyring, tmp_path):
    digits = os.urandom(32).hex()
    keyring.put("work", digits)
    with pytest.raises(KeyringError, match="already the key of work"):
        keyring.put("dev", digits.upper())
    path = tmp_path / "keys" / "dev.key"
    path.write_text(digits)
    path.chmod(0o600)
    for vm in ("work", "dev"):
        with pytest.raises(KeyringError, match="are the same"):
            keyring.get(vm)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused(keyring, tmp_path, mode):
    keyring.put("work", os.urandom(32).hex())
    (tmp_path / "keys" / "work.key").chmod(mode)
    with pytest.raises(KeyringError, match="0600"):
        keyring.get("work")


def test_a_key_behind_a_symlink_is_refused(keyring, tmp_path):
    keyring.put("work", os.urandom(32).hex())
    (tmp_path / "keys" / "work.key").rename(tmp_path / "elsewhere")
    (tmp_path / "keys" / "work.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyringError):
        keyring.get("work")


_FAILING = [
    *("os.open", "os.fstat", "os.read", "os.stat", "os.lstat", "os.scandir", "os.listdir", "os.makedirs", "os.unlink", "os.rename", "os.link"),
    *("os.utime", "os.fsync", "fcntl.flock"),
]


@pytest.mark.parametrize("failing", _FAILING)
def test_what_the_disk_does_not_give_back_is_a_keyrings_error_and_ends_nothing_else(keyring, tmp_path, failing):
    real = getattr(fcntl if failing.startswith("fcntl.") else os, failing.partition(".")[2])
    here = threading.get_ident()

    def fails(*words, **options):
        # Whatever else this process is at goes on.
        if threading.get_ident() != here:
            return real(*words, **options)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    first, new, key = (os.urandom(32) for _ in range(3))
    calls = {
        "get": ("work",),
        "newest": ("work",),
        "staged": ("work",),
        "accepted": ("work", 300),
        "held": ("work",),
        "stage": ("work", key),
        "handed": ("work", new),
        "retire_old": ("work", first, 300),
        "made_at": ("work",),
        "drop_old": ("work", 0),
        "bound": ("work",),
        "bind": ("work", "one"),
        "put": ("work", key.hex(), None, "one"),
        "exists": ("work",),
        "remove": ("work",),
        "names": (),
        "fingerprints": (),
        "strangers": (),
        "check_folder": (),
    }
    failed = []
    for name, words in calls.items():
        keyring.put("work", first.hex(), uuid="one")
        keyring.stage("work", os.urandom(32))
        keyring.handed("work", keyring.staged("work"))
        keyring.stage("work", new)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"pullrpc.keyring.{failing}", fails)
            try:
                getattr(keyring, name)(*words)
            except KeyringError:
                failed.append(name)
        # A key that could not be looked at is not taken for one that is none, and the VM may have it.
        if name == "drop_old":
            assert (tmp_path / "keys" / "work.key.new").exists()
    assert failed


def test_what_is_no_file_in_a_keys_place_is_no_key_and_keeps_no_descriptor(keyring, tmp_path):
    raw = os.urandom(32)
    keyring.put("work", raw.hex())
    (tmp_path / "keys" / "dev.key").mkdir()
    os.mkfifo(tmp_path / "keys" / "old.key")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        (tmp_path / "keys" / "unrelated").write_text(str(number))
        assert keyring.get("work") == raw
        for vm in ("dev", "old"):
            with pytest.raises(KeyringError, match="must be a plain file"):
                keyring.get(vm)
    assert len(os.listdir("/proc/self/fd")) < before + 50


def test_a_key_whose_qube_can_not_be_noted_is_not_stored(keyring, monkeypatch):
    write = pullrpc.keyring.write_durably

    def full(path, *words):
        if path.endswith(".uuid"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *words)

    first, key = os.urandom(32), os.urandom(32)
    with monkeypatch.context() as patch:
        patch.setattr("pullrpc.keyring.write_durably", full)
        with pytest.raises(KeyringError, match="can't note which qube the key of work is for"):
            keyring.put("work", key.hex(), uuid="one")
    assert keyring.names() == []
    keyring.put("work", first.hex(), uuid="one")
    with monkeypatch.context() as patch:
        patch.setattr("pullrpc.keyring.write_durably", full)
        with pytest.raises(KeyringError, match="can't note which qube"):
            keyring.put("work", key.hex(), uuid="two")
    # The first key is not that one's, and this one is nobody's.
    assert (keyring.get("work"), keyring.bound("work")) == (key, "one")


def test_a_claim_is_given_once_and_survives_a_reopening(tmp_path):
    path = str(tmp_path / "state" / "ledger.sqlite")
    ledger = Ledger(path)
    assert ledger.claim_all([("work", CID, b"mac", "")]) == [True]
    assert ledger.claim_all([("work", CID, b"mac", "")]) == [False]
    assert ledger.claim_all([("dev", CID, b"mac", "")]) == [True]
    ledger.close()
    again = Ledger(path)
    assert again.claim_all([("work", CID, b"mac", "")]) == [False]
    assert again.state("work", CID) == ("claimed", b"mac")


class _Watched(sqlite3.Connection):
    """Notes what is in force when something is committed; SQLite alone knows when it forces that to the disk."""

    FULL = 2

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.committed = []

    def execute(self, statement, *args):
        if statement == "COMMIT":
            self.committed.append((super().execute("PRAGMA synchronous").fetchone()[0], super().execute("PRAGMA journal_mode").fetchone()[0]))
        return super().execute(statement, *args)


def test_a_claim_is_committed_so_that_it_is_on_the_disk_on_return(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=_Watched))
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    ledger._db.committed.clear()
    for cid in (CID, f"{CID[:-1]}f"):
        # What comes between them may have another mode in force.
        assert ledger.claim_all([("work", cid, b"mac", "")]) == [True]
        assert ledger._db.committed == [(_Watched.FULL, "wal")]
        ledger.start("work", cid)
        ledger.finish("work", cid, 0, "done")
        ledger.delivered([("work", cid)])
        ledger._db.committed.clear()


def test_only_one_of_many_threads_may_start_a_command(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    ledger.claim_all([("work", CID, b"", "")])
    won = []
    threads = [threading.Thread(target=lambda: won.append(ledger.start("work", CID))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 15 + [True]


def test_a_state_never_goes_back(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    ledger.claim_all([("work", CID, b"", "")])
    ledger.start("work", CID)
    ledger.finish("work", CID, 0, "done")
    ledger.delivered([("work", CID)])
    assert ledger.start("work", CID) is False
    ledger.finish("work", CID, 1, "done")
    assert ledger.counts() == {"delivered": 1}


def _steps(ledger, ask):
    """How many steps of its own SQLite takes for a question."""
    count = [0]

    def step():
        count[0] += 1

    ledger._db.set_progress_handler(step, 1)
    try:
        ask(ledger)
    finally:
        ledger._db.set_progress_handler(None, 0)
    return count[0]


@pytest.mark.parametrize(
    "ask",
    [
        lambda ledger: ledger.undelivered("work"),
        lambda ledger: ledger.waiting("work"),
        lambda ledger: ledger.waiting_end("work", CID),
        lambda ledger: ledger.state("work", CID),
        Ledger.unfinished,
        Ledger.open_commands,
        Ledger.open_counts,
    ],
    ids=["undelivered", "waiting", "waiting_end", "state", "unfinished", "open_commands", "open_counts"],
)
def test_to_ask_what_is_open_costs_the_same_however_much_was_delivered(tmp_path, ask):
    ledger = Ledger(str(tmp_path / "ledger.sqlite"))
    ended, runs, waits = CID, f"{CID[:-1]}1", f"{CID[:-1]}2"
    ledger.claim_all([(vm, cid, b"", "") for vm in ("work", "dev") for cid in (ended, runs, waits)])
    for vm in ("work", "dev"):
        ledger.start(vm, runs)
        ledger.finish(vm, ended, 0, "done")
    before = _steps(ledger, ask)
    delivered = [("work", f"20261123-000000-1-{number:08x}") for number in range(500)]
    ledger.claim_all([(*one, b"", "") for one in delivered])
    for one in delivered:
        ledger.finish(*one, 0, "done")
    ledger.delivered(delivered)
    assert _steps(ledger, ask) == before


def test_a_damaged_ledger_is_an_error(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"garbage" * 1000)
    path.chmod(0o600)
    with pytest.raises(LedgerError):
        Ledger(str(path))


@pytest.mark.parametrize(
    "settings",
    [{"parallell": 1}, {"parallel": "8"}, {"parallel": True}, {"parallel": 0}, {"key_dir": "keys"}, {"key_dir": "/srv/keys"}, {"accept_v1": True}, [1]]
    + [{"vms": {"dom0": {}}}, {"vms": {"a": {"parallel": 1}}}, {"vms": {"a": 5}}, {"vms": 5}, {"audit_log": "/a\nb"}],
)
def test_a_wrong_setting_is_an_error_that_names_it(settings):
    with pytest.raises(ConfigError):
        make_config(settings)


def test_a_vms_own_settings_hold_for_it_alone():
    config = make_config({"timeout_max": 100, "vms": {"work": {"timeout_max": 3600, "accept_v1": True}}})
    assert (config.for_vm("work").timeout_max, config.for_vm("work").accept_v1) == (3600, True)
    assert (config.for_vm("dev").timeout_max, config.for_vm("dev").accept_v1) == (100, False)


def test_an_audit_line_is_one_line_of_ascii_whatever_a_vm_sent(tmp_path):
    path = tmp_path / "log" / "audit.log"
    AuditLog(str(path)).write("accepted", "work", CID, command="a\nb\x1b[2J\u202eé" * 300)
    raw = path.read_bytes()
    assert raw.count(b"\n") == 1
    assert all(byte == 10 or 32 <= byte < 127 for byte in raw)
    assert json.loads(raw)["vm"] == "work"
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_audit_log_that_cant_be_written_is_an_error(tmp_path):
    (tmp_path / "audit.log").symlink_to("/dev/full")
    with pytest.raises(AuditError):
        AuditLog(str(tmp_path / "audit.log")).write("x", "work")


def test_only_one_holds_the_lock(tmp_path):
    run_dir = str(tmp_path / "run")
    with EngineLock(run_dir):
        assert is_held(run_dir)
        with pytest.raises(EngineBusy), EngineLock(run_dir):
            raise AssertionError("two engines")
    assert not is_held(run_dir)


def test_a_lock_folder_that_others_may_write_to_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(PullError, match="only root can write"), EngineLock(str(tmp_path / "run")):
        raise AssertionError("a shared folder was used")


def test_the_pool_bounds_what_runs_and_vms_take_turns():
    order, most, now, lock = [], [0], [0], threading.Lock()
    go, ran = threading.Event(), threading.Event()

    def run(vm, cid):
        go.wait(60)
        if cid == "2":
            # Who begins first need not be the first here: that is up to the kernel.
            ran.wait(20)
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            order.append(vm)
        if vm == "one":
            ran.set()
        time.sleep(0.01)
        with lock:
            now[0] -= 1

    pool = FairPool(lambda: 2, lambda vm: 1, run)
    for number in range(10):
        pool.submit("many", str(number))
    pool.submit("one", "0")
    go.set()
    end = time.monotonic() + 60
    while pool.waiting_count() or pool.busy():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(order) == 11
    assert most[0] <= 2
    assert order.index("one") <= 2


def test_a_closed_pool_gives_back_what_waited_and_starts_nothing():
    release = threading.Event()
    pool = FairPool(lambda: 1, lambda vm: 1, lambda vm, cid: release.wait(60))
    pool.submit("a", "1")
    pool.submit("a", "2")
    end = time.monotonic() + 20
    while pool.waiting("a") != 1:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert pool.close() == [("a", "2")]
    assert pool.submit("a", "3") is False
    release.set()
    assert pool.wait_idle(20)


@pytest.fixture
def no_threads(monkeypatch):
    """While set, no thread can be started, as when the kernel has no room for one."""
    start, none = threading.Thread.start, threading.Event()

    def start_or_not(thread):
        if none.is_set():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_not)
    return none


def test_the_pool_has_all_its_threads_again_once_they_can_be_started(no_threads):
    both, release = threading.Barrier(3), threading.Event()

    def run(vm, cid):
        if cid != "0":
            both.wait(20)
        release.wait(20)

    pool = FairPool(lambda: 3, lambda vm: 3, run)
    assert pool.submit("work", "0")
    no_threads.set()
    assert pool.submit("work", "1")
    assert pool.submit("work", "2")
    no_threads.clear()
    assert pool.submit("work", "3")
    # Two of them run beside the first one now, and neither would if the threads that could not be started counted.
    both.wait(20)
    release.set()
    pool.close()
    assert pool.wait_idle(20)


def test_a_command_whose_thread_can_not_be_started_runs_when_another_is_free(no_threads):
    ran, release = [], threading.Event()

    def run(vm, cid):
        release.wait(20)
        ran.append(cid)

    pool = FairPool(lambda: 2, lambda vm: 2, run)
    assert pool.submit("work", "0")
    no_threads.set()
    assert pool.submit("work", "1")
    release.set()
    _until(lambda: len(ran) == 2)
    pool.close()


def test_a_pool_that_can_start_no_thread_at_all_says_so_and_keeps_nothing(no_threads):
    ran = []
    pool = FairPool(lambda: 2, lambda vm: 2, lambda vm, cid: ran.append(cid))
    no_threads.set()
    with pytest.raises(ThreadError, match="can't start a thread"):
        pool.submit("work", "0")
    assert pool.is_done("work")
    no_threads.clear()
    assert pool.submit("work", "1")
    _until(lambda: ran)
    assert ran == ["1"]
    pool.close()


def test_a_call_whose_thread_can_not_be_started_is_made_when_another_is_free_or_fails(no_threads):
    release = threading.Event()

    async def calls():
        threads = Threads(2, "test")
        no_threads.set()
        with pytest.raises(ThreadError, match="can't start a thread"):
            await threads.call(int)
        no_threads.clear()
        first = threads.call(release.wait, 20)
        no_threads.set()
        second = threads.call(release.is_set)
        no_threads.clear()
        # This one has a thread of its own.
        assert await threads.call(int) == 0
        release.set()
        done = await first, await second
        threads.close()
        return done

    done = run(asyncio.wait_for(calls(), 20))
    assert done[0] is True


def _until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_vm_says_at_the_end_of_its_list_that_it_has_an_agent_now():
    assert _read_listing(b"I 20260131-235959-4711-0badcafe 1 1 -1\nA\nEND\n", 1)[2] is True
    assert _read_listing(b"END\n", 1) == ([], [], False)
    for text in (b"A\nA\nEND\n", b"A\nC 20260131-235959-4711-0badcafe\nEND\n"):
        with pytest.raises(FrameError):
            _read_listing(text, 1)
