# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulator whose dom0 has the real systemd as its first process: for what the simulated systemctl can't show, that is
whether the unit's hardening lets the service do its work, and whether a command's own unit holds it.

For root only, where the kernel lets it have cgroups of its own.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time

from . import linux
from .cli import bind_option
from .hypervisor import TOOLS, write_programs
from .roots import Store
from .stand import Stand

PROGRAM = "/usr/lib/systemd/systemd"
_CGROUPS = "/sys/fs/cgroup"
#: Controllers that the units in question use; with cgroup v1 each has a file system of its own.
_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "freezer", "devices")
_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | linux.CLONE_NEWNET | linux.CLONE_NEWCGROUP
_BOOT_WAIT, _END_WAIT = 30, 5
#: Of no use here, or in need of a machine.
_MASKED = (
    *("systemd-udevd.service", "systemd-udev-trigger.service", "systemd-udevd-kernel.socket", "systemd-udevd-control.socket"),
    *("systemd-modules-load.service", "systemd-journald.service", "systemd-journal-flush.service", "systemd-journald.socket"),
    *("systemd-journald-dev-log.socket", "systemd-journald-audit.socket", "systemd-logind.service", "systemd-timesyncd.service"),
    *("systemd-sysctl.service", "systemd-random-seed.service", "systemd-remount-fs.service", "systemd-tmpfiles-setup-dev.service"),
    *("systemd-tmpfiles-setup.service", "systemd-binfmt.service", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-config.mount"),
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount", "proc-sys-fs-binfmt_misc.automount"),
)
_TARGET = "[Unit]\nRequires=basic.target\nAfter=basic.target\n"


class SystemdStand(Stand):
    """A stand whose dom0 runs under systemd; its VMs are those of a simulator, reached as from that one's own dom0."""

    def up(self, templates=(), vms=(), dom0_binds=(), vm_binds=()):
        """Start everything.

        Raises:
            subprocess.CalledProcessError, RuntimeError: it could not be started.
        """
        super().up(templates, vms, (), vm_binds)
        self._folder = self.root + "-systemd"
        os.makedirs(self._folder)
        self._cgroups = _make_cgroups(f"qvm-remote-{os.getpid()}")
        binds = [bind_option(text) for text in (f"{self.root}/qubesd.sock:/run/qubesd.sock:rw", *dom0_binds)]
        self._pid = _boot(self._folder, self._cgroups, binds)
        deadline = time.monotonic() + _BOOT_WAIT
        while self.dom0("systemctl", "is-active", "simulated.target").returncode:
            if time.monotonic() > deadline:
                raise RuntimeError("systemd does not come up in a namespace here")
            time.sleep(0.1)

    def down(self):
        """End everything."""
        if getattr(self, "_pid", None):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            deadline = time.monotonic() + _END_WAIT
            while os.path.exists(f"/proc/{self._pid}") and time.monotonic() < deadline:
                time.sleep(0.01)
            self._pid = None
        for folder in getattr(self, "_cgroups", {}).values():
            _remove_cgroup(folder)
        super().down()
        shutil.rmtree(self.root + "-systemd", ignore_errors=True)

    def command(self, name, *words):
        """See :meth:`qubes_sim.handle.Sim.command`; what is meant for dom0 is run in this one."""
        if name != "dom0":
            return super().command(name, *words)
        argv = words[list(words).index("--") + 1 :]
        environment = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
        return ["nsenter", "-t", str(self._pid), "-m", "-p", "-i", "-u", "-n", "-C", "--", "env", "-i", "-C", "/", *environment, *argv]


def _make_cgroups(name):
    """Make groups of our own.

    Returns:
        dict of a hierarchy's name (``unified`` alone for cgroup v2) to its folder.
    """
    if os.path.exists(f"{_CGROUPS}/cgroup.controllers"):
        found = {"unified": f"{_CGROUPS}/{name}"}
    else:
        found = {one: f"{_CGROUPS}/{one}/{name}" for one in ("systemd", *_CONTROLLERS) if os.path.isdir(f"{_CGROUPS}/{one}")}
    for folder in found.values():
        os.makedirs(folder)
    return found


def _remove_cgroup(folder):
    for path, _, _ in os.walk(folder, topdown=False):
        # A group whose last process is just being buried is busy for a moment.
        for _ in range(100):
            try:
                os.rmdir(path)
                break
            except OSError:
                time.sleep(0.02)


def _boot(folder, cgroups, binds):
    """Start systemd.

    Returns:
        int, its pid.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for group in cgroups.values():
                with open(os.path.join(group, "cgroup.procs"), "w", encoding="ascii") as file:
                    file.write(str(os.getpid()))
            linux.unshare(_NAMESPACES)
            init = os.fork()
            if init == 0:
                _become_systemd(folder, cgroups, binds)
            os.write(write_end, str(init).encode("ascii"))
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as file:
        pid = file.read()
    if not pid:
        raise RuntimeError("this machine gives nobody namespaces and cgroups of his own")
    return int(pid)


def _become_systemd(folder, cgroups, binds):
    try:
        with open(os.path.join(folder, "log"), "wb", buffering=0) as log:
            null = os.open(os.devnull, os.O_RDONLY)
            for target, fd in enumerate((null, log.fileno(), log.fileno())):
                os.dup2(fd, target)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        store_folder = os.path.join(folder, "store")
        os.makedirs(store_folder)
        linux.mount("tmpfs", store_folder, "tmpfs", 0, "size=50%,mode=0755")
        store = Store(store_folder)
        store.make_base()
        store.make_private("dom0", 1000)
        store.reset("dom0", None)
        write_programs(store, "dom0_tools", TOOLS)
        store.write("dom0", "/etc/systemd/system/simulated.target", _TARGET)
        store.write("dom0", "/etc/hostname", "dom0\n")
        target = store.mount_point("dom0")
        store.mount("dom0", target, binds)
        for name in _MASKED:
            os.symlink("/dev/null", os.path.join(target, "etc/systemd/system", name))
        linux.mount("sysfs", os.path.join(target, "sys"), "sysfs")
        _mount_cgroups(target + _CGROUPS, cgroups)
        linux.pivot_root(target)
        linux.set_hostname("dom0")
        linux.loopback_up()
        os.closerange(3, 4096)
        os.execve(PROGRAM, [PROGRAM, "--system", "--unit=simulated.target", "--log-target=null"], {"container": "simulator", "PATH": "/usr/sbin:/usr/bin"})
    except OSError as err:
        os.write(2, f"{err}\n".encode())
    finally:
        os._exit(1)


def _mount_cgroups(target, cgroups):
    if "unified" in cgroups:
        linux.mount("cgroup2", target, "cgroup2")
        return
    linux.mount("tmpfs", target, "tmpfs", 0, "mode=0755")
    for name in cgroups:
        os.makedirs(os.path.join(target, name))
        linux.mount("cgroup", os.path.join(target, name), "cgroup", 0, "none,name=systemd" if name == "systemd" else name)


def is_possible():
    """Say whether this machine can have it.

    Returns:
        bool
    """
    if os.geteuid() or not os.access(PROGRAM, os.X_OK) or not shutil.which("nsenter"):
        return False
    probe = subprocess.run(["unshare", "--mount", "--pid", "--fork", "--cgroup", "mount", "-t", "sysfs", "sysfs", "/mnt"], capture_output=True, check=False)
    return probe.returncode == 0 and os.access(_CGROUPS, os.W_OK)
