# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs one command of a VM in dom0 with an environment, a folder and limits of its own, and ends all of it.

It never runs anything outside of the sandbox: when any part of it can't be set up, the command isn't started.
It doesn't confine a hostile command: that runs as root in dom0. The limits are against accidents, and to leave nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pwd
import select
import stat
import subprocess
import sys
import threading
import time

from . import sandbox_subreaper, sandbox_systemd, supervisor
from .errors import PullError, SandboxError
from .files import write_whole
from .ids import check_cid, check_vm_name

#: As ``timeout(1)`` has it, and a shell after Ctrl-C.
_EXIT_TIMEOUT, _EXIT_CANCELLED, _EXIT_SIGNAL = 124, 130, 128
_JOBS = "jobs"
#: Longest time until a supervisor runs its command, seconds. Far more than it takes, for a machine that is just booting.
_SETUP_WAIT = 30
#: How much longer than its command and the killing a supervisor may take before it is given up, seconds.
_SPARE = 10
#: How long a result waits for the removal of the command's files, seconds; the removal goes on afterwards.
_CLEANUP_WAIT = 5
#: How long to wait for a supervisor that has said its last word, or was killed, before a thread does, seconds.
_EXIT_WAIT = 0.05
_REPORT_MAX = 1 << 16
_REASON_MAX = 300
_PYTHON = "/usr/bin/python3"


@dataclasses.dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        vm, cid: str, whose it is.
        argv: tuple of str.
        script: bytes or None; written to a file whose path is added to argv.
        stdin_path: str or None for an empty stdin.
        out_path, err_path: str, files that don't exist yet.
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
        run_dir: str, folder of the jobs' folders; ours, and writable by nobody else.
        output_max: int, bytes that are kept of stdout and of stderr each.
        memory_max: int, bytes.
        tasks_max: int, processes and threads.
        cpu_weight: int, 1 to 10000, 100 being the usual.
        nofile: int, open files of one process.
        path: str, PATH.
        kill_grace: int or float, seconds that killing may take.
    """

    run_dir: str
    output_max: int
    memory_max: int
    tasks_max: int
    cpu_weight: int
    nofile: int
    path: str
    kill_grace: float = 2


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        exit_code: int, 0 to 255.
        signal: int or None, what it died of by itself.
        timed_out, cancelled: bool.
        out_bytes, err_bytes: int, what it wrote in all.
        out_truncated, err_truncated: bool, more than was kept.
        seconds: float.
        left: tuple of str, what could not be cleaned up, for the log.
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
    left: tuple = ()


def start(job, limits):
    """Start a command in a sandbox of its own.

    Args:
        job: Job.
        limits: Limits.

    Returns:
        Handle, whose ``wait`` must be called.

    Raises:
        SandboxError: it could not be set up; nothing runs.
    """
    _check(job)
    scope = choose_backend().Scope(job.vm, job.cid)
    name = f"{job.vm}-{job.cid}"
    jobs = _open_jobs(limits.run_dir)
    try:
        _make_folder(jobs, name, job, limits)
        try:
            scope.prepare(job.timeout, limits)
            spec = _make_spec(job, limits, scope.settings)
            handle = Handle(scope, spec)
        except BaseException:
            scope.close()
            supervisor.remove_tree(jobs, name)
            raise
    finally:
        os.close(jobs)
    handle.begin()
    return handle


def sweep(run_dir):
    """End and remove what the sandboxes of a dead engine left. Only for whoever holds the engine's lock.

    Args:
        run_dir: str.

    Returns:
        int, how many jobs' folders were found.

    Raises:
        SandboxError: the folder isn't safe to use.
    """
    jobs = _open_jobs(run_dir)
    try:
        names = os.listdir(jobs)
        for name in names:
            _end_leftover(name)
            supervisor.remove_tree(jobs, name)
    finally:
        os.close(jobs)
    return len(names)


def choose_backend():
    """Say which of the two backends this machine has.

    Returns:
        module: :mod:`.sandbox_systemd` where systemd runs the machine, else :mod:`.sandbox_subreaper`.
    """
    return sandbox_systemd if sandbox_systemd.is_available() else sandbox_subreaper


class Handle:
    """A command in its sandbox. Made by :func:`start` only.

    Args:
        scope: the backend's Scope.
        spec: dict, for the supervisor.
    """

    def __init__(self, scope, spec):
        self._scope = scope
        self._spec = spec
        self._main = None
        self._deadline = None
        self._lock = threading.Lock()
        self._cancelled = False
        try:
            self._process = subprocess.Popen(
                [*scope.prefix, *_supervisor_command()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd="/",
                env=dict(scope.environment, LANG="C.UTF-8"),
                start_new_session=True,
            )
        except OSError as err:
            raise SandboxError(f"the sandbox can't be started: {err.strerror}") from err
        self._reports = _Reports(self._process.stdout.fileno())

    def begin(self):
        """Tell the supervisor what to run, and wait until it does.

        Raises:
            SandboxError: it doesn't; nothing runs.
        """
        deadline = time.monotonic() + _SETUP_WAIT
        try:
            _send(self._process.stdin.fileno(), json.dumps(self._spec).encode("ascii") + b"\n", deadline)
            report = self._reports.next(deadline)
        except (BrokenPipeError, TimeoutError):
            report = None
        if report is None:
            reason = self._abandon()
            raise SandboxError(f"the sandbox can't be set up: {reason or 'it did not start'}")
        if "started" not in report:
            self._finish_cleanly()
            raise SandboxError(f"the sandbox can't be set up: {report['error']}")
        self._main = report["started"]
        self._deadline = time.monotonic() + self._spec["timeout"] + self._spec["grace"] + _SPARE

    def wait(self):
        """Wait until the command has ended and nothing of it is left. To be called once.

        Returns:
            Outcome

        Raises:
            SandboxError: the sandbox was broken, or the output could not be kept. Whatever ran was ended.
        """
        try:
            report = self._reports.next(self._deadline)
        except TimeoutError:
            self._abandon()
            raise SandboxError("the sandbox did not answer in time, and was ended with its command") from None
        if report is None:
            self._abandon()
            raise SandboxError("the sandbox was ended from outside, and its command with it")
        left = self._finish_cleanly()
        if "error" in report:
            raise SandboxError(report["error"])
        return _outcome(report, self._spec["output_max"], left)

    def cancel(self):
        """End the command; ``wait`` then tells that it was cancelled, unless it had ended before.

        May be called at any time, from any thread, more than once; returns at once.
        """
        with self._lock:
            if self._cancelled or self._process.stdin.closed:
                return
            self._cancelled = True
            try:
                os.write(self._process.stdin.fileno(), supervisor.CANCEL)
            except BrokenPipeError:
                # It has ended already; whoever waits learns how.
                return

    def _finish_cleanly(self):
        """Wait for the supervisor to clean up; return what it could not."""
        try:
            report = self._reports.next(time.monotonic() + _CLEANUP_WAIT)
        except TimeoutError:
            self._close()
            return ["the removal of its files is still going on"]
        if report is None:
            self._abandon()
            return ["the sandbox was ended from outside while it cleaned up"]
        self._close()
        return report["cleaned"]

    def _abandon(self):
        """Kill supervisor and command, clean up in its place; return the supervisor's last words."""
        self._process.kill()
        self._scope.kill(self._main)
        try:
            jobs = os.open(self._spec["jobs"], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            # Without the folder there is nothing to remove.
            pass
        else:
            supervisor.remove_tree(jobs, self._spec["name"])
            os.close(jobs)
        self._scope.close()
        last_words = _last_line(self._process.stderr.fileno())
        self._close()
        return last_words

    def _close(self):
        with self._lock:
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.stderr.close()
        try:
            self._process.wait(_EXIT_WAIT)
        except subprocess.TimeoutExpired:
            # systemd-run waits for the unit's end, which tells us nothing more; but somebody must bury it.
            threading.Thread(target=self._process.wait, daemon=True).start()


class _Reports:
    """The supervisor's lines, as they come."""

    def __init__(self, fd):
        self._fd = fd
        self._data = b""
        # poll, not select: a process with many files open has descriptors that select can't take.
        self._poller = select.poll()
        self._poller.register(fd, select.POLLIN)

    def next(self, deadline):
        """The next report.

        Returns:
            dict, None when there is none any more.

        Raises:
            TimeoutError: none came in time.
        """
        while b"\n" not in self._data:
            _await(self._poller, deadline)
            chunk = os.read(self._fd, _REPORT_MAX)
            if not chunk or len(self._data) > _REPORT_MAX:
                return None
            self._data += chunk
        line, _, self._data = self._data.partition(b"\n")
        try:
            report = json.loads(line)
        except ValueError:
            return None
        return report if isinstance(report, dict) else None


def _check(job):
    try:
        check_vm_name(job.vm)
        check_cid(job.cid)
    except PullError as err:
        raise SandboxError(str(err)) from err
    if not job.argv or any("\0" in word for word in job.argv):
        raise SandboxError("a command needs at least one word, and no NUL bytes")


def _open_jobs(run_dir):
    """The folder of all jobs' folders, made if need be, as a descriptor; only if nobody else could put something there."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    path = os.path.join(run_dir, _JOBS)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(run_dir, 0o700)
        parent = os.open(run_dir, flags)
        try:
            _check_owner(parent, run_dir)
            with contextlib.suppress(FileExistsError):
                os.mkdir(_JOBS, 0o700, dir_fd=parent)
            jobs = os.open(_JOBS, flags, dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as err:
        raise SandboxError(f"can't use {path} for sandboxes: {err.strerror}") from err
    try:
        _check_owner(jobs, path)
    except SandboxError:
        os.close(jobs)
        raise
    return jobs


def _check_owner(fd, path):
    info = os.fstat(fd)
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o022:
        raise SandboxError(f"{path} must belong to the user that runs the engine and be writable by nobody else")


def _make_folder(jobs, name, job, limits):
    try:
        os.mkdir(name, 0o700, dir_fd=jobs)
    except FileExistsError:
        raise SandboxError(f"the command {job.cid} of {job.vm} has a sandbox already") from None
    except OSError as err:
        raise SandboxError(f"can't make a folder for the command: {err.strerror}") from err
    folder = os.path.join(limits.run_dir, _JOBS, name)
    try:
        os.mkdir(os.path.join(name, supervisor.WORK), 0o700, dir_fd=jobs)
        if job.script is not None:
            write_whole(os.path.join(folder, supervisor.SCRIPT), job.script, 0o400)
    except OSError as err:
        supervisor.remove_tree(jobs, name)
        raise SandboxError(f"can't make a folder for the command: {err.strerror}") from err


def _make_spec(job, limits, settings):
    jobs = os.path.join(limits.run_dir, _JOBS)
    name = f"{job.vm}-{job.cid}"
    script = () if job.script is None else (os.path.join(jobs, name, supervisor.SCRIPT),)
    return {
        "jobs": jobs,
        "name": name,
        "argv": [*job.argv, *script],
        "env": _make_environment(job, limits.path, os.path.join(jobs, name, supervisor.WORK)),
        "stdin": job.stdin_path,
        "out": job.out_path,
        "err": job.err_path,
        "timeout": job.timeout,
        "grace": limits.kill_grace,
        "output_max": limits.output_max,
        "nofile": limits.nofile,
        **settings,
    }


def _make_environment(job, path, work):
    """All that a command sees of dom0's environment; nothing of the engine's gets through."""
    user = pwd.getpwuid(os.geteuid())
    return {
        "PATH": path,
        "HOME": user.pw_dir,
        "USER": user.pw_name,
        "LOGNAME": user.pw_name,
        "SHELL": user.pw_shell or "/bin/sh",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "TMPDIR": work,
        "QVM_REMOTE_VM": job.vm,
        "QVM_REMOTE_ID": job.cid,
    }


def _supervisor_command():
    python = sys.executable
    # A frozen Salt may be an executable of its own that takes no Python options.
    if not os.path.basename(python or "").startswith("python"):
        python = _PYTHON
    return [python, "-I", "-S", os.path.abspath(supervisor.__file__)]


def _end_leftover(name):
    parts = name.rsplit("-", 4)
    try:
        vm, cid = check_vm_name(parts[0]), check_cid("-".join(parts[1:]))
    except PullError:
        # Half removed already; no command is in there.
        return
    scope = choose_backend().Scope(vm, cid)
    scope.kill(None)
    scope.close()


def _send(fd, data, deadline):
    os.set_blocking(fd, False)
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    rest = memoryview(data)
    while rest:
        _await(poller, deadline)
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            continue


def _await(poller, deadline):
    left = deadline - time.monotonic()
    if left <= 0 or not poller.poll(left * 1000):
        raise TimeoutError


def _last_line(fd):
    """The end of what is in a pipe now."""
    os.set_blocking(fd, False)
    try:
        text = os.read(fd, _REPORT_MAX).decode("utf-8", "replace")
    except BlockingIOError:
        return ""
    lines = text.strip().splitlines()
    return lines[-1][:_REASON_MAX] if lines else ""


def _outcome(report, output_max, left):
    status, stopped = report["status"], report["stopped"]
    if report["left"]:
        left = [f"{report['left']} processes could not be killed", *left]
    exit_code, signum = _exit_of(status, stopped)
    return Outcome(
        exit_code=exit_code,
        signal=signum,
        timed_out=stopped == "timeout",
        cancelled=stopped == "cancel",
        out_bytes=report["out"],
        err_bytes=report["err"],
        out_truncated=report["out"] > output_max,
        err_truncated=report["err"] > output_max,
        seconds=report["seconds"],
        left=tuple(left),
    )


def _exit_of(status, stopped):
    if stopped == "timeout":
        return _EXIT_TIMEOUT, None
    if stopped:
        return _EXIT_CANCELLED, None
    if os.WIFSIGNALED(status):
        return _EXIT_SIGNAL + os.WTERMSIG(status), os.WTERMSIG(status)
    return os.WEXITSTATUS(status), None
