# SPDX-License-Identifier: GPL-2.0-or-later
"""The real minion and its engine are killed one without the other: no command is lost or run twice, and none outlives its answer."""

import subprocess
import time


def _wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def _start(dom0, marker):
    line = f"echo x >> {marker}; sleep 7654333"
    client = dom0.popen_vm("work", "qvm-remote", "-n", line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _wait(lambda: dom0.dom0("test", "-s", marker).returncode == 0)
    return client


def _check_interrupted(dom0, client, marker):
    _, errors = client.communicate(timeout=90)
    assert (client.returncode, b"interrupted" in errors) == (125, True), errors
    assert dom0.dom0("pgrep", "-f", "sleep 7654333").returncode == 1
    assert dom0.dom0("cat", marker).stdout == b"x\n"


def _engine(dom0):
    return int(dom0.dom0("cat", "/run/qvm-remote/engine.lock", check=True).stdout)


def test_an_engine_that_is_killed_alone_is_started_again_by_its_minion(dom0):
    marker = "/tmp/engine-alone"
    client = _start(dom0, marker)
    engine = _engine(dom0)
    dom0.dom0("kill", "-9", str(engine), check=True)
    _check_interrupted(dom0, client, marker)
    assert _engine(dom0) != engine
    dom0.wait_served("work", "dev")


def test_an_engine_whose_minion_is_killed_alone_ends_and_tells_the_clients(dom0):
    marker = "/tmp/minion-alone"
    client = _start(dom0, marker)
    stat = dom0.dom0("cat", f"/proc/{_engine(dom0)}/stat", check=True).stdout
    dom0.dom0("kill", "-9", stat.rpartition(b")")[2].split()[1].decode(), check=True)
    _check_interrupted(dom0, client, marker)
    dom0.kill_engine()
    dom0.start_engine()


def test_an_engine_with_a_damaged_ledger_serves_nobody_until_that_was_set_aside(dom0):
    dom0.stop_engine()
    ledger = "/var/lib/qvm-remote/ledger.sqlite"
    dom0.dom0("sh", "-c", f"rm -f {ledger}-*; echo garbage > {ledger}", check=True)
    dom0.factory.start()
    _, found = dom0.call("qvm_remote.ledger_check")
    assert len(found["problems"]) == 1
    assert dom0.remote("-t", "5", "true", timeout=90).returncode == 125
    code, found = dom0.call("qvm_remote.ledger_check", "set_aside=True")
    assert (code, found["problems"]) == (0, [])
    # The engine tries again by itself.
    dom0.wait_served("work", "dev")
