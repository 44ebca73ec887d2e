# SPDX-License-Identifier: GPL-2.0-or-later
"""Output reaches the client while the command runs, each byte once, and a command that nobody waits for is ended."""

import hashlib
import signal
import subprocess
import time

#: Writes a line, and goes on only when the test has seen it.
_HANDSHAKE = "echo one; echo first >&2; until [ -e {go} ]; do sleep 0.02; done; echo two; echo second >&2; exit 3"


def _wait(check, seconds=30):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _start(dom0, command, *options):
    return dom0.popen_vm("work", "qvm-remote", "-n", *options, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _runs(dom0, word):
    return dom0.dom0("pgrep", "-f", word).returncode == 0


def _go(dom0, request, name):
    path = f"/run/{name}"
    request.addfinalizer(lambda: dom0.dom0("rm", "-f", path))
    return path


def test_each_stream_shows_what_was_written_while_the_command_runs(dom0, request):
    go = _go(dom0, request, "go-lines")
    client = _start(dom0, _HANDSHAKE.format(go=go))
    assert client.stdout.readline() == b"one\n"
    assert client.stderr.readline() == b"first\n"
    dom0.dom0("touch", go, check=True)
    out, err = client.communicate(timeout=30)
    assert (out, err, client.returncode) == (b"two\n", b"second\n", 3)


def test_a_line_without_an_end_is_shown_too(dom0, request):
    go = _go(dom0, request, "go-prompt")
    client = _start(dom0, f"printf 'sure? '; until [ -e {go} ]; do sleep 0.02; done")
    assert client.stdout.read(6) == b"sure? "
    dom0.dom0("touch", go, check=True)
    assert client.communicate(timeout=30) == (b"", b"")
    assert client.returncode == 0


def test_much_output_in_bursts_arrives_whole(dom0):
    program = "import os, sys, time\nfor n in range(40):\n    sys.stdout.buffer.write(bytes([n]) * 200000)\n    sys.stdout.flush()\n    time.sleep(0.02)\n"
    done = dom0.remote("/usr/bin/python3 -", data=program.encode(), timeout=120)
    assert done.returncode == 0
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(b"".join(bytes([n]) * 200000 for n in range(40))).digest()


def test_a_reader_that_goes_away_ends_the_command(dom0):
    done = dom0.vm("work", "bash", "-c", "qvm-remote -n 'exec -a never-ending-yes yes' | head -n 1", timeout=60)
    assert done.stdout == b"y\n"
    _wait(lambda: not _runs(dom0, "never-ending-yes"))


def test_a_reader_that_goes_away_ends_a_command_that_writes_no_more(dom0):
    command = "echo one; exec -a silent-sleep sleep 300"
    done = dom0.vm("work", "bash", "-c", f"qvm-remote -n '{command}' | head -n 1", timeout=60)
    assert done.stdout == b"one\n"
    _wait(lambda: not _runs(dom0, "silent-sleep"))


def test_a_client_that_was_killed_is_noticed_when_there_is_something_to_show(dom0):
    client = _start(dom0, "while :; do echo tick; sleep 0.1; done & exec -a endless-ticks sleep 300")
    assert client.stdout.readline() == b"tick\n"
    dom0.vm("work", "pkill", "-KILL", "-f", "endless-ticks", user="root", check=True)
    client.communicate(timeout=30)
    _wait(lambda: not _runs(dom0, "endless-ticks"))


def test_an_interrupt_ends_the_command_and_all_it_started(dom0):
    client = _start(dom0, "setsid -f sh -c 'exec -a left-behind sleep 300'; echo started; exec -a left-behind sleep 300")
    assert client.stdout.readline() == b"started\n"
    dom0.vm("work", "pkill", "-INT", "-f", "^/usr/bin/python3 .*qvm-remote -n setsid", user="root")
    client.send_signal(signal.SIGINT)
    client.communicate(timeout=30)
    _wait(lambda: not _runs(dom0, "left-behind"))


def test_output_up_to_a_timeout_is_shown(dom0):
    client = _start(dom0, "echo before; sleep 300", "-t", "5")
    assert client.stdout.readline() == b"before\n"
    out, err = client.communicate(timeout=60)
    assert (out, client.returncode) == (b"", 124)
    assert b"timed out after 5 s" in err


def test_a_session_that_breaks_in_the_middle_costs_no_byte(dom0, request):
    go = _go(dom0, request, "go-broken")
    lines = f"for n in $(seq 2000); do echo line $n; done; until [ -e {go} ]; do sleep 0.02; done; for n in $(seq 2001 4000); do echo line $n; done"
    client = _start(dom0, lines)
    seen = b"".join(client.stdout.readline() for _ in range(2000))
    dom0.vm("work", "pkill", "-KILL", "-f", "qvm-remote agent", user="root", check=True)
    dom0.dom0("touch", go, check=True)
    out, err = client.communicate(timeout=60)
    assert err == b""
    assert client.returncode == 0
    assert (seen + out).split() == [word for n in range(1, 4001) for word in (b"line", str(n).encode())]


def test_an_engine_that_dies_in_the_middle_leaves_the_client_with_what_it_saw_and_a_reason(dom0):
    client = _start(dom0, "echo seen; sleep 300")
    assert client.stdout.readline() == b"seen\n"
    dom0.kill_engine()
    dom0.start_engine()
    out, err = client.communicate(timeout=60)
    assert (out, client.returncode) == (b"", 125)
    assert b"interrupted" in err


def test_a_cut_output_is_shown_up_to_the_cut(dom0):
    done = dom0.remote("-n", "head -c 12000000 /dev/zero; sleep 0.2", timeout=120)
    assert len(done.stdout) == 10 << 20
    assert b"stdout was cut after 10485760 of 12000000 bytes" in done.stderr
