# SPDX-License-Identifier: GPL-2.0-or-later
"""The line of questions to dom0's user: one at a time, VMs take turns, and one that was refused has to pause.

Nobody is to be worn down to a yes: with a no, or no answer, all that the same VM asks beside it is refused as well, and for a
while, longer each time, it is not asked for again.
"""

from __future__ import annotations

import threading
import time

from .accounts import describe_account
from .audit import describe_rule
from .errors import AuditError, Refused
from .question import FAILED, NO, TIMEOUT, WITHDRAWN, YES, Answer, Question, text_of
from .scheduler import FairPool

#: How long a VM has to pause after a first no, and at most after many in a row, seconds.
_PAUSE_FIRST, _PAUSE_MAX = 5.0, 300.0
#: So many questions a VM may take back in a row; from then on each counts as a no: windows are not to come and go as it likes.
_WITHDRAWN_MAX = 3


class Asker:
    """Asks about commands that are claimed, and hands them on, answered.

    Args:
        dom0: Dom0, which is told the answers.
        submit: callable of (vm, cid), called for each command once it was answered, whatever the answer.
        emit, log: as for :class:`pullrpc.service.Service`.
        changed: callable, called when another question is open, from this object's thread.
    """

    def __init__(self, dom0, submit, emit, log, changed):
        self._dom0 = dom0
        self._submit = submit
        self._emit = emit
        self._log = log
        self._changed = changed
        self._line = FairPool(lambda: 1, lambda vm: 1, self._ask)
        self._lock = threading.Lock()
        self._requests = {}
        self._pauses = {}
        self._withdrawn = {}
        self._question = None
        #: (vm, cid, since in seconds since the epoch) of the question that is open now; None while there is none.
        self.open = None

    def check(self, request):
        """See, before a request is claimed, whether it can be asked about.

        Args:
            request: pullrpc.gate.Request

        Raises:
            Refused: its VM has to pause, or the question would be too long.
        """
        text_of(request, describe_account(self._dom0.config.for_vm(request.vm).run_as), self._dom0.config.ask_timeout)
        left = self._pause_left(request.vm)
        if left > 0:
            raise _refused_before(left)

    def submit(self, request):
        """Put a claimed command at the end of its VM's line.

        Args:
            request: pullrpc.gate.Request

        Returns:
            bool, False when the line is closed.

        Raises:
            ThreadError: there is no thread to ask with, and none can be started.
        """
        with self._lock:
            self._requests[request.vm, request.cid] = request
        is_in_line = False
        try:
            is_in_line = self._line.submit(request.vm, request.cid)
        finally:
            if not is_in_line:
                with self._lock:
                    del self._requests[request.vm, request.cid]
        return is_in_line

    def withdraw(self, vm, cid):
        """Take a command out of the line, and its question back.

        Returns:
            bool, whether it was there: it will not be handed on.
        """
        with self._lock:
            if self._requests.pop((vm, cid), None) is None:
                return False
            question = self._question if self.open and self.open[:2] == (vm, cid) else None
        if question is not None:
            question.withdraw()
        else:
            self._line.withdraw(vm, cid)
        return True

    def waiting(self, vm):
        """How many of a VM's commands are not answered yet.

        Returns:
            int
        """
        with self._lock:
            return sum(1 for one, _ in self._requests if one == vm)

    def holds(self, vm):
        """Say whether any of a VM's commands is not answered yet, or not handed on.

        Args:
            vm: str.

        Returns:
            bool
        """
        with self._lock:
            return any(one == vm for one, _ in self._requests) or bool(self.open and self.open[0] == vm)

    def close(self):
        """Ask nothing any more.

        Returns:
            list of (vm, cid), what was not answered.
        """
        self._line.close()
        with self._lock:
            left, self._requests = list(self._requests), {}
            question = self._question
        if question is not None:
            question.withdraw()
        return left

    def _ask(self, vm, cid):
        with self._lock:
            request = self._requests.get((vm, cid))
            question = Question(self._dom0.config.ask_helper, vm, cid, self._dom0.config.ask_timeout)
            if request is not None:
                self._question, self.open = question, (vm, cid, time.time())
        if request is None:
            return
        # The answer is for this user; who it would be by then is not asked about.
        run_as = self._dom0.config.for_vm(vm).run_as
        try:
            answer, text = self._put(request, question, run_as)
        except Exception as err:  # noqa: BLE001 - whatever it is, the answer is no, and the next one is asked
            answer, text = Answer(FAILED, str(err)), None
        if answer.why:
            self._log(f"{vm}: {cid}: dom0's user could not be asked: {answer.why}")
        with self._lock:
            is_wanted = self._requests.pop((vm, cid), None) is not None
        if is_wanted and answer.word != WITHDRAWN:
            self._dom0.execution.answer(request, answer.word, text or _REASONS[answer.word], run_as)
            self._submit(vm, cid)
        with self._lock:
            # Only now: until it has been handed on it counts as here.
            self._question = self.open = None
        self._changed()

    def _put(self, request, question, run_as):
        """Ask, unless the VM has been told no meanwhile.

        Returns:
            (Answer, str): the answer, and what the VM is to hear if that is not its usual text; else None.
        """
        left = self._pause_left(request.vm)
        if left > 0:
            return Answer(NO), str(_refused_before(left))
        self._changed()
        began = time.monotonic()
        text = text_of(request, describe_account(run_as), self._dom0.config.ask_timeout)
        audit = self._dom0.audit
        try:
            audit.write("asked", request.vm, request.cid, by=describe_rule(request.by))
            self._emit(request.vm, request.cid, "asked", {})
            answer = question.ask(text)
            audit.write("answered", request.vm, request.cid, sync=True, answer=answer.word, seconds=round(time.monotonic() - began, 3))
        except AuditError as err:
            return Answer(FAILED, str(err)), None
        self._emit(request.vm, request.cid, "answered", {"answer": answer.word})
        self._note(request.vm, answer.word)
        return answer, None

    def _note(self, vm, word):
        with self._lock:
            count = self._withdrawn.pop(vm, 0) + 1
            if word == WITHDRAWN:
                self._withdrawn[vm] = count
            if word == YES:
                self._pauses.pop(vm, None)
            elif word != WITHDRAWN or count >= _WITHDRAWN_MAX:
                _, length = self._pauses.get(vm, (0.0, _PAUSE_FIRST / 2))
                length = min(length * 2, _PAUSE_MAX)
                self._pauses[vm] = (time.monotonic() + length, length)

    def _pause_left(self, vm):
        with self._lock:
            return self._pauses.get(vm, (0.0, 0.0))[0] - time.monotonic()


_REASONS = {
    YES: "dom0's user said yes",
    NO: "dom0's user was asked and said no",
    TIMEOUT: "dom0's user was asked and did not answer in time",
    FAILED: "dom0's user would have to be asked, which failed; in dom0, /var/log/qvm-remote/minion.log says why",
}


def _refused_before(left):
    return Refused("asked", f"dom0's user was just asked for this qube, and did not say yes; dom0 asks again in {left:.0f} s at the earliest")
