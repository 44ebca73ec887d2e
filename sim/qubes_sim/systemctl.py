# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's systemctl and systemd-run in the simulator: runs services, and starts the enabled ones when dom0 boots.

Reads units where systemd does, and knows of their keys Exec*, Environment, Restart, RestartSec, RuntimeDirectory*, StartLimit*, TimeoutStopSec
and WantedBy; what hardens a service is not simulated. A monitor process stands in for the manager: one for each service, the subreaper
of all that the service starts, which is what a cgroup is for. Stands alone, without the simulator's other modules.
"""

import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import sys
import time

_FOLDERS = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system")
_WANTS = "/etc/systemd/system/multi-user.target.wants"
#: What the monitors know; on /run, and so gone after a reboot.
_STATE = "/run/systemd/simulated"
_PR_SET_CHILD_SUBREAPER = 36
#: Exit codes of systemctl: not active, no such unit (systemctl(1)).
_INACTIVE, _NO_UNIT, _FAILED = 3, 4, 1
_UNIT_DEFAULTS = {
    **{"RestartSec": "0.1", "TimeoutStopSec": "90", "Restart": "no", "StartLimitBurst": "5", "StartLimitIntervalSec": "10"},
    **{"RuntimeDirectory": "", "RuntimeDirectoryMode": "0755", "RuntimeDirectoryPreserve": "no"},
}


class _Unit:
    def __init__(self, name):
        self.name = name if "." in name else name + ".service"
        self.path = next((path for path in (f"{folder}/{self.name}" for folder in _FOLDERS) if os.path.isfile(path)), None)
        self.keys = dict(_UNIT_DEFAULTS)
        self.commands = {}
        self.environment = {}
        if self.path:
            self._read()

    def _read(self):
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                key, has_value, value = line.strip().partition("=")
                if not has_value or key.startswith(("#", ";")):
                    continue
                if key.startswith("Exec"):
                    prefix = value[: len(value) - len(value.lstrip("-+!:@"))]
                    self.commands.setdefault(key, []).append((shlex.split(value[len(prefix) :]), "-" in prefix))
                if key == "Environment":
                    self.environment.update(word.split("=", 1) for word in shlex.split(value))
                self.keys[key] = value

    def state(self):
        """What its monitor left: a dict with ``active`` (str) and ``monitor`` (pid)."""
        try:
            with open(f"{_STATE}/{self.name}", encoding="ascii") as file:
                known = json.load(file)
        except (OSError, ValueError):
            return {"active": "inactive", "monitor": 0}
        if known["active"] in ("active", "activating", "deactivating") and not _is_alive(known["monitor"]):
            known["active"] = "failed"
        return known

    def tell(self, **known):
        os.makedirs(_STATE, exist_ok=True)
        with open(f"{_STATE}/.{self.name}", "w", encoding="ascii") as file:
            json.dump(known, file)
        os.rename(f"{_STATE}/.{self.name}", f"{_STATE}/{self.name}")

    def is_enabled(self):
        return os.path.lexists(f"{_WANTS}/{self.name}")


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _start(unit):
    if unit.state()["active"] in ("active", "activating"):
        return 0
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(read_end)
        _become_monitor(unit, write_end)
    os.close(write_end)
    os.wait()
    answer = os.read(read_end, 16)
    if answer != b"ok":
        sys.stderr.write(f"Job for {unit.name} failed because the control process exited with error code.\n")
        return _FAILED
    return 0


def _become_monitor(unit, ready_fd):
    os.setsid()
    if os.fork():
        os._exit(0)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    _Monitor(unit).run(ready_fd)
    os._exit(0)


class _Monitor:
    def __init__(self, unit):
        self._unit = unit
        self._main = 0
        self._stopping = False
        self._starts = []

    def run(self, ready_fd):
        signal.signal(signal.SIGTERM, self._on_stop)
        self._unit.tell(active="activating", monitor=os.getpid())
        while True:
            self._starts.append(time.monotonic())
            self._make_folder()
            for argv, may_fail in self._unit.commands.get("ExecStartPre", []):
                code = os.waitstatus_to_exitcode(os.waitpid(_spawn(argv, self._unit.environment), 0)[1])
                if code and not may_fail:
                    self._end("failed")
                    return
            self._main = _spawn(self._unit.commands["ExecStart"][0][0], self._unit.environment)
            self._unit.tell(active="active", monitor=os.getpid(), main=self._main)
            if ready_fd is not None:
                os.write(ready_fd, b"ok")
                os.close(ready_fd)
                ready_fd = None
            code = self._wait_for_main()
            if not self._stopping:
                # As systemd does when a service ended by itself.
                self._run_stop_commands()
            _kill_rest()
            if self._stopping or not self._restarts(code):
                break
            self._remove_folder(unless=("yes", "restart"))
            time.sleep(float(self._unit.keys["RestartSec"]))
        self._end("inactive" if self._stopping or code == 0 else "failed")

    def _wait_for_main(self):
        deadline = None
        told = False
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == self._main:
                return os.waitstatus_to_exitcode(status)
            if self._stopping and not told:
                told, deadline = True, time.monotonic() + float(self._unit.keys["TimeoutStopSec"])
                self._run_stop_commands()
                os.kill(self._main, signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                os.kill(self._main, signal.SIGKILL)
            if not pid:
                time.sleep(0.02)

    def _run_stop_commands(self):
        for argv, _ in self._unit.commands.get("ExecStop", []):
            os.waitpid(_spawn(argv, self._unit.environment), 0)

    def _restarts(self, code):
        if self._unit.keys["Restart"] != "always" and (self._unit.keys["Restart"] != "on-failure" or code == 0):
            return False
        since = time.monotonic() - float(self._unit.keys["StartLimitIntervalSec"])
        return len([at for at in self._starts if at > since]) < int(self._unit.keys["StartLimitBurst"])

    def _on_stop(self, number, frame):
        self._stopping = True

    def _make_folder(self):
        if self._unit.keys["RuntimeDirectory"]:
            path = f"/run/{self._unit.keys['RuntimeDirectory']}"
            os.makedirs(path, exist_ok=True)
            os.chmod(path, int(self._unit.keys["RuntimeDirectoryMode"], 8))

    def _remove_folder(self, unless):
        if self._unit.keys["RuntimeDirectory"] and self._unit.keys["RuntimeDirectoryPreserve"] not in unless:
            # What is mounted in there stays, as with systemd.
            shutil.rmtree(f"/run/{self._unit.keys['RuntimeDirectory']}", ignore_errors=True)

    def _end(self, active):
        self._remove_folder(unless=("yes",))
        self._unit.tell(active=active, monitor=os.getpid())


def _spawn(argv, environment):
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.execvpe(argv[0], argv, {**os.environ, **environment})
        os._exit(203)
    return pid


def _kill_rest():
    """Kill what is left of the service: all descendants, however they tried to get away."""
    while True:
        children = [int(pid) for pid in _read(f"/proc/self/task/{os.getpid()}/children").split()]
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _read(path):
    with open(path, encoding="ascii") as file:
        return file.read()


def _stop(unit):
    known = unit.state()
    if known["active"] not in ("active", "activating"):
        return 0
    os.kill(known["monitor"], signal.SIGTERM)
    while unit.state()["active"] in ("active", "activating"):
        time.sleep(0.02)
    return 0


def _reload(unit):
    if unit.state()["active"] != "active" or "ExecReload" not in unit.commands:
        sys.stderr.write(f"Job type reload is not applicable for unit {unit.name}.\n")
        return _FAILED
    for argv, may_fail in unit.commands["ExecReload"]:
        if os.spawnvp(os.P_WAIT, argv[0], argv) and not may_fail:
            return _FAILED
    return 0


def _enable(unit):
    if "WantedBy" not in unit.keys:
        sys.stderr.write("The unit files have no installation config.\n")
        return _FAILED
    os.makedirs(_WANTS, exist_ok=True)
    if not unit.is_enabled():
        os.symlink(unit.path, f"{_WANTS}/{unit.name}")
    return 0


def _disable(unit):
    if unit.is_enabled():
        os.unlink(f"{_WANTS}/{unit.name}")
    return 0


def _restart(unit):
    return _stop(unit) or _start(unit)


def _reset_failed(unit):
    with contextlib.suppress(FileNotFoundError):
        if unit.state()["active"] == "failed":
            os.unlink(f"{_STATE}/{unit.name}")
    return 0


def _show(unit):
    print(f"ActiveState={unit.state()['active']}")
    return 0


def _is_active(unit):
    active = unit.state()["active"]
    print(active)
    return 0 if active == "active" else _INACTIVE


def _is_enabled(unit):
    print("enabled" if unit.is_enabled() else "disabled")
    return 0 if unit.is_enabled() else _FAILED


def _boot():
    """What the manager does when dom0 starts."""
    for name in os.listdir(_WANTS) if os.path.isdir(_WANTS) else ():
        if name.startswith("."):
            # The simulator's own, which keeps the folder there.
            continue
        _start(_Unit(name))
    return 0


_VERBS = {
    "start": _start,
    "stop": _stop,
    "restart": _restart,
    "reload": _reload,
    "enable": _enable,
    "disable": _disable,
    "reset-failed": _reset_failed,
    "show": _show,
    "is-active": _is_active,
    "is-enabled": _is_enabled,
}


def main():
    """Do what this program's name and arguments say.

    Returns:
        int, the exit code.
    """
    if "--version" in sys.argv:
        print("systemd 252 (simulated)\n-PAM")
        return 0
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if words == ["daemon-reload"]:
        return 0
    if words == ["boot-simulated-dom0"]:
        return _boot()
    if len(words) != 2 or words[0] not in _VERBS:
        sys.stderr.write(f"systemctl of the simulator knows {', '.join(sorted(_VERBS))} UNIT, and daemon-reload\n")
        return _FAILED
    unit = _Unit(words[1])
    if unit.path is None and words[0] not in ("show", "is-active", "is-enabled", "stop", "disable", "reset-failed"):
        sys.stderr.write(f"Failed to {words[0]} {unit.name}: Unit {unit.name} not found.\n")
        return _NO_UNIT
    return _VERBS[words[0]](unit)
