# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's screen: who sits there, and programs in that user's graphical session."""

import subprocess

_WAIT = 10


def who_sits_there():
    """Find the user whose graphical session is active at the first seat.

    Returns:
        str, a name; None without one.
    """
    for session in _lines("loginctl", "--no-legend", "list-sessions"):
        words = ("--property=Active", "--property=Remote", "--property=Type", "--property=Name", "--property=Class")
        known = dict(line.partition("=")[::2] for line in _lines("loginctl", "show-session", *words, "--", session.split()[0]))
        if known.get("Active") == "yes" and known.get("Remote") == "no" and known.get("Class") == "user" and known.get("Type") in ("x11", "wayland"):
            return known["Name"]
    return None


def run_there(user, unit, argv, **streams):
    """Run a program in a user's session, and wait for its end.

    Args:
        user: str, as :func:`who_sits_there` gives it.
        unit: str, the name of the unit that it runs in.
        argv: list of str.
        streams: as for subprocess.run.

    Returns:
        subprocess.CompletedProcess, of systemd-run: its exit code 0 says no more than that the program did not fail.

    Raises:
        OSError: there is no systemd-run.
    """
    # By that user's own systemd, which knows the display; in no unit of ours, whose confinement hides it.
    start = ["systemd-run", "--user", f"--machine={user}@.host", f"--unit={unit}", "--quiet", "--collect", "--wait", "--pipe"]
    return subprocess.run([*start, *argv], check=False, **streams)


def stop_there(user, unit):
    """End what :func:`run_there` has started.

    Args:
        user, unit: as there.
    """
    subprocess.run(["systemctl", "--user", f"--machine={user}@.host", "stop", unit], check=False, timeout=_WAIT)


def _lines(*argv):
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_WAIT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.decode("ascii", "replace").splitlines() if line.strip()]
