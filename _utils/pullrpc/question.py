# SPDX-License-Identifier: GPL-2.0-or-later
"""One question to dom0's user: may this VM have this run? The text shows all of it, escaped; silence, failure and doubt mean no.

A helper program shows it: its stdin is the text, and only exit code 0 together with the one word ``yes`` on stdout means yes,
so that a helper that ends without having asked (a wrong option, a missing screen) never does.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading

from .errors import Refused
from .helper import Helper, why_it_failed

YES, NO, TIMEOUT, FAILED, WITHDRAWN = "yes", "no", "timeout", "failed", "withdrawn"
#: Nobody reads more than that before they answer, bytes; also less than a pipe holds, so that writing it never waits.
TEXT_MAX = 32768
_EXIT_NO = 1
#: What a word may consist of to be shown as it is.
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./^-]+\Z")


def text_of(request, as_whom, timeout):
    """Write down what is asked: printable ASCII, from which the exact words can be read.

    Args:
        request: pullrpc.gate.Request, allowed if the user says so.
        as_whom: str, the user of dom0 as whom it would run.
        timeout: int, seconds that there are to answer.

    Returns:
        str

    Raises:
        Refused: it is too long to be read by a person (code ``question``).
    """
    steps = request.steps or ((1, request.argv),)
    stdin = f"yes, with the SHA-256 {request.stdin_digest.hex()}" if request.stdin_digest else "none"
    lines = [
        f"The qube {request.vm} asks dom0 to run, as {as_whom}, {'this' if len(steps) == 1 else f'these {len(steps)} commands, one after the other'}:",
        "",
        *(f"{at:5}  {' '.join(map(_shown, argv))}" for at, (_, argv) in enumerate(steps, 1)),
        "",
        'Words in double quotes are one word each; \\" and \\u1234 in them stand for one character each. No shell reads them.',
        f"stdin: {stdin}; time limit: {request.timeout} s",
        f"asked because of the rule: {_ascii(request.by)}",
        f"request: {request.cid}; without an answer within {timeout} s it is refused",
    ]
    text = "\n".join(lines) + "\n"
    if len(text) > TEXT_MAX:
        raise Refused("question", f"dom0's user would be asked about this, and it is too long to be read ({len(text)} characters, at most {TEXT_MAX}); send less at once")
    return text


def _shown(word):
    return word if _PLAIN.match(word) else json.dumps(word).replace("\x7f", "\\u007f")


def _ascii(text):
    return text.encode("ascii", "backslashreplace").decode("ascii")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        word: str: yes, no, timeout, failed or withdrawn.
        why: str, for dom0's log: what was wrong with the helper; empty if nothing was.
    """

    word: str
    why: str = ""


class Question:
    """A question that is being asked.

    Args:
        helper: str, a program's path, or ``screen``.
        vm, cid: str, checked.
        timeout: int, seconds.
    """

    def __init__(self, helper, vm, cid, timeout):
        self._helper = Helper(helper, "ask_on_screen", {"QVM_REMOTE_VM": vm, "QVM_REMOTE_ID": cid, "QVM_REMOTE_ASK_TIMEOUT": str(timeout)})
        self._timeout = timeout
        self._withdrawn = False
        self._lock = threading.Lock()

    def ask(self, text):
        """Put it, and wait for the answer.

        Args:
            text: str, as :func:`text_of` makes it.

        Returns:
            Answer
        """
        try:
            with self._lock:
                if self._withdrawn:
                    return Answer(WITHDRAWN)
                self._helper.start()
        except OSError as err:
            return Answer(FAILED, f"{self._helper.argv[0]}: {err.strerror}")
        ended = self._helper.finish(text, self._timeout)
        if ended is None:
            return Answer(TIMEOUT)
        code, said, complaint = ended
        with self._lock:
            if self._withdrawn:
                return Answer(WITHDRAWN)
        if code == 0 and said.strip() == b"yes":
            return Answer(YES)
        return Answer(NO) if code == _EXIT_NO else Answer(FAILED, why_it_failed(code, complaint))

    def withdraw(self):
        """Take it back: nobody waits for the answer any more."""
        with self._lock:
            self._withdrawn = True
            self._helper.tell_to_end()
