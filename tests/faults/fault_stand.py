# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulator in which everybody may die: the real service and the real clients and agents, without Salt, which would take
seconds for each start. And what must be true of all commands afterwards, whoever died when.
"""

import collections
import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time

from pullrpc.package import client_files
from qubes_sim.handle import Sim

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_HERE))
_IN_DOM0 = "/usr/lib/qvm-remote-service"
#: Where a test's own programs are seen.
PROGRAMS = "/usr/lib/qvm-remote-tests"
#: In dom0, what each command of :mod:`load` writes its mark and its id to.
MARKS = "/var/tmp/marks"
#: In dom0, what each command of :data:`KINDS` writes to as it goes on.
RAN = "/var/tmp/ran"
#: Longest that anything may take before a test gives up, seconds.
PATIENCE = 60
STATE, AUDIT, KEYS = "/var/lib/qvm-remote", "/var/log/qvm-remote", "/etc/qubes/remote.d"
_SETTINGS = {"discover_interval": 1, "poll_wait": 5, "answer_wait": 4, "max_age": 60, "syslog": False}
#: Tells each time that it goes on, and ends with 7.
_BEATS = "for i in {}; do echo $QVM_REMOTE_ID $i $EPOCHREALTIME >> " + RAN + "; sleep 0.05; done; "
#: Name to the words of a client, its stdin, and the output that its command has.
KINDS = {
    "short": (["-n", _BEATS.format("1") + "echo done; exit 7"], "", "done\n"),
    "beats": (["-n", "echo begun; " + _BEATS.format("1 2 3 4 5 6") + "echo done; exit 7"], "", "begun\ndone\n"),
    "stdin": ([_BEATS.format("1") + "wc -c; exit 7"], "x" * 300_000, "300000\n"),
    "large": (["-n", _BEATS.format("1") + "head -c 700000 /dev/zero | tr '\\0' y; exit 7"], "", "y" * 700_000),
}

RESULT, REFUSED, INTERRUPTED, FAILED, UNCLEAR = "result", "refused", "interrupted", "failed", "unclear"
#: What a client's line has in it, and what that means; every other one says that the command does not run.
_TOLD = (
    ("may have run|damaged|not authentic", UNCLEAR),
    ("interrupted", INTERRUPTED),
    ("the command (was )?ended|end could not be recorded", FAILED),
)

Ended = collections.namedtuple("Ended", "vm kind code out err at cid")


class Lines:
    """A program in a domain that takes orders and answers by lines.

    Attributes:
        KEPT: what lines begin with that are said unasked, and may come while another one is waited for: they are not passed over.
    """

    KEPT = ()

    def __init__(self, process):
        self.process = process
        self._lines = queue.Queue()
        self._passed = collections.deque()
        # What is told when it does not say what is waited for.
        self.seen = collections.deque(maxlen=20)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            # What it was saying when it was killed is not said.
            if line.endswith(b"\n"):
                self._lines.put(line.decode("utf-8").rstrip("\n"))
        self._lines.put(None)

    def order(self, text):
        """Tell it something; it may be dead."""
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(text.encode("ascii") + b"\n")
            self.process.stdin.flush()

    def next_line(self, seconds=PATIENCE):
        """What it says next; None when it has ended."""
        if self._passed:
            return self._passed.popleft()
        line = self._lines.get(timeout=seconds)
        if line is not None:
            self.seen.append(line)
        return line

    def waiting_lines(self):
        """What it has said meanwhile."""
        lines = list(self._passed)
        self._passed.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._lines.get_nowait()
                if line is not None:
                    lines.append(line)
        self.seen += lines
        return lines

    def wait_for(self, *beginnings):
        """What it says that begins like one of these; the last of what comes before is in ``seen``."""
        kept = []
        try:
            while True:
                line = self.next_line()
                assert line is not None, f"it ended; it had said: {list(self.seen)}"
                if line.startswith(beginnings):
                    return line
                if line.startswith(self.KEPT):
                    kept.append(line)
        finally:
            self._passed.extendleft(reversed(kept))

    def end(self):
        """Have it closed and waited for."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait(PATIENCE)


class Service(Lines):
    """The service; see service_process."""

    def look(self):
        """What there is of open commands in dom0."""
        self.order("look")
        return json.loads(self.wait_for("{"))

    def ran(self):
        """The lines that commands have written as they went on."""
        self.order("ran")
        return json.loads(self.wait_for("["))

    def hold(self, step, vm=""):
        """Stop it at a step, the next time it comes there, or the next time with a command of a VM."""
        self.order(f"hold {step} {vm}".rstrip())

    def kill_session(self, vm):
        """Kill dom0's end of the session to a VM, which there must be."""
        self.order(f"kill-session {vm}")
        assert self.wait_for("killed", "nothing to kill") == "killed", f"dom0 had no session to {vm}"

    def kill(self):
        """Kill -9."""
        self.order("die")
        self.process.wait(PATIENCE)

    def stop(self):
        """Stop it in an orderly way."""
        self.order("stop")
        self.wait_for("stopped")
        self.process.wait(PATIENCE)


class Clients(Lines):
    """The clients of a VM; see clients_in_vm."""

    #: A client ends when it does, whatever else is asked just then.
    KEPT = ('{"ended"',)

    def __init__(self, stand, vm):
        # As text: not every stand shows the tests' own files in its VMs.
        with open(os.path.join(_HERE, "clients_in_vm.py"), encoding="utf-8") as file:
            words = ("/usr/bin/python3", "-IS", "-c", file.read())
        super().__init__(stand.popen_vm(vm, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        self.vm = vm
        self.kinds = {}

    def start(self, key, kind, words=None, stdin=None, through=()):
        """Start a client."""
        self.kinds[key] = kind
        known = KINDS.get(kind, ((), "", ""))
        self.order(json.dumps({"start": key, "words": known[0] if words is None else words, "stdin": known[1] if stdin is None else stdin, "through": through}))

    def kill(self, key):
        """Kill a client."""
        self.order(json.dumps({"kill": key}))

    def kill_agent(self):
        """Kill the agent, which there must be."""
        self.order('{"do": "kill-agent"}')
        assert json.loads(self.wait_for('{"killed"'))["killed"], f"there was no agent in {self.vm}"

    def take_ended(self, line):
        """Read an answer: (key, Ended)."""
        found = json.loads(line)
        key = found["ended"]
        cid = found["err"].partition("qvm-remote: sent ")[2].partition(" ")[0]
        kind = self.kinds.pop(key)
        # The same object for each: there may be thousands of them.
        out = KINDS[kind][2] if kind in KINDS and found["out"] == KINDS[kind][2] else found["out"]
        return key, Ended(self.vm, kind, found["code"], out, found["err"], found["at"], cid)

    def wait_ended(self, keys):
        """Wait for the ends of some clients: dict of key to Ended."""
        ended = {}
        while set(ended) < set(keys):
            key, end = self.take_ended(self.wait_for('{"ended"'))
            ended[key] = end
        return ended

    def look(self):
        """The files in the queue."""
        self.order('{"do": "look"}')
        return json.loads(self.wait_for('{"queue"'))["queue"]

    def clear(self):
        """Remove results that nobody fetches."""
        self.order('{"do": "clear"}')
        self.wait_for('{"cleared"')


class FaultStand(Sim):
    """dom0, and some VMs with the client.

    Args:
        folder: str, of this test run.
        vms: tuple of str.
        settings: dict, more of the service's.
    """

    def __init__(self, folder, vms=("work", "dev"), **settings):
        super().__init__(os.path.join(folder, "sim"))
        self._folder = folder
        self.vms = vms
        self.settings = {**_SETTINGS, "vms": {vm: {} for vm in vms}, **settings}
        self.clients = {}
        self.service = None
        #: Where what the service writes to its stderr goes.
        self.errors = sys.stderr

    def set_up(self, disks=(), disk_size="2m", programs=None):
        """Bring everything up, with a session to each VM.

        Args:
            disks: folders in dom0 that are to be small disks of their own, outer ones first.
            disk_size: str, as mount takes it.
            programs: dict of name to text, to be seen in :data:`PROGRAMS` of dom0 and of the VMs.
        """
        client, service, driver = (os.path.join(self._folder, name) for name in ("client", "service", "driver"))
        for target, source, mode in client_files(os.path.join(_ROOT, "client")):
            path = os.path.join(client, target)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            shutil.copyfile(source, path)
            os.chmod(path, mode)
        shutil.copytree(os.path.join(_ROOT, "_utils", "pullrpc"), os.path.join(service, "pullrpc"), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(os.path.join(_HERE, "service_process.py"), service)
        os.makedirs(driver)
        for name, text in (programs or {}).items():
            with open(os.path.join(driver, name), "w", encoding="utf-8") as file:
                file.write(text)
        # They are shown there and can't be written to, and would be compiled at each start.
        subprocess.run(["/usr/bin/python3", "-m", "compileall", "-q", client, service], check=True)
        lib = "usr/lib/qvm-remote"
        in_vms = [f"{client}/{lib}:/{lib}", f"{client}/usr/bin/qvm-remote:/usr/bin/qvm-remote", f"{driver}:{PROGRAMS}"]
        self.up(templates=["debian"], vms=[f"{vm}:debian" for vm in self.vms], dom0_binds=[f"{service}:{_IN_DOM0}", f"{driver}:{PROGRAMS}"], vm_binds=in_vms)
        self.dom0("sh", "-c", f"mkdir -p {STATE} {AUDIT} {KEYS} && chmod 700 {STATE} {AUDIT} {KEYS}", check=True)
        for path in disks:
            self.dom0("sh", "-c", f"mkdir -p {path} && mount -t tmpfs -o size={disk_size},mode=700 tmpfs {path}", check=True)
        for vm in self.vms:
            self.clients[vm] = Clients(self, vm)
        self.start_service()
        for _ in self.vms:
            self.service.wait_for("key-handed")

    def start_service(self, *hold):
        """Start the service."""
        words = ("env", f"PYTHONPATH={_IN_DOM0}", "/usr/bin/python3", "-s", f"{_IN_DOM0}/service_process.py", json.dumps(self.settings), *hold)
        self.service = Service(self.popen_dom0(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors))
        return self.service

    def restart_service(self, *hold):
        """Kill the service at once, and start another one."""
        self.service.kill()
        return self.start_service(*hold)

    def fill(self, path, where=None):
        """Fill a small disk to its last block."""
        command = ("sh", "-c", f"dd if=/dev/zero of={path}/filler bs=4k 2>/dev/null; test -s {path}/filler")
        self.in_vms_root(where, *command) if where else self.dom0(*command, check=True)

    def free(self, path, where=None):
        """Make room on it again. The service may have: in folders of its own it keeps nothing that it does not know."""
        command = ("rm", "-f", f"{path}/filler")
        self.in_vms_root(where, *command) if where else self.dom0(*command, check=True)

    def make_read_only(self, path, on=True):
        """Have a small disk of dom0's read-only, or not any more."""
        self.dom0("mount", "-o", f"remount,{'ro' if on else 'rw'}", path, check=True)

    def cover(self, path, on=True, where=None):
        """Have a read-only disk in a folder's place, or not any more: for folders in which somebody has files open."""
        command = ("mount", "-t", "tmpfs", "-o", "ro,mode=755", "tmpfs", path) if on else ("umount", path)
        self.in_vms_root(where, *command) if where else self.dom0(*command, check=True)

    def power_cut(self, vm):
        """Kill a VM with all that is in it, and start it again."""
        self.kill(vm)
        self.clients[vm].end()
        self.boot(vm)

    def halt(self, vm):
        """Shut a VM down."""
        self.shutdown(vm)
        self.clients[vm].end()

    def boot(self, vm):
        """Start a VM that is halted."""
        self.start(vm)
        self.clients[vm] = Clients(self, vm)

    def down(self):
        """End everything."""
        if self.service is not None:
            self.service.order("die")
        super().down()

    def check(self, ended, dead=()):
        """See that all is as it must be.

        Args:
            ended: iterable of Ended.
            dead: VMs in which a client was killed: what came for it is there, and nobody fetches it.
        """
        beats = self.wait_settled(dead)
        for end in ended:
            check_end(end, beats.get(end.cid, []))

    def wait_settled(self, dead=()):
        """Wait until no command is on its way, and see that nothing is left of any.

        Returns:
            dict of id to list of float: when its command went on.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            left = self.left(dead)
            if not any(left.values()):
                break
            assert time.monotonic() < deadline, f"this is left: {left}"
            time.sleep(0.1)
        for vm in dead:
            # As its user would: what came for clients that are gone is theirs to put away.
            self.vm(vm, "qvm-remote", "queue", "clean", check=True)
            assert self.clients[vm].look() == [], f"clients that are gone left something in the queue of {vm}"
        beats = read_beats(self.service.ran())
        for cid, found in beats.items():
            assert is_one_run(found), f"{cid} ran twice: {found}"
        return {cid: [at for _, at in found] for cid, found in beats.items()}

    def left(self, dead=()):
        """What is there of commands that are not done with.

        Args:
            dead: VMs in which a client was killed.

        Returns:
            dict of place to what is there; all are empty when no command is on its way.
        """
        found = self.service.look()
        queues = {vm: [name for name in self.clients[vm].look() if vm not in dead or not name.startswith("results/2")] for vm in self.vms}
        return {**found, **queues}


def read_beats(lines):
    """Read what commands have written as they went on.

    Returns:
        dict of id to list of (number, seconds since the epoch)
    """
    beats = {}
    for line in lines:
        cid, number, at = line.split()
        beats.setdefault(cid, []).append((int(number), float(at)))
    return beats


def is_one_run(beats):
    """Whether the beats of an id are those of one run."""
    return [number for number, _ in beats] == list(range(1, len(beats) + 1))


def told_by(end):
    """The lines that a client says of its own, but for what -v adds, and that what it has shown is not all."""
    noise = re.compile(r"qvm-remote: (sent \d|\S+ ended with|the output above is incomplete)")
    return [line for line in end.err.splitlines() if not noise.match(line)]


def outcome(end):
    """What a client has ended with.

    Args:
        end: Ended.

    Returns:
        str: RESULT; REFUSED (it does not run); INTERRUPTED; FAILED (it ran to its end, or until it could not be kept); UNCLEAR (it
        says nothing, or that nobody knows).
    """
    if end.code == 7:
        return RESULT
    told = [line for line in told_by(end) if not line.startswith("qvm-remote: (this refusal carries no proof")]
    if end.code != 125 or len(told) != 1 or not told[0].startswith("qvm-remote: "):
        return UNCLEAR
    for pattern, name in _TOLD:
        if re.search(pattern, told[0]):
            return name
    return REFUSED


def check_end(end, beats):
    """See that a command ended in one of the ways that there are, and was run as that says.

    Args:
        end: Ended.
        beats: list of float, when its command went on.
    """
    found = outcome(end)
    # That a result could not be kept is for who fills disks.
    assert found in (RESULT, REFUSED, INTERRUPTED), end
    assert "no proof" not in end.err, end
    if found == RESULT:
        assert end.out == KINDS[end.kind][2], f"{end.cid} has another output than its command"
        assert beats, f"{end.cid} has a result and never ran"
        return
    if found == REFUSED:
        assert not beats, f"{end.cid} was refused, and ran"
    assert all(at <= end.at for at in beats), f"{end.cid} went on after its client was told that it was interrupted"
