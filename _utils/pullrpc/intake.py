# SPDX-License-Identifier: GPL-2.0-or-later
"""How a request is taken in: verified, admitted with its stdin, and claimed; from then on it will have a result."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time

from .audit import describe_command, describe_rule
from .errors import AuditError, KeyringError, LedgerError, Refused, SpoolError
from .gate import authenticate, check_new, check_policy
from .rates import Rates
from .results import is_of
from .tags import Tags
from .validate import check_size

#: How long a request counts as verified: from the execution module's check to the engine's next step, seconds.
_VERIFIED_HOLDS = 0.5
_NONE_VERIFIED = (float("-inf"), None, None, None)


class Intake:
    """The way in.

    Args:
        stores: Stores.
    """

    def __init__(self, stores):
        self._stores = stores
        #: The request that each thread verified last: when, under which settings, its bytes, and what it is.
        self._verified = threading.local()
        self._rates = Rates()
        self._tags = Tags()

    def verify(self, vm, untrusted_cid, untrusted_command, untrusted_token):
        """Decide whether a request may run; changes nothing.

        Args:
            vm: str.
            untrusted_cid, untrusted_command, untrusted_token: bytes.

        Returns:
            (Request, str or None): the request, and its ledger state when it is on its way already.

        Raises:
            Refused: it may not.
        """
        config = self._stores.config.for_vm(vm)
        keys = functools.partial(self._stores.keyring.accepted, vm, config.max_age)
        request = authenticate(config, keys, vm, untrusted_cid, untrusted_command, untrusted_token)
        seen = check_new(config, self._stores.ledger, request)
        if seen:
            # It was allowed when it was claimed, and is looked at again before it runs.
            return request, seen
        request = check_policy(config, self._stores.ledger, self._tags.names, request)
        self._verified.last = (time.monotonic(), config, (vm, untrusted_cid, untrusted_command, untrusted_token), request)
        return request, None

    def _verify_once(self, *untrusted_request):
        """The same, unless this thread has just done it for exactly these bytes and under these settings. That counts once."""
        at, config, verified, request = getattr(self._verified, "last", _NONE_VERIFIED)
        is_known = verified == untrusted_request and time.monotonic() - at < _VERIFIED_HOLDS and config is self._stores.config.for_vm(verified[0])
        outcome = (request, None) if is_known else self.verify(*untrusted_request)
        self._verified.last = _NONE_VERIFIED
        return outcome

    def admit(self, vm, untrusted_cid, untrusted_command, untrusted_token, untrusted_stdin_size, uuid=""):
        """Take a request in: verify it here and now, and keep it on disk. It is not claimed yet.

        Args:
            vm: str.
            untrusted_cid, untrusted_command, untrusted_token: bytes.
            untrusted_stdin_size: int, bytes; -1 when the VM shows no stdin.
            uuid: str, the qube that this was fetched from.

        Returns:
            Request; None when it is on its way already and nothing was done.

        Raises:
            Refused: it may not run, stdin is too large or not what was signed, there is no room, or it can't be kept.
        """
        request, seen = self._verify_once(vm, untrusted_cid, untrusted_command, untrusted_token)
        if seen:
            if not is_of(self._stores.ledger.uuid(vm, request.cid), uuid):
                raise Refused("replay", "another qube had this name when it used this id; send it again")
            return None
        config = self._stores.config.for_vm(vm)
        check_size(untrusted_stdin_size, config.stdin_max, "stdin", "stdin")
        if (untrusted_stdin_size >= 0) != bool(request.stdin_digest):
            raise Refused("stdin", "stdin is not what was signed")
        self._rates.check(vm, config.rate, config.rate_day)
        self._stores.check_room(vm, max(0, untrusted_stdin_size), is_new=True)
        try:
            self._note_use(vm, request.key, config.max_age)
            self._stores.spool.store_request(vm, request.cid, untrusted_command, untrusted_token)
        except (SpoolError, LedgerError, KeyringError) as err:
            raise self._dismiss(request, Refused("storage", str(err))) from err
        return dataclasses.replace(request, uuid=uuid)

    def stdin_writer(self, request):
        """Begin to keep the stdin of a request that was admitted.

        Args:
            request: Request.

        Returns:
            spool.StdinWriter, to be closed by :meth:`end_stdin`.

        Raises:
            Refused: there is no room on the disk.
        """
        try:
            return self._stores.spool.stdin_writer(request.vm, request.cid)
        except SpoolError as err:
            raise self._dismiss(request, Refused("storage", str(err))) from err

    def end_stdin(self, request, writer):
        """Have done with a request's stdin.

        Args:
            request: Request.
            writer: spool.StdinWriter.

        Raises:
            Refused: it is not what was signed, or could not be kept.
        """
        try:
            digest = writer.close()
        except SpoolError as err:
            raise self._dismiss(request, Refused("storage", str(err))) from err
        # A VM sends one after the other: the next one is let in by what this one has taken.
        self._stores.spool.wrote(request.vm, writer.size)
        if digest != request.stdin_digest:
            raise self._dismiss(request, Refused("stdin", "stdin is not what was signed"))

    def dismiss(self, request):
        """Keep nothing of a request that was admitted and can't be claimed.

        Args:
            request: Request.
        """
        self._stores.spool.remove(request.vm, request.cid)

    def _dismiss(self, request, refused):
        self.dismiss(request)
        return refused

    def claim(self, admitted):
        """Claim requests that were admitted; on return the claims are on disk, and before them their lines in the audit log.

        Args:
            admitted: list of (Request, size of its stdin in bytes).

        Returns:
            dict of id to Refused, for those that are not claimed; nothing is kept of them.
        """
        refused = {}
        for request, _ in admitted:
            if request.stdin_digest:
                # While that was fetched the request grew older.
                self._check_still_new(request, refused)
        admitted = [one for one in admitted if one[0].cid not in refused]
        requests = [request for request, _ in admitted]
        try:
            self._stores.audit.write_all([self._accepted(*one) for one in admitted], sync=True)
            claimed = self._stores.ledger.claim_all([(request.vm, request.cid, request.token_mac, request.uuid) for request in requests])
        except (AuditError, LedgerError) as err:
            return {**refused, **{request.cid: self._dismiss(request, _unclaimed("storage", str(err))) for request in requests}}
        for request, is_claimed in zip(requests, claimed):
            if not is_claimed:
                refused[request.cid] = self._dismiss(request, _unclaimed("replay", "this id was used before; nothing is ever run twice"))
        return refused

    def _check_still_new(self, request, refused):
        try:
            check_new(self._stores.config.for_vm(request.vm), self._stores.ledger, request)
        except Refused as err:
            refused[request.cid] = self._dismiss(request, err)

    def _accepted(self, request, stdin_size):
        """The line for a request; what of the command has no room in it is kept beside it before."""
        shown = describe_command(request.command)
        if "whole" in shown:
            raw = request.command.encode("utf-8")
            self._stores.audit.keep_command(request.vm, request.cid, raw, self._stores.config.audit_commands_max, self._stores.config.audit_keep_days)
        fields = {"by": describe_rule(request.by), "form": request.form, "timeout": request.timeout, "stdin": stdin_size, **shown}
        return "accepted", request.vm, request.cid, fields

    def _note_use(self, vm, key, overlap):
        # A key that the VM signs with was handed to it, whether or not we saw it arrive.
        self._stores.keyring.handed(vm, key)
        # While commands of this VM wait here, others may wait there, signed with the old key as well.
        if self._stores.keyring.has_old(vm) and not self._stores.ledger.waiting(vm):
            self._stores.keyring.retire_old(vm, key, overlap)


def _unclaimed(code, reason):
    """A refusal of what stands in the audit log as accepted."""
    refused = Refused(code, reason)
    refused.is_claimed = False
    return refused
