# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's access while it has it: which qube it is for, its key replaced, and all of it taken away."""

from __future__ import annotations

from .errors import AuditError, KeyringError

_STRANGER = (
    "this is another qube than the one that got access to dom0 under the name {vm}; if it is to have access as well: in dom0, "
    "apply qvm-remote's states once more, or qvm_remote.bind {vm}"
)


class Access:
    """Who has access.

    Args:
        stores: Stores.
    """

    def __init__(self, stores):
        self._stores = stores

    def stranger(self, vm, uuid):
        """Say why a qube gets nothing although its name has a key: the key is for another one, which had that name before.

        A key that was stored before there was a qube of its name is for the first one that is seen.

        Args:
            vm: str, a checked name.
            uuid: str, the qube that has this name now.

        Returns:
            str, the reason; None when the key is for this one, or there is none.
        """
        try:
            if not self._stores.keyring.exists(vm):
                return None
            bound = self._stores.keyring.bound(vm)
            if not bound:
                self._stores.audit.write("bound", vm, sync=True, uuid=uuid)
                self._stores.keyring.bind(vm, uuid)
            return None if bound in ("", uuid) else _STRANGER.format(vm=vm)
        except (KeyringError, AuditError) as err:
            return str(err)

    def drop_old_key(self, vm):
        """Remove a VM's replaced key once it works no more, and no command that was accepted under it waits.

        Args:
            vm: str, a checked name.

        Raises:
            KeyringError: it can't be removed; LedgerError: the ledger can't be read.
        """
        if self._stores.keyring.has_old(vm) and self._stores.ledger.waiting(vm):
            return
        self._stores.keyring.drop_old(vm, self._stores.config.for_vm(vm).max_age)

    def rotate(self, vm, given=None):
        """Have a new key for a VM, staged: it is to be handed over. One that waits already is not replaced, since the VM may have it.

        Args:
            vm: str, a checked name that has a key.
            given: bytes, the key; None to make one.

        Returns:
            (str, str): fingerprints of the key before and of the new one.

        Raises:
            KeyringError: the VM has no key, or another rotation is not through yet.
            AuditError, LedgerError: it can't be recorded.
        """

        def record(old, new):
            if self._stores.keyring.has_old(vm) and self._stores.ledger.waiting(vm):
                raise KeyringError(f"commands wait that {vm} may have signed before its last rotation; rotate again when they have run")
            self._stores.audit.write("rotation", vm, old=old, new=new)

        return self._stores.keyring.stage(vm, given, record)

    def forget(self, vm):
        """Take a VM's access away, and all that is kept of it but the audit log. What runs is not stopped.

        Args:
            vm: str, a checked name.

        Returns:
            bool, whether there was anything.

        Raises:
            KeyringError, LedgerError, AuditError: something can't be removed.
        """
        # The key first: from here on nothing new is taken in.
        had_key = self._stores.keyring.remove(vm)
        waiting = [cid for cid, *_ in self._stores.ledger.undelivered(vm)] if self._stores.remembered(vm) else []
        count = self._stores.remembered(vm) and self._stores.ledger.forget(vm)
        for cid in waiting:
            self._stores.spool.remove(vm, cid)
        self._stores.handover.forget(vm)
        if had_key or count:
            self._stores.audit.write("revoked", vm, forgotten=count)
        return bool(had_key or count)
