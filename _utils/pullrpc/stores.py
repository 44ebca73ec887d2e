# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 keeps: its settings, the VMs' keys, the ledger, the requests and results on their way, and the audit log."""

from __future__ import annotations

import os
import threading
import time

from . import ledger_file
from .audit import AuditLog
from .errors import KeyringError, LedgerDamaged, Refused
from .handover import Handover
from .keyring import Keyring
from .ledger import Ledger
from .spool import Spool

#: Most commands of which something is kept for one VM, as a multiple of those that may wait: each takes room in memory and time, too.
_KEPT_MAX = 16
#: In a UUID's place: no qube.
_NOBODY = "-"


class Stores:
    """What is kept, and is one for all that work with it.

    Args:
        config: Config.
    """

    def __init__(self, config):
        self.config = config
        self.keyring = Keyring(config.key_dir)
        self._ledger = None
        self._ledger_lock = threading.Lock()
        self.spool = Spool(os.path.join(config.state_dir, "spool"))
        self.audit = AuditLog(config.audit_log, config.syslog, config.audit_files)
        self.handover = Handover(os.path.join(config.state_dir, "handover"), self.keyring, self.audit)

    @property
    def ledger(self):
        """The ledger, opened when it is first needed: whoever only looks at keys leaves no file behind.

        Raises:
            LedgerError: it can't be opened.
        """
        with self._ledger_lock:
            if self._ledger is None:
                self._ledger = Ledger(self.ledger_path)
            return self._ledger

    @property
    def ledger_path(self):
        """Where the ledger is."""
        return os.path.join(self.config.state_dir, "ledger.sqlite")

    def remembered(self, vm):
        """Count the finished commands of a VM that dom0 knows.

        Args:
            vm: str, a checked name.

        Returns:
            int

        Raises:
            LedgerError: the ledger can't be read.
        """
        return self.ledger.count_of(vm) if os.path.lexists(self.ledger_path) else 0

    def ledger_counts(self):
        """Count commands by state.

        Returns:
            dict of state to int; None when there is no ledger yet, and none is made by this.

        Raises:
            LedgerError: the ledger can't be read.
        """
        return self.ledger.counts() if os.path.lexists(self.ledger_path) else None

    def check_ledger(self):
        """Look whether the ledger is sound; a missing one is, and is not made.

        Raises:
            LedgerError: it is damaged, or can't be read.
        """
        if not ledger_file.is_there(self.ledger_path):
            return
        try:
            self.ledger.check()
        except LedgerDamaged:
            # So that it is opened anew when it was set aside.
            self._close_ledger()
            raise

    def ledger_ahead(self):
        """Say how far before the making of the ledger dom0's clock is: it was set back since, by more than a ledger takes.

        Returns:
            float, seconds; 0 when it isn't, or there is no ledger.

        Raises:
            LedgerError: it can't be read.
        """
        if not os.path.lexists(self.ledger_path):
            return 0.0
        ahead = self.ledger.forgotten_before(ledger_file.ALL_VMS) - time.time()
        return ahead if ahead > self.config.max_age else 0.0

    def renew_ledger(self):
        """Set a damaged ledger aside, and begin a new one that takes no id up to now. Not while an engine is at work.

        Commands that were not delivered are told to their clients as what they are, as far as that is known, when an engine starts.

        Returns:
            str, where the damaged one is now; None when there was none.

        Raises:
            LedgerError: that can't be done; AuditError: it can't be recorded.
        """
        self._close_ledger()
        unfinished = [(vm, cid, self._qube_of(vm)) for vm, cid in self.spool.kept()]
        self.audit.write("ledger-renewed", "-", sync=True, unfinished=len(unfinished))
        return ledger_file.set_aside(self.ledger_path, unfinished)

    def _qube_of(self, vm):
        """Which qube the commands of a name are of, when no ledger tells."""
        try:
            return self.keyring.bound(vm) if self.keyring.exists(vm) else _NOBODY
        except KeyringError:
            return _NOBODY

    def _close_ledger(self):
        with self._ledger_lock:
            if self._ledger is not None:
                self._ledger.close()
                self._ledger = None

    def note_time(self):
        """Note what time it is for each VM that has access for a time, so that its end comes even if it asks for nothing meanwhile.

        Raises:
            LedgerError: it can't be noted.
        """
        for vm in self.config.vms:
            until = self.config.for_vm(vm).until
            if until:
                self.ledger.saw_clock(vm, until, time.time())

    def prune(self):
        """Forget what is kept for some days only, and is older.

        Raises:
            LedgerError: the ledger can't be written; AuditError: what goes can't be recorded.
        """
        self.ledger.prune(self.config.ledger_keep_days)
        self.audit.prune_commands(self.config.audit_commands_max, self.config.audit_keep_days)

    def check_room(self, vm, more=0, is_new=False):
        """See whether there is room for a command of a VM, with as much output as it may have, and for so many bytes.

        Args:
            vm: str, a checked name.
            more: int, bytes.
            is_new: bool, whether nothing of the command is kept yet.

        Raises:
            Refused: there is none.
        """
        config = self.config.for_vm(vm)
        for count in (self.spool.used, self.spool.used_now):
            # What went lately may still be counted: nobody is refused for that.
            used, kept = count(vm)
            if used + more + 2 * config.output_max <= config.spool_bytes_max:
                break
        else:
            raise _no_room()
        if is_new and kept >= _KEPT_MAX * config.vm_queue:
            raise _no_room()


def _no_room():
    return Refused("room", "dom0 keeps too many unfinished commands and results of this VM; wait for them to be delivered")
