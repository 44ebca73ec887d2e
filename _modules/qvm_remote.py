# SPDX-License-Identifier: GPL-2.0-or-later
"""Execution module of qvm-remote, for dom0: verify and run what authorized VMs ask for, manage their keys, show the state.

Thin: every function checks its arguments, calls ``pullrpc`` and returns plain data. No key is ever an argument or a
return value; a key comes from stdin, from a file, or from its VM.

The settings are those of the engine ``qvm_remote`` in the minion's configuration (all documented in pillar.example);
without one, the defaults of :mod:`pullrpc.config`. ``config`` overrides them, for tests and for the engine itself.
"""

import json
import logging
import os
import time

import pullrpc
import pullrpc.dom0
import pullrpc.errors
import pullrpc.files
import pullrpc.ids
import pullrpc.lock
import pullrpc.package
import pullrpc.service
import pullrpc.session
import pullrpc.transport
from salt.exceptions import CommandExecutionError

log = logging.getLogger(__name__)

__virtualname__ = "qvm_remote"
#: A key file: 64 digits and a newline; one byte more shows that it is too long.
_KEY_READ_MAX = 66
#: How long a VM may take to show its key, seconds.
_KEY_WAIT = 20
#: How long a template may take to unpack the client, seconds.
_INSTALL_WAIT = 120


def __virtual__():
    return __virtualname__


def _settings(config):
    if config is not None:
        return config
    for engine in __opts__.get("engines") or []:
        if isinstance(engine, dict) and "qvm_remote" in engine:
            return engine["qvm_remote"] or {}
    return {}


def _dom0(config):
    return pullrpc.dom0.shared(_settings(config))


def _raw(value):
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")


def verify(vm, cid, command, token, config=None):
    """Say whether dom0 would run a request. Nothing is changed, nothing runs.

    Args:
        vm: name of the VM it came from.
        cid: its id.
        command: the command, bytes or text.
        token: the token line, bytes or text.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``verified`` (bool), ``code`` (one word) and ``reason`` when not, ``state`` when it is on its way already.

    Raises:
        CommandExecutionError: the VM's name, the settings or the ledger can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.verify work 20261124-101500-4711-0badcafe "hostname" "v2 300 shell - 0123..."
    """
    try:
        pullrpc.ids.check_vm_name(vm)
        _, state = _dom0(config).verify(vm, _raw(cid), _raw(command), _raw(token))
    except pullrpc.errors.Refused as refused:
        return {"verified": False, "code": refused.code, "reason": str(refused)}
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(str(err)) from None
    return {"verified": True, "state": state}


def execute(vm, cid, config=None):
    """Run a command that the engine has claimed, once, in the sandbox, and keep its result for delivery.

    Args:
        vm: name of the VM it came from.
        cid: its id.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``exit`` (int), ``status`` (done, timeout, refused, cancelled, interrupted or failed), ``seconds`` (float).

    Raises:
        CommandExecutionError: there is no such command waiting; nothing was run.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.execute work 20261124-101500-4711-0badcafe
    """
    try:
        pullrpc.ids.check_vm_name(vm)
        return _dom0(config).execute(vm, pullrpc.ids.check_cid(cid))
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(str(err)) from None


def authorize(vm, key_file=None, from_vm=False, config=None):
    """Store a VM's key, so that dom0 runs what this VM asks for. It replaces the key the VM had.

    The key is read from stdin unless said otherwise; it is never an argument, since arguments end up in process
    lists, logs and job caches.

    Args:
        vm: name of the VM.
        key_file: path of a file that holds the key (64 hex digits).
        from_vm: ask the VM itself, which must be running and have made a key (``qvm-remote key gen``).
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``vm`` and ``fingerprint``.

    Raises:
        CommandExecutionError: the key is malformed or another VM's, or can't be read or stored.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.authorize work from_vm=True
        qvm-run --pass-io work 'qvm-remote key show --secret' | salt-call --local qvm_remote.authorize work
    """
    try:
        pullrpc.ids.check_vm_name(vm)
        dom0 = _dom0(config)
        if key_file:
            untrusted_key = pullrpc.files.read_bounded(key_file, _KEY_READ_MAX)
        elif from_vm:
            untrusted_key = _key_of(dom0.config, vm)
        else:
            untrusted_key = _read_stdin()
        shown = dom0.keyring.put(vm, untrusted_key)
        dom0.audit.write("authorized", vm, fingerprint=shown)
    except OSError as err:
        raise CommandExecutionError(f"can't read the key: {err.strerror}") from None
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(str(err)) from None
    return {"vm": vm, "fingerprint": shown}


def _key_of(settings, vm):
    code, untrusted_key = pullrpc.transport.run_bounded(settings, vm, "qvm-remote key show --secret", [], _KEY_READ_MAX, _KEY_WAIT)
    if code:
        raise pullrpc.errors.TransportError(f"{vm} showed no key; is it running, and was 'qvm-remote key gen' run there?")
    return untrusted_key


def _read_stdin():
    if os.isatty(0):
        raise pullrpc.errors.KeyringError("give the key on stdin, or say key_file=PATH or from_vm=True")
    data = b""
    while len(data) < _KEY_READ_MAX:
        chunk = os.read(0, _KEY_READ_MAX - len(data))
        if not chunk:
            break
        data += chunk
    return data


def client_installed(template, config=None):
    """Say whether this version of the client was installed in a template (or standalone) from here.

    Args:
        template: its name.
        config: settings (dict), default: the engine's.

    Returns:
        bool

    Raises:
        CommandExecutionError: it is no VM's name, or the client's files are not in the file roots.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.client_installed fedora-41
    """
    try:
        pullrpc.ids.check_vm_name(template)
        return pullrpc.files.read_bounded(_client_note(_dom0(config).config, template), 64).decode("ascii") == _client_archive()[1]
    except FileNotFoundError:
        return False
    except (OSError, pullrpc.errors.PullError) as err:
        raise CommandExecutionError(str(err)) from None


def install_client(template, config=None):
    """Install the client in a template (or standalone): dom0 writes it there, nothing is downloaded.

    A template that is shut down is started for it, and shut down again.

    Args:
        template: its name.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``template`` and ``sha256`` of what was installed.

    Raises:
        CommandExecutionError: the template can't be started or written to.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.install_client fedora-41
    """
    try:
        pullrpc.ids.check_vm_name(template)
        settings = _dom0(config).config
        data, digest = _client_archive()
        was_running = template in pullrpc.transport.running_vms(settings)
        if not was_running:
            pullrpc.transport.set_running(template, True)
        try:
            command = "tar --extract --no-same-owner --directory=/"
            code, _ = pullrpc.transport.run_bounded(settings, template, command, [data], 4096, _INSTALL_WAIT, user="root")
        finally:
            if not was_running:
                pullrpc.transport.set_running(template, False)
        if code:
            raise pullrpc.errors.TransportError(f"{template} could not take the client (exit code {code}): is its disk full?")
        os.makedirs(os.path.dirname(_client_note(settings, template)), mode=0o700, exist_ok=True)
        pullrpc.files.write_whole(_client_note(settings, template), digest.encode("ascii"))
    except (OSError, pullrpc.errors.PullError) as err:
        raise CommandExecutionError(str(err)) from None
    return {"template": template, "sha256": digest}


def _client_archive():
    cached = __salt__["cp.cache_dir"]("salt://client")
    launcher = [path for path in cached or () if path.endswith("/client/qvm-remote")]
    if not launcher:
        raise pullrpc.errors.PullError("the client's files are not in Salt's file roots (salt://client)")
    return pullrpc.package.client_archive(os.path.dirname(launcher[0]))


def _client_note(settings, template):
    return os.path.join(settings.state_dir, "clients", template)


def revoke(vm, config=None):
    """Remove a VM's key: from now on everything it asks for is refused. What runs is not stopped.

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        bool, whether it had a key.

    Raises:
        CommandExecutionError: it is no VM's name, or the key can't be removed.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.revoke work
    """
    try:
        dom0 = _dom0(config)
        had_one = dom0.keyring.remove(vm)
        if had_one:
            dom0.audit.write("revoked", vm)
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(str(err)) from None
    return had_one


def keys(config=None):
    """List the VMs that have a key.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        dict of VM name to a dict: ``fingerprint``, or ``problem`` when the key is there and refused. Never a key.

    Raises:
        CommandExecutionError: the key folder can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.keys
    """
    try:
        return _dom0(config).keyring.fingerprints()
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(str(err)) from None


def status(config=None):
    """Show whether an engine is at work, how each VM is served, and how many commands are in which state.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``version``, ``engine`` (running or stopped), ``sessions`` (VM name to agent, agentless, connecting, waiting),
        ``commands`` (state to count), ``keys`` as :func:`keys` gives them.

    Raises:
        CommandExecutionError: the settings or the ledger can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.status
    """
    try:
        dom0 = _dom0(config)
        running = pullrpc.lock.is_held(dom0.config.run_dir)
        return {
            "version": pullrpc.__version__,
            "engine": "running" if running else "stopped",
            "sessions": _sessions(dom0.config) if running else {},
            "commands": dom0.ledger.counts(),
            "keys": dom0.keyring.fingerprints(),
        }
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(str(err)) from None


def _sessions(settings):
    try:
        return json.loads(pullrpc.files.read_bounded(pullrpc.service.sessions_path(settings), 1 << 20))
    except (OSError, ValueError):
        # The engine has just started and found no VM yet.
        return {}


def run_once(config=None):
    """Without an engine: serve what lies in the queues of all running, authorized VMs now, then return.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        dict of VM name to ``served`` or the reason why not.

    Raises:
        CommandExecutionError: an engine is at work, or the settings or the ledger can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.run_once
    """
    settings = _settings(config)
    try:
        service = pullrpc.service.Service(
            pullrpc.dom0.shared(settings),
            verify=lambda vm, cid, command, token: verify(vm, cid, command, token, config=settings),
            execute=lambda vm, cid: execute(vm, cid, config=settings),
            emit=lambda *_: None,
            log=log.warning,
        )
        return service.run_once()
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(str(err)) from None


def ping(vm, config=None):
    """Open a session to a running VM and end it: is qvm-remote installed there, and does it answer?

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``vm`` and ``milliseconds``, from dom0's call to the agent's answer.

    Raises:
        CommandExecutionError: it doesn't run, has no agent, or doesn't answer.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.ping work
    """
    try:
        pullrpc.ids.check_vm_name(vm)
        started = time.monotonic()
        session = pullrpc.session.Session(_dom0(config).config.for_vm(vm), vm)
        try:
            session.hello()
            waited = time.monotonic() - started
            session.bye()
        finally:
            session.close()
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(f"{vm}: {err}") from None
    return {"vm": vm, "milliseconds": round(waited * 1000)}
