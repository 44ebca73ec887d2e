# SPDX-License-Identifier: GPL-2.0-or-later
"""The pieces of a running command's output: in order, none missing, and the same ones again after a session broke."""

from hypothesis import given
from hypothesis import strategies as st
from pullrpc.frames import PAYLOAD_MAX
from pullrpc.outflow import PARTS, Outflow

_STEPS = st.lists(st.one_of(st.tuples(st.integers(0, 2 * PAYLOAD_MAX), st.integers(0, PAYLOAD_MAX)), st.sampled_from(["send", "answer", "break", "back"])))


class _Vm:
    """What the VM has of each part, and the pieces it saw."""

    def __init__(self):
        self.has = dict.fromkeys(PARTS, 0)
        self.seen = []

    def take(self, piece):
        if piece.seq < len(self.seen):
            assert self.seen[piece.seq] == piece
        else:
            assert piece.seq == len(self.seen)
            assert piece.offset == self.has[piece.part]
            self.seen.append(piece)
            self.has[piece.part] += piece.size


@given(_STEPS)
def test_every_piece_comes_once_in_order_or_again_as_it_was(steps):
    outflow, vm = Outflow(), _Vm()
    written = dict.fromkeys(PARTS, 0)
    on_way = 0
    for step in steps:
        if isinstance(step, tuple):
            written = {part: written[part] + more for part, more in zip(PARTS, step)}
            outflow.wrote(written["out"], written["err"])
        elif step == "answer" and on_way:
            outflow.answered()
            on_way -= 1
        elif step == "break":
            outflow.rewind()
            on_way = 0
        elif step in ("send", "back"):
            piece = outflow.next()
            if piece is None:
                continue
            if step == "back":
                outflow.put_back()
                continue
            assert 0 < piece.size <= PAYLOAD_MAX
            vm.take(piece)
            on_way += 1
            assert on_way <= 4
        sent = outflow.sent()
        # What a result goes on from is what the VM has, or will have: never more.
        assert all(size <= vm.has[part] for part, size in sent.items())
        assert all(size <= written[part] for part, size in sent.items())


def test_all_of_it_gets_through():
    outflow, vm = Outflow(), _Vm()
    outflow.wrote(3 * PAYLOAD_MAX + 1, 5)
    while (piece := outflow.next()) is not None:
        vm.take(piece)
        outflow.answered()
    assert vm.has == outflow.sent() == {"out": 3 * PAYLOAD_MAX + 1, "err": 5}


def test_nothing_is_gone_on_from_once_it_was_stopped():
    outflow = Outflow()
    outflow.wrote(10, 0)
    outflow.next()
    assert outflow.sent() == {"out": 10, "err": 0}
    outflow.stopped = True
    assert outflow.next() is None
    assert outflow.sent() == {}
