# SPDX-License-Identifier: GPL-2.0-or-later
"""How the agent goes through its queue: a bounded number of names at a time, however many there are, and it reaches each of them."""

import os
import stat
import subprocess

import pytest
from pullrpc import agentless
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


def _device(path):
    """A device that may be read without end; whose folder's user is root can have one lie anywhere."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root may make a device here")


@pytest.mark.parametrize("suffix", ["", ".auth", ".in"])
def test_a_device_in_the_queue_is_never_read(agent, monkeypatch, suffix):
    cid = new_cid()
    for part in {"", ".auth", ".in"} - {suffix}:
        _touch(agent.pending(cid + part))
    _device(agent.pending(cid + suffix))
    opened = []
    monkeypatch.setattr(module.os, "open", lambda path, *args, real=os.open, **kwargs: opened.append(path) or real(path, *args, **kwargs))
    found, _ = agent._scan(24, 0)
    described, payload = agent._describe(found, [], 1 << 16)
    assert payload == b""
    # One in the command's place is no request; beside it, it is told as none, and nobody asks for it.
    sizes = [item[1:4] for item in described["items"]]
    assert sizes == {"": [], ".auth": [[0, -1, 0]], ".in": [[0, 0, -1]]}[suffix]
    assert [path for path in opened if str(path).endswith(cid + suffix)] == []
    left = agent._queue.rejected() if suffix == "" else agent.pending()
    assert [name for name in os.listdir(left) if stat.S_ISCHR(os.lstat(os.path.join(left, name)).st_mode)]


@pytest.mark.parametrize("suffix", ["", ".auth", ".in"])
def test_without_the_agent_too_a_device_in_the_queue_is_never_read(tmp_path, suffix):
    queue = Queue(str(tmp_path / ".qvm-remote"))
    queue.make_folders()
    cid = new_cid()
    for part in {"", ".auth", ".in"} - {suffix}:
        _touch(queue.pending(cid + part))
    _device(queue.pending(cid + suffix))
    script = f"{agentless._BEGIN}set -- 24 65536\n{agentless._LIST}"
    # A shell that reads it is ended with those that it has started.
    words = ["timeout", "30", "/bin/sh", "-s"]
    done = subprocess.run(words, input=script.encode(), env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, check=True)
    sizes = {"": [], ".auth": [f"I {cid} 0 -1 0"], ".in": [f"I {cid} 0 0 -1"]}[suffix]
    assert [line for line in done.stdout.decode().splitlines() if line.startswith("I ")] == sizes
