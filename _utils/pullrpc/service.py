# SPDX-License-Identifier: GPL-2.0-or-later
"""The service: finds running VMs that are to be served, keeps a pull loop for each, and ends in bounded time.

It never starts a VM. Only one runs at a time (see lock); what a dead one left behind is finished first.
"""

from __future__ import annotations

import contextvars
import json
import os
import threading
import time

from . import sandbox
from .config import digest
from .errors import PullError
from .files import forget, write_whole
from .frames import wait_readable
from .lock import EngineLock
from .puller import Puller
from .scheduler import FairPool
from .transport import running_vms

#: After its processes were killed, how long until a command must have been recorded as ended, seconds.
_KILL_WAIT = 3.0
#: How long the last results and goodbyes may take when the service stops, seconds.
_GOODBYE_WAIT = 1.5


class Service:
    """All pull loops of dom0.

    Args:
        dom0: Dom0.
        verify: callable, see :class:`pullrpc.puller.Puller`.
        execute: callable of (vm, cid) that runs a claimed command and gives a dict with ``status`` and ``exit``.
        emit: callable of (vm, cid, what, data dict); must not block or raise.
        log: callable of str.
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
        self._pullers = {}
        self._threads = {}
        self._published = None
        self._on_reload = on_reload
        self._setup = setup
        self.pool = FairPool(lambda: dom0.config.parallel, lambda vm: dom0.config.for_vm(vm).vm_parallel, self._run_one)

    def run(self):
        """Serve until :meth:`stop` is called.

        Raises:
            EngineBusy: another service holds the lock; PullError: the ledger or a folder can't be used.
        """
        with EngineLock(self.dom0.config.run_dir, takes_signals=True):
            self._begin()
            try:
                deadline = time.monotonic()
                while True:
                    wait_readable([self._wake_read], deadline)
                    wakes = self._drain_wakes()
                    if b"!" in wakes:
                        break
                    if wakes:
                        self._reload()
                    self._discover()
                    deadline = time.monotonic() + self.dom0.config.discover_interval
            finally:
                self._end()

    def run_once(self):
        """Serve what lies in the queues of all running VMs now.

        Returns:
            dict of VM name to ``served`` or the reason why not.

        Raises:
            EngineBusy, PullError: as for :meth:`run`.
        """
        with EngineLock(self.dom0.config.run_dir):
            self._begin()
            outcome = {}
            for vm in sorted(self._served() & running_vms(self.dom0.config)):
                puller = self._pullers[vm] = Puller(self, vm)
                try:
                    puller.run_once(self._wait_all)
                    outcome[vm] = "served"
                except PullError as err:
                    outcome[vm] = str(err)
            self.pool.close()
            for puller in self._pullers.values():
                puller.release()
            return outcome

    def stop(self):
        """Ask :meth:`run` to end; may be called from a signal handler."""
        self._wake(b"!")

    def reload(self):
        """Ask :meth:`run` to take new settings over; may be called from a signal handler."""
        self._wake(b"r")

    def _wake(self, word):
        try:
            os.write(self._wake_write, word)
        except BlockingIOError:
            # Full of earlier calls: it knows.
            return

    def _drain_wakes(self):
        try:
            return os.read(self._wake_read, 4096)
        except BlockingIOError:
            return b""

    def _reload(self):
        try:
            self._on_reload()
        except PullError as err:
            self.log(f"the new settings are not used: {err}")
            return
        for puller in self._pullers.values():
            puller.wake()

    def _begin(self):
        # What a dead service left says nothing of this one.
        forget(sessions_path(self.dom0.config))
        swept = sandbox.sweep(self.dom0.config.run_dir)
        left = self.dom0.recover()
        if swept or left:
            self.log(f"the last service ended early: {len(left)} commands were interrupted, {swept} sandboxes removed")

    def _served(self):
        # A VM without a key is served too if the settings name it, or a session is open: it gets to hear that it is refused.
        return set(self.dom0.config.vms) | set(self.dom0.keyring.names()) | set(self._pullers)

    def _discover(self):
        try:
            running = running_vms(self.dom0.config)
            wanted = self._served() & running
        except PullError as err:
            # The open sessions go on; VMs started meanwhile are found once the list can be read again.
            self.log(str(err))
            return
        for vm, thread in list(self._threads.items()):
            if vm not in running:
                self._pullers[vm].running.clear()
                self._pullers[vm].wake()
            if not thread.is_alive():
                del self._threads[vm]
                self._pullers.pop(vm).release()
        for vm in sorted(wanted - set(self._threads)):
            self._start_puller(vm)
        self._publish()

    def _start_puller(self, vm):
        puller = Puller(self, vm)
        # Salt's loader finds its own context through context variables; a bare thread would have none.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(puller.run,), name=f"qvm-remote-{vm}", daemon=True)
        self._pullers[vm], self._threads[vm] = puller, thread
        thread.start()

    def _publish(self):
        """Leave a note of how each VM is served, and under which settings, for whoever asks for the status."""
        sessions = {vm: puller.state for vm, puller in sorted(self._pullers.items())}
        note = {"settings": digest(self.dom0.config), "setup": self._setup, "sessions": sessions}
        if note == self._published:
            return
        try:
            write_whole(sessions_path(self.dom0.config), json.dumps(note).encode("ascii"))
            self._published = note
        except OSError as err:
            self.log(f"the status can't be written: {err.strerror}")

    def _run_one(self, vm, cid):
        lost = None
        try:
            self.emit(vm, cid, "running", {})
            outcome = self._execute(vm, cid)
            self.emit(vm, cid, "done", outcome)
        except PullError as err:
            # Its row stays as it is in the ledger: a doubt is never resolved by running again.
            lost = f"the command was taken, but its end is not known: {err}"
            self.log(f"{vm}: {cid}: {err}")
        puller = self._pullers.get(vm)
        if puller is not None:
            puller.finished(cid, lost)

    def _wait_all(self):
        while self.pool.waiting_count() or self.pool.busy():
            self.pool.wait_idle(0.1)
            time.sleep(0.01)

    def _end(self):
        """End within ``stop_grace`` and a few seconds: finish or kill what runs, deliver, say goodbye."""
        pullers = list(self._pullers.values())
        for puller in pullers:
            puller.stopping.set()
            puller.wake()
        for vm, cid in self.pool.close():
            self.dom0.interrupt_queued(vm, cid)
            self._pullers[vm].finished(cid)
        if not self.pool.wait_idle(self.dom0.config.stop_grace):
            self.dom0.interrupt_running()
            self.pool.wait_idle(_KILL_WAIT)
        for puller in pullers:
            puller.ending.set()
            puller.wake()
        deadline = time.monotonic() + _GOODBYE_WAIT
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for vm, thread in self._threads.items():
            if thread.is_alive():
                self._pullers[vm].abort()
                thread.join(_GOODBYE_WAIT / 3)


def sessions_path(config):
    """Where a running service notes how each VM is served.

    Args:
        config: Config.

    Returns:
        str
    """
    return os.path.join(config.run_dir, "sessions.json")
