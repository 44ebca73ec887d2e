# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures where it stands: in dom0, in a VM, or on the host. Reads one request as JSON from each line of stdin, answers with one line.

Its own start is in no figure. Stands alone: it is given to an interpreter as text, and imports the client's library for one request only.
"""

import json
import os
import sys
import time

_TICKS = os.sysconf("SC_CLK_TCK")


def run(argv, count=1, parallel=1, stdin=os.devnull, reads=False):
    """Run a command so many times, so many at once.

    Returns:
        dict: ``ms`` of each, ``seconds`` of all, ``bytes`` of stdout if it is read.
    """
    milliseconds, running, size, left = [], {}, 0, count
    begun = time.perf_counter()
    while left or running:
        while left and len(running) < parallel:
            actions = [(os.POSIX_SPAWN_OPEN, 0, stdin, os.O_RDONLY, 0)]
            if reads:
                out, their_end = os.pipe()
                actions.append((os.POSIX_SPAWN_DUP2, their_end, 1))
            else:
                actions.append((os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0))
            started = time.perf_counter()
            running[os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)] = started
            left -= 1
            if reads:
                os.close(their_end)
                size += _drain(out)
        pid, status = os.wait()
        milliseconds.append((time.perf_counter() - running.pop(pid)) * 1000)
        if status:
            raise RuntimeError(f"{argv} ended with {os.waitstatus_to_exitcode(status)}")
    return {"ms": milliseconds, "seconds": time.perf_counter() - begun, "bytes": size}


def _drain(fd):
    size = 0
    while True:
        chunk = os.read(fd, 1 << 18)
        if not chunk:
            os.close(fd)
            return size
        size += len(chunk)


def loop(count, folder):
    """The plain loop: fork and exec ``true``, wait, write a line and have it on disk."""
    fd = os.open(os.path.join(folder, "bench-loop"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    begun = time.perf_counter()
    for number in range(count):
        pid = os.fork()
        if not pid:
            os.execv("/bin/true", ["true"])
        os.waitpid(pid, 0)
        os.write(fd, b"%d\n" % number)
        os.fsync(fd)
    return {"seconds": time.perf_counter() - begun}


def pipeline(count, window):
    """Send commands from this one process with the client's library, ``window`` of them on their way at once."""
    sys.path.insert(0, "/usr/lib/qvm-remote")
    from pullrpc.layout import Queue
    from qvm_remote_client.request import Request

    queue = Queue()
    queue.make_folders()
    waiting = []

    def finish():
        request = waiting.pop(0)
        result = request.wait(lambda _: None, lambda *_: None)
        if not result.authentic or result.exit_code:
            raise RuntimeError(f"{request.cid} ended with {result.exit_code}")
        request.keep(30)

    begun = time.perf_counter()
    for _ in range(count):
        if len(waiting) == window:
            finish()
        waiting.append(Request(queue, "shell", b"true", 60))
        waiting[-1].submit()
    while waiting:
        finish()
    return {"seconds": time.perf_counter() - begun}


def trace(argv):
    """Run a command once; say when it began, when each line of its stderr came, and when it ended (seconds since the epoch)."""
    read_end, write_end = os.pipe()
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, write_end, 2)]
    begun = time.time()
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
    os.close(write_end)
    with os.fdopen(read_end, "r", encoding="utf-8") as file:
        lines = [[time.time(), line] for line in iter(file.readline, "")]
    os.waitpid(pid, 0)
    return {"begun": begun, "lines": lines, "ended": time.time()}


def usage(service):
    """What the processes of this domain have used, but for its first one, this one, and the simulator's systemctl.

    Args:
        service: str, a word on the command line of the service's own processes; the others are those of its sessions.

    Returns:
        dict: ``cpu`` (seconds, with children that have ended), ``engine_cpu`` (seconds, of the process that started the sessions),
        ``pids`` (numbers that the kernel has given to processes and threads
        of this domain so far), ``pss`` and ``sessions_pss`` (bytes), ``processes`` (how many).
    """
    own, parents = {}, set()
    found = {"cpu": 0.0, "engine_cpu": 0.0, "pss": 0, "sessions_pss": 0, "processes": 0}
    with open("/proc/loadavg", encoding="ascii") as file:
        # The last number given is that of the reader's own PID namespace.
        found["pids"] = int(file.read().split()[4])
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                words = file.read()
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
            user, system, user_of_children, system_of_children = map(int, fields[11:15])
            if int(pid) == 1:
                # Whoever lost its parent was waited for by the first process.
                found["cpu"] += (user_of_children + system_of_children) / _TICKS
            if int(pid) in (1, os.getpid()) or "systemctl" in words:
                continue
            with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
                pss = next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
        except (FileNotFoundError, ProcessLookupError):
            # It ended while we looked.
            continue
        found["cpu"] += (user + system + user_of_children + system_of_children) / _TICKS
        found["pss"] += pss
        own[int(pid)] = (user + system) / _TICKS
        if service not in words:
            found["sessions_pss"] += pss
            parents.add(int(fields[1]))
        found["processes"] += 1
    found["engine_cpu"] = sum(own.get(pid, 0.0) for pid in parents - {1})
    return found


def main():
    """Answer until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = globals()[request.pop("do")](**request)
        except Exception as err:  # noqa: BLE001 - whatever it is, the benchmark has to hear of it
            answer = {"error": f"{type(err).__name__}: {err}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


main()
