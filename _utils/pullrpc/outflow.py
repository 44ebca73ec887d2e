# SPDX-License-Identifier: GPL-2.0-or-later
"""What a running command has written, on its way to the VM: which piece comes next, and what the VM has for certain."""

from __future__ import annotations

import collections
import dataclasses

from .frames import PAYLOAD_MAX

#: Pieces of one command that are on their way at once.
_WINDOW = 4
PARTS = ("out", "err")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a command's output: ``seq`` pieces of both parts lie before it, ``offset`` bytes of its own ``part``."""

    seq: int
    part: str
    offset: int
    size: int


class Outflow:
    """The output of one command."""

    def __init__(self):
        self._written = dict.fromkeys(PARTS, 0)
        self._sent = dict.fromkeys(PARTS, 0)
        self._seq = 0
        self._unanswered = collections.deque()
        self._again = collections.deque()
        #: Set when the VM can't take it, or nobody waits for it.
        self.stopped = False

    def wrote(self, out, err):
        """Note how much there is now.

        Args:
            out, err: int, bytes of stdout and of stderr.
        """
        self._written = {"out": out, "err": err}

    def next(self):
        """Say what to send, and take it as sent.

        Returns:
            Piece; None when there is nothing, or enough is on its way.
        """
        if self.stopped or len(self._unanswered) >= _WINDOW:
            return None
        piece = self._again.popleft() if self._again else self._new_piece()
        if piece is not None:
            self._unanswered.append(piece)
        return piece

    def put_back(self):
        """What :meth:`next` said last can't be sent now after all."""
        self._again.appendleft(self._unanswered.pop())

    def answered(self):
        """Note that the VM has the oldest piece that is on its way."""
        if self._unanswered:
            self._unanswered.popleft()

    def rewind(self):
        """The session is another one: what had no answer is sent again, piece by piece as it was, so that the proofs fit."""
        self._again = collections.deque([*self._unanswered, *self._again])
        self._unanswered.clear()

    def sent(self):
        """How far the VM is, once what is on its way has arrived.

        Returns:
            dict of part to bytes; empty when it has nothing that can be gone on from.
        """
        if self.stopped or not self._seq:
            return {}
        reached = dict(self._sent)
        for piece in self._again:
            reached[piece.part] = min(reached[piece.part], piece.offset)
        return reached

    def _new_piece(self):
        # The part that is less far behind waits, so that neither is starved by the other.
        part = max(PARTS, key=lambda part: self._written[part] - self._sent[part])
        size = min(PAYLOAD_MAX, self._written[part] - self._sent[part])
        if size <= 0:
            return None
        piece = Piece(self._seq, part, self._sent[part], size)
        self._seq += 1
        self._sent[part] += size
        return piece
