# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts real clients in a VM as it is told, kills them and their agent if it is told that, and says how each ended.

Run there by fault_stand. Orders come on stdin and answers go to stdout, a JSON object a line.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

QUEUE = os.path.expanduser("~/.qvm-remote/queue")
_lock = threading.Lock()
_clients = {}


def say(**data):
    """Tell whoever runs the test."""
    line = json.dumps(data).encode("ascii") + b"\n"
    with _lock:
        # A VM that is paused while this writes goes on with a part of it written.
        while line:
            line = line[os.write(1, line) :]


def _start(order):
    # Before the next order is read, which may be to kill it.
    _clients[order["start"]] = subprocess.Popen(
        [*order.get("through", ()), "qvm-remote", "-v", *order["words"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    threading.Thread(target=_attend, args=(order,), daemon=True).start()


def _attend(order):
    key = order["start"]
    process = _clients[key]
    out, err = process.communicate(order.get("stdin", "").encode("ascii"))
    # By the clock of this machine, which is dom0's in the simulator.
    say(ended=key, code=process.returncode, out=out.decode("ascii", "replace"), err=err.decode("utf-8", "replace"), at=time.time())


def _kill_agent(_):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if b"agent" in words and any(word.endswith(b"qvm-remote") for word in words):
            os.kill(int(pid), signal.SIGKILL)
            say(killed=int(pid))
            return
    say(killed=None)


def _look(_):
    say(queue=sorted(os.path.join(os.path.relpath(folder, QUEUE), name) for folder, _, names in os.walk(QUEUE) for name in names))


def _clear(_):
    for name in os.listdir(os.path.join(QUEUE, "results")):
        os.unlink(os.path.join(QUEUE, "results", name))
    say(cleared=True)


def main():
    """Do what is ordered, until there is no more."""
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            _start(order)
        elif "kill" in order:
            _clients[order["kill"]].kill()
        else:
            {"kill-agent": _kill_agent, "look": _look, "clear": _clear}[order["do"]](order)


main()
