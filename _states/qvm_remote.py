# SPDX-License-Identifier: GPL-2.0-or-later
"""States of qvm-remote, for dom0: the service and its configuration, the client in templates, keys and queues of VMs.

They report fingerprints, never keys, and change nothing that is already as it should be. No VM that is served is ever
started: what one that is shut down needs is kept ready for it, and the comment says so.
"""

import hashlib
import os
import time

import salt.utils.atomicfile
import salt.utils.files
import salt.utils.yaml
from salt.exceptions import CommandExecutionError

__virtualname__ = "qvm_remote"
_UNIT = "qvm-remote.service"
#: Where a unit lies that is gone after a reboot, and one that isn't (systemd.unit(5)).
_TRANSIENT, _PERSISTENT = "/run/systemd/system", "/etc/systemd/system"
_UNIT_SOURCE = f"salt://qvm-remote/files/{_UNIT}"
#: What the service's minion keeps in dom0, besides what the engine's settings name.
_CACHE, _PKI, _LOG, _MINION_RUN = "/var/cache/qvm-remote", "/var/lib/qvm-remote/pki", "/var/log/qvm-remote/minion.log", "/run/qvm-remote/minion"
#: What logrotate is to do with the audit log.
_LOGROTATE = "/etc/logrotate.d/qvm-remote"
#: States of a unit that does not run and is not about to (systemctl(1)): a start that goes on has to be stopped, too.
_AT_REST = ("inactive", "failed")
#: How long the service may take from its start to its work, seconds.
_START_WAIT = 90
#: What brings all of dom0 where pillar says.
_ALL = "sudo qubesctl state.apply qvm-remote"


def __virtual__():
    return __virtualname__


class _Failed(Exception):
    """The state can't be reached; the text is its comment."""


def _state(name, work):
    """Run a state: ``work`` fills the return it is given; what goes wrong becomes its comment."""
    ret = {"name": name, "changes": {}, "result": True, "comment": ""}
    try:
        work(ret)
    except (CommandExecutionError, _Failed, OSError) as err:
        # What was changed before it failed stays in the report.
        ret.update(result=False, comment=_and(ret["comment"], str(err)))
    return ret


def _change(ret, key, old, new, would, do, done):
    """Note a change, and make it unless this is a test run.

    Returns:
        what ``do`` gave; None in a test run.
    """
    ret["comment"] = _and(ret["comment"], would if __opts__["test"] else "")
    if __opts__["test"]:
        ret["changes"][key] = {"old": old, "new": new}
        ret["result"] = None
        return None
    result = do()
    ret["changes"][key] = {"old": old, "new": new}
    ret["comment"] = _and(ret["comment"], done)
    return result


def _and(comment, more):
    return f"{comment}; {more}" if comment and more else comment or more


def engine_configured(name, settings=None, minion=None):
    """Keep the configuration of the minion that runs the engine, with its own cache, sockets and log.

    Args:
        name: its configuration folder, for example ``/etc/qubes/remote``.
        settings: the engine's settings (dict), as pillar.example describes them.
        minion: dict: ``id`` of that minion (default: this one's), ``master`` if it is to have one (default: masterless).

    .. code-block:: yaml

        qvm-remote-dom0-config:
          qvm_remote.engine_configured:
            - name: /etc/qubes/remote
            - settings:
                timeout_max: 300
    """

    def work(ret):
        wanted = _minion_config(dict(settings or {}), minion or {})
        # A setting that can't be used fails here, before anything is written.
        __salt__["qvm_remote.folders"](config=wanted["engines"][0]["qvm_remote"])
        path = os.path.join(name, "minion")
        text = salt.utils.yaml.safe_dump(wanted, default_flow_style=False)
        before = _read(path)
        if before == text:
            ret["comment"] = ret["comment"] or "The engine is configured as it should be"
            return
        old = None if before is None else _differences(before, wanted)
        new = "written" if before is None else {part: wanted.get(part) for part in old}
        _change(ret, path, old, new, "the engine would be configured", lambda: _write(name, path, text), "the engine was configured")

    return _state(name, work)


def _differences(text, wanted):
    """The parts of the configuration that change, as they were. It never holds a key."""
    was = _parsed(text)
    if was is None:
        return {"all": "not readable"}
    return {part: was.get(part) for part in {**was, **wanted} if was.get(part) != wanted.get(part)}


def _parsed(text):
    """A minion's configuration (dict); None when it is none."""
    try:
        config = salt.utils.yaml.safe_load(text)
    except salt.utils.yaml.YAMLError:
        return None
    return config if isinstance(config, dict) else None


def _minion_config(settings, minion):
    config = {
        "id": minion.get("id") or __opts__["id"],
        "file_client": "local",
        "file_roots": __opts__["file_roots"],
        "pillar_roots": __opts__["pillar_roots"],
        "user": "root",
        "cachedir": _CACHE,
        # Its default does not follow cachedir.
        "extension_modules": f"{_CACHE}/extmods",
        "pki_dir": _PKI,
        "sock_dir": _MINION_RUN,
        "pidfile": f"{_MINION_RUN}/minion.pid",
        "log_file": _LOG,
        # Each of Salt's programs would look these up when it starts: names in a DNS that dom0 has not, and all of PCI.
        "enable_fqdns_grains": False,
        "enable_lspci": False,
        "engines": [{"qvm_remote": settings}],
    }
    if minion.get("master"):
        return {**config, "master": minion["master"]}
    return {**config, "master_type": "disable"}


def _write(folder, path, text):
    os.makedirs(folder, mode=0o700, exist_ok=True)
    # By rename: a minion that starts at this moment sees the old configuration or the new one.
    with salt.utils.atomicfile.atomic_open(path, "w") as file:
        file.write(text)
    os.chmod(path, 0o600)


def _read(path):
    try:
        with salt.utils.files.fopen(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def service(name="qvm-remote", running=True, enable=False, accept_risk=False, config_dir="/etc/qubes/remote", settings=None, minion=None):
    """Have the service running, now. After a reboot it is gone, unless ``enable`` and ``accept_risk`` say that it shall come back.

    A service that runs under other settings takes the present ones over without losing a command. It is restarted where that
    can't be: when its unit, its minion's own configuration or the formula's code have changed. A command that then runs for
    longer than ``stop_grace`` is interrupted, and its client told so.

    Args:
        name: not used but as the state's name: there is one service.
        running: whether it is to run.
        enable: whether it is to start at each boot.
        accept_risk: with ``enable``: yes, every authorized qube may command dom0 from boot on, before anybody looks.
        config_dir: the folder that ``engine_configured`` keeps.
        settings: the engine's settings (dict).
        minion: as for ``engine_configured``: one with a master needs the network.

    .. code-block:: yaml

        qvm-remote-dom0-service:
          qvm_remote.service:
            - running: true
            - require:
              - qvm_remote: qvm-remote-dom0-config
    """

    def work(ret):
        if enable and not accept_risk:
            raise _Failed("enable: true lets every authorized qube command dom0 from each boot on; say accept_risk: true with it")
        text, setup = _unit_text(config_dir, settings or {}, minion or {})
        folder = _PERSISTENT if enable else _TRANSIENT
        state = _unit_state()
        _have_unit(ret, folder, text)
        if enable and not _systemctl("is-enabled", _UNIT):
            _change(ret, "enabled", False, True, "it would be enabled", lambda: _must("systemctl", "enable", _UNIT), "it was enabled")
        if running and state not in ("active", "reloading"):
            _change(ret, "running", False, True, "it would be started", lambda: _start(settings or {}, setup), "it was started")
        elif not running and state not in _AT_REST:
            _change(ret, "running", True, False, "it would be stopped", lambda: _must("systemctl", "stop", _UNIT), "it was stopped")
        elif running and __salt__["qvm_remote.started_as"](config=settings or {}) != setup:
            _change(ret, "setup", "another", "the present one", "it would be restarted", lambda: _run_unit("restart", settings or {}, setup), "it was restarted")
        elif running and not __salt__["qvm_remote.in_use"](settings or {}):
            take = ("it would take the new settings over", lambda: _reload(settings or {}, setup), "the service took the new settings over")
            _change(ret, "settings", "others", "the present ones", *take)
        ret["comment"] = ret["comment"] or "The service is as it should be"

    return _state(name, work)


def _unit_text(config_dir, settings, minion):
    """The unit, and the word in its environment by which a running engine tells that it was started under this one, with this
    configuration of its minion and this code.
    """
    text = __salt__["cp.get_file_str"](_UNIT_SOURCE)
    if not text:
        raise _Failed(f"{_UNIT_SOURCE} is not in Salt's file roots")
    folders = __salt__["qvm_remote.folders"](config=settings)
    # Made before the engine starts: what is not there by then would not be opened to it (systemd.exec(5), ReadWritePaths). The
    # dash is for the making itself: even a command with full rights gets these paths.
    text = text.replace("ExecStartPre=", f"ExecStartPre=+/usr/bin/mkdir -p -m 0700 {' '.join(folders)}\nExecStartPre=", 1)
    writable = f"ReadWritePaths={' '.join('-' + folder for folder in folders)}\n"
    if minion.get("master"):
        text = text.replace("IPAddressDeny=any\n", "")
    text = text.replace("=/etc/qubes/remote ", f"={config_dir} ").replace("=/etc/qubes/remote\n", f"={config_dir}\n")
    started_with = salt.utils.yaml.safe_dump({**_minion_config({}, minion), "code": __salt__["qvm_remote.code"]()})
    setup = hashlib.sha256((text + writable + started_with).encode("utf-8")).hexdigest()[:16]
    return text.replace("\n[Install]\n", f"{writable}Environment=QVM_REMOTE_SETUP={setup}\n\n[Install]\n"), setup


def _have_unit(ret, folder, text):
    path = os.path.join(folder, _UNIT)
    if _read(path) != text:
        old = None if _read(path) is None else "another"
        _change(ret, path, old, "written", "the unit would be written", lambda: _write_unit(folder, text), "the unit was written")
    other = os.path.join(_TRANSIENT if folder == _PERSISTENT else _PERSISTENT, _UNIT)
    if _read(other) is not None:
        _change(ret, other, "there", None, "the other unit would be removed", lambda: _remove_unit(other), "the other unit was removed")


def _write_unit(folder, text):
    os.makedirs(folder, mode=0o755, exist_ok=True)
    _write_public(os.path.join(folder, _UNIT), text)
    _must("systemctl", "daemon-reload")


def _write_public(path, text):
    with salt.utils.atomicfile.atomic_open(path, "w") as file:
        file.write(text)
    os.chmod(path, 0o644)


def _remove_unit(path):
    if path.startswith(_PERSISTENT) and _systemctl("is-enabled", _UNIT):
        _must("systemctl", "disable", _UNIT)
    os.unlink(path)
    _must("systemctl", "daemon-reload")


def _start(settings, setup):
    # After too many failures systemd refuses to start it; whoever applies the state has mended what was wrong.
    _systemctl("reset-failed", _UNIT)
    _run_unit("start", settings, setup)


def _run_unit(verb, settings, setup):
    # Once more: an apply that was killed may have written the unit, and not have told systemd.
    _must("systemctl", "daemon-reload")
    _must("systemctl", verb, _UNIT)
    deadline = time.monotonic() + _START_WAIT
    while not (__salt__["qvm_remote.in_use"](settings) and __salt__["qvm_remote.started_as"](config=settings) == setup):
        if time.monotonic() > deadline:
            raise _Failed(f"the service was started, but serves nobody after {_START_WAIT} s; see {_LOG}")
        time.sleep(0.2)


def _reload(settings, setup):
    # It fails for settings that hold from the service's start on; those restart it.
    _systemctl("reload", _UNIT)
    if not __salt__["qvm_remote.in_use"](settings):
        _run_unit("restart", settings, setup)


def _unit_state():
    shown = __salt__["cmd.run_stdout"](["systemctl", "show", "--property=ActiveState", _UNIT], python_shell=False, ignore_retcode=True)
    return shown.strip().partition("=")[2] or "inactive"


def _systemctl(*words):
    return __salt__["cmd.retcode"](["systemctl", *words], python_shell=False, ignore_retcode=True) == 0


def _must(*words):
    done = __salt__["cmd.run_all"](list(words), python_shell=False)
    if done["retcode"]:
        said = (done["stderr"] or done["stdout"]).strip().splitlines()
        raise _Failed(f"{' '.join(words)} failed: {said[-1] if said else 'it said nothing'}")


def audit_rotated(name, path="/etc/logrotate.d/qvm-remote", settings=None):
    """Have logrotate rotate the audit log, each week; ``audit_files`` in the settings says how many old files stay.

    Args:
        name: any text.
        path: the file of logrotate's configuration.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-dom0-logrotate:
          qvm_remote.audit_rotated: []
    """

    def work(ret):
        text = __salt__["qvm_remote.logrotate_config"](config=settings or {})
        if not os.path.isdir(os.path.dirname(path)):
            ret["comment"] = f"There is no {os.path.dirname(path)}: without logrotate the audit log grows on"
        elif _read(path) != text:
            old = None if _read(path) is None else "another"
            _change(ret, path, old, "written", "it would be configured", lambda: _write_public(path, text), "it was configured")
        ret["comment"] = ret["comment"] or "The audit log is rotated as it should be"

    return _state(name, work)


def command_installed(name):
    """Have this version of the command ``qvm-remote-dom0`` in dom0.

    Args:
        name: any text.

    .. code-block:: yaml

        qvm-remote-dom0-command:
          qvm_remote.command_installed: []
    """

    def work(ret):
        if __salt__["qvm_remote.command_installed"]():
            ret["comment"] = "The command qvm-remote-dom0 is installed"
            return
        path = __salt__["qvm_remote.command_paths"]()[0]
        old = "another" if os.path.lexists(path) else None
        _change(ret, path, old, "installed", f"{path} would be installed", __salt__["qvm_remote.install_command"], f"{path} was installed")

    return _state(name, work)


def client_installed(name, settings=None):
    """Have this version of the client in a template or standalone, unless it has the client as a package, which is left alone.

    Args:
        name: the template.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-client-fedora-41:
          qvm_remote.client_installed:
            - name: fedora-41
    """

    def work(ret):
        known = __salt__["qvm_remote.client_installed"](name)
        if known:
            ret["comment"] = f"The client is installed in {name}" if known == "installed" else f"{name} has the client as a package, which is left alone"
            return
        installed = _change(
            ret,
            name,
            None,
            "client installed",
            f"The client would be installed in {name}",
            lambda: __salt__["qvm_remote.install_client"](name, config=settings or {}),
            f"The client was installed in {name}; restart the VMs that are based on it",
        )
        if installed and "package" in installed:
            del ret["changes"][name]
            ret["comment"] = f"{name} has the client as a package, version {installed['package']}, which is left alone"
            if installed["package"] != installed["version"]:
                ret["comment"] += f"; this formula is version {installed['version']}: have both the same"

    return _state(name, work)


def clients_absent(name, settings=None):
    """Have the client in no template that got it from here. A package of a template's own stays.

    Args:
        name: any text.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-clean-clients:
          qvm_remote.clients_absent: []
    """

    def work(ret):
        for template in __salt__["qvm_remote.clients"]():
            said = ret["comment"]
            done = _change(
                ret,
                template,
                "client installed",
                None,
                f"it would be removed from {template}",
                lambda template=template: __salt__["qvm_remote.remove_client"](template, config=settings or {}),
                f"it was removed from {template}",
            )
            if done and not done["removed"]:
                del ret["changes"][template]
                ret["comment"] = _and(said, f"{template} has the client as a package, which stays: remove it there")
        ret["comment"] = ret["comment"] or "No template has the client"

    return _state(name, work)


def key_present(name, key="own", settings=None):
    """Have a key for a VM in dom0.

    Args:
        name: the VM.
        key: ``own``: the one that the VM made itself, fetched from there if dom0 has none (the VM must run then);
            ``generate``: one that dom0 makes if it has none; ``given``: the one in pillar under ``qvm-remote:vms:NAME:key``, which
            replaces another as a rotation does. The key itself is never an argument.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-key-work:
          qvm_remote.key_present:
            - name: work
            - key: generate
    """
    return _state(name, lambda ret: _have_key(ret, name, key, settings or {}))


def _have_key(ret, vm, key, settings):
    known = __salt__["qvm_remote.keys"](config=settings, vm=vm).get(vm, {})
    if "problem" in known:
        raise _Failed(known["problem"])
    shown = known.get("next") or known.get("fingerprint")
    identity = __salt__["qvm_remote.identity"](vm, config=settings)
    if not identity["now"]:
        # Whoever gets this name later is not the one that is meant.
        had = f"; it has a key: qvm-remote-dom0 revoke {vm}" if shown else ""
        raise _Failed(f"there is no qube {vm}; mend its name in pillar (vms: {vm}), or remove it there if the qube was removed{had}")
    if shown and not identity["fits"]:
        _have_key_anew(ret, vm, key, shown, settings)
        return
    if shown and not identity["bound"]:
        # Stored before there was such a qube, it is for the first one that is seen: this one.
        would, done = f"the key of {vm} would be for this qube alone", f"the key of {vm} is for this qube alone now"
        _change(ret, "bound", None, identity["now"], would, lambda: __salt__["qvm_remote.bind"](vm, config=settings), done)
    wanted = __salt__["qvm_remote.given_fingerprint"](vm) if key == "given" else shown
    # A key of the qube's own that was changed there is fetched again; dom0's copy of it must not go back.
    changed_there = key == "own" and shown and __salt__["qvm_remote.inspect"](vm, config=settings)["key"] == "altered"
    if shown and shown == wanted and not changed_there:
        ret["comment"] = _and(ret["comment"], f"{vm} is authorized with key {shown}")
        return
    new = "a new key" if changed_there or not wanted else wanted
    if not shown:
        _must_be_safe(vm, settings)
    stored = _change(ret, "key", shown, new, f"{vm} would be authorized", lambda: _store_key(vm, key, shown, settings), f"{vm} was authorized")
    if stored:
        ret["changes"]["key"]["new"] = stored.get("fingerprint") or stored["new"]


def _must_be_safe(vm, settings):
    """A key must not let a VM do more than it is to. A test run may be one of all of it, in which the service would know by then."""
    if not __opts__["test"] and not __salt__["qvm_remote.is_safe"](vm, config=settings):
        raise _Failed(f"the service does not know yet what {vm} may do: apply all of it ({_ALL})")


def _have_key_anew(ret, vm, key, shown, settings):
    """The qube of this name is not the one that the key was for: neither that key nor what waits for that one is for it."""
    if key == "given" and __salt__["qvm_remote.given_fingerprint"](vm) == shown:
        raise _Failed(
            f"{vm} is another qube than the one that pillar's key was given to; give it a key of its own there, or say that it is the same: qvm_remote.bind {vm}"
        )
    # First, and in any case: what the service lets that one do, it may let this one do.
    _change(
        ret,
        "key",
        shown,
        None,
        f"{vm} is another qube than the one that had access under this name, which would lose it",
        lambda: __salt__["qvm_remote.forget"](vm, config=settings),
        f"{vm} is another qube than the one that had access under this name, which lost it",
    )
    _must_be_safe(vm, settings)
    would, done = "this one would get access of its own", "this one got access of its own"
    stored = _change(ret, "key", shown, "a new key", would, lambda: _store_key(vm, key, None, settings), done)
    if stored:
        ret["changes"]["key"]["new"] = stored["fingerprint"]


def _store_key(vm, key, shown, settings):
    if key == "generate":
        return __salt__["qvm_remote.generate"](vm, config=settings)
    if key == "own":
        return __salt__["qvm_remote.authorize"](vm, from_vm=True, config=settings)
    if shown:
        return __salt__["qvm_remote.rotate"](vm, from_pillar=True, config=settings)
    return __salt__["qvm_remote.authorize"](vm, from_pillar=True, config=settings)


def key_rotated(name, days, settings=None):
    """Have a key for a VM that is not older than some days, as far as dom0's clock tells. The one before works until the VM has used
    the new one.

    Args:
        name: the VM, which must have a key.
        days: int, how old the key may be; 0 for a new one now.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-key-work-rotated:
          qvm_remote.key_rotated:
            - name: work
            - days: 90
    """
    return _state(name, lambda ret: _have_fresh_key(ret, name, days, settings or {}))


def _have_fresh_key(ret, vm, days, settings):
    age = __salt__["qvm_remote.key_age"](vm, config=settings)
    # Less than nothing: the clock was set back since, and how old the key is nobody knows.
    if days > 0 and 0 <= age <= days:
        ret["comment"] = _and(ret["comment"], f"the key of {vm} is {age:.0f} days old")
        return
    known = __salt__["qvm_remote.keys"](config=settings, vm=vm)[vm]
    waits = known.get("next")
    rotated = None if __opts__["test"] else __salt__["qvm_remote.rotate"](vm, config=settings)
    if waits and (rotated is None or rotated["new"] == waits):
        # One that waits is not replaced, since the VM may have it.
        ret["comment"] = _and(ret["comment"], f"{vm} has not used its new key {waits} yet")
    else:
        new = rotated["new"] if rotated else "a new key"
        _change(ret, "key", known.get("fingerprint"), new, f"the key of {vm} would be rotated", lambda: rotated, f"the key of {vm} was rotated")
    if rotated:
        if "problem" in rotated:
            raise _Failed(rotated["problem"])
        if not rotated["handed"]:
            ret["comment"] = _and(ret["comment"], _WAITS)


_WAITS = "it is shut down and gets its key when it runs next"


def queue_present(name, settings=None):
    """Have the queue in a VM in order, and its key there: folders 0700, key 0600, all of them the user's, no symbolic link.

    A VM that is shut down is left so; its key waits for it in dom0, and the engine hands it over when it runs.

    Args:
        name: the VM, which must have a key in dom0.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-queue-work:
          qvm_remote.queue_present:
            - name: work
    """
    return _state(name, lambda ret: _have_queue(ret, name, settings or {}))


def _have_queue(ret, vm, settings, policy=None):
    seen = __salt__["qvm_remote.inspect"](vm, config=settings)
    if policy == "own" and (seen["key"] == "none" or ret["changes"].get("key")):
        # A test run: the key that would be fetched is the one that is there.
        seen["key"] = "fits"
    if seen["key"] == "none" and not ret["changes"].get("key"):
        raise _Failed(f"dom0 has no key for {vm}")
    if not seen["running"]:
        ret["comment"] = _and(ret["comment"], _WAITS if seen["key"] != "fits" else "")
        return
    if seen["key"] == "fits" and not seen["problems"]:
        ret["comment"] = _and(ret["comment"], f"{vm} has its key and its queue")
        return
    was = {"key": seen["key"] if seen["key"] != "none" else "pending", "problems": seen["problems"]}
    given = _change(
        ret,
        "queue",
        was,
        {"key": "fits", "problems": []},
        f"{vm} would get its key",
        lambda: __salt__["qvm_remote.hand_over"](vm, config=settings),
        f"{vm} got its key",
    )
    if given and not given["handed"]:
        # It was shut down in this moment.
        del ret["changes"]["queue"]
        ret["comment"] = _WAITS
    elif given:
        left = __salt__["qvm_remote.inspect"](vm, config=settings)
        if left["key"] != "fits" or left["problems"]:
            raise _Failed(f"and still: {', '.join([left['key'], *left['problems']])}")


def authorized(name, key="generate", rotate_days=None, settings=None):
    """Have a VM that may ask dom0: a key in dom0, not too old, and the queue and the same key in the VM.

    Args:
        name: the VM.
        key: as for ``key_present``.
        rotate_days: as ``days`` for ``key_rotated``; not rotated by default.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-vm-work:
          qvm_remote.authorized:
            - name: work
            - key: generate
    """

    def work(ret):
        _have_key(ret, name, key, settings or {})
        if rotate_days and not ret["changes"]:
            _have_fresh_key(ret, name, rotate_days, settings or {})
        _have_queue(ret, name, settings or {}, key)
        ret["comment"] = _and(ret["comment"], f"it {_may(name, settings or {})}")

    return _state(name, work)


def _may(vm, settings):
    """What a VM may have run; and whether that is not so yet."""
    may = __salt__["qvm_remote.access"](vm, config=settings)
    return may if __salt__["qvm_remote.is_safe"](vm, config=settings) else f"{may}, once the service knows that ({_ALL})"


def key_absent(name, settings=None):
    """Have no key for a VM, and nothing kept of it but the audit log: everything it asks for is refused.

    Args:
        name: the VM.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-key-old:
          qvm_remote.key_absent:
            - name: old
    """

    def work(ret):
        known = __salt__["qvm_remote.keys"](config=settings or {}, vm=name).get(name)
        count = __salt__["qvm_remote.remembered"](name, config=settings or {})
        if known is None and not count:
            ret["comment"] = f"{name} is not authorized"
            return
        _change(
            ret,
            name,
            (known or {}).get("fingerprint", "no key that could be used"),
            None,
            f"{name} would lose its key, and dom0 forget its {count} commands",
            lambda: __salt__["qvm_remote.forget"](name, config=settings or {}),
            f"{name} lost its key, and dom0 forgot its {count} commands",
        )

    return _state(name, work)


def unlisted(name, listed, remove=False, settings=None):
    """Say which VMs have a key though the pillar does not name them, and what they may do, or take it from them.

    Args:
        name: any text.
        listed: list of the VMs that may have one.
        remove: whether the others lose theirs.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-unlisted:
          qvm_remote.unlisted:
            - listed: [work, dev]
    """

    def work(ret):
        others = sorted(set(__salt__["qvm_remote.keys"](config=settings or {})) - set(listed))
        if not others:
            ret["comment"] = "No VM but those in pillar has a key"
            return
        if not remove:
            told = "; ".join(f"{vm} {_may(vm, settings or {})}" for vm in others)
            ret["comment"] = f"These have a key too, and keep it (pillar qvm-remote:unlisted: absent takes it from them): {told}"
            return
        for vm in others:
            _change(
                ret,
                vm,
                "a key",
                None,
                f"{vm} would lose its key",
                lambda vm=vm: __salt__["qvm_remote.forget"](vm, config=settings or {}),
                f"{vm} lost its key",
            )

    return _state(name, work)


def absent(name, config_dir="/etc/qubes/remote", logs=False, settings=None):
    """Have nothing of qvm-remote in dom0: no service, no configuration, no key, no ledger; and no queue in VMs that run.

    The audit log stays unless ``logs`` says otherwise, and so do the VMs' own histories.

    Args:
        name: any text.
        config_dir: the folder that ``engine_configured`` keeps.
        logs: whether the logs go, too; the VMs' histories with them.
        settings: the engine's settings (dict); those that lie in ``config_dir`` hold as well.

    .. code-block:: yaml

        qvm-remote-clean-dom0:
          qvm_remote.absent: []
    """

    def work(ret):
        _stop_service(ret)
        # What the service was configured with may name other folders than pillar does by now, if there is still one.
        known = [settings or {}, *_applied(config_dir)]
        _clear_vms(ret, known, logs)
        _clear_folders(ret, known)
        audit = [os.path.dirname(_LOG), *(path for one in known for path in __salt__["qvm_remote.audit_files"](config=one))] if logs else []
        for path in [config_dir, _CACHE, _LOG, _LOGROTATE, *__salt__["qvm_remote.command_paths"](), *audit]:
            if os.path.lexists(path):
                _change(ret, path, "there", None, f"{path} would be removed", lambda path=path: _remove(path), f"{path} was removed")
        ret["comment"] = ret["comment"] or "Nothing of qvm-remote is in dom0"

    return _state(name, work)


def _stop_service(ret):
    if _unit_state() not in _AT_REST:
        _change(ret, "running", True, False, "the service would be stopped", lambda: _must("systemctl", "stop", _UNIT), "the service was stopped")
    for folder in (_TRANSIENT, _PERSISTENT):
        path = os.path.join(folder, _UNIT)
        if _read(path) is not None:
            _change(ret, path, "there", None, "the unit would be removed", lambda path=path: _remove_unit(path), "the unit was removed")


def _applied(config_dir):
    """The settings that the service was configured with, in a list that is empty where it was not."""
    # As in _remove.
    import pullrpc.config

    path = os.path.join(config_dir, "minion")
    text = _read(path)
    if text is None:
        return []
    minion = _parsed(text)
    try:
        settings = None if minion is None else pullrpc.config.engine_settings(minion)
        if settings is not None:
            # Whether they can be used.
            __salt__["qvm_remote.folders"](config=settings)
    except CommandExecutionError:
        minion = None
    if minion is None:
        raise _Failed(f"{path} can't be used, and may name folders in which keys lie: see what it names, remove it, and apply this again")
    return [] if settings is None else [settings]


def _clear_vms(ret, known, history):
    # The last ones know best whose queue it is in a VM: by them it was made.
    vms = {vm: settings for settings in known for vm in __salt__["qvm_remote.keys"](config=settings)}
    for vm, settings in vms.items():
        try:
            if not __salt__["qvm_remote.running"](vm, config=settings):
                ret["comment"] = _and(ret["comment"], f"{vm} is shut down and keeps its queue")
                continue
            _change(
                ret,
                f"queue of {vm}",
                "there",
                None,
                f"the queue in {vm} would be removed",
                lambda vm=vm, settings=settings: __salt__["qvm_remote.remove_queue"](vm, history=history, config=settings),
                f"the queue in {vm} was removed",
            )
        except CommandExecutionError as err:
            # No qube keeps dom0 from being cleaned.
            ret["comment"] = _and(ret["comment"], f"{vm} keeps its queue: {err}")


def _clear_folders(ret, known):
    found = sorted({folder for settings in known for folder in __salt__["qvm_remote.leftovers"](config=settings)})
    if not found:
        return
    names = ", ".join(found)
    kept = _change(
        ret,
        "folders",
        found,
        [],
        f"what is ours in {names} would be removed",
        lambda: sorted({folder for settings in known for folder in __salt__["qvm_remote.remove_leftovers"](config=settings)}),
        f"what was ours in {names} was removed",
    )
    if kept:
        ret["changes"]["folders"]["new"] = kept
        ret["comment"] = _and(ret["comment"], f"{', '.join(kept)} stays: it holds files that are not ours")


def _remove(path):
    # Here alone, and after the module has loaded it: templates have these states, too, and nothing of it.
    import pullrpc.errors
    import pullrpc.removal

    path = path.rstrip("/")
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            # No further than this file system: what is mounted in there is somebody else's.
            pullrpc.removal.remove_folder(path)
        else:
            os.unlink(path)
    except pullrpc.errors.PullError as err:
        raise _Failed(str(err)) from err
