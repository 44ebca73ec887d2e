# SPDX-License-Identifier: GPL-2.0-or-later
"""Notifications of refusals: that dom0's user gets them if that is wanted, not too many, and nothing of the command in them."""

import os
import subprocess
import threading
import time

import pytest
from pullrpc import notifier as notifier_module
from pullrpc.config import make_config
from pullrpc.errors import ConfigError, PillarError
from pullrpc.notifier import Notifier
from pullrpc.pillar import read_pillar


class _Desk:
    """A helper that keeps what it is told, a notifier, and a clock that a test sets."""

    def __init__(self, tmp_path):
        self.folder = tmp_path
        self.now = 0.0
        self.logged = []
        self.helper("cat >> $0.told; echo == >> $0.told")
        self.notifier = Notifier(self.logged.append, lambda: self.now)
        self.config = make_config({"notify_refusals": True, "notify_helper": str(tmp_path / "helper")})

    def helper(self, body):
        """Say what the helper does."""
        # Another file, as the old one may still be run.
        path = self.folder / "helper.new"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o700)
        path.rename(self.folder / "helper")

    def refuse(self, vm="work", code="policy", times=1):
        """Have a VM refused something."""
        for _ in range(times):
            self.notifier.note(self.config, vm, "20261124-180000-1-0badcafe", "refused", {"code": code})

    def told(self, count=None):
        """What was told, one text for each notification; waits for so many of them."""
        deadline = time.monotonic() + 60
        while True:
            path = self.folder / "helper.told"
            texts = path.read_text().split("==\n")[:-1] if path.exists() else []
            if count is None or len(texts) >= count:
                return texts
            assert time.monotonic() < deadline, self.logged
            time.sleep(0.005)

    def wait_logged(self, count):
        """Wait for lines of the log, and give all of them."""
        deadline = time.monotonic() + 60
        while len(self.logged) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return self.logged

    def settle(self):
        """Wait until all that was to be told is: what a VM with another name has to tell comes last."""
        before = len(self.told())
        self.refuse("marker")
        while not any("marker" in text for text in self.told(before + 1)):
            before += 1
        return self.told()


@pytest.fixture
def desk(tmp_path, monkeypatch):
    # However busy the machine is, a helper is done by then.
    monkeypatch.setattr(notifier_module, "_HELPER_WAIT", 120.0)
    one = _Desk(tmp_path)
    yield one
    one.notifier.close()


def test_it_is_off_unless_pillar_says_otherwise(desk):
    assert not make_config(read_pillar({}).settings).notify_refusals
    desk.config = make_config({"notify_helper": str(desk.folder / "helper")})
    desk.refuse()
    assert desk.notifier._thread is None
    config = make_config(read_pillar({"notify": {"refusals": True, "helper": "/usr/local/bin/tell"}}).settings)
    assert (config.notify_refusals, config.notify_helper) == (True, "/usr/local/bin/tell")
    for wrong in ({"refusals": "yes"}, {"helper": "tell"}, {"often": True}):
        with pytest.raises(PillarError, match="notify:"):
            read_pillar({"notify": wrong})
    with pytest.raises(ConfigError):
        make_config({"notify_refusals": 1})


def test_a_notification_that_no_thread_can_be_started_for_harms_nobody_and_later_ones_are_told(desk, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", start)
        desk.refuse("work")
        assert desk.wait_logged(1) == ["work: dom0's user could not be told of a refusal: can't start new thread"]
        desk.notifier.close()
    desk.refuse("dev")
    assert "dev was refused" in desk.told(1)[0]


def test_a_refusal_is_told_with_the_qube_and_the_reason(desk):
    desk.refuse()
    assert desk.told(1) == ["qvm-remote: work was refused\ndom0 refused what work asked for: policy. See: qvm-remote-dom0 history work\n"]


def test_a_question_without_an_answer_is_told_and_what_the_user_answered_is_not(desk):
    for answer in ("no", "yes", "withdrawn"):
        desk.notifier.note(desk.config, "work", "id", "answered", {"answer": answer})
    desk.notifier.note(desk.config, "work", "id", "done", {"exit": 1, "status": "failed"})
    desk.notifier.note(desk.config, "dev", "id", "answered", {"answer": "timeout"})
    [text] = desk.told(1)
    assert text.startswith("qvm-remote: dev was refused\ndev asked for something that dom0 runs only after a yes, and nobody answered in time.")


def test_a_vm_has_one_in_a_minute_and_the_next_one_says_how_many_there_were(desk):
    desk.refuse(times=5)
    desk.refuse("dev")
    assert [text.split()[1] for text in desk.settle()] == ["work", "dev", "marker"]
    desk.now = 59.0
    desk.refuse()
    desk.now = 61.0
    desk.refuse(code="size")
    text = desk.told(4)[3]
    assert "work asked for: size. It is the last of 6 since the last notification." in text


def test_many_vms_together_have_no_more_than_ten_in_a_minute(desk):
    for number in range(12):
        desk.refuse(f"vm{number}")
        desk.told(min(number + 1, 10))
    desk.now = 61.0
    assert len(desk.settle()) == 11


def test_a_helper_that_hangs_or_fails_holds_nobody_up_and_the_log_says_so(desk):
    os.mkfifo(desk.folder / "go")
    desk.helper(f"cat > /dev/null; echo == >> $0.told; read x < {desk.folder}/go; echo 'no \x1bscreen' >&2; exit 1")
    desk.refuse("vm0")
    desk.told(1)
    for number in range(1, 9):
        # More than wait in the line: none of these calls waits for the helper.
        desk.refuse(f"vm{number}")
    for number in range(1, 6):
        # One after the other: whoever reads now must not take what the next one waits for.
        subprocess.run(["sh", "-c", "echo > go"], cwd=desk.folder, check=True, timeout=60)
        desk.wait_logged(number)
    assert desk.logged[0] == "vm0: dom0's user could not be told of a refusal: the helper ended with exit code 1: no ?screen"
    assert [line[:3] for line in desk.logged] == ["vm0", "vm1", "vm2", "vm3", "vm4"]


def test_a_helper_that_is_not_there_is_logged(desk):
    os.unlink(desk.folder / "helper")
    desk.refuse()
    assert desk.wait_logged(1) == [f"work: dom0's user could not be told of a refusal: {desk.folder}/helper: No such file or directory"]
