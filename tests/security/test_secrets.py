# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys: on no command line and in no environment while they are made, handed over and used; in no core dump; and what happens when
a key is exchanged while it is in use.
"""

import subprocess

import pytest
from attackers import LIB, agents, wait

_KEYS = "/etc/qubes/remote.d"
#: Looks at every process again and again until it is told to end, and prints all command lines and environments that it has seen.
_WATCH = """
import glob, os, sys, time
seen = set()
sys.stdout.write("\\n")
sys.stdout.flush()
is_last = False
while not is_last:
    is_last = os.path.exists("/tmp/watched-enough")
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as file:
                seen.add(file.read())
        except OSError:
            continue
    time.sleep(0.004)
sys.stdout.buffer.write(b"\\n".join(seen))
"""


def _secret(dom0, vm="work"):
    return dom0.vm(vm, "qvm-remote", "key", "show", "--secret").stdout.strip()


@pytest.fixture
def watched(dom0):
    """All that is seen of processes in dom0 and in work while a test runs; gives a function that ends it and tells."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    watchers = [dom0.popen_dom0("/usr/bin/python3", "-c", _WATCH, **pipes), dom0.popen_vm("work", "/usr/bin/python3", "-c", _WATCH, **pipes)]
    for watcher in watchers:
        assert watcher.stdout.read(1) == b"\n"

    def end():
        decoys = []
        for start, run, where in ((dom0.popen_dom0, dom0.dom0, ()), (dom0.popen_vm, dom0.vm, ("work",))):
            # Something that must be seen, if anything is: it is there until the last look.
            decoys.append(start(*where, "env", "DECOY=seen-in-environ", "sleep", "317", **pipes))
            wait(lambda run=run, where=where: run(*where, "pgrep", "-fx", "sleep 317").returncode == 0)
            run(*where, "touch", "/tmp/watched-enough")
        seen = [watcher.communicate(timeout=60)[0] for watcher in watchers]
        for decoy in decoys:
            decoy.kill()
            decoy.communicate()
        return seen

    yield end
    for watcher in watchers:
        watcher.kill()
    dom0.dom0("rm", "-f", "/tmp/watched-enough")
    dom0.vm("work", "rm", "-f", "/tmp/watched-enough")


def test_no_key_is_in_any_process_while_keys_are_handed_over(dom0, watched):
    keys = [_secret(dom0)]
    # First by the agent; then by a shell's script, to a VM that has none.
    assert dom0.call("qvm_remote.rotate", "work")[1]["handed"] is True
    keys.append(_secret(dom0))
    dom0.vm("work", "sh", "-c", "mv /usr/bin/qvm-remote /usr/lib/qvm-remote/launcher; pkill -f 'qvm-remote agent'", user="root")
    try:
        assert dom0.call("qvm_remote.rotate", "work")[1]["handed"] is True
    finally:
        dom0.vm("work", "mv", "/usr/lib/qvm-remote/launcher", "/usr/bin/qvm-remote", user="root", check=True)
    keys.append(_secret(dom0))
    assert dom0.call("qvm_remote.authorize", "work", data=keys[-1])[0] == 0
    assert dom0.vm("work", "qvm-remote", "key", "import", "--force", data=keys[-1]).returncode == 0
    dom0.wait_served("work")
    assert dom0.remote("-n", "sleep 0.1; echo used").stdout == b"used\n"
    assert len(set(keys)) == 3
    for seen in watched():
        assert b"sleep\x00317" in seen
        assert b"DECOY=seen-in-environ" in seen
        for key in keys:
            assert key not in seen
            assert key.upper() not in seen


#: Crashes what has the key in its memory, where the kernel is to dump all of it.
_CRASH = """
import resource, tempfile
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
os.chdir(tempfile.mkdtemp())
# A test run in the background ignores it, and so would all that it starts.
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

def dumps(words, ready, **options):
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options)
    ready(process)
    # As a terminal does on Ctrl-backslash.
    process.send_signal(signal.SIGQUIT)
    status = os.waitpid(process.pid, 0)[1]
    return [os.WTERMSIG(status), os.WCOREDUMP(status)]

def greet(process):
    from pullrpc.frames import encode_frame
    process.stdin.write(encode_frame({"op": "key", "n": 1}))
    os.read(process.stdout.fileno(), 4096)

control = dumps(["sleep", "60"], lambda process: time.sleep(0.1))
client = dumps(["qvm-remote", "-n", "sleep 7654341"], lambda process: wait(lambda: os.listdir(f"{QUEUE}/running")))
agent = dumps(["qvm-remote", "agent"], greet, stdin=subprocess.PIPE, bufsize=0)
print(json.dumps([control, client, agent]))
"""


def test_no_program_in_the_vm_dumps_the_key(dom0):
    control, client, agent = dom0.python(LIB + _CRASH)
    # Nobody waits for it any more.
    wait(lambda: dom0.dom0("pkill", "-fx", "sleep 7654341").returncode == 0)
    dom0.vm("work", "sh", "-c", "rm -rf ~/.qvm-remote/queue/running/* ~/.qvm-remote/queue/results/*")
    # SIGQUIT ended all of them.
    assert [control[0], client[0], agent[0]] == [3, 3, 3]
    assert (client[1], agent[1]) == (False, False)
    if not control[1]:
        pytest.skip("nothing leaves a core dump on this machine")


def _running(dom0, line):
    client = dom0.popen_vm("work", "qvm-remote", "-n", line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait(lambda: dom0.dom0("pgrep", "-f", "cat /tmp/key-swapped").returncode == 0)
    return client


@pytest.mark.parametrize("swap", ["echo {} > {}.n; chmod 600 {}.n; mv {}.n {}", "rm -f {}", "rm -f {}; mkfifo -m 600 {}", "chmod 644 {}"])
def test_a_key_that_is_exchanged_in_dom0_ends_what_comes_and_not_what_runs(dom0, swap):
    path = f"{_KEYS}/work.key"
    good = dom0.dom0("cat", path).stdout
    dom0.dom0("mkfifo", "/tmp/key-swapped", check=True)
    words = swap.format("0123456789abcdef" * 4, *[path] * 4) if "echo" in swap else swap.format(*[path] * 2)
    try:
        client = _running(dom0, "cat /tmp/key-swapped; echo done")
        dom0.dom0("sh", "-c", words, check=True)
        refused = dom0.remote("-n", "touch /srv/attacked")
        assert refused.returncode == 125
        # Whatever became of that file, another VM is served.
        assert dom0.remote("hostname", vm="dev").stdout == b"dom0\n"
        dom0.dom0("sh", "-c", ": > /tmp/key-swapped", check=True)
        # Its proof is made with the key that it was asked for with.
        assert client.communicate(timeout=40) == (b"done\n", b"")
        assert client.returncode == 0
        assert dom0.dom0("test", "-e", "/srv/attacked").returncode == 1
    finally:
        dom0.dom0("sh", "-c", f"rm -f {path} /tmp/key-swapped; cat > {path}; chmod 600 {path}", data=good, check=True)
    dom0.wait_served("work")


def test_a_key_that_is_exchanged_in_the_vm_ends_what_comes_and_not_what_runs(dom0):
    good = _secret(dom0)
    before = agents(dom0)
    dom0.dom0("mkfifo", "/tmp/key-swapped", check=True)
    try:
        client = _running(dom0, "cat /tmp/key-swapped; echo done")
        dom0.vm("work", "qvm-remote", "key", "gen", "--force", check=True)
        refused = dom0.remote("-n", "touch /srv/attacked")
        assert (refused.returncode, b"the token does not fit" in refused.stderr) == (125, True)
        dom0.dom0("sh", "-c", ": > /tmp/key-swapped", check=True)
        assert client.communicate(timeout=40) == (b"done\n", b"")
        assert dom0.dom0("test", "-e", "/srv/attacked").returncode == 1
    finally:
        dom0.dom0("rm", "-f", "/tmp/key-swapped")
        dom0.vm("work", "qvm-remote", "key", "import", "--force", data=good, check=True)
    assert dom0.remote("hostname").stdout == b"dom0\n"
    assert agents(dom0) == before
