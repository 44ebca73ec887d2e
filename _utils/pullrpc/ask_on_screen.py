# SPDX-License-Identifier: GPL-2.0-or-later
"""Shows a question on dom0's screen: a window of zenity's in the session of whoever is logged in there and active.

A program of its own: the question on stdin; exit code 0 and ``yes`` on stdout for yes, 1 for no, 2 when nobody could be asked.
The button that says yes works only once a box was ticked, so that a key pressed by chance answers nothing. The text comes
from stdin and is shown as it is: zenity reads no markup in it.
"""

import os
import signal
import subprocess
import sys

from .screen import run_there, stop_there, who_sits_there

_YES, _NO, _UNABLE = 0, 1, 2
#: zenity(1): its button for yes; closed or refused, and ended by --timeout (the engine's time is up at the same moment).
_ANSWERS = {b"zenity 0\n": _YES, b"zenity 1\n": _NO, b"zenity 5\n": _NO}
#: Says how zenity ended. systemd-run can't be asked: it counts a program that was ended by a signal as one that ended well, whoever
#: sent it, and its own failures look like zenity's no.
_SAY_HOW = 'zenity "$@" >/dev/null; echo "zenity $?"'


def main():
    """Ask.

    Returns:
        int, the exit code.
    """
    vm, cid, timeout = (os.environ[f"QVM_REMOTE_{name}"] for name in ("VM", "ID", "ASK_TIMEOUT"))
    user = who_sits_there()
    if user is None:
        sys.stderr.write("nobody is logged in at dom0's screen\n")
        return _UNABLE
    unit = f"qvm-remote-ask-{cid}"
    signal.signal(signal.SIGTERM, lambda *_: _end(user, unit))
    window = ["/bin/sh", "-c", _SAY_HOW, "sh", "--text-info", f"--title=qvm-remote: {vm} asks dom0", "--font=monospace", "--width=900", "--height=560"]
    window += ["--checkbox=I have read all of it", "--ok-label=Run it", "--cancel-label=Refuse", f"--timeout={timeout}"]
    try:
        done = run_there(user, unit, window, stdout=subprocess.PIPE)
    except OSError as err:
        sys.stderr.write(f"systemd-run: {err.strerror}\n")
        return _UNABLE
    answer = _ANSWERS.get(done.stdout, _UNABLE) if done.returncode == 0 else _UNABLE
    if answer == _YES:
        sys.stdout.write("yes\n")
    return answer


def _end(user, unit):
    stop_there(user, unit)
    os._exit(_NO)
