# SPDX-License-Identifier: GPL-2.0-or-later
"""The pull loop of one VM: ask, verify, claim, hand over to the pool, deliver. One thread each; what a VM does
to its loop reaches no other VM.
"""

from __future__ import annotations

import functools
import os
import threading
import time

from .agentless import Agentless
from .dom0 import EXIT_FAILED, in_memory
from .errors import (
    AgentUnable,
    AuditError,
    FrameError,
    KeyringError,
    LedgerError,
    PullError,
    Refused,
    SessionBroken,
    SpoolError,
    TransportError,
)
from .frames import wait_readable
from .ids import check_cid
from .session import NoAgent, Session
from .tokens import TOKEN_MAX
from .validate import check_size

#: Wait before the next session: doubles from the first to the last, seconds. A VM that can't be reached (paused, just
#: shut down) is tried at a steadier pace than one that broke the protocol.
_RETRY_FIRST, _RETRY_UNREACHABLE, _RETRY_BROKEN = 1.0, 15.0, 60.0
#: A session that lasted this long was a good one: the wait starts anew, seconds.
_GOOD_SESSION = 60.0
#: What a VM may have done for nothing (refusals, cancels, empty answers): so many at once, then so many a second.
_IDLE_BURST, _IDLE_RATE = 60.0, 5.0
#: How often the key in a VM is looked at, and how soon again after a token that did not fit, seconds.
_KEY_LOOK_EVERY, _KEY_LOOK_MIN = 60.0, 5.0


class Puller:
    """Serves one VM until told to stop, or until the VM is gone.

    Args:
        hub: what the loops share: ``dom0`` (Dom0), ``pool`` (FairPool), ``verify`` (callable of vm, cid, command, token, which
            gives a dict with ``verified``, ``code`` and ``reason``), ``emit`` (callable of vm, cid, what, data), ``log`` (callable of str).
        vm: str, a checked name.
    """

    def __init__(self, hub, vm):
        self.vm = vm
        self._hub = hub
        self._base = self._own = None
        self._key_looked = self._key_doubted = float("-inf")
        self._session = None
        self._outbox = {}
        self._outbox_lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._retry = _RETRY_FIRST
        self._allowance = _Allowance()
        #: Set once nothing more may be taken in; results are still delivered.
        self.stopping = threading.Event()
        #: Set once the session may end.
        self.ending = threading.Event()
        #: Set while the VM is in the list of running VMs.
        self.running = threading.Event()
        self.running.set()
        self.state = "connecting"

    @property
    def _config(self):
        """The settings that hold for this VM; the service may have got others meanwhile."""
        base = self._hub.dom0.config
        if base is not self._base:
            self._base, self._own = base, base.for_vm(self.vm)
        return self._own

    def run(self):
        """Serve, one session after the other. Ends when told to, or when the VM doesn't run any more."""
        while not self.ending.is_set():
            started = time.monotonic()
            broken = self._try_session()
            if self.ending.is_set() or not self.running.is_set():
                break
            if time.monotonic() - started > _GOOD_SESSION:
                self._retry = _RETRY_FIRST
            self.state = "waiting"
            self._pause(self._retry)
            # Never 0 a second time: what made it so must not be a loop without a pause.
            self._retry = min(max(self._retry * 2, _RETRY_FIRST), _RETRY_BROKEN if broken else _RETRY_UNREACHABLE)
        self.state = "ended"

    def run_once(self, execute_all):
        """Serve what lies in the queue now, wait for its results, deliver them.

        Args:
            execute_all: callable without arguments that returns when nothing runs any more.

        Raises:
            PullError: the VM can't be reached or broke the protocol.
        """
        try:
            self._open()
            self._turn(0)
            execute_all()
            self._deliver()
            self._session.bye()
        finally:
            self._close()

    def finished(self, cid, lost=None):
        """Note that a result waits; called from the pool's threads.

        Args:
            cid: str.
            lost: str, why there is no result although the command was taken; None when there is one.
        """
        with self._outbox_lock:
            self._outbox[cid] = lost
        self.wake()

    def wake(self):
        """Make the loop look at its flags and its outbox now."""
        try:
            os.write(self._wake_write, b"!")
        except (BlockingIOError, OSError):
            # Full: it is awake. Closed: it has ended.
            return

    def abort(self):
        """End the session from another thread."""
        session = self._session
        if session is not None:
            session.abort()

    def release(self):
        """Close what is still open; the loop must have ended."""
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _try_session(self):
        """One session, from its opening to its end.

        Returns:
            bool, whether the VM broke the protocol.
        """
        try:
            self._open()
            self.state = self._session.kind
            self._hub.emit(self.vm, "-", "connected", {"kind": self._session.kind})
            self._serve()
        except FrameError as err:
            self._hub.log(f"{self.vm}: {err}")
            self._hub.emit(self.vm, "-", "broken", {"reason": str(err)})
            return True
        except (SessionBroken, TransportError):
            # The everyday end: the VM was shut down, paused, killed.
            return False
        except (LedgerError, SpoolError, AuditError) as err:
            self._hub.log(f"{self.vm}: not served: {err}")
            return True
        finally:
            self._close()
        return False

    def _open(self):
        config = self._config
        self._session = Agentless(config, self.vm) if config.accept_v1 else Session(config, self.vm)
        try:
            self._session.hello()
        except NoAgent:
            self._session = Agentless(config, self.vm)
            self._session.hello()
        self._look_at_key()
        with self._outbox_lock:
            lost = {cid: reason for cid, reason in self._outbox.items() if reason}
            self._outbox = {**dict.fromkeys(self._hub.dom0.expire(self.vm)), **lost}

    def _close(self):
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _serve(self):
        config = self._config
        while not self.ending.is_set():
            if self._deliver():
                continue
            if self._config != config:
                # The VM was told the old limits. What runs goes on, and is delivered in the next session.
                self._retry = 0.0
                break
            if self.stopping.is_set():
                self._pause(1.0)
                continue
            self._turn(self._config.poll_wait)
            wait = _KEY_LOOK_MIN if self._key_doubted > self._key_looked else _KEY_LOOK_EVERY
            if time.monotonic() > self._key_looked + wait:
                self._look_at_key()
        self._deliver()
        self._session.bye()

    def _look_at_key(self):
        """See whether the VM has its key; hand it over if it hasn't and should."""
        self._key_looked = time.monotonic()
        try:
            self._hub.dom0.drop_old_key(self.vm)
            news = self._hub.dom0.handover.look(self._session, self.vm, self._config.key)
        except AgentUnable as err:
            news = "key-not-handed"
            self._hub.log(f"{self.vm}: its key could not be handed over: {err}")
        except KeyringError as err:
            # It is refused all the same, and told why, when it asks for something.
            self._hub.log(f"{self.vm}: {err}")
            return
        if news:
            self._hub.emit(self.vm, "-", news, {})

    def _turn(self, wait):
        room = self._config.vm_queue - self._hub.pool.waiting(self.vm)
        asked = time.monotonic()
        items, cancels = self._session.poll(wait, max(0, room), self._wake_read)
        woken = self._drain_wakes()
        if wait and not items and not cancels and not woken and time.monotonic() - asked < min(1, wait / 2):
            self._spend()
        for untrusted_cid in cancels:
            self._cancel(_claimed_cid(untrusted_cid))
        for item in items:
            self._take_in(item)

    def _take_in(self, item):
        cid = _claimed_cid(item.untrusted_cid)
        try:
            is_new = self._accept(cid, item)
        except Refused as refused:
            self._refuse(cid, refused)
            return
        # A VM that has dom0 start a session again and again, to break it, waits longer each time; one that asks for something does not.
        self._retry = _RETRY_FIRST
        if not is_new:
            self._spend()
        elif self._hub.pool.submit(self.vm, cid):
            self._hub.emit(self.vm, cid, "accepted", {})
        else:
            self._hub.dom0.interrupt_queued(self.vm, cid)
            self.finished(cid)
        self._session.take(cid)

    def _accept(self, cid, item):
        check_size(item.command_size, self._config.command_max, "command")
        if item.token_size < 0:
            raise Refused("token", "the request came without a token; is this qube's key set up? (qvm-remote key gen)")
        check_size(item.token_size, TOKEN_MAX, "token")
        untrusted_command, untrusted_token = item.command, item.token
        if untrusted_command is None:
            untrusted_command = b"".join(self._fetch(cid, "command", item.command_size))
            untrusted_token = b"".join(self._fetch(cid, "auth", item.token_size))
        verdict = self._hub.verify(self.vm, cid, untrusted_command, untrusted_token)
        if verdict.get("verified") is not True:
            raise Refused(str(verdict.get("code", "doubt")), str(verdict.get("reason", "dom0 could not verify the request")))
        stdin = functools.partial(self._fetch, cid, "in", item.stdin_size)
        return self._hub.dom0.accept(self.vm, cid, untrusted_command, untrusted_token, item.stdin_size, stdin)[1]

    def _fetch(self, cid, part, size):
        """Fetch a part of a request piece by piece. A piece that is shorter than asked for ends it: the VM's file changed."""
        offset = 0
        while offset < size:
            piece = self._session.fetch(cid, part, offset, size - offset)
            if not piece:
                return
            yield piece
            offset += len(piece)
            if offset < size and len(piece) < self._session.fetch_max:
                return

    def _refuse(self, cid, refused):
        self._spend()
        if refused.code == "token":
            self._key_doubted = time.monotonic()
        try:
            shown = self._hub.dom0.audit.refusal(self.vm, cid, refused.code)
        except AuditError as err:
            # Whoever asked hears of the refusal all the same: a full disk must not look like a hanging dom0.
            self._hub.log(str(err))
            shown = True
        if shown:
            # Whoever reacts to events is bothered no more often than the log is.
            self._hub.emit(self.vm, cid, "refused", {"code": refused.code})
        parts = in_memory(*self._hub.dom0.refusal(self.vm, cid, str(refused)))
        for _ in self._session.deliver([(cid, EXIT_FAILED, parts)]):
            continue

    def _cancel(self, cid):
        self._spend()
        if self._hub.pool.withdraw(self.vm, cid):
            self._hub.dom0.drop_queued(self.vm, cid)
        else:
            self._hub.dom0.cancel(self.vm, cid)
        self._hub.emit(self.vm, cid, "cancelled", {})
        self._session.drop(cid)

    def _deliver(self):
        """Deliver what waits.

        Returns:
            bool, whether there was anything.
        """
        with self._outbox_lock:
            waiting = dict(self._outbox)
        for cid in self._session.deliver(self._results(waiting)):
            if not waiting[cid]:
                self._hub.dom0.close_delivery(self.vm, cid)
            self._hub.emit(self.vm, cid, "delivered", {})
        with self._outbox_lock:
            for cid in waiting:
                self._outbox.pop(cid, None)
        return bool(waiting)

    def _results(self, waiting):
        for cid, lost in waiting.items():
            if lost:
                yield cid, EXIT_FAILED, in_memory(*self._hub.dom0.refusal(self.vm, cid, lost))
                continue
            result = self._hub.dom0.result(self.vm, cid)
            if result is not None:
                yield (cid, *result)

    def _spend(self):
        wait = self._allowance.spend()
        if wait:
            self.ending.wait(wait)

    def _pause(self, seconds):
        wait_readable([self._wake_read], time.monotonic() + seconds)
        self._drain_wakes()

    def _drain_wakes(self):
        try:
            return bool(os.read(self._wake_read, 4096))
        except BlockingIOError:
            return False


class _Allowance:
    """A token bucket: what a VM may have done for nothing before its loop is slowed down."""

    def __init__(self):
        self._left = _IDLE_BURST
        self._at = time.monotonic()

    def spend(self):
        """Take one.

        Returns:
            float, seconds to wait first; 0 while there is some left.
        """
        now = time.monotonic()
        self._left = min(_IDLE_BURST, self._left + (now - self._at) * _IDLE_RATE) - 1
        self._at = now
        return max(0.0, -self._left / _IDLE_RATE)


def _claimed_cid(untrusted_cid):
    try:
        return check_cid(untrusted_cid)
    except PullError:
        # Our agent answers such names itself, in the VM; one that sends them on is not ours.
        raise FrameError("the qube listed a name that is no command id") from None
