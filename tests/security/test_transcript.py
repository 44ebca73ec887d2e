# SPDX-License-Identifier: GPL-2.0-or-later
"""The transcript of sessions, recorded on the way: dom0 asks, the VM answers, and there is no byte that nobody asked for."""

import json
import subprocess

import pytest

#: Stands in qvm-run's place, passes everything on, and writes down what passed, in the order it passed.
_RECORDER = """\
#!/usr/bin/python3 -IS
import json, os, select, subprocess, sys
real = subprocess.Popen(["/usr/bin/qvm-run", *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
record = open({folder!r} + "/record-%d" % os.getpid(), "w")
record.write(json.dumps(sys.argv[1:]) + chr(10))
ways = {{0: ("dom0", real.stdin.fileno()), real.stdout.fileno(): ("vm", 1)}}
poller = select.poll()
for fd in ways:
    poller.register(fd, select.POLLIN)
while ways:
    for fd, _ in poller.poll():
        data = os.read(fd, 65536)
        who, target = ways[fd]
        record.write(json.dumps([who, data.hex()]) + chr(10))
        record.flush()
        if not data:
            poller.unregister(fd)
            del ways[fd]
            if who == "vm":
                sys.exit(real.wait())
            real.stdin.close()
        while data:
            data = data[os.write(target, data):]
"""


@pytest.fixture
def records(dom0):
    """Sessions recorded while a test runs; gives a function that stops the engine and reads them."""
    folder = f"{dom0.folder}/records"
    dom0.put(f"{dom0.folder}/path/qvm-run", _RECORDER.format(folder=folder))
    dom0.dom0("sh", "-c", f"mkdir -p {folder}; chmod 0755 {dom0.folder}/path/qvm-run", check=True)
    dom0.stop_engine()
    dom0.start_engine()

    def read():
        dom0.stop_engine()
        names = dom0.dom0("ls", folder).stdout.decode().split()
        return [[json.loads(line) for line in dom0.dom0("cat", f"{folder}/{name}").stdout.splitlines()] for name in names]

    yield read
    dom0.dom0("rm", "-rf", folder, f"{dom0.folder}/path/qvm-run", check=True)
    dom0.stop_engine()


def _frames(data):
    """Cut a stream into frames: (list of headers, whether a part of another one follows)."""
    headers = []
    while len(data) >= 8:
        head, payload = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
        if len(data) < 8 + head + payload:
            return headers, True
        headers.append(json.loads(data[8 : 8 + head]))
        data = data[8 + head + payload :]
    return headers, bool(data)


def test_every_byte_from_a_vm_lies_within_the_answer_to_a_request(dom0, records):
    assert dom0.remote("hostname").stdout == b"dom0\n"
    assert dom0.remote("cat", data=bytes(3 << 20)).stdout == bytes(3 << 20)
    many = "for i in $(seq 10); do qvm-remote -n \"echo $i\" & done; wait"
    assert len(dom0.vm("work", "bash", "-c", many).stdout.split()) == 10
    sessions = [record for record in records() if record[0][-1] == "qvm-remote agent"]
    assert sessions
    answered = 0
    for _, *chunks in sessions:
        sent = {"dom0": b"", "vm": b""}
        for who, data in chunks:
            sent[who] += bytes.fromhex(data)
            if who != "vm" or not data:
                continue
            requests, _ = _frames(sent["dom0"])
            answers, more = _frames(sent["vm"])
            # An answer may have begun only if its request had passed in whole.
            assert len(answers) + more <= len(requests)
            assert [one["n"] for one in answers] == [one["n"] for one in requests[: len(answers)]]
        answered += len(answers)
    assert answered > 20


def test_no_qvm_run_is_started_for_a_command(dom0, records):
    for number in range(10):
        assert dom0.remote("-n", f"exit {number}").returncode == number
    # One session for each VM that is served (another one if it broke), however many commands it asks for.
    assert len(records()) < 10


def test_dom0_never_starts_a_vm_and_takes_no_gui(dom0, records):
    assert dom0.remote("hostname").returncode == 0
    for words, *_ in records():
        assert "--no-autostart" in words
        assert "--no-gui" in words


def test_no_key_is_ever_on_a_command_line(dom0):
    secret = dom0.vm("work", "qvm-remote", "key", "show", "--secret").stdout.decode().strip()
    assert len(secret) == 64
    client = dom0.popen_vm("work", "qvm-remote", "-n", "sleep 1", stdin=subprocess.DEVNULL)
    for _ in range(10):
        for place in (dom0.dom0, lambda *words: dom0.vm("work", *words)):
            assert secret.encode() not in place("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '").stdout
    assert client.wait(20) == 0
