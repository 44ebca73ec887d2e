# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks at dom0 from within, and changes nothing there: memory, processes, files, open files, and what ledger and audit log say.

Run there by the soak, with the path of the commands' marks. Orders come on stdin, a word each; the answer to each is a JSON line on stdout. It has no part of the service
in it but for what reads the audit log.
"""

import collections
import json
import os
import re
import sqlite3
import sys
import threading
import time

sys.path.insert(0, "/usr/lib/qvm-remote-service")
from pullrpc.audit_read import verify  # noqa: E402

_LEDGER, _AUDIT = "/var/lib/qvm-remote/ledger.sqlite", "/var/log/qvm-remote/audit.log"
#: Where dom0's side, and its commands, write. Whole commands are kept for the log, in bounds of their own.
_PLACES, _KEPT = ("/var/lib/qvm-remote", "/var/log/qvm-remote", "/etc/qubes", "/run", "/tmp", "/var/tmp"), f"{_AUDIT}.commands"
_SERVICE = "service_process.py"
#: Time between two looks at the memory, seconds.
_EVERY = 1.0
_peak = 0


def _processes():
    """Processes of dom0, but for its first one, this one, and those of the simulator that lead here: pid to command line."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                words = file.read().replace("\0", " ").strip()
        except OSError:
            continue
        # Threads of the kernel have none.
        if words and int(pid) not in (1, os.getpid(), os.getppid()):
            found[int(pid)] = words
    return found


def _memory():
    """What all these take, shared memory once (PSS), bytes."""
    size = 0
    for pid in _processes():
        try:
            with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
                size += next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return size


def _watch():
    global _peak
    while True:
        _peak = max(_peak, _memory())
        time.sleep(_EVERY)


def _fds():
    """The service's open files, by what they are: kind to count."""
    pid = next((pid for pid, words in _processes().items() if _SERVICE in words), None)
    kinds = collections.Counter()
    for fd in os.listdir(f"/proc/{pid}/fd") if pid else ():
        try:
            kinds[re.sub(r":\[\d+\]$", "", os.readlink(f"/proc/{pid}/fd/{fd}"))] += 1
        except OSError:
            continue
    return kinds


def _files():
    return sorted(
        os.path.join(folder, name)
        for place in _PLACES
        for folder, folders, names in os.walk(place)
        for name in [*names, *folders]
        if not os.path.join(folder, name).startswith(f"{_KEPT}/")
    )


def _lines(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _audit_lines():
    for line in _lines(_AUDIT):
        try:
            yield json.loads(line)
        except ValueError:
            # What a full disk cut off; whether it may be there is for verify to say.
            continue


def _evidence():
    with sqlite3.connect(_LEDGER) as db:
        ledger = db.execute("SELECT vm, cid, state, status, exit FROM command").fetchall()
    wanted = ("what", "vm", "id", "command", "status", "exit", "code")
    return {
        "marks": [line.split() for line in _lines(sys.argv[1])],
        "ledger": ledger,
        "audit": [{name: line[name] for name in wanted if name in line} for line in _audit_lines()],
        "audit_problems": verify(_AUDIT, 12)["problems"],
        "peak_memory": _peak,
    }


def main():
    """Answer until stdin ends."""
    threading.Thread(target=_watch, daemon=True).start()
    answers = {"processes": lambda: sorted(_processes().values()), "fds": _fds, "files": _files, "evidence": _evidence}
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


main()
