# SPDX-License-Identifier: GPL-2.0-or-later
"""The program between the engine and its commands: runs one after another, keeps their output, ends all they left behind.

A process of its own: reads lines of JSON from stdin (what to run, what to cancel), writes lines of JSON to stdout.
It never lets a command touch those two, holds output in memory, waits for background processes, outlives the engine, or
takes a command while anything of the last one is left. Imports little, and nothing of this package: it runs with ``python -I -S``.

What a command leaves in its working directory fills nothing but a small file system of this process's own. A command that is
run as another user than root sees dom0 through a mount namespace of its own, can't become anybody else, and finds nobody there
who would be root on its behalf.
"""

import ctypes
import errno
import fcntl
import gc
import json
import os
import resource
import select
import signal
import sys
import termios
import time

#: What is added to a job's name for the file that holds its script; its working directory has the bare name.
SCRIPT = ".script"
#: As a shell has it: found but not to be executed, not found.
_EXIT_NOT_EXECUTABLE, _EXIT_NOT_FOUND = 126, 127
_NOT_FOUND = (errno.ENOENT, errno.ENOTDIR)
_CHUNK = 1 << 18
_SPEC_CHUNK = 1 << 16
#: How often growing output is told of, and how long a command has lived before it first is, seconds.
_PROGRESS = 0.02
#: Pause between two rounds of killing, seconds.
_ROUND = 0.005
#: Most problems that are named after the clean-up; one is enough to tell what happened.
_PROBLEMS_MAX = 5
#: Files in memory (/dev/shm, /tmp) that a command left count against its unit's memory; with more, no other command runs there, bytes.
_HELD_MAX = 1 << 20
#: Written by the child when all its limits are in force, just before it becomes the command.
_READY = b"ready"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_SLAVE = 1, 2, 4, 8, 4096, 1 << 14, 1 << 19
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_CLONE_NEWNS = 0x00020000
#: What those who are not root don't get to see: by the system bus everybody may have systemd run what he likes as root, since dom0's
#: polkit says yes to all.
_HIDDEN = ("/run/dbus",)
#: One file is allowed for so many bytes; each takes the kernel some memory, empty or not.
_BYTES_PER_FILE = 4096
#: How often something may have been mounted on one folder.
_MOUNTS_MAX = 64
#: Number of the system call, which the C library doesn't have.
_KEYCTL = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine)
_KEYCTL_JOIN_SESSION_KEYRING = 1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_OOM_SCORE, _OOM_PROTECTED = "/proc/self/oom_score_adj", b"-900"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A part of the sandbox could not be made; the command was not started."""


class KeepError(Exception):
    """The command's output could not be kept."""


def main():
    """Serve the engine until it says ``quit`` or is gone; the process ends here.

    Its arguments are that engine's pid and start time, the folder that is made for its commands, and how many bytes fit in there.
    """
    try:
        line = Line(int(sys.argv[1]), int(sys.argv[2]))
        place = Place(sys.argv[3], int(sys.argv[4]))
        oom_score = _protect_from_oom()
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        # For the command each has its own; called here too, since the first call finds the function, which each child had to do again.
        _leave_keyring()
    except (SetupError, OSError, AttributeError) as err:
        # The last one: this Python knows of no os.pidfd_open.
        _report({"broken": str(err)})
        os._exit(1)
    _report({"supervisor": os.getpid()})
    # Inherited by every command, and not to be changed from there.
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    # It would write to every page that a fork has just shared. There is little to collect, and no process lives for long.
    gc.disable()
    try:
        while True:
            spec = line.next_spec()
            if spec is None or not _serve(line, spec, oom_score, niceness, place):
                break
    finally:
        place.leave()
        os._exit(0)


def _serve(line, spec, oom_score, niceness, place):
    """Run one command and report on it; say whether this process is fit for another."""
    number, name = spec["number"], spec["name"]
    # Until it is closed, no other engine tells anybody that this command was interrupted.
    jobs = os.open(os.path.dirname(place.path), _DIRECTORY)
    fcntl.flock(jobs, fcntl.LOCK_SH)
    supervision = Supervision(line, spec, oom_score, place)
    try:
        report = supervision.run()
    except (SetupError, KeepError) as err:
        report = {"error": str(err)}
    finally:
        left = supervision.end_everything()
        supervision.close()
    report.update(number=number, left=left)
    sound = not left and "error" not in report and os.getpriority(os.PRIO_PROCESS, 0) == niceness
    problems = []
    if not remove_plain(place.fd, name):
        # That may take a while, and the result need not wait for it.
        _report(report)
        report = {"number": number}
        problems = remove_job(place.fd, name)
    os.close(jobs)
    fit = sound and line.stop is None and place.is_as_new() and not (spec["in_unit"] and _unit_holds_memory())
    _report({**report, "cleaned": problems, "fit": fit})
    return fit


class Place:
    """Where the commands have their working directories: a folder, and a file system of its own wherever one may be mounted.

    What a command leaves there is in nobody's way then, neither dom0's nor another command's.

    Args:
        path: str; made here.
        size: int, bytes that fit.

    Attributes:
        fd: int, the folder's descriptor: whatever a command mounts over that path later, this is still the one that was made.

    Raises:
        OSError: it can't be made.
    """

    def __init__(self, path, size):
        self.path = path
        os.mkdir(path, 0o700)
        options = f"size={size},nr_inodes={size // _BYTES_PER_FILE},mode=0711"
        try:
            _mount("qvm-remote", path, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
            self._is_bounded = True
        except PermissionError:
            # An ordinary user's, or that of a root who may mount nothing.
            self._is_bounded = False
        self.fd = os.open(path, _DIRECTORY)
        self._new = self._look()

    def furnish(self, name, script, account):
        """Make a job's working directory, and beside it (not in it) the file of its script.

        Args:
            name: str, the job's.
            script: str, or None.
            account: dict of the user whose it is to be, or None.

        Returns:
            int, the directory's descriptor.

        Raises:
            OSError: it can't be made.
        """
        os.mkdir(name, 0o700, dir_fd=self.fd)
        if script is not None:
            fd = os.open(name + SCRIPT, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
            try:
                _write_all(fd, script.encode("utf-8", "surrogateescape"))
                if account:
                    _let_read(fd, account)
            finally:
                os.close(fd)
        work = os.open(name, _DIRECTORY, dir_fd=self.fd)
        if account:
            os.fchown(work, account["uid"], account["gid"])
        return work

    def is_as_new(self):
        """Say whether nothing is left here of a command: no file, no byte that something still holds, no mount, no other bounds.

        Returns:
            bool
        """
        try:
            return self._look() == self._new
        except OSError:
            return False

    def leave(self):
        """Remove it."""
        os.close(self.fd)
        remove_place(self.path, unmount=True)

    def _look(self):
        info = os.stat(self.path, follow_symlinks=False)
        found = os.fstatvfs(self.fd)
        room = (found.f_blocks, found.f_bfree, found.f_files, found.f_ffree, found.f_flag) if self._is_bounded else None
        return info.st_dev, info.st_ino, room


class Line:
    """The connection with the engine, and all else that this process has to hear: signals, the engine's end.

    Args:
        engine: int, the engine's pid.
        since: int, when that process started, as :func:`start_time` gives it.

    Attributes:
        stop: why this process has to end: None, "orphaned" (the engine is gone) or "cancel" (the init system wants it).
        poller: select.poll, watches all of it; a command's pipes are added.

    Raises:
        SetupError, OSError: the engine can't be watched.
    """

    def __init__(self, engine, since):
        self.stop = None
        self._buffer = b""
        self._messages = []
        # A copy of the engine's end of stdin may survive it in a process it forked, so the end of stdin doesn't tell all.
        self._engine_fd = os.pidfd_open(engine)
        if start_time(engine) != since:
            raise SetupError("the engine is gone")
        self._wake_fd, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(signum, signal.SIG_DFL)
        # Heard and not ignored: exec makes a signal that is heard the command's default again, and leaves one that is ignored.
        for signum in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(signum, lambda *_: None)
        for signum in _STOP_SIGNALS:
            signal.signal(signum, self._on_stop_signal)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.poller = select.poll()
        for fd in (0, self._wake_fd, self._engine_fd):
            self.poller.register(fd, select.POLLIN)

    def next_spec(self):
        """Wait for the next command.

        Returns:
            dict, as ``sandbox.start`` made it; None: there will be none.
        """
        while self.stop is None:
            while self._messages:
                message = self._messages.pop(0)
                # A cancel that is heard here came after the end of what it meant.
                if "argv" in message:
                    return message
            for fd, _ in self.poller.poll():
                self.hear(fd)
        return None

    def hear(self, fd):
        """Take in what one of the descriptors that are watched always has to say."""
        if fd == self._engine_fd:
            self.stop = "orphaned"
        elif fd == self._wake_fd:
            self.clear_wake()
        else:
            self._read()

    def hears_cancel_of(self, number):
        """Say whether the engine wants the command that runs ended.

        Args:
            number: int, the command's.

        Returns:
            bool
        """
        cancelled = {"cancel": number} in self._messages
        self._messages.clear()
        return cancelled

    def pause(self, seconds):
        """Wait for a signal, but no longer than some seconds."""
        select.select([self._wake_fd], [], [], seconds)
        self.clear_wake()

    def clear_wake(self):
        """Forget which signals came; whoever waits for one looks at what it was to tell."""
        try:
            os.read(self._wake_fd, 4096)
        except BlockingIOError:
            pass

    def _read(self):
        chunk = os.read(0, _SPEC_CHUNK)
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        self._messages += map(json.loads, lines)
        if not chunk or {"quit": True} in self._messages:
            self.stop = "orphaned"

    def _on_stop_signal(self, *_):
        # The init system ends the engine and us alike: the same as a cancel, so that the engine can tell what happened.
        self.stop = self.stop or "cancel"


class Supervision:
    """One command, from start to end.

    Args:
        line: Line.
        spec: dict, as ``sandbox.start`` made it.
        oom_score: bytes or None, what the command gets as its oom_score_adj.
        place: Place.
    """

    def __init__(self, line, spec, oom_score, place):
        self._line = line
        self._spec = spec
        self._oom_score = oom_score
        self._place = place
        self._main = None
        self._main_status = None
        self._fds = set()
        self._streams = []

    def run(self):
        """Start the command and see it end.

        Returns:
            dict, the report: ``status`` (wait status or None), ``stopped`` (None, "timeout", "cancel" or "orphaned"), ``seconds``,
            ``out`` and ``err`` (bytes written in all).

        Raises:
            SetupError: the command was not started.
            KeepError: its output can't be kept; it was ended.
        """
        started = self._start()
        try:
            _report({"number": self._spec["number"], "started": self._main})
            stopped = self._attend(started)
            seconds = time.monotonic() - started
            if stopped is None:
                self._drain()
            self.end_everything()
            self._drain()
            for stream in self._streams:
                stream.secure()
        except OSError as err:
            raise KeepError(f"the command was ended because its output can't be kept: {err.strerror}") from err
        out, err = self._streams
        return {"status": self._main_status, "stopped": stopped, "seconds": seconds, "out": out.seen, "err": err.seen}

    def end_everything(self):
        """Kill the command and every process that descends from it.

        A process group is killed as a whole, which a fork can't escape; whoever left the group has become, or will become, a
        child of this process. All are stopped before any is killed: a process that is stopped starts no other.

        Returns:
            int, how many are left: processes the kernel doesn't let die (in an uninterruptible wait).
        """
        if self._main is None:
            return 0
        deadline = time.monotonic() + self._spec["grace"]
        if self._main_status is None:
            # Not reaped yet, so that no other process can have its number.
            _signal_group(self._main, signal.SIGKILL)
        if self._reap_all():
            return 0
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
        _set_niceness(-20)
        try:
            while True:
                # Outrun by its priority: processes that fork faster than they are found.
                for signum in (signal.SIGSTOP, signal.SIGKILL):
                    for group in {pgid for _, _, pgid, _ in descendants(os.getpid())}:
                        _signal_group(group, signum)
                if self._reap_all():
                    return 0
                if time.monotonic() >= deadline:
                    return len(descendants(os.getpid()))
                self._line.pause(_ROUND)
        finally:
            _set_niceness(niceness)

    def close(self):
        """Close all that was opened for the command."""
        for stream in self._streams:
            self._unwatch(stream.pipe)
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _start(self):
        spec, account = self._spec, self._spec["account"]
        try:
            stdin = self._own(_open_stdin(spec["stdin"], account))
            ends = [self._open_stream(spec[name], account) for name in ("out", "err")]
            work = self._own(self._place.furnish(spec["name"], spec["script"], account))
            programs, argv, env = _prepare(spec["argv"], spec["env"])
            started = time.monotonic()
            # What another user gets can't be taken back, so it can't be inherited from this process.
            start = self._spawn if spec["in_unit"] and not account else self._fork
            start(work, (stdin, *ends), programs, argv, env)
        except (OSError, ValueError) as err:
            name = getattr(err, "filename", None)
            raise SetupError(f"{name}: {err.strerror}" if name else str(err)) from err
        for fd in (stdin, work, *ends):
            self._disown(fd)
        return started

    def _fork(self, work, files, programs, argv, env):
        """Start the command so that the kernel kills it when this process dies."""
        status, status_end = map(self._own, os.pipe2(os.O_CLOEXEC))
        supervisor = os.getpid()
        pid = os.fork()
        if not pid:
            try:
                os.setsid()
                _confine(self._spec, work, self._oom_score)
                for target, fd in enumerate(files):
                    os.dup2(fd, target)
                if self._spec["account"]:
                    _become(self._spec["account"], self._spec["view"], self._spec["env"]["TMPDIR"])
                # Only now: the kernel forgets it when a process becomes another user's.
                _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != supervisor:
                    raise OSError(errno.ESRCH, "the supervisor is gone")
                os.write(status_end, _READY)
                why = _execute(os.execve, programs, argv, env)
                os._exit(_say_why_not(2, argv[0], why))
            except (OSError, ValueError, SetupError) as err:
                os.write(status_end, str(err).encode())
            finally:
                os._exit(_EXIT_NOT_EXECUTABLE)
        self._main = pid
        self._disown(status_end)
        said = _read_to_end(status)
        self._disown(status)
        if said != _READY:
            raise SetupError(said.decode(errors="replace") or "the command's process ended before it was ready")

    def _spawn(self, work, files, programs, argv, env):
        """Start the command in a unit: what outlives this process is killed by systemd, and all else is inherited.

        A fork has the kernel copy this process's memory map, and then its pages one by one: more than half of what a short
        command costs.
        """
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(files)]

        def spawn(program, argv, env):
            self._main = os.posix_spawn(program, argv, env, file_actions=actions, setsid=True)

        try:
            _confine(self._spec, work, self._oom_score)
            why = _execute(spawn, programs, argv, env)
        finally:
            os.chdir("/")
            if self._oom_score is not None:
                _write_file(_OOM_SCORE, _OOM_PROTECTED)
        if why is not None:
            self._main_status = _say_why_not(files[2], argv[0], why) << 8

    def _own(self, fd):
        self._fds.add(fd)
        return fd

    def _disown(self, fd):
        self._fds.remove(fd)
        os.close(fd)

    def _open_stream(self, path, account):
        """Make one output's file and pipe; give the pipe's end that is the command's."""
        file = self._own(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        pipe, end = map(self._own, os.pipe2(os.O_CLOEXEC))
        self._streams.append(_Stream(file, pipe, self._spec["output_max"]))
        if account:
            # So that it can open /dev/stdout and /dev/stderr by their names.
            os.fchown(end, account["uid"], account["gid"])
        return end

    def _attend(self, started):
        """Move output until the command has ended or must end; say why it must."""
        pumps = {stream.pipe: stream for stream in self._streams}
        for fd in pumps:
            self._line.poller.register(fd, select.POLLIN)
        deadline = started + self._spec["timeout"]
        progress = _Progress(self._spec, self._streams, started)
        while True:
            if self._main_has_ended():
                return None
            if self._line.hears_cancel_of(self._spec["number"]):
                return "cancel"
            if self._line.stop:
                return self._line.stop
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            wake = min(deadline, progress.tell(now))
            for fd, _ in self._line.poller.poll(int((wake - now) * 1000) + 1):
                if fd not in pumps:
                    self._line.hear(fd)
                elif not pumps[fd].pump():
                    self._unwatch(fd)

    def _unwatch(self, fd):
        try:
            self._line.poller.unregister(fd)
        except KeyError:
            # Not any more, or not yet.
            return

    def _main_has_ended(self):
        """Bury orphans of the command; the command itself stays a zombie, which keeps its process group's number ours."""
        while self._main is not None:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return False
            if ended.si_pid == self._main:
                return True
            os.waitpid(ended.si_pid, os.WNOHANG)
        # There was nothing to execute.
        return True

    def _reap_all(self):
        """Bury whoever died; say whether nobody is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if not pid:
                return False
            if pid == self._main:
                self._main_status = status

    def _drain(self):
        for stream in self._streams:
            stream.drain()


class _Stream:
    """One output of the command: a pipe, and the file that keeps its beginning."""

    #: One for all: it holds nothing from one call to the next.
    _buffer = memoryview(bytearray(_CHUNK))

    def __init__(self, file, pipe, limit):
        self._file = file
        self.pipe = pipe
        os.set_blocking(pipe, False)
        self._limit = limit
        self.seen = 0

    @property
    def kept(self):
        """How many bytes the file holds."""
        return min(self.seen, self._limit)

    def pump(self):
        """Take what is there, once; say whether more may come."""
        return self._take(_CHUNK) != 0

    def drain(self):
        """Take what is in the pipe now, not what background processes may still add to it."""
        answer = fcntl.ioctl(self.pipe, termios.FIONREAD, bytes(4))
        waiting = int.from_bytes(answer, sys.byteorder)
        while waiting > 0:
            taken = self._take(min(waiting, _CHUNK))
            if not taken:
                return
            waiting -= taken

    def secure(self):
        """Make sure that the file is on disk."""
        if self.seen:
            os.fdatasync(self._file)

    def _take(self, most):
        try:
            size = os.readv(self.pipe, [self._buffer[:most]])
        except BlockingIOError:
            return None
        kept = self._buffer[: min(size, max(0, self._limit - self.seen))]
        self.seen += size
        while kept:
            kept = kept[os.write(self._file, kept) :]
        return size


class _Progress:
    """Tells the engine how far the files of the output have grown, when it asked for that."""

    def __init__(self, spec, streams, started):
        self._number = spec["number"]
        self._streams = streams if spec["progress"] else ()
        self._told = [0] * len(self._streams)
        self._next = started + _PROGRESS

    def tell(self, now):
        """Tell what is new, if it is time; say when to come again if nothing happens till then."""
        kept = [stream.kept for stream in self._streams]
        if kept == self._told:
            return float("inf")
        if now >= self._next:
            self._next = now + _PROGRESS
            # An engine that doesn't listen must not hold up the command: it hears the next one.
            if not _has_room(1):
                return self._next
            _report({"number": self._number, "progress": kept})
            self._told = kept
            return float("inf")
        return self._next


def processes():
    """All processes of this machine, as they are now.

    Returns:
        list of (pid, parent's pid, process group, session).
    """
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb", buffering=0) as file:
                stat = file.read(1024)
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The name before the last ")" is the process's own choice and may hold anything.
        _, ppid, pgid, sid = stat[stat.rfind(b")") + 2 :].split(None, 4)[:4]
        found.append((int(name), int(ppid), int(pgid), int(sid)))
    return found


def descendants(root):
    """All processes that descend from one.

    Args:
        root: int, a pid.

    Returns:
        list of (pid, parent's pid, process group, session), zombies included, the root itself not.
    """
    children = {}
    for process in processes():
        children.setdefault(process[1], []).append(process)
    found = list(children.get(root, ()))
    for process in found:
        found.extend(children.get(process[0], ()))
    return found


def state(pid):
    """What a process does, as the kernel has it.

    Args:
        pid: int.

    Returns:
        bytes, one letter: ``T`` for stopped, ``Z`` for dead, ...; empty when there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            stat = file.read(1024)
    except (FileNotFoundError, ProcessLookupError):
        return b""
    return stat[stat.rfind(b")") + 2 :][:1]


def start_time(pid):
    """When a process started; with its pid it names one process for as long as the machine runs.

    Args:
        pid: int.

    Returns:
        int, clock ticks since boot.

    Raises:
        OSError: there is no such process.
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        stat = file.read(1024)
    return int(stat[stat.rfind(b")") + 2 :].split()[19])


def remove_plain(jobs_fd, name):
    """Remove what was made for a job if that is simple: nothing but its script, and an empty working directory.

    Args:
        jobs_fd: int, descriptor of the directory that holds it.
        name: str, the job's.

    Returns:
        bool, whether nothing is left.
    """
    try:
        os.rmdir(name, dir_fd=jobs_fd)
        os.unlink(name + SCRIPT, dir_fd=jobs_fd)
    except FileNotFoundError as err:
        return err.filename != name
    except OSError:
        return False
    return True


def remove_job(jobs_fd, name):
    """Remove all that was made for a job, whatever the command made of it.

    Args:
        jobs_fd: int, descriptor of the directory that holds it, writable by its owner only.
        name: str, the job's.

    Returns:
        list of str: what could not be removed, and why; the first few.
    """
    problems = remove_tree(jobs_fd, name)
    try:
        os.unlink(name + SCRIPT, dir_fd=jobs_fd)
    except FileNotFoundError:
        return problems
    except OSError:
        # Then it is a directory by now.
        problems += remove_tree(jobs_fd, name + SCRIPT)
    return problems


def remove_place(path, unmount):
    """Remove a :class:`Place`, whatever is in it.

    Args:
        path: str.
        unmount: bool, whether what is mounted on it is unmounted; else it stays if there is something. The service's unit has whoever
            tries killed.

    Returns:
        list of str: what could not be removed, and why; the first few.
    """
    for _ in range(_MOUNTS_MAX if unmount else 0):
        if _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW):
            break
    parent, name = os.path.split(path)
    try:
        parent_fd = os.open(parent, _DIRECTORY)
    except FileNotFoundError:
        return []
    except OSError as err:
        return [f"{parent}: {err.strerror}"]
    try:
        return remove_tree(parent_fd, name)
    finally:
        os.close(parent_fd)


def remove_tree(parent_fd, name):
    """Remove a directory and all that is in it: any depth, no symlink followed, nothing behind a mount point touched.

    A directory is moved into the parent before it is emptied. The kernel refuses that for a mount point and across mounts, so
    that a command that mounts / on its working directory doesn't make us empty dom0; and no depth takes memory or descriptors.

    Args:
        parent_fd: int, descriptor of the directory that holds it, writable by its owner only.
        name: str.

    Returns:
        list of str: what could not be removed, and why; the first few.
    """
    problems = []
    graves = []
    _bury(parent_fd, name, parent_fd, graves, problems)
    while graves:
        grave = graves.pop()
        try:
            _empty(parent_fd, grave, graves, problems)
            os.rmdir(grave, dir_fd=parent_fd)
        except FileNotFoundError:
            continue
        except OSError as err:
            problems.append(f"{grave}: {err.strerror}")
    return problems[:_PROBLEMS_MAX]


def _empty(parent_fd, grave, graves, problems):
    fd = os.open(grave, _DIRECTORY, dir_fd=parent_fd)
    try:
        removed = True
        failed = len(problems)
        # Some file systems miss entries when others are removed while they are listed; so look again.
        while removed and len(problems) == failed:
            removed = False
            with os.scandir(fd) as entries:
                for entry in entries:
                    removed = True
                    _remove_entry(fd, entry, parent_fd, graves, problems)
    finally:
        os.close(fd)


def _remove_entry(fd, entry, parent_fd, graves, problems):
    try:
        if entry.is_dir(follow_symlinks=False):
            _bury(fd, entry.name, parent_fd, graves, problems)
        else:
            os.unlink(entry.name, dir_fd=fd)
    except FileNotFoundError:
        return
    except OSError as err:
        problems.append(f"{entry.name}: {err.strerror}")


def _bury(fd, name, parent_fd, graves, problems):
    grave = f".gone-{os.urandom(8).hex()}"
    try:
        os.rename(name, grave, src_dir_fd=fd, dst_dir_fd=parent_fd)
    except FileNotFoundError:
        return
    except OSError as err:
        problems.append(f"{name}: {err.strerror}")
        return
    graves.append(grave)


def _confine(spec, work, oom_score):
    """Make this process one that its command may inherit everything from. Any failure ends it."""
    _leave_keyring()
    _limit(resource.RLIMIT_NOFILE, spec["nofile"])
    if spec["data_max"]:
        _limit(resource.RLIMIT_DATA, spec["data_max"])
    if spec["nproc"] and spec["account"]:
        _limit(resource.RLIMIT_NPROC, spec["nproc"])
    if oom_score is not None:
        _write_file(_OOM_SCORE, oom_score)
    os.fchdir(work)


def _become(account, view, work):
    """Become another user, for ever, who sees of the engine's files only what is his. Any failure ends this process.

    Args:
        account: dict: ``name``, ``uid``, ``gid``, ``groups``.
        view: (str, str), the folder that takes the place of another one.
        work: str, where its working directory, which this process is in, is found then.
    """
    name, uid, gid = account["name"], account["uid"], account["gid"]
    try:
        _unshare(_CLONE_NEWNS)
        # What is mounted in dom0 later is seen here, and not the other way round.
        _mount(None, "/", None, _MS_REC | _MS_SLAVE)
        _mount(*view, None, _MS_BIND)
        # Whose command lines hold what is nobody else's business. Kernels before 5.8 don't know the word, and would hide for all of dom0.
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, _hiding([gid, *account["groups"]]))
        for path in filter(os.path.isdir, _HIDDEN):
            _mount("none", path, "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "size=4k,mode=0")
        os.setgroups(account["groups"])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        # sudo, su and pkexec ask no password of many in dom0; with this, no program makes anybody another user.
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    except OSError as err:
        raise SetupError(f"the command could not be started as {name}: {err.strerror}") from err
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3 or sorted(os.getgroups()) != sorted(account["groups"]):
        raise SetupError(f"the command could not be started as {name}: it is still somebody else")
    made = os.stat(".")
    try:
        os.chdir(work)
    except OSError as err:
        raise SetupError(f"{name} can't reach its working directory, {work}: {err.strerror}") from err
    if not os.path.samestat(made, os.stat(".")):
        raise SetupError(f"{work} is not the working directory that was made for {name}")


def _hiding(groups):
    """proc's options for one who is in some groups: nothing is hidden from the group that it names, by default root's."""
    if 0 not in groups:
        return "hidepid=invisible"
    return f"hidepid=invisible,gid={next(gid for gid in range(65000, 0, -1) if gid not in groups)}"


def _leave_keyring():
    """Get a session keyring of its own, so that the keys of one command (a Kerberos ticket, say) are not the next one's."""
    if _KEYCTL is None or _libc.syscall(ctypes.c_long(_KEYCTL), _KEYCTL_JOIN_SESSION_KEYRING, None) >= 0:
        return
    # A kernel without keyrings, or a container that may not use any.
    if ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM):
        raise OSError(ctypes.get_errno(), f"keyring: {os.strerror(ctypes.get_errno())}")


def _limit(what, value):
    """Set a limit; only root may raise one, anybody else keeps the lower of both."""
    if os.geteuid() != 0:
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _prepare(argv, env):
    """The paths where a command may be, its argument vector and its environment, as exec wants them.

    Not left to the child of a fork, in which each page that is written to must be copied first.
    """
    argv = [os.fsencode(word) for word in argv]
    env = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
    if b"/" in argv[0]:
        return [argv[0]], argv, env
    paths = [os.path.join(folder, argv[0]) for folder in env[b"PATH"].split(b":")]
    return [path for path in paths if os.path.lexists(path)] or paths[:1], argv, env


def _execute(execute, programs, argv, env):
    """Execute the first program that can be; say why none was, as an errno, or None."""
    why = errno.ENOENT
    for program in programs:
        try:
            execute(program, argv, env)
            return None
        except OSError as err:
            # As execvp(3) has it: what is found but can't be run is told of only if no other folder has it.
            why = err.errno if why in _NOT_FOUND else why
    return why


def _say_why_not(fd, name, why):
    """Say on the command's stderr why it isn't executed; give its exit code."""
    os.write(fd, b"qvm-remote: " + name + b": " + os.strerror(why).encode() + b"\n")
    return _EXIT_NOT_FOUND if why in _NOT_FOUND else _EXIT_NOT_EXECUTABLE


def _open_stdin(path, account):
    if path is None:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if account:
        # It can open /dev/stdin by its name then. By that of the file it can't: the folder is root's.
        _let_read(fd, account)
    return fd


def _let_read(fd, account):
    """Let a user read a file that stays the engine's."""
    os.fchown(fd, -1, account["gid"])
    os.fchmod(fd, 0o640)


def _protect_from_oom():
    """Make the kernel prefer the command when memory is short; return what the command gets, None if it can't be set."""
    try:
        with open(_OOM_SCORE, "rb", buffering=0) as file:
            before = file.read(16)
        _write_file(_OOM_SCORE, _OOM_PROTECTED)
    except OSError:
        # Not root: then both have the same score.
        return None
    return before


def _set_niceness(value):
    try:
        os.setpriority(os.PRIO_PROCESS, 0, value)
    except PermissionError:
        # Not root. Whether it is as before is looked at before the next command.
        return


def _unit_holds_memory():
    """Say whether files in memory that the command left behind count against what the next one may use, or if that can't be told."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
        roots = {"": "/sys/fs/cgroup", "memory": "/sys/fs/cgroup/memory"}
        paths = [f"{roots[controllers]}{path}/memory.stat" for _, controllers, path in groups if controllers in roots]
        with open(next(filter(os.path.exists, paths)), encoding="ascii") as file:
            found = dict(line.split() for line in file)
        return int(found["shmem"]) > _HELD_MAX
    except (OSError, StopIteration, KeyError):
        return True


def _signal_group(group, signum):
    if group in (0, 1, os.getpgrp()):
        return
    try:
        os.killpg(group, signum)
    except (ProcessLookupError, PermissionError):
        return


def _prctl(option, value):
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise SetupError(f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def _unshare(flags):
    if _libc.unshare(flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _mount(source, target, kind, flags, options=None):
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, options)]
    if _libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


def _write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _write_file(path, data):
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _read_to_end(fd):
    data = b""
    while True:
        chunk = os.read(fd, 4096)
        if not chunk:
            return data
        data += chunk


def _has_room(fd):
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    return bool(poller.poll(0))


def _report(message):
    try:
        os.write(1, json.dumps(message).encode() + b"\n")
    except BrokenPipeError:
        # The engine is gone; what is left to do is to clean up.
        return


if __name__ == "__main__":
    main()
