# SPDX-License-Identifier: GPL-2.0-or-later
"""The program between the engine and one command: starts it, keeps its output, and ends everything it left behind.

A process of its own: reads one line of JSON (and later one byte to cancel) from stdin, writes lines of JSON to stdout.
It never lets the command touch those two, holds its output in memory, waits for background processes, or outlives the engine.
Imports little and nothing of this package: it is started anew for each command, with ``python -I -S``.
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import sys
import termios
import time

#: Byte that cancels the command. The end of stdin means that the engine is gone.
CANCEL = b"c"
#: Names in a job's folder: the command's working directory, and its script.
WORK, SCRIPT = "tmp", "script"
#: As a shell has it: found but not to be executed, not found.
_EXIT_NOT_EXECUTABLE, _EXIT_NOT_FOUND = 126, 127
_CHUNK = 1 << 18
#: How often to look whether the engine still lives, seconds: a copy of its end of stdin may survive it in a forked process.
_TICK = 1.0
#: Pause between two rounds of killing, seconds.
_ROUND = 0.005
#: Most problems that are named after the clean-up; one is enough to tell what happened.
_PROBLEMS_MAX = 5
#: Written by the child when all its limits are in force, just before it becomes the command.
_READY = b"ready"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A part of the sandbox could not be made; the command was not started."""


class KeepError(Exception):
    """The command's output could not be kept."""


def main():
    """Run one command; the process ends here.

    Exits with 0 once a report was written, whatever the command did.
    """
    parent = os.getppid()
    spec = json.loads(_read_line(0))
    supervision = Supervision(spec, parent if spec["watch_parent"] else None)
    # Opened now: whatever the command mounts over that path later, this is still the folder that the engine made.
    jobs = os.open(spec["jobs"], _DIRECTORY)
    try:
        report = supervision.run()
    except (SetupError, KeepError) as err:
        report = {"error": str(err)}
    finally:
        supervision.end_everything()
    _report(report)
    _report({"cleaned": remove_tree(jobs, spec["name"])})
    os._exit(0)


class Supervision:
    """One command, from start to end.

    Args:
        spec: dict, as ``sandbox.start`` made it.
        parent: int or None, pid of the engine if this process is its child.
    """

    def __init__(self, spec, parent):
        self._spec = spec
        self._parent = parent
        self._main = None
        self._main_status = None
        self._stop = None
        self._streams = []
        self._wake_fd, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._on_stop_signal)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def run(self):
        """Start the command and see it end.

        Returns:
            dict, the report: ``status`` (wait status or None), ``stopped`` (None, "timeout", "cancel" or "orphaned"), ``seconds``,
            ``out`` and ``err`` (bytes written in all), ``left`` (processes that could not be killed).

        Raises:
            SetupError: the command was not started.
            KeepError: its output can't be kept; it was ended.
        """
        oom_score = _protect_from_oom()
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        started = self._start(oom_score)
        try:
            _report({"started": self._main})
            stopped = self._attend(started + self._spec["timeout"])
            seconds = time.monotonic() - started
            if stopped is None:
                self._drain()
            left = self.end_everything()
            self._drain()
            for stream in self._streams:
                stream.close()
        except OSError as err:
            raise KeepError(f"the command was ended because its output can't be kept: {err.strerror}") from err
        out, err = self._streams
        return {
            "status": self._main_status,
            "stopped": stopped,
            "seconds": seconds,
            "out": out.seen,
            "err": err.seen,
            "left": left,
        }

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
        _hurry()
        while True:
            for signum in (signal.SIGSTOP, signal.SIGKILL):
                for group in {pgid for _, _, pgid, _ in descendants(os.getpid())}:
                    _signal_group(group, signum)
            if self._reap_all():
                return 0
            if time.monotonic() >= deadline:
                return len(descendants(os.getpid()))
            select.select([self._wake_fd], [], [], _ROUND)
            self._clear_wake()

    def _start(self, oom_score):
        spec = self._spec
        try:
            stdin = _open_stdin(spec["stdin"])
            self._streams = [_Stream(spec[name], spec["output_max"]) for name in ("out", "err")]
            work = os.open(os.path.join(spec["jobs"], spec["name"], WORK), _DIRECTORY)
            status, status_end = os.pipe2(os.O_CLOEXEC)
        except OSError as err:
            raise SetupError(f"{err.filename}: {err.strerror}" if err.filename else err.strerror) from err
        started = time.monotonic()
        supervisor = os.getpid()
        pid = os.fork()
        if not pid:
            try:
                _confine(spec, supervisor, work, oom_score)
                for target, fd in enumerate((stdin, *(stream.write_end for stream in self._streams))):
                    os.dup2(fd, target)
                os.write(status_end, _READY)
                _become(spec["argv"], spec["env"])
            except (OSError, ValueError, SetupError) as err:
                os.write(status_end, str(err).encode())
            finally:
                os._exit(_EXIT_NOT_EXECUTABLE)
        self._main = pid
        for fd in (stdin, work, status_end, *(stream.write_end for stream in self._streams)):
            os.close(fd)
        said = _read_to_end(status)
        if said != _READY:
            raise SetupError(said.decode(errors="replace") or "the command's process ended before it was ready")
        return started

    def _attend(self, deadline):
        """Move output until the command has ended or must end; say why it must."""
        pumps = {stream.pipe: stream for stream in self._streams}
        poller = select.poll()
        for fd in (0, self._wake_fd, *pumps):
            poller.register(fd, select.POLLIN)
        while True:
            if self._main_has_ended():
                return None
            if self._stop:
                return self._stop
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            if self._parent is not None and os.getppid() != self._parent:
                return "orphaned"
            for fd, _ in poller.poll(int(min(left, _TICK) * 1000) + 1):
                if fd == 0:
                    self._hear_control()
                elif fd == self._wake_fd:
                    self._clear_wake()
                elif not pumps[fd].pump():
                    poller.unregister(fd)

    def _hear_control(self):
        said = os.read(0, 64)
        if not said:
            self._stop = "orphaned"
        elif CANCEL in said:
            self._stop = "cancel"

    def _on_stop_signal(self, *_):
        # The init system ends the engine and us alike: the same as a cancel, so that the engine can tell what happened.
        self._stop = self._stop or "cancel"

    def _clear_wake(self):
        try:
            os.read(self._wake_fd, 4096)
        except BlockingIOError:
            pass

    def _main_has_ended(self):
        """Bury orphans of the command; the command itself stays a zombie, which keeps its process group's number ours."""
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return False
            if ended.si_pid == self._main:
                return True
            os.waitpid(ended.si_pid, os.WNOHANG)

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

    def __init__(self, path, limit):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self.pipe, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.pipe, False)
        self._limit = limit
        self._buffer = memoryview(bytearray(_CHUNK))
        self.seen = 0

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

    def close(self):
        """Make sure that the file is on disk."""
        if self.seen:
            os.fsync(self._file)
        os.close(self._file)
        os.close(self.pipe)

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


def _confine(spec, supervisor, work, oom_score):
    """In the child: everything that makes it the command's process rather than ours. Any failure ends it."""
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        raise OSError(errno.ESRCH, "the supervisor is gone")
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(signum, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_NOFILE, spec["nofile"])
    if spec["data_max"]:
        _limit(resource.RLIMIT_DATA, spec["data_max"])
    if oom_score is not None:
        _write_file("/proc/self/oom_score_adj", oom_score)
    os.umask(0o077)
    os.fchdir(work)


def _limit(what, value):
    """Set a limit; only root may raise one, anybody else keeps the lower of both."""
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY and os.geteuid() != 0:
        value = min(value, hard)
    resource.setrlimit(what, (value, value))


def _become(argv, env):
    argv = [os.fsencode(word) for word in argv]
    try:
        os.execvpe(argv[0], argv, env)
    except OSError as err:
        os.write(2, b"qvm-remote: " + argv[0] + b": " + err.strerror.encode() + b"\n")
        os._exit(_EXIT_NOT_FOUND if err.errno in (errno.ENOENT, errno.ENOTDIR) else _EXIT_NOT_EXECUTABLE)


def _open_stdin(path):
    if path is None:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _protect_from_oom():
    """Make the kernel prefer the command when memory is short; return what the command gets, None if it can't be set."""
    try:
        with open("/proc/self/oom_score_adj", "rb", buffering=0) as file:
            before = file.read(16)
        _write_file("/proc/self/oom_score_adj", b"-900")
    except OSError:
        # Not root: then both have the same score.
        return None
    return before


def _hurry():
    """Outrun processes that fork faster than they are found."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    except PermissionError:
        return


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


def _write_file(path, data):
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _read_line(fd):
    data = bytearray()
    while not data.endswith(b"\n"):
        chunk = os.read(fd, _CHUNK)
        if not chunk:
            # The engine was gone before it said what to run.
            os._exit(0)
        data += chunk
    return data


def _read_to_end(fd):
    data = b""
    while True:
        chunk = os.read(fd, 4096)
        if not chunk:
            os.close(fd)
            return data
        data += chunk


def _report(message):
    try:
        os.write(1, json.dumps(message).encode() + b"\n")
    except BrokenPipeError:
        # The engine is gone; what is left to do is to clean up.
        return


if __name__ == "__main__":
    main()
