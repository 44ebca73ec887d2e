# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 keeps and does with a request: verify it, claim it, run it in the sandbox, keep its result.

The one place where the parts meet; both the execution module and the pull loop work through it.
It never talks to a VM.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import secrets
import sys
import threading
import time

from . import __version__, ledger_file, sandbox
from .accounts import ROOT, find_account
from .audit import AuditLog, describe_command, describe_rule
from .config import make_config
from .errors import AuditError, ConfigError, KeyringError, LedgerDamaged, LedgerError, PullError, Refused, SandboxError, SpoolError, TransportError
from .gate import authenticate, check_new, check_policy
from .handover import Handover
from .keyring import Keyring
from .ledger import CLAIMED, DONE, RUNNING, Ledger
from .question import YES
from .rates import Rates
from .spool import ERR, META, OUT, Spool
from .tokens import TOKEN_MAX, chunk_mac, fingerprint, make_meta, parse_token, read_meta, token_matches
from .transport import vms_with_tag
from .validate import check_size

#: Exit code of everything that qvm-remote itself refuses or fails at.
EXIT_FAILED = 125
_SHELL = "/bin/bash"
#: Read once, and given as text: whoever runs it may not read Salt's cache, where this package lies.
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "run_steps.py"), encoding="utf-8") as _file:
    _RUN_STEPS = _file.read()
#: How long a request counts as verified: from the execution module's check to the engine's next step, seconds.
_VERIFIED_HOLDS = 0.5
#: How long the list of the VMs that have a tag holds while requests are taken in, seconds.
_TAGS_HOLD = 1.0
_NONE_VERIFIED = (float("-inf"), None, None, None)
_STRANGER = (
    "this is another qube than the one that got access to dom0 under the name {vm}; if it is to have access as well: in dom0, "
    "apply qvm-remote's states once more, or qvm_remote.bind {vm}"
)
#: Most commands of which something is kept for one VM, as a multiple of those that may wait: each takes room in memory and time, too.
_KEPT_MAX = 16
_NOT_WAITING = "this command is not waiting to run; nothing is ever run twice"
_INTERRUPTED = "interrupted: dom0's service ended before the command did; it is not run again"


_shared = {}
_shared_lock = threading.Lock()


def shared(settings):
    """dom0's side for some settings, one for each process: engine and execution module work on the same one.

    Args:
        settings: dict or None, as for :func:`pullrpc.config.make_config`.

    Returns:
        Dom0

    Raises:
        ConfigError: a setting is wrong.
    """
    name = _shared_name(settings)
    with _shared_lock:
        if name not in _shared:
            _shared[name] = Dom0(make_config(settings))
        return _shared[name]


def reconfigure(settings, new_settings):
    """Have this process's :class:`Dom0` go on under other settings; what runs is not disturbed.

    Args:
        settings, new_settings: dict, as for :func:`shared`.

    Returns:
        Dom0

    Raises:
        ConfigError: a setting is wrong, or can't be changed while the service runs.
    """
    config = make_config(new_settings)
    dom0 = shared(settings)
    for name in ("key_dir", "state_dir", "run_dir", "audit_log"):
        if getattr(config, name) != getattr(dom0.config, name):
            raise ConfigError(f"{name} can't be changed while the service runs; restart it")
    with _shared_lock:
        dom0.config = config
        dom0.audit.reconfigure(config.syslog, config.audit_files)
        _shared[_shared_name(new_settings)] = dom0
    return dom0


def _shared_name(settings):
    # With the pid: a forked process must not use its parent's database connection.
    return os.getpid(), json.dumps(settings, sort_keys=True, default=str)


class Dom0:
    """dom0's side, from key to result.

    Args:
        config: Config.
    """

    def __init__(self, config):
        self.config = config
        self.keyring = Keyring(config.key_dir)
        self._ledger = None
        self.spool = Spool(os.path.join(config.state_dir, "spool"))
        self.audit = AuditLog(config.audit_log, config.syslog, config.audit_files)
        self.handover = Handover(os.path.join(config.state_dir, "handover"), self.keyring, self.audit)
        #: The request that each thread verified last: when, under which settings, its bytes, and what it is.
        self._verified = threading.local()
        self._running = {}
        self._cancelled_early = set()
        #: What dom0's user said of commands that wait: (vm, cid) to (token MAC, word, reason).
        self._answers = {}
        self._rates = Rates()
        #: Tags that rules name, and which VMs have them.
        self._tags = {}
        #: Told of what a command that runs has written so far: callable of vm, cid, bytes of stdout and of stderr; or None.
        self.on_output = None
        self._lock = threading.Lock()
        self._ledger_lock = threading.Lock()

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
        unfinished = self.spool.kept()
        self.audit.write("ledger-renewed", "-", sync=True, unfinished=len(unfinished))
        return ledger_file.set_aside(self.ledger_path, unfinished)

    def _close_ledger(self):
        with self._ledger_lock:
            if self._ledger is not None:
                self._ledger.close()
                self._ledger = None

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
        config = self.config.for_vm(vm)
        keys = functools.partial(self.keyring.accepted, vm, config.max_age)
        request = authenticate(config, keys, vm, untrusted_cid, untrusted_command, untrusted_token)
        seen = check_new(config, self.ledger, request)
        if seen:
            # It was allowed when it was claimed, and is looked at again before it runs.
            return request, seen
        request = check_policy(config, self.ledger, self._tagged, request)
        self._verified.last = (time.monotonic(), config, (vm, untrusted_cid, untrusted_command, untrusted_token), request)
        return request, None

    def _tagged(self, tag):
        """The VMs that have a tag, as it was a moment ago: a VM that asks for much does not have as many programs started. What was let
        in by this is looked at anew before it runs.
        """
        with self._lock:
            known = self._tags.setdefault(tag, _Tagged())
        return known.names(tag)

    def _verify_once(self, *untrusted_request):
        """The same, unless this thread has just done it for exactly these bytes and under these settings. That counts once."""
        at, config, verified, request = getattr(self._verified, "last", _NONE_VERIFIED)
        is_known = verified == untrusted_request and time.monotonic() - at < _VERIFIED_HOLDS and config is self.config.for_vm(verified[0])
        outcome = (request, None) if is_known else self.verify(*untrusted_request)
        self._verified.last = _NONE_VERIFIED
        return outcome

    def admit(self, vm, untrusted_cid, untrusted_command, untrusted_token, untrusted_stdin_size):
        """Take a request in: verify it here and now, and keep it on disk. It is not claimed yet.

        Args:
            vm: str.
            untrusted_cid, untrusted_command, untrusted_token: bytes.
            untrusted_stdin_size: int, bytes; -1 when the VM shows no stdin.

        Returns:
            Request; None when it is on its way already and nothing was done.

        Raises:
            Refused: it may not run, stdin is too large or not what was signed, there is no room, or it can't be kept.
        """
        request, seen = self._verify_once(vm, untrusted_cid, untrusted_command, untrusted_token)
        if seen:
            return None
        config = self.config.for_vm(vm)
        check_size(untrusted_stdin_size, config.stdin_max, "stdin")
        if (untrusted_stdin_size >= 0) != bool(request.stdin_digest):
            raise Refused("stdin", "stdin is not what was signed")
        self._rates.check(vm, config.rate, config.rate_day)
        if self._check_room(config, vm, max(0, untrusted_stdin_size)) >= _KEPT_MAX * config.vm_queue:
            raise _no_room()
        try:
            self._note_use(vm, request.key, config.max_age)
            self.spool.store_request(vm, request.cid, untrusted_command, untrusted_token)
        except (SpoolError, LedgerError, KeyringError) as err:
            raise self._dismiss(request, Refused("storage", str(err))) from err
        return request

    def _check_room(self, config, vm, more=0):
        """See whether there is room for one more command of a VM, with as much output as it may have, and so many bytes.

        Returns:
            int, of how many commands something is kept.
        """
        for count in (self.spool.used, self.spool.used_now):
            # What went lately may still be counted: nobody is refused for that.
            used, kept = count(vm)
            if used + more + 2 * config.output_max <= config.spool_bytes_max:
                return kept
        raise _no_room()

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
            return self.spool.stdin_writer(request.vm, request.cid)
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
        if digest != request.stdin_digest:
            raise self._dismiss(request, Refused("stdin", "stdin is not what was signed"))

    def dismiss(self, request):
        """Keep nothing of a request that was admitted and can't be claimed.

        Args:
            request: Request.
        """
        self.spool.remove(request.vm, request.cid)

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
            self.audit.write_all([self._accepted(*one) for one in admitted], sync=True)
            claimed = self.ledger.claim_all([(request.vm, request.cid, request.token_mac) for request in requests])
        except (AuditError, LedgerError) as err:
            return {**refused, **{request.cid: self._dismiss(request, _unclaimed("storage", str(err))) for request in requests}}
        for request, is_claimed in zip(requests, claimed):
            if not is_claimed:
                refused[request.cid] = self._dismiss(request, _unclaimed("replay", "this id was used before; nothing is ever run twice"))
        return refused

    def _check_still_new(self, request, refused):
        try:
            check_new(self.config.for_vm(request.vm), self.ledger, request)
        except Refused as err:
            refused[request.cid] = self._dismiss(request, err)

    def _accepted(self, request, stdin_size):
        """The line for a request; what of the command has no room in it is kept beside it before."""
        shown = describe_command(request.command)
        if "whole" in shown:
            raw = request.command.encode("utf-8")
            self.audit.keep_command(request.vm, request.cid, raw, self.config.audit_commands_max, self.config.audit_keep_days)
        fields = {"by": describe_rule(request.by), "form": request.form, "timeout": request.timeout, "stdin": stdin_size, **shown}
        return "accepted", request.vm, request.cid, fields

    def _note_use(self, vm, key, overlap):
        # A key that the VM signs with was handed to it, whether or not we saw it arrive.
        self.keyring.handed(vm, key)
        # While commands of this VM wait here, others may wait there, signed with the old key as well.
        if self.keyring.has_old(vm) and not self.ledger.waiting(vm):
            self.keyring.retire_old(vm, key, overlap)

    def execute(self, vm, cid):
        """Run a claimed command and keep its result.

        Its token is checked once more, from what was kept; then the ledger lets exactly one caller start it.

        Args:
            vm, cid: str.

        Returns:
            dict: ``exit`` (int), ``status`` (str: done, timeout, cancelled, interrupted, failed, refused), ``seconds`` (float).

        Raises:
            Refused: it was not claimed, or has been started before; its result isn't touched.
            LedgerError: the ledger can't tell.
        """
        started = time.monotonic()
        config = self.config.for_vm(vm)
        key = None
        seen = self.ledger.state(vm, cid)
        if seen is None or seen[0] != CLAIMED:
            raise Refused("replay", _NOT_WAITING)
        try:
            command, token_line, stdin_path = self.spool.load_request(vm, cid, config.command_max, TOKEN_MAX)
            # Its key may have been replaced since it was claimed; if it was revoked, there is none of them.
            request = authenticate(config, functools.partial(self.keyring.held, vm), vm, cid.encode("ascii"), command, token_line)
            key = request.key
            request = self._answered(check_policy(config, self.ledger, vms_with_tag, request))
            account = None if request.form == "ping" else find_account(config.run_as)
            if request.form != "ping":
                # When it was let in, those before it had written nothing yet.
                self._check_room(config, vm)
            if not self.ledger.start(vm, cid):
                raise Refused("replay", _NOT_WAITING)
        except Refused as err:
            if err.code == "replay":
                raise
            return self._finish_without_run(vm, cid, str(err), "refused", key)
        except (SpoolError, LedgerError) as err:
            return self._finish_without_run(vm, cid, str(err), "failed", key)
        if request.form == "ping":
            return self._finish_ping(request, started)
        try:
            # Not the name alone: one that is root's second name is root.
            self.audit.write("run", vm, cid, by=describe_rule(request.by), **{"as": account.name if account else ROOT})
            outcome = self._run(config, request, stdin_path, account)
        except (SandboxError, AuditError, SpoolError) as err:
            return self._finish_without_run(vm, cid, str(err), "failed", key)
        return self._finish_run(request, outcome)

    def cancel(self, vm, cid):
        """Have done with a command whose client gave up: kill it if it runs; keep no result in any case.

        Args:
            vm, cid: str.

        Raises:
            LedgerError: the ledger can't be read or written.
        """
        with self._lock:
            # Under the lock, so that a command about to run either is seen running here or sees this mark.
            running = self._running.get((vm, cid))
            if running is not None:
                running.stop("cancelled")
                return
            seen = self.ledger.state(vm, cid)
            if seen and seen[0] in (CLAIMED, RUNNING):
                self._cancelled_early.add((vm, cid))
                return
        if seen and seen[0] == DONE:
            self.close_delivery(vm, cid, "given-up")

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
            if not self.keyring.exists(vm):
                return None
            bound = self.keyring.bound(vm)
            if not bound:
                self.audit.write("bound", vm, sync=True, uuid=uuid)
                self.keyring.bind(vm, uuid)
            return None if bound in ("", uuid) else _STRANGER.format(vm=vm)
        except (KeyringError, AuditError) as err:
            return str(err)

    def answer(self, request, word, reason, run_as):
        """Note what dom0's user said of a command that waits.

        Args:
            request: Request, the very one that was shown.
            word: str, see :mod:`pullrpc.question`.
            reason: str, what its VM is to hear if that is no yes.
            run_as: str, the user of dom0 as whom it was said to run.
        """
        with self._lock:
            self._answers[request.vm, request.cid] = (request.token_mac, word, reason, run_as)

    def _answered(self, request):
        with self._lock:
            token_mac, word, reason, run_as = self._answers.pop((request.vm, request.cid), (None, None, None, None))
        if word is None and not request.asks:
            return request
        # Whatever the rules say by now: who was asked and said no has said no.
        if word != YES or token_mac != request.token_mac:
            raise Refused("asked", reason or "dom0's user has to be asked about this by now, and was not; send it again")
        if run_as != self.config.for_vm(request.vm).run_as:
            raise Refused("asked", "dom0's user said yes, but by now it would run as another user; send it again")
        return dataclasses.replace(request, by=f"{request.by}; user: yes")

    def interrupt_running(self):
        """Kill everything that runs; the results say ``interrupted`` and are kept."""
        with self._lock:
            for running in self._running.values():
                running.stop("interrupted")

    def drop_queued(self, vm, cid):
        """Finish a command that was claimed, not started, and whose client gave up.

        Args:
            vm, cid: str.
        """
        if self.ledger.start(vm, cid):
            self._finish_cancelled(vm, cid, 0.0)

    def interrupt_queued(self, vm, cid):
        """Finish a command that was claimed and will not be started: the service stops."""
        if self.ledger.start(vm, cid):
            self._finish_without_run(vm, cid, _INTERRUPTED, "interrupted", self._key_of(vm, cid))

    def finish_lost(self, vm, cid, reason):
        """Finish a command that has ended, and whose end could not be recorded then. Nothing is done if it is by now.

        Args:
            vm, cid: str.
            reason: str, one sentence for its client, if there is no result.

        Raises:
            LedgerError, AuditError, SpoolError: it can't be recorded now either.
        """
        seen = self.ledger.state(vm, cid)
        if seen and seen[0] in (CLAIMED, RUNNING):
            self._finish_left(vm, cid, reason, "failed")

    def warm(self):
        """Have a supervisor wait for the first command.

        Raises:
            SandboxError: the sandbox can't be set up.
        """
        sandbox.warm(_limits(self.config))

    def note_time(self):
        """Note what time it is for each VM that has access for a time, so that its end comes even if it asks for nothing meanwhile.

        Raises:
            LedgerError: it can't be noted.
        """
        for vm in self.config.vms:
            until = self.config.for_vm(vm).until
            if until:
                self.ledger.saw_clock(vm, until, time.time())

    def recover(self):
        """Finish what an engine that died left claimed or running. Nothing is run again.

        Returns:
            list of (vm, cid), now waiting for delivery.

        Raises:
            LedgerError: the ledger is damaged, or can't be read or written; AuditError: the audit log can't.
        """
        self.check_ledger()
        left = self.ledger.unfinished()
        for vm, cid in left:
            self._finish_left(vm, cid, _INTERRUPTED, "interrupted")
        self.spool.sweep(self.ledger.open_commands())
        for vm in self.ledger.open_counts():
            # One that comes back in less than that is told. Others may be gone for good.
            self.expire(vm, 2 * self.config.spool_max_age)
        self.prune()
        return left

    def prune(self):
        """Forget what is kept for some days only, and is older.

        Raises:
            LedgerError: the ledger can't be written; AuditError: what goes can't be recorded.
        """
        self.ledger.prune(self.config.ledger_keep_days)
        self.audit.prune_commands(self.config.audit_commands_max, self.config.audit_keep_days)

    def _finish_left(self, vm, cid, reason, status):
        """Finish what does not run any more: by its result if that is all there, otherwise by why there is none."""
        fields = self._result_left(vm, cid)
        if fields:
            self._record(vm, cid, int(fields["exit"]), fields["status"], 0.0)
            return
        for part in (OUT, ERR, META):
            self.spool.remove_part(vm, cid, part)
        self._finish_without_run(vm, cid, reason, status, self._key_of(vm, cid))

    def _result_left(self, vm, cid):
        """What ``.meta`` says, if it is there and fits the output: then the command had ended, and all but its row says so."""
        try:
            meta = b"".join(self.spool.chunks(vm, cid, META))
            if not meta:
                return None
            digests = self.spool.digest(vm, cid, OUT), self.spool.digest(vm, cid, ERR)
            for key in self.keyring.held(vm):
                fields, authentic = read_meta(key, cid, *digests, meta)
                if authentic:
                    return fields
        except (SpoolError, KeyringError):
            # Whatever can't be read, or proven, is no result.
            pass
        return None

    def _key_of(self, vm, cid):
        """The key that a request which dom0 keeps was signed with."""
        try:
            command, token_line, _ = self.spool.load_request(vm, cid, self.config.for_vm(vm).command_max, TOKEN_MAX)
        except PullError:
            return self._key_or_none(vm)
        return self._signer(vm, cid, command, token_line)

    def _signer(self, vm, cid, command, token_line):
        """The key that a request was signed with: its client believes no other. The VM's present one if that can't be told."""
        try:
            token = parse_token(token_line)
            return next(key for key in self.keyring.held(vm) if token_matches(key, vm, cid, token, command))
        except (Refused, KeyringError, StopIteration):
            return self._key_or_none(vm)

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
        err = _reason_line(reason)
        key = None
        if is_proven:
            key = self._signer(vm, cid, *request) if request else self._key_of(vm, cid)
        return err, _meta(key, cid, b"", err, EXIT_FAILED, "refused")

    def expire(self, vm, max_age=None):
        """Give up results of a VM that waited too long.

        Args:
            vm: str.
            max_age: int, seconds (default: the setting ``spool_max_age``).

        Returns:
            (list of cid, list of cid): those still to be delivered, oldest first, and those that were given up just now.

        Raises:
            LedgerError: the ledger can't be read or written.
        """
        waiting, expired = [], []
        for cid, done_at in self.ledger.undelivered(vm):
            if time.time() - done_at <= (max_age or self.config.spool_max_age):
                waiting.append(cid)
                continue
            self.close_delivery(vm, cid, "expired")
            expired.append(cid)
        return waiting, expired

    def result(self, vm, cid):
        """Fetch a result that waits for delivery.

        Args:
            vm, cid: str.

        Returns:
            (int, dict) or None: exit code, and ``out``, ``err`` and ``meta`` as (size in bytes, callable of an offset that yields bytes);
            None when there is nothing (any more) to deliver.

        Raises:
            LedgerError, SpoolError: it can't be read.
        """
        exit_code = self.ledger.waiting_exit(vm, cid)
        if exit_code is None:
            return None
        if not self.spool.size(vm, cid, META):
            # The disk was full when the command ended.
            err, meta = self.refusal(vm, cid, f"the command ended (exit code {exit_code}), but dom0 could not keep its result: its disk is full")
            return EXIT_FAILED, in_memory(err, meta)
        chunks = {part: functools.partial(self.spool.chunks, vm, cid, part) for part in (OUT, ERR, META)}
        return exit_code, {part: (self.spool.size(vm, cid, part), chunks[part]) for part in (OUT, ERR, META)}

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
        self.audit.write_all([(what, vm, cid, {}) for vm, cid in results])
        self.ledger.delivered(results)
        for vm, cid in results:
            self.spool.remove(vm, cid)

    def chunk(self, vm, cid, seq, part, offset, size):
        """A piece of what a command that runs has written so far, with dom0's proof.

        Args:
            vm, cid: str.
            seq: int, pieces before it.
            part: str, ``out`` or ``err``.
            offset, size: int, bytes.

        Returns:
            (bytes, str): the piece and its MAC; None when the command does not run any more.

        Raises:
            SpoolError: it can't be read.
        """
        # Without the lock, which is held while the ledger is asked: this is called in the loop of all VMs.
        running = self._running.get((vm, cid))
        if running is None:
            return None
        data = self.spool.piece(vm, cid, part, offset, size)
        return data, chunk_mac(running.key, cid, seq, part, data)

    def drop_old_key(self, vm):
        """Remove a VM's replaced key once it works no more, and no command that was accepted under it waits.

        Args:
            vm: str, a checked name.

        Raises:
            KeyringError: it can't be removed; LedgerError: the ledger can't be read.
        """
        if self.keyring.has_old(vm) and self.ledger.waiting(vm):
            return
        self.keyring.drop_old(vm, self.config.for_vm(vm).max_age)

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
        old, staged = fingerprint(self.keyring.get(vm)), self.keyring.staged(vm)
        if staged and given in (None, staged):
            return old, fingerprint(staged)
        if self.keyring.has_old(vm) and self.ledger.waiting(vm):
            raise KeyringError(f"commands wait that {vm} may have signed before its last rotation; rotate again when they have run")
        key = given or secrets.token_bytes(32)
        self.audit.write("rotation", vm, old=old, new=fingerprint(key))
        return old, self.keyring.stage(vm, key)

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
        had_key = self.keyring.remove(vm)
        waiting = [cid for cid, _ in self.ledger.undelivered(vm)] if self.remembered(vm) else []
        count = self.remembered(vm) and self.ledger.forget(vm)
        for cid in waiting:
            self.spool.remove(vm, cid)
        self.handover.forget(vm)
        if had_key or count:
            self.audit.write("revoked", vm, forgotten=count)
        return bool(had_key or count)

    def _run(self, config, request, stdin_path, account):
        vm, cid = request.vm, request.cid
        script = request.command.encode("utf-8") if request.form == "script" else None
        argv = {"argv": request.argv, "script": (_SHELL,), "shell": (_SHELL, "-c", "--", request.command)}.get(request.form)
        if request.form == "steps":
            argv, script = (sys.executable, "-I", "-S", "-c", _RUN_STEPS), json.dumps([words for _, words in request.steps]).encode("ascii")
        for part in (OUT, ERR):
            self.spool.remove_part(vm, cid, part)
        job = sandbox.Job(
            vm=vm,
            cid=cid,
            argv=argv,
            script=script,
            stdin_path=stdin_path,
            out_path=self.spool.path(vm, cid, OUT),
            err_path=self.spool.path(vm, cid, ERR),
            timeout=request.timeout,
            account=account,
        )
        on_output = functools.partial(self.on_output, vm, cid) if self.on_output else None
        running = _Running(sandbox.start(job, _limits(config), on_output), request.key)
        with self._lock:
            self._running[vm, cid] = running
            if (vm, cid) in self._cancelled_early:
                running.stop("cancelled")
        try:
            return running.handle.wait(), running.why_stopped
        finally:
            with self._lock:
                del self._running[vm, cid]

    def _finish_run(self, request, ended):
        outcome, why_stopped = ended
        vm, cid = request.vm, request.cid
        self.spool.wrote(vm, min(outcome.out_bytes + outcome.err_bytes, 2 * self.config.output_max))
        if outcome.cancelled and why_stopped == "cancelled":
            return self._finish_cancelled(vm, cid, outcome.seconds, **_sizes(outcome))
        status = "timeout" if outcome.timed_out else "interrupted" if outcome.cancelled else "done"
        exit_code = EXIT_FAILED if outcome.cancelled else outcome.exit_code
        extra = {
            "seconds": f"{outcome.seconds:.3f}",
            "timeout": request.timeout,
            "signal": outcome.signal or 0,
            "out-bytes": outcome.out_bytes,
            "err-bytes": outcome.err_bytes,
            "out-truncated": int(outcome.out_truncated),
            "err-truncated": int(outcome.err_truncated),
        }
        try:
            if outcome.cancelled:
                self.spool.append(vm, cid, ERR, _reason_line(_INTERRUPTED))
            digests = self.spool.digest(vm, cid, OUT), self.spool.digest(vm, cid, ERR)
            self.spool.store_text(vm, cid, META, _meta_of(request.key, cid, digests, exit_code, status, extra))
        except SpoolError as err:
            return self._finish_without_run(vm, cid, f"the command ended with exit code {exit_code}, but {err}", "failed", request.key)
        return self._record(vm, cid, exit_code, status, outcome.seconds, signal=outcome.signal or 0, **_sizes(outcome))

    def _finish_ping(self, request, started):
        vm, cid = request.vm, request.cid
        try:
            self.spool.store_text(vm, cid, OUT, b"pong\n")
            # For the client to compare with its own.
            told = {"version": __version__, "time": f"{time.time():.3f}"}
            self.spool.store_text(vm, cid, META, _meta(request.key, cid, b"pong\n", b"", 0, "done", told))
        except SpoolError as err:
            return self._finish_without_run(vm, cid, str(err), "failed", request.key)
        return self._record(vm, cid, 0, "done", time.monotonic() - started, out=5, err=0)

    def _finish_without_run(self, vm, cid, reason, status, key=None):
        """Keep a result that says why there is none, in place of whatever output there was."""
        err = _reason_line(reason)
        key = key or self._key_or_none(vm)
        for part in (OUT, META):
            self.spool.remove_part(vm, cid, part)
        try:
            self.spool.store_text(vm, cid, ERR, err)
            self.spool.store_text(vm, cid, META, _meta(key, cid, b"", err, EXIT_FAILED, status))
        except SpoolError:
            # A full disk: without .meta the pull loop makes the same answer in memory when it delivers.
            self.spool.remove_part(vm, cid, ERR)
        return self._record(vm, cid, EXIT_FAILED, status, 0.0)

    def _finish_cancelled(self, vm, cid, seconds, **sizes):
        result = self._record(vm, cid, EXIT_FAILED, "cancelled", seconds, **sizes)
        self.close_delivery(vm, cid)
        return result

    def _record(self, vm, cid, exit_code, status, seconds, **more):
        # First of all: an end that can't be recorded here stays open in the ledger, and the next start of the service closes it.
        self.audit.write("ended", vm, cid, sync=True, exit=exit_code, status=status, seconds=round(seconds, 3), **more)
        self.ledger.finish(vm, cid, exit_code, status)
        self.spool.remove_inputs(vm, cid)
        with self._lock:
            self._answers.pop((vm, cid), None)
            given_up = (vm, cid) in self._cancelled_early
            self._cancelled_early.discard((vm, cid))
        if given_up and status != "cancelled":
            self.close_delivery(vm, cid, "given-up")
        return {"exit": exit_code, "status": status, "seconds": round(seconds, 3)}

    def _key_or_none(self, vm):
        try:
            return self.keyring.get(vm)
        except KeyringError:
            # Revoked meanwhile, or never there: the client can't be given a proof, and treats the answer as a refusal only.
            return None


def _unclaimed(code, reason):
    """A refusal of what stands in the audit log as accepted."""
    refused = Refused(code, reason)
    refused.is_claimed = False
    return refused


def _no_room():
    return Refused("room", "dom0 keeps too many unfinished commands and results of this VM; wait for them to be delivered")


def _sizes(outcome):
    return {"out": outcome.out_bytes, "err": outcome.err_bytes}


def _limits(config):
    return sandbox.Limits(
        run_dir=config.run_dir,
        output_max=config.output_max,
        memory_max=config.memory_max,
        tasks_max=config.tasks_max,
        cpu_weight=config.cpu_weight,
        nofile=config.nofile,
        path=config.path,
        work_max=config.work_max,
    )


def _meta(key, cid, out, err, exit_code, status, extra=None):
    return _meta_of(key, cid, (hashlib.sha256(out).digest(), hashlib.sha256(err).digest()), exit_code, status, extra or {})


def _meta_of(key, cid, digests, exit_code, status, extra):
    return make_meta(key, cid, *digests, {"id": cid, "exit": exit_code, "status": status, **extra})


class _Tagged:
    """The VMs that have a tag, or why that can't be told, for a moment."""

    def __init__(self):
        self._lock = threading.Lock()
        self._at = float("-inf")
        self._names = self._problem = None

    def names(self, tag):
        with self._lock:
            if time.monotonic() - self._at > _TAGS_HOLD:
                try:
                    self._names, self._problem = vms_with_tag(tag), None
                except TransportError as err:
                    self._problem = str(err)
                # From its end on: while it lasted, whoever asked waited for it.
                self._at = time.monotonic()
            if self._problem:
                raise TransportError(self._problem)
            return self._names


class _Running:
    """A command in the sandbox, and why it was told to stop if it was."""

    def __init__(self, handle, key):
        self.handle = handle
        self.key = key
        self.why_stopped = None

    def stop(self, why):
        self.why_stopped = self.why_stopped or why
        self.handle.cancel()


def in_memory(err, meta):
    """Make the parts of a result that has no output.

    Args:
        err, meta: bytes.

    Returns:
        dict, as :meth:`Dom0.result` gives it.
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


def _reason_line(reason):
    return f"qvm-remote: {reason}\n".encode("utf-8", "replace")
