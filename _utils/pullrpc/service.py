# SPDX-License-Identifier: GPL-2.0-or-later
"""The service: finds running VMs that are to be served, keeps a pull loop for each, and ends in bounded time.

It never starts a VM. Only one runs at a time (see lock); what a dead one left behind is finished first.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
import time

from . import __version__, note, sandbox
from .aio import Bell, Threads, run
from .config import digest
from .errors import PullError, SpoolError, TransportError
from .lines import Lines
from .lock import EngineLock
from .puller import Finished, Puller
from .results import INTERRUPTED, of_bytes
from .transport import running_vms, uuids
from .watch import Watcher

#: After its processes were killed, how long until a command must have been recorded as ended, seconds.
_KILL_WAIT = 3.0
#: How long the last results and goodbyes may take when the service stops, seconds.
_GOODBYE_WAIT = 1.5
#: Threads for what touches the disk, or asks other programs of dom0.
_THREADS = 8
#: A result up to this size is kept in memory until it is delivered, bytes; a larger one is read again.
_AT_HAND = 1 << 16
#: How often it is noted what time it is, for those who have access for a time, seconds.
_NOTE_EVERY = 30.0
#: How often what is kept for some days is looked through, seconds.
_PRUNE_EVERY = 24 * 3600.0
#: Most VMs that are named whose settings changed.
_NAMED_MAX = 64
#: How often :meth:`Service.run_once` looks whether all is done, seconds.
_WAIT_STEP = 0.01


class Service:
    """All pull loops of dom0, in one event loop.

    Args:
        dom0: Dom0.
        verify: callable, see :class:`pullrpc.puller.Puller`.
        execute: callable of (vm, cid) that runs a claimed command and gives a dict with ``status`` and ``exit``.
        emit: callable of (vm, cid, what, data dict); must not block or raise; called from several threads.
        log: callable of str; called from several threads.
        on_reload: callable that puts new settings into ``dom0``; may raise PullError.
        setup: str, what it was started as; told to whoever asks for the status.
    """

    def __init__(self, dom0, verify, execute, emit, log, on_reload=lambda: None, setup=""):
        self.dom0 = dom0
        self.verify = verify
        self.emit = emit
        self.log = log
        self._execute = execute
        # A pipe, not an Event: stop() must be safe in a signal handler that interrupted whatever.
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Re-entrant: the one that is interrupted may be the one that holds it.
        self._wake_lock = threading.RLock()
        self._loop = None
        self._bell = None
        self._threads = None
        self._stopping = False
        self._pullers = {}
        self._tasks = {}
        self._running = set()
        self._spawned = set()
        self._to_close = []
        #: Delivered, and not recorded as such: the disk was full then.
        self._unclosed = set()
        self._uuids_wanted = {}
        self._looking_up = False
        #: Commands that have ended, and whose end could not be recorded: why their VMs get no result; and those whose VMs know.
        self._lost, self._lost_told = {}, set()
        #: Those of them of which it was said that something else than a full disk is in the way.
        self._lost_failing = set()
        self._published = None
        self._on_reload = on_reload
        self._setup = setup
        self.lines = Lines(dom0, self._run_one, self._end_unstarted, emit, log, self._asks_another)

    def run(self):
        """Serve until :meth:`stop` is called, once.

        Raises:
            EngineBusy: another service holds the lock; PullError: the ledger or a folder can't be used.
        """
        with contextlib.closing(self), EngineLock(self.dom0.config.run_dir, takes_signals=True):
            # First of all: what a dead service left says nothing of this one.
            note.remove(self.dom0.config)
            self._note("started", version=__version__, settings=digest(self.dom0.config))
            self._begin()
            try:
                run(self._in_loop(self._serve()))
            finally:
                with contextlib.suppress(OSError):
                    note.remove(self.dom0.config)
                self._note("stopped")

    def run_once(self):
        """Serve what lies in the queues of all running VMs now.

        Returns:
            dict of VM name to ``served``, ``served in part: ...`` or the reason why not.

        Raises:
            EngineBusy, PullError: as for :meth:`run`.
        """
        with contextlib.closing(self), EngineLock(self.dom0.config.run_dir):
            note.remove(self.dom0.config)
            self._begin()
            return run(self._in_loop(self._serve_once()))

    def close(self):
        """Hold nothing open any more; :meth:`run` and :meth:`run_once` do that in the end, whoever makes a service and runs neither has to."""
        with self._wake_lock:
            ends = self._wake_read, self._wake_write
            self._wake_read = self._wake_write = None
            for fd in ends:
                if fd is not None:
                    os.close(fd)

    def stop(self):
        """Ask :meth:`run` to end; may be called from a signal handler, at any time."""
        self._wake(b"!")

    def reload(self):
        """Ask :meth:`run` to take new settings over; may be called from a signal handler, at any time."""
        self._wake(b"r")

    def call(self, function, *args):
        """Run a function in a thread.

        Args:
            function: callable.
            args: its arguments.

        Returns:
            awaitable of what it returns.
        """
        return self._threads.call(function, *args)

    def served(self):
        """How many VMs are served.

        Returns:
            int
        """
        return len(self._pullers)

    async def uuid_of(self, vm):
        """Look up which qube has a name now; those that are asked for at the same time share one look.

        Args:
            vm: str, a checked name.

        Returns:
            str

        Raises:
            TransportError: it can't be told.
        """
        future = self._loop.create_future()
        self._uuids_wanted.setdefault(vm, []).append(future)
        if not self._looking_up:
            self.spawn(self._look_up())
        return await future

    async def _look_up(self):
        self._looking_up = True
        try:
            while self._uuids_wanted:
                # What is asked for from here on is looked up by the next one: each look begins after it was asked for.
                wanted, self._uuids_wanted = self._uuids_wanted, {}
                problem = await self._give_uuids(wanted)
                if problem is None:
                    continue
                for vm, futures in sorted(wanted.items()):
                    # One that is gone is no matter of the others. They are looked up one after the other: a qubesd that hangs has one thread.
                    own_problem = problem if len(wanted) == 1 else await self._give_uuids({vm: futures})
                    for future in futures:
                        if own_problem and not future.done():
                            future.set_exception(TransportError(own_problem))
        finally:
            self._looking_up = False

    async def _give_uuids(self, wanted):
        """Look some qubes up at once, and give their UUIDs to those who wait.

        Args:
            wanted: dict of name to list of asyncio.Future.

        Returns:
            str, why that can't be done, and nobody was given any; None when it was.
        """
        try:
            found = await self.call(uuids, self.dom0.config, *sorted(wanted))
        except Exception as err:  # noqa: BLE001 - whatever it is, those who wait are to hear of it: they serve nobody, and try again
            return str(err) or type(err).__name__
        for vm, futures in wanted.items():
            for future in futures:
                if not future.done():
                    future.set_result(found[vm])
        return None

    def spawn(self, coroutine):
        """Have a coroutine run beside whatever runs.

        Args:
            coroutine: coroutine.
        """
        task = asyncio.ensure_future(coroutine)
        self._spawned.add(task)
        task.add_done_callback(self._spawned_ended)

    def close_deliveries(self, results):
        """Have results recorded as delivered; nobody waits for that, and what comes at the same time is recorded together.

        Args:
            results: list of (vm, cid).
        """
        self._lost_told.update(self._lost.keys() & set(results))
        results = [one for one in results if one not in self._lost_told]
        self._to_close += results
        if results and len(self._to_close) == len(results):
            self.spawn(self._close_deliveries())

    def lose(self, vm, cid, reason):
        """Have a command's end recorded as soon as it can be: it could not be now. From whatever thread.

        Args:
            vm, cid: str.
            reason: str, one sentence for its client, if there is no result.
        """
        self._lost[vm, cid] = reason

    def lost_of(self, vm):
        """What was lost of a VM's commands, is not recorded yet, and was not told.

        Args:
            vm: str, a checked name.

        Returns:
            dict of cid to str, one sentence.
        """
        return {cid: reason for (of, cid), reason in list(self._lost.items()) if of == vm and (of, cid) not in self._lost_told}

    async def _close_deliveries(self):
        while self._to_close:
            # Not taken out before they are recorded: what comes meanwhile finds this task at work.
            results = list(self._to_close)
            try:
                await self.call(self.dom0.results.close_deliveries, results)
            except Exception as err:  # noqa: BLE001 - whatever it is, what comes later is to be recorded
                self.log(str(err))
                self._unclosed.update(results)
            del self._to_close[: len(results)]

    async def _close_left(self):
        """Record the deliveries that could not be recorded, now that there may be room for it; a session of today may be there for weeks."""
        if self._unclosed:
            results = sorted(self._unclosed)
            try:
                await self.call(self._close_again, results)
            except Exception:  # noqa: BLE001 - as when it was tried first: it was said then, and is tried again
                return
            self._unclosed.difference_update(results)

    def _close_again(self, results):
        # Some may have been delivered again in another session, and be closed by now.
        results = [(vm, cid) for vm, cid in results if self.dom0.ledger.waiting_end(vm, cid) is not None]
        if results:
            self.dom0.results.close_deliveries(results)

    def _spawned_ended(self, task):
        self._spawned.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.log(f"a step failed: {task.exception()}")

    def _wake(self, word):
        with self._wake_lock:
            if self._wake_write is None:
                # It has ended. Its descriptor may be somebody else's by now.
                return
            try:
                os.write(self._wake_write, word)
            except BlockingIOError:
                # Full of earlier calls: it knows.
                return

    def _begin(self):
        swept = sandbox.sweep(self.dom0.config.run_dir)
        left = self.dom0.execution.recover()
        for vm, cid in self.dom0.ledger.unfinished():
            self.log(f"{vm}: {cid}: what the last service left of it can't be closed yet: its files in the spool can't be removed")
            self.lose(vm, cid, INTERRUPTED)
        if swept or left:
            self.log(f"the last service ended early: {len(left)} commands of it were closed, {swept} sandboxes removed")
        self._warm()

    def _note(self, what, **fields):
        """Have a line in the audit log for what runs nothing. If that can't be, nothing can: whoever asks is told so."""
        try:
            self.dom0.audit.write(what, "-", **fields)
        except PullError as err:
            self.log(str(err))

    def _warm(self):
        try:
            self.dom0.execution.warm()
        except PullError as err:
            # Each command will be answered with the reason; those who ask are to hear of it.
            self.log(str(err))

    async def _in_loop(self, work):
        self._loop = asyncio.get_running_loop()
        self._bell = Bell()
        self.dom0.execution.on_output = functools.partial(self._post, "wrote")
        self._threads = Threads(_THREADS, "qvm-remote-disk")
        try:
            return await work
        finally:
            if self._spawned:
                await asyncio.wait(self._spawned, timeout=_GOODBYE_WAIT)
            await self._do(functools.partial(self.dom0.audit.tell_not_shown, at_once=True))
            self.dom0.execution.on_output = None
            self.lines.close()
            self._threads.close()
            sandbox.close_idle()

    async def _serve(self):
        self._loop.add_reader(self._wake_read, self._on_wake)
        watcher = Watcher(self._bell.ring, self.log)
        watcher.start()
        looked = noted = float("-inf")
        pruned = time.monotonic()
        try:
            while not self._stopping:
                interval = self.dom0.config.discover_interval
                if time.monotonic() >= noted + _NOTE_EVERY:
                    noted = time.monotonic()
                    await self._do(self.dom0.note_time)
                    await self._do(self.dom0.spool.remove_left)
                    await self._do(self.dom0.audit.tell_not_shown)
                if time.monotonic() >= pruned + _PRUNE_EVERY:
                    pruned = time.monotonic()
                    await self._do(functools.partial(self.dom0.results.expire_all, set(self._pullers)))
                    await self._do(self.dom0.prune)
                if time.monotonic() >= watcher.next_look(looked, interval):
                    looked = time.monotonic()
                    await self._look_who_runs()
                await self._discover()
                await self._record_lost()
                await self._close_left()
                await self._bell.wait(min(interval, watcher.next_look(looked, interval) - time.monotonic()))
        finally:
            await watcher.stop()
            await self._end()
            self._loop.remove_reader(self._wake_read)

    async def _serve_once(self):
        # All at once: one that is slow, or has much to do, holds up no other.
        vms = sorted(await self._served() & await self.call(running_vms, self.dom0.config))
        self._pullers.update({vm: Puller(self, vm) for vm in vms})
        outcomes = await asyncio.gather(*(self._serve_vm_once(vm) for vm in vms))
        # What a VM that broke off had claimed runs to its end under our lock.
        await self._wait_for(vms)
        await self._record_lost()
        return dict(zip(vms, outcomes))

    async def _serve_vm_once(self, vm):
        try:
            is_all = await self._pullers[vm].run_once(functools.partial(self._wait_for, [vm]))
        except PullError as err:
            return str(err)
        return "served" if is_all else "served in part: more waits in its queue"

    def _on_wake(self):
        try:
            words = os.read(self._wake_read, 4096)
        except BlockingIOError:
            return
        if b"!" in words:
            self._stopping = True
        else:
            self._reload()
        self._bell.ring()

    def _reload(self):
        before = self.dom0.config
        try:
            self._on_reload()
        except PullError as err:
            self.log(f"the new settings are not used: {err}")
            return
        after = self.dom0.config
        changed = sorted(vm for vm in {*before.vms, *after.vms} if before.for_vm(vm) != after.for_vm(vm))
        self._note("settings", settings=digest(after), vms=changed[:_NAMED_MAX], count=len(changed))
        for puller in self._pullers.values():
            puller.wake()
        self._warm()

    async def _served(self):
        # A VM without a key is served too if the settings name it, or a session is open: it gets to hear that it is refused.
        return set(self.dom0.config.vms) | set(await self.call(self.dom0.keyring.names)) | set(self._pullers)

    async def _look_who_runs(self):
        try:
            self._running = await self.call(running_vms, self.dom0.config)
        except PullError as err:
            # The open sessions go on; VMs started meanwhile are found once the list can be read again.
            self.log(str(err))

    async def _discover(self):
        """Serve those that are to be served and run, and end with the others."""
        try:
            wanted = await self._served() & self._running
        except (PullError, OSError) as err:
            self.log(str(err))
            return
        for vm, task in list(self._tasks.items()):
            if vm not in self._running:
                self._pullers[vm].running = False
                self._pullers[vm].wake()
            if task.done():
                if not task.cancelled() and task.exception() is not None:
                    self.log(f"{vm}: not served: {task.exception()!r}")
                del self._tasks[vm], self._pullers[vm]
        for vm in sorted(wanted - set(self._tasks)):
            self._pullers[vm] = Puller(self, vm)
            self._tasks[vm] = asyncio.ensure_future(self._pullers[vm].run())
        await self.call(self._publish)

    async def _do(self, work):
        """Have something done that is done again later if it can't be now. While that is so nobody runs anything, or what is old stays."""
        try:
            await self.call(work)
        except (PullError, OSError) as err:
            self.log(str(err))

    def _publish(self):
        """Leave a note of how each VM is served, and under which settings, for whoever asks for the status."""
        pullers = sorted(self._pullers.items())
        news = {
            "settings": digest(self.dom0.config),
            "setup": self._setup,
            "sessions": {vm: puller.state for vm, puller in pullers},
            "since": {vm: round(puller.since) for vm, puller in pullers},
            "asking": self.lines.open_question,
        }
        if news == self._published:
            return
        try:
            note.write(self.dom0.config, news)
            self._published = news
        except OSError as err:
            self.log(f"the status can't be written: {err.strerror}")

    def _run_one(self, vm, cid):
        """Run a command; in one of the pool's threads."""
        try:
            self.emit(vm, cid, "running", {})
            outcome = self._execute(vm, cid)
            self.emit(vm, cid, "done", outcome)
            end = Finished(status=outcome["status"], result=self._small_result(vm, cid))
        except Exception as err:  # noqa: BLE001 - whatever it is, a thread that dies would take the answer with it
            # Its row stays as it is in the ledger: a doubt is never resolved by running again.
            reason = f"the command was taken, but its end could not be recorded: {err}"
            end = self._lost_end(vm, cid, reason, err)
        self._post("finished", vm, cid, end)

    def _lost_end(self, vm, cid, reason, err):
        """Note an end that could not be recorded, and make what its VM is told meanwhile."""
        self.log(f"{vm}: {cid}: {err}")
        self.lose(vm, cid, reason)
        try:
            return Finished(lost=reason, uuid=self.dom0.ledger.uuid(vm, cid))
        except PullError:
            # Whoever is to hear of it asks again.
            return Finished(lost=reason, uuid=None)

    def _end_unstarted(self, vm, cid, reason):
        """Finish a command that dom0's user was asked about, and that can't be started any more; in the thread that asks."""
        end = Finished()
        try:
            if reason is None:
                self.dom0.execution.interrupt_queued(vm, cid)
            else:
                self.dom0.execution.finish_lost(vm, cid, reason)
        except PullError as err:
            end = self._lost_end(vm, cid, reason or INTERRUPTED, err)
        self._post("finished", vm, cid, end)

    def _asks_another(self):
        """Have the note for whoever asks for the status written anew; in the thread that asks."""
        try:
            self._loop.call_soon_threadsafe(self._bell.ring)
        except RuntimeError:
            return

    async def _record_lost(self):
        """Record the ends that could not be recorded, now that there may be room for it."""
        for (vm, cid), reason in list(self._lost.items()):
            try:
                await self.call(self.dom0.execution.finish_lost, vm, cid, reason)
            except SpoolError:
                # It was said when it happened. The others have files of their own.
                continue
            except PullError:
                return
            except Exception as err:  # noqa: BLE001 - whatever it is, the others' ends are to be recorded
                if (vm, cid) not in self._lost_failing:
                    self.log(f"{vm}: {cid}: {err}")
                self._lost_failing.add((vm, cid))
                continue
            del self._lost[vm, cid]
            self._lost_failing.discard((vm, cid))
            if (vm, cid) in self._lost_told:
                self._lost_told.remove((vm, cid))
                self.close_deliveries([(vm, cid)])
            else:
                self._tell("finished", vm, cid, Finished())

    def _small_result(self, vm, cid):
        """A result that is worth keeping at hand until it is delivered; None for another one, or where it has to be read again."""
        try:
            result = self.dom0.results.result(vm, cid)
            if result is None or sum(size for size, _ in result.parts.values()) > _AT_HAND:
                return None
            return result._replace(parts={part: of_bytes(b"".join(chunks(0))) for part, (_, chunks) in result.parts.items()})
        except PullError:
            # It is recorded by now: no reason to tell its client otherwise.
            return None

    def _post(self, what, vm, cid, *news):
        """Tell a VM's loop something, from whatever thread."""
        try:
            self._loop.call_soon_threadsafe(self._tell, what, vm, cid, *news)
        except RuntimeError:
            # The service has ended meanwhile; the next one delivers what is in the ledger.
            return

    def _tell(self, what, vm, cid, *news):
        puller = self._pullers.get(vm)
        if puller is not None:
            getattr(puller, what)(cid, *news)

    async def _wait_for(self, vms):
        while not all(map(self.lines.is_done, vms)):
            await asyncio.sleep(_WAIT_STEP)
        # What the pool's threads posted last is heard before this goes on.
        await asyncio.sleep(0)

    async def _end(self):
        """End within ``stop_grace`` and a few seconds: finish or kill what runs, deliver, say goodbye."""
        pullers = list(self._pullers.values())
        for puller in pullers:
            puller.stopping = True
            puller.wake()
        for vm, cid in self.lines.close():
            try:
                await self.call(self.dom0.execution.interrupt_queued, vm, cid)
            except Exception as err:  # noqa: BLE001 - whatever it is, the others are to be ended
                # The next start does the same with what is left.
                self.log(f"{vm}: {cid}: {err}")
            self._tell("finished", vm, cid, Finished())
        if not await self.call(self.lines.wait_idle, self.dom0.config.stop_grace):
            await self.call(self.dom0.execution.interrupt_running)
            await self.call(self.lines.wait_idle, _KILL_WAIT)
        await self._record_lost()
        for puller in pullers:
            puller.ending = True
            puller.wake()
        for wait in (_GOODBYE_WAIT, _GOODBYE_WAIT / 3, _GOODBYE_WAIT / 3):
            tasks = [task for task in self._tasks.values() if not task.done()]
            if not tasks:
                return
            await asyncio.wait(tasks, timeout=wait)
            for task in tasks:
                # The first time it ends its session in an orderly way, the second time at once.
                task.cancel()
