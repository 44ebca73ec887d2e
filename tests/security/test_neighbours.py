# SPDX-License-Identifier: GPL-2.0-or-later
"""What one VM does with its ids, its agents and dom0's time is its own matter: another VM is served meanwhile, and gets its own answers."""

import json
import os
import subprocess
import sys
import time

import pytest
from attackers import LIB, agents, be_agent, be_itself, wait
from pullrpc.ids import new_cid


def _audit(dom0):
    return [json.loads(line) for line in dom0.dom0("cat", "/var/log/qvm-remote/audit.log").stdout.splitlines()]


def _assert_served_meanwhile(dom0, times=5):
    for number in range(times):
        assert dom0.remote("-n", f"echo {number}").stdout == f"{number}\n".encode()


def _assert_served_within_one(dom0, hanging, times):
    """Some commands are served while one and the same session, or turn, of another VM hangs, as it does each time until dom0 gives it up.

    An engine that waited for it alone would serve others only then, and never several commands before that. A slow machine may come to
    them in the next one.

    Args:
        dom0: Dom0.
        hanging: callable that names what hangs, or gives nothing.
        times: int.
    """
    deadline = time.monotonic() + 120
    while True:
        one = wait(hanging, 80)
        _assert_served_meanwhile(dom0, times)
        if hanging() == one:
            return
        assert time.monotonic() < deadline, "others are served only once dom0 has given up the one that hangs"


_JOBS = """
for _ in range(8):
    subprocess.Popen(["qvm-remote", "-n", "cat /tmp/long-job"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
wait(lambda: len(os.listdir(f"{QUEUE}/running")) == 8)
print("1")
"""


def test_eight_long_jobs_of_one_vm_delay_no_other(dom0):
    dom0.dom0("mkfifo", "/tmp/long-job", check=True)
    try:
        dom0.python(LIB + _JOBS, vm="dev")
        _assert_served_meanwhile(dom0)
        # Not one of them had ended.
        assert dom0.vm("dev", "sh", "-c", "ls ~/.qvm-remote/queue/running | wc -l").stdout == b"8\n"
    finally:
        dom0.vm("dev", "pkill", "-TERM", "-f", "qvm-remote -n")
        wait(lambda: dom0.dom0("pgrep", "-f", "cat /tmp/long-job").returncode)
        dom0.dom0("rm", "-f", "/tmp/long-job")


#: Agents that hang in the middle of a session, and how far they come.
_HANGING = {
    "before it answers": "rest = b''",
    "a byte a second": "rest = frame({'items': [], 'cancels': [], 'n': asked['n']})",
    "in mid header": "write(frame({'items': [], 'cancels': [], 'n': asked['n']})[:-20]); rest = b''",
    "in mid payload": f"write(frame({{'items': [['{new_cid()}', 3000, 100, -1, 1]], 'cancels': [], 'n': asked['n']}}, bytes(3100))[:-1000]); rest = b''",
}
#: Until dom0 gives it up: then its stdin ends. The mark names the session.
_HANGS = """
import select
with open("/tmp/hangs", "w") as file: file.write(str(os.getpid()))
try:
    while not select.select([0], [], [], 1)[0] or os.read(0, 65536):
        os.write(1, rest[:1])
        rest = rest[1:]
finally:
    os.unlink("/tmp/hangs")
"""


@pytest.mark.parametrize("where", sorted(_HANGING))
def test_an_agent_that_hangs_in_mid_answer_delays_no_other(dom0, where):
    def hanging():
        return dom0.vm("dev", "cat", "/tmp/hangs").stdout

    be_agent(dom0, "dev", f"greet(); asked = request()\n{_HANGING[where]}\n{_HANGS}")
    try:
        _assert_served_within_one(dom0, hanging, 3)
    finally:
        be_itself(dom0, "dev")


#: In the place of the shell that reads dom0's script: its answer has no end. It drips, so that qvm-run ends as soon as dom0 has given it up.
_HANGING_SHELL = """#!/bin/bash
[ "$1" = -s ] || exec /usr/bin/dash "$@"
while printf P; do sleep 0.05; done
"""


def test_a_vm_without_the_agent_that_hangs_in_mid_answer_delays_no_other(dom0):
    def hanging():
        return dom0.dom0("pgrep", "-f", "qvm-run .* dev ").stdout

    words = "cat > /usr/bin/.sh && chmod 755 /usr/bin/.sh && mv /usr/bin/.sh /usr/bin/sh && rm /usr/bin/qvm-remote && pkill -f 'qvm-remote agen[t]'"
    dom0.vm("dev", "sh", "-c", words, user="root", data=_HANGING_SHELL.encode(), check=True)
    try:
        _assert_served_within_one(dom0, hanging, 3)
    finally:
        be_itself(dom0, "dev")


_FLOOD = """
wrong, cids = os.urandom(32), []
for _ in range(400):
    cids.append(new_cid())
    put(cids[-1], b"touch /srv/attacked", token(cids[-1], b"touch /srv/attacked", wrong))
print(json.dumps(len(os.listdir(f"{QUEUE}/pending"))))
"""


def test_a_flood_of_wrong_tokens_delays_no_other_vm_and_fills_no_log(dom0):
    def sizes():
        return [int(word) for word in dom0.dom0("sh", "-c", "stat -c %s /var/log/qvm-remote/*.log").stdout.split()]

    before, logs = len(_audit(dom0)), sizes()
    dom0.python(LIB + _FLOOD, vm="dev")
    _assert_served_meanwhile(dom0, 10)
    left = int(dom0.vm("dev", "sh", "-c", "ls -U ~/.qvm-remote/queue/pending | wc -l").stdout)
    # Served before the flood was through, not after it.
    assert left > 0
    dom0.vm("dev", "sh", "-c", "rm -rf ~/.qvm-remote/queue/pending/* ~/.qvm-remote/queue/results/*")
    assert dom0.dom0("test", "-e", "/srv/attacked").returncode == 1
    told = wait(lambda: [line["what"] for line in _audit(dom0)[before:] if line["vm"] == "dev" and line["what"].startswith("refus")], 120)
    # Sixty a minute, and the flood may lie in two of them; each line is short. Where another test has used up this minute, they are counted,
    # which is told when it is over.
    assert 0 < len(told) <= 122
    assert sum(sizes()) - sum(logs) < 100_000
    dom0.wait_served("dev")


_SAME_ID = """
cid, word = sys.argv[1:]
put(cid, f"echo {word}".encode())
code = wait(lambda: os.path.exists(f"{QUEUE}/results/{cid}.exit") and exit_of(cid) is not None and [exit_of(cid)])[0]
with open(f"{QUEUE}/results/{cid}.out") as out, open(f"{QUEUE}/results/{cid}.err") as err:
    print(json.dumps([code, out.read(), err.read()]))
for part in ("out", "err", "meta", "exit"):
    os.unlink(f"{QUEUE}/results/{cid}.{part}")
"""


def test_the_same_id_from_two_vms_is_two_commands_and_twice_from_one_it_is_one(dom0):
    cid = dom0.python(LIB + "print(json.dumps(new_cid()))")
    assert dom0.python(LIB + _SAME_ID, cid, "of-work") == [0, "of-work\n", ""]
    assert dom0.python(LIB + _SAME_ID, cid, "of-dev", vm="dev") == [0, "of-dev\n", ""]
    for word in ("of-work", "another"):
        code, out, err = dom0.python(LIB + _SAME_ID, cid, word)
        assert (code, out) == (125, "")
        assert "used before" in err
    assert [line["vm"] for line in _audit(dom0) if line["what"] == "run" and line["id"] == cid] == ["work", "dev"]


_TWO_AGENTS = """
from pullrpc.frames import encode_frame
other = subprocess.Popen(["qvm-remote", "agent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
limits = {"timeout_max": 300, "command_max": 1 << 20, "stdin_max": 1 << 24, "max_age": 60}
other.stdin.write(encode_frame({"op": "hello", "v": 2, "limits": limits, "n": 1}))
# It hears the bell as well, and tells nobody.
other.stdin.write(encode_frame({"op": "poll", "wait": 300, "max": 0, "inline": 0, "n": 2}))
outs = [subprocess.run(["qvm-remote", "-n", f"echo {n}"], stdout=subprocess.PIPE).stdout.decode() for n in range(4)]
other.stdin.close()
other.wait(20)
outs.append(subprocess.run(["qvm-remote", "-n", "echo 4"], stdout=subprocess.PIPE).stdout.decode())
print(json.dumps(outs))
"""


def test_a_second_agent_in_a_vm_takes_nothing_from_the_first(dom0):
    before = agents(dom0)
    assert dom0.python(LIB + _TWO_AGENTS) == [f"{n}\n" for n in range(5)]
    assert agents(dom0) == before


#: Agents of dev, which know what runs for work: its id, and its whole request.
_FOREIGN = {
    "cancels it": """greet()
while True:
    asked = request()
    write(frame({{'items': [], 'cancels': ['{cid}'], 'n': asked['n']}}))""",
    "shows it as its own": """greet()
while True:
    asked = request()
    items = [['{cid}', {command}, {token}, -1, 1]] if asked['op'] == 'poll' else []
    write(frame({{'items': items, 'cancels': [], 'n': asked['n']}}, bytes.fromhex('{payload}') if items else b''))""",
    "says that nobody waits": """greet()
while True:
    asked = request()
    write(frame({{'items': [], 'cancels': [], 'gone': 1, 'n': asked['n']}}))""",
    "answers each question twice": """greet()
while True:
    asked = request()
    write(frame({{'items': [], 'cancels': [], 'n': asked['n']}}) * 2)""",
    "answers a byte a second": """greet()
asked = request()
for byte in frame({{'items': [], 'cancels': ['{cid}'], 'n': asked['n']}}): write(bytes([byte])); time.sleep(1)""",
}
_OF_WORK = """
client = subprocess.Popen(["qvm-remote", "-n", "cat /tmp/of-work; echo mine"], stdin=subprocess.DEVNULL, stdout=open("/tmp/of-work.out", "w"), stderr=subprocess.DEVNULL)
cid = wait(lambda: os.listdir(f"{QUEUE}/running"))[0]
with open(f"{QUEUE}/running/{cid}", "rb") as command, open(f"{QUEUE}/pending/{cid}.auth", "rb") as token:
    print(json.dumps([cid, command.read().hex(), token.read().hex()]))
"""


@pytest.mark.parametrize("how", sorted(_FOREIGN))
def test_an_agent_that_speaks_of_another_vms_command_does_nothing_to_it(dom0, how):
    dom0.dom0("mkfifo", "/tmp/of-work", check=True)
    try:
        cid, command, token = dom0.python(LIB + _OF_WORK)
        sizes = {"command": len(command) // 2, "token": len(token) // 2, "payload": command + token}
        before = len(_audit(dom0))
        be_agent(dom0, "dev", _FOREIGN[how].format(cid=cid, **sizes))
        _assert_served_meanwhile(dom0, 8)
        # dom0 has met this agent; what it showed as its own was refused.
        asked = "/tmp/asked-result" if how == "shows it as its own" else "/tmp/asked-poll"
        wait(lambda: dom0.vm("dev", "test", "-e", asked).returncode == 0)
        assert dom0.dom0("pgrep", "-f", "cat /tmp/of-work").returncode == 0
        dom0.dom0("sh", "-c", ": > /tmp/of-work", check=True)
        wait(lambda: dom0.vm("work", "cat", "/tmp/of-work.out").stdout == b"mine\n")
        assert [line["vm"] for line in _audit(dom0)[before:] if line["id"] == cid and line["what"] == "ended"] == ["work"]
    finally:
        dom0.dom0("rm", "-f", "/tmp/of-work")
        be_itself(dom0, "dev")


#: What a command holds to look like something else on the terminal of whoever reads of it in dom0.
_TRICKS = "echo '\u202eevil\u202c \u200bx \u0430\u0301 \u3164 \r\n{\"what\":\"accepted\"}\t\\u0061'"


def test_nothing_that_dom0_shows_of_a_command_does_something_on_a_terminal(dom0):
    folder = os.path.dirname(dom0.factory.config["conf_file"])
    assert dom0.remote("-n", _TRICKS).returncode == 0
    for words in (["qvm_remote.history", "work", "limit=3"], ["qvm_remote.status"]):
        # As a person sees it, and not as JSON.
        shown = dom0.dom0("salt-call", "--local", "--no-color", "-c", folder, *words).stdout
        assert b"work" in shown
        assert b"\\u202eevil" in shown or words != ["qvm_remote.history", "work", "limit=3"]
        assert all(byte == 10 or 32 <= byte < 127 for byte in shown), shown
    # Terminals obey these in UTF-8, too: nothing with them in it runs.
    done = dom0.remote("-n", "echo '\u009b2J\u009d0;owned\u009c'")
    assert (done.returncode, b"control characters" in done.stderr) == (125, True)
    done = dom0.remote("--exec", "echo", "\u009b2J")
    assert (done.returncode, b"control characters" in done.stderr) == (125, True)
    for path in ("/var/log/qvm-remote/audit.log", dom0.factory.config["log_file"]):
        assert all(byte in (9, 10) or 32 <= byte < 127 for byte in dom0.dom0("cat", path).stdout), path


#: Prints all events of ours, as JSON with nothing made harmless, until it is told that it is enough.
_LISTENER = """
import json, os, sys, time, salt.config, salt.utils.event
bus = salt.utils.event.get_event("minion", opts=salt.config.minion_config(sys.argv[1]), listen=True)
print("listening", flush=True)
end, seen = time.monotonic() + 300, []
while time.monotonic() < end and not os.path.exists(sys.argv[2]):
    event = bus.get_event(wait=1, tag="qvm-remote/", full=True)
    if event:
        seen.append([event["tag"], event["data"]])
print(json.dumps(seen))
"""
#: Says it wherever it has a word: as its version, as ids, as what went wrong.
_SHOUTS = r"""
shout = '\x1b]0;owned\x07\u202e\x9b2J'
answer({'v': 2, 'agent': shout, shout: shout})
answer({'fingerprint': None, 'problems': []})
while True:
    asked = request()
    if asked['op'] == 'poll':
        write(frame({'items': [[shout, 1, 1, -1, 0], ['20261124-000000-1-0badcafe' + shout, 1, 1, -1, 0]], 'cancels': [shout], 'n': asked['n'], shout: 1}))
    else:
        write(frame({'error': shout, 'n': asked['n']}))
"""


def _texts(value):
    """All texts within data."""
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in _texts(one)]
    if isinstance(value, dict):
        return _texts([*value, *value.values()])
    return [value] if isinstance(value, str) else []


def test_nothing_in_an_event_does_something_on_a_terminal(dom0):
    script, enough = f"{dom0.folder}/hear.py", f"{dom0.folder}/heard-enough"
    dom0.put(script, _LISTENER)
    watcher = dom0.popen_dom0(sys.executable, script, dom0.factory.config["conf_file"], enough, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert watcher.stdout.readline() == b"listening\n"
    try:
        be_agent(dom0, "dev", _SHOUTS)
        wait(lambda: dom0.vm("dev", "test", "-e", "/tmp/asked-poll").returncode == 0)
        assert dom0.remote("-n", _TRICKS).returncode == 0
        # Its own client would not send that. Where another test's flood has used up this minute, it is told of in the next one.
        ask = "cid = new_cid(); put(cid, b'echo \\x1b]0;owned\\x07'); print(wait(lambda: exit_of(cid)))"

        def is_told():
            before = len(_audit(dom0))
            assert dom0.python(LIB + ask) == 125
            return [line for line in _audit(dom0)[before:] if (line["vm"], line["what"]) == ("work", "refused")]

        wait(is_told, 120)
        be_itself(dom0, "dev")
        assert dom0.remote("-n", "hostname", vm="dev").returncode == 0
    finally:
        dom0.dom0("touch", enough)
    seen = json.loads(watcher.communicate(timeout=60)[0])
    dom0.dom0("rm", "-f", enough)
    whats = {(data["vm"], tag.split("/")[3]) for tag, data in seen}
    assert {("work", "refused"), ("work", "done"), ("dev", "connected")} <= whats
    # What the shouting agent said was heard, and was answered in dom0's own words.
    assert {("dev", "refused"), ("dev", "broken")} & whats
    assert [text for text in _texts(seen) if not all(" " <= one <= "~" for one in text)] == []
    assert "owned" not in json.dumps(seen)


def test_without_an_engine_too_a_long_job_of_one_vm_delays_no_other(dom0):
    dom0.stop_engine()
    dom0.dom0("mkfifo", "/tmp/long-job", check=True)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    dev, work = (dom0.popen_vm(vm, "qvm-remote", "-n", line, **quiet) for vm, line in (("dev", "cat /tmp/long-job"), ("work", "hostname")))
    for vm in ("dev", "work"):
        wait(lambda vm=vm: b".auth" in dom0.vm(vm, "ls", "/home/user/.qvm-remote/queue/pending").stdout)
    once = dom0.popen_dom0("salt-call", "--local", "-c", os.path.dirname(dom0.factory.config["conf_file"]), "qvm_remote.run_once", **quiet)
    try:
        # The VMs come in the order of their names.
        assert work.communicate(timeout=60)[0] == b"dom0\n"
        # It may begin later than that one has ended, and waits all the same.
        wait(lambda: dom0.dom0("pgrep", "-f", "cat /tmp/long-job").returncode == 0)
        assert once.poll() is None
    finally:
        dom0.dom0("sh", "-c", "timeout 20 sh -c ': > /tmp/long-job'; rm /tmp/long-job")
    assert dev.wait(60) == 0
    assert b"served" in once.communicate(timeout=60)[0]
