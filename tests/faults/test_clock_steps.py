# SPDX-License-Identifier: GPL-2.0-or-later
"""Clocks that are wrong, and clocks that are set: what is too old or too new is refused with the reason, nothing runs a second time,
and what runs goes on. See "Clocks" in docs/security.rst.

Nobody but the kernel has a clock here, so dom0's service and the VM's client are given another one within their own processes.
"""

import hashlib
import os
import time

import pytest
from fault_stand import FaultStand, check_end
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import Refused
from pullrpc.ids import new_cid
from pullrpc.tokens import make_token

KEY = bytes(range(32))
#: Runs the client with another clock: it makes ids by it.
_OTHER_CLOCK = """
import os, sys, time
real = time.time
time.time = lambda: real() + float(sys.argv[1])
sys.path.insert(0, "/usr/lib/qvm-remote")
from qvm_remote_client.main import main
os._exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """The service, which takes ids of the last minute, with a ledger that is older than that, and a VM."""
    with FaultStand(str(tmp_path_factory.mktemp("faults")), ("work",)) as one:
        one.set_up()
        one.service.order("age-ledger")
        one.service.wait_for("aged")
        yield one


@pytest.fixture
def clock(stand):
    """Sets the service's clock; it is right again afterwards."""

    def set_clock(seconds):
        stand.service.order(f"clock {seconds}")
        stand.service.wait_for("clock")

    yield set_clock
    set_clock(0)


def _remote(stand, name, offset=0):
    through = ["/usr/bin/python3", "-IS", "-c", _OTHER_CLOCK, str(offset)] if offset else []
    stand.clients["work"].start(name, "short", through=through)
    return stand.clients["work"].wait_ended([name])[name]


def _check_refused(stand, end, text):
    assert end.code == 125
    assert text in end.err
    assert "check the clocks and send it again" in end.err
    check_end(end, stand.wait_settled().get(end.cid, []))


@pytest.mark.parametrize("offset", [-40, 40])
def test_a_vm_whose_clock_is_a_little_wrong_is_served(stand, offset):
    assert _remote(stand, f"little {offset}", offset).code == 7


@pytest.mark.parametrize(("offset", "text"), [(-100, "s old"), (100, "s ahead of dom0's clock")])
def test_a_vm_whose_clock_is_wrong_is_refused_and_told_by_how_much(stand, offset, text):
    _check_refused(stand, _remote(stand, f"wrong {offset}", offset), text)


@pytest.mark.parametrize(("step", "text"), [(100, "s old"), (-100, "s ahead of dom0's clock")])
def test_a_step_of_dom0s_clock_stops_what_is_new_and_nothing_that_runs(stand, clock, step, text):
    stand.service.hold("started")
    stand.clients["work"].start(f"runs {step}", "beats")
    stand.service.wait_for("at started")
    clock(step)
    stand.service.order("go")
    assert stand.clients["work"].wait_ended([f"runs {step}"])[f"runs {step}"].code == 7
    _check_refused(stand, _remote(stand, f"new {step}"), text)
    clock(0)
    assert _remote(stand, f"mended {step}").code == 7


@pytest.fixture
def dom0(tmp_path):
    """dom0's side, whose ledger is a year old."""
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "audit.log"}
    one = Dom0(make_config({**{name: str(tmp_path / folder) for name, folder in names.items()}, "syslog": False}))
    one.keyring.put("work", KEY.hex())
    one.ledger._db.execute("UPDATE forgotten SET before = before - 31536000")
    return one


@pytest.fixture
def step(monkeypatch):
    """Sets the clock of this process."""
    real = time.time

    def set_clock(seconds):
        monkeypatch.setattr(time, "time", lambda: real() + seconds)

    return set_clock


def _request():
    cid = new_cid()
    return "work", cid.encode("ascii"), b"ping", make_token(KEY, "work", cid, 10, "ping", b"ping")


def _run(dom0, request):
    assert dom0.intake.claim([(dom0.intake.admit(*request, -1), 0)]) == {}
    return dom0.execution.execute("work", request[1].decode())


@pytest.mark.parametrize("ahead", [100, 3600, 200 * 86400])
def test_nothing_is_run_again_when_a_clock_that_ran_ahead_is_set_back(dom0, step, ahead):
    request = _request()
    _run(dom0, request)
    dom0.results.close_delivery("work", request[1].decode())
    step(ahead)
    # An engine starts, and forgets what is old by that clock.
    dom0.execution.recover()
    step(0)
    with pytest.raises(Refused) as caught:
        dom0.intake.verify(*request)
    assert caught.value.code == "replay"


def test_a_result_is_given_up_by_dom0s_clock_and_never_before_its_time_by_one_that_was_set_back(dom0, step):
    request = _request()
    cid = request[1].decode()
    _run(dom0, request)
    step(-100 * 86400)
    assert dom0.results.expire("work") == ([cid], [])
    step(dom0.config.spool_max_age + 60)
    assert dom0.results.expire("work") == ([cid], [cid])


def _told(dom0, cid):
    return b"".join(dom0.results.result("work", cid).parts["err"][1](0)).decode()


def test_results_of_a_vm_that_does_not_come_back_are_given_up_and_it_is_told_whenever_it_does(dom0, step):
    request = _request()
    cid = request[1].decode()
    _run(dom0, request)
    step(dom0.config.spool_max_age + 60)
    dom0.execution.recover()
    assert not os.path.exists(dom0.spool.path("work", cid))
    assert "(exit code 0), but its result waited too long" in _told(dom0, cid)
    step(dom0.config.ledger_keep_days * 86400)
    dom0.execution.recover()
    assert dom0.ledger.counts() == {"done": 1}
    # Ids are remembered for no longer, either.
    step(dom0.config.spool_max_age + dom0.config.ledger_keep_days * 86400 + 120)
    dom0.results.expire_all()
    assert dom0.ledger.counts() == {"delivered": 1}


def test_a_clock_that_leaps_ahead_for_a_moment_leaves_no_client_without_an_answer(dom0, step):
    request = _request()
    cid = request[1].decode()
    _run(dom0, request)
    step(1000 * 86400)
    for _ in range(3):
        dom0.results.expire_all()
    step(0)
    dom0.execution.recover()
    assert "its result waited too long" in _told(dom0, cid)


def test_a_request_grows_old_while_its_stdin_is_fetched(dom0, step):
    cid, stdin = new_cid(), hashlib.sha256(b"stdin")
    request = "work", cid.encode("ascii"), b"cat", make_token(KEY, "work", cid, 10, "shell", b"cat", stdin.digest())
    admitted = dom0.intake.admit(*request, 5)
    writer = dom0.intake.stdin_writer(admitted)
    writer.write(b"stdin")
    step(dom0.config.max_age + 5)
    dom0.intake.end_stdin(admitted, writer)
    other = dom0.intake.admit(*_request(), -1)
    refused = dom0.intake.claim([(admitted, 5), (other, 0)])
    assert {name: err.code for name, err in refused.items()} == {cid: "stale"}
    assert dom0.ledger.counts() == {"claimed": 1}
    assert not os.path.exists(dom0.spool.path("work", cid))


def test_a_vm_that_takes_no_results_is_refused_more_before_they_are_many(dom0):
    """The same whatever it may run: a ping runs nothing, and leaves something all the same."""
    most = 16 * dom0.config.vm_queue
    for number in range(most):
        os.makedirs(dom0.spool.path("work", f"20260101-000000-1-{number:08x}"))
    with pytest.raises(Refused, match="too many unfinished commands and results") as caught:
        dom0.intake.admit(*_request(), -1)
    assert caught.value.code == "room"
    os.rmdir(dom0.spool.path("work", "20260101-000000-1-00000000"))
    dom0.spool._counted.clear()
    dom0.intake.admit(*_request(), -1)
    with pytest.raises(Refused, match="too many unfinished commands and results"):
        dom0.intake.admit(*_request(), -1)


def test_commands_that_were_delivered_take_no_room(dom0):
    for _ in range(16 * dom0.config.vm_queue + 5):
        dom0.intake.dismiss(dom0.intake.admit(*_request(), -1))


def test_a_ledger_made_by_a_clock_that_ran_ahead_takes_nothing_and_says_so(dom0, step):
    dom0._close_ledger()
    step(86400)
    dom0.renew_ledger()
    assert dom0.ledger.counts() == {}
    step(0)
    with pytest.raises(Refused) as caught:
        dom0.intake.verify(*_request())
    assert caught.value.code == "replay"
    assert dom0.ledger_ahead() > 86000
    dom0.renew_ledger()
    assert dom0.ledger_ahead() == 0
