# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's library qubesadmin in the simulator: events of what becomes of the qubes, and states as it keeps them."""

import subprocess

import pytest
from qubes_sim.handle import Sim
from qubes_sim.hypervisor import LIBRARY

#: Prints each event as it comes, with the state that the library knows of its subject.
_LISTENER = """\
import asyncio, signal, sys
import qubesadmin, qubesadmin.config, qubesadmin.events
qubesadmin.config.QUBESD_RECONNECT_DELAY = 0.1
signal.alarm(120)  # an event that never comes is an end of the lines, not a test that hangs
app = qubesadmin.Qubes()
dispatcher = qubesadmin.events.EventsDispatcher(app)
def broken(subject, event, **details):
    raise ValueError("a handler's mistake")
def show(subject, event, **details):
    state = subject.get_power_state() if subject else "-"
    print(event, subject and subject.name, state, *sorted(details.items()), flush=True)
for pattern in sys.argv[2:]:
    dispatcher.add_handler(pattern, show)
    dispatcher.add_handler(pattern, broken)
for unwanted in ("*", "domain-start"):
    dispatcher.add_handler(unwanted, print)
    dispatcher.remove_handler(unwanted, print)
vm = app.domains[sys.argv[1]] if sys.argv[1] else None
asyncio.run(dispatcher.listen_for_events(vm))
"""
_CONNECTED = "connection-established None -"
_PYTHON = ("env", f"PYTHONPATH={LIBRARY}", "/usr/bin/python3", "-c")


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    with Sim(tmp_path_factory.mktemp("events") / "s") as one:
        one.up(templates=["t"], vms=["work:t", "other:t"])
        yield one


@pytest.fixture
def listen(sim):
    """Listen to events in dom0: gives a function that starts it and returns the stream of its lines."""
    started = []

    def start(*patterns, vm=""):
        process = sim.popen_dom0(*_PYTHON, _LISTENER, vm, *patterns, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(process)
        assert _next(process.stdout) == [_CONNECTED]
        return process.stdout

    yield start
    for process in started:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def _next(lines, number=1):
    return [lines.readline().rstrip("\n") for _ in range(number)]


def test_handlers_see_what_becomes_of_a_qube_from_its_creation_to_its_removal(sim, listen):
    lines = listen("*")
    sim.create("new:t")
    sim.dom0("qvm-start", "new", check=True)
    sim.pause("new")
    sim.dom0("qvm-unpause", "new", check=True)
    sim.shutdown("new")
    sim.dom0("qvm-remove", "--force", "new", check=True)
    assert _next(lines, 7) == [
        "domain-add None - ('vm', 'new')",
        "domain-pre-start new Transient",
        "domain-start new Running",
        "domain-paused new Paused",
        "domain-unpaused new Running",
        "domain-shutdown new Halted",
        "domain-delete None - ('vm', 'new')",
    ]


def test_a_killed_qube_is_told_of_as_one_that_was_shut_down(sim, listen):
    lines = listen("connection-established", "domain-shutdown")
    sim.kill("other")
    assert _next(lines) == ["domain-shutdown other Halted"]
    sim.start("other")


def test_a_pattern_and_one_qube_can_be_asked_for(sim, listen):
    lines = listen("connection-*", "domain-*paused", vm="work")
    for vm in ("other", "work"):
        sim.pause(vm)
        sim.unpause(vm)
    assert _next(lines, 2) == ["domain-paused work Paused", "domain-unpaused work Running"]


def test_listeners_connect_again_after_a_restart_of_qubesd(sim, listen):
    lines = listen("*")
    sim.restart_qubesd()
    assert _next(lines) == [_CONNECTED]
    sim.pause("work")
    sim.unpause("work")
    assert _next(lines, 2) == ["domain-paused work Paused", "domain-unpaused work Running"]


def test_without_a_cache_a_state_is_that_of_the_moment_and_with_one_that_of_the_last_event(sim):
    program = """if True:
        import subprocess, qubesadmin
        fresh, kept = qubesadmin.Qubes(), qubesadmin.Qubes()
        kept.cache_enabled = True
        both = lambda: print(*[app.domains["work"].get_power_state() for app in (fresh, kept)])
        both()
        subprocess.run(["qvm-pause", "work"], check=True)
        both()
        kept._invalidate_cache_all()
        both()
        subprocess.run(["qvm-unpause", "work"], check=True)
    """
    done = sim.dom0(*_PYTHON, program, check=True)
    assert done.stdout == b"Running Running\nPaused Running\nPaused Paused\n"


def test_a_qube_that_runs_or_is_a_template_of_others_is_not_removed(sim):
    for vm in ("work", "t"):
        assert sim.dom0("qvm-remove", "-f", vm).returncode == 1
    assert sim.dom0("qvm-check", "work", "t").returncode == 0
