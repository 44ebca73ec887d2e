# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that show dom0's user something: one that dom0 names, or one of this package's for dom0's screen.

Each gets its text by stdin, and what else it has to know by its environment; it runs in a session of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

#: The setting for the program that comes with this package.
SCREEN = "screen"
#: How long a helper that is told to end may take to close its window, seconds.
_END_WAIT = 2.0
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
        try:
            said, complaint = self._process.communicate(text.encode("ascii"), timeout)
        except subprocess.TimeoutExpired:
            self._end()
            return None
        return self._process.returncode, said, complaint

    def tell_to_end(self):
        """Have it end soon, if it was started."""
        if self._process is not None:
            self._signal(signal.SIGTERM)

    def _end(self):
        self._signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=_END_WAIT)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.communicate()

    def _signal(self, signum):
        try:
            os.killpg(self._process.pid, signum)
        except ProcessLookupError:
            return


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
