# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine. Its events give way to commands, but not for long, and no VM keeps another one's from being fired; and it does not end by itself."""

import contextlib
import errno
import importlib.util
import os
import threading
import time
import types

import pytest
from pullrpc.errors import ConfigError

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class _Bus:
    """A minion's bus that keeps what is fired; closed, it takes one event and no more."""

    def __init__(self):
        self.tags = []
        self.is_open = threading.Event()
        self.is_open.set()
        self.is_used = threading.Event()

    def fire_event(self, data, tag):
        self.is_used.set()
        assert self.is_open.wait(120)
        self.tags.append(tag)

    def wait_fired(self, tag):
        """Wait until an event was fired."""
        deadline = time.monotonic() + 60
        while tag not in self.tags:
            assert time.monotonic() < deadline, f"{tag} is not among {len(self.tags)} events"
            time.sleep(0.005)


@pytest.fixture
def engine():
    spec = importlib.util.spec_from_file_location("qvm_remote_engine", os.path.join(_ROOT, "_engines", "qvm_remote.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bus(engine, monkeypatch):
    one = _Bus()
    monkeypatch.setattr(engine.salt.utils.event, "get_event", lambda *_, **__: contextlib.nullcontext(one))
    return one


@pytest.fixture
def events(engine, bus):
    one = engine._Events({"master_type": "disable"})
    yield one
    bus.is_open.set()
    one.close()


def test_a_vm_whose_commands_never_cease_holds_no_event_back(events, bus):
    stop = threading.Event()

    def load():
        for number in range(1000000):
            events.note("work", str(number), "accepted")
            if stop.wait(0.02):
                return

    loading = threading.Thread(target=load)
    loading.start()
    try:
        events.put("dev", "id", "refused", {"code": "policy"})
        bus.wait_fired("qvm-remote/dev/id/refused")
    finally:
        stop.set()
        loading.join()


def test_an_event_gives_way_to_a_command_that_was_just_accepted(engine, events, bus, monkeypatch):
    monkeypatch.setattr(engine, "_EVENTS_WAIT", 60)
    events.note("work", "id", "accepted")
    events.put("work", "id", "done", {})
    time.sleep(0.1)
    assert bus.tags == []
    events.note("work", "id", "delivered")
    bus.wait_fired("qvm-remote/work/id/done")


def test_a_vm_with_many_events_has_none_of_anothers_dropped_and_vms_take_turns(engine, events, bus):
    bus.is_open.clear()
    events.put("work", "first", "refused", {})
    assert bus.is_used.wait(60)
    for number in range(6000):
        events.put("work", str(number), "refused", {})
    events.put("dev", "id", "refused", {})
    bus.is_open.set()
    bus.wait_fired("qvm-remote/dev/id/refused")
    assert bus.tags.index("qvm-remote/dev/id/refused") <= 2


def test_events_of_a_vm_keep_their_order_and_are_bounded_in_number(engine, events, bus, monkeypatch):
    monkeypatch.setattr(engine, "_EVENTS_VM_MAX", 10)
    bus.is_open.clear()
    events.put("work", "first", "refused", {})
    assert bus.is_used.wait(60)
    for number in range(20):
        events.put("work", str(number), "refused", {})
    bus.is_open.set()
    bus.wait_fired("qvm-remote/work/9/refused")
    events.put("work", "last", "refused", {})
    bus.wait_fired("qvm-remote/work/last/refused")
    assert bus.tags == [f"qvm-remote/work/{cid}/refused" for cid in ("first", *range(10), "last")]


def test_commands_whose_end_nobody_hears_of_are_not_kept_in_mind(engine, events, monkeypatch):
    monkeypatch.setattr(engine, "_EVENTS_WAIT", 0.0)
    for number in range(100):
        events.note("work", str(number), "accepted")
    assert len(events._on_way) <= 1


def test_a_service_that_is_not_to_run_any_more_holds_nothing_open(engine, monkeypatch):
    signals, done = types.SimpleNamespace(is_set=False, is_idle=False), []

    def make(*_):
        signals.is_idle = signals.is_set = True
        return types.SimpleNamespace(run=lambda: done.append("run"), close=lambda: done.append("close"))

    monkeypatch.setattr(engine, "_make_service", make)
    engine._serve_until_stopped({}, signals, None, None)
    assert done == ["close"]


def test_an_engine_that_has_no_descriptors_serves_again_once_it_has_some(engine, monkeypatch, caplog):
    """Whether it finds so when it makes a service or while that is at work."""
    signals, troubles = types.SimpleNamespace(is_set=False, is_idle=False, waits=[]), ["make", "run", "run", None]
    signals.wait = signals.waits.append

    def fail(when):
        if troubles[0] == when:
            troubles.pop(0)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def run():
        fail("run")
        signals.is_set = True

    def make(*_):
        fail("make")
        return types.SimpleNamespace(run=run, close=lambda: None)

    monkeypatch.setattr(engine, "_make_service", make)
    engine._serve_until_stopped({}, signals, None, None)
    assert signals.is_set and signals.waits == [engine._TROUBLE_RETRY] * 3
    told = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert len(told) == 1 and "Too many open files" in told[0]


@pytest.mark.parametrize("text", [b"engines: [{\n", b"- a list\n", b"id: \xff\n"], ids=["no YAML", "no settings", "no UTF-8"])
def test_a_configuration_that_can_not_be_read_is_one_that_is_not_used(engine, tmp_path, text):
    """Salt would end the whole process."""
    path = tmp_path / "minion"
    engine.__opts__ = {"conf_file": str(path)}
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="can't be read"):
        engine._settings_in_file()
    path.write_text("id: dom0\nengines: [{qvm_remote: {timeout_max: 7}}]\n")
    assert engine._settings_in_file() == {"timeout_max": 7}


def test_an_event_that_can_not_be_fired_is_not_the_last_one_and_is_told_of_once(engine, monkeypatch, caplog):
    one, opened, fail = _Bus(), [], {"fire 0", "open", "close"}
    fire_event = one.fire_event

    @contextlib.contextmanager
    def get_event(*_, **__):
        opened.append(one)
        if len(opened) == 2 and "open" in fail:
            raise OSError("no such bus")
        yield one
        if "close" in fail:
            raise OSError("no such bus")

    def fire(data, tag):
        if f"fire {data['id']}" in fail:
            raise ValueError("it is broken")
        fire_event(data, tag)

    monkeypatch.setattr(engine.salt.utils.event, "get_event", get_event)
    one.fire_event = fire
    events = engine._Events({"master_type": "disable"})
    try:
        for number in range(5):
            events.put("work", str(number), "done", {})
        one.wait_fired("qvm-remote/work/4/done")
        # Each error costs one event, and the next one is tried on another bus.
        assert one.tags == [f"qvm-remote/work/{number}/done" for number in (2, 3, 4)]
        assert len(opened) == 3
    finally:
        fail.clear()
        events.close()
    told = [record.getMessage() for record in caplog.records if "events" in record.getMessage() and record.levelname == "WARNING"]
    assert len(told) == 1 and "it is broken" in told[0]
