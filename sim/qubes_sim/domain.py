# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain: namespaces of its own, and the first process in them, which starts what the hypervisor asks for.

It never hears from anybody but the hypervisor, and dies with it.
"""

import contextlib
import fcntl
import os
import pty
import pwd
import select
import signal
import sys
import termios

from . import linux, wire

_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | linux.CLONE_NEWNET
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
#: Capabilities that reach beyond a domain: modules, raw I/O, reboot, time, device nodes, system log.
_DROPPED = (16, 17, 22, 25, 27, 34)
#: A VM's root may moreover not mount or enter anything, trace the first process, or open a file by its handle: that finds
#: those of other VMs, which lie on the same file system.
_DROPPED_IN_VM = (*_DROPPED, 2, 19, 21)
#: What there is of the host's kernel to be set in a VM's /proc, if its root is the machine's.
_KERNEL_SETTINGS = ("/proc/sys", "/proc/sysrq-trigger")


def start(name, store, sock, binds, is_vm):
    """Fork a domain's first process.

    Args:
        name: str.
        store: roots.Store.
        sock: socket, the domain's end.
        binds: list, see roots.Store.mount.
        is_vm: bool, False for dom0.

    Returns:
        int, the pid of the process that waits for it.
    """
    # Flushed, so that the child has nothing to flush a second time.
    sys.stdout.flush()
    sys.stderr.flush()
    keeper = os.fork()
    if keeper:
        return keeper
    status = 1
    try:
        linux.die_with_parent(signal.SIGKILL)
        # Nothing of the hypervisor's is open in a domain but this one socket (and its log, as stdout and stderr).
        os.closerange(3, sock.fileno())
        os.closerange(sock.fileno() + 1, 65536)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        linux.unshare(_NAMESPACES)
        init = os.fork()
        if init == 0:
            linux.die_with_parent(signal.SIGKILL)
            _become_init(name, store, sock, binds, is_vm)
        sock.close()
        os.waitpid(init, 0)
        status = 0
    except OSError as err:
        wire.send(sock, {"failed": str(err)})
    finally:
        os._exit(status)


def _become_init(name, store, sock, binds, is_vm):
    try:
        target = store.mount_point(name)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        store.mount(name, target, binds)
        linux.pivot_root(target)
        if is_vm:
            for path in filter(os.path.exists, _KERNEL_SETTINGS):
                linux.bind(path, path, read_only=True)
        linux.set_hostname(name)
        linux.loopback_up()
        os.umask(0o022)
        wire.send(sock, {"ready": True})
        _Init(sock, _DROPPED_IN_VM if is_vm else _DROPPED).serve()
    except OSError as err:
        wire.send(sock, {"failed": str(err)})
    finally:
        # The kernel kills what is left in the namespace with us.
        os._exit(0)


class _Init:
    def __init__(self, sock, dropped):
        self._sock = sock
        self._dropped = dropped
        self._running = {}
        self._wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self):
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == self._wake:
                    os.read(self._wake, 4096)
                    self._reap()
                    continue
                message, fds = wire.receive(self._sock)
                if message is None:
                    return
                if message["op"] == "halt":
                    # Nobody there is no error.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(-1, signal.SIGTERM)
                elif message["op"] == "run":
                    self._run(message, fds)
                elif message["op"] == "kill":
                    self._kill(message["id"], message["signal"])

    def _run(self, message, fds):
        master = None
        if message["tty"]:
            master, slave = pty.openpty()
            fds = [slave, slave, slave]
        pid = os.fork()
        if pid == 0:
            _become_command(message, fds, self._dropped)
        for fd in set(fds):
            os.close(fd)
        self._running[pid] = message["id"]
        wire.send(self._sock, {"id": message["id"], "started": pid}, [] if master is None else [master])
        if master is not None:
            os.close(master)

    def _kill(self, number, signum):
        for pid, running in self._running.items():
            if running == number:
                try:
                    os.killpg(pid, signum)
                except ProcessLookupError:
                    return

    def _reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            number = self._running.pop(pid, None)
            if number is not None:
                code = os.waitstatus_to_exitcode(status)
                wire.send(self._sock, {"id": number, "exit": code if code >= 0 else 128 - code})


def _become_command(message, fds, dropped):
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(signum, signal.SIG_DFL)
        high = [os.dup(fd) for fd in fds]
        for target, fd in enumerate(high):
            os.dup2(fd, target)
        os.closerange(3, 4096)
        if message["tty"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        user = pwd.getpwnam(message["user"])
        home = user.pw_dir if os.path.isdir(user.pw_dir) else "/"
        linux.drop_capabilities(dropped)
        _switch_user(user)
        environment = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name, "SHELL": user.pw_shell, "PATH": _PATH}
        environment.update({"LANG": "C.UTF-8", "TERM": message.get("term") or "dumb"})
        os.chdir(message.get("cwd") or home)
        os.execvpe(message["argv"][0], message["argv"], environment)
    except KeyError:
        os.write(2, f"no such user: {message['user']}\n".encode())
    except OSError as err:
        os.write(2, f"{message['argv'][0]}: {err}\n".encode())
    finally:
        os._exit(127)


def _switch_user(user):
    try:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    except OSError:
        # Run by an ordinary user who has no subordinate ids: there is only one id in here, and it has to be everybody.
        with open("/proc/self/uid_map", encoding="ascii") as file:
            ids = sum(int(line.split()[2]) for line in file)
        if ids > 1:
            raise
