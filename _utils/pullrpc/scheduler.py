# SPDX-License-Identifier: GPL-2.0-or-later
"""Who runs next: a bounded number of commands at once, in all and for each VM, and VMs take turns.

A VM with a thousand waiting commands delays another VM's one command by at most the commands running now.
"""

from __future__ import annotations

import collections
import contextvars
import threading

from .errors import ThreadError


class FairPool:
    """Worker threads and one waiting line for each VM.

    Args:
        parallel: callable that gives how many commands may run at once.
        vm_parallel: callable of a VM's name, most of its commands running at once.
        run: callable of (vm, cid), which runs a command and must not raise.
    """

    def __init__(self, parallel, vm_parallel, run):
        self._parallel = parallel
        self._vm_parallel = vm_parallel
        self._run = run
        self._lines = collections.OrderedDict()
        self._running = collections.Counter()
        # Re-entrant: the counting methods are used from within, too.
        self._changed = threading.Condition(threading.RLock())
        self._closed = False
        self._workers = 0

    def submit(self, vm, cid):
        """Put a command at the end of its VM's line.

        Args:
            vm, cid: str.

        Returns:
            bool, False when the pool is closed.

        Raises:
            ThreadError: there is no thread to run it, and none can be started; it does not wait.
        """
        with self._changed:
            if self._closed:
                return False
            self._lines.setdefault(vm, collections.deque()).append(cid)
            problem = self._start_workers()
            if problem and not self._workers:
                self._lines[vm].pop()
                raise ThreadError(f"dom0 can't start a thread to run this with ({problem}); try again later")
            self._changed.notify()
        return True

    def withdraw(self, vm, cid):
        """Take a command out of its line.

        Returns:
            bool, False when it doesn't wait (any more).
        """
        with self._changed:
            try:
                self._lines[vm].remove(cid)
            except (KeyError, ValueError):
                return False
            return True

    def waiting(self, vm):
        """How many of a VM's commands wait.

        Returns:
            int
        """
        with self._changed:
            return len(self._lines.get(vm, ()))

    def waiting_count(self):
        """How many commands wait in all."""
        with self._changed:
            return sum(len(line) for line in self._lines.values())

    def busy(self):
        """How many commands run now."""
        with self._changed:
            return sum(self._running.values())

    def is_done(self, vm):
        """Say whether nothing of a VM waits or runs.

        Args:
            vm: str.

        Returns:
            bool
        """
        with self._changed:
            return not self._lines.get(vm) and not self._running.get(vm)

    def close(self):
        """Start nothing any more.

        Returns:
            list of (vm, cid), what waited.
        """
        with self._changed:
            self._closed = True
            waited = [(vm, cid) for vm, line in self._lines.items() for cid in line]
            self._lines.clear()
            self._changed.notify_all()
        return waited

    def wait_idle(self, seconds):
        """Wait until nothing runs.

        Args:
            seconds: float, at most.

        Returns:
            bool, whether nothing runs.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not sum(self._running.values()), seconds)

    def _start_workers(self):
        """Start as many as have something to do, as far as that goes.

        Returns:
            str, why one could not be started; None if nothing was wrong.
        """
        while self._workers < min(self._parallel(), self.busy() + self.waiting_count()):
            # Salt's loader finds its own context through context variables; a bare thread would have none.
            context = contextvars.copy_context()
            try:
                threading.Thread(target=context.run, args=(self._work,), name="qvm-remote-run", daemon=True).start()
            except RuntimeError as err:
                return str(err)
            # Only those that there are: they count for as long as the service lives.
            self._workers += 1
        return None

    def _work(self):
        try:
            while self._run_next():
                continue
        finally:
            with self._changed:
                self._workers -= 1

    def _run_next(self):
        """Wait for a command's turn and run it.

        Returns:
            bool, False when nothing is started any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._next_vm() is not None)
            vm = self._next_vm()
            if vm is None:
                return False
            cid = self._lines[vm].popleft()
            # To the end of the round, so that the others are served first.
            self._lines.move_to_end(vm)
            if not self._lines[vm]:
                del self._lines[vm]
            self._running[vm] += 1
        try:
            self._run(vm, cid)
        finally:
            with self._changed:
                self._running[vm] -= 1
                if not self._running[vm]:
                    del self._running[vm]
                # For what waits because no other could be started when it came.
                self._start_workers()
                self._changed.notify_all()
        return True

    def _next_vm(self):
        if sum(self._running.values()) >= self._parallel():
            return None
        for vm, line in self._lines.items():
            if line and self._running.get(vm, 0) < self._vm_parallel(vm):
                return vm
        return None
