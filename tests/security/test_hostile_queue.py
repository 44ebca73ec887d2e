# SPDX-License-Identifier: GPL-2.0-or-later
"""Another program of a VM's user puts into the queue what does not belong there. Neither dom0 nor the VM's agent hangs, no session
ends, nothing is written to where a link points, and whoever asks for something else meanwhile, in this VM or in another, is served.
"""

import json
import os

import pytest
from attackers import KINDS, LIB, MAKE_DEVICES, agents, be_itself, wait

_BASE = "/home/user/.qvm-remote"
_KEY = f"{_BASE}/auth.key"


@pytest.fixture
def attacked(dom0):
    """The stand; what an attack left is gone after the test, and what it must not have done is looked at."""
    dom0.wait_served("work", "dev")
    key, before = dom0.vm("work", "cat", _KEY).stdout, agents(dom0)
    yield dom0
    dom0.vm("work", "pkill", "-KILL", "-f", "sleep 7654340|qvm-remote -n")
    dom0.vm("work", "sh", "-c", f"rm -rf {_BASE}/queue/rejected {_BASE}/queue/*/[!.]*")
    assert dom0.vm("work", "cat", _KEY).stdout == key
    assert dom0.dom0("test", "-e", "/srv/attacked").returncode == 1
    assert agents(dom0) == before, "the session broke"


def _assert_all_are_served(dom0):
    assert dom0.remote("hostname").stdout == b"dom0\n"
    assert dom0.remote("hostname", vm="dev").stdout == b"dom0\n"


_REQUESTS = """
planted = {}
for kind, suffix in [(kind, suffix) for kind in sys.argv[1:] for suffix in ("", ".auth", ".in", ".cancel")]:
    cid = new_cid()
    planted[f"{cid}{suffix}"] = kind
    plant(kind, f"{QUEUE}/pending/{cid}{suffix}")
    if suffix in ("", ".in"):
        write_whole(f"{QUEUE}/pending/{cid}.auth", token(cid, b"true"))
    if suffix in (".auth", ".in"):
        # It comes last, as the client's does: from now on the request is complete.
        write_whole(f"{QUEUE}/pending/{cid}", b"touch /srv/attacked" if suffix == ".auth" else b"true")
knock(BASE + "/doorbell")
print(json.dumps(planted))
"""


def _only_roots(kind):
    return pytest.param(kind, marks=pytest.mark.skipif(os.geteuid() != 0, reason="root of a user namespace may make no device"))


@pytest.mark.parametrize("kinds", [KINDS, _only_roots(["device"])], ids=["users", "roots"])
def test_what_is_no_plain_file_among_the_requests_holds_nobody_up(attacked, kinds):
    if kinds == ["device"]:
        attacked.in_vms_root("work", "sh", "-ec", MAKE_DEVICES)
    planted = attacked.python(LIB + _REQUESTS, *kinds)
    if kinds == ["device"]:
        # Each is where it is meant to be, and may be opened.
        attacked.vm("work", "rmdir", f"{_BASE}/devices", check=True)
    _assert_all_are_served(attacked)
    # Each is answered, and gone: not looked at again and again.
    wait(lambda: attacked.vm("work", "ls", "-A", f"{_BASE}/queue/pending").stdout == b"")
    answers = attacked.vm("work", "sh", "-c", f"cd {_BASE}/queue/results && grep . *.exit").stdout.splitlines()
    # Beside those of others before us, whose names may be anything.
    codes = {name.decode("utf-8", "replace"): code.decode() for name, _, code in (line.partition(b".exit:") for line in answers)}
    assert {name: kind for name, kind in planted.items() if name.partition(".")[0] not in codes and not name.endswith(".cancel")} == {}
    assert {name: kind for name, kind in planted.items() if name.endswith(".auth") and codes[name.partition(".")[0]] != "125"} == {}


_RESULTS = """
kind, command = sys.argv[1:]
client = subprocess.Popen(["qvm-remote", "-n", command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
cid = wait(lambda: os.listdir(f"{QUEUE}/running"))[0]
# It waits for its answer, and does not look: this is about who brings that.
client.send_signal(signal.SIGSTOP)
names = [f".{cid}.{part}.part" for part in ("out", "err", "meta")] + [f".{cid}.stream"] + [f"{cid}.{part}" for part in ("out", "err", "meta", "exit")]
if kind != "fifo":
    # One that nobody hears would say that the client has gone, and end its command.
    os.unlink(f"{QUEUE}/results/{cid}.bell")
    names.append(f"{cid}.bell")
for name in names:
    plant(kind, f"{QUEUE}/results/{name}")
os.unlink(f"{QUEUE}/running/{cid}")
plant(kind, f"{QUEUE}/running/{cid}")
print(json.dumps(cid))
"""


@pytest.mark.parametrize("kind", ["fifo", "fifo that is held open", "folder", "hard link to the key"])
def test_what_lies_where_a_result_belongs_holds_nobody_up(attacked, kind):
    attacked.dom0("mkfifo", "/tmp/squatted", check=True)
    try:
        # More than one frame holds, so that it comes in pieces.
        cid = attacked.python(LIB + _RESULTS, kind, "cat /tmp/squatted; head -c 600000 /dev/zero")
        _assert_all_are_served(attacked)
        attacked.dom0("sh", "-c", ": > /tmp/squatted", check=True)
        # dom0 has handed it over, and keeps nothing of it.
        wait(lambda: attacked.dom0("test", "-e", f"/var/lib/qvm-remote/spool/work/{cid}").returncode)
        assert attacked.vm("work", "stat", "-c", "%F", f"{_BASE}/queue/results/{cid}.exit").stdout == b"regular file\n"
        _assert_all_are_served(attacked)
    finally:
        attacked.dom0("rm", "-f", "/tmp/squatted")


_FOLDER = """
kind = sys.argv[1]
for name in ("doorbell", "agent.lock", "dom0-limits", "queue/rejected"):
    subprocess.run(["rm", "-rf", f"{BASE}/{name}"], check=True)
    plant(kind, f"{BASE}/{name}")
os.close(os.open(f"{QUEUE}/pending/no id", os.O_CREAT, 0o600))
subprocess.run(["pkill", "-f", "qvm-remote agent"], check=True)
print("1")
"""


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to what never ends", "link to itself", "hard link to the key"])
def test_what_lies_where_the_agents_own_files_belong_keeps_no_session_from_beginning(dom0, kind):
    key = dom0.vm("work", "cat", _KEY).stdout
    dom0.python(LIB + _FOLDER, kind)
    dom0.wait_served("work")
    assert dom0.remote("hostname").stdout == b"dom0\n"
    # Rung by clients, heard by the agent, and nothing that it would read without end.
    assert dom0.vm("work", "stat", "-c", "%F", f"{_BASE}/doorbell").stdout == b"fifo\n"
    assert dom0.vm("work", "ls", "-A", f"{_BASE}/queue/pending").stdout == b""
    assert dom0.vm("work", "cat", _KEY).stdout == key


_GROWING = """
cids, done = [new_cid() for _ in range(4)], threading.Event()

def grow(cid, size):
    line = token(cid, b"x" * size)
    write_whole(f"{QUEUE}/pending/{cid}.auth", line)
    with open(f"{QUEUE}/pending/.{cid}", "wb", buffering=0) as file, open(f"{QUEUE}/pending/{cid}.auth", "ab", buffering=0) as auth:
        file.write(b"x" * size)
        os.rename(f"{QUEUE}/pending/.{cid}", f"{QUEUE}/pending/{cid}")
        while not done.is_set():
            file.write(b"y" * 4096)
            if size == 2:
                auth.write(b"z")
            # Shorter again, from time to time, so that it does not come to its bound.
            if os.fstat(file.fileno()).st_size > 900_000:
                os.ftruncate(file.fileno(), 0)

threads = [threading.Thread(target=grow, args=(cid, size)) for cid, size in zip(cids, (1, 2, 60_000, 200_000))]
for thread in threads:
    thread.start()
knock(BASE + "/doorbell")
codes = wait(lambda: (codes := [exit_of(cid) for cid in cids]) and None not in codes and codes)
done.set()
print(json.dumps(codes))
"""


def test_files_that_grow_and_shrink_while_they_are_read_are_refused_and_nobody_waits(attacked):
    # What was read in the moment when it was what had been signed is a program that there is not.
    assert set(attacked.python(LIB + _GROWING)) <= {125, 126, 127}
    _assert_all_are_served(attacked)


_GROWING_STDIN = """
import hashlib
cids, done = [new_cid() for _ in range(3)], threading.Event()
sizes = dict(zip(cids, (10, 60_000, 700_000)))

def grow(cid, size):
    signed = hashlib.sha256(b"x" * size)
    line = make_token(key(), os.uname().nodename, cid, 60, "shell", b"sha256sum", signed.digest())
    with open(f"{QUEUE}/pending/{cid}.in", "wb", buffering=0) as file:
        file.write(b"x" * size)
        put(cid, b"sha256sum", line)
        while not done.is_set():
            file.write(b"y" * 65536)
            # Now and then it is what was signed, or goes far beyond all bounds in an instant.
            if os.fstat(file.fileno()).st_size > 30_000_000:
                os.ftruncate(file.fileno(), size)
                file.seek(size)
            elif size == 10:
                os.ftruncate(file.fileno(), 1 << 40)
                os.ftruncate(file.fileno(), size)
                file.seek(size)

threads = [threading.Thread(target=grow, args=one) for one in sizes.items()]
for thread in threads:
    thread.start()
codes = wait(lambda: (codes := [exit_of(cid) for cid in cids]) and None not in codes and codes)
done.set()
for thread in threads:
    thread.join()
outs = []
for cid in cids:
    with open(f"{QUEUE}/results/{cid}.out") as file:
        outs.append(file.read().split())
print(json.dumps([[code, out[:1] == [hashlib.sha256(b"x" * size).hexdigest()]] for code, out, size in zip(codes, outs, sizes.values())]))
"""


def test_a_stdin_that_grows_while_it_is_read_is_what_was_signed_or_refused(attacked):
    ended = attacked.python(LIB + _GROWING_STDIN)
    assert len(ended) == 3
    # Nothing ran with more than was signed.
    assert [end for end in ended if end not in ([125, False], [0, True])] == []
    _assert_all_are_served(attacked)


#: Names that are none of an id, and want to look like one, or like a line of a log, on whatever shows them.
_TRICKS = (
    *("20261124-000000-1-0badf00d\u200b", "\u202e20261124-000000-1-0badf00d", "\uff12\uff10261124-000000-1-0badf00d", "20261124-000000-1-0badf\u04300d"),
    *('x\n{"what":"accepted","vm":"dom0"}', "\x1b]0;namedso\x07\x1b[2J", "\u009b31m", "a\rb", "\udcff\udcc2\udc9b", "..", "-rf", "a" * 250),
    *("20261124-000000-1-0badf00d.meta", "20261124-000000-1-0badf00d.in.exit"),
)
_NAMES = """
for name in json.loads(sys.argv[1]):
    if name != "..":
        os.close(os.open(os.path.join(f"{QUEUE}/pending".encode(), name.encode("utf-8", "surrogateescape")), os.O_CREAT, 0o600))
    with contextlib.suppress(OSError):
        os.mkdir(os.path.join(f"{QUEUE}/pending".encode(), b"." + name.encode("utf-8", "surrogateescape")))
knock(BASE + "/doorbell")
print("1")
"""


def test_names_that_play_tricks_stay_in_the_vm(attacked):
    attacked.python(LIB + _NAMES, json.dumps(_TRICKS))
    _assert_all_are_served(attacked)
    wait(lambda: attacked.vm("work", "sh", "-c", f"ls {_BASE}/queue/pending").stdout == b"")
    logs = attacked.dom0("sh", "-c", "cat /var/log/qvm-remote/*.log").stdout
    assert b"0badf00d" not in logs
    assert b"namedso" not in logs
    attacked.vm("work", "sh", "-c", f"rm -rf {_BASE}/queue/pending/.[!.]*")


_MANY = """
kinds = {"names": [0], "requests": [1], "both": [0, 1]}[sys.argv[2]]
for number in range(int(sys.argv[1])):
    cid = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-1-{number:08x}"
    # A request without a token, or a name that is none of an id.
    name = cid if kinds[number % len(kinds)] else f"no id {number}"
    os.close(os.open(f"{QUEUE}/pending/{name}", os.O_CREAT, 0o600))
knock(BASE + "/doorbell")
print(len(os.listdir(f"{QUEUE}/pending")))
"""


_COUNTS = [
    (500, "both"),
    (3000, "names"),
    *(pytest.param(*many, marks=pytest.mark.long) for many in ((20_000, "both"), (1_000_000, "names"), (1_000_000, "both"))),
]


@pytest.mark.parametrize(("count", "kind"), _COUNTS)
def test_many_names_in_one_vm_delay_no_other_vm_and_break_no_session(attacked, count, kind):
    def count_in(folder):
        return int(attacked.vm("dev", "sh", "-c", f"ls -U {_BASE}/queue/{folder} | wc -l").stdout)

    before = agents(attacked, "dev")
    attacked.python(LIB + _MANY, str(count), kind, vm="dev", timeout=600)
    for _ in range(10):
        assert attacked.remote("hostname").stdout == b"dom0\n"
    if kind == "both":
        # The others were served before it was done with, not after: dom0 looks at a few a second of what it refuses.
        assert count_in("pending") > 0
    if kind == "names" or count < 20_000:
        wait(lambda: b"no id" not in attacked.vm("dev", "sh", "-c", f"ls -U {_BASE}/queue/pending | head -n 9").stdout, 600)
    # What is none of an id is put aside, and kept in small numbers in each session.
    assert count_in("rejected") <= 1000
    attacked.vm("dev", "sh", "-c", f"rm -rf {_BASE}/queue/rejected; find {_BASE}/queue/pending {_BASE}/queue/results -type f -delete", timeout=600)
    assert attacked.remote("hostname", vm="dev").stdout == b"dom0\n"
    assert agents(attacked, "dev") == before


_SEEN = """
for part in ("err", "exit"):
    plant(sys.argv[1], f"{QUEUE}/results/{sys.argv[1]}.{part}")
os.close(os.open(f"{QUEUE}/pending/{sys.argv[1]}", os.O_CREAT, 0o600))
plant(sys.argv[1], BASE + "/planted")
subprocess.run(["rm", "-rf", BASE + "/dom0-seen"], check=True)
os.rename(BASE + "/planted", BASE + "/dom0-seen")
print("1")
"""


#: The client of a VM whose agent was taken.
_PROGRAM = ("/usr/bin/python3", "-IS", "/usr/lib/qvm-remote/launcher")


def _take_agent(dom0, vm):
    """As with a template that has no client: nothing named qvm-remote is in the PATH of qvm-run's shell."""
    dom0.vm(vm, "sh", "-c", f"find {_BASE}/queue -mindepth 2 -delete")
    dom0.vm(vm, "sh", "-c", "mv /usr/bin/qvm-remote /usr/lib/qvm-remote/launcher; pkill -f 'qvm-remote agent'", user="root")


def _give_agent(dom0, vm):
    dom0.vm(vm, "sh", "-c", f"pkill -f '[s]leep 7654340'; rm -rf {_BASE}/queue {_BASE}/dom0-seen {_BASE}/devices")
    be_itself(dom0, vm)


def test_many_names_in_a_vm_without_the_agent_delay_no_other(dom0):
    def pending():
        return int(dom0.vm("dev", "sh", "-c", f"ls -U {_BASE}/queue/pending | wc -l").stdout)

    _take_agent(dom0, "dev")
    try:
        dom0.python(LIB + _MANY, "20000", "both", vm="dev")
        # By the shell's script, which puts some of them aside in each turn.
        wait(lambda: dom0.vm("dev", "sh", "-c", f"ls {_BASE}/queue/rejected/* 2>/dev/null | head -n 1").stdout)
        turns = []
        while len(turns) < 3:
            assert dom0.remote("hostname").stdout == b"dom0\n"
            if pending() not in turns:
                turns.append(pending())
        # It goes on meanwhile, turn by turn, and others were served before it was done with.
        assert turns == sorted(turns, reverse=True)
        assert turns[-1] > 0
    finally:
        _give_agent(dom0, "dev")


@pytest.mark.skipif(os.geteuid() != 0, reason="root of a user namespace may make no device")
def test_a_vm_without_the_agent_is_served_whatever_devices_root_has_put_into_its_queue(dom0):
    _take_agent(dom0, "work")
    try:
        dom0.in_vms_root("work", "sh", "-ec", MAKE_DEVICES)
        dom0.python(LIB + _REQUESTS, "device")
        dom0.vm("work", "rmdir", f"{_BASE}/devices", check=True)
        assert dom0.vm("work", *_PROGRAM, "hostname").stdout == b"dom0\n"
        wait(lambda: dom0.vm("work", "ls", "-A", f"{_BASE}/queue/pending").stdout == b"")
        assert dom0.dom0("test", "-e", "/srv/attacked").returncode == 1
    finally:
        _give_agent(dom0, "work")


def test_a_vm_without_the_agent_is_served_whatever_lies_in_its_queue(dom0):
    _take_agent(dom0, "work")
    key = dom0.vm("work", "cat", _KEY).stdout
    try:
        dom0.python(LIB + _REQUESTS, *KINDS)
        for kind in ("folder", "fifo that is held open", "nobody may read", "hard link to the key", "link to the key"):
            dom0.python(LIB + _SEEN, kind)
            assert dom0.vm("work", *_PROGRAM, "hostname").stdout == b"dom0\n"
            wait(lambda: dom0.vm("work", "ls", "-A", f"{_BASE}/queue/pending").stdout == b"")
            wait(lambda kind=kind: dom0.vm("work", "cat", f"{_BASE}/queue/results/{kind}.exit").stdout == b"125\n")
            assert dom0.vm("work", "cat", _KEY).stdout == key
        assert dom0.dom0("test", "-e", "/srv/attacked").returncode == 1
    finally:
        _give_agent(dom0, "work")
