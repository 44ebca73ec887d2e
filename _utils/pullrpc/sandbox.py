# SPDX-License-Identifier: GPL-2.0-or-later
"""The sandbox: runs one command with a clean environment, bounded output and a time limit, and ends all it started.

A program of ours (supervisor) stands between the engine and the command; it serves one after another (see sandbox_slots).
Where systemd is PID 1 it runs in a transient unit with resource limits. A command that can't be confined is not run. For commands
that run as root, this keeps order and bounds mistakes; it is no wall against one that means to break out: whom dom0 authorizes,
it trusts. For those that run as another user (``run_as``) it is one, as far as docs/security.rst says.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import logging
import os
import signal
import stat
import time

from . import sandbox_slots, supervisor
from .accounts import Account
from .errors import PullError, SandboxError
from .ids import check_cid, check_vm_name

log = logging.getLogger(__name__)

#: Exit codes of a command that was ended by us; as timeout(1) and the shell have them.
_EXIT_TIMEOUT, _EXIT_CANCELLED = 124, 130
#: How much longer than its timeout and the grace a sandbox may take before it is given up, seconds.
_BACKSTOP = 10.0
#: How long the removal of the command's folder may hold up its result, seconds.
_CLEAN_WAIT = 5.0
#: How long the supervisors of a dead engine may take to end their commands, and how long the kernel may, seconds.
_ORPHANS_WAIT, _KILLED_WAIT = 5.0, 5.0
_LOOK_EVERY = 0.01
_ENDED_FROM_OUTSIDE = "the sandbox was ended from outside; the command was killed with it"
_MAY_RUN = "the sandbox was ended from outside; whether the command was killed with it can't be told"
_CANT_END = "a command of the service before can't be ended, so that nobody may be told that it was"
#: So that what is said of one command is never taken for another's.
_numbers = itertools.count(1)


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
        account: accounts.Account that runs it; None for the engine's own user, which is root.
    """

    vm: str
    cid: str
    argv: tuple
    script: bytes | None
    stdin_path: str | None
    out_path: str
    err_path: str
    timeout: int
    account: Account | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a command may use.

    Attributes:
        run_dir: str; the sandboxes are made under ``<run_dir>/jobs``.
        output_max: int, bytes kept of stdout and of stderr each.
        memory_max: int, bytes: of all its processes under systemd, else of each one's data.
        tasks_max, cpu_weight: int, as systemd has them. Elsewhere the first is for all processes of a user who isn't root (the kernel
            counts no processes for root), and the other is not enforced.
        nofile: int, open files of one process.
        path: str, PATH.
        work_max: int, bytes that fit into the working directory; not enforced where the engine may not mount.
        kill_grace: float, seconds that killing may take.
    """

    run_dir: str
    output_max: int
    memory_max: int
    tasks_max: int
    cpu_weight: int
    nofile: int
    path: str
    work_max: int = 256 << 20
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


def start(job, limits, on_output=None):
    """Start a command.

    Args:
        job: Job.
        limits: Limits.
        on_output: callable of (int, int), the bytes that ``out_path`` and ``err_path`` hold by now. Called within
            :meth:`Handle.wait`, by its thread, when they have grown, some 20 ms after that; not for the first 20 ms of a
            command, nor for what came just before its end. Once it raises, that is logged, and it is not called again.

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
    _check_folders(limits.run_dir)
    slot = sandbox_slots.pool().take(limits)
    name = f"{job.vm}-{job.cid}"
    # To another user than root, the slot's folder is shown in the place of all that is the engine's there.
    work = os.path.join(limits.run_dir if job.account else slot.folder, name)
    spec = {
        "number": next(_numbers),
        "name": name,
        "argv": [*job.argv, *([work + supervisor.SCRIPT] if job.script is not None else [])],
        "script": None if job.script is None else job.script.decode("utf-8", "surrogateescape"),
        "env": _environment(job, limits, work),
        "account": dataclasses.asdict(job.account) if job.account else None,
        "view": (slot.folder, limits.run_dir),
        "stdin": job.stdin_path,
        "out": job.out_path,
        "err": job.err_path,
        "output_max": limits.output_max,
        "timeout": job.timeout,
        "grace": limits.kill_grace,
        "nofile": limits.nofile,
        "data_max": slot.backend.data_max(limits),
        "nproc": slot.backend.processes_max(limits),
        "in_unit": slot.backend.IN_UNIT,
        "progress": on_output is not None,
    }
    handle = Handle(slot, spec, on_output)
    handle.begin()
    return handle


def warm(limits):
    """See to it that the next command with these limits need not wait for its supervisor to start.

    Args:
        limits: Limits.

    Raises:
        SandboxError: none can be started.
    """
    _check_folders(limits.run_dir)
    sandbox_slots.pool().warm(limits)


def close_idle():
    """End the supervisors that have no command; for the end of the service."""
    sandbox_slots.pool().close()


def sweep(run_dir):
    """Remove what a dead engine's sandboxes left; called while no other engine can be at work. On return none of its commands runs.

    Args:
        run_dir: str.

    Returns:
        int, how many supervisors had not cleaned up.

    Raises:
        SandboxError: the folder can't be used, or a command can't be ended.
    """
    _check_folders(run_dir)
    jobs = sandbox_slots.jobs_folder(run_dir)
    _end_supervisors(jobs)
    left = {os.path.join(jobs, name) for name in os.listdir(jobs)} - sandbox_slots.folders()
    backend = sandbox_slots.choose_backend()
    for folder in left:
        backend.kill(os.path.basename(folder))
    if not _have_ended(backend, left):
        raise SandboxError(_CANT_END)
    for folder in left:
        for name in _jobs_in(folder):
            vm, *cid = name.rsplit("-", 4)
            _kill_marked({"QVM_REMOTE_VM": vm, "QVM_REMOTE_ID": "-".join(cid)})
        sandbox_slots.remove_folder(folder, backend)
    return len(left)


def _have_ended(backend, folders):
    """Wait until the units of supervisors have ended; say whether they have. Who is in them can't be told otherwise: the service has
    fewer capabilities than its commands, and so may not read their environment.
    """
    deadline = time.monotonic() + _KILLED_WAIT
    for folder in folders:
        while not backend.has_ended(os.path.basename(folder)):
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_EVERY)
    return True


def _jobs_in(folder):
    """Names of the commands of which something is left in a supervisor's folder."""
    try:
        return {name.removesuffix(supervisor.SCRIPT) for name in os.listdir(folder)}
    except FileNotFoundError:
        # That supervisor was just removing it.
        return set()


def _end_supervisors(jobs):
    """Wait until no supervisor has a command: each holds the folder while it does, and ends its command when its engine is gone."""
    fd = os.open(jobs, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for wait in (_ORPHANS_WAIT, _KILLED_WAIT):
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    time.sleep(_LOOK_EVERY)
            # One that was stopped, say. What it started is found by its environment.
            for pid in _holders(os.fstat(fd)):
                _kill(pid)
    finally:
        os.close(fd)
    raise SandboxError(_CANT_END)


def _holders(info):
    """The processes that hold a folder, as the kernel lists them."""
    place = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    with open("/proc/locks", encoding="ascii") as file:
        rows = [line.split() for line in file]
    # Who waits for a lock is listed with an arrow, and not meant; whoever is in another namespace has number 0 or -1.
    return [int(row[4]) for row in rows if row[1] == "FLOCK" and row[5] == place and int(row[4]) > 0]


def _kill_marked(env, *sessions):
    """Kill all processes that have the environment of a command, or are of its session, and whom they start meanwhile."""
    marks = {f"{name}={env[name]}".encode() for name in ("QVM_REMOTE_VM", "QVM_REMOTE_ID")}
    deadline = time.monotonic() + _KILLED_WAIT
    while time.monotonic() < deadline:
        found = [pid for pid, _, _, session in supervisor.processes() if pid != os.getpid() and (session in sessions or _has_environment(pid, marks))]
        for pid in found:
            _kill(pid)
        if not found:
            return
        time.sleep(_LOOK_EVERY)


class _Broken(Exception):
    """The supervisor is gone, or can't be relied on."""


class Handle:
    """A command that runs."""

    def __init__(self, slot, spec, on_output):
        self._slot = slot
        self._spec = spec
        self._on_output = on_output
        self._pid = None

    def begin(self):
        """Tell the supervisor what to run.

        Raises:
            SandboxError: it ended at once.
        """
        self._slot.served += 1
        if not self._slot.send(self._spec):
            self._give_up()
            raise SandboxError("the sandbox could not be started")

    def cancel(self):
        """End the command soon; may be called from any thread, more than once, and when it has ended."""
        self._slot.send({"cancel": self._spec["number"]})

    def wait(self):
        """Wait for the command's end; to be called once.

        Returns:
            Outcome

        Raises:
            SandboxError: it was not run, its output could not be kept, or the sandbox was broken from outside.
        """
        deadline = time.monotonic() + self._spec["timeout"] + self._spec["grace"] + _BACKSTOP
        try:
            report = self._await_end(deadline)
            if "cleaned" not in report:
                report = {**report, **self._next_report(time.monotonic() + _CLEAN_WAIT, {})}
            answer = self._answer(report)
        except (_Broken, KeyError, TypeError, ValueError) as err:
            self._give_up()
            raise SandboxError(str(err) if isinstance(err, _Broken) else _ENDED_FROM_OUTSIDE) from err
        except BaseException:
            # Whatever interrupted this thread: the command ends with its supervisor.
            sandbox_slots.pool().retire(self._slot)
            raise
        if report.get("fit") is True:
            sandbox_slots.pool().put(self._slot)
        else:
            sandbox_slots.pool().retire(self._slot)
        if isinstance(answer, SandboxError):
            raise answer
        return answer

    def _answer(self, report):
        """What a report means: an Outcome, or the error to raise."""
        for problem in report.get("cleaned", ()):
            # Names that the command made: as plain text, and in one line.
            log.warning("%s: could not be removed: %a", self._spec["name"], problem)
        if report["left"]:
            log.warning("%s: %d processes could not be killed", self._spec["name"], report["left"])
        if "error" in report:
            return SandboxError(report["error"])
        if report["stopped"] == "orphaned":
            return SandboxError("the sandbox lost its engine; the command was killed")
        return self._outcome(report)

    def _outcome(self, report):
        stopped, limit = report["stopped"], self._spec["output_max"]
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

    def _await_end(self, deadline):
        """The supervisor's report of the command's end."""
        while True:
            report = self._next_report(deadline)
            if "stopped" in report or "error" in report:
                return report
            if "progress" in report:
                self._tell(report["progress"])
            self._pid = report.get("started", self._pid)

    def _next_report(self, deadline, default=None):
        """What the supervisor says next of this command; the default, if there is one, when that is nothing."""
        report = self._slot.next_report(deadline)
        if report is None and default is not None:
            return default
        if report is None or report.get("number") != self._spec["number"]:
            raise _Broken((report or {}).get("broken", _ENDED_FROM_OUTSIDE))
        return report

    def _tell(self, progress):
        # If more has been read already, that says it all.
        if self._on_output is None or self._slot.has_report():
            return
        try:
            self._on_output(*progress)
        except Exception:  # noqa: BLE001 - whatever goes wrong with showing output must not end the command.
            log.warning("%s: its output could not be passed on while it runs", self._spec["name"], exc_info=True)
            self._on_output = None

    def _give_up(self):
        """Kill what a broken supervisor left: its unit, the command's session, and whoever left it but has the command's environment.

        Raises:
            SandboxError: its unit can't be seen to have ended.
        """
        self._slot.kill()
        _kill_marked(self._spec["env"], self._pid)
        if not _have_ended(self._slot.backend, [self._slot.folder]):
            raise SandboxError(_MAY_RUN)


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


def _check_folders(run_dir):
    jobs = sandbox_slots.jobs_folder(run_dir)
    try:
        for folder in (run_dir, jobs):
            info = _look_or_make(folder)
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise SandboxError(f"{folder} must be a folder that only root can write to")
    except OSError as err:
        raise SandboxError(f"can't create {jobs}: {err.strerror}") from err


def _look_or_make(folder):
    try:
        return os.lstat(folder)
    except FileNotFoundError:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        return os.lstat(folder)


def _environment(job, limits, work):
    """The whole environment of a command; README.rst lists it."""
    if job.account:
        home, user = job.account.home, job.account.name
    else:
        home, user = ("/root", "root") if os.geteuid() == 0 else (work, str(os.geteuid()))
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
