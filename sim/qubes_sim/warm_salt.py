#!/usr/bin/python3 -IS
# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's salt-call in the simulator, for tests: they call it hundreds of times, and its imports take longer than most of its work.

As ``salt-call`` it hands its arguments, environment, folder and descriptors to a server, which has these imports done already and
forks: the child runs Salt's own program to its own end. It is killed when its caller is. Without a server, or where the
environment has PLAIN_SALT, Salt's program is started as ever. Stands alone, without the simulator's other modules.
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import sys

if os.path.basename(sys.argv[0]) != "salt-call":
    # The server alone needs these: who hands a call over is to start fast.
    import atexit
    import gc
    import importlib
    import runpy

_FOLDER = "/usr/lib/qubes/simulated"
_SOCKET = f"{_FOLDER}/warm-salt.sock"
#: Starts Salt's program from nothing.
_PLAIN = f"{_FOLDER}/salt-call"


def _hand_over(argv):
    if os.geteuid() or "PLAIN_SALT" in os.environ:
        return None
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(_SOCKET)
    except (FileNotFoundError, ConnectionError):
        return None
    umask = os.umask(0o077)
    body = json.dumps({"argv": argv, "environment": dict(os.environ), "folder": os.getcwd(), "umask": umask}).encode("ascii")
    sock.sendmsg([len(body).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    sock.sendall(body)
    # Nothing comes from a server that was killed.
    return int.from_bytes(sock.recv(4) or b"\1", "big")


class _Server:
    """Forks a child for each call.

    Args:
        listener: socket.
    """

    def __init__(self, listener):
        self._listener = listener
        self._calls = {}
        self._learned, self._learned_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._tried = set()
        self._wake, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def serve(self):
        """Serve until this process is killed. What one call imports, the next ones find imported.

        Returns:
            dict, a request; in a child that has to carry it out.
        """
        import select

        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        while True:
            self._learn()
            sockets = {sock.fileno(): pid for pid, sock in self._calls.items()}
            readable, _, _ = select.select([self._listener, self._wake, *sockets], [], [])
            for fd in readable:
                if fd is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif fd == self._wake:
                    os.read(self._wake, 4096)
                    self._reap()
                elif sockets[fd] in self._calls:
                    os.kill(sockets[fd], signal.SIGKILL)
                    self._calls.pop(sockets[fd]).close()

    def _learn(self):
        names = b""
        with contextlib.suppress(BlockingIOError):
            names = os.read(self._learned, 65536)
        for name in names.decode("ascii").split():
            if name not in self._tried:
                self._tried.add(name)
                # Some are there for what they can't import.
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        if names:
            gc.freeze()

    def _tell(self, known):
        """In a child, at its end: say what it has imported of Salt's own place and of Python; never what Salt synchronises."""
        found = [(name, getattr(module, "__file__", None) or "") for name, module in list(sys.modules.items()) if name not in known]
        names = [name for name, path in found if path.startswith((sys.prefix, sys.base_prefix)) and not name.startswith("salt.loaded.")]
        # Whole or not at all, as a pipe takes so much.
        text = " ".join(names)[: select.PIPE_BUF - 1].rpartition(" ")[0] + " "
        with contextlib.suppress(BlockingIOError):
            os.write(self._learned_write, text.encode("ascii"))

    def _accept(self):
        sock, _ = self._listener.accept()
        size, ancillary, _, _ = sock.recvmsg(4, socket.CMSG_LEN(12))
        fds = array.array("i", b"".join(data for _, _, data in ancillary))
        body = sock.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
        pid = os.fork()
        if pid == 0:
            self._become_child(sock, fds)
            return json.loads(body)
        for fd in fds:
            os.close(fd)
        self._calls[pid] = sock
        return None

    def _become_child(self, sock, fds):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
            os.close(fd)
        for other in (sock, self._listener, *self._calls.values()):
            other.close()
        for fd in (self._wake, self._wake_write, self._learned):
            os.close(fd)
        atexit.register(self._tell, set(sys.modules))

    def _reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            sock = self._calls.pop(pid, None)
            if sock is not None:
                code = os.waitstatus_to_exitcode(status)
                # The caller may be gone.
                with contextlib.suppress(OSError):
                    sock.send((code if code >= 0 else 128 - code).to_bytes(4, "big"))
                sock.close()


def _serve(salt):
    """Be the server, in the background; return once it listens.

    Args:
        salt: str, Salt's own program.
    """
    listener = socket.socket(socket.AF_UNIX)
    if os.path.exists(_SOCKET):
        os.unlink(_SOCKET)
    umask = os.umask(0o077)
    listener.bind(_SOCKET)
    os.umask(umask)
    listener.listen(16)
    if os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    request = _Server(listener).serve()
    os.environ.clear()
    os.environ.update(request["environment"], PYTHONPATH=_FOLDER)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    sys.path[0] = os.path.dirname(salt)
    sys.argv[:] = [salt, *request["argv"]]
    runpy.run_path(salt, run_name="__main__")


if __name__ == "__main__":
    if os.path.basename(sys.argv[0]) == "salt-call":
        code = _hand_over(sys.argv[1:])
        if code is None:
            os.execv(_PLAIN, [_PLAIN, *sys.argv[1:]])
        sys.exit(code)
    _serve(sys.argv[1])
