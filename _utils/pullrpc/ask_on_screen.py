# SPDX-License-Identifier: GPL-2.0-or-later
"""Shows a question on dom0's screen: a window of zenity's in the session of whoever is logged in there and active.

A program of its own: the question on stdin; exit code 0 and ``yes`` on stdout for yes, 1 for no, 2 when nobody could be asked.
The button that says yes works only once a box was ticked, so that a key pressed by chance answers nothing. The text comes
from stdin and is shown as it is: zenity reads no markup in it. Imports nothing of this package.
"""

import os
import signal
import subprocess
import sys

_YES, _NO, _UNABLE = 0, 1, 2
#: zenity(1): closed or refused, and ended by --timeout.
_ZENITY_OK, _ZENITY_CANCEL = 0, 1
_WAIT = 10


def main():
    """Ask.

    Returns:
        int, the exit code.
    """
    vm, cid, timeout = (os.environ[f"QVM_REMOTE_{name}"] for name in ("VM", "ID", "ASK_TIMEOUT"))
    user = _who_sits_there()
    if user is None:
        sys.stderr.write("nobody is logged in at dom0's screen\n")
        return _UNABLE
    unit = f"qvm-remote-ask-{cid}"
    signal.signal(signal.SIGTERM, lambda *_: _end(user, unit))
    window = ["zenity", "--text-info", f"--title=qvm-remote: {vm} asks dom0", "--font=monospace", "--width=900", "--height=560"]
    window += ["--checkbox=I have read all of it", "--ok-label=Run it", "--cancel-label=Refuse", f"--timeout={timeout}"]
    # By that user's own systemd, which knows the display; in no unit of ours, whose confinement hides it.
    start = ["systemd-run", "--user", f"--machine={user}@.host", f"--unit={unit}", "--quiet", "--collect", "--wait", "--pipe"]
    try:
        code = subprocess.run([*start, *window], stdout=subprocess.DEVNULL, check=False).returncode
    except OSError as err:
        sys.stderr.write(f"systemd-run: {err.strerror}\n")
        return _UNABLE
    if code == _ZENITY_OK:
        sys.stdout.write("yes\n")
        return _YES
    # 5: zenity's own time was up; the engine's is at the same moment.
    return _NO if code in (_ZENITY_CANCEL, 5) else _UNABLE


def _end(user, unit):
    subprocess.run(["systemctl", "--user", f"--machine={user}@.host", "stop", unit], check=False, timeout=_WAIT)
    os._exit(_NO)


def _who_sits_there():
    """The name of the user whose graphical session is active at the first seat; None without one."""
    for session in _lines("loginctl", "--no-legend", "list-sessions"):
        words = ("--property=Active", "--property=Remote", "--property=Type", "--property=Name", "--property=Class")
        known = dict(line.partition("=")[::2] for line in _lines("loginctl", "show-session", *words, "--", session.split()[0]))
        if known.get("Active") == "yes" and known.get("Remote") == "no" and known.get("Class") == "user" and known.get("Type") in ("x11", "wayland"):
            return known["Name"]
    return None


def _lines(*argv):
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_WAIT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.decode("ascii", "replace").splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
