# SPDX-License-Identifier: GPL-2.0-or-later
"""The sandbox's backend for machines without systemd: a child of the engine that adopts all orphans, in a cgroup if it can.

Of memory, processes and CPU weight it limits only what this cgroup v2 lets it; without the memory controller each process has
a limit of its own (RLIMIT_DATA) instead, without the others there is none: RLIMIT_NPROC doesn't count for root.
It must never touch a cgroup that it didn't make, except to pass controllers on to its children.
"""

import os
import signal
import time

from .errors import SandboxError
from .supervisor import kill_cgroup, processes, remove_cgroup

#: Controllers that are asked for; each is used if it is there.
_CONTROLLERS = ("memory", "pids", "cpu")
#: How long leftovers are hunted, seconds.
_KILL_WAIT = 2.0
_PAUSE = 0.02


class Scope:
    """What bounds one command on this machine.

    Args:
        vm, cid: str, checked.

    Attributes:
        prefix: list of str, what to start the supervisor with.
        environment: dict, for that.
        settings: dict, the backend's part of the supervisor's specification.
    """

    def __init__(self, vm, cid):
        own = _own_cgroup()
        self._cgroup = own and os.path.join(own, f"qvm-remote-job-{vm}-{cid}")
        self._marks = {b"QVM_REMOTE_VM=" + vm.encode(), b"QVM_REMOTE_ID=" + cid.encode()}
        self.prefix = []
        self.environment = {}
        self.settings = {"cgroup": None, "data_max": None, "watch_parent": True}

    def prepare(self, timeout, limits):
        """Make the cgroup.

        Args:
            timeout: int, seconds; the supervisor's business here.
            limits: sandbox.Limits.

        Raises:
            SandboxError: a limit can't be set.
        """
        self.settings["data_max"] = limits.memory_max
        if self._cgroup is None or not _make_cgroup(self._cgroup):
            return
        self.settings["cgroup"] = self._cgroup
        wanted = {"memory.max": limits.memory_max, "pids.max": limits.tasks_max, "cpu.weight": limits.cpu_weight}
        for name, value in wanted.items():
            path = os.path.join(self._cgroup, name)
            if not os.path.exists(path):
                continue
            try:
                with open(path, "w", encoding="ascii") as file:
                    file.write(str(value))
            except OSError as err:
                raise SandboxError(f"can't limit the command's {name}: {err.strerror}") from err
        if os.path.exists(os.path.join(self._cgroup, "memory.max")):
            self.settings["data_max"] = None

    def kill(self, session):
        """Kill what is left of the command when its supervisor can't: its cgroup, its session, whoever has its environment.

        A process that left all three behind isn't found; only a command that means to can have such.

        Args:
            session: int or None, the command's pid, if it was started.
        """
        if self._cgroup:
            kill_cgroup(self._cgroup)
        deadline = time.monotonic() + _KILL_WAIT
        while time.monotonic() < deadline:
            found = self._leftovers(session)
            if not found:
                return
            for signum in (signal.SIGSTOP, signal.SIGKILL):
                for pid in found:
                    _signal(pid, signum)
            time.sleep(_PAUSE)

    def close(self):
        """Remove the cgroup."""
        if self._cgroup:
            remove_cgroup(self._cgroup)

    def _leftovers(self, session):
        return [pid for pid, _, _, sid in processes() if pid != os.getpid() and (sid == session or self._is_marked(pid)) and not _is_dead(pid)]

    def _is_marked(self, pid):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return self._marks.issubset(file.read().split(b"\0"))
        except OSError:
            # Dead, a kernel thread, or another user's, and so not the command's.
            return False


def _own_cgroup():
    """This process's folder in cgroup v2; None without one that it may make a group in."""
    relative = _read_field("/proc/self/cgroup", lambda line: line[3:] if line.startswith("0::") else None)
    mount = _read_field("/proc/self/mountinfo", _cgroup2_mount)
    if relative is None or mount is None:
        return None
    root, point = mount
    if root != "/" and not (relative + "/").startswith(root + "/"):
        return None
    folder = os.path.normpath(point + "/" + os.path.relpath(relative, root))
    return folder if os.access(folder, os.W_OK) else None


def _cgroup2_mount(line):
    fields, _, rest = line.partition(" - ")
    return fields.split()[3:5] if rest.startswith("cgroup2 ") else None


def _read_field(path, pick):
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            found = pick(line.rstrip("\n"))
            if found is not None:
                return found
    return None


def _make_cgroup(path):
    """Make a cgroup that processes can be put in; say whether there is one."""
    control = os.path.join(os.path.dirname(path), "cgroup.subtree_control")
    for controller in _CONTROLLERS:
        try:
            with open(control, "w", encoding="ascii") as file:
                file.write(f"+{controller}")
        except OSError:
            # Not delegated, or version 1 has it.
            continue
    try:
        os.mkdir(path, 0o755)
        with open(os.path.join(path, "cgroup.type"), encoding="ascii") as file:
            usable = file.read().strip() == "domain"
    except OSError:
        return False
    if not usable:
        remove_cgroup(path)
    return usable


def _is_dead(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read(1024)
    except OSError:
        return True
    return stat[stat.rfind(b")") + 2 :][:1] in (b"Z", b"X")


def _signal(pid, signum):
    try:
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        return
