# SPDX-License-Identifier: GPL-2.0-or-later
"""The pull loop of one VM: ask, verify, claim, hand over to the pool, deliver. A task of the one event loop; it waits for
its VM without holding anything up, and whatever touches dom0's disk is done in threads that all VMs share.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time

from .agentless import Agentless
from .aio import Bell
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
    ThreadError,
    TransportError,
)
from .ids import check_cid
from .outflow import Outflow
from .results import EXIT_FAILED, INTERRUPTED, in_memory, is_of
from .session import Chunk, Delivery, NoAgent, Session
from .tokens import TOKEN_MAX
from .validate import check_size

#: Wait before the next session: doubles from the first to the last, seconds. A VM that can't be reached (paused, just
#: shut down) is tried at a steadier pace than one that broke the protocol.
_RETRY_FIRST, _RETRY_UNREACHABLE, _RETRY_BROKEN = 1.0, 15.0, 60.0
#: A session that lasted this long was a good one: the wait starts anew, seconds.
_GOOD_SESSION = 60.0
#: What a VM may have done for nothing (refusals, cancels, empty answers): so many at once, then so many a second.
_IDLE_BURST, _IDLE_RATE = 60.0, 5.0
#: How many sessions may begin soon after one in which it asked for something, at once, then so many a second: each starts programs in dom0.
_SOON_BURST, _SOON_RATE = 100.0, 0.1
#: How often the key in a VM is looked at, and how soon again after a token that did not fit, or where it could not be handed over, seconds;
#: where many VMs are served no more often than one of them each so many seconds.
_KEY_LOOK_EVERY, _KEY_LOOK_MIN, _KEY_LOOK_EACH = 60.0, 5.0, 3.0
#: How long the results of commands just taken in are waited for before the VM is told that dom0 has them, seconds: most
#: are there by then, which spares a request for each.
_LINGER = 0.015
#: Most of a VM's results that are at hand, in all, bytes.
_AT_HAND_MAX = 1 << 20
#: A VM that could not take a result is offered it again after this long, seconds.
_DELIVER_AGAIN = 5.0
#: How much :meth:`Puller.run_once` takes from one queue, requests.
_ONCE_MAX = 1000
#: How often it is looked in a session for results that wait for too long, seconds: a session may last for weeks.
_EXPIRE_EVERY = 3600.0
#: Codes of what is refused before its token is known to fit; what may be refused later has others. dom0 signs nothing for whoever may not
#: have the key: it would be taken for the answer to another request under the same id.
_BEFORE_THE_TOKEN = ("id", "size", "empty", "bytes", "key", "token", "doubt", "identity", "gone")
#: How such a VM shows up in the status.
_STRANGER = "stranger"
#: Ends of a command that leave its output as it was while it ran, or longer.
_KEEPS_OUTPUT = ("done", "timeout", "interrupted")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A command's end, as the pool tells it.

    Attributes:
        status: str, see :meth:`pullrpc.execution.Execution.execute`.
        result: pullrpc.results.Result, when it is small enough to be at hand; else None.
        lost: str, why there is no result although the command was taken; None when there is one.
        uuid: str, the qube that ``lost`` is for; empty when that is not known, None when the ledger could not tell.
    """

    status: str = ""
    result: tuple | None = None
    lost: str | None = None
    uuid: str | None = ""


class Puller:
    """Serves one VM until told to stop, or until the VM is gone.

    Args:
        hub: what the loops share: ``dom0`` (Dom0), ``lines`` (Lines), ``verify`` (callable of vm, cid, command, token, which
            gives a dict with ``verified``, ``code`` and ``reason``), ``call`` (runs a function in a thread and gives an awaitable),
            ``served`` (callable that gives how many VMs are), ``uuid_of`` (coroutine function of a VM's name: which qube has it now),
            ``close_deliveries`` (has results recorded as delivered, soon), ``lose`` (callable of vm, cid and reason: has an end recorded that
            could not be now), ``lost_of`` (callable of vm: a dict of cid to reason, those that are not recorded yet and of which it was not
            told), ``spawn`` (runs a coroutine beside the loops), ``emit`` (callable of vm, cid, what, data), ``log`` (callable of str).
        vm: str, a checked name.
    """

    def __init__(self, hub, vm):
        self.vm = vm
        self._hub = hub
        self._base = self._own = None
        self._key_looked = self._key_doubted = float("-inf")
        #: Whether the VM could not take its key, and whether it could not do what ended a session; each is told once.
        self._key_kept_back = self._unable = False
        #: Whether the last refusal could not be written to the audit log.
        self._log_failed = False
        #: Why nothing is taken from this VM and nothing given to it: it is not the one that has access under its name.
        self._stranger = None
        self._uuid = ""
        self._session = None
        self._polling = None
        self._poll_began = 0.0
        #: Whether dom0 asked for something else since the poll that is on its way.
        self._asked = False
        self._outbox = {}
        #: What the VM could not take, and when it is offered that again, by the monotonic clock.
        self._not_before = {}
        #: When the ledger is asked again what waits, by the monotonic clock; 0 while that is known.
        self._find_after = 0.0
        #: When it is looked again for what waits for too long, by the monotonic clock.
        self._expire_after = 0.0
        #: Accepted, not delivered yet, and the VM was not told that dom0 has it.
        self._untold = set()
        self._outflows = {}
        #: Cancelled, and not heard of since.
        self._given_up = set()
        self._bell = Bell()
        self._retry = _RETRY_FIRST
        self._allowance = _Allowance(_IDLE_BURST, _IDLE_RATE)
        self._soon = _Allowance(_SOON_BURST, _SOON_RATE)
        #: Whether it asked for something new in this session.
        self._asked_for = False
        #: Set once nothing more may be taken in; results are still delivered.
        self.stopping = False
        #: Set once the session may end.
        self.ending = False
        #: Cleared when the VM is no more in the list of running VMs.
        self.running = True
        self.state = "connecting"

    @property
    def state(self):
        """How the VM is served: ``connecting``, ``agent``, ``agentless``, ``waiting`` or ``ended``; since :attr:`since`, by the clock."""
        return self._state

    @state.setter
    def state(self, state):
        self._state, self.since = state, time.time()

    @property
    def _config(self):
        """The settings that hold for this VM; the service may have got others meanwhile."""
        base = self._hub.dom0.config
        if base is not self._base:
            self._base, self._own = base, base.for_vm(self.vm)
        return self._own

    async def run(self):
        """Serve, one session after the other. Ends when told to, or when the VM doesn't run any more."""
        while not self.ending:
            started = time.monotonic()
            broken = await self._try_session()
            if self.ending or not self.running:
                break
            is_good = time.monotonic() - started > _GOOD_SESSION
            if is_good:
                self._unable = False
            # A VM that has dom0 start a session again and again, to break it, waits longer each time; one that asks for something does not,
            # unless it goes on like that.
            if is_good or (self._asked_for and not self._soon.spend()):
                self._retry = min(self._retry, _RETRY_FIRST)
            self._asked_for = False
            self.state = "waiting"
            await self._bell.wait(self._retry)
            # Never 0 a second time: what made it so must not be a loop without a pause.
            self._retry = min(max(self._retry * 2, _RETRY_FIRST), _RETRY_BROKEN if broken else _RETRY_UNREACHABLE)
        self.state = "ended"

    async def run_once(self, wait):
        """Serve what lies in the queue, wait for its results, deliver them.

        Args:
            wait: coroutine function without arguments that returns when nothing of this VM runs any more.

        Returns:
            bool, whether nothing lies there any more; a VM that goes on and on asking is left some time.

        Raises:
            PullError: the VM can't be reached or broke the protocol.
        """
        try:
            await self._open()
            await self._deliver()
            count = 0
            items, cancels = await self._session.poll(0, self._room())
            while (items or cancels) and count < _ONCE_MAX:
                count += len(items) + len(cancels)
                await self._take_in(items, cancels)
                await self._tell_taken()
                await wait()
                await self._deliver()
                items, cancels = await self._session.poll(0, self._room())
            await self._session.bye()
            return not items and not cancels
        finally:
            await self._close()

    def finished(self, cid, end):
        """Note that a command has ended.

        Args:
            cid: str.
            end: Finished.
        """
        if cid in self._given_up:
            # Its end was on its way when it was cancelled: the ledger tells whether there is still something to deliver.
            self._given_up.discard(cid)
            end = dataclasses.replace(end, result=None)
        if end.result and _weight(end) + sum(map(_weight, self._outbox.values())) > _AT_HAND_MAX:
            # A VM that does not take its results does not fill dom0's memory with them: it is read again.
            end = dataclasses.replace(end, result=None)
        self._outbox[cid] = end
        self.wake()

    def wrote(self, cid, out, err):
        """Note what a command that runs has written so far.

        Args:
            cid: str.
            out, err: int, bytes of stdout and of stderr.
        """
        if self._session is not None and self._session.streams and cid not in self._outbox:
            self._outflows.setdefault(cid, Outflow()).wrote(out, err)
            self.wake()

    def wake(self):
        """Make the loop look at its flags and its outbox now."""
        self._bell.ring()

    async def _try_session(self):
        """One session, from its opening to its end.

        Returns:
            bool, whether the VM broke the protocol.
        """
        try:
            await self._open()
            self.state = _STRANGER if self._stranger else self._session.kind
            self._hub.emit(self.vm, "-", "connected", {"kind": self._session.kind})
            await self._serve()
        except FrameError as err:
            self._hub.log(f"{self.vm}: {err}")
            self._hub.emit(self.vm, "-", "broken", {"reason": str(err)})
            return True
        except AgentUnable as err:
            # Its disk may be full, or read-only. Once, and not in each session: one that stays so must not fill dom0's log.
            if not self._unable:
                self._unable = True
                self._hub.log(f"{self.vm}: not served: {err}")
                self._hub.emit(self.vm, "-", "unable", {"reason": str(err)})
            return False
        except (SessionBroken, TransportError):
            # The everyday end: the VM was shut down, paused, killed.
            return False
        except (LedgerError, SpoolError, AuditError, ThreadError) as err:
            self._hub.log(f"{self.vm}: not served: {err}")
            return True
        finally:
            await self._close()
        return False

    async def _open(self):
        config = self._config
        self._session = Agentless(config, self.vm) if config.accept_v1 else await Session.open(config, self.vm)
        try:
            await self._session.hello()
        except NoAgent:
            self._session = Agentless(config, self.vm)
            await self._session.hello()
        # Looked up once the session is open: as long as that lasts it is the same VM.
        uuid = await self._hub.uuid_of(self.vm)
        if self._uuid not in ("", uuid):
            # What is at hand is another qube's, which had this name before; what is this one's is found in the ledger.
            for at_hand in (self._outbox, self._outflows, self._untold, self._not_before):
                at_hand.clear()
        self._uuid = uuid
        await self._look_who_it_is()
        await self._look_at_key()
        await self._find_results()
        for outflow in self._outflows.values():
            outflow.rewind()

    async def _find_results(self):
        """Have in the outbox whatever waits for this VM. A ledger that can't tell now is asked again; what is asked for meanwhile is
        refused, with the reason.
        """
        self._expire_after = time.monotonic() + _EXPIRE_EVERY
        try:
            waiting, expired = await self._hub.call(self._hub.dom0.results.expire, self.vm, self._uuid)
        except (LedgerError, AuditError) as err:
            if not self._find_after:
                self._hub.log(f"{self.vm}: the results that wait for it can't be told: {err}")
            self._find_after = time.monotonic() + _DELIVER_AGAIN
            return
        self._find_after = 0.0
        # What ended in this moment is in the outbox already, and may be in no list.
        lost = {cid: Finished(lost=reason, uuid=None) for cid, reason in self._hub.lost_of(self.vm).items()}
        self._outbox = {**{cid: Finished() for cid in waiting}, **lost, **self._outbox, **dict.fromkeys(expired, Finished())}

    async def _expire(self):
        """Give up what this VM did not take for too long."""
        self._expire_after = time.monotonic() + _EXPIRE_EVERY
        try:
            _, expired = await self._hub.call(self._hub.dom0.results.expire, self.vm, self._uuid)
        except (LedgerError, AuditError) as err:
            self._hub.log(f"{self.vm}: results that wait for it can't be given up: {err}")
            return
        # What is not there was delivered, which is not recorded yet.
        self._outbox.update({cid: Finished() for cid in expired if cid in self._outbox})

    async def _close(self):
        session, self._session = self._session, None
        polling, self._polling = self._polling, None
        if polling is not None:
            polling.cancel()
            await asyncio.wait((polling,))
            # Looked at, so that nobody reports it as forgotten; why the session ends is known already.
            polling.cancelled() or polling.exception()
        if session is not None:
            await session.close()

    async def _serve(self):
        config = self._config
        while not self.ending:
            if self._find_after and time.monotonic() >= self._find_after:
                await self._find_results()
            if time.monotonic() >= self._expire_after:
                await self._expire()
            await self._deliver()
            self._stream()
            if self._config != config:
                # The VM was told the old limits. What runs goes on, and is delivered in the next session.
                self._retry = 0.0
                break
            await self._tell_taken()
            if self.stopping:
                await self._bell.wait()
            else:
                await self._attend()
        await self._deliver()
        await self._session.bye()

    async def _attend(self):
        """Have a poll on its way; wait until it is answered, or until something else is to be done."""
        if self._polling is None:
            self._asked = False
            self._polling = asyncio.ensure_future(self._session.poll(self._config.poll_wait, self._room()))
            self._polling.add_done_callback(lambda _: self.wake())
            self._poll_began = time.monotonic()
        wait = self._until_key_look()
        due = [self._expire_after]
        if self._outbox and not self._stranger:
            due.append(min(self._not_before.get(cid, 0.0) for cid in self._outbox))
        if self._find_after:
            due.append(self._find_after)
        await self._bell.wait(min(wait, max(0.0, min(due) - time.monotonic())))
        if not self._polling.done():
            if self._until_key_look() <= 0:
                await self._look_at_key()
            return
        polling, self._polling = self._polling, None
        items, cancels = polling.result()
        took = time.monotonic() - self._poll_began
        if not items and not cancels and not self._asked and took < min(1, self._config.poll_wait / 2):
            await self._spend()
        await self._take_in(items, cancels)
        await self._linger()

    def _room(self):
        return max(0, self._config.vm_queue - self._hub.lines.waiting(self.vm))

    async def _linger(self):
        deadline = time.monotonic() + _LINGER
        while self._untold and time.monotonic() < deadline and not self.ending:
            await self._bell.wait(deadline - time.monotonic())
            await self._deliver()

    async def _tell_taken(self):
        if self._untold:
            cids, self._untold = sorted(self._untold), set()
            self._asked = True
            await self._session.take(cids)

    def _until_key_look(self):
        every = max(_KEY_LOOK_EVERY, self._hub.served() * _KEY_LOOK_EACH)
        wait = _KEY_LOOK_MIN if self._key_doubted > self._key_looked or self._key_kept_back else every
        return max(0.0, self._key_looked + wait - time.monotonic())

    async def _look_who_it_is(self):
        """See whether the VM in this session is the one that has access under its name."""
        self._stranger = await self._hub.call(self._hub.dom0.access.stranger, self.vm, self._uuid)
        if self.state in (_STRANGER, self._session.kind):
            self.state = _STRANGER if self._stranger else self._session.kind

    async def _look_at_key(self):
        """See whether the VM has its key; hand it over if it hasn't and should."""
        if self._stranger:
            await self._look_who_it_is()
        self._key_looked = time.monotonic()
        if self._stranger:
            return
        self._asked = True
        dom0 = self._hub.dom0
        try:
            await self._hub.call(dom0.access.drop_old_key, self.vm)
            key = await self._hub.call(dom0.handover.wanted, self.vm)
            if key is None:
                return
            found = await self._session.inspect()
            is_due, news = await self._hub.call(dom0.handover.look, self.vm, found, key, self._config.key)
            if is_due:
                await self._session.set_key(key)
                await self._hub.call(dom0.handover.handed, self.vm, key)
            self._key_kept_back = False
        except AgentUnable as err:
            # Tried again soon, and told the first time.
            if self._key_kept_back:
                return
            self._key_kept_back, news = True, "key-not-handed"
            self._hub.log(f"{self.vm}: its key could not be handed over: {err}")
        except KeyringError as err:
            # It is refused all the same, and told why, when it asks for something.
            self._hub.log(f"{self.vm}: {err}")
            return
        if news:
            self._hub.emit(self.vm, "-", news, {})

    async def _take_in(self, items, cancels):
        if self._stranger:
            # Perhaps somebody has said meanwhile that it is the right one.
            await self._look_who_it_is()
        for untrusted_cid in cancels:
            await self._cancel(_claimed_cid(untrusted_cid))
        listed = {_claimed_cid(item.untrusted_cid): item for item in items}
        if len(listed) != len(items):
            raise FrameError("the qube listed a command twice")
        for untrusted_cid in cancels:
            # Its client gave it up before dom0 saw it.
            listed.pop(untrusted_cid, None)
        whole = {cid: item for cid, item in listed.items() if item.command is not None and item.stdin_size < 0}
        if whole:
            ends = await self._hub.call(self._accept_all, whole)
            for cid, end in ends.items():
                if not isinstance(end, Refused):
                    await self._took(cid, end)
            # Last: what was claimed is seen to also where the session breaks over one of these.
            await self._refuse([(cid, end, listed[cid]) for cid, end in ends.items() if isinstance(end, Refused)])
        for cid, item in listed.items():
            if cid not in whole:
                end, item = await self._accept_in_parts(cid, item)
                await (self._refuse([(cid, end, item)]) if isinstance(end, Refused) else self._took(cid, end))

    async def _took(self, cid, end):
        """Go on with a command: ``end`` is None once it is on its way, a word, or why it was claimed and can't be started."""
        # What is shown again asks for nothing.
        self._asked_for = self._asked_for or end is None
        self._untold.add(cid)
        if end == "known":
            await self._spend()
        elif end == "late":
            await self._end_unstarted(cid, INTERRUPTED, self._hub.dom0.execution.interrupt_queued)
        elif end is not None:
            self._hub.log(f"{self.vm}: {cid}: {end}")
            await self._end_unstarted(cid, str(end), self._hub.dom0.execution.finish_lost, str(end))

    async def _end_unstarted(self, cid, reason, finish, *args):
        """Finish a command that was claimed and can't be started. Its VM hears of it, whether or not that can be recorded now."""
        try:
            await self._hub.call(finish, self.vm, cid, *args)
        except PullError as err:
            self._hub.log(f"{self.vm}: {cid}: {err}")
            self._hub.lose(self.vm, cid, reason)
            self.finished(cid, Finished(lost=reason, uuid=self._uuid))
            return
        self.finished(cid, Finished())

    def _accept_all(self, listed):
        """Verify, keep, claim and queue commands that came whole; in a thread.

        Returns:
            dict of id to what :meth:`_took` takes.
        """
        ends, admitted = {}, []
        for cid, item in listed.items():
            try:
                request = self._admit(cid, item, item.command, item.token)
            except Refused as refused:
                ends[cid] = refused
                continue
            if request is None:
                ends[cid] = "known"
            else:
                admitted.append((request, 0))
        return {**ends, **self._claim(admitted)}

    def _claim(self, admitted):
        ends = dict(self._hub.dom0.intake.claim(admitted))
        for request, _ in admitted:
            if request.cid in ends:
                continue
            # Told before it can run: whoever listens hears of it in this order.
            self._hub.emit(self.vm, request.cid, "accepted", {})
            try:
                ends[request.cid] = None if self._hub.lines.submit(request) else "late"
            except ThreadError as err:
                # It is claimed: its end is to be recorded, and told, and the others go on.
                ends[request.cid] = err
        return ends

    def _admit(self, cid, item, untrusted_command, untrusted_token):
        if self._stranger:
            raise Refused("identity", self._stranger)
        self._check_sizes(item)
        verdict = self._hub.verify(self.vm, cid, untrusted_command, untrusted_token)
        if verdict.get("verified") is not True:
            raise Refused(str(verdict.get("code", "doubt")), str(verdict.get("reason", "dom0 could not verify the request")))
        request = self._hub.dom0.intake.admit(self.vm, cid, untrusted_command, untrusted_token, item.stdin_size, self._uuid)
        if request is not None and request.asks:
            try:
                self._hub.lines.check_question(request)
            except Refused:
                self._hub.dom0.intake.dismiss(request)
                raise
        return request

    def _check_sizes(self, item):
        check_size(item.command_size, self._config.command_max, "command")
        if item.token_size < 0:
            raise Refused("token", "the request came without a token; is this qube's key set up? (qvm-remote key gen)")
        check_size(item.token_size, TOKEN_MAX, "token")

    async def _accept_in_parts(self, cid, item):
        """The same for a command that is large, or has stdin: nothing of that is fetched before the token was checked.

        Returns:
            (what :meth:`_took` takes, Item with what was fetched)
        """
        call = self._hub.call
        try:
            self._check_sizes(item)
            if item.command is None:
                command = b"".join([piece async for piece in self._fetch(cid, "command", item.command_size)])
                token = b"".join([piece async for piece in self._fetch(cid, "auth", item.token_size)])
                item = dataclasses.replace(item, command=command, token=token)
            request = await call(self._admit, cid, item, item.command, item.token)
            if request is None:
                return "known", item
            if request.stdin_digest:
                await self._fetch_stdin(request, item.stdin_size)
            return (await call(self._claim, [(request, max(0, item.stdin_size))]))[cid], item
        except Refused as refused:
            return refused, item
        except SpoolError as err:
            return Refused("storage", str(err)), item
        except AgentUnable:
            # No matter of the session: its client has taken it back, or put something else there.
            return Refused("gone", "the qube listed a request that it can't give: it was taken back, or can't be read there"), item

    async def _fetch_stdin(self, request, size):
        call, dom0 = self._hub.call, self._hub.dom0
        writer = await call(dom0.intake.stdin_writer, request)
        try:
            async for piece in self._fetch(request.cid, "in", size):
                await call(writer.write, piece)
        except BaseException:
            # The session broke, or the disk is full: the request was never claimed.
            with contextlib.suppress(SpoolError):
                writer.close()
            dom0.intake.dismiss(request)
            raise
        await call(dom0.intake.end_stdin, request, writer)

    async def _fetch(self, cid, part, size):
        """Fetch a part of a request piece by piece. A piece that is shorter than asked for ends it: the VM's file changed."""
        offset = 0
        while offset < size:
            piece = await self._session.fetch(cid, part, offset, size - offset)
            if not piece:
                return
            yield piece
            offset += len(piece)
            if offset < size and len(piece) < self._session.fetch_max:
                return

    async def _refuse(self, refusals):
        """Answer what was refused. All at once: without the agent each delivery starts programs in dom0."""
        if not refusals:
            return
        answers = [await self._refusal(*one) for one in refusals]
        self._asked = True
        async for _ in self._session.deliver(answers):
            continue
        for _ in refusals:
            await self._spend()

    async def _refusal(self, cid, refused, item):
        """Record a refusal; make its answer."""
        if refused.code in ("token", "identity"):
            self._key_doubted = time.monotonic()
        is_proven = refused.code not in _BEFORE_THE_TOKEN
        if is_proven and item.command is not None:
            # What an authorized qube tried is to be found in the log; its bytes were checked before its token was.
            refused.command = item.command.decode("utf-8")
        try:
            shown = await self._hub.call(self._hub.dom0.audit.refusal, self.vm, cid, refused)
            # One that is only counted says nothing of the disk.
            self._log_failed = self._log_failed and not shown
        except AuditError as err:
            # Whoever asked hears of the refusal all the same: a full disk must not look like a hanging dom0.
            if not self._log_failed:
                # Once: whoever asks again and again must not fill the other log with it.
                self._hub.log(str(err))
            shown = not self._log_failed
            self._log_failed = True
        if shown:
            # Whoever reacts to events is bothered no more often than the log is.
            self._hub.emit(self.vm, cid, "refused", {"code": refused.code})
        request = (item.command, item.token) if item.command is not None else None
        refusal = await self._hub.call(self._hub.dom0.results.refusal, self.vm, cid, str(refused), is_proven, request)
        return Delivery(cid, EXIT_FAILED, in_memory(*refusal))

    async def _cancel(self, cid):
        await self._spend()
        if not self._stranger:
            # Another qube of this name may have the disk of the one before, and with it its ids: what that one had run is none of it.
            await self._cancel_in_dom0(cid)
        self._asked = True
        await self._session.drop([cid])

    async def _abandon(self, cid):
        """Have done with a command whose client is gone without a word."""
        await self._cancel_in_dom0(cid)
        if self._session is not None:
            self._asked = True
            await self._session.drop([cid])

    async def _cancel_in_dom0(self, cid):
        if not await self._hub.call(self._hub.dom0.execution.is_of, self.vm, cid, self._uuid):
            return
        if self._hub.lines.withdraw(self.vm, cid):
            await self._drop_queued(cid)
        elif await self._hub.call(self._hub.dom0.execution.cancel, self.vm, cid):
            self._given_up |= set() if cid in self._outbox else {cid}
        else:
            # No event for whatever name the VM makes up.
            return
        self._untold.discard(cid)
        if cid in self._outbox:
            # It has ended already: the ledger tells whether there is still something to deliver.
            self._outbox[cid] = Finished()
        if cid in self._outflows:
            # What the VM has of it goes; a result that comes all the same is delivered from its beginning.
            self._outflows[cid].stopped = True
        self._hub.emit(self.vm, cid, "cancelled", {})

    async def _drop_queued(self, cid):
        try:
            await self._hub.call(self._hub.dom0.execution.drop_queued, self.vm, cid)
        except PullError as err:
            # It stands in no line any more: nobody else would finish it.
            self._hub.log(f"{self.vm}: {cid}: {err}")
            self._hub.lose(self.vm, cid, "its client gave it up before it began")

    async def _deliver(self):
        """Deliver what waits, but for what the VM could not take a moment ago."""
        now = time.monotonic()
        waiting = {} if self._stranger else {cid: end for cid, end in self._outbox.items() if self._not_before.get(cid, 0.0) <= now}
        if not waiting:
            return
        if all(end.result for end in waiting.values()):
            results, kept = self._results(waiting)
        else:
            results, kept = await self._hub.call(self._results, waiting)
        self._asked = True
        reached = []
        try:
            async for cid in self._session.deliver(results):
                reached.append(cid)
        except AgentUnable as err:
            # Where it does not say which, all that have not arrived are kept.
            kept = {**kept, **(err.failed or dict.fromkeys(waiting.keys() - set(reached), str(err)))}
        finally:
            self._hub.close_deliveries([(self.vm, cid) for cid in reached])
            for cid in reached:
                self._done_with(cid)
                self._hub.emit(self.vm, cid, "delivered", {})
        self._keep_back(kept)
        for cid in waiting:
            if cid not in kept:
                # Without a result there was nothing (any more) to deliver.
                self._done_with(cid)

    def _keep_back(self, kept):
        """Have results wait that the VM could not take, its disk may be full, that dom0 can't read, or of which it can't be told whose they
        are; ``kept`` says why. Whatever else it asks for is heard.
        """
        if kept and not self._not_before:
            # Once, and not at each attempt: a VM that never takes them must not fill dom0's log.
            self._hub.log(f"{self.vm}: its results wait: {next(iter(kept.values()))}")
        for cid in kept:
            self._not_before[cid] = time.monotonic() + _DELIVER_AGAIN
            if cid in self._outflows:
                # What the VM has of it is no beginning to go on from.
                self._outflows[cid].stopped = True

    def _done_with(self, cid):
        self._untold.discard(cid)
        for at_hand in (self._outbox, self._outflows, self._not_before):
            at_hand.pop(cid, None)

    def _results(self, waiting):
        """What there is to deliver of what waits.

        Returns:
            (list of Delivery, dict of cid to str): that, and what has to wait on and why; the rest is not to be delivered.
        """
        found, kept = [], {}
        for cid, end in waiting.items():
            if end.lost:
                try:
                    found += self._reason(cid, end)
                except LedgerError as err:
                    kept[cid] = str(err)
                continue
            try:
                result = end.result or self._hub.dom0.results.result(self.vm, cid)
            except (LedgerError, SpoolError) as err:
                kept[cid] = str(err)
                continue
            # A command of the qube that had this name before may have ended only now.
            if result is not None and is_of(result.uuid, self._uuid):
                sent = self._sent(cid, end, result.parts) if result.is_output else {}
                found.append(Delivery(cid, result.exit_code, result.parts, sent=sent))
        return found, kept

    def _reason(self, cid, end):
        """The answer that says why there is no result, as a list; empty if that is none of this qube."""
        uuid = self._hub.dom0.ledger.uuid(self.vm, cid) if end.uuid is None else end.uuid
        if not is_of(uuid, self._uuid):
            return []
        return [Delivery(cid, EXIT_FAILED, in_memory(*self._hub.dom0.results.refusal(self.vm, cid, end.lost)))]

    def _sent(self, cid, end, parts):
        """How much of a result its VM has already."""
        outflow = self._outflows.get(cid)
        sent = outflow.sent() if outflow and end.status in _KEEPS_OUTPUT and self._session.streams else {}
        return sent if all(parts[part][0] >= size for part, size in sent.items()) else {}

    def _stream(self):
        """Send on what running commands have written."""
        for cid, outflow in [] if self._stranger else list(self._outflows.items()):
            piece = None if cid in self._outbox else outflow.next()
            while piece is not None:
                try:
                    found = self._hub.dom0.execution.chunk(self.vm, cid, piece.seq, piece.part, piece.offset, piece.size, self._uuid)
                except SpoolError as err:
                    self._hub.log(f"{self.vm}: {cid}: {err}")
                    found = None
                if found is None or len(found[0]) != piece.size:
                    # It has just ended: the rest comes with its result.
                    outflow.put_back()
                    break
                self._asked = True
                chunk = Chunk(piece.part, piece.offset, piece.seq, *found)
                sending = asyncio.ensure_future(self._session.stream(cid, chunk))
                sending.add_done_callback(lambda sending, cid=cid, outflow=outflow: self._streamed(cid, outflow, sending))
                piece = outflow.next()

    def _streamed(self, cid, outflow, sending):
        if sending.cancelled():
            return
        if sending.exception() is not None:
            # A full disk there ends the stream, not the command; with the session, the next one goes on.
            outflow.stopped = outflow.stopped or isinstance(sending.exception(), AgentUnable)
            return
        outflow.answered()
        if not sending.result() and not outflow.stopped:
            outflow.stopped = True
            self._hub.spawn(self._abandon(cid))
        self.wake()

    async def _spend(self):
        wait = self._allowance.spend()
        if not wait:
            return
        deadline = time.monotonic() + wait
        while not self.ending and wait > 0:
            await self._bell.wait(wait)
            wait = deadline - time.monotonic()
        # Whatever rang meanwhile is to be looked at.
        self.wake()


class _Allowance:
    """A token bucket: what a VM may have done before its loop is slowed down.

    Args:
        burst: float, so many at once.
        rate: float, then so many a second.
    """

    def __init__(self, burst, rate):
        self._burst, self._rate = burst, rate
        self._left = burst
        self._at = time.monotonic()

    def spend(self):
        """Take one.

        Returns:
            float, seconds to wait first; 0 while there is some left.
        """
        now = time.monotonic()
        self._left = max(-self._burst, min(self._burst, self._left + (now - self._at) * self._rate) - 1)
        self._at = now
        return max(0.0, -self._left / self._rate)


def _weight(end):
    """What a result takes that is at hand, bytes."""
    return sum(size for size, _ in end.result.parts.values()) if end.result else 0


def _claimed_cid(untrusted_cid):
    try:
        return check_cid(untrusted_cid)
    except PullError:
        # Our agent answers such names itself, in the VM; one that sends them on is not ours.
        raise FrameError("the qube listed a name that is no command id") from None
