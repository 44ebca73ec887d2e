# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the sandbox share: a place where commands are run by it, and ways to look at what became of them."""

import itertools
import os
import time
import types

import pytest
from pullrpc import sandbox, sandbox_slots, supervisor
from pullrpc.accounts import find_account
from pullrpc.errors import SandboxError

MIB = 1 << 20
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Shell text that leaves a daemon in a session of its own, whose pid is in a file.
DAEMON = "setsid sh -c 'echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600' </dev/null >/dev/null 2>&1 &\n"
DAEMON += "while [ ! -e {0} ]; do sleep 0.01; done\n"


class Box:
    """Runs commands in sandboxes under one temporary folder."""

    def __init__(self, folder):
        self.folder = folder
        self.run_dir = str(folder / "run")
        self.path = PATH
        self._numbers = itertools.count(1)

    def limits(self, output_max=MIB, memory_max=1 << 30, tasks_max=512, work_max=16 * MIB):
        """What commands may use here."""
        return sandbox.Limits(self.run_dir, output_max, memory_max, tasks_max, 100, 256, self.path, work_max)

    def start(self, *argv, timeout=60, script=None, stdin=None, cid=None, out_dir=None, on_output=None, run_as="root", **limits):
        """Start a command."""
        # Another test run may be at work here: by a command's id its processes are found.
        cid = cid or f"20260101-000000-{os.getpid()}-{next(self._numbers):08x}"
        files = [str((out_dir or self.folder) / f"{cid}.{part}") for part in ("out", "err")]
        job = sandbox.Job("work", cid, argv, script, stdin, *files, timeout, find_account(run_as))
        handle = sandbox.start(job, self.limits(**limits), on_output)
        handle.job = job
        return handle

    def run(self, *argv, **options):
        """Run a command; give its outcome, stdout and stderr."""
        handle = self.start(*argv, **options)
        outcome = handle.wait()
        return outcome, read(handle.job.out_path), read(handle.job.err_path)

    def sh(self, text, **options):
        """Run shell text."""
        return self.run("/bin/bash", "-c", text, **options)

    def broken(self, *argv, **options):
        """Run a command that breaks its sandbox; give the error, or the outcome when it did not."""
        try:
            return self.start(*argv, **options).wait()
        except SandboxError as err:
            return err

    def slot(self, **options):
        """Pid of the supervisor that runs a command."""
        return int(self.sh("echo $PPID", **options)[1])

    def left(self):
        """Names of what jobs left, in folders of supervisors or beside them."""
        jobs = os.path.join(self.run_dir, "jobs")
        return [name for slot in os.listdir(jobs) for name in os.listdir(os.path.join(jobs, slot))]

    def mounts(self):
        """Where something is mounted under its folder."""
        return [line.split()[4] for line in read("/proc/self/mountinfo").decode().splitlines() if str(self.folder) in line.split()[4]]


#: For what depends on how a command is started: in a unit it is spawned, elsewhere forked.
in_unit_too = pytest.mark.parametrize("box", ["elsewhere", "in_unit"], indirect=True)


def put_in_unit(monkeypatch, run_dir):
    """Have commands started as they are in a unit of systemd's."""
    own = {"IN_UNIT": True, "data_max": lambda _: 0, "processes_max": lambda _: 0}
    # What systemd does when a unit ends.
    own["kill"] = lambda name: supervisor.remove_place(os.path.join(run_dir, "jobs", name), unmount=True)
    unit = types.SimpleNamespace(**{**vars(sandbox_slots.sandbox_subreaper), **own})
    monkeypatch.setattr(sandbox_slots, "choose_backend", lambda: unit)
    # There is no unit, so what the tests' own group holds must not count.
    program = sandbox_slots._SOURCE.replace(b"(spec[\"in_unit\"] and _unit_holds_memory())", b"False")
    assert program != sandbox_slots._SOURCE
    monkeypatch.setattr(sandbox_slots, "_SOURCE", program)


def read(path):
    """All of a file."""
    with open(path, "rb") as file:
        return file.read()


def is_alive(pid):
    """Whether a process runs."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def long_enough(run, came_so_far):
    """What comes of a command whose time runs out, and of no shorter time than it needs before on this machine.

    Args:
        run: callable of the command's time limit, seconds.
        came_so_far: callable of what that gives, whether it had done by then what it was to do.
    """
    for seconds in (1, 5, 30):
        ended = run(seconds)
        if came_so_far(ended):
            return ended
    raise AssertionError("it has not even begun")


def eventually(check, seconds=60):
    """Whether something comes true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.02)
    return False


def pid_in(path):
    """The pid in a file that a command writes."""
    assert eventually(path.exists)
    return int(path.read_text())


def wait_for(path):
    """Shell text that waits for a file."""
    return f"while [ ! -e {path} ]; do sleep 0.01; done\n"


def supervisor_of(pid):
    """A command's parent."""
    return int(read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[1])


