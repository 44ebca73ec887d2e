# SPDX-License-Identifier: GPL-2.0-or-later
"""A real OpenSSH server on loopback, with a configuration, keys and a port of its own, for as long as the benchmark runs."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time

#: How long the server may take to answer, seconds.
_START_WAIT = 10
#: The master goes on in the background, and would keep a pipe open.
_NO_STREAMS = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
_SERVER = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
# Debian's bash reads ~/.bashrc for ssh, whatever stands there, unless it believes to be started by another shell.
SetEnv SHLVL=1
PermitUserRC no
MaxStartups 200
MaxSessions 200
LogLevel ERROR
"""
_CLIENT = """\
Host master
  ControlPath {folder}/control
  ControlMaster auto
  ControlPersist yes
Host *
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {folder}/known
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking accept-new
  BatchMode yes
  LogLevel ERROR
"""


class SshUnavailable(Exception):
    """There is no server to measure; the text says why."""


class SshServer:
    """The server, and a master connection to it.

    Raises:
        SshUnavailable: it is not installed, or does not start.
    """

    def __init__(self):
        sshd = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin")
        if not sshd or not shutil.which("ssh"):
            raise SshUnavailable("OpenSSH's server and client are not installed")
        self._folder = tempfile.mkdtemp(prefix="qvm-remote-bench-ssh-")
        self._process = None
        try:
            self._start(sshd)
        except (OSError, subprocess.SubprocessError) as err:
            self.close()
            raise SshUnavailable(f"OpenSSH's server does not start: {err}") from err

    def argv(self, master, *words):
        """The command line that runs something there.

        Args:
            master: bool, over the connection that is open already.
            words: str.

        Returns:
            list of str
        """
        return ["ssh", "-F", f"{self._folder}/client", "master" if master else "each", *words]

    def close(self):
        """End it."""
        if self._process is not None:
            subprocess.run(["ssh", "-F", f"{self._folder}/client", "-O", "exit", "master"], capture_output=True, check=False)
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, sshd):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self._folder}/{name}"], check=True, capture_output=True)
        names = {"port": port, "folder": self._folder, "user": pwd.getpwuid(os.geteuid()).pw_name}
        for name, text in (("server", _SERVER), ("client", _CLIENT)):
            with open(f"{self._folder}/{name}", "w", encoding="utf-8") as file:
                file.write(text.format(**names))
        if os.geteuid() == 0:
            # The server wants this folder, which the distribution's service makes.
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        with open(f"{self._folder}/log", "wb") as log:
            self._process = subprocess.Popen([sshd, "-D", "-e", "-f", f"{self._folder}/server"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_WAIT
        while subprocess.run(self.argv(True, "true"), **_NO_STREAMS, timeout=_START_WAIT, check=False).returncode:
            if time.monotonic() > deadline or self._process.poll() is not None:
                with open(f"{self._folder}/log", encoding="utf-8", errors="replace") as file:
                    raise OSError(file.read().strip() or "it does not answer")
            time.sleep(0.1)
