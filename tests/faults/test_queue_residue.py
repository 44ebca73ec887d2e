# SPDX-License-Identifier: GPL-2.0-or-later
"""What dead clients leave in a VM's queue goes, and what a client says when it gives up is true."""

import fcntl
import hashlib
import os
import time

import pytest
from pullrpc.ids import new_cid
from pullrpc.layout import Queue
from pullrpc.tokens import make_meta
from qvm_remote_client import request as requests
from qvm_remote_client.agent import Agent

_LIMITS = {"limits": {"timeout_max": 300}}


@pytest.fixture
def queue(tmp_path):
    """A queue with a key."""
    one = Queue(str(tmp_path / "base"))
    one.make_folders()
    with open(os.open(one.key, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as file:
        file.write(bytes(range(32)).hex())
    return one


def _put(path, age=0):
    with open(path, "wb") as file:
        file.write(b"x")
    os.utime(path, (time.time() - age,) * 2)


def _result(cid, text=b"out"):
    return {"id": cid, "inline": 1, "out": len(text), "err": 0, "meta": 0, "exit": 0}, text


def test_parts_of_a_request_whose_client_was_killed_before_it_was_whole_go_after_a_day(queue):
    alone, whole, taken, young = (new_cid() for _ in range(4))
    for cid in (alone, whole, taken):
        for part in (".auth", ".in"):
            _put(queue.pending(cid + part), 2 * 86400)
    _put(queue.pending(whole), 2 * 86400)
    _put(queue.running(taken))
    _put(queue.pending(f"{young}.auth"))
    Agent(queue)._hello(_LIMITS, b"")
    kept = {whole, f"{whole}.auth", f"{whole}.in", f"{taken}.auth", f"{taken}.in", f"{young}.auth"}
    assert set(os.listdir(queue.pending())) == kept


def test_a_result_that_comes_again_is_not_stored_again(queue):
    cid = new_cid()
    _put(queue.running(cid))
    agent = Agent(queue)
    agent._result(*_result(cid))
    assert sorted(os.listdir(queue.results())) == [f"{cid}.{part}" for part in ("err", "exit", "meta", "out")]
    # Its client takes it, and dom0, which was killed, says it once more.
    for name in os.listdir(queue.results()):
        os.unlink(queue.results(name))
    agent._result(*_result(cid))
    assert os.listdir(queue.results()) == []


def test_a_result_that_comes_again_since_the_agent_was_killed_as_it_stored_it_is_not_kept_for_nobody(queue, monkeypatch):
    request = requests.Request(queue, "shell", b"true", 5)
    request.submit()
    os.rename(queue.pending(request.cid), queue.running(request.cid))
    digests = [hashlib.sha256(data).digest() for data in (b"out", b"")]
    meta = make_meta(bytes(range(32)), request.cid, *digests, {"id": request.cid, "exit": 0, "status": "done"})
    answer = {"id": request.cid, "inline": 1, "out": 3, "err": 0, "meta": len(meta), "exit": 0}, b"out" + meta
    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        # All of it is there by then; that the request is done with is not noted yet.
        dying.setattr(Agent, "_forget_request", _die)
        Agent(queue)._result(*answer)
    result = request.wait(lambda word: None, lambda part, data: None)
    assert (result.exit_code, result.authentic) == (0, True)
    request.keep()
    Agent(queue)._result(*answer)
    assert [names for _, _, names in os.walk(os.path.dirname(queue.pending().rstrip("/"))) if names] == []


def _die(*_):
    raise KeyboardInterrupt


def test_the_bell_of_a_client_that_was_killed_goes_with_its_result(queue):
    cid = new_cid()
    _put(queue.running(cid))
    os.mkfifo(queue.bell(cid))
    Agent(queue)._result(*_result(cid))
    assert not os.path.lexists(queue.bell(cid))
    assert os.path.exists(queue.results(f"{cid}.exit"))


def test_a_client_that_takes_its_request_back_says_that_it_does_not_run_only_if_that_is_so(queue):
    def give_up():
        request = requests.Request(queue, "shell", b"true", 5)
        request.submit()
        with pytest.raises(requests.NoResult) as caught:
            request._check_patience(False, 31.0, 31.0)
        assert not os.path.exists(queue.pending(request.cid))
        return str(caught.value)

    assert "does not run any more" in give_up()
    with open(queue.agent_lock, "w", encoding="ascii") as agent:
        fcntl.flock(agent, fcntl.LOCK_SH)
        assert "may have run" in give_up()


def test_a_client_that_says_how_long_it_waits_waits_no_shorter_without_dom0(queue):
    request = requests.Request(queue, "ping", b"ping", 5, patience=900)
    request.submit()
    for taken in (False, True):
        request._check_patience(taken, 899.0, 899.0)
    with pytest.raises(requests.NoAnswer):
        request._check_patience(False, 901.0, 901.0)
    assert not os.path.exists(queue.pending(request.cid))
