# SPDX-License-Identifier: GPL-2.0-or-later
"""Execution module of qvm-remote, for dom0: verify and run what authorized VMs ask for, manage their keys, show the state.

Thin: every function checks its arguments, calls ``pullrpc`` and returns plain data. No key is ever an argument or a
return value; a key comes from stdin, from a file, or from its VM.

The settings are those of the engine ``qvm_remote`` in the minion's configuration (all documented in pillar.example);
without one, the defaults of :mod:`pullrpc.config`. ``config`` overrides them, for tests and for the engine itself.
"""

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import time

import pullrpc
import pullrpc.accounts
import pullrpc.audit_files
import pullrpc.audit_read
import pullrpc.config
import pullrpc.doctor
import pullrpc.dom0
import pullrpc.errors
import pullrpc.files
import pullrpc.ids
import pullrpc.ledger_report
import pullrpc.lock
import pullrpc.note
import pullrpc.overview
import pullrpc.package
import pullrpc.pillar
import pullrpc.policy
import pullrpc.provision
import pullrpc.rehearsal
import pullrpc.removal
import pullrpc.service
import pullrpc.tokens
import pullrpc.transport
import salt.utils.files
import salt.utils.yaml
from salt.exceptions import CommandExecutionError

log = logging.getLogger(__name__)

__virtualname__ = "qvm_remote"
#: A key file: 64 digits and a newline; one byte more shows that it is too long.
_KEY_READ_MAX = 66
#: How long the engine may take to work under new settings, seconds.
_RELOAD_WAIT = 10
#: How long the engine may take to end, once what runs had its time, seconds.
_STOP_WAIT = 15
_PILLAR = "qvm-remote"
#: A misspelt name, an empty file or a missing top file is not to pass for the wish that no qube has access.
_PILLAR_MISSING = (
    "dom0's pillar has no qvm-remote; is it in /srv/pillar, and does a top file give it to dom0 (qubesctl top.enable qvm-remote pillar=True)? "
    "For no qubes at all write: qvm-remote: {}"
)
#: What Salt says of it shows lines of pillar, in which a key may stand.
_PILLAR_UNREADABLE = "Salt can't read dom0's pillar, and applies nothing; what is wrong there says: qubesctl pillar.items"
#: Where the configuration of the service's minion lies.
_SERVICE_CONFIG = "/etc/qubes/remote"
#: How long a list of running VMs holds, so that a fleet's states do not start qvm-ls for each VM, seconds.
_LIST_HOLDS = 5


def __virtual__():
    return __virtualname__


def _settings(config):
    found = _found(config)
    return {} if found is None else found


def _found(config):
    """The settings; None where there are none."""
    found = pullrpc.config.engine_settings(__opts__) if config is None else config
    # Asked by qubesctl, whose minion has no engine, it is the service's that is meant.
    return pullrpc.config.engine_settings(_service_minion()) if found is None else found


def _applied(config):
    """The settings under which commands are run. Without any none is: what pillar says of a VM is not known then."""
    found = _found(config)
    if found is None:
        raise CommandExecutionError("qvm-remote is not set up here, and nothing is run: sudo qubesctl state.apply qvm-remote.dom0")
    return found


def _service_minion():
    """The configuration of the minion that runs the engine as a service; empty where that was never applied."""
    try:
        with salt.utils.files.fopen(os.path.join(_SERVICE_CONFIG, "minion")) as file:
            minion = salt.utils.yaml.safe_load(file)
    except FileNotFoundError:
        return {}
    except (OSError, salt.utils.yaml.YAMLError):
        minion = None
    if not isinstance(minion, dict):
        raise CommandExecutionError(f"the configuration in {_SERVICE_CONFIG} can't be read; apply qvm-remote.dom0 again")
    return minion


def _dom0(config):
    return pullrpc.dom0.shared(_settings(config))


def _dom0_in_force(config):
    return pullrpc.dom0.shared(_applied(config))


@contextlib.contextmanager
def _told(vm=None):
    """What goes wrong in pullrpc becomes an error of Salt's, which a user is shown as one line; it names a VM on demand."""
    try:
        yield
    except (OSError, pullrpc.errors.PullError) as err:
        text = f"{err.filename}: {err.strerror}" if isinstance(err, OSError) and err.filename else str(err)
        raise CommandExecutionError(f"{vm}: {text}" if vm else text) from None


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
        _, state = _dom0_in_force(config).intake.verify(vm, _raw(cid), _raw(command), _raw(token))
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
    with _told():
        pullrpc.ids.check_vm_name(vm)
        return _dom0_in_force(config).execution.execute(vm, pullrpc.ids.check_cid(cid))


def authorize(vm, key_file=None, from_vm=False, from_pillar=False, config=None, in_advance=False):
    """Store a VM's key, so that dom0 runs for it what its policy lets it: nothing, if the engine is configured by a pillar that does
    not name it (``unlisted``). It replaces the key the VM had.

    The key is read from stdin unless said otherwise; it is never an argument, since arguments end up in process
    lists, logs and job caches.

    Args:
        vm: name of the VM.
        key_file: path of a file that holds the key (64 hex digits).
        from_vm: ask the VM itself, which must be running and have made a key (``qvm-remote key gen``).
        from_pillar: take the key that stands in pillar, under ``qvm-remote:vms:VM:key``.
        config: settings (dict), default: the engine's.
        in_advance: there need be no such qube yet: the key is for the first one that is seen under this name.

    Returns:
        dict: ``vm``, ``fingerprint``, and ``known`` (bool): dom0 had this very key for it already.

    Raises:
        CommandExecutionError: the key is malformed or another VM's, or can't be read or stored; or there is no such qube.

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
            untrusted_key = pullrpc.provision.read_key(dom0.config.for_vm(vm), vm)
        elif from_pillar:
            untrusted_key = _pillar_key(vm)
        else:
            untrusted_key = _read_stdin()
        known = dom0.keyring.fingerprints(vm).get(vm, {}).get("fingerprint")
        shown = _authorize(dom0, vm, untrusted_key, in_advance)
        if from_vm:
            dom0.handover.has_own(vm)
    except OSError as err:
        raise CommandExecutionError(f"can't read the key: {err.strerror}") from None
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(str(err)) from None
    return {"vm": vm, "fingerprint": shown, "known": shown == known}


def _authorize(dom0, vm, untrusted_key, in_advance=False):
    uuid = _uuid(dom0.config, vm)
    if not uuid and not in_advance:
        # It would be for whoever gets this name later.
        raise pullrpc.errors.KeyringError(f"there is no qube {vm}, so that nobody was authorized; for one that is yet to be made: --in-advance (in_advance=True)")
    return dom0.keyring.put(vm, untrusted_key, lambda shown: dom0.audit.write("authorized", vm, sync=True, fingerprint=shown, uuid=uuid), uuid)


def _uuid(settings, vm):
    """Which qube has a name now; empty when there is none."""
    at, known = __context__.get("qvm_remote.uuids", (float("-inf"), {}))
    if time.monotonic() - at > _LIST_HOLDS:
        known = pullrpc.transport.uuids(settings)
        __context__["qvm_remote.uuids"] = (time.monotonic(), known)
    return known.get(vm, "")


def identity(vm, config=None):
    """Say whether a VM's key is for the qube that has this name now.

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``bound``: the UUID of the qube that the key is for, ``now``: of the one that has the name now (each empty when there is
        none), ``fits`` (bool): False when these are two; then the VM is refused whatever it asks for.

    Raises:
        CommandExecutionError: it can't be told.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.identity work
    """
    with _told():
        dom0 = _dom0(config)
        bound = dom0.keyring.bound(pullrpc.ids.check_vm_name(vm))
        now = _uuid(dom0.config, vm)
    return {"bound": bound, "now": now, "fits": not bound or not now or bound == now}


def bind(vm, config=None):
    """Say that the qube that has a name now is the one that is to have access under it: it was restored from a backup, say.

    It goes on with the key and the commands of the one before. To give a new qube access of its own, apply the states instead.

    Args:
        vm: name of a VM that has a key.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``vm``, ``old`` and ``new`` (UUIDs).

    Raises:
        CommandExecutionError: there is no such qube, or it has no key here.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.bind work
    """
    with _told():
        dom0 = _dom0(config)
        old = dom0.keyring.bound(pullrpc.ids.check_vm_name(vm))
        now = pullrpc.transport.uuids(dom0.config, vm)[vm]
        dom0.audit.write("bound", vm, sync=True, uuid=now)
        dom0.keyring.bind(vm, now)
    return {"vm": vm, "old": old, "new": now}


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


def _pillar_key(vm):
    key = pullrpc.pillar.given_key(__pillar__.get(_PILLAR) or {}, vm)
    if key is None:
        raise pullrpc.errors.PillarError(f"pillar {_PILLAR}:vms:{vm}:key holds no key")
    return key


def explain(vm, command, config=None):
    """Say whether a VM could have a command run now (it has a key, its access has not ended, its policy lets it), and as whom.

    Args:
        vm: name of the VM.
        command: the command line as it would be given to qvm-remote, a script of several lines, or a list of exact words.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``allowed`` (bool), ``asks`` (bool: dom0's user decides), ``reason``, ``rule`` (empty when none decided), ``words`` (list;
        of lists for a script of several lines; None where a shell reads it), ``as`` (dom0's user that would run it).

    Raises:
        CommandExecutionError: the VM's name or the settings can't be used, or the ledger or the VMs of a tag can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.explain work "qvm-prefs work memory 400"
    """
    for word in command if isinstance(command, list) else [command]:
        # What YAML took for something else can't be turned back into what was typed.
        if not isinstance(word, str):
            raise CommandExecutionError(f"put {word} in quotes, once more than for the shell: YAML reads it as no text")
    with _told():
        dom0 = _dom0_in_force(config)
        shown = pullrpc.rehearsal.explain(dom0, pullrpc.ids.check_vm_name(vm), command)
        return {**shown, "as": pullrpc.accounts.describe_account(dom0.config.for_vm(vm).run_as)}


def access(vm, config=None):
    """Say in one line what a VM may have run, as whom, and until when.

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        str

    Raises:
        CommandExecutionError: the VM's name or the settings can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.access work
    """
    with _told():
        return pullrpc.policy.describe(_dom0(config).config.for_vm(pullrpc.ids.check_vm_name(vm)))


def given_fingerprint(vm):
    """Show which key pillar gives a VM.

    Args:
        vm: name of the VM.

    Returns:
        str, its fingerprint.

    Raises:
        CommandExecutionError: pillar holds none, or none that can be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.given_fingerprint dev
    """
    with _told():
        return pullrpc.tokens.fingerprint(pullrpc.tokens.parse_key(_pillar_key(vm)))


def plan(defaults=None):
    """Read pillar: check every line of it, and say what it wants in plain data. No key is part of it.

    Args:
        defaults: dict that pillar's entries replace, one by one.

    Returns:
        dict: ``problem`` (str) when something in pillar is wrong, else ``settings``, ``service``, ``minion``, ``templates``,
        ``vms``, ``unlisted``, ``clean_logs``, ``notes``, as :class:`pullrpc.pillar.Plan` has them. Both when there is no
        such pillar: then the plan is that of an empty one, by which nothing is to be applied but ``qvm-remote.clean``.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.plan
    """
    if __pillar__.get("_errors"):
        return {"problem": _PILLAR_UNREADABLE}
    pillar = __pillar__.get(_PILLAR)
    if isinstance(pillar, dict) or pillar is None:
        pillar = {**(defaults or {}), **(pillar or {})}
    try:
        planned = dataclasses.asdict(pullrpc.pillar.read_pillar(pillar, _list_vms))
    except pullrpc.errors.PullError as err:
        # Not an exception: a template that fails to render shows twenty lines of itself around this one.
        return {"problem": str(err)}
    return planned if _PILLAR in __pillar__ else {**planned, "problem": _PILLAR_MISSING}


def _list_vms(tags):
    """All VMs, once for all the templates that ask for the plan in one apply."""
    at, asked, found = __context__.get("qvm_remote.vms", (float("-inf"), None, None))
    if asked != tags or time.monotonic() - at > _LIST_HOLDS:
        found = pullrpc.transport.list_vms(tags)
        __context__["qvm_remote.vms"] = (time.monotonic(), tags, found)
    return found


def generate(vm, config=None):
    """Make a key for a VM that has none, here in dom0; the VM gets it when it is next looked at.

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``vm`` and ``fingerprint``.

    Raises:
        CommandExecutionError: it has a key (rotate it instead), or the key can't be stored.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.generate work
    """
    with _told():
        pullrpc.ids.check_vm_name(vm)
        dom0 = _dom0(config)
        if dom0.keyring.exists(vm):
            raise pullrpc.errors.KeyringError(f"{vm} has a key; qvm_remote.rotate {vm} changes it")
        shown = _authorize(dom0, vm, secrets.token_hex(32))
    return {"vm": vm, "fingerprint": shown}


def rotate(vm, from_pillar=False, config=None):
    """Change a VM's key without losing a command: the old one works until the VM has used the new one.

    The new key is handed over at once if the VM runs, else when it next does. From then on the old one works for requests
    that were signed just before, for ``max_age`` seconds at most.

    Args:
        vm: name of a VM that has a key.
        from_pillar: take the key that stands in pillar, instead of making one.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``vm``, ``old`` and ``new`` (fingerprints), ``handed`` (bool, False while it waits for the VM), ``problem`` (str)
        when the VM runs and did not take it. A new key that waits already is handed over, rather than another one made.

    Raises:
        CommandExecutionError: the VM has no key, or commands of before its last rotation still wait.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.rotate work
    """
    with _told():
        pullrpc.ids.check_vm_name(vm)
        dom0 = _dom0(config)
        old, new = dom0.access.rotate(vm, pullrpc.tokens.parse_key(_pillar_key(vm)) if from_pillar else None)
    rotated = {"vm": vm, "old": old, "new": new, "handed": False}
    try:
        rotated["handed"] = _runs(dom0.config, vm) and _hand_if_there(dom0, vm)
    except pullrpc.errors.PullError as err:
        rotated["problem"] = f"{vm} has not taken its new key: {err}; the engine tries again, and until then the old one works"
    return rotated


def _runs(settings, vm):
    at, running = __context__.get("qvm_remote.running", (float("-inf"), ()))
    if time.monotonic() - at > _LIST_HOLDS:
        running = pullrpc.transport.running_vms(settings)
        __context__["qvm_remote.running"] = (time.monotonic(), running)
    return vm in running


def _hand(dom0, vm):
    reason = dom0.access.stranger(vm, pullrpc.transport.uuids(dom0.config, vm)[vm])
    if reason:
        raise pullrpc.errors.KeyringError(reason)
    key = dom0.keyring.newest(vm)
    pullrpc.provision.hand_key(dom0.config.for_vm(vm), vm, key)
    dom0.handover.handed(vm, key)


def _hand_if_there(dom0, vm):
    try:
        _hand(dom0, vm)
    except (pullrpc.errors.SessionBroken, pullrpc.errors.TransportError):
        if _still_runs(dom0.config, vm):
            raise
        return False
    return True


def _still_runs(settings, vm):
    """Whether a VM that did not answer runs: it may have been shut down a moment ago."""
    __context__.pop("qvm_remote.running", None)
    return _runs(settings, vm)


def running(vm, config=None):
    """Say whether a VM runs (and isn't paused).

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        bool

    Raises:
        CommandExecutionError: the VMs can't be listed.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.running work
    """
    with _told():
        return _runs(_dom0(config).config, pullrpc.ids.check_vm_name(vm))


def inspect(vm, config=None):
    """Look at the key and the queue in a VM. Nothing is changed, and a VM that is shut down stays so.

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``running`` (bool); ``key``: fits, pending (not handed over yet), lost, altered, or none (dom0 has none);
        ``problems``: what is wrong with folders and key file there (list of words).

    Raises:
        CommandExecutionError: it runs and doesn't answer.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.inspect work
    """
    try:
        pullrpc.ids.check_vm_name(vm)
        dom0 = _dom0(config)
        if not _runs(dom0.config, vm):
            return {"running": False, "key": dom0.handover.known(vm) or "none", "problems": []}
        found = pullrpc.provision.inspect(dom0.config.for_vm(vm), vm)
        seen = dom0.handover.judge(vm, found) if dom0.keyring.exists(vm) else "none"
        return {"running": True, "key": seen, "problems": list(found.problems)}
    except (pullrpc.errors.SessionBroken, pullrpc.errors.TransportError) as err:
        if _still_runs(dom0.config, vm):
            raise CommandExecutionError(f"{vm}: {err}") from None
        return {"running": False, "key": dom0.handover.known(vm) or "none", "problems": []}
    except pullrpc.errors.PullError as err:
        raise CommandExecutionError(f"{vm}: {err}") from None


def hand_over(vm, config=None):
    """Put the queue of a running VM in order, and its key into it.

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``vm``, ``fingerprint``, and ``handed`` (bool, False when the VM doesn't run: it gets its key when it does).

    Raises:
        CommandExecutionError: dom0 has no key for it, or it can't take it.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.hand_over work
    """
    with _told(vm):
        pullrpc.ids.check_vm_name(vm)
        dom0 = _dom0(config)
        handed = _runs(dom0.config, vm) and _hand_if_there(dom0, vm)
        return {"vm": vm, "fingerprint": pullrpc.tokens.fingerprint(dom0.keyring.newest(vm)), "handed": handed}


def remove_queue(vm, history=False, config=None):
    """Remove key and queue from a VM, if it runs.

    Args:
        vm: name of the VM.
        history: remove its history and its own audit log, too.
        config: settings (dict), default: the engine's.

    Returns:
        bool, False when the VM doesn't run and nothing was done.

    Raises:
        CommandExecutionError: they can't be removed.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.remove_queue old
    """
    with _told():
        pullrpc.ids.check_vm_name(vm)
        settings = _dom0(config).config
        if not _runs(settings, vm):
            return False
        pullrpc.provision.remove_queue(settings.for_vm(vm), vm, history)
        return True


def client_installed(template):
    """Say whether this version of the client was installed in a template (or standalone) from here.

    One that has the client as a package is left alone, and not asked again until this formula has another client.

    Args:
        template: its name.

    Returns:
        str: ``installed``, ``package``; empty when it is to be installed.

    Raises:
        CommandExecutionError: there is no such template, or the client's files are not in the file roots.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.client_installed fedora-41
    """
    with _told():
        pullrpc.ids.check_vm_name(template)
        digest, by_package = pullrpc.provision.client_digest(template)
        if digest != _client_archive()[1]:
            return ""
        return "package" if by_package else "installed"


def clients():
    """List the templates that got a client from here, of whatever version, or were found to have it as a package.

    Returns:
        list of str

    Raises:
        CommandExecutionError: the qubes can't be listed.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.clients
    """
    with _told():
        return pullrpc.provision.clients()


def install_client(template, config=None):
    """Install the client in a template (or standalone): dom0 writes it there, nothing is downloaded.

    A template that is shut down is started for it, and shut down again. One that has the client as a package is left alone.

    Args:
        template: its name.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``template``, ``version`` and ``sha256`` of what was installed; ``package``: the version of the template's package instead.

    Raises:
        CommandExecutionError: the template can't be started or written to.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.install_client fedora-41
    """
    with _told():
        pullrpc.ids.check_vm_name(template)
        data, digest = _client_archive()
        package = pullrpc.provision.install_client(_dom0(config).config, template, data, digest)
    shown = {"template": template, "version": pullrpc.__version__}
    return {**shown, "package": package} if package else {**shown, "sha256": digest}


def remove_client(template, config=None):
    """Remove the client from a template (or standalone). A template that is shut down is started for it, and shut down again.

    One that has the client as a package keeps it.

    Args:
        template: its name.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``template``, ``removed`` (bool).

    Raises:
        CommandExecutionError: the template can't be started or written to.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.remove_client fedora-41
    """
    with _told():
        pullrpc.ids.check_vm_name(template)
        removed = pullrpc.provision.remove_client(_dom0(config).config, template, pullrpc.package.CLIENT_PATHS)
    return {"template": template, "removed": removed}


def _client_archive():
    return pullrpc.package.client_archive(_cached_folder("client", "qvm-remote", "the client's"))


def command_installed():
    """Say whether this version of dom0's command ``qvm-remote-dom0`` is installed.

    Returns:
        bool

    Raises:
        CommandExecutionError: its files are not in the file roots.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.command_installed
    """
    with _told():
        return pullrpc.package.command_is_installed(_command_files())


def install_command():
    """Install dom0's command ``qvm-remote-dom0``, in /usr/bin and a folder of its own under /usr/lib.

    Returns:
        list of str, the files.

    Raises:
        CommandExecutionError: a file can't be written.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.install_command
    """
    with _told():
        files = _command_files()
        pullrpc.package.install_command(files)
    return [f"/{target}" for target, _, _ in files]


def command_paths():
    """List what is dom0's command's in dom0, there or not: files and folders.

    Returns:
        list of str

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.command_paths
    """
    return list(pullrpc.package.COMMAND_PATHS)


def _command_files():
    return pullrpc.package.command_files(_cached_folder("dom0", "qvm-remote-dom0", "the command's"))


def _cached_folder(name, launcher, whose):
    """A folder of the file roots as Salt has it in its cache."""
    found = [path for path in __salt__["cp.cache_dir"](f"salt://{name}") or () if path.endswith(f"/{name}/{launcher}")]
    if not found:
        raise pullrpc.errors.PullError(f"{whose} files are not in Salt's file roots (salt://{name})")
    return os.path.dirname(found[0])


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
    with _told():
        dom0 = _dom0(config)
        had_one = dom0.keyring.remove(vm)
        if had_one:
            dom0.audit.write("revoked", vm, sync=True)
    return had_one


def forget(vm, config=None):
    """Revoke a VM's key, and remove all that dom0 keeps of it (finished commands, results not yet fetched) but the audit log.

    No id that the VM made up to now is ever taken again, so that nothing forgotten can be replayed.

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        bool, whether there was anything.

    Raises:
        CommandExecutionError: something can't be removed.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.forget old
    """
    with _told():
        return _dom0(config).access.forget(pullrpc.ids.check_vm_name(vm))


def remembered(vm, config=None):
    """Say how many finished commands of a VM dom0 remembers.

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        int

    Raises:
        CommandExecutionError: the ledger can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.remembered old
    """
    with _told():
        return _dom0(config).remembered(pullrpc.ids.check_vm_name(vm))


def key_age(vm, config=None):
    """Say how old a VM's key is.

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        float, days.

    Raises:
        CommandExecutionError: it has none.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.key_age work
    """
    with _told():
        return (time.time() - _dom0(config).keyring.made_at(pullrpc.ids.check_vm_name(vm))) / 86400


def in_use(settings):
    """Say whether the engine at work has these settings.

    Args:
        settings: dict.

    Returns:
        bool; False, too, when none is at work.

    Raises:
        CommandExecutionError: the settings can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.in_use '{max_age: 300}'
    """
    with _told():
        config = pullrpc.config.make_config(settings)
    return pullrpc.lock.is_held(config.run_dir) and _took_over(config, config)


def _took_over(config, known):
    """Whether the engine that is at work under ``config`` goes by what ``known`` says."""
    return pullrpc.note.read(config).get("settings") == pullrpc.config.digest(known)


def started_as(config=None):
    """Say what the engine at work was started as: the word that stands for its unit, its minion's configuration and its code.

    Args:
        config: settings (dict) that say where it is at work, default: the engine's.

    Returns:
        str; empty when it was not started by the service, None when none is at work.

    Raises:
        CommandExecutionError: the settings can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.started_as
    """
    with _told():
        settings = pullrpc.config.make_config(_settings(config))
    return pullrpc.note.read(settings).get("setup") if pullrpc.lock.is_held(settings.run_dir) else None


def is_safe(vms, config=None):
    """Say whether VMs that got a key now could do no more than they are to. So it is where the engine at work has these settings, or, like
    the one that begins next, knows the same of these VMs or lets them run nothing; and where there is nothing that could begin.

    Args:
        vms: name of a VM, or a list of names.
        config: settings (dict) that are to hold, default: the engine's.

    Returns:
        bool

    Raises:
        CommandExecutionError: the settings can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.is_safe work
    """
    if not config:
        return True
    with _told():
        wanted = _dom0(config).config
        vms = [pullrpc.ids.check_vm_name(vm) for vm in ([vms] if isinstance(vms, str) else vms)]
    is_at_work = pullrpc.lock.is_held(wanted.run_dir)
    if is_at_work and _took_over(wanted, wanted):
        return True
    try:
        given = _given()
        known = _dom0(given or {}).config
    except (CommandExecutionError, pullrpc.errors.PullError):
        return False
    if not is_at_work and given is None:
        return True
    if is_at_work and not _took_over(wanted, known):
        # It has neither, or is just beginning: nobody knows what it lets whom do.
        return False
    return all(_access(known, vm)[0] == pullrpc.policy.NONE or _access(known, vm) == _access(wanted, vm) for vm in vms)


def _given():
    """The settings that an engine, or ``--once``, begins with; None where there are none. The service's are those on the disk: a state of
    this very apply may have written them.
    """
    of_service = pullrpc.config.engine_settings(_service_minion())
    return pullrpc.config.engine_settings(__opts__) if of_service is None else of_service


def _access(settings, vm):
    own = settings.for_vm(vm)
    return own.policy_in_force, own.run_as, own.until, own.accept_v1


def code():
    """Name the code of this formula that Salt has here, to tell it from another version's.

    Returns:
        str, hex: the SHA-256 of all of it.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.code
    """
    with _told():
        return pullrpc.package.code_digest([os.path.dirname(os.path.dirname(os.path.abspath(__file__)))])


def folders(config=None):
    """List the folders in dom0 that the engine writes to: keys, state, what runs, and the audit log's.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        list of str

    Raises:
        CommandExecutionError: the settings can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.folders
    """
    with _told():
        settings = pullrpc.config.make_config(_settings(config))
    return [settings.key_dir, settings.state_dir, settings.run_dir, os.path.dirname(settings.audit_log)]


def leftovers(config=None):
    """List the folders in dom0 that hold something of qvm-remote: keys, ledger, results, what a service left.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        list of str

    Raises:
        CommandExecutionError: the settings can't be used, or a folder can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.leftovers
    """
    with _told():
        return pullrpc.removal.leftovers(_dom0(config).config)


def remove_leftovers(config=None):
    """Remove all that :func:`leftovers` speaks of, keys and ledger included; files that are not ours stay. Stop the service first.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        list of str, the folders that stay because they hold other files.

    Raises:
        CommandExecutionError: an engine is at work, or something can't be removed.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.remove_leftovers
    """
    with _told():
        settings = _dom0(config).config
        if pullrpc.lock.is_held(settings.run_dir):
            raise pullrpc.errors.EngineBusy("an engine is at work; stop it first")
        return pullrpc.removal.remove(settings)


def reload(config=None):
    """Have the engine at work read its settings again; what runs goes on.

    Args:
        config: settings (dict) that say where it is at work, default: the engine's.

    Returns:
        bool, whether it works under the minion's present settings now.

    Raises:
        CommandExecutionError: none is at work, or it takes no new settings.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.reload
    """
    settings = _settings(config)
    with _told():
        if not pullrpc.lock.signal_engine(pullrpc.config.make_config(settings).run_dir, signal.SIGHUP):
            raise pullrpc.errors.PullError("no engine is at work")
    deadline = time.monotonic() + _RELOAD_WAIT
    while not in_use(settings):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def stop(config=None):
    """Have the engine at work finish, or interrupt, what runs, tell its clients, and serve nobody any more.

    Its minion goes on, with the engine idle, until it is stopped, too: this is how the service's unit begins its end.

    Args:
        config: settings (dict) that say where it is at work, default: the engine's.

    Returns:
        bool, False when none was at work.

    Raises:
        CommandExecutionError: what is at work takes no orders, or does not end.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.stop
    """
    with _told():
        settings = pullrpc.config.make_config(_settings(config))
        if not pullrpc.lock.signal_engine(settings.run_dir, signal.SIGUSR1):
            return False
    deadline = time.monotonic() + settings.stop_grace + _STOP_WAIT
    while pullrpc.lock.is_held(settings.run_dir):
        if time.monotonic() > deadline:
            raise CommandExecutionError("the engine does not end")
        time.sleep(0.05)
    return True


def enable(accept_risk=False):
    """Have the service run, now and from each boot on: what pillar says with ``service: {enable: true, accept_risk: true}``.

    Args:
        accept_risk: must be True: every authorized qube may then command dom0 from boot on, before anybody looks.

    Returns:
        dict: ``comment`` and ``changes`` of the state :func:`qvm_remote.service`, and ``next_apply``: what an apply of the present
        pillar does to it.

    Raises:
        CommandExecutionError: the risk is not accepted, nothing was applied yet, or the service can't be had so.

    CLI Example:

    .. code-block:: bash

        qubesctl qvm_remote.enable accept_risk=True
    """
    if accept_risk is not True:
        raise CommandExecutionError("every authorized qube could command dom0 from each boot on, before anybody looks; if that is wanted: accept_risk=True")
    return _have_service(running=True, at_boot=True)


def disable():
    """Stop the service, and have it come back at no boot: what pillar says with ``service: {running: false}``.

    Returns:
        dict, as for :func:`enable`.

    Raises:
        CommandExecutionError: nothing was applied yet, or the service can't be stopped.

    CLI Example:

    .. code-block:: bash

        qubesctl qvm_remote.disable
    """
    return _have_service(running=False, at_boot=False)


def _have_service(running, at_boot):
    minion = _service_minion()
    if not minion:
        raise CommandExecutionError("there is no service yet; write pillar and apply qvm-remote")
    wanted = {
        "running": running,
        "enable": at_boot,
        "accept_risk": at_boot,
        "config_dir": _SERVICE_CONFIG,
        "settings": pullrpc.config.engine_settings(minion) or {},
        "minion": {"id": minion.get("id"), "master": minion.get("master")},
    }
    done = __salt__["state.single"]("qvm_remote.service", name="qvm-remote", **wanted)
    if not isinstance(done, dict):
        raise CommandExecutionError(f"Salt is at work on something else: {'; '.join(map(str, done))}")
    ret = next(iter(done.values()))
    if not ret["result"]:
        raise CommandExecutionError(ret["comment"])
    return {"comment": ret["comment"], "changes": ret["changes"], "next_apply": _next_apply(running, at_boot)}


def _next_apply(running, at_boot):
    """What becomes of the service's present state when the present pillar is applied."""
    planned = plan()
    if "problem" in planned:
        return f"{planned['problem']}; until that is mended, no apply changes anything"
    service = planned["service"]
    if (service["running"], service["enable"]) == (running, at_boot):
        return "pillar says the same: the next apply leaves it so"
    wanted = "{enable: true, accept_risk: true}" if at_boot else "{running: false}"
    then = "runs" if service["running"] else "is stopped"
    boot = "and starts at each boot" if service["enable"] else "and does not start at boot"
    return f"pillar says otherwise: with the next apply it {then} {boot}; to keep it, write into pillar, under {_PILLAR}: service: {wanted}"


def doctor():
    """Examine the whole installation in dom0. Nothing is changed.

    Returns:
        list of dict: ``part`` (what was looked at), ``level`` (ok, note or problem), ``text`` (one sentence), ``mend`` (what to type
        or write; empty where nothing is to be done). With a problem, salt-call exits with an error under ``--retcode-passthrough``.

    Raises:
        CommandExecutionError: the service's configuration can't be read.

    CLI Example:

    .. code-block:: bash

        qubesctl qvm_remote.doctor
    """
    minion = _service_minion()
    found = pullrpc.doctor.examine(minion, _SERVICE_CONFIG)
    if minion:
        # Without a service it is said already how to begin.
        found += _doctor_of_pillar(plan())
    if any(finding["level"] == pullrpc.doctor.PROBLEM for finding in found):
        __context__["retcode"] = 1
    return found


def _doctor_of_pillar(planned):
    """What an apply would say of pillar; the command qvm-remote-dom0 knows no pillar, and can't."""
    told = {"part": "pillar", "mend": ""}
    if "problem" in planned:
        return [{**told, "level": pullrpc.doctor.PROBLEM, "text": planned["problem"]}]
    notes = [{**told, "level": pullrpc.doctor.NOTE, "text": text} for text in planned["notes"]]
    return notes or [{**told, "level": pullrpc.doctor.OK, "text": "it can be applied"}]


def rehearse(config=None):
    """Without an engine: say what would be run if the queues of all running, authorized VMs were served now. Nothing is taken or run.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        dict of VM name to a dict, as :func:`pullrpc.rehearsal.rehearse` gives it: ``problem``, or ``commands``.

    Raises:
        CommandExecutionError: an engine is at work, or the keys or the running VMs can't be listed.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.rehearse
    """
    with _told():
        return pullrpc.rehearsal.rehearse(_dom0_in_force(config))


def keys(config=None, vm=None):
    """List the VMs that have a key.

    Args:
        config: settings (dict), default: the engine's.
        vm: name of a VM, to look at its key alone.

    Returns:
        dict of VM name to a dict: ``fingerprint``, or ``problem`` when the key is there and refused; ``next``: that of a new
        key which waits to be handed over. Never a key.

    Raises:
        CommandExecutionError: the key folder can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.keys
    """
    with _told():
        return _dom0(config).keyring.fingerprints(vm)


def status(config=None):
    """Show whether an engine is at work, how each VM is served, and how many commands that are not delivered yet are in which state.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``version``, ``engine`` (running or stopped), ``sessions`` (VM name to agent, agentless, connecting, waiting,
        stranger: another qube than the one that has access under this name), ``asking`` (VM, id and time of the question that
        dom0's user sees now, or None), ``ledger`` (``sound`` as far as that shows without looking at all of it, or what is wrong;
        see :func:`ledger_check`), ``commands`` (state to count, of those not delivered yet; empty when the ledger can't be read),
        ``keys`` as :func:`keys` gives them, with ``in_vm``: what was last seen of the key there (fits, pending, lost, altered), and
        ``access``: what that VM may have run; ``vms``: VM name to its session and figures, as :func:`pullrpc.overview.overview`
        gives them, and ``recent``: since when these figures are.

    Raises:
        CommandExecutionError: the settings, the keys or the audit log can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.status
    """
    with _told():
        return pullrpc.overview.overview(_dom0(config))


def ledger_check(set_aside=False, config=None):
    """Look at all of the ledger, which knows what has run. While it is damaged nothing runs: it may have forgotten a command.

    Mend a disk that is full or can't be read first. Then a copy of the file from before the damage is no help: it does not know what
    ran since. What helps is to stop the service, to set the damaged one aside (``set_aside=True``), and to start the service: the new
    ledger takes no id from before it was made, so that nothing can be replayed. Clients that wait are told what is known of their
    commands, and have to send again what was interrupted.

    Args:
        set_aside: if the ledger is damaged, put it away beside its place, under another name, and begin a new one.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``ledger`` (its path), ``problems`` (sentences; with any, salt-call exits with an error under
        ``--retcode-passthrough``), ``commands`` (state to count), ``next`` (what to type), ``set_aside`` (where the damaged one is
        now, once that was done).

    Raises:
        CommandExecutionError: the settings can't be used; or it was to be set aside, and is sound, or an engine is at work.

    CLI Example:

    .. code-block:: bash

        salt-call --local --retcode-passthrough -c /etc/qubes/remote qvm_remote.ledger_check
        salt-call --local -c /etc/qubes/remote qvm_remote.ledger_check set_aside=True
    """
    with _told():
        dom0 = _dom0(config)
        found = pullrpc.ledger_report.look(dom0)
        if set_aside:
            if not found["problems"]:
                raise pullrpc.errors.LedgerError("the ledger is sound, and stays where it is")
            with pullrpc.lock.EngineLock(dom0.config.run_dir):
                aside = dom0.renew_ledger()
            found = {**pullrpc.ledger_report.look(dom0), "set_aside": aside}
    if found["problems"]:
        __context__["retcode"] = 1
    return found


def audit_verify(config=None):
    """Look for whatever was removed, changed, added or moved in dom0's audit log, in files that were rotated away as well.

    The log has no key: it is found what was done to a part of it. Whoever is root in dom0 could make all of it anew; the copy in
    the system's log, where each line comes with its SHA-256, or one elsewhere, tells that, too.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``files`` (names, oldest first), ``lines``, ``first`` and ``last`` (their numbers), ``commands`` (whole commands that
        fit their digests in the log), ``problems`` (sentences; with any, salt-call exits with an error under
        ``--retcode-passthrough``), ``notes`` (sentences on what a crash or power cut did).

    Raises:
        CommandExecutionError: the log can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local --retcode-passthrough -c /etc/qubes/remote qvm_remote.audit_verify
    """
    with _told():
        settings = pullrpc.config.make_config(_settings(config))
        found = pullrpc.audit_read.verify(settings.audit_log, settings.audit_files)
    if found["problems"]:
        __context__["retcode"] = 1
    return found


def audit(vm=None, since=None, until=None, what=None, limit=100, config=None):
    """List lines of dom0's audit log, the newest ones that fit.

    Args:
        vm: name of a VM (default: all).
        since, until: times, like ``2026-11-24``, ``2026-11-24T18:00:00Z`` (UTC without a zone), or ``15m``, ``2h``, ``7d`` for so
            long ago.
        what: what happened: ``accepted``, ``run``, ``ended``, ``delivered``, ``refused``, ``authorized``, ``revoked``, ...
        limit: most lines.
        config: settings (dict), default: the engine's.

    Returns:
        list of dict, oldest first.

    Raises:
        CommandExecutionError: an argument can't be, or the log can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.audit vm=work since=2h
    """
    with _told():
        return pullrpc.audit_read.query(pullrpc.config.make_config(_settings(config)).audit_log, vm, since, until, what, limit)


def history(vm=None, since=None, outcome=None, limit=20, config=None, until=None):
    """List the commands that dom0's audit log knows, one row for each, the newest ones that fit.

    Args:
        vm: name of a VM (default: all).
        since, until: times, as for :func:`audit`.
        outcome: ``done``, ``timeout``, ``cancelled``, ``interrupted``, ``failed``, ``refused``, ``accepted`` (it waits), ``running``, or an
            exit code.
        limit: most rows.
        config: settings (dict), default: the engine's.

    Returns:
        list of dict, oldest first: ``time``, ``vm``, ``id``, ``outcome``, and what is known of ``command`` (its beginning), ``size``,
        ``sha256``, ``by`` (who decided), ``exit``, ``seconds``, ``out``, ``err`` (bytes), ``code`` and ``reason`` (of a refusal).

    Raises:
        CommandExecutionError: an argument can't be, or the log can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.history work outcome=timeout
    """
    with _told():
        return pullrpc.audit_read.history(pullrpc.config.make_config(_settings(config)).audit_log, vm, since, until, outcome, limit)


def audit_files(config=None):
    """List all that there is of dom0's audit log: files, rotated ones, and what lies beside them.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        list of str

    Raises:
        CommandExecutionError: the settings can't be used, or the folder can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.audit_files
    """
    with _told():
        return pullrpc.audit_files.belongings(pullrpc.config.make_config(_settings(config)).audit_log)


def logrotate_config(config=None):
    """Make the configuration by which logrotate rotates dom0's audit log.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        str

    Raises:
        CommandExecutionError: the settings can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local -c /etc/qubes/remote qvm_remote.logrotate_config
    """
    with _told():
        settings = pullrpc.config.make_config(_settings(config))
    return pullrpc.audit_files.logrotate_config(settings.audit_log, settings.audit_files)


def run_once(config=None):
    """Without an engine: serve what lies in the queues of all running, authorized VMs now, then return.

    Args:
        config: settings (dict), default: the engine's.

    Returns:
        dict of VM name to ``served``, ``served in part: ...`` or the reason why not.

    Raises:
        CommandExecutionError: an engine is at work, or the settings or the ledger can't be used.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.run_once
    """
    settings = _applied(config)
    with _told():
        service = pullrpc.service.Service(
            pullrpc.dom0.shared(settings),
            verify=lambda vm, cid, command, token: verify(vm, cid, command, token, config=settings),
            execute=lambda vm, cid: execute(vm, cid, config=settings),
            emit=lambda *_: None,
            log=log.warning,
        )
        return service.run_once()


def ping(vm, config=None):
    """Open a session to a running VM and end it: is qvm-remote installed there, and does it answer?

    Args:
        vm: name of the VM.
        config: settings (dict), default: the engine's.

    Returns:
        dict: ``vm``, ``milliseconds`` (from dom0's call to the agent's answer), and ``version`` of qvm-remote, as the agent says.

    Raises:
        CommandExecutionError: it doesn't run, has no agent, or doesn't answer.

    CLI Example:

    .. code-block:: bash

        salt-call --local qvm_remote.ping work
    """
    with _told(vm):
        pullrpc.ids.check_vm_name(vm)
        waited, version = pullrpc.provision.ping(_dom0(config).config.for_vm(vm), vm)
    return {"vm": vm, "milliseconds": round(waited * 1000), "version": version}
