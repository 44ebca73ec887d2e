# SPDX-License-Identifier: GPL-2.0-or-later
"""How a key that dom0 has gets to its VM, and how dom0 sees that it is still there.

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

    def look(self, session, vm, policy):
        """Look at the key in a VM; hand it over if it is pending, or gone and dom0's to make.

        Args:
            session: Session or Agentless.
            vm: str, a checked name.
            policy: str, the VM's setting ``key``.

        Returns:
            str, the event to tell: ``key-handed``, ``key-mended``, ``key-lost``, ``key-altered``; None when there is no news.

        Raises:
            SessionBroken, TransportError, KeyringError, AuditError
        """
        if not self._keyring.exists(vm):
            return None
        before = self._note(vm)
        # Read once: while the VM takes its time, another key may be staged.
        key = self._keyring.newest(vm)
        seen = self._judge(vm, session.inspect(), fingerprint(key))
        if seen == PENDING or (seen in (LOST, ALTERED) and policy == "generate"):
            self._hand(session, vm, key)
            return "key-handed" if seen == PENDING else "key-mended"
        self._see(vm, seen, key)
        return f"key-{seen}" if seen != FITS and before.get("seen") != seen else None

    def hand(self, session, vm):
        """Give a VM its key.

        Args:
            session: Session or Agentless.
            vm: str, a checked name.

        Returns:
            str, the key's fingerprint.

        Raises:
            SessionBroken, TransportError, KeyringError, AuditError
        """
        key = self._keyring.newest(vm)
        self._hand(session, vm, key)
        return fingerprint(key)

    def _hand(self, session, vm, key):
        session.set_key(key)
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
