# SPDX-License-Identifier: GPL-2.0-or-later
"""The ledger: which commands were ever claimed. It is why nothing runs twice.

SQLite in WAL mode: a claim is on disk before the command starts. A row goes
claimed -> running -> done -> delivered and never back. What was claimed or running when an engine
died is finished as *interrupted* by the next one; it is never run again.

Claims that come at the same time, from whatever threads, share one write to the disk. The later steps are not forced to
the disk at once: a power cut may take the last of them back, which makes a command *interrupted*, or has a result
delivered again; it never makes one run.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time

from . import ledger_file
from .chain import boot_id
from .errors import LedgerDamaged, LedgerError
from .ids import cid_time

CLAIMED, RUNNING, DONE, DELIVERED = "claimed", "running", "done", "delivered"
#: Status of what has ended and whose result was given up before its VM had it; that is what its VM gets then.
EXPIRED = "expired"

#: How much later it must be before the clock is noted again, seconds.
_CLOCK_STEP = 10


class Ledger:
    """An open ledger; may be used from several threads.

    Delivered rows are kept for days, and what is open is asked for all the time: those questions name the index of open rows, which
    SQLite takes only with its condition word for word in the query, and for some queries not of itself.

    Args:
        path: str, the database file; its folder is created 0700.

    Raises:
        LedgerDamaged: it is damaged; LedgerError: it can't be opened, or is not ours alone.
    """

    def __init__(self, path):
        self._lock = threading.Lock()
        self._tickets = []
        self._tickets_lock = threading.Lock()
        self._db = ledger_file.open_file(path)

    def close(self):
        """Close the database."""
        with self._lock:
            self._db.close()

    def check(self):
        """Look at all of it.

        Raises:
            LedgerDamaged: something in it is wrong; it may have forgotten what ran.
        """
        with self._guarded():
            found = ledger_file.problems(self._db)
        if found:
            raise LedgerDamaged(f"the ledger is damaged ({'; '.join(found)})")

    def state(self, vm, cid):
        """Look a command up.

        Returns:
            (state, token MAC) or None when the id was never claimed for this VM.

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            row = self._db.execute("SELECT state, token FROM command WHERE vm = ? AND cid = ?", (vm, cid)).fetchone()
        return (row[0], bytes(row[1])) if row else None

    def uuid(self, vm, cid):
        """Say which qube a command is of: a name may have been given to another one since.

        Returns:
            str; empty when that is not known (it was claimed by an older qvm-remote), or the id was never claimed.

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            row = self._db.execute("SELECT uuid FROM command WHERE vm = ? AND cid = ?", (vm, cid)).fetchone()
        return (row and row[0]) or ""

    def claim_all(self, claims):
        """Claim commands. On return the claims are on disk.

        Args:
            claims: list of (vm, cid, token MAC, UUID of the qube); the MAC tells the same request shown again from another one under its id.

        Returns:
            list of bool, False for an id that was claimed before.

        Raises:
            LedgerError: they can't be recorded; the commands must not run.
        """
        ticket = _Ticket(claims)
        with self._tickets_lock:
            self._tickets.append(ticket)
        with self._guarded():
            # Whoever waited for the lock meanwhile gets its claims recorded by the first that has it.
            if ticket.claimed is None:
                with self._tickets_lock:
                    tickets, self._tickets = self._tickets, []
                self._record(tickets)
        if ticket.claimed is None:
            raise LedgerError("the ledger could not record a claim; nothing runs without it")
        return ticket.claimed

    def _record(self, tickets):
        now = time.time()
        self._db.execute("PRAGMA synchronous=FULL")
        try:
            with self._transaction():
                outcomes = [[self._insert(*claim, now) for claim in ticket.claims] for ticket in tickets]
        finally:
            self._db.execute("PRAGMA synchronous=NORMAL")
        for ticket, claimed in zip(tickets, outcomes):
            ticket.claimed = claimed

    def _insert(self, vm, cid, token_mac, uuid, now):
        cursor = self._db.execute(
            "INSERT INTO command (vm, cid, token, state, claimed_at, uuid) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (vm, cid, token_mac, CLAIMED, now, uuid),
        )
        return cursor.rowcount == 1

    def start(self, vm, cid):
        """Move a command from claimed to running; only one caller ever succeeds.

        Returns:
            bool, False when it is not in state *claimed*.

        Raises:
            LedgerError: it can't be recorded; the command must not run.
        """
        return self._move(vm, cid, CLAIMED, RUNNING)

    def finish(self, vm, cid, exit_code, status):
        """Record a command's end.

        Args:
            vm, cid: str.
            exit_code: int.
            status: str, one word: ``done``, ``timeout``, ``interrupted``, ...

        Raises:
            LedgerError: it can't be recorded.
        """
        with self._guarded():
            self._db.execute(
                "UPDATE command SET state = ?, exit = ?, status = ?, done_at = ? WHERE vm = ? AND cid = ? AND state IN (?, ?)",
                (DONE, exit_code, status, time.time(), vm, cid, CLAIMED, RUNNING),
            )

    def delivered(self, results):
        """Record that results reached their VMs (or never can).

        Args:
            results: list of (vm, cid).

        Raises:
            LedgerError: it can't be recorded.
        """
        with self._guarded(), self._transaction():
            self._db.executemany(
                "UPDATE command SET state = ? WHERE vm = ? AND cid = ? AND state = ?", [(DELIVERED, vm, cid, DONE) for vm, cid in results]
            )

    def expire(self, vm, cid):
        """Record that a result which waits for delivery is given up. That it was still waits, from now on.

        Raises:
            LedgerError: it can't be recorded.
        """
        with self._guarded():
            query = "UPDATE command SET status = ?, done_at = ? WHERE vm = ? AND cid = ? AND state = ?"
            self._db.execute(query, (EXPIRED, time.time(), vm, cid, DONE))

    def unfinished(self):
        """List what was claimed or running. At an engine's start these are what the last one left behind.

        Returns:
            list of (vm, cid)

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            query = "SELECT vm, cid FROM command INDEXED BY command_state WHERE state <> 'delivered' AND state IN (?, ?)"
            return self._db.execute(query, (CLAIMED, RUNNING)).fetchall()

    def open_commands(self):
        """List what was claimed and is not delivered.

        Returns:
            set of (vm, cid)

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            return set(self._db.execute("SELECT vm, cid FROM command INDEXED BY command_state WHERE state <> 'delivered'").fetchall())

    def waiting(self, vm):
        """Count a VM's commands that were claimed and have not begun.

        Returns:
            int

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            query = "SELECT count(*) FROM command INDEXED BY command_state WHERE state <> 'delivered' AND vm = ? AND state = ?"
            return self._db.execute(query, (vm, CLAIMED)).fetchone()[0]

    def undelivered(self, vm):
        """List a VM's results that wait for delivery, oldest first.

        Returns:
            list of (cid, done_at in seconds since the epoch, UUID of the qube as :meth:`uuid` gives it, status)

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            query = (
                "SELECT cid, done_at, coalesce(uuid, ''), status FROM command INDEXED BY command_state "
                "WHERE state <> 'delivered' AND vm = ? AND state = ? ORDER BY done_at"
            )
            return self._db.execute(query, (vm, DONE)).fetchall()

    def waiting_end(self, vm, cid):
        """Look up the end of a command whose result waits for delivery.

        Returns:
            (int, str), exit code and status; None when none waits under this id.

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            return self._db.execute("SELECT exit, status FROM command WHERE vm = ? AND cid = ? AND state = ?", (vm, cid, DONE)).fetchone()

    def counts(self):
        """Count all commands by state. Looks at each of them: 0.7 s for a million.

        Returns:
            dict of state to int.

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            return dict(self._db.execute("SELECT state, count(*) FROM command GROUP BY state").fetchall())

    def open_counts(self):
        """Count what was claimed and is not delivered, for each VM.

        Returns:
            dict of VM name to a dict of state to int.

        Raises:
            LedgerError: the ledger can't be read.
        """
        counts = {}
        with self._guarded():
            query = "SELECT vm, state, count(*) FROM command INDEXED BY command_state WHERE state <> 'delivered' GROUP BY vm, state"
            rows = self._db.execute(query).fetchall()
        for vm, state, count in rows:
            counts.setdefault(vm, {})[state] = count
        return counts

    def prune(self, keep_days):
        """Forget delivered commands claimed more than some days ago.

        What stays of them is one time for each VM: no id made up to then is taken any more, whatever dom0's clock says.

        Args:
            keep_days: int.

        Returns:
            int, how many.

        Raises:
            LedgerError: it can't be written.
        """
        which = (DELIVERED, time.time() - keep_days * 86400)
        with self._guarded(), self._transaction():
            newest = "SELECT vm, max(substr(cid, 1, 15)) FROM command WHERE state = ? AND claimed_at < ? GROUP BY vm"
            for vm, stamp in self._db.execute(newest, which).fetchall():
                self._note_forgotten(vm, cid_time(stamp))
            return self._db.execute("DELETE FROM command WHERE state = ? AND claimed_at < ?", which).rowcount

    def _note_forgotten(self, vm, before):
        known = self._db.execute("SELECT before FROM forgotten WHERE vm = ?", (vm,)).fetchone()
        self._db.execute("INSERT OR REPLACE INTO forgotten VALUES (?, ?)", (vm, max(before, known[0] if known else 0)))

    def forget(self, vm):
        """Forget all that a VM had done, since it lost its access.

        What stays is one time: no id made up to then is ever taken from that name again, so that nothing forgotten can be
        replayed, even if the same key is stored once more. What is claimed or runs right now stays, too.

        Args:
            vm: str.

        Returns:
            int, how many commands were forgotten.

        Raises:
            LedgerError: it can't be written.
        """
        with self._guarded(), self._transaction():
            newest = self._db.execute("SELECT max(substr(cid, 1, 15)) FROM command WHERE vm = ?", (vm,)).fetchone()[0]
            # A VM's clock may be ahead of ours.
            before = max(int(time.time()), cid_time(newest) if newest else 0)
            self._note_forgotten(vm, before)
            return self._db.execute("DELETE FROM command WHERE vm = ? AND state IN (?, ?)", (vm, DONE, DELIVERED)).rowcount

    def count_of(self, vm):
        """Count the finished commands of a VM that are known.

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            return self._db.execute("SELECT count(*) FROM command WHERE vm = ? AND state IN (?, ?)", (vm, DONE, DELIVERED)).fetchone()[0]

    def forgotten_before(self, vm):
        """Say up to when a VM's ids are not taken: it was forgotten then, or this ledger was made.

        Args:
            vm: str.

        Returns:
            int, seconds since the epoch; 0 in a ledger that is older than this rule.

        Raises:
            LedgerError: the ledger can't be read.
        """
        with self._guarded():
            row = self._db.execute("SELECT max(before) FROM forgotten WHERE vm IN (?, ?)", (vm, ledger_file.ALL_VMS)).fetchone()
        return row[0] or 0

    def saw_clock(self, vm, until, now, uptime=None):
        """Note what time it is while a VM has access for a time: what dom0's clock shows, or later.

        dom0's clock comes from a VM. However that sets it back, or holds it, as much time has passed as the kernel counted.

        Args:
            vm: str.
            until: int, when its access ends, seconds since the epoch; another end is another grant.
            now: float, seconds since the epoch, as the clock shows.
            uptime: float, seconds since the kernel was booted (default: what it says).

        Returns:
            float, seconds since the epoch: the latest time that was ever noted for this grant, and what has passed since.

        Raises:
            LedgerError: it can't be read or written.
        """
        uptime, boot = time.clock_gettime(time.CLOCK_BOOTTIME) if uptime is None else uptime, boot_id()
        with self._guarded():
            row = self._db.execute("SELECT latest, boot, uptime FROM passed WHERE vm = ? AND until = ?", (vm, until)).fetchone()
            noted, noted_boot, noted_at = row or (now, boot, uptime)
            latest = max(now, noted + (uptime - noted_at if noted_boot == boot else 0))
            if row is None or noted_boot != boot or latest > noted + _CLOCK_STEP:
                self._db.execute("INSERT OR REPLACE INTO passed VALUES (?, ?, ?, ?, ?)", (vm, until, latest, boot, uptime))
            return latest

    @contextlib.contextmanager
    def _transaction(self):
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _move(self, vm, cid, state, new_state):
        with self._guarded():
            cursor = self._db.execute("UPDATE command SET state = ? WHERE vm = ? AND cid = ? AND state = ?", (new_state, vm, cid, state))
            return cursor.rowcount == 1

    @contextlib.contextmanager
    def _guarded(self):
        with self._lock:
            try:
                yield
            except sqlite3.Error as err:
                if ledger_file.is_damage(err):
                    raise LedgerDamaged(f"the ledger is damaged ({err})") from err
                raise LedgerError(f"the ledger failed ({err}); nothing runs without it") from err


class _Ticket:
    """Claims that wait to be recorded."""

    def __init__(self, claims):
        self.claims = claims
        #: list of bool once they are on disk.
        self.claimed = None
