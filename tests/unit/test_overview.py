# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of the audit log, and the figures of the status that are made of it."""

import os

import pytest
from pullrpc import audit_tail, note
from pullrpc.audit import AuditLog
from pullrpc.audit_tail import follow, recent
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.ids import new_cid
from pullrpc.ledger import Ledger
from pullrpc.overview import overview


def _dom0(tmp_path, **more):
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "log/audit.log"}
    return Dom0(make_config({**{name: str(tmp_path / folder) for name, folder in names.items()}, "syslog": False, **more}))


def _run(log, vm, seconds, status="done", command="true"):
    cid = new_cid()
    log.write("accepted", vm, cid, command=command)
    log.write("ended", vm, cid, status=status, seconds=seconds)
    return cid


def test_recent_reads_a_bounded_end_and_goes_on_into_the_file_before(tmp_path, monkeypatch):
    path = str(tmp_path / "audit.log")
    assert recent(path) == []
    log = AuditLog(path)
    for number in range(40):
        log.write("accepted", "work", number=number)
    os.rename(path, f"{path}.1")
    log.write("accepted", "work", number=40)
    assert [line["number"] for line in recent(path)] == list(range(41))
    monkeypatch.setattr(audit_tail, "_RECENT", 1000)
    numbers = [line["number"] for line in recent(path)]
    assert 2 < len(numbers) < 10
    assert numbers == list(range(41 - len(numbers), 41))


def test_follow_begins_with_old_lines_of_that_vm_and_misses_none_at_a_rotation(tmp_path):
    path = str(tmp_path / "audit.log")
    log = AuditLog(path)
    for number in range(6):
        log.write("accepted", ("work", "dev")[number % 2], number=number)

    def steps():
        # What happens each time that there is nothing new.
        log.write("accepted", "work", number=6)
        yield
        os.rename(path, f"{path}.1")
        yield
        log.write("accepted", "dev", number=7)
        log.write("accepted", "work", number=8, text="\x1b[2J\u202e")
        yield

    happening = steps()
    told = []
    try:
        for line in follow(path, 2, lambda: next(happening), "work"):
            told.append(line)
    except RuntimeError:
        # The story has ended.
        assert next(happening, None) is None
    assert [line["number"] for line in told] == [2, 4, 6, 8]
    assert told[-1]["text"] == "\\x1b[2J\\u202e"


def test_follow_waits_for_a_log_that_is_not_there_and_for_the_rest_of_a_line(tmp_path):
    path = str(tmp_path / "audit.log")
    lines = []

    def steps():
        AuditLog(path).write("accepted", "work", number=1)
        yield
        with open(path, "rb") as file:
            lines.append(file.read())
        with open(path, "ab") as file:
            file.write(lines[0][:20])
        yield
        with open(path, "ab") as file:
            file.write(lines[0][20:])
        yield

    happening = steps()
    told = []
    try:
        for line in follow(path, 5, lambda: next(happening)):
            told.append(line["number"])
    except RuntimeError:
        assert next(happening, None) is None
    assert told == [1, 1]


def test_figures_count_what_ran_and_what_was_refused(tmp_path):
    dom0 = _dom0(tmp_path)
    dom0.keyring.put("work", os.urandom(32).hex())
    for number in range(1, 101):
        _run(dom0.audit, "work", number / 100)
    _run(dom0.audit, "work", 99.0, status="cancelled")
    last = _run(dom0.audit, "work", 0.5, status="timeout", command="sleep 9 \x1b[2J")
    dom0.audit.write("refused", "work", code="token")
    dom0.audit.write("refusals-not-shown", "work", count=40)
    one = overview(dom0)["vms"]["work"]
    assert (one["ran"], one["refused"], one["p50"], one["p99"]) == (102, 41, 0.5, 0.99)
    assert (one["last"]["id"], one["last"]["outcome"], one["last"]["command"]) == (last, "timeout", "sleep 9 \\x1b[2J")
    assert (one["session"], one["since"], one["open"], one["policy"]) == (None, None, {}, "full")


def test_a_vm_without_commands_has_no_times_and_a_dead_service_no_sessions(tmp_path):
    dom0 = _dom0(tmp_path, vms={"idle": {"policy": "none"}, "late": {"until": 1}, "few": {"policy": {"allow": ["observe"]}}})
    os.makedirs(dom0.config.run_dir)
    note.write(dom0.config, {"sessions": {"idle": "agent"}, "since": {"idle": 5}})
    found = overview(dom0)
    assert (found["engine"], found["sessions"], found["recent"]) == ("stopped", {}, None)
    assert {vm: one["policy"] for vm, one in found["vms"].items()} == {"idle": "none", "late": "ended", "few": "rules"}
    assert (found["vms"]["idle"]["p50"], found["vms"]["idle"]["last"]) == (None, None)


def test_what_waits_is_counted_for_each_vm(tmp_path):
    dom0 = _dom0(tmp_path)
    dom0.keyring.put("work", os.urandom(32).hex())
    done, open_one = new_cid(), new_cid()
    dom0.ledger.claim_all([("work", done, b"1", ""), ("work", open_one, b"2", "")])
    dom0.ledger.start("work", done)
    dom0.ledger.finish("work", done, 0, "done")
    assert overview(dom0)["vms"]["work"]["open"] == {"done": 1, "claimed": 1}
    dom0.ledger.delivered([("work", done)])
    assert overview(dom0)["vms"]["work"]["open"] == {"claimed": 1}


def test_what_was_delivered_long_ago_is_not_counted_each_time(tmp_path, monkeypatch):
    dom0 = _dom0(tmp_path)
    cids = [new_cid() for _ in range(2)]
    dom0.ledger.claim_all([("work", cid, b"", "") for cid in cids])
    dom0.ledger.finish("work", cids[0], 0, "done")
    dom0.ledger.delivered([("work", cids[0])])
    monkeypatch.setattr(Ledger, "counts", lambda self: pytest.fail("it looked at every row"))
    assert overview(dom0)["commands"] == {"claimed": 1}


def test_a_ledger_that_can_not_be_read_hides_nothing_else(tmp_path):
    dom0 = _dom0(tmp_path)
    dom0.keyring.put("work", os.urandom(32).hex())
    os.makedirs(dom0.config.state_dir)
    with open(os.path.join(dom0.config.state_dir, "ledger.sqlite"), "wb") as file:
        file.write(b"no database " * 100)
    os.chmod(file.name, 0o600)
    found = overview(dom0)
    assert "ledger" in found["ledger"]
    assert (found["commands"], list(found["vms"])) == ({}, ["work"])


def test_follow_that_begins_within_a_line_tells_all_of_it(tmp_path):
    path = str(tmp_path / "audit.log")
    log = AuditLog(path)
    for number in (1, 2):
        log.write("accepted", "work", number=number)
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(whole[:-20])

    def steps():
        with open(path, "ab") as file:
            file.write(whole[-20:])
        yield

    happening = steps()
    told = []
    try:
        for line in follow(path, 5, lambda: next(happening)):
            told.append(line["number"])
    except RuntimeError:
        assert next(happening, None) is None
    assert told == [1, 2]
