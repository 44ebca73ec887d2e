# SPDX-License-Identifier: GPL-2.0-or-later
"""What the attacks share: programs of a VM's user that reach into its queue, and agents that are an attacker's."""

import time

#: Stands before a program that runs in a VM (see ``Dom0.python`` of the tests): its queue, its key, requests made by hand.
LIB = '''
import contextlib, json, os, signal, socket, stat, subprocess, sys, threading, time
from pullrpc.files import knock, write_whole
from pullrpc.ids import new_cid
from pullrpc.tokens import make_token, parse_key

BASE = os.path.expanduser("~/.qvm-remote")
QUEUE = BASE + "/queue"

def key():
    with open(BASE + "/auth.key", "rb") as file:
        return parse_key(file.read())

def token(cid, command, key=None):
    return make_token(key or globals()["key"](), os.uname().nodename, cid, 60, "shell", command)

def put(cid, command, line=None):
    """Make a request as the client does, with that token line or a true one."""
    write_whole(f"{QUEUE}/pending/{cid}.auth", token(cid, command) if line is None else line)
    write_whole(f"{QUEUE}/pending/{cid}", command)
    knock(BASE + "/doorbell")

def wait(condition):
    end = time.monotonic() + 40
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)

def exit_of(cid):
    with contextlib.suppress(OSError, ValueError):
        with open(f"{QUEUE}/results/{cid}.exit") as file:
            return int(file.read())

def plant(kind, path):
    """Have something else than a plain file of the queue's own lie there."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "fifo that is held open":
        os.mkfifo(path)
        subprocess.Popen(["sleep", "7654340"], stdin=os.open(path, os.O_RDWR), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    elif kind == "folder":
        os.makedirs(path + "/inside")
    elif kind == "link to what never ends":
        os.symlink("/dev/zero", path)
    elif kind == "link to itself":
        os.symlink(os.path.basename(path), path)
    elif kind == "link to the key":
        os.symlink(BASE + "/auth.key", path)
    elif kind == "hard link to the key":
        os.link(BASE + "/auth.key", path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(path)
    elif kind == "nobody may read":
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o000))
    elif kind == "device":
        os.rename(f"{BASE}/devices/{os.listdir(BASE + '/devices')[0]}", path)
    else:
        raise ValueError(kind)
'''
KINDS = (
    *("fifo", "fifo that is held open", "folder", "link to what never ends", "link to itself", "link to the key", "hard link to the key"),
    *("socket", "nobody may read"),
)
#: Makes devices that are planted, which are read without end; to be run as root of the whole machine.
MAKE_DEVICES = """
folder=/home/user/.qvm-remote/devices; mkdir $folder
for number in 1 2 3 4; do mknod $folder/$number c 1 5; chmod 666 $folder/$number; done
chown -R --reference=/home/user $folder
"""
#: Before a program that stands in the agent's place. It answers what it is asked, as wrongly as its author wants.
AGENT = """\
#!/usr/bin/python3 -IS
import json, os, sys, time
if sys.argv[1:] != ["agent"]:
    sys.exit(1)
# Whoever runs the attack learns that dom0 has met it.
open("/tmp/met-agent", "w").close()
def read(size):
    data = b""
    while len(data) < size:
        chunk = os.read(0, size - len(data))
        if not chunk:
            sys.exit(0)
        data += chunk
    return data
def request():
    head = read(8)
    header = json.loads(read(int.from_bytes(head[:4], "big")))
    read(int.from_bytes(head[4:], "big"))
    open("/tmp/asked-" + header["op"], "w").close()
    return header
def frame(header, payload=b""):
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    return len(raw).to_bytes(4, "big") + len(payload).to_bytes(4, "big") + raw + payload
def write(data):
    while data:
        data = data[os.write(1, data):]
def answer(header, payload=b""):
    write(frame({**header, "n": request()["n"]}, payload))
def greet():
    answer({"v": 2})
    answer({"fingerprint": None, "problems": []})
"""

_ID = "20261124-000000-1-0badcafe"
#: Name to what follows on AGENT.
AGENT_ATTACKS = {
    "endless-output": "while True: write(bytes(65536))",
    "endless-lines": "while True: write(b'y\\n' * 30000)",
    "no-output": "time.sleep(600)",
    "closes-early": "request(); sys.exit(0)",
    "huge-header": "write((1 << 31).to_bytes(4, 'big') + bytes(4)); time.sleep(600)",
    "huge-payload": "write(bytes(4) + (1 << 31).to_bytes(4, 'big'));\nwhile True: write(bytes(65536))",
    "no-json": "request(); write(frame(b'not json')); time.sleep(600)",
    "deep-json": "request(); write(frame(b'[' * 4000)); time.sleep(600)",
    "no-object": "request(); write(frame(b'[1, 2]')); time.sleep(600)",
    "wrong-number": "request(); write(frame({'v': 2, 'n': 99})); time.sleep(600)",
    "slow-drip": "request()\nfor byte in frame({'v': 2, 'n': 1}): write(bytes([byte])); time.sleep(0.5)",
    "bad-fingerprint": "answer({'v': 2}); answer({'fingerprint': 'x' * 1000, 'problems': []}); time.sleep(600)",
    "bad-problems": "answer({'v': 2}); answer({'fingerprint': None, 'problems': ['\\x1b[31m', '../..']}); time.sleep(600)",
    "unasked": "greet(); write(frame({'items': [], 'cancels': [], 'n': 2}) * 50); time.sleep(600)",
    "idle-poll": "greet()\nwhile True: answer({'items': [], 'cancels': []})",
    "bad-items": "greet(); answer({'items': {'a': 1}, 'cancels': []}); time.sleep(600)",
    "bad-sizes": f"greet(); answer({{'items': [['{_ID}', 1 << 60, 1, -1, 1]], 'cancels': []}}); time.sleep(600)",
    "bad-id": "greet(); answer({'items': [['../../etc/passwd', 1, 1, -1, 0]], 'cancels': []}); time.sleep(600)",
    "id-flood": f"greet(); answer({{'items': [['{_ID}', 1, 1, -1, 0]] * 100, 'cancels': []}}); time.sleep(600)",
    "cancel-flood": f"greet()\nwhile True:\n    asked = request()\n    write(frame({{'items': [], 'cancels': ['{_ID}'] * 16, 'n': asked['n']}}))",
    "refusal-flood": f"""greet()
while True:
    asked = request()
    write(frame({{'items': [['{_ID}', 1, -1, -1, 0]] if asked['op'] == 'poll' else [], 'cancels': [], 'n': asked['n']}}))""",
    "fetch-flood": f"""greet()
while True:
    asked = request()
    items = [['{_ID}', 1000000, 100, -1, 0]] if asked['op'] == 'poll' else []
    write(frame({{'items': items, 'cancels': [], 'n': asked['n']}}, b'x' if asked['op'] == 'fetch' else b''))""",
}


def wait(condition, seconds=40):
    """Wait until something is so; give what the condition gave."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def agents(dom0, vm="work"):
    """The pids of the agents in a VM: the same after an attack if that harmed no session."""
    return dom0.vm(vm, "pgrep", "-f", "qvm-remote agent").stdout.split()


def be_agent(dom0, vm, program):
    """Put a program in the place of a VM's agent, and return once dom0 has met it."""
    dom0.vm(vm, "sh", "-c", "cat > /usr/bin/qvm-remote; pkill -f 'qvm-remote agent'", user="root", data=(AGENT + program + "\n").encode())
    wait(lambda: has_met(dom0, vm))


def has_met(stand, vm):
    """Whether dom0 has started the attacker's agent in a VM since that VM was started."""
    return stand.vm(vm, "test", "-e", "/tmp/met-agent").returncode == 0


def in_session(dom0, vm):
    """Whether dom0 holds a session to a VM open."""
    return dom0.dom0("pgrep", "-f", f"qvm-run .* {vm} ").returncode == 0


def be_itself(dom0, vm):
    """Bring a VM back as its template has it."""
    dom0.shutdown(vm)
    dom0.start(vm)
    dom0.wait_served(vm)
