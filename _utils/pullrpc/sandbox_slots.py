# SPDX-License-Identifier: GPL-2.0-or-later
"""Standing supervisors, the sandbox's slots: each serves one command after another, so that a command needn't wait for one to start.

A slot that is not known to be as good as new is never used again: it is ended, or killed with all that is in its unit.
"""

from __future__ import annotations

import functools
import json
import logging
import marshal
import os
import select
import shutil
import subprocess
import sys
import threading
import time
import weakref

from . import sandbox_subreaper, sandbox_systemd, supervisor
from .errors import SandboxError

log = logging.getLogger(__name__)

#: Commands that one slot serves.
_COMMANDS_MAX = 1000
#: How long a slot may wait for a command, if it isn't the only one that does, seconds.
_IDLE_MAX = 30.0
#: How long it may take to end once it was told to; it may have a big folder to remove, seconds.
_END_MAX = 60.0
#: How long the end of the service may wait for the slots' end, seconds.
_CLOSE_WAIT = 2.0
#: How long to wait for a supervisor to take in what is said to it; a machine that is busy may take that long to start it, seconds.
_SEND_WAIT = 30.0
_REPORT_MAX = 1 << 16
#: The supervisor's source, read once: Salt's cache, where this package lies, may be wiped at any time.
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "supervisor.py"), "rb") as _file:
    _SOURCE = _file.read()
#: Runs the program that comes by stdin, of which it reads not a byte more. systemd reads "$" and "%" in words its own way.
_BOOT = """import marshal, os  # supervisor.py
code = b""
while len(code) < {size}:
    code += os.read(0, {size} - len(code)) or os._exit(0)
exec({code})
"""


@functools.lru_cache(maxsize=1)
def choose_backend():
    """Say how a supervisor is started here.

    Returns:
        module: sandbox_systemd where systemd is PID 1, else sandbox_subreaper.
    """
    # The manager's own socket, by which root's systemd-run asks it: the folder of transient units may be there without a manager.
    return sandbox_systemd if os.path.exists("/run/systemd/private") and shutil.which("systemd-run") else sandbox_subreaper


class Slot:
    """A supervisor.

    Args:
        backend: module, see :func:`choose_backend`.
        limits: sandbox.Limits.

    Attributes:
        backend, key: what it was started with, see :func:`_key`.
        folder: str, where its commands work; the supervisor makes and removes it.
        served: int, commands that were given to it.
        idle_since: float, when it was last given back, by the monotonic clock.

    Raises:
        SandboxError: it can't be started.
    """

    def __init__(self, backend, limits):
        self.backend = backend
        self.key = _key(backend, limits)
        self.served = 0
        self.idle_since = 0.0
        self._name = f"slot-{os.urandom(6).hex()}"
        self.folder = os.path.join(jobs_folder(limits.run_dir), self._name)
        self._lock = threading.Lock()
        self._buffer = b""
        python, program, boot = _program()
        words = [python, "-I", "-S", "-c", boot, str(os.getpid()), str(supervisor.start_time(os.getpid())), self.folder, str(limits.work_max)]
        try:
            # A session of its own: a signal to the minion's process group is the engine's to handle.
            self._process = subprocess.Popen(
                backend.wrap(words, self._name, limits, self.folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                env={"PATH": limits.path},
                start_new_session=True,
            )
        except OSError as err:
            raise SandboxError(f"the sandbox could not be started: {err.strerror}") from err
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        #: The supervisor's, once it has said so: what was started may be systemd's program for it.
        self._pid = None
        os.set_blocking(self._stdin.fileno(), False)
        self._poller = select.poll()
        self._poller.register(self._stdout.fileno(), select.POLLIN)
        _all.add(self)
        self._write(program)

    def send(self, message):
        """Say something to the supervisor; may be called from any thread.

        Args:
            message: dict.

        Returns:
            bool, whether it could be said.
        """
        return self._write(json.dumps(message).encode("ascii") + b"\n")

    def _write(self, data):
        deadline = time.monotonic() + _SEND_WAIT
        with self._lock:
            while data:
                try:
                    data = data[os.write(self._stdin.fileno(), data) :]
                except BlockingIOError:
                    poller = select.poll()
                    poller.register(self._stdin.fileno(), select.POLLOUT)
                    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                        return False
                except (OSError, ValueError):
                    # It has ended, or has been closed.
                    return False
        return True

    def next_report(self, deadline):
        """Wait for what the supervisor says next.

        Args:
            deadline: float, by the monotonic clock.

        Returns:
            dict; None: nothing came in time, it has ended, or this is nothing that a supervisor says.
        """
        while True:
            report = self._next_report(deadline)
            if report is None or "supervisor" not in report:
                return report
            self._pid = report["supervisor"]

    def _next_report(self, deadline):
        while b"\n" not in self._buffer:
            if not self._poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            chunk = os.read(self._stdout.fileno(), _REPORT_MAX)
            if not chunk or len(self._buffer) > _REPORT_MAX:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return report if isinstance(report, dict) else None

    def has_report(self):
        """Say whether another report has been read already.

        Returns:
            bool
        """
        return b"\n" in self._buffer

    def is_well(self):
        """Say whether an idle slot can be used: it lives, was not stopped, and says nothing that it wasn't asked.

        Returns:
            bool
        """
        says = self._poller.poll(0)
        if says and self._pid is None:
            if self.next_report(0) is not None:
                return False
            says = self._poller.poll(0)
        return not self._buffer and not says and not self.is_stopped()

    def is_stopped(self):
        """Say whether somebody has stopped the supervisor (SIGSTOP, or a debugger): it will not hear a command.

        Returns:
            bool; False while it is not known which process it is.
        """
        return self._pid is not None and supervisor.state(self._pid) in (b"T", b"t")

    def has_ended(self):
        """Say whether the supervisor is gone; if it was killed, what it left goes now.

        Returns:
            bool
        """
        ended = self._process.poll() is not None
        if ended:
            self._clear()
        return ended

    def end(self):
        """Let it end: at once if it is idle, else as soon as its command is killed and cleaned up."""
        # Said, and not only closed: a copy of our end may be open in a forked process.
        self.send({"quit": True})
        self._close()

    def kill(self):
        """Kill it, with all that is in its unit if it has one."""
        self._process.kill()
        self.backend.kill(self._name)
        self._close()
        try:
            self._process.wait(_CLOSE_WAIT)
        except subprocess.TimeoutExpired:
            # The kernel holds it. The pool has forgotten it, and it can't read another command.
            log.warning("%s: a supervisor could not be killed", self._name)
        self._clear()

    def _clear(self):
        # A unit that ends does that by itself.
        if not self.backend.IN_UNIT and os.path.lexists(self.folder):
            remove_folder(self.folder, self.backend)

    def disown(self):
        """In a forked process: drop what belongs to the one that started it."""
        # Another thread may have held it when this process was forked.
        self._lock = threading.Lock()
        self._close()
        self._process.returncode = 0

    def _close(self):
        with self._lock:
            self._stdin.close()
        self._stdout.close()


class Pool:
    """The slots of this process: those that wait for a command, and those that are to end."""

    def __init__(self):
        self._lock = threading.Lock()
        self._idle = []
        self._ending = []
        self._timer = None

    def take(self, limits):
        """Give a slot that has no command.

        Args:
            limits: sandbox.Limits.

        Returns:
            Slot

        Raises:
            SandboxError: none can be started.
        """
        backend = choose_backend()
        key = _key(backend, limits)
        while True:
            with self._lock:
                slot = next((slot for slot in reversed(self._idle) if slot.key == key), None)
                if slot is not None:
                    self._idle.remove(slot)
            if slot is None:
                return Slot(backend, limits)
            if slot.is_well():
                return slot
            if slot.is_stopped():
                # It would not hear that it is to end either.
                slot.kill()
            else:
                self.retire(slot)

    def put(self, slot):
        """Take a slot back that can serve another command.

        Args:
            slot: Slot.
        """
        if slot.served >= _COMMANDS_MAX:
            self.retire(slot)
            return
        slot.idle_since = time.monotonic()
        with self._lock:
            self._idle.append(slot)
            self._tidy_later()

    def retire(self, slot):
        """End a slot.

        Args:
            slot: Slot.
        """
        slot.end()
        with self._lock:
            self._ending.append((slot, time.monotonic() + _END_MAX))
            self._tidy_later()

    def warm(self, limits):
        """See to it that one slot waits for a command.

        Args:
            limits: sandbox.Limits.

        Raises:
            SandboxError: it can't be started.
        """
        self.put(self.take(limits))

    def close(self):
        """End all slots that have no command; return once they are gone."""
        with self._lock:
            idle, self._idle = self._idle, []
            ending, self._ending = self._ending, []
        for slot in idle:
            slot.end()
        deadline = time.monotonic() + _CLOSE_WAIT
        for slot in [*idle, *(slot for slot, _ in ending)]:
            while not slot.has_ended() and time.monotonic() < deadline:
                time.sleep(0.005)
            if not slot.has_ended():
                slot.kill()

    def _tidy(self):
        now = time.monotonic()
        with self._lock:
            self._timer = None
            # The one that was used last stays, however long ago that was.
            idle = self._idle[:-1]
            surplus = [slot for slot in idle if now - slot.idle_since >= _IDLE_MAX]
            self._idle = [slot for slot in self._idle if slot not in surplus]
            ending, self._ending = self._ending, []
        for slot in surplus:
            self.retire(slot)
        for slot, deadline in ending:
            if slot.has_ended():
                continue
            if now >= deadline:
                slot.kill()
                continue
            with self._lock:
                self._ending.append((slot, deadline))
        with self._lock:
            self._tidy_later()

    def _tidy_later(self):
        """Called with the lock held."""
        if self._timer is None and (self._ending or len(self._idle) > 1):
            wait = 1.0 if self._ending else max(1.0, self._idle[0].idle_since + _IDLE_MAX - time.monotonic())
            timer = threading.Timer(wait, self._tidy)
            timer.daemon = True
            try:
                timer.start()
                self._timer = timer
            except RuntimeError:
                # No thread can be started now. The next one who comes by tries again; no command suffers.
                return


def _key(backend, limits):
    """What must be the same for a command to be run by a slot."""
    return (backend, limits.run_dir, limits.work_max, backend.fixed(limits))


def jobs_folder(run_dir):
    """Where the slots have their folders.

    Args:
        run_dir: str.

    Returns:
        str
    """
    return os.path.join(run_dir, "jobs")


def remove_folder(folder, backend):
    """Remove what a supervisor that was killed left.

    Args:
        folder: str.
        backend: module, see :func:`choose_backend`.
    """
    for problem in supervisor.remove_place(folder, unmount=not backend.IN_UNIT):
        # Names that a command made: as plain text, and in one line.
        log.warning("%s could not be removed: %a", folder, problem)


def folders():
    """The folders of this process's slots.

    Returns:
        set of str
    """
    return {slot.folder for slot in list(_all)}


def interpreter():
    """Say which Python runs what dom0 starts by itself.

    Returns:
        str, its path.
    """
    # Inside a frozen Salt, sys.executable need not be an interpreter.
    return sys.executable if os.path.basename(sys.executable or "").startswith("python") else "/usr/bin/python3"


def _program():
    """The interpreter, the supervisor for it, and what it needs to be told to run that."""
    python = interpreter()
    if python != sys.executable:
        return python, _SOURCE, _BOOT.format(size=len(_SOURCE), code="code")
    code = marshal.dumps(compile(_SOURCE, "supervisor.py", "exec"))
    return python, code, _BOOT.format(size=len(code), code="marshal.loads(code)")


def pool():
    """Give the pool of this process.

    Returns:
        Pool
    """
    return _pool


def _start_anew():
    """In a forked process: the slots are the other's, and see that one's end only if nobody else holds their stdin."""
    global _pool
    _pool = Pool()
    for slot in list(_all):
        slot.disown()
    _all.clear()


_all = weakref.WeakSet()
_pool = Pool()
os.register_at_fork(after_in_child=_start_anew)
