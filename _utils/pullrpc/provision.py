# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 does in a VM besides answering it: looks at key and queue, puts them in order, removes them; installs and
removes the client. Each in one short session or one program start, by dom0's own wish only.
"""

from __future__ import annotations

import asyncio
import re
import time

from .agentless import Agentless
from .aio import run
from .errors import PullError, TransportError
from .package import COMPILE, IS_PACKAGE
from .session import NoAgent, Session
from .transport import features, list_vms, run_bounded, running_vms, set_feature, set_running

#: How long a template may take to unpack or remove the client, seconds.
_CLIENT_WAIT = 120
#: A longer answer is no key, bytes; how long the VM may take to show it, seconds.
_KEY_MAX, _KEY_WAIT = 66, 20
#: Most VMs that are asked for their version at the same time: each takes a program in dom0.
_AT_ONCE = 4
_UNPACK = f"tar --extract --no-same-owner --directory=/ && {{ {COMPILE}; }}"
#: What a template's shell exits with that has the client as a package, and was left alone. It takes what it is sent, and shows the version.
_PACKAGE_CODE = 64
_UNLESS_PACKAGE = f"if {{ {IS_PACKAGE}; }} >/dev/null 2>&1; then cat >/dev/null; /usr/bin/qvm-remote --version; exit {_PACKAGE_CODE}; fi; "
_VERSION = re.compile(rb"qvm-remote ([0-9]{1,5}(?:\.[0-9]{1,5}){2})\n")
#: Feature of a template that says which client it has: with a clone it is copied, with the template it goes, as the client does.
_FEATURE = "qvm-remote-client"
#: At its digest's end: the template had the client as a package when this version of ours was to be installed there.
_PACKAGE = "+package"
_HAS_CLIENT = ("TemplateVM", "StandaloneVM")
#: All of it but the history and the VM's own audit log, which are its user's.
_REMOVE_QUEUE = """\
cd && [ ! -L .qvm-remote ] && [ -d .qvm-remote ] || exit 0
cd .qvm-remote && rm -rf queue auth.key .auth.key.* dom0-limits .dom0-limits* dom0-seen .dom0-seen* doorbell agent.lock
"""
_REMOVE_ALL = "cd && { [ -L .qvm-remote ] || rm -rf .qvm-remote; }\n"


def inspect(config, vm):
    """Look at the key and the queue of a running VM; changes nothing there.

    Args:
        config: Config that holds for the VM.
        vm: str, a checked name.

    Returns:
        Found

    Raises:
        SessionBroken, TransportError: it doesn't answer.
    """
    return run(_look_into(config, vm, None))


def hand_key(config, vm, key):
    """Give a running VM its key, and put its queue in order.

    Args:
        config: Config that holds for the VM.
        vm: str, a checked name.
        key: bytes.

    Raises:
        SessionBroken, TransportError: it doesn't answer, or can't store it.
    """
    run(_look_into(config, vm, key))


def ping(config, vm):
    """Open a session to the agent of a running VM, and end it.

    Args:
        config: Config that holds for the VM.
        vm: str, a checked name.

    Returns:
        (float, str): seconds from dom0's call to the agent's answer, and which version of qvm-remote the agent says it is.

    Raises:
        SessionBroken, TransportError: it doesn't run, has no agent, or doesn't answer.
    """
    return run(_ping(config, vm))


def versions(config, vms):
    """Ask running VMs which version of qvm-remote they have, a few at a time.

    Args:
        config: Config.
        vms: iterable of str, checked names.

    Returns:
        dict of VM name to str: the version as it says; None without an agent; a PullError when it doesn't answer.
    """
    return run(_versions(config, vms))


async def _versions(config, vms):
    turns = asyncio.Semaphore(_AT_ONCE)

    async def ask(vm):
        async with turns:
            try:
                return vm, (await _ping(config.for_vm(vm), vm))[1]
            except NoAgent:
                return vm, None
            except PullError as err:
                return vm, err

    return dict(await asyncio.gather(*map(ask, vms)))


async def open_session(config, vm):
    """Open a session to a running VM, with or without an agent there, and look at key and queue; changes nothing there.

    Args:
        config: Config that holds for the VM.
        vm: str, a checked name.

    Returns:
        (Session or Agentless, Found): the session is to be closed.

    Raises:
        SessionBroken, TransportError: it doesn't answer.
    """
    session = Agentless(config, vm) if config.accept_v1 else await Session.open(config, vm)
    try:
        return session, await session.inspect()
    except NoAgent:
        session = Agentless(config, vm)
        return session, await session.inspect()
    except BaseException:
        await session.close()
        raise


async def _look_into(config, vm, key):
    session, found = await open_session(config, vm)
    try:
        if key is not None:
            await session.set_key(key)
        return found
    finally:
        await session.close()


async def _ping(config, vm):
    started = time.monotonic()
    session = await Session.open(config, vm)
    try:
        await session.hello()
        waited = time.monotonic() - started
        await session.bye()
        return waited, session.version
    finally:
        await session.close()


def read_key(config, vm):
    """Ask a running VM for the key that it made.

    Args:
        config: Config that holds for the VM.
        vm: str, a checked name.

    Returns:
        bytes, as the VM gave them.

    Raises:
        SessionBroken, TransportError: it shows none.
    """
    code, untrusted_key = run(run_bounded(config, vm, "qvm-remote key show --secret", [], _KEY_MAX, _KEY_WAIT))
    if code:
        raise TransportError(f"{vm} showed no key; is it running, and was 'qvm-remote key gen' run there?")
    return untrusted_key


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
    code, _ = run(run_bounded(config, vm, "exec /bin/sh -s", [script.encode("ascii")], 64, config.answer_wait))
    if code:
        raise TransportError(f"{vm}: the queue could not be removed (exit code {code})")


def client_digest(template):
    """Say which client dom0 installed in a template, or was to install in one that has the client as a package.

    Args:
        template: str, a checked name.

    Returns:
        (str, bool): the SHA-256 of it, empty when there is none; whether it was left to the template's package.

    Raises:
        TransportError: there is no such template.
    """
    known = features(template)
    noted, _, installed = known.get(_FEATURE, "").partition("@")
    # A template that was installed anew (qvm-template reinstall) keeps its features, and has no client.
    digest = noted if installed == _installed(known) else ""
    return digest[: -len(_PACKAGE)] if digest.endswith(_PACKAGE) else digest, digest.endswith(_PACKAGE)


def clients():
    """List the templates that got a client from here, or were found to have it as a package.

    Returns:
        list of str, sorted.

    Raises:
        TransportError: they can't be listed.
    """
    return sorted(vm["name"] for vm in list_vms() if vm["class"] in _HAS_CLIENT and client_digest(vm["name"])[0])


def install_client(config, template, archive, digest):
    """Unpack the client in a template (or standalone), which is started for it and shut down again if need be.

    Args:
        config: Config.
        template: str, a checked name.
        archive: bytes, a tar archive.
        digest: str, its SHA-256.

    Returns:
        str, the version of the template's own package, which was left alone, ``unknown`` if it does not show one; empty when there is none.

    Raises:
        SessionBroken, TransportError: it can't be done, or not be noted.
    """
    by_package, untrusted_version = _run_as_root(config, template, _UNLESS_PACKAGE + _UNPACK, [archive], "take the client: is its disk full?")
    noted = digest + _PACKAGE if by_package else digest
    set_feature(template, _FEATURE, f"{noted}@{_installed(features(template))}")
    version = _VERSION.fullmatch(untrusted_version)
    return (version[1].decode("ascii") if version else "unknown") if by_package else ""


def remove_client(config, template, paths):
    """Remove the client from a template (or standalone).

    Args:
        config: Config.
        template: str, a checked name.
        paths: list of str, constants of ours: what goes.

    Returns:
        bool, False when it is the template's own package, which was left alone.

    Raises:
        SessionBroken, TransportError: it can't be done.
    """
    by_package, _ = _run_as_root(config, template, _UNLESS_PACKAGE + "rm -rf " + " ".join(paths), [], "remove the client")
    set_feature(template, _FEATURE, None)
    return not by_package


def _run_as_root(config, template, command, data, purpose):
    was_running = template in running_vms(config)
    if not was_running:
        set_running(template, True)
    try:
        code, untrusted_output = run(run_bounded(config, template, command, data, 4096, _CLIENT_WAIT, user="root"))
    finally:
        if not was_running:
            set_running(template, False)
    if code not in (0, _PACKAGE_CODE):
        raise TransportError(f"{template} could not {purpose} (exit code {code})")
    return code == _PACKAGE_CODE, untrusted_output


def _installed(known):
    """When a template was installed, by qvm-template; empty for one that was not."""
    return known.get("template-installtime", "").replace(" ", "T")
