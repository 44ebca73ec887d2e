# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens to a command that was claimed: it runs once, or not at all, and its end is recorded before anybody hears of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import threading
import time

from . import __version__, ledger_file, sandbox
from .accounts import ROOT, find_account
from .audit import describe_rule
from .errors import AuditError, KeyringError, LedgerError, Refused, SandboxError, SpoolError
from .gate import authenticate, check_policy
from .ledger import CLAIMED, DONE, RUNNING
from .question import YES
from .results import EXIT_FAILED, INTERRUPTED, is_of, meta_of, meta_of_digests, reason_line
from .sandbox_slots import interpreter
from .spool import ERR, META, OUT
from .tokens import TOKEN_MAX, chunk_mac
from .transport import vms_with_tag

_SHELL = "/bin/bash"
#: Read once, and given as text: whoever runs it may not read Salt's cache, where this package lies.
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "run_steps.py"), encoding="utf-8") as _file:
    _RUN_STEPS = _file.read()
_NOT_WAITING = "this command is not waiting to run; nothing is ever run twice"


class Execution:
    """The commands that were claimed.

    Args:
        stores: Stores.
        results: Results.
    """

    def __init__(self, stores, results):
        self._stores = stores
        self._results = results
        self._running = {}
        #: (vm, cid) whose clients gave up, and whose ends are not recorded yet as far as that goes.
        self._cancelled_early = set()
        #: What dom0's user said of commands that wait: (vm, cid) to (token MAC, word, reason).
        self._answers = {}
        #: Told of what a command that runs has written so far: callable of vm, cid, bytes of stdout and of stderr; or None.
        self.on_output = None
        self._lock = threading.Lock()

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
        config = self._stores.config.for_vm(vm)
        key = None
        seen = self._stores.ledger.state(vm, cid)
        if seen is None or seen[0] != CLAIMED:
            raise Refused("replay", _NOT_WAITING)
        try:
            command, token_line, stdin_path = self._stores.spool.load_request(vm, cid, config.command_max, TOKEN_MAX)
            # Its key may have been replaced since it was claimed; if it was revoked, there is none of them.
            request = authenticate(config, functools.partial(self._stores.keyring.held, vm), vm, cid.encode("ascii"), command, token_line)
            key, uuid = request.key, self._stores.ledger.uuid(vm, cid)
            if not is_of(uuid, self._stores.keyring.bound(vm) or uuid):
                raise Refused("identity", "this qube's name, and its access, were given to another qube")
            request = self._answered(check_policy(config, self._stores.ledger, vms_with_tag, request))
            account = None if request.form == "ping" else find_account(config.run_as)
            if request.form != "ping":
                # When it was let in, those before it had written nothing yet.
                self._stores.check_room(vm)
            if not self._stores.ledger.start(vm, cid):
                raise Refused("replay", _NOT_WAITING)
        except Refused as err:
            if err.code == "replay":
                raise
            return self._finish_unstarted(vm, cid, str(err), "refused", key)
        except (SpoolError, LedgerError, KeyringError) as err:
            return self._finish_unstarted(vm, cid, str(err), "failed", key)
        if self._is_given_up(vm, cid):
            return self._finish_cancelled(vm, cid, 0.0)
        if request.form == "ping":
            return self._finish_ping(request, started)
        try:
            # Not the name alone: one that is root's second name is root.
            self._stores.audit.write("run", vm, cid, by=describe_rule(request.by), **{"as": account.name if account else ROOT})
        except AuditError as err:
            return self._finish_without_run(vm, cid, str(err), "failed", key)
        if self._is_given_up(vm, cid):
            # While that was written. What is cancelled from here on has begun, and is ended.
            return self._finish_cancelled(vm, cid, 0.0)
        try:
            outcome = self._run(config, dataclasses.replace(request, uuid=uuid), stdin_path, account)
        except (SandboxError, SpoolError) as err:
            return self._finish_without_run(vm, cid, str(err), "failed", key)
        return self._finish_run(request, outcome)

    def cancel(self, vm, cid):
        """Have done with a command whose client gave up: kill it if it runs; keep no result in any case.

        Args:
            vm, cid: str.

        Returns:
            bool, False when there is nothing to have done with: it was never claimed, or its result has arrived.

        Raises:
            LedgerError, AuditError: the ledger can't be read, or this not be recorded.
        """
        with self._lock:
            # Under the lock, so that a command about to run either is seen running here or sees this mark.
            running = self._running.get((vm, cid))
            if running is not None:
                running.stop("cancelled")
                return True
            seen = self._stores.ledger.state(vm, cid)
            if seen and seen[0] in (CLAIMED, RUNNING):
                self._cancelled_early.add((vm, cid))
                return True
        if not seen or seen[0] != DONE:
            return False
        self._results.close_delivery(vm, cid, "given-up")
        return True

    def _is_given_up(self, vm, cid):
        with self._lock:
            return (vm, cid) in self._cancelled_early

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
        if run_as != self._stores.config.for_vm(request.vm).run_as:
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

        Raises:
            LedgerError, AuditError: it can't be recorded now; :meth:`finish_lost` does that later.
        """
        with self._lock:
            # First of all: whoever finishes it in the end keeps no result.
            self._cancelled_early.add((vm, cid))
        if self._stores.ledger.start(vm, cid):
            self._finish_cancelled(vm, cid, 0.0)
            return
        with self._lock:
            self._cancelled_early.discard((vm, cid))

    def interrupt_queued(self, vm, cid):
        """Finish a command that was claimed and will not be started: the service stops.

        Raises:
            LedgerError, AuditError: it can't be recorded now; :meth:`finish_lost` does that later.
        """
        if self._stores.ledger.start(vm, cid):
            self._finish_without_run(vm, cid, INTERRUPTED, "interrupted", self._results.key_of(vm, cid))

    def finish_lost(self, vm, cid, reason):
        """Finish a command that could not be started, or has ended and its end could not be recorded then. Nothing is done if it is by now.
        Nothing is kept of one whose client gave up.

        Args:
            vm, cid: str.
            reason: str, one sentence for its client, if there is no result.

        Raises:
            LedgerError, AuditError, SpoolError: it can't be recorded now either.
        """
        seen = self._stores.ledger.state(vm, cid)
        if seen and seen[0] in (CLAIMED, RUNNING):
            self._finish_left(vm, cid, reason, "interrupted" if reason == INTERRUPTED else "failed")
        elif (vm, cid) in self._cancelled_early:
            self._close_given_up(vm, cid)

    def warm(self):
        """Have a supervisor wait for the first command.

        Raises:
            SandboxError: the sandbox can't be set up.
        """
        sandbox.warm(_limits(self._stores.config))

    def recover(self):
        """Finish what an engine that died left claimed or running. Nothing is run again. One whose files can't be touched stays unfinished:
        the others' clients need not wait for it.

        Returns:
            list of (vm, cid), now waiting for delivery.

        Raises:
            LedgerError: the ledger is damaged, or can't be read or written; AuditError: the audit log can't.
        """
        self._stores.check_ledger()
        ledger_file.sweep(self._stores.ledger_path)
        left = []
        for vm, cid in self._stores.ledger.unfinished():
            with contextlib.suppress(SpoolError):
                self._finish_left(vm, cid, INTERRUPTED, "interrupted")
                left.append((vm, cid))
        self._stores.spool.sweep(self._stores.ledger.open_commands())
        self._results.expire_all()
        self._stores.prune()
        return left

    def is_of(self, vm, cid, uuid):
        """Say whether a command is a qube's, and not the one's that had its name before.

        Args:
            vm, cid: str.
            uuid: str, the qube that has this name now.

        Returns:
            bool

        Raises:
            LedgerError: the ledger can't be read.
        """
        return is_of(self._stores.ledger.uuid(vm, cid), uuid)

    def chunk(self, vm, cid, seq, part, offset, size, uuid):
        """A piece of what a command that runs has written so far, with dom0's proof.

        Args:
            vm, cid: str.
            seq: int, pieces before it.
            part: str, ``out`` or ``err``.
            offset, size: int, bytes.
            uuid: str, the qube that it is for.

        Returns:
            (bytes, str): the piece and its MAC; None when the command does not run any more, or is not that qube's.

        Raises:
            SpoolError: it can't be read.
        """
        # Without the lock, which is held while the ledger is asked: this is called in the loop of all VMs.
        running = self._running.get((vm, cid))
        if running is None or not is_of(running.uuid, uuid):
            return None
        data = self._stores.spool.piece(vm, cid, part, offset, size)
        return data, chunk_mac(running.key, cid, seq, part, data)

    def _run(self, config, request, stdin_path, account):
        vm, cid = request.vm, request.cid
        script = request.command.encode("utf-8") if request.form == "script" else None
        argv = {"argv": request.argv, "script": (_SHELL,), "shell": (_SHELL, "-c", "--", request.command)}.get(request.form)
        if request.form == "steps":
            argv, script = (interpreter(), "-I", "-S", "-c", _RUN_STEPS), json.dumps([words for _, words in request.steps]).encode("ascii")
        for part in (OUT, ERR):
            self._stores.spool.remove_part(vm, cid, part)
        job = sandbox.Job(
            vm=vm,
            cid=cid,
            argv=argv,
            script=script,
            stdin_path=stdin_path,
            out_path=self._stores.spool.path(vm, cid, OUT),
            err_path=self._stores.spool.path(vm, cid, ERR),
            timeout=request.timeout,
            account=account,
        )
        on_output = functools.partial(self.on_output, vm, cid) if self.on_output else None
        running = _Running(sandbox.start(job, _limits(config), on_output), request.key, request.uuid)
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
        self._stores.spool.wrote(vm, min(outcome.out_bytes + outcome.err_bytes, 2 * self._stores.config.output_max))
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
                self._stores.spool.append(vm, cid, ERR, reason_line(INTERRUPTED))
            digests = self._stores.spool.digest(vm, cid, OUT), self._stores.spool.digest(vm, cid, ERR)
            self._stores.spool.store_text(vm, cid, META, meta_of_digests(request.key, cid, digests, exit_code, status, extra))
        except SpoolError as err:
            return self._finish_without_run(vm, cid, f"the command ended with exit code {exit_code}, but {err}", "failed", request.key)
        return self._record(vm, cid, exit_code, status, outcome.seconds, signal=outcome.signal or 0, **_sizes(outcome))

    def _finish_ping(self, request, started):
        vm, cid = request.vm, request.cid
        try:
            self._stores.spool.store_text(vm, cid, OUT, b"pong\n")
            # For the client to compare with its own.
            told = {"version": __version__, "time": f"{time.time():.3f}"}
            self._stores.spool.store_text(vm, cid, META, meta_of(request.key, cid, b"pong\n", b"", 0, "done", told))
        except SpoolError as err:
            return self._finish_without_run(vm, cid, str(err), "failed", request.key)
        return self._record(vm, cid, 0, "done", time.monotonic() - started, out=5, err=0)

    def _finish_left(self, vm, cid, reason, status):
        """Finish what does not run any more: by its result if that is all there, otherwise by why there is none."""
        fields = self._results.left(vm, cid)
        if fields:
            self._record(vm, cid, int(fields["exit"]), fields["status"], 0.0)
            return
        for part in (OUT, ERR, META):
            self._stores.spool.remove_part(vm, cid, part)
        self._finish_without_run(vm, cid, reason, status, self._results.key_of(vm, cid))

    def _finish_unstarted(self, vm, cid, reason, status, key):
        # Another caller may have started it meanwhile: then it is that one's.
        if not self._stores.ledger.start(vm, cid):
            raise Refused("replay", _NOT_WAITING)
        return self._finish_without_run(vm, cid, reason, status, key)

    def _finish_without_run(self, vm, cid, reason, status, key=None):
        """Keep a result that says why there is none, in place of whatever output there was."""
        err = reason_line(reason)
        key = key or self._results.key_or_none(vm)
        for part in (OUT, META):
            self._stores.spool.remove_part(vm, cid, part)
        try:
            self._stores.spool.store_text(vm, cid, ERR, err)
            self._stores.spool.store_text(vm, cid, META, meta_of(key, cid, b"", err, EXIT_FAILED, status))
        except SpoolError:
            # A full disk: without .meta the pull loop makes the same answer in memory when it delivers.
            self._stores.spool.remove_part(vm, cid, ERR)
        return self._record(vm, cid, EXIT_FAILED, status, 0.0)

    def _finish_cancelled(self, vm, cid, seconds, **sizes):
        with self._lock:
            self._cancelled_early.add((vm, cid))
        return self._record(vm, cid, EXIT_FAILED, "cancelled", seconds, **sizes)

    def _record(self, vm, cid, exit_code, status, seconds, **more):
        # First of all: an end that can't be recorded here stays open in the ledger, and the next start of the service closes it.
        self._stores.audit.write("ended", vm, cid, sync=True, exit=exit_code, status=status, seconds=round(seconds, 3), **more)
        self._stores.ledger.finish(vm, cid, exit_code, status)
        with contextlib.suppress(SpoolError):
            # It is recorded: what can't be removed now goes with its result.
            self._stores.spool.remove_inputs(vm, cid)
        with self._lock:
            self._answers.pop((vm, cid), None)
            given_up = (vm, cid) in self._cancelled_early
        if given_up:
            self._close_given_up(vm, cid, "delivered" if status == "cancelled" else "given-up")
        return {"exit": exit_code, "status": status, "seconds": round(seconds, 3)}

    def _close_given_up(self, vm, cid, what="given-up"):
        self._results.close_delivery(vm, cid, what)
        with self._lock:
            # Only now: if that failed, it is known what is left to do.
            self._cancelled_early.discard((vm, cid))


class _Running:
    """A command in the sandbox, whose it is, and why it was told to stop if it was."""

    def __init__(self, handle, key, uuid=""):
        self.handle = handle
        self.key = key
        self.uuid = uuid
        self.why_stopped = None

    def stop(self, why):
        self.why_stopped = self.why_stopped or why
        self.handle.cancel()


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
