# SPDX-License-Identifier: GPL-2.0-or-later
"""The audit log under everything that happens to logs: tampering, rotation, crashes, full disks, and many writers at once."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pullrpc import audit as audit_module
from pullrpc import audit_files, audit_read, chain
from pullrpc.audit import AuditLog, describe_command
from pullrpc.commands import list_kept
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import AuditError, PullError, Refused
from pullrpc.ids import new_cid
from pullrpc.tokens import make_token

CID = "20261124-000000-1-0badcafe"
_UTILS = os.path.dirname(os.path.dirname(os.path.abspath(chain.__file__)))
_MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "log" / "audit.log")


def _verify(path, files=12):
    return audit_read.verify(path, files)


def _fill(path, count, log=None):
    log = log or AuditLog(path)
    for number in range(count):
        log.write("accepted", "work", CID, number=number)
    return log


def _rotate(path):
    """As logrotate does it."""
    for number in range(20, 0, -1):
        if os.path.exists(f"{path}.{number}"):
            os.rename(f"{path}.{number}", f"{path}.{number + 1}")
    os.rename(path, f"{path}.1")


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def _put(path, data):
    with open(path, "r+b") as file:
        file.truncate()
        file.write(data)


def _lines(path):
    return [json.loads(line) for line in _read(path).splitlines()]


def test_lines_are_numbered_and_each_names_the_one_before(path):
    _fill(path, 5)
    raw = _read(path).splitlines()
    lines = [json.loads(line) for line in raw]
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["prev"] for line in lines[1:]] == [chain.hashlib.sha256(line).hexdigest() for line in raw[:-1]]
    done = _verify(path)
    assert (done["lines"], done["first"], done["last"], done["problems"], done["notes"]) == (5, 1, 5, [], [])


def test_nothing_logged_is_no_problem(path):
    assert _verify(path)["problems"] == []


_EDITS = {
    "a line is changed": lambda lines: lines[:4] + [lines[4].replace(b'"number":4', b'"number":5')] + lines[5:],
    "the last line is changed": lambda lines: lines[:-1] + [lines[-1].replace(b"work", b"dead")],
    "a line is removed": lambda lines: lines[:4] + lines[5:],
    "the first line is removed": lambda lines: lines[1:],
    "a line is repeated": lambda lines: lines[:5] + lines[4:],
    "the last line is repeated": lambda lines: [*lines, lines[-1]],
    "two lines are swapped": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    "the end is cut": lambda lines: lines[:-3],
    "the last line is cut": lambda lines: lines[:-1] + [lines[-1][:-30]],
    "all lines are cut": lambda lines: [],
    "something is put in": lambda lines: [*lines[:4], b'{"what":"accepted"}\n', *lines[4:]],
    "an empty line is put in": lambda lines: [*lines[:4], b"\n", *lines[4:]],
    "a newline is removed": lambda lines: [*lines[:4], lines[4][:-1], *lines[5:]],
}


@pytest.mark.parametrize("edit", sorted(_EDITS))
@pytest.mark.parametrize("goes_on", [False, True])
def test_tampering_is_found(path, edit, goes_on):
    _fill(path, 10)
    _put(path, b"".join(_EDITS[edit](_read(path).splitlines(keepends=True))))
    if goes_on:
        # Neither the one that wrote before nor a new process covers it up.
        _fill(path, 3)
    assert _verify(path)["problems"]


@pytest.mark.parametrize("edit", ["a line is changed", "the last line is changed", "the end is cut", "all lines are cut", "a line is removed"])
def test_tampering_under_a_writer_that_goes_on_is_found(path, edit):
    log = _fill(path, 10)
    _put(path, b"".join(_EDITS[edit](_read(path).splitlines(keepends=True))))
    _fill(path, 3, log)
    assert _verify(path)["problems"]


@pytest.mark.parametrize("edit", sorted(_EDITS))
def test_tampering_in_a_rotated_and_compressed_file_is_found(path, edit):
    log = _fill(path, 10)
    _rotate(path)
    _fill(path, 3, log)
    assert _verify(path)["problems"] == []
    data = b"".join(_EDITS[edit](_read(f"{path}.1").splitlines(keepends=True)))
    with gzip.open(f"{path}.1.gz", "wb") as file:
        file.write(data)
    os.unlink(f"{path}.1")
    assert _verify(path)["problems"]


@pytest.mark.parametrize("gone", ["", ".1", ".2", ".3"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_removed_file_is_found(path, gone, goes_on):
    for _ in range(3):
        _fill(path, 4)
        _rotate(path)
    _fill(path, 4)
    assert _verify(path)["problems"] == []
    os.unlink(path + gone)
    if goes_on:
        _fill(path, 2)
    assert _verify(path)["problems"]


def test_files_that_are_kept_no_more_are_not_missed(path):
    log = AuditLog(path, files=2)
    for _ in range(5):
        _fill(path, 2, log)
        _rotate(path)
        for number in (3, 4):
            if os.path.exists(f"{path}.{number}"):
                os.unlink(f"{path}.{number}")
    assert _verify(path, files=2)["problems"] == []
    _fill(path, 2, log)
    log.reconfigure(False, 5)
    _rotate(path)
    _fill(path, 2, log)
    # More are kept from now on: those that went before were to go.
    assert _verify(path, files=5)["problems"] == []
    os.unlink(f"{path}.3")
    assert any("oldest" in problem for problem in _verify(path, files=5)["problems"])


def test_lines_of_another_log_are_found(path, tmp_path):
    other = str(tmp_path / "other" / "audit.log")
    _fill(path, 10)
    _fill(other, 10)
    mine, others = (_read(one).splitlines(keepends=True) for one in (path, other))
    for spliced in (mine[:5] + others[5:], others[:5] + mine[5:], others, [*mine, *others]):
        _put(path, b"".join(spliced))
        assert _verify(path)["problems"]


def test_a_missing_head_is_found(path):
    _fill(path, 4)
    os.unlink(chain.head_path(path))
    assert _verify(path)["problems"]
    _fill(path, 4)
    assert any("head was missing" in problem for problem in _verify(path)["problems"])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_is_found(tmp_path, data):
    folder = tmp_path / str(random.getrandbits(64))
    path = str(folder / "audit.log")
    _fill(path, 3)
    _rotate(path)
    _fill(path, 3)
    which = data.draw(st.sampled_from([path, f"{path}.1"]))
    raw = _read(which)
    # Nothing that is drawn depends on the lines, which are others each time.
    start = data.draw(st.integers(0, 1 << 16)) % (len(raw) + 1)
    end = min(len(raw), start + data.draw(st.integers(0, 400)))
    new, line = data.draw(st.one_of(st.binary(max_size=40), st.none())), data.draw(st.integers(0, 9))
    if new is None:
        lines = raw.splitlines(keepends=True)
        new = lines[line] if line < len(lines) else raw
    changed = raw[:start] + new + raw[end:]
    _put(which, changed)
    done = _verify(path)
    # At the very end of all, what is no line may be what a crash left: that is said, but it is no tampering.
    is_tail = which == path and changed.startswith(raw)
    assert changed == raw or done["problems"] or (is_tail and done["notes"])
    shutil.rmtree(folder)


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_torn_line_is_closed_off_and_named_as_such(path, cut):
    log = _fill(path, 5)
    whole = _read(path)
    head = _read(chain.head_path(path))
    _fill(path, 1, log)
    # A crash in the middle of the write: part of the line is there, and the head was not told.
    _put(path, _read(path)[:-cut])
    _put(chain.head_path(path), head)
    for again in range(2):
        done = _verify(path)
        assert done["problems"] == []
        assert done["notes"]
        assert done["lines"] == (6 if cut == 1 else 5) + 2 * again
        _fill(path, 2)
    assert _read(path).startswith(whole)


def test_what_a_crash_left_is_closed_off_however_it_looks(path):
    log = _fill(path, 5)
    for left in (b"\0" * 5000, b"\n\n", b'{"seq":', b"x" * 3 * chain.LINE_MAX, b'a\n{"seq":9}\nb\n'):
        with open(path, "ab") as file:
            file.write(left)
        _fill(path, 1, log)
        done = _verify(path)
        assert (done["problems"], len(done["notes"]) > 0) == ([], True)
    assert [line["number"] for line in audit_read.query(path)] == [0, 1, 2, 3, 4, 0, 0, 0, 0, 0]


def test_what_a_crash_left_may_be_rotated_away(path):
    _fill(path, 5)
    with open(path, "ab") as file:
        file.write(b'{"seq":6,"pre')
    _rotate(path)
    _fill(path, 2)
    assert _verify(path)["problems"] == []
    with open(f"{path}.1", "ab") as file:
        file.write(b"!")
    assert _verify(path)["problems"]


def test_what_a_power_cut_took_is_named_as_such_and_what_was_synced_is_missed(path, monkeypatch):
    log = _fill(path, 5)
    log.write("ended", "work", CID, sync=True)
    synced = _read(path)
    _fill(path, 3, log)
    kept = _read(path)
    _put(path, synced)
    assert _verify(path)["problems"]
    monkeypatch.setattr(chain, "boot_id", lambda: "another-boot")
    monkeypatch.setattr(audit_read, "boot_id", lambda: "another-boot")
    done = _verify(path)
    assert (done["problems"], len(done["notes"])) == ([], 1)
    _fill(path, 2)
    done = _verify(path)
    assert (done["problems"], len(done["notes"])) == ([], 1)
    # The same with one line less: that one was on the disk.
    _put(path, kept)
    shutil.rmtree(os.path.dirname(path))
    monkeypatch.setattr(chain, "boot_id", lambda: "a-boot")
    log = _fill(path, 5)
    log.write("ended", "work", CID, sync=True)
    _fill(path, 1, log)
    _put(path, b"".join(_read(path).splitlines(keepends=True)[:-2]))
    assert _verify(path)["problems"]


_WRITER = """
import sys, threading
sys.path.insert(0, {utils!r})
from pullrpc.audit import AuditLog
log = AuditLog(sys.argv[1])
def work(thread):
    for number in range(int(sys.argv[4])):
        log.write("accepted", "work", {cid!r}, sync=number % 10 == 0, process=sys.argv[2], thread=thread, number=number)
        if sys.argv[5] == "tell":
            print(number, flush=True)
threads = [threading.Thread(target=work, args=(thread,)) for thread in range(int(sys.argv[3]))]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def _writer(path, name, threads, count, tell="-"):
    program = _WRITER.format(utils=_UTILS, cid=CID)
    words = [sys.executable, "-c", program, path, str(name), str(threads), str(count), tell]
    return subprocess.Popen(words, stdout=subprocess.PIPE if tell == "tell" else None)


def test_many_writers_lose_no_line_while_files_are_rotated(path):
    writers = [_writer(path, 0, 3, 60)]
    rotations = 0
    while len(writers) < 4 or any(writer.poll() is None for writer in writers):
        if os.path.exists(path) and os.path.getsize(path) and rotations < 12:
            _rotate(path)
            rotations += 1
            if len(writers) < 4:
                # One by one, so that there is something to rotate however seldom this looks.
                writers.append(_writer(path, len(writers), 3, 60))
        # Whoever verifies meanwhile sees a whole log, too.
        assert _verify(path)["problems"] == []
        time.sleep(0.01)
    assert [writer.wait() for writer in writers] == [0] * 4
    done = _verify(path)
    assert (done["problems"], done["notes"], done["lines"], rotations > 2) == ([], [], 4 * 3 * 60, True)
    seen = [(line["process"], line["thread"], line["number"]) for line in audit_read.query(path, limit=10000)]
    assert len(set(seen)) == 4 * 3 * 60
    # What one thread wrote stands in the order in which it wrote it.
    for process in "0123":
        for thread in range(3):
            assert [number for p, t, number in seen if (p, t) == (process, thread)] == list(range(60))


def test_a_writer_that_is_killed_loses_nothing_that_it_was_told_is_written(path):
    told = 0
    for round_ in range(15):
        writer = _writer(path, round_, 1, 10**6, "tell")
        for _ in range(1 + round_ * 3):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        told += 1 + round_ * 3 + writer.stdout.read().count(b"\n")
        writer.wait()
        writer.stdout.close()
        assert _verify(path)["problems"] == []
    done = _verify(path)
    # Each may have written one line more than it could tell.
    assert told <= done["lines"] <= told + 15


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_what_is_written_stays_whole(small_disk):
    path = str(small_disk / "audit.log")
    log = _fill(path, 5)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1024)
    written = 5
    with pytest.raises(AuditError, match="can't be written"):
        for _ in range(200):
            log.write("accepted", "work", CID, command="x" * 500)
            written += 1
    with pytest.raises(AuditError):
        log.write_all([("accepted", "work", CID, {"command": "x" * 3000})] * 3, sync=True)
    done = _verify(path)
    assert (done["problems"], done["notes"], done["lines"]) == ([], [], written)
    with pytest.raises(AuditError):
        log.keep_command("work", CID, b"x" * 5000, _MIB, 90)
    assert list_kept(audit_files.commands_folder(path)) == []
    ballast.unlink()
    _fill(path, 3, log)
    done = _verify(path)
    assert (done["problems"], done["notes"], done["lines"]) == ([], [], written + 3)


def test_a_disk_that_is_read_only_is_an_error(small_disk):
    path = str(small_disk / "audit.log")
    _fill(path, 2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(AuditError, match="[Rr]ead-only"):
        _fill(path, 1)
    assert _verify(path)["problems"] == []


def test_lines_that_could_not_be_forced_to_the_disk_are_an_error_for_all_who_wait(path, monkeypatch):
    log = _fill(path, 1)
    count, errors, fsync = [], [], os.fsync

    def fail_once(fd):
        count.append(fd)
        if len(count) == 1:
            raise OSError(5, "Input/output error")
        fsync(fd)

    def write():
        try:
            log.write("ended", "work", CID, sync=True)
        except AuditError as err:
            errors.append(err)

    monkeypatch.setattr(chain.os, "fsync", fail_once)
    threads = [threading.Thread(target=write) for _ in range(4)]
    with log._chain._sync_lock:
        for thread in threads:
            thread.start()
        while len(_lines(path)) < 5:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert len(errors) == 4
    # What is written from then on is another matter.
    log.write("ended", "work", CID, sync=True)


def test_those_who_wait_for_the_disk_share_one_fsync(path, monkeypatch):
    log = _fill(path, 1)
    began, go, count, fsync = threading.Event(), threading.Event(), [], os.fsync

    def slow(fd):
        count.append(fd)
        began.set()
        go.wait(60)
        fsync(fd)

    monkeypatch.setattr(chain.os, "fsync", slow)
    threads = [threading.Thread(target=log.write, args=("ended", "work", CID, True)) for _ in range(9)]
    threads[0].start()
    assert began.wait(60)
    for thread in threads[1:]:
        thread.start()
    while len(_lines(path)) < 10:
        time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert len(count) == 2


def test_the_real_logrotate_with_the_shipped_configuration(path, tmp_path):
    logrotate = shutil.which("logrotate", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if not logrotate:
        pytest.skip("no logrotate here")
    config = tmp_path / "conf"
    # As in Fedora's own configuration: what it says for all files is not to matter.
    config.write_text("dateext\ncreate 0644\n" + audit_files.logrotate_config(path, 3))
    config.chmod(0o644)
    log = AuditLog(path, files=3)
    for round_ in range(6):
        _fill(path, 3, log)
        if round_ == 3:
            # Another process, which never saw the old file.
            _fill(path, 1)
        subprocess.run([logrotate, "--force", "--state", str(tmp_path / "state"), str(config)], check=True)
        done = _verify(path, files=3)
        assert (done["problems"], done["notes"]) == ([], [])
    _fill(path, 2, log)
    done = _verify(path, files=3)
    assert (done["files"], done["problems"]) == (["audit.log.3.gz", "audit.log.2.gz", "audit.log.1", "audit.log"], [])
    assert (done["first"], done["last"], done["lines"]) == (10, 21, 12)
    assert os.stat(path).st_mode & 0o777 == 0o600
    os.unlink(f"{path}.3.gz")
    assert _verify(path, files=3)["problems"]


def _kept(path):
    return [os.path.basename(one) for _, _, one in sorted(list_kept(audit_files.commands_folder(path)))]


def _keep(log, vm, cid, size, bytes_max=_MIB, days=90):
    """Have a whole command in the log, as the gate has."""
    command = "echo " + "x" * size
    log.keep_command(vm, cid, command.encode(), bytes_max, days)
    log.write("accepted", vm, cid, sync=True, **describe_command(command))


def test_whole_commands_are_bounded_and_the_oldest_go_first(path):
    log = AuditLog(path)
    for number in range(6):
        _keep(log, "work", f"id-{number}", 5000, 4 * 8192)
    assert _kept(path) == ["id-2", "id-3", "id-4", "id-5"]
    folder = os.path.join(audit_files.commands_folder(path), "work")
    assert os.stat(os.path.join(folder, "id-5")).st_mode & 0o777 == 0o600
    old = time.time() - 3 * 86400
    os.utime(os.path.join(folder, "id-2"), (old, old))
    # Another process, at its start.
    AuditLog(path).prune_commands(_MIB, 2)
    assert _kept(path) == ["id-3", "id-4", "id-5"]
    # What went is in the log, so that nothing is missing; also under other settings.
    assert [line["id"] for line in audit_read.query(path, what="command-let-go")] == ["id-0", "id-1", "id-2"]
    done = _verify(path)
    assert (done["problems"], done["commands"]) == ([], 3)


def test_a_vm_that_fills_the_room_for_whole_commands_loses_its_own(path):
    log = AuditLog(path)
    _keep(log, "work", "id-work", 5000, 8 * 8192)
    for number in range(40):
        _keep(log, "dev", f"id-{number}", 5000, 8 * 8192)
    assert _kept(path) == ["id-work", *(f"id-{number}" for number in range(33, 40))]


def test_a_whole_command_that_somebody_removed_is_missed_also_where_the_room_is_full(path):
    log = AuditLog(path)
    for number in range(6):
        _keep(log, "work", f"id-{number}", 5000, 4 * 8192)
    os.unlink(os.path.join(audit_files.commands_folder(path), "work", "id-5"))
    assert _verify(path)["problems"] == ["the whole command id-5 of work is missing"]


def test_no_whole_command_goes_that_the_log_has_no_line_of(path):
    log = AuditLog(path)
    _keep(log, "work", "id-0", 5000, 8192)
    _break(path)
    with pytest.raises(AuditError):
        log.keep_command("work", "id-1", b"x" * 5000, 8192, 90)
    _mend(path)
    assert (_kept(path), _verify(path)["problems"]) == (["id-0"], [])


def test_a_command_that_can_not_be_removed_is_said_to_go_once(small_disk):
    path = str(small_disk / "audit.log")
    log = AuditLog(path)
    _keep(log, "work", "id-0", 5000)
    folder = audit_files.commands_folder(path)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", os.path.join(folder, "work")], check=True)
    for _ in range(3):
        # It is not there any more, as far as can be seen; what is there in its place can't be written to.
        with pytest.raises(AuditError):
            log.keep_command("work", "id-1", b"x" * 5000, 8192, 90)
    subprocess.run(["umount", os.path.join(folder, "work")], check=True)
    assert len(audit_read.query(path, what="command-let-go")) == 1


def test_a_command_goes_while_the_log_is_verified(path, monkeypatch):
    log = AuditLog(path)
    _keep(log, "work", "id-0", 5000)

    def look(check, real=audit_read._Check.look_at_commands):
        # After the lines were read.
        log.prune_commands(0, 90)
        real(check)

    monkeypatch.setattr(audit_read._Check, "look_at_commands", look)
    assert _verify(path)["problems"] == []


def test_a_command_takes_no_more_room_in_a_line_whatever_its_characters_are(path):
    log = AuditLog(path)
    lengths = []
    for character in ("x", "\u00e9", "\U0001f600", "\x1b", "\x7f"):
        command = character * 5000
        log.write("accepted", "work", CID, **describe_command(command))
        line = _lines(path)[-1]
        assert command.startswith(line["command"]) and len(line["command"]) > 100 and line["whole"] is False
        assert line["sha256"] == hashlib.sha256(command.encode()).hexdigest()
        lengths.append(len(_read(path).splitlines()[-1]))
    assert max(lengths) < 2048 + 512


@pytest.mark.parametrize("harm", ["changed", "removed"])
def test_a_whole_command_that_was_harmed_is_found(path, harm):
    log = AuditLog(path)
    command = "echo " + "x" * 5000
    log.keep_command("work", CID, command.encode(), _MIB, 90)
    log.write("accepted", "work", CID, sync=True, **describe_command(command))
    done = _verify(path)
    assert (done["problems"], done["commands"]) == ([], 1)
    if harm == "changed":
        _put(os.path.join(audit_files.commands_folder(path), "work", CID), b"echo")
    else:
        os.unlink(os.path.join(audit_files.commands_folder(path), "work", CID))
    assert any(CID in problem for problem in _verify(path)["problems"])


def _run(log, vm, cid, **end):
    log.write("accepted", vm, cid, by="full", **describe_command(f"echo {cid}"))
    log.write("run", vm, cid)
    if end:
        log.write("ended", vm, cid, **end)


def test_a_history_has_one_row_for_each_command(path):
    log = AuditLog(path)
    _run(log, "work", "one", exit=0, status="done", seconds=0.5, out=3, err=0)
    _rotate(path)
    _run(log, "dev", "two", exit=125, status="timeout", seconds=9.0, out=0, err=0)
    log.write("refused", "dev", "three", code="token")
    _run(log, "work", "four")
    log.write("delivered", "work", "one")
    rows = audit_read.history(path)
    assert [(row["id"], row["outcome"]) for row in rows] == [("one", "done"), ("two", "timeout"), ("three", "refused"), ("four", "running")]
    assert (rows[0]["command"], rows[0]["exit"], rows[0]["out"], rows[0]["by"]) == ("echo one", 0, 3, "full")
    assert [row["id"] for row in audit_read.history(path, vm="dev")] == ["two", "three"]
    assert [row["id"] for row in audit_read.history(path, outcome="refused")] == ["three"]
    assert [row["id"] for row in audit_read.history(path, outcome=0)] == ["one"]
    assert [row["id"] for row in audit_read.history(path, limit=2)] == ["three", "four"]
    assert audit_read.history(path, since="2100-01-01") == []
    assert len(audit_read.history(path, since="1h")) == 4


def test_a_refusal_of_an_id_that_runs_is_no_end_of_it(path):
    log = AuditLog(path)
    _run(log, "work", "one")
    # Whoever owns the VM's disk shows the id once more, without the key.
    log.write("refused", "work", "one", code="token", reason="the token does not fit")
    refused, running = sorted(audit_read.history(path), key=lambda row: row["outcome"])
    assert (running["outcome"], running["command"]) == ("running", "echo one")
    assert (refused["outcome"], refused["code"], "command" in refused) == ("refused", "token", False)
    log.write("ended", "work", "one", exit=0, status="done")
    assert [(row["outcome"], row["command"]) for row in audit_read.history(path, outcome="done")] == [("done", "echo one")]
    assert audit_read.history(path, until="2020-01-01") == []
    assert len(audit_read.history(path, since="1h", until="2100-01-01")) == 2


def test_a_claim_that_failed_is_one_row(path):
    log = AuditLog(path)
    log.write("accepted", "work", "one", command="true", by="full")
    # Another command under the id of one that waits: that one goes on.
    log.write("refused", "work", "one", code="replay", command="false")
    # In whatever order: they may be of the same millisecond.
    assert sorted((row["outcome"], row["command"]) for row in audit_read.history(path)) == [("accepted", "true"), ("refused", "false")]
    log.write("refused", "work", "one", code="storage", command="true", claimed=False)
    rows = sorted((row["outcome"], row["code"], row["command"]) for row in audit_read.history(path))
    assert rows == [("refused", "replay", "false"), ("refused", "storage", "true")]


def test_a_refusal_says_what_was_refused_and_why_once_its_token_fits(path):
    log = AuditLog(path)
    refused = Refused("policy", "no rule lets it " + "x" * 5000)
    refused.command = "qvm-remove vault " + "\x1b" * 5000
    assert log.refusal("work", CID, refused)
    assert log.refusal("work", CID, Refused("token", "the token does not fit"))
    told, bare = _lines(path)
    assert told["command"].startswith("qvm-remove vault ") and len(told["command"]) == 256 == len(told["reason"])
    assert (told["size"], told["sha256"]) == (5017, hashlib.sha256(refused.command.encode()).hexdigest())
    assert (bare["reason"], "command" in bare) == ("the token does not fit", False)
    # It was not kept, and nobody misses it.
    assert _verify(path)["problems"] == []


def _refusals(log, vm, count, command=None):
    for _ in range(count):
        refused = Refused("token" if command is None else "policy", "no")
        refused.command = command
        log.refusal(vm, CID, refused)


def test_refusals_that_were_counted_only_are_told_of_although_none_follows(path, monkeypatch):
    minute = [1000]
    monkeypatch.setattr(audit_module, "_minute", lambda: minute[0])
    log = AuditLog(path)
    _refusals(log, "work", 100)
    _refusals(log, "dev", 61)
    _refusals(log, "mail", 60)
    # Whoever shows wrong tokens hides nothing of what an authorized program asks for.
    _refusals(log, "work", 2, "qvm-run vault id")
    assert [line["command"] for line in _lines(path) if "command" in line] == ["qvm-run vault id"] * 2
    log.tell_not_shown()
    assert [line for line in _lines(path) if line["what"] == "refusals-not-shown"] == []
    minute[0] += 1
    log.tell_not_shown()
    log.tell_not_shown()
    assert [(line["vm"], line["count"]) for line in _lines(path) if line["what"] == "refusals-not-shown"] == [("work", 40), ("dev", 1)]
    # When nobody counts on.
    _refusals(log, "work", 70)
    log.tell_not_shown(at_once=True)
    assert _lines(path)[-1]["count"] == 10


def test_refusals_that_could_not_be_told_of_are_told_later(path, monkeypatch):
    minute = [1000]
    monkeypatch.setattr(audit_module, "_minute", lambda: minute[0])
    log = AuditLog(path)
    _refusals(log, "work", 100)
    minute[0] += 1
    with monkeypatch.context() as full:
        full.setattr(AuditLog, "write_all", lambda *_, **__: (_ for _ in ()).throw(AuditError("full")))
        with pytest.raises(AuditError):
            log.tell_not_shown()
    log.tell_not_shown()
    assert _lines(path)[-1]["count"] == 40


def test_lines_are_found_by_vm_time_and_word(path):
    log = AuditLog(path)
    _run(log, "work", "one", exit=0)
    _run(log, "dev", "two", exit=0)
    assert [line["id"] for line in audit_read.query(path, vm="dev", what="ended")] == ["two"]
    assert len(audit_read.query(path, limit=4)) == 4
    assert audit_read.query(path, until="2020-01-01T00:00:00+02:00") == []
    assert len(audit_read.query(path, since="2020-01-01", until="2100-01-01T00:00Z")) == 6
    for wrong in ({"since": "yesterday"}, {"until": "99999999999d"}, {"limit": 0}, {"limit": "5"}):
        with pytest.raises(PullError):
            audit_read.query(path, **wrong)


def test_nothing_in_a_log_reaches_a_terminal_as_it_is(path):
    log = AuditLog(path)
    log.write("accepted", "work", CID, command="a\x1b[2J\x7f\u202e\x9bé\ud800\n\u0430\u200b\\n")
    raw = _read(path)
    assert all(byte == 10 or 32 <= byte < 127 for byte in raw)
    (line,) = audit_read.query(path)
    # Nor does what looks like another character, or like nothing; and what was written is known from what was escaped.
    assert line["command"] == "a\\x1b[2J\\x7f\\u202e\\x9b\\xe9\\ud800\\n\\u0430\\u200b\\\\n"


def test_the_systems_log_gets_a_copy_and_never_holds_anything_up(path, tmp_path, monkeypatch):
    log = AuditLog(path, syslog=True)
    log._syslog._path = str(tmp_path / "dev-log")
    _fill(path, 1, log)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(log._syslog._path)
        _fill(path, 500, log)
        text = listener.recv(4096).decode()
    assert text.startswith("<86>")
    seq, digest = 2, chain.hashlib.sha256(_read(path).splitlines()[1]).hexdigest()
    assert f"accepted work {CID} line {seq} sha256 {digest}" in text
    assert _verify(path)["lines"] == 501


def test_the_systems_log_which_others_read_gets_nothing_of_a_command(path, tmp_path):
    log = AuditLog(path, syslog=True)
    log._syslog._path = str(tmp_path / "dev-log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(log._syslog._path)
        refused = Refused("policy", "no rule lets it run: mount -o password=hush")
        refused.command = "mount -o password=hush"
        log.write("accepted", "work", CID, **describe_command(refused.command))
        log.write("run", "work", CID, by="**", **{"as": "root"})
        log.write("asked", "work", CID, new_field="hush")
        log.refusal("work", CID, refused)
        log.write("ended", "work", CID, exit=7, status="done", seconds=0.1)
        texts = [listener.recv(4096).decode() for _ in range(5)]
    assert b"hush" in _read(path)
    assert [text for text in texts if "hush" in text or refused.command.encode().hex() in text] == []
    shown = [json.loads(text[text.index("{") :]) for text in texts]
    # A digest of the command alone would tell whoever guesses it.
    assert shown == [{}, {"as": "root"}, {}, {"code": "policy"}, {"exit": 7, "status": "done", "seconds": 0.1}]


@pytest.fixture
def dom0(tmp_path, path):
    """dom0's side with a key for work, everything in a folder of this test."""
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run"}
    one = Dom0(make_config({**{name: str(tmp_path / folder) for name, folder in names.items()}, "audit_log": path, "syslog": False}))
    one.keyring.put("work", os.urandom(32).hex())
    return one


def _admit(dom0, line):
    cid = new_cid()
    token = make_token(dom0.keyring.get("work"), "work", cid, 60, "shell", line)
    return dom0.intake.admit("work", cid.encode(), line, token, -1)


def _break(path):
    if os.path.exists(path):
        os.rename(path, f"{path}.aside")
    os.makedirs(path)


def _mend(path):
    os.rmdir(path)
    if os.path.exists(f"{path}.aside"):
        os.rename(f"{path}.aside", path)


def test_commands_that_come_together_are_logged_by_one_write_and_one_fsync(dom0, path, monkeypatch):
    count, fsync = [], os.fsync
    _fill(path, 1, dom0.audit)
    requests = [_admit(dom0, b"true " + b"x" * size) for size in (0, 10, 5000)]
    monkeypatch.setattr(chain.os, "fsync", lambda fd: (os.path.samestat(os.fstat(fd), os.stat(path)) and count.append(fd), fsync(fd)))
    assert dom0.intake.claim([(request, 0) for request in requests]) == {}
    assert len(count) == 1
    lines = _lines(path)[1:]
    assert [(line["what"], line["by"], line.get("whole", True)) for line in lines] == [("accepted", "full", True)] * 2 + [("accepted", "full", False)]
    assert _read(os.path.join(audit_files.commands_folder(path), "work", requests[2].cid)) == b"true " + b"x" * 5000
    assert _verify(path)["problems"] == []


def test_a_claim_and_an_end_are_on_the_disk_in_the_log_before_the_ledger_has_them(dom0, path, monkeypatch):
    done, fsync = [], os.fsync
    _fill(path, 1, dom0.audit)
    request = _admit(dom0, b"true")

    def noted_fsync(fd):
        fsync(fd)
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            done.append(_lines(path)[-1]["what"])

    def noted(name, original):
        monkeypatch.setattr(dom0.ledger, name, lambda *args: (done.append(name), original(*args))[1])

    monkeypatch.setattr(os, "fsync", noted_fsync)
    for name in ("claim_all", "start", "finish"):
        noted(name, getattr(dom0.ledger, name))
    assert dom0.intake.claim([(request, 0)]) == {}
    assert done == ["accepted", "claim_all"]
    assert dom0.execution.execute("work", request.cid)["status"] == "done"
    assert done == ["accepted", "claim_all", "start", "ended", "finish"]


@pytest.mark.parametrize(("ending", "status"), [("exit 3", "done"), ("kill -9 $$", "done"), ("sleep 60", "timeout")])
def test_nothing_of_an_output_or_of_stdin_is_in_the_log_or_in_its_copy(dom0, path, tmp_path, ending, status):
    dom0.audit.reconfigure(True, 12)
    dom0.audit._syslog._path = str(tmp_path / "dev-log")
    cid, stdin = new_cid(), b"hush-on-stdin"
    # The words that it writes are none of its own.
    line = b"cat; printf 'hush-%s' $((6 * 7)) >&1; printf 'hush-%s' $((6 * 8)) >&2; : " + b"x" * 2000 + b"; " + ending.encode()
    # In that time it has written all of it.
    seconds = 5 if status == "timeout" else 60
    token = make_token(dom0.keyring.get("work"), "work", cid, seconds, "shell", line, hashlib.sha256(stdin).digest())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(dom0.audit._syslog._path)
        request = dom0.intake.admit("work", cid.encode(), line, token, len(stdin))
        writer = dom0.intake.stdin_writer(request)
        writer.write(stdin)
        dom0.intake.end_stdin(request, writer)
        assert dom0.intake.claim([(request, len(stdin))]) == {}
        assert dom0.execution.execute("work", cid)["status"] == status
        parts = dom0.results.result("work", cid).parts
        assert [b"".join(parts[part][1](0)) for part in ("out", "err")] == [b"hush-on-stdinhush-42", b"hush-48"]
        dom0.results.close_delivery("work", cid)
        said = [listener.recv(1 << 16) for _ in _lines(path)]
    folder = os.path.dirname(path)
    kept = [_read(os.path.join(where, name)) for where, _, names in os.walk(folder) for name in names]
    assert [line["what"] for line in _lines(path)] == ["accepted", "run", "ended", "delivered"]
    # The command itself is in its line, and whole beside it.
    assert sum(b"printf 'hush-%s'" in data for data in kept) == 2
    assert not [data for data in kept + said if re.search(rb"hush-[^%]", data)]


def test_what_cant_be_logged_is_refused_and_nothing_is_kept_of_it(dom0, path):
    requests = [_admit(dom0, b"true"), _admit(dom0, b"false")]
    _break(path)
    refused = dom0.intake.claim([(request, 0) for request in requests])
    assert [refused[request.cid].code for request in requests] == ["storage"] * 2
    assert dom0.ledger.counts() == {}
    assert os.listdir(dom0.spool.path("work", "")) == []


def test_a_command_whose_start_cant_be_logged_does_not_run(dom0, path, tmp_path):
    request = _admit(dom0, f"touch {tmp_path}/ran".encode())
    assert dom0.intake.claim([(request, 0)]) == {}
    _break(path)
    with pytest.raises(AuditError):
        dom0.execution.execute("work", request.cid)
    assert not os.path.exists(tmp_path / "ran")
    _mend(path)
    # The next start of the service says how it ended.
    assert dom0.execution.recover() == [("work", request.cid)]
    (row,) = audit_read.history(path)
    assert (row["outcome"], row["exit"], _verify(path)["problems"]) == ("failed", 125, [])


def test_a_delivery_that_cant_be_logged_is_made_again(dom0, path):
    request = _admit(dom0, b"echo hello")
    assert dom0.intake.claim([(request, 0)]) == {}
    assert dom0.execution.execute("work", request.cid)["exit"] == 0
    (row,) = audit_read.history(path)
    assert (row["outcome"], row["exit"], row["out"], row["err"], row["signal"]) == ("done", 0, 6, 0, 0)
    _break(path)
    with pytest.raises(AuditError):
        dom0.results.close_delivery("work", request.cid)
    assert dom0.results.expire("work") == ([request.cid], [])
    _mend(path)
    dom0.results.close_delivery("work", request.cid)
    assert dom0.results.expire("work") == ([], [])
    assert [line["what"] for line in _lines(path)] == ["accepted", "run", "ended", "delivered"]
