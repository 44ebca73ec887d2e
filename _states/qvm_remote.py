# SPDX-License-Identifier: GPL-2.0-or-later
"""States of qvm-remote, for dom0: the engine's configuration, the client in templates, the keys of VMs.

They report fingerprints, never keys, and change nothing that is already as it should be.
"""

import os

import salt.utils.atomicfile
import salt.utils.files
import salt.utils.yaml
from salt.exceptions import CommandExecutionError

__virtualname__ = "qvm_remote"


def __virtual__():
    return __virtualname__


def _ret(name):
    return {"name": name, "changes": {}, "result": True, "comment": ""}


def engine_configured(name, settings=None):
    """Keep the configuration of the minion that runs the engine: masterless, with its own cache, sockets and log.

    Args:
        name: its configuration folder, for example ``/etc/qubes/remote``.
        settings: the engine's settings (dict), as pillar.example describes them.

    .. code-block:: yaml

        qvm-remote-dom0-config:
          qvm_remote.engine_configured:
            - name: /etc/qubes/remote
            - settings:
                timeout_max: 300
    """
    ret = _ret(name)
    settings = dict(settings or {})
    try:
        __salt__["qvm_remote.keys"](config=settings)
    except CommandExecutionError as err:
        ret.update(result=False, comment=str(err))
        return ret
    path = os.path.join(name, "minion")
    wanted = salt.utils.yaml.safe_dump(_minion_config(settings), default_flow_style=False)
    if _read(path) == wanted:
        ret["comment"] = "The engine is configured as it should be"
        return ret
    ret["changes"] = {path: "written"}
    if __opts__["test"]:
        ret.update(result=None, comment="The engine would be configured")
        return ret
    os.makedirs(name, mode=0o700, exist_ok=True)
    # By rename: a minion that starts at this moment sees the old configuration or the new one.
    with salt.utils.atomicfile.atomic_open(path, "w") as file:
        file.write(wanted)
    os.chmod(path, 0o600)
    ret["comment"] = "The engine was configured; restart its minion"
    return ret


def _minion_config(settings):
    return {
        "id": "dom0",
        "master_type": "disable",
        "file_client": "local",
        "file_roots": __opts__["file_roots"],
        "user": "root",
        "cachedir": "/var/cache/qvm-remote",
        "pki_dir": "/var/lib/qvm-remote/pki",
        "sock_dir": "/run/qvm-remote/minion",
        "pidfile": "/run/qvm-remote/minion.pid",
        "log_file": "/var/log/qvm-remote/minion.log",
        "engines": [{"qvm_remote": settings}],
    }


def _read(path):
    try:
        with salt.utils.files.fopen(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def client_installed(name, settings=None):
    """Have this version of the client in a template or standalone.

    Args:
        name: the template.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-client-fedora-41:
          qvm_remote.client_installed:
            - name: fedora-41
    """
    ret = _ret(name)
    settings = dict(settings or {})
    try:
        if __salt__["qvm_remote.client_installed"](name, config=settings):
            ret["comment"] = f"The client is installed in {name}"
            return ret
        ret["changes"] = {name: "client installed"}
        if __opts__["test"]:
            ret.update(result=None, comment=f"The client would be installed in {name}")
            return ret
        __salt__["qvm_remote.install_client"](name, config=settings)
    except CommandExecutionError as err:
        ret.update(result=False, changes={}, comment=str(err))
        return ret
    ret["comment"] = f"The client was installed in {name}; restart the VMs that are based on it"
    return ret


def key_present(name, settings=None):
    """Have a key for a VM: the one that the VM made itself, fetched from there if dom0 has none yet.

    Args:
        name: the VM, which must be running if dom0 has no key for it.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-key-work:
          qvm_remote.key_present:
            - name: work
    """
    ret = _ret(name)
    settings = dict(settings or {})
    try:
        known = __salt__["qvm_remote.keys"](config=settings).get(name, {})
        if "problem" in known:
            ret.update(result=False, comment=known["problem"])
            return ret
        if known:
            ret["comment"] = f"{name} is authorized with key {known['fingerprint']}"
            return ret
        ret["changes"] = {name: {"old": None, "new": "its own key"}}
        if __opts__["test"]:
            ret.update(result=None, comment=f"{name} would be authorized")
            return ret
        stored = __salt__["qvm_remote.authorize"](name, from_vm=True, config=settings)
    except CommandExecutionError as err:
        ret.update(result=False, changes={}, comment=str(err))
        return ret
    ret["changes"] = {name: {"old": None, "new": stored["fingerprint"]}}
    ret["comment"] = f"{name} was authorized"
    return ret


def key_absent(name, settings=None):
    """Have no key for a VM: everything it asks for is refused.

    Args:
        name: the VM.
        settings: the engine's settings (dict).

    .. code-block:: yaml

        qvm-remote-key-old:
          qvm_remote.key_absent:
            - name: old
    """
    ret = _ret(name)
    settings = dict(settings or {})
    try:
        known = __salt__["qvm_remote.keys"](config=settings).get(name)
        if known is None:
            ret["comment"] = f"{name} is not authorized"
            return ret
        ret["changes"] = {name: {"old": known.get("fingerprint", "a key that was refused"), "new": None}}
        if __opts__["test"]:
            ret.update(result=None, comment=f"{name} would lose its key")
            return ret
        __salt__["qvm_remote.revoke"](name, config=settings)
    except CommandExecutionError as err:
        ret.update(result=False, changes={}, comment=str(err))
        return ret
    ret["comment"] = f"{name} lost its key"
    return ret
