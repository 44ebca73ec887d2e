# SPDX-License-Identifier: GPL-2.0-or-later
"""Which key a VM is to get, and whether it still has it. Never talks to a VM.

A key travels through a session alone. A VM that is shut down is never started for it: the key is *pending* until the
VM runs. What was seen last is noted beside the ledger (fingerprints only), for whoever asks for the status.
"""

from __future__ import annotations

import json
import os

from .errors import KeyringError, PullError
from .files import forget, read_bounded, write_whole
from .tokens import fingerprint

#: What dom0 knows of the key in a VM.
FITS, PENDING, LOST, ALTERED = "fits", "pending", "lost", "altered"
_NOTE_MAX = 256


class Handover:
    """Hands keys over.

    Args:
        folder: str, where notes are kept; created 0700.
        keyring: Keyring.
        audit: AuditLog.
    """

    def __init__(self, folder, keyring, audit):
        self._folder = folder
        self._keyring = keyring
        self._audit = audit

    def known(self, vm):
        """What was seen of the key in a VM when it was last looked at.

        Args:
            vm: str, a checked name.

        Returns:
            str: ``fits``, ``pending``, ``lost`` or ``altered``; None when dom0 has no key for it.
        """
        try:
            wanted = fingerprint(self._keyring.newest(vm))
        except KeyringError:
            return None
        note = self._note(vm)
        return note["seen"] if note.get("fingerprint") == wanted else PENDING

    def judge(self, vm, found):
        """Compare what a VM has with what dom0 wants it to have; changes nothing.

        Args:
            vm: str, a checked name.
            found: Found.

        Returns:
            str, as :meth:`known` gives it.

        Raises:
            KeyringError: dom0 has no key for it, or must not use it.
        """
        return self._judge(vm, found, fingerprint(self._keyring.newest(vm)))

    def _judge(self, vm, found, wanted):
        if found.fingerprint == wanted:
            return FITS
        if self._note(vm).get("fingerprint") != wanted:
            return PENDING
        return ALTERED if found.fingerprint else LOST

    def wanted(self, vm):
        """The key that a VM is to have.

        Args:
            vm: str, a checked name.

        Returns:
            bytes; None when dom0 has none for it.

        Raises:
            KeyringError: dom0 must not use it.
        """
        return self._keyring.newest(vm) if self._keyring.exists(vm) else None

    def look(self, vm, found, key, policy):
        """See what a VM has; note it, or say that it is to be handed the key: it is pending, or gone and dom0's to make.

        Args:
            vm: str, a checked name.
            found: Found.
            key: bytes, as :meth:`wanted` gave it; while the VM took its time, another one may have been staged.
            policy: str, the VM's setting ``key``.

        Returns:
            (bool, str): whether to hand it over, and the event to tell (once it is): ``key-handed``, ``key-mended``, ``key-lost``,
            ``key-altered``; None when there is no news.

        Raises:
            KeyringError: it can't be noted.
        """
        before = self._note(vm)
        seen = self._judge(vm, found, fingerprint(key))
        if seen == PENDING or (seen in (LOST, ALTERED) and policy == "generate"):
            return True, "key-handed" if seen == PENDING else "key-mended"
        self._see(vm, seen, key)
        return False, f"key-{seen}" if seen != FITS and before.get("seen") != seen else None

    def handed(self, vm, key):
        """Record that a VM was given its key.

        Args:
            vm: str, a checked name.
            key: bytes.

        Raises:
            KeyringError, AuditError: it can't be recorded.
        """
        self._audit.write("key-handed", vm, fingerprint=fingerprint(key))
        self._see(vm, FITS, key)

    def has_own(self, vm):
        """Note that a VM has dom0's key because it came from there."""
        self._see(vm, FITS, self._keyring.newest(vm))

    def forget(self, vm):
        """Forget what was noted of a VM."""
        forget(os.path.join(self._folder, vm))

    def _see(self, vm, seen, key):
        if seen == FITS:
            self._keyring.handed(vm, key)
        note = {"fingerprint": fingerprint(key), "seen": seen}
        if note == self._note(vm):
            return
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            write_whole(os.path.join(self._folder, vm), json.dumps(note).encode("ascii"))
        except OSError as err:
            raise KeyringError(f"can't note what key {vm} has: {err.strerror}") from err

    def _note(self, vm):
        try:
            note = json.loads(read_bounded(os.path.join(self._folder, vm), _NOTE_MAX))
        except (OSError, ValueError, PullError):
            # Without a note the key counts as never handed: it is handed once more.
            return {}
        fits = isinstance(note, dict) and note.get("seen") in (FITS, LOST, ALTERED)
        return note if fits else {}
