# SPDX-License-Identifier: GPL-2.0-or-later
"""The ledger's file: made whole or not at all, looked at before it is believed, set aside when it is damaged.

It is never repaired: a ledger that may have forgotten a command would have that run again. A new one takes no id from before
it was made, so that nothing can be replayed because another one is gone.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time

from .errors import LedgerDamaged, LedgerError
from .files import forget, sync_folder
from .ids import cid_time

_SCHEMA = """
CREATE TABLE IF NOT EXISTS command (
    vm TEXT NOT NULL,
    cid TEXT NOT NULL,
    token BLOB NOT NULL,
    state TEXT NOT NULL,
    exit INTEGER,
    status TEXT,
    claimed_at REAL NOT NULL,
    done_at REAL,
    uuid TEXT,
    PRIMARY KEY (vm, cid)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS passed (
    vm TEXT NOT NULL, until INTEGER NOT NULL, latest REAL NOT NULL, boot TEXT NOT NULL, uptime REAL NOT NULL, PRIMARY KEY (vm, until)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS forgotten (vm TEXT PRIMARY KEY, before INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS command_state ON command (state, vm) WHERE state <> 'delivered';
"""
_COLUMNS = {
    "command": ["vm", "cid", "token", "state", "exit", "status", "claimed_at", "done_at", "uuid"],
    "passed": ["vm", "until", "latest", "boot", "uptime"],
    "forgotten": ["vm", "before"],
}
#: Kept by SQLite beside the schema. Files of before there was a number have 0.
_VERSION = 3
#: In the table forgotten, what holds for every VM: no VM has this name.
ALL_VMS = ""
#: How long to wait for another process's write, seconds.
_BUSY_WAIT = 10
#: Nobody removes a ledger, and has a service begin another one, in less time than this, seconds: so much younger may an id be that
#: was made just before its ledger.
_MAKING = 2
#: What SQLite keeps beside its file while that is open.
_LOG, _SHARED = "-wal", "-shm"
#: The new ledger, whole, before the damaged one is moved away. As long as it is there, the damaged one is not all away, and none is opened.
_NEXT = "-next"


def open_file(path):
    """Open a ledger; make it if there is none.

    Args:
        path: str; its folder is created 0700.

    Returns:
        sqlite3.Connection, for use from several threads under a lock.

    Raises:
        LedgerDamaged: what is there is no ledger that may be believed; LedgerError: it can't be opened now, or is not ours alone.
    """
    with _told(path):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        if os.path.lexists(path + _NEXT):
            raise LedgerDamaged(f"the ledger {path} was being set aside, and that did not come to its end")
        if not os.path.lexists(path):
            if is_there(path):
                raise LedgerDamaged(f"the ledger {path} is gone, and what was last written to it ({path}{_LOG}) is still there")
            make(path, int(time.time()) - _MAKING)
        _check_file(path)
        db = _connect(path)
        try:
            _prepare(db, path)
        except BaseException:
            db.close()
            raise
    return db


def is_there(path):
    """Whether there is a ledger, or what is left of one.

    Args:
        path: str.

    Returns:
        bool
    """
    return any(os.path.lexists(path + suffix) for suffix in ("", _LOG, _NEXT))


def make(path, before, carried=None):
    """Make a ledger, unless there is one by then.

    Args:
        path: str.
        before: int, seconds since the epoch: no id made up to then is ever taken.
        carried: dict of table to list of rows that it begins with.

    Raises:
        OSError, sqlite3.Error: it can't be made.
    """
    temp = f"{path}.new.{os.getpid()}.{os.urandom(4).hex()}"
    os.close(os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    try:
        with contextlib.closing(sqlite3.connect(temp, isolation_level=None)) as db:
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION};")
            for table, rows in (carried or {}).items():
                db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(_COLUMNS[table]))})", rows)  # noqa: S608 - names of ours
            db.execute("INSERT OR REPLACE INTO forgotten VALUES (?, ?)", (ALL_VMS, before))
            db.execute("COMMIT")
            # On the disk once this is closed, in one file.
            db.execute("PRAGMA journal_mode=WAL")
        with contextlib.suppress(FileExistsError):
            # Never over another one, which a process beside us may have made and used.
            os.link(temp, path)
        sync_folder(os.path.dirname(path))
    finally:
        forget(temp, f"{temp}-journal", temp + _LOG, temp + _SHARED)


def sweep(path):
    """Remove what somebody left who died while making a ledger: it is the ledger's own file under a second name, or no ledger yet.

    Args:
        path: str.

    Raises:
        LedgerError: it can't be removed.
    """
    with _told(path):
        folder, name = os.path.split(path)
        for entry in os.listdir(folder) if os.path.isdir(folder) else ():
            # Somebody beside us may be making one in this moment.
            with contextlib.suppress(FileNotFoundError):
                if entry.startswith((f"{name}.new.", f"{name}{_NEXT}.new.")) and time.time() - os.lstat(os.path.join(folder, entry)).st_ctime > _BUSY_WAIT:
                    forget(os.path.join(folder, entry))


def problems(db):
    """Look whether every page, row and index of an open ledger is sound.

    Args:
        db: sqlite3.Connection.

    Returns:
        list of str, empty when it is.
    """
    try:
        found = [row[0] for row in db.execute("PRAGMA integrity_check(3)").fetchall()]
    except sqlite3.DatabaseError as err:
        return [str(err)]
    # It may report several things in one row, each on a line of its own.
    return [] if found == ["ok"] else [line for text in found for line in str(text).splitlines()][:3]


def set_aside(path, unfinished):
    """Put a damaged ledger away under another name, and begin a new one in which no id up to now is ever taken.

    Args:
        path: str.
        unfinished: list of (vm, cid, uuid), commands that are to be told to their clients as interrupted, and which qube each is of.

    Returns:
        str, where the damaged one is now; None when there was none.

    Raises:
        LedgerError: it can't be done.
    """
    with _told(path):
        if not os.path.lexists(path + _NEXT):
            newest, carried = _salvage(path)
            now = time.time()
            # A VM's clock may be ahead of ours.
            before = max([int(now), newest, *(_time_of(cid) for _, cid, _ in unfinished)])
            carried["command"] = [(vm, cid, b"", "running", None, None, now, None, uuid) for vm, cid, uuid in unfinished]
            make(path + _NEXT, before, carried)
        # Whoever is killed from here on is followed by one who finds it, and goes on: under the same name, and with what was salvaged then.
        aside = time.strftime(f"{path}.damaged-%Y%m%d-%H%M%S", time.gmtime(os.lstat(path + _NEXT).st_mtime))
        for suffix in ("", _SHARED, _LOG):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path + suffix, aside + suffix)
        sync_folder(os.path.dirname(path))
        if os.path.lexists(path):
            raise LedgerError(f"while the ledger {path} was set aside, another process made one; see to it that none is at work, then do this again")
        os.rename(path + _NEXT, path)
        sync_folder(os.path.dirname(path))
        return aside if any(os.path.lexists(aside + suffix) for suffix in ("", _LOG)) else None


def is_damage(error):
    """Whether an error of SQLite's means that the file itself is wrong, and not that it can't be read or written now.

    Args:
        error: sqlite3.Error.

    Returns:
        bool
    """
    return type(error) is sqlite3.DatabaseError


def _connect(path):
    return sqlite3.connect(path, timeout=_BUSY_WAIT, isolation_level=None, check_same_thread=False)


def _check_file(path):
    info = os.lstat(path)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise LedgerError(f"{path} must be a plain file that belongs to root, mode 0600")
    if not info.st_size:
        # It is never made empty.
        raise LedgerDamaged(f"the ledger {path} is empty")


def _prepare(db, path):
    """Have it in the mode that we need, with the tables that we know."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > _VERSION:
        raise LedgerError(f"the ledger {path} is of a newer qvm-remote; install that one again, or a newer one")
    # A ledger of before has what it needs in its table of commands; the others came later.
    if _column_names(db, "command") not in (_COLUMNS["command"], _COLUMNS["command"][:-1]):
        raise _wrong_table(path, "command")
    if db.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
        raise LedgerError(f"{path}: this file system can't hold the ledger safely (no WAL)")
    db.execute("PRAGMA synchronous=NORMAL")
    if version < _VERSION:
        _update(db)
    for table, columns in _COLUMNS.items():
        if _column_names(db, table) != columns:
            raise _wrong_table(path, table)


def _update(db):
    """Have it as this version makes it, unless somebody beside us has done so by now."""
    db.execute("BEGIN IMMEDIATE")
    try:
        if db.execute("PRAGMA user_version").fetchone()[0] < _VERSION:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            if "uuid" not in _column_names(db, "command"):
                db.execute("ALTER TABLE command ADD COLUMN uuid TEXT")
            db.execute(f"PRAGMA user_version = {_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _column_names(db, table):
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


def _wrong_table(path, table):
    return LedgerDamaged(f"{path} is a database, but no ledger of this qvm-remote (the table {table} is another one)")


def _salvage(path):
    """Read what keeps something from being run out of a damaged ledger, as far as it can be read.

    Returns:
        (int, dict): time of the newest id, 0 if none can be read; and the rows of what VMs may not do any more.
    """
    newest, kept = 0, {"forgotten": [], "passed": []}
    if not os.path.isfile(path) or not os.path.getsize(path):
        # SQLite would remove the log of an empty file.
        return newest, kept
    try:
        with contextlib.closing(_connect(path)) as db:
            for table in kept:
                with contextlib.suppress(sqlite3.Error):
                    kept[table] = list(filter(_fits, db.execute(f"SELECT * FROM {table}").fetchall()))  # noqa: S608 - names of ours
            with contextlib.suppress(sqlite3.Error):
                for (stamp,) in db.execute("SELECT max(substr(cid, 1, 15)) FROM command"):
                    newest = _time_of(stamp)
    except sqlite3.Error:
        # Nothing can be read.
        pass
    return newest, kept


def _fits(row):
    # What held for all VMs is made anew.
    return isinstance(row[0], str) and row[0] != ALL_VMS and all(isinstance(value, (int, float, str)) for value in row[1:])


def _time_of(cid):
    try:
        return cid_time(str(cid))
    except Exception:  # noqa: BLE001 - it comes from a damaged file, and may be anything
        return 0


@contextlib.contextmanager
def _told(path):
    try:
        yield
    except OSError as err:
        raise LedgerError(f"can't open the ledger {path}: {err.strerror}") from err
    except sqlite3.Error as err:
        if is_damage(err):
            raise LedgerDamaged(f"the ledger {path} is damaged ({err})") from err
        raise LedgerError(f"can't open the ledger {path}: {err}") from err
