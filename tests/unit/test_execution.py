# SPDX-License-Identifier: GPL-2.0-or-later
"""A command that was claimed runs only as it was signed: what dom0 has kept of it is believed no more than what came from the VM."""

import os

import pytest
from pullrpc import execution, sandbox
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import Refused
from pullrpc.ids import new_cid
from pullrpc.spool import COMMAND, OUT, TOKEN
from pullrpc.tokens import make_token


@pytest.fixture
def dom0(tmp_path):
    """dom0's side with a key for work and one for dev, everything in a folder of this test."""
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "audit.log"}
    one = Dom0(make_config({**{name: str(tmp_path / folder) for name, folder in names.items()}, "syslog": False}))
    for vm in ("work", "dev"):
        one.keyring.put(vm, os.urandom(32).hex())
    yield one
    sandbox.close_idle()


def _token(dom0, cid, line, vm="work", timeout=60, form="shell"):
    return make_token(dom0.keyring.get(vm), vm, cid, timeout, form, line)


def _put(dom0, cid, part, data):
    with open(dom0.spool.path("work", cid, part), "wb") as file:
        file.write(data)


def _change_the_command(dom0, cid, line, other):
    _put(dom0, cid, COMMAND, other)


def _put_another_request_there(dom0, cid, line, other):
    _put(dom0, cid, COMMAND, other)
    _put(dom0, cid, TOKEN, _token(dom0, new_cid(), other))


def _put_another_vms_there(dom0, cid, line, other):
    _put(dom0, cid, COMMAND, other)
    _put(dom0, cid, TOKEN, _token(dom0, cid, other, vm="dev"))


def _prolong_it(dom0, cid, line, other):
    token = dom0.spool.load_request("work", cid, 1 << 16, 256)[1]
    changed = token.replace(b" 60 ", b" 99 ")
    assert changed != token
    _put(dom0, cid, TOKEN, changed)


def _change_the_key(dom0, cid, line, other):
    dom0.keyring.put("work", os.urandom(32).hex())


@pytest.mark.parametrize("change", [_change_the_command, _put_another_request_there, _put_another_vms_there, _prolong_it, _change_the_key])
def test_what_is_not_as_it_was_signed_when_its_turn_comes_is_not_run(dom0, tmp_path, change):
    cid, line, other = new_cid(), f"touch {tmp_path}/ran".encode(), f"touch {tmp_path}/ran-other".encode()
    request = dom0.intake.admit("work", cid.encode(), line, _token(dom0, cid, line), -1)
    assert dom0.intake.claim([(request, 0)]) == {}
    change(dom0, cid, line, other)
    assert dom0.execution.execute("work", cid)["status"] == "refused"
    parts = dom0.results.result("work", cid).parts
    assert b"the token does not fit" in b"".join(parts["err"][1](0))
    assert not list(tmp_path.glob("ran*"))


def test_what_is_as_it_was_signed_runs(dom0, tmp_path):
    cid, line = new_cid(), f"touch {tmp_path}/ran".encode()
    request = dom0.intake.admit("work", cid.encode(), line, _token(dom0, cid, line), -1)
    assert dom0.intake.claim([(request, 0)]) == {}
    assert dom0.execution.execute("work", cid)["status"] == "done"
    assert (tmp_path / "ran").exists()


def test_who_refuses_a_command_that_another_one_has_begun_meanwhile_leaves_its_output_alone(dom0, monkeypatch):
    cid, line = new_cid(), b"true"
    request = dom0.intake.admit("work", cid.encode(), line, _token(dom0, cid, line), -1)
    assert dom0.intake.claim([(request, 0)]) == {}

    def refuse(*_):
        # The other caller has looked at it before the rules were changed.
        assert dom0.ledger.start("work", cid)
        _put(dom0, cid, OUT, b"of the other one")
        raise Refused("policy", "not any more")

    monkeypatch.setattr(execution, "check_policy", refuse)
    with pytest.raises(Refused) as caught:
        dom0.execution.execute("work", cid)
    assert caught.value.code == "replay"
    assert dom0.ledger.state("work", cid)[0] == "running"
    assert b"".join(dom0.spool.chunks("work", cid, OUT)) == b"of the other one"
