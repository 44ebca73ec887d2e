# SPDX-License-Identifier: GPL-2.0-or-later
"""A ledger that is damaged, in whatever way, is never believed: nothing runs, and what is wrong and how to mend it is said. The new
one takes nothing that the old one could have known.
"""

import concurrent.futures
import contextlib
import os
import shutil
import sqlite3
import threading
import time

import pytest
from pullrpc import ledger_file
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import LedgerDamaged, LedgerError, Refused
from pullrpc.ids import cid_time, new_cid
from pullrpc.ledger import Ledger
from pullrpc.service import Service
from pullrpc.tokens import make_token

KEY = bytes(range(32))


@contextlib.contextmanager
def _database(path):
    """The database itself; closed on return, so that all of it is in its file, if nobody else has it open."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        yield db


@pytest.fixture
def settings(tmp_path):
    """Settings of an engine that keeps everything in a folder of this test."""
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "log/audit.log"}
    return {**{name: str(tmp_path / folder) for name, folder in names.items()}, "syslog": False}


@pytest.fixture
def dom0(settings):
    """dom0's side with a key for work, and a ledger that knows enough for several pages."""
    one = Dom0(make_config(settings))
    one.keyring.put("work", KEY.hex())
    one.ledger.claim_all([("work", f"20260101-000000-1-{number:08x}", os.urandom(32), "") for number in range(600)])
    one._close_ledger()
    with _database(one.ledger_path) as db:
        db.execute("UPDATE command SET state = 'delivered'")
    return one


def _request(cid=None, command=b"ping"):
    cid = cid or new_cid()
    return "work", cid.encode("ascii"), command, make_token(KEY, "work", cid, 10, "ping", command)


def _overwrite(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def _truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def _other_tables(path):
    os.unlink(path)
    with _database(path) as db:
        db.execute("CREATE TABLE command (vm TEXT, cid TEXT)")
    os.chmod(path, 0o600)


def _other_database(path):
    os.unlink(path)
    with _database(path) as db:
        db.execute("CREATE TABLE songs (name TEXT)")
    os.chmod(path, 0o600)


def _only_its_log(path):
    with open(f"{path}-wal", "wb") as file:
        file.write(b"x" * 100)
    os.unlink(path)


_DAMAGES = {
    "truncated": _truncate,
    "truncated in a page": lambda path: os.truncate(path, os.path.getsize(path) - 100),
    "empty": lambda path: os.truncate(path, 0),
    "garbage in the middle": lambda path: _overwrite(path, os.path.getsize(path) // 2, os.urandom(6000)),
    "garbage at its beginning": lambda path: _overwrite(path, 0, os.urandom(4096)),
    "zeros in the middle": lambda path: _overwrite(path, os.path.getsize(path) // 8192 * 4096, bytes(4096)),
    "no database": lambda path: _overwrite(path, 0, b"garbage" * (os.path.getsize(path) // 7 + 1)),
    "other tables": _other_tables,
    "another database": _other_database,
    "only its log": _only_its_log,
}
damages = pytest.mark.parametrize("damage", _DAMAGES.values(), ids=_DAMAGES.keys())


def _service(dom0):
    return Service(dom0, dom0.intake.verify, dom0.execution.execute, lambda *_: None, lambda *_: None)


@damages
def test_nothing_runs_on_a_damaged_ledger_and_it_is_said_what_to_do(dom0, damage):
    damage(dom0.ledger_path)
    with pytest.raises(LedgerDamaged, match="nothing runs. In dom0, qvm_remote.ledger_check says how to mend that"):
        _service(dom0)._begin()
    # It is not mended by trying again, and no other one takes its place.
    with pytest.raises(LedgerDamaged):
        _service(dom0)._begin()


@damages
def test_a_damaged_ledger_is_set_aside_and_the_new_one_takes_nothing_from_before(dom0, damage):
    before = _request()
    damage(dom0.ledger_path)
    aside = dom0.renew_ledger()
    assert os.path.lexists(aside) or os.path.lexists(f"{aside}-wal")
    dom0.execution.recover()
    with pytest.raises(Refused) as caught:
        dom0.intake.verify(*before)
    assert caught.value.code == "replay"
    while int(time.time()) <= dom0.ledger.forgotten_before("work"):
        time.sleep(0.05)
    assert dom0.intake.verify(*_request())[1] is None


def test_damage_that_comes_while_it_is_open_refuses_each_command_with_the_reason(dom0):
    """A page of the table itself: nothing can be looked up."""
    assert dom0.intake.verify(*_request())[1] is None
    with _database(dom0.ledger_path) as db:
        db.execute("PRAGMA writable_schema = 1")
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'command'").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _overwrite(dom0.ledger_path, (root - 1) * 4096, b"\xff" * 4096)
    dom0._close_ledger()
    with pytest.raises(Refused, match="the ledger is damaged .* qvm_remote.ledger_check") as caught:
        dom0.intake.verify(*_request())
    assert caught.value.code == "ledger"


def test_a_ledger_that_others_can_read_is_refused(dom0):
    os.chmod(dom0.ledger_path, 0o644)
    with pytest.raises(LedgerError, match="mode 0600"):
        dom0.execution.recover()


def test_a_ledger_of_a_newer_version_is_refused_and_left_alone(dom0):
    with _database(dom0.ledger_path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match="newer qvm-remote") as caught:
        dom0.execution.recover()
    assert not isinstance(caught.value, LedgerDamaged)


def test_a_ledger_of_before_there_was_a_version_is_taken_on_with_all_that_it_knows(dom0):
    with _database(dom0.ledger_path) as db:
        db.execute("DELETE FROM forgotten")
        db.execute("ALTER TABLE command DROP COLUMN uuid")
        db.execute("PRAGMA user_version = 0")
    dom0.execution.recover()
    assert dom0.ledger.counts() == {"delivered": 600}
    assert dom0.ledger.uuid("work", "20260101-000000-1-00000000") == ""
    old = cid_time("20260101-000000-1-00000000")
    assert dom0.ledger.forgotten_before("work") < old


def test_a_ledger_of_before_is_taken_on_once_by_all_who_open_it_at_the_same_time(dom0, tmp_path):
    with _database(dom0.ledger_path) as db:
        db.execute("ALTER TABLE command DROP COLUMN uuid")
        db.execute("PRAGMA user_version = 2")
    for number in range(20):
        path = str(tmp_path / f"ledger-{number}.sqlite")
        shutil.copy(dom0.ledger_path, path)
        together = threading.Barrier(4)

        def open_it(path=path, together=together):
            together.wait()
            return Ledger(path)

        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            for opened in [threads.submit(open_it) for _ in range(4)]:
                assert opened.result().counts() == {"delivered": 600}


class _Killed(BaseException):
    """Nothing catches it, as nothing does when a process is killed."""


@pytest.mark.parametrize("step", range(4))
def test_who_is_killed_while_setting_a_ledger_aside_has_nothing_forgotten(dom0, monkeypatch, step):
    with _database(dom0.ledger_path) as db:
        db.execute("INSERT INTO passed VALUES ('work', 1800000000, 1800000005.0, 'boot', 1.0)")
        db.execute("INSERT INTO forgotten VALUES ('work', 2000000000)")
    _, waiting, command, token = _request()
    cid = waiting.decode()
    writer = dom0.spool.store_request("work", cid, command, token)
    assert writer is None
    renamed, real = [], os.rename

    def rename(source, target):
        if source.startswith(dom0.ledger_path):
            if len(renamed) == step:
                raise _Killed
            renamed.append(source)
        real(source, target)

    monkeypatch.setattr(ledger_file.os, "rename", rename)
    with pytest.raises(_Killed):
        dom0.renew_ledger()
    monkeypatch.undo()
    with pytest.raises(LedgerDamaged, match="did not come to its end"):
        Ledger(dom0.ledger_path)
    with pytest.raises(LedgerDamaged, match="nothing runs"):
        _service(dom0)._begin()
    # A moment later, when a file of that name would be another one.
    time.sleep(1)
    assert os.path.lexists(dom0.renew_ledger())
    assert dom0.ledger.forgotten_before("work") == 2000000000
    assert dom0.execution.recover() == [("work", cid)]
    with _database(dom0.ledger_path) as db:
        assert db.execute("SELECT vm, until FROM passed").fetchall() == [("work", 1800000000)]
    folder, name = os.path.split(dom0.ledger_path)
    assert len([one for one in os.listdir(folder) if ".damaged-" in one and one.startswith(name) and not one.endswith(("-wal", "-shm"))]) == 1


def test_what_waits_in_the_spool_of_a_lost_ledger_is_told_to_its_clients(dom0):
    vm, done, command, token = _request()
    request = dom0.intake.admit(vm, done, command, token, -1)
    assert dom0.intake.claim([(request, 0)]) == {}
    dom0.execution.execute(vm, request.cid)
    vm, waiting, command, token = _request()
    assert dom0.intake.claim([(dom0.intake.admit(vm, waiting, command, token, -1), 0)]) == {}
    dom0._close_ledger()
    _DAMAGES["no database"](dom0.ledger_path)
    dom0.renew_ledger()
    dom0.execution.recover()
    assert dom0.results.result("work", done.decode())[0] == 0
    assert dom0.results.result("work", waiting.decode())[0] == 125
    with pytest.raises(Refused):
        dom0.execution.execute("work", waiting.decode())


def test_what_kept_a_vm_out_is_carried_over_as_far_as_it_can_be_read(dom0):
    dom0.ledger.saw_clock("work", 2_000_000_000, 1_900_000_000.0)
    dom0._close_ledger()
    with _database(dom0.ledger_path) as db:
        db.execute("INSERT INTO forgotten VALUES ('dev', ?)", (int(time.time()) + 1000,))
        db.execute("PRAGMA user_version = 1")
        db.execute("ALTER TABLE command RENAME COLUMN exit TO code")
    with pytest.raises(LedgerDamaged):
        dom0.execution.recover()
    dom0.renew_ledger()
    assert dom0.ledger.forgotten_before("dev") > time.time() + 900
    assert dom0.ledger.forgotten_before("work") <= time.time()
    # And what has passed since, as the kernel counts it.
    assert 1_900_000_000.0 <= dom0.ledger.saw_clock("work", 2_000_000_000, 1.0) < 1_900_000_600.0


def test_what_is_left_of_a_ledger_in_the_making_is_removed_and_one_that_is_being_made_is_not(dom0, monkeypatch):
    second, begun = f"{dom0.ledger_path}.new.1.0badcafe", f"{dom0.ledger_path}.new.2.0badcafe-journal"
    os.link(dom0.ledger_path, second)
    open(begun, "w").close()
    dom0.execution.recover()
    assert (os.path.exists(second), os.path.exists(begun)) == (True, True)
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    dom0.execution.recover()
    assert (os.path.exists(second), os.path.exists(begun)) == (False, False)
    assert dom0.ledger.counts() == {"delivered": 600}


def test_a_new_ledger_takes_no_id_from_before_it_was_made(dom0):
    """As after qvm-remote.clean, with the same key authorized again within max_age."""
    cid = time.strftime("%Y%m%d-%H%M%S-1-0badcafe", time.gmtime(time.time() - 5))
    request = _request(cid)
    # This ledger is older than the request.
    dom0.ledger._db.execute("UPDATE forgotten SET before = 0")
    assert dom0.intake.claim([(dom0.intake.admit(*request, -1), 0)]) == {}
    dom0._close_ledger()
    for name in os.listdir(dom0.config.state_dir):
        if name.startswith("ledger"):
            os.unlink(os.path.join(dom0.config.state_dir, name))
    with pytest.raises(Refused) as caught:
        dom0.intake.verify(*request)
    assert caught.value.code == "replay"
    assert dom0.intake.verify(*_request())[1] is None


def test_a_ledger_that_another_process_made_meanwhile_is_the_one(settings, monkeypatch):
    path = os.path.join(settings["state_dir"], "ledger.sqlite")
    claim = [("work", "20260101-000000-1-0badcafe", b"", "")]

    def make_it_second(*args, make=ledger_file.make):
        make(*args)
        monkeypatch.undo()
        other = Ledger(path)
        assert other.claim_all(claim) == [True]
        other.close()
        make(*args)

    monkeypatch.setattr(ledger_file, "make", make_it_second)
    assert Ledger(path).claim_all(claim) == [False]
    assert [name for name in os.listdir(settings["state_dir"]) if ".new." in name] == []
