# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that show dom0's user something: one that dom0 names, or one of this package's for dom0's screen.

Each gets its text by stdin, and what else it has to know by its environment; it runs in a session of its own.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time

#: The setting for the program that comes with this package.
SCREEN = "screen"
#: How long a helper that is told to end may take to close its window, seconds.
_END_WAIT = 2.0
#: How often to look whether one has ended that says nothing any more, seconds.
_LOOK_EVERY = 0.02
#: As much as a pipe holds, bytes.
_READ_SIZE = 1 << 16
#: Runs ``main`` of a module of this package. Isolated: its environment is partly dom0's user's.
_RUN = "import importlib, sys; sys.path.insert(0, sys.argv[1]); sys.exit(importlib.import_module('pullrpc.' + sys.argv[2]).main())"


class Helper:
    """A helper, to be run once.

    Args:
        setting: str, a program's path, or ``screen``.
        module: str, the module of this package that ``screen`` means.
        environment: dict of str to str, what is added to ours.
    """

    def __init__(self, setting, module, environment):
        self.argv = [sys.executable, "-I", "-S", "-c", _RUN, _folder(), module] if setting == SCREEN else [setting]
        self._environment = {**os.environ, **environment}
        self._process = None

    def start(self):
        """Start it.

        Raises:
            OSError: it can't be started.
        """
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(self.argv, env=self._environment, start_new_session=True, **pipes)

    def finish(self, text, timeout):
        """Give it its text, and wait until it has ended.

        Args:
            text: str, ASCII, less than a pipe holds.
            timeout: float, seconds; then it is made to end.

        Returns:
            (int, bytes, bytes): exit code, stdout, stderr; None when the time was up.
        """
        with _Talk(self._process, text.encode("ascii")) as talk:
            if not talk.go_on(time.monotonic() + timeout):
                self._end()
                return None
        return self._process.wait(), talk.said, talk.complaint

    def tell_to_end(self):
        """Have it end soon, if it was started."""
        if self._process is not None:
            self._signal(signal.SIGTERM)

    def _end(self):
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _END_WAIT
        while not _has_ended(self._process) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY)
        # And whatever is left of its session. What it has put into another one is out of reach, and not waited for.
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_WAIT)

    def _signal(self, signum):
        if self._process.returncode is not None:
            # Its number may be another one's by now.
            return
        try:
            os.killpg(self._process.pid, signum)
        except ProcessLookupError:
            return


class _Talk:
    """What a helper is told and what it says, until it has ended. Its streams are closed afterwards, whoever else has them.

    Args:
        process: subprocess.Popen.
        untold: bytes, for its stdin.
    """

    def __init__(self, process, untold):
        self._process = process
        self._untold = memoryview(untold)
        self._heard = {process.stdout: bytearray(), process.stderr: bytearray()}
        self._selector = selectors.PollSelector()

    def __enter__(self):
        for stream, event in ((self._process.stdin, selectors.EVENT_WRITE), *((one, selectors.EVENT_READ) for one in self._heard)):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, event)
        return self

    def __exit__(self, *_):
        self._selector.close()
        for stream in (self._process.stdin, *self._heard):
            stream.close()

    @property
    def said(self):
        """bytes, its stdout."""
        return bytes(self._heard[self._process.stdout])

    @property
    def complaint(self):
        """bytes, its stderr as far as it is there."""
        return bytes(self._heard[self._process.stderr])

    def go_on(self, deadline):
        """Go on until it has ended and nobody can add to its stdout.

        Its stderr may be held for ever by what it left behind, and is but a complaint: what is there by then is all of it.

        Args:
            deadline: float, seconds of ``time.monotonic()``.

        Returns:
            bool, False when it was not done by then.
        """
        while True:
            is_silent = self._process.stdout not in self._selector.get_map()
            is_done = is_silent and _has_ended(self._process)
            left = 0.0 if is_done else deadline - time.monotonic()
            for key, _ in self._selector.select(max(0.0, min(left, _LOOK_EVERY) if is_silent else left)):
                (self._tell if key.fileobj is self._process.stdin else self._hear)(key.fileobj)
            if is_done or left < 0:
                return is_done

    def _tell(self, stream):
        try:
            self._untold = self._untold[os.write(stream.fileno(), self._untold) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            # It does not want to know.
            self._untold = self._untold[:0]
        if not self._untold:
            self._selector.unregister(stream)
            stream.close()

    def _hear(self, stream):
        try:
            data = os.read(stream.fileno(), _READ_SIZE)
        except BlockingIOError:
            return
        self._heard[stream] += data
        if not data:
            self._selector.unregister(stream)


def _has_ended(process):
    """Whether a process has ended. Its exit code is left where it is: until that is fetched, no other process has its number."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        # Fetched by somebody else.
        return True


def why_it_failed(code, complaint):
    """Say in one line for dom0's log how a helper ended.

    Args:
        code: int, its exit code.
        complaint: bytes, what it wrote to stderr.

    Returns:
        str, printable ASCII.
    """
    lines = complaint.decode("ascii", "replace").strip().splitlines() or ["it said nothing"]
    last = "".join(char if " " <= char <= "~" else "?" for char in lines[-1])[:200]
    return f"the helper ended with exit code {code}: {last}"


def _folder():
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
