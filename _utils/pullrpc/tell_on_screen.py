# SPDX-License-Identifier: GPL-2.0-or-later
"""Shows a notification on dom0's screen, in the session of whoever is logged in there and active.

A program of its own: the text on stdin, its first line as the title; exit code 0 when it was shown.
"""

import html
import os
import subprocess
import sys

from .screen import run_there, who_sits_there


def main():
    """Show it.

    Returns:
        int, the exit code.
    """
    title, _, text = sys.stdin.read().partition("\n")
    user = who_sits_there()
    if user is None:
        sys.stderr.write("nobody is logged in at dom0's screen\n")
        return 1
    # Who shows it may read markup in the text; there is none.
    argv = ["notify-send", "--app-name=qvm-remote", "--icon=dialog-warning", "--", title, html.escape(text.strip())]
    try:
        return run_there(user, f"qvm-remote-tell-{os.getpid()}", argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode
    except OSError as err:
        sys.stderr.write(f"systemd-run: {err.strerror}\n")
        return 1
