# SPDX-License-Identifier: GPL-2.0-or-later
"""How the agent goes through its queue: a bounded number of names at a time, however many there are, and it reaches each of them."""

import os

import pytest
from pullrpc.ids import new_cid
from pullrpc.layout import Queue
from qvm_remote_client import agent as module
from qvm_remote_client.agent import Agent


class _Counted:
    """A listing of a folder that counts what is taken from it."""

    scandir = staticmethod(os.scandir)
    taken = 0

    def __init__(self, path):
        self._entries = self.scandir(path)

    def __iter__(self):
        return self

    def __next__(self):
        entry = next(self._entries)
        _Counted.taken += 1
        return entry

    def close(self):
        self._entries.close()


@pytest.fixture
def agent(tmp_path, monkeypatch):
    queue = Queue(str(tmp_path / ".qvm-remote"))
    queue.make_folders()
    pipe = os.pipe()
    one = Agent(queue, *pipe)
    one.pending = queue.pending
    monkeypatch.setattr(module.os, "scandir", _Counted)
    yield one
    for fd in pipe:
        os.close(fd)


def _touch(path):
    os.close(os.open(path, os.O_CREAT, 0o600))


def _scan(agent):
    """One step: (commands found, names looked at)."""
    _Counted.taken = 0
    return agent._scan(24, 0)[0], _Counted.taken


def test_a_step_looks_at_a_bounded_number_of_names_and_some_steps_at_all(agent):
    # Names that stay: the temporary files of others, and tokens without a command.
    for number in range(5000):
        _touch(agent.pending(f".half-written-{number}"))
        _touch(agent.pending(f"{new_cid()}.auth"))
    _touch(agent.pending(cid := new_cid()))
    for _ in range(2):
        found = []
        for _ in range(3):
            commands, taken = _scan(agent)
            assert taken <= module._NAMES_MAX
            found += commands
        # All of it was gone through, and it begins anew.
        assert found == [cid]
        assert agent._names is None


def test_a_step_answers_a_bounded_number_of_names_that_are_no_id(agent):
    for number in range(200):
        _touch(agent.pending(f"no id {number}"))
    left = []
    while os.listdir(agent.pending()):
        _scan(agent)
        left.append(len(os.listdir(agent.pending())))
        assert len(left) < 10
    assert left[0] == 200 - module._REJECTS_MAX


def test_of_what_is_put_aside_a_bounded_number_is_kept(agent, monkeypatch):
    monkeypatch.setattr(module, "_REJECTED_KEPT", 10)
    for number in range(50):
        _touch(agent.pending(f"no id {number}"))
    _scan(agent)
    assert os.listdir(agent.pending()) == []
    assert len(os.listdir(agent._queue.rejected())) == 10
    assert len(os.listdir(agent._queue.results())) == 20
