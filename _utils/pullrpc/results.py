# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM is answered, with dom0's proof, from when it is there until it was delivered or given up."""

from __future__ import annotations

import functools
import hashlib
import time
import typing

from .errors import KeyringError, PullError, Refused, SpoolError
from .ledger import EXPIRED
from .spool import ERR, META, OUT
from .tokens import TOKEN_MAX, make_meta, parse_token, read_meta, token_matches

#: Exit code of everything that qvm-remote itself refuses or fails at.
EXIT_FAILED = 125
#: Why a command has no result that was claimed, or ran, when the service ended.
INTERRUPTED = "interrupted: dom0's service ended before the command did; it is not run again"


class Result(typing.NamedTuple):
    """A result that waits for delivery.

    Attributes:
        exit_code: int.
        parts: dict, ``out``, ``err`` and ``meta`` as (size in bytes, callable of an offset that yields bytes).
        uuid: str, the qube whose command it is of; empty when that is not known.
        is_output: bool, whether it is what the command wrote, and not why that is not kept.
    """

    exit_code: int
    parts: dict
    uuid: str = ""
    is_output: bool = True


def is_of(uuid, other):
    """Say whether a command is a qube's.

    Args:
        uuid: str, which one the command is of; empty when that is not known.
        other: str, the one that has its name now.

    Returns:
        bool
    """
    return uuid in ("", other)


class Results:
    """The results that dom0 keeps.

    Args:
        stores: Stores.
    """

    def __init__(self, stores):
        self._stores = stores

    def left(self, vm, cid):
        """What ``.meta`` says, if it is there and fits the output: then the command had ended, and all but its row says so."""
        try:
            meta = b"".join(self._stores.spool.chunks(vm, cid, META))
            if not meta:
                return None
            digests = self._stores.spool.digest(vm, cid, OUT), self._stores.spool.digest(vm, cid, ERR)
            for key in self._stores.keyring.held(vm):
                fields, authentic = read_meta(key, cid, *digests, meta)
                if authentic:
                    return fields
        except (SpoolError, KeyringError):
            # Whatever can't be read, or proven, is no result.
            pass
        return None

    def key_of(self, vm, cid):
        """The key that a request which dom0 keeps was signed with."""
        try:
            command, token_line, _ = self._stores.spool.load_request(vm, cid, self._stores.config.for_vm(vm).command_max, TOKEN_MAX)
        except PullError:
            return self.key_or_none(vm)
        return self._signer(vm, cid, command, token_line)

    def _signer(self, vm, cid, command, token_line):
        """The key that a request was signed with: its client believes no other. The VM's present one if that can't be told."""
        try:
            token = parse_token(token_line)
            return next(key for key in self._stores.keyring.held(vm) if token_matches(key, vm, cid, token, command))
        except (Refused, KeyringError, StopIteration):
            return self.key_or_none(vm)

    def key_or_none(self, vm):
        try:
            return self._stores.keyring.get(vm)
        except KeyringError:
            # Revoked meanwhile, or never there: the client can't be given a proof, and treats the answer as a refusal only.
            return None

    def refusal(self, vm, cid, reason, is_proven=True, request=None):
        """Make the answer to a request that isn't accepted.

        Args:
            vm, cid: str.
            reason: str, one sentence.
            is_proven: bool, whether dom0 signs it.
            request: (bytes, bytes), command and token line if they are at hand.

        Returns:
            (bytes, bytes): ``.err`` and ``.meta``.
        """
        err = reason_line(reason)
        key = None
        if is_proven:
            key = self._signer(vm, cid, *request) if request else self.key_of(vm, cid)
        return err, meta_of(key, cid, b"", err, EXIT_FAILED, "refused")

    def expire(self, vm, uuid=None):
        """Give up results of a VM that waited for longer than ``spool_max_age``. That they were is what waits then, for as long as ids are
        remembered: whoever comes back is told.

        Args:
            vm: str.
            uuid: str, the qube that has this name now; None for whichever.

        Returns:
            (list of cid, list of cid): those still to be delivered, oldest first, and those of them that were given up just now; of that
            qube's commands only.

        Raises:
            LedgerError: the ledger can't be read or written; AuditError: it can't be recorded.
        """
        config = self._stores.config
        waiting, expired = [], []
        for cid, done_at, of, status in self._stores.ledger.undelivered(vm):
            is_old = time.time() - done_at > (config.ledger_keep_days * 86400 if status == EXPIRED else config.spool_max_age)
            if is_old and status == EXPIRED:
                self.close_delivery(vm, cid, "untold")
                continue
            if is_old and self._stores.ledger.waiting_end(vm, cid) is None:
                # It was delivered meanwhile.
                continue
            if is_old:
                self._stores.audit.write("expired", vm, cid)
                self._stores.ledger.expire(vm, cid)
            if is_old or status == EXPIRED:
                # What could not be removed then, too.
                self._stores.spool.remove(vm, cid)
            if uuid is None or is_of(of, uuid):
                waiting.append(cid)
                expired += [cid] if is_old else []
        return waiting, expired

    def expire_all(self, but=()):
        """The same for all VMs: some never come back.

        Args:
            but: VMs that are served: that is done in their turn.

        Raises:
            LedgerError, AuditError: as above.
        """
        for vm in self._stores.ledger.open_counts().keys() - set(but):
            self.expire(vm)

    def result(self, vm, cid):
        """Fetch a result that waits for delivery.

        Args:
            vm, cid: str.

        Returns:
            Result; None when there is nothing (any more) to deliver.

        Raises:
            LedgerError, SpoolError: it can't be read.
        """
        end = self._stores.ledger.waiting_end(vm, cid)
        if end is None:
            return None
        exit_code, status = end
        uuid = self._stores.ledger.uuid(vm, cid)
        if status == EXPIRED or not self._stores.spool.size(vm, cid, META):
            why = "its result waited too long for this qube and is gone" if status == EXPIRED else "dom0 could not keep its result: its disk is full"
            err, meta = self.refusal(vm, cid, f"the command ended (exit code {exit_code}), but {why}")
            return Result(EXIT_FAILED, in_memory(err, meta), uuid, False)
        chunks = {part: functools.partial(self._stores.spool.chunks, vm, cid, part) for part in (OUT, ERR, META)}
        return Result(exit_code, {part: (self._stores.spool.size(vm, cid, part), chunks[part]) for part in (OUT, ERR, META)}, uuid)

    def close_delivery(self, vm, cid, what="delivered"):
        """Record that a result reached its VM, or never will; its files go.

        Args:
            vm, cid: str.
            what: str, the word for the audit log.

        Raises:
            LedgerError, AuditError: it can't be recorded; it waits for delivery as before.
        """
        self.close_deliveries([(vm, cid)], what)

    def close_deliveries(self, results, what="delivered"):
        """The same for several results, in one step of the ledger.

        Args:
            results: list of (vm, cid).
            what: str, the word for the audit log.

        Raises:
            LedgerError, AuditError: it can't be recorded.
        """
        self._stores.audit.write_all([(what, vm, cid, {}) for vm, cid in results])
        self._stores.ledger.delivered(results)
        for vm, cid in results:
            self._stores.spool.remove(vm, cid)


def in_memory(err, meta):
    """Make the parts of a result that has no output.

    Args:
        err, meta: bytes.

    Returns:
        dict, as :attr:`Result.parts`.
    """
    return {part: of_bytes(data) for part, data in (("out", b""), ("err", err), ("meta", meta))}


def of_bytes(data):
    """Make a part of a result from what is at hand.

    Args:
        data: bytes.

    Returns:
        (int, callable of an offset that yields bytes)
    """
    return len(data), lambda offset: [data[offset:]] if data[offset:] else []


def meta_of(key, cid, out, err, exit_code, status, extra=None):
    """Make the ``.meta`` of a result that is at hand.

    Args:
        key: bytes, or None for a result without a proof.
        cid: str.
        out, err: bytes.
        exit_code: int.
        status: str.
        extra: dict of further fields, or None.

    Returns:
        bytes
    """
    digests = hashlib.sha256(out).digest(), hashlib.sha256(err).digest()
    return meta_of_digests(key, cid, digests, exit_code, status, extra or {})


def meta_of_digests(key, cid, digests, exit_code, status, extra):
    """The same, of a result whose two SHA-256 digests are known.

    Args:
        digests: (bytes, bytes), of stdout and stderr; the others as for :func:`meta_of`.

    Returns:
        bytes
    """
    return make_meta(key, cid, *digests, {"id": cid, "exit": exit_code, "status": status, **extra})


def reason_line(reason):
    """What stderr says of a command that has no result.

    Args:
        reason: str, one sentence.

    Returns:
        bytes
    """
    return f"qvm-remote: {reason}\n".encode("utf-8", "replace")
