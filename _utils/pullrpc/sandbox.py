# SPDX-License-Identifier: GPL-2.0-or-later
"""The sandbox: runs one command with a clean environment, bounded output and a time limit, and ends all it started.

A program of ours (supervisor) stands between the engine and the command; where systemd is PID 1 it runs in a transient
unit with resource limits. A command that can't be confined is not run. Since commands run as root, this keeps order
and bounds mistakes; it is no wall against a command that means to break out: whom dom0 authorizes, it trusts.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

from . import sandbox_subreaper, sandbox_systemd, supervisor
from .errors import PullError, SandboxError
from .ids import check_cid, check_vm_name

log = logging.getLogger(__name__)

#: Exit codes of a command that was ended by us; as timeout(1) and the shell have them.
_EXIT_TIMEOUT, _EXIT_CANCELLED = 124, 130
#: How much longer than its timeout and the grace a sandbox may take before it is given up, seconds.
_BACKSTOP = 10.0
#: How long the removal of the command's folder may hold up its result, seconds.
_CLEAN_WAIT = 5.0
_REPORT_MAX = 1 << 16
#: The supervisor's source, read once: Salt's cache, where this package lies, may be wiped at any time.
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "supervisor.py"), "rb") as _file:
    _SUPERVISOR = _file.read()


@dataclasses.dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        vm, cid: str, checked.
        argv: tuple of str.
        script: bytes, a script whose path is added to ``argv``; None for none.
        stdin_path: str, file that becomes stdin; None for an empty one.
        out_path, err_path: str, files to be made for the output.
        timeout: int, seconds.
    """

    vm: str
    cid: str
    argv: tuple
    script: bytes | None
    stdin_path: str | None
    out_path: str
    err_path: str
    timeout: int


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a command may use.

    Attributes:
        run_dir: str; the sandboxes are made under ``<run_dir>/jobs``.
        output_max: int, bytes kept of stdout and of stderr each.
        memory_max: int, bytes: of all its processes under systemd, else of each one's data.
        tasks_max, cpu_weight: int, as systemd has them; not enforced elsewhere (the kernel counts no processes for root).
        nofile: int, open files of one process.
        path: str, PATH.
        kill_grace: float, seconds that killing may take.
    """

    run_dir: str
    output_max: int
    memory_max: int
    tasks_max: int
    cpu_weight: int
    nofile: int
    path: str
    kill_grace: float = 2.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        exit_code: int, 0-255; 128+n for signal n, 124 timed out, 130 cancelled.
        signal: int or None.
        timed_out, cancelled: bool.
        out_bytes, err_bytes: int, what it wrote, kept or not.
        out_truncated, err_truncated: bool.
        seconds: float.
    """

    exit_code: int
    signal: int | None
    timed_out: bool
    cancelled: bool
    out_bytes: int
    err_bytes: int
    out_truncated: bool
    err_truncated: bool
    seconds: float


def start(job, limits):
    """Start a command.

    Args:
        job: Job.
        limits: Limits.

    Returns:
        Handle

    Raises:
        SandboxError: it can't be confined, so it was not started.
    """
    try:
        check_vm_name(job.vm)
        check_cid(job.cid)
    except PullError as err:
        raise SandboxError(str(err)) from err
    jobs = _jobs_folder(limits.run_dir)
    name = f"{job.vm}-{job.cid}"
    try:
        os.mkdir(os.path.join(jobs, name), 0o700)
    except OSError as err:
        # Not removed here: a folder that is there already belongs to a command that runs.
        raise SandboxError(f"the sandbox could not be set up: {err.strerror}") from err
    try:
        argv, program = _make_folder(jobs, name, job)
        backend = choose_backend()
        spec = {
            "jobs": jobs,
            "name": name,
            "argv": argv,
            "env": _environment(job, limits, os.path.join(jobs, name, supervisor.WORK)),
            "stdin": job.stdin_path,
            "out": job.out_path,
            "err": job.err_path,
            "output_max": limits.output_max,
            "timeout": job.timeout,
            "grace": limits.kill_grace,
            "nofile": limits.nofile,
            "data_max": backend.data_max(limits),
            "watch_parent": backend.IS_CHILD,
        }
        command = backend.wrap([_python(), "-I", "-S", program], name, job.timeout, limits)
        # A session of its own: a signal to the minion's process group is the engine's to handle.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": limits.path},
            start_new_session=True,
        )
    except OSError as err:
        _remove_folder(jobs, name)
        raise SandboxError(f"the sandbox could not be set up: {err.strerror}") from err
    handle = Handle(process, spec)
    handle.begin()
    return handle


def choose_backend():
    """Say how the supervisor is started here.

    Returns:
        module: sandbox_systemd where systemd is PID 1, else sandbox_subreaper.
    """
    # The manager's own socket, by which root's systemd-run asks it: the folder of transient units may be there without a manager.
    return sandbox_systemd if os.path.exists("/run/systemd/private") and shutil.which("systemd-run") else sandbox_subreaper


def sweep(run_dir):
    """Remove what a dead engine's sandboxes left; called while no other engine can be at work.

    Args:
        run_dir: str.

    Returns:
        int, how many there were.

    Raises:
        SandboxError: the folder can't be used.
    """
    jobs = _jobs_folder(run_dir)
    left = os.listdir(jobs)
    for name in left:
        _remove_folder(jobs, name)
    return len(left)


class Handle:
    """A command that runs."""

    def __init__(self, process, spec):
        self._process = process
        self._spec = spec
        self._write_lock = threading.Lock()
        self._buffer = b""
        self._pid = None

    def begin(self):
        """Tell the supervisor what to run.

        Raises:
            SandboxError: it ended at once.
        """
        try:
            self._process.stdin.write(json.dumps(self._spec).encode("ascii") + b"\n")
            self._process.stdin.flush()
        except OSError as err:
            self._give_up()
            raise SandboxError("the sandbox could not be started") from err

    def cancel(self):
        """End the command soon; may be called from any thread, and more than once."""
        with self._write_lock:
            try:
                os.write(self._process.stdin.fileno(), supervisor.CANCEL)
            except (OSError, ValueError):
                # It has ended already.
                return

    def wait(self):
        """Wait for the command's end.

        Returns:
            Outcome

        Raises:
            SandboxError: it was not run, its output could not be kept, or the sandbox was broken from outside.
        """
        deadline = time.monotonic() + self._spec["timeout"] + self._spec["grace"] + _BACKSTOP
        try:
            report = self._await_report(deadline)
            cleaned = self._next_line(time.monotonic() + _CLEAN_WAIT) if report else None
        finally:
            self._close()
        if report is None:
            self._give_up()
            raise SandboxError("the sandbox was ended from outside; the command was killed with it")
        for problem in (cleaned or {}).get("cleaned", ()):
            log.warning("%s: could not be removed: %s", self._spec["name"], problem)
        if "error" in report:
            raise SandboxError(report["error"])
        if report["left"]:
            log.warning("%s: %d processes could not be killed", self._spec["name"], report["left"])
        return self._outcome(report)

    def _outcome(self, report):
        stopped, limit = report["stopped"], self._spec["output_max"]
        if stopped == "orphaned":
            raise SandboxError("the sandbox lost its engine; the command was killed")
        code = 0 if report["status"] is None else os.waitstatus_to_exitcode(report["status"])
        died_of = -code if code < 0 else None
        if stopped:
            exit_code, died_of = (_EXIT_TIMEOUT if stopped == "timeout" else _EXIT_CANCELLED), None
        else:
            exit_code = 128 + died_of if died_of else code
        return Outcome(
            exit_code=exit_code,
            signal=died_of,
            timed_out=stopped == "timeout",
            cancelled=stopped == "cancel",
            out_bytes=report["out"],
            err_bytes=report["err"],
            out_truncated=report["out"] > limit,
            err_truncated=report["err"] > limit,
            seconds=report["seconds"],
        )

    def _await_report(self, deadline):
        while True:
            line = self._next_line(deadline)
            if line is None or "started" not in line:
                return line
            self._pid = line["started"]

    def _next_line(self, deadline):
        """The supervisor's next report; None when none comes."""
        fd = self._process.stdout.fileno()
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                return None
            chunk = os.read(fd, _REPORT_MAX)
            if not chunk or len(self._buffer) > _REPORT_MAX:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _close(self):
        with self._write_lock:
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(_CLEAN_WAIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _give_up(self):
        """Kill what a broken supervisor left: the command's session, and whoever left it but has the command's environment."""
        self._process.kill()
        self._process.wait()
        env = self._spec["env"]
        marks = {f"{name}={env[name]}".encode() for name in ("QVM_REMOTE_VM", "QVM_REMOTE_ID")}
        for pid, _, _, session in supervisor.processes():
            if pid != os.getpid() and (session == self._pid or _has_environment(pid, marks)):
                _kill(pid)
        _remove_folder(self._spec["jobs"], self._spec["name"])


def _has_environment(pid, marks):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return marks.issubset(file.read().split(b"\0"))
    except OSError:
        # Dead, or a kernel thread.
        return False


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _jobs_folder(run_dir):
    jobs = os.path.join(run_dir, "jobs")
    try:
        for folder in (run_dir, jobs):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            info = os.lstat(folder)
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise SandboxError(f"{folder} must be a folder that only root can write to")
    except OSError as err:
        raise SandboxError(f"can't create {jobs}: {err.strerror}") from err
    return jobs


def _make_folder(jobs, name, job):
    """Fill the command's folder: its working directory, and beside (not in) that its script, and the supervisor.

    Returns:
        (list of str, str): the command's argument vector, the supervisor's path.
    """
    folder = os.path.join(jobs, name)
    os.mkdir(os.path.join(folder, supervisor.WORK), 0o700)
    program = os.path.join(folder, "supervisor.py")
    _write_new(program, _SUPERVISOR)
    if job.script is None:
        return list(job.argv), program
    path = os.path.join(folder, supervisor.SCRIPT)
    _write_new(path, job.script)
    return [*job.argv, path], program


def _write_new(path, data):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def _remove_folder(jobs, name):
    try:
        fd = os.open(jobs, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for problem in supervisor.remove_tree(fd, name):
            log.warning("%s: could not be removed: %s", name, problem)
    finally:
        os.close(fd)


def _environment(job, limits, work):
    """The whole environment of a command; README.rst lists it."""
    home = "/root" if os.geteuid() == 0 else work
    user = "root" if os.geteuid() == 0 else str(os.geteuid())
    return {
        "PATH": limits.path,
        "HOME": home,
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "TMPDIR": work,
        "QVM_REMOTE_VM": job.vm,
        "QVM_REMOTE_ID": job.cid,
    }


def _python():
    # Inside a frozen Salt, sys.executable need not be an interpreter.
    name = os.path.basename(sys.executable or "")
    return sys.executable if name.startswith("python") else "/usr/bin/python3"
