# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 does in a VM besides answering it: looks at key and queue, puts them in order, removes them; installs and
removes the client. Each in one short session or one program start, by dom0's own wish only.
"""

from __future__ import annotations

import contextlib
import os

from .agentless import Agentless
from .errors import TransportError
from .files import forget, write_whole
from .session import NoAgent, Session
from .transport import run_bounded, running_vms, set_running

#: How long a template may take to unpack or remove the client, seconds.
_CLIENT_WAIT = 120
_UNPACK = "tar --extract --no-same-owner --directory=/"
#: All of it but the history and the VM's own audit log, which are its user's.
_REMOVE_QUEUE = """\
cd && [ ! -L .qvm-remote ] && [ -d .qvm-remote ] || exit 0
cd .qvm-remote && rm -rf queue auth.key .auth.key.* dom0-limits .dom0-limits* dom0-seen doorbell agent.lock
"""
_REMOVE_ALL = "cd && { [ -L .qvm-remote ] || rm -rf .qvm-remote; }\n"


@contextlib.contextmanager
def look_into(config, vm):
    """Open a session to a running VM for looking at its key and its queue.

    Args:
        config: Config that holds for the VM.
        vm: str, a checked name.

    Yields:
        (Session or Agentless, Found)

    Raises:
        SessionBroken, TransportError: it doesn't answer.
    """
    session = Agentless(config, vm) if config.accept_v1 else Session(config, vm)
    try:
        try:
            found = session.inspect()
        except NoAgent:
            session = Agentless(config, vm)
            found = session.inspect()
        yield session, found
    finally:
        session.close()


def remove_queue(config, vm, history=False):
    """Remove key and queue from a running VM.

    Args:
        config: Config that holds for the VM.
        vm: str, a checked name.
        history: bool, whether the history and the VM's audit log go, too.

    Raises:
        SessionBroken, TransportError: it can't be done.
    """
    script = _REMOVE_ALL if history else _REMOVE_QUEUE
    code, _ = run_bounded(config, vm, "exec /bin/sh -s", [script.encode("ascii")], 64, config.answer_wait)
    if code:
        raise TransportError(f"{vm}: the queue could not be removed (exit code {code})")


def client_digest(config, template):
    """Say which client dom0 installed in a template.

    Args:
        config: Config.
        template: str, a checked name.

    Returns:
        str, the SHA-256 of what was installed; None when nothing was.
    """
    try:
        with open(_client_note(config, template), encoding="ascii") as file:
            return file.read(64)
    except FileNotFoundError:
        return None


def clients(config):
    """List the templates that got a client from here.

    Args:
        config: Config.

    Returns:
        list of str, sorted.
    """
    try:
        return sorted(name for name in os.listdir(os.path.dirname(_client_note(config, "-"))) if not name.startswith("."))
    except FileNotFoundError:
        return []


def install_client(config, template, archive, digest):
    """Unpack the client in a template (or standalone), which is started for it and shut down again if need be.

    Args:
        config: Config.
        template: str, a checked name.
        archive: bytes, a tar archive.
        digest: str, its SHA-256.

    Raises:
        SessionBroken, TransportError, OSError: it can't be done, or not be noted.
    """
    _run_as_root(config, template, _UNPACK, [archive], "take the client: is its disk full?")
    os.makedirs(os.path.dirname(_client_note(config, template)), mode=0o700, exist_ok=True)
    write_whole(_client_note(config, template), digest.encode("ascii"))


def remove_client(config, template, paths):
    """Remove the client from a template (or standalone).

    Args:
        config: Config.
        template: str, a checked name.
        paths: list of str, constants of ours: what goes.

    Raises:
        SessionBroken, TransportError, OSError: it can't be done.
    """
    _run_as_root(config, template, "rm -rf " + " ".join(paths), [], "remove the client")
    forget(_client_note(config, template))


def _run_as_root(config, template, command, data, purpose):
    was_running = template in running_vms(config)
    if not was_running:
        set_running(template, True)
    try:
        code, _ = run_bounded(config, template, command, data, 4096, _CLIENT_WAIT, user="root")
    finally:
        if not was_running:
            set_running(template, False)
    if code:
        raise TransportError(f"{template} could not {purpose} (exit code {code})")


def _client_note(config, template):
    return os.path.join(config.state_dir, "clients", template)
