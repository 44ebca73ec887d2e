# SPDX-License-Identifier: GPL-2.0-or-later
"""Where claimed commands wait: for dom0's user, if that one is to be asked, then for their turn to run."""

from __future__ import annotations

from .asker import Asker
from .errors import ThreadError
from .scheduler import FairPool


class Lines:
    """Both lines, seen as one from outside.

    Args:
        dom0: Dom0.
        run: callable of (vm, cid), which runs a command and must not raise.
        unstarted: callable of (vm, cid, reason), called for a command that was answered and can't be started; the reason is None where
            nothing is started any more.
        emit, log, changed: as for :class:`pullrpc.asker.Asker`.
    """

    def __init__(self, dom0, run, unstarted, emit, log, changed):
        self._unstarted = unstarted
        self._pool = FairPool(lambda: dom0.config.parallel, lambda vm: dom0.config.for_vm(vm).vm_parallel, run)
        self._asker = Asker(dom0, self._answered, emit, log, changed)

    def check_question(self, request):
        """See :meth:`pullrpc.asker.Asker.check`."""
        self._asker.check(request)

    @property
    def open_question(self):
        """(vm, cid, since) of the question that dom0's user sees now; None while there is none."""
        return self._asker.open

    def submit(self, request):
        """Take a claimed command.

        Args:
            request: pullrpc.gate.Request

        Returns:
            bool, False when nothing is started any more.

        Raises:
            ThreadError: there is no thread for it, and none can be started; it does not wait.
        """
        return self._asker.submit(request) if request.asks else self._pool.submit(request.vm, request.cid)

    def withdraw(self, vm, cid):
        """Take a command out that does not run yet.

        Returns:
            bool, False when it doesn't wait (any more).
        """
        return self._asker.withdraw(vm, cid) or self._pool.withdraw(vm, cid)

    def waiting(self, vm):
        """How many of a VM's commands wait.

        Returns:
            int
        """
        return self._asker.waiting(vm) + self._pool.waiting(vm)

    def is_done(self, vm):
        """Say whether nothing of a VM waits or runs.

        Args:
            vm: str.

        Returns:
            bool
        """
        # In the order in which commands go through: none is missed on its way from one line to the other.
        return not self._asker.holds(vm) and self._pool.is_done(vm) and not self._asker.holds(vm)

    def close(self):
        """Start nothing any more.

        Returns:
            list of (vm, cid), what waited.
        """
        return self._asker.close() + self._pool.close()

    def wait_idle(self, seconds):
        """See :meth:`pullrpc.scheduler.FairPool.wait_idle`."""
        return self._pool.wait_idle(seconds)

    def _answered(self, vm, cid):
        try:
            if self._pool.submit(vm, cid):
                return
            reason = None
        except ThreadError as err:
            reason = str(err)
        self._unstarted(vm, cid, reason)
