# SPDX-License-Identifier: GPL-2.0-or-later
"""What would be run if it was asked for, or if the queues of all running VMs were served now. Nothing is taken, claimed or run:
a command that lies there lies there afterwards.
"""

from __future__ import annotations

import asyncio
import dataclasses

from . import policy
from .aio import run
from .audit_read import shown
from .errors import FrameError, KeyringError, PullError, Refused
from .gate import Request, check_policy
from .ids import check_cid
from .lock import EngineLock
from .provision import open_session
from .session import ITEMS_MAX
from .tokens import TOKEN_MAX
from .transport import running_vms, uuids, vms_with_tag
from .validate import check_size

#: Most characters of a command that are shown.
_COMMAND_SHOWN = 1000
#: Longest that one VM is looked at, as a multiple of how long each of its answers may take.
_LOOKS = 2


def explain(dom0, vm, command):
    """Say whether a VM could have a command run now: it has a key, its access has not ended, and its policy lets it.

    Args:
        dom0: Dom0.
        vm: str, a checked name.
        command: as for :func:`pullrpc.policy.explain`.

    Returns:
        dict, as from :func:`pullrpc.policy.explain`; the reason is that of the first that does not let it.

    Raises:
        PullError: the VMs of a tag can't be listed, or the ledger can't be read.
    """
    config = dom0.config.for_vm(vm)
    try:
        dom0.keyring.accepted(vm, config.max_age)
        if config.until:
            # What every policy has in common: only that it may be over is looked for.
            any_request = Request(vm, "", "", None, "shell", config.timeout_max, b"", b"", b"")
            check_policy(dataclasses.replace(config, policy=policy.FULL), dom0.ledger, vms_with_tag, any_request)
    except (KeyringError, Refused) as refused:
        return {"allowed": False, "asks": False, "reason": str(refused), "rule": "", "words": None}
    return policy.explain(config.policy_in_force, command, vms_with_tag)


def rehearse(dom0):
    """Look into the queues of all running VMs that are served.

    Args:
        dom0: Dom0.

    Returns:
        dict of VM name to a dict: ``problem`` (str) when it can't be asked; else ``commands``: a list of dict, each with ``id``,
        ``command`` (its beginning, fit to be shown; None when it was not looked at), ``runs`` (bool), ``asks`` (bool: only if
        dom0's user says so) and ``reason`` (when it doesn't run).

    Raises:
        EngineBusy: an engine is at work, and takes what there is by itself. PullError: the keys or the running VMs can't be listed.
    """
    config = dom0.config
    with EngineLock(config.run_dir):
        vms = ({*config.vms, *dom0.keyring.names()}) & running_vms(config)
        return {vm: _look(dom0, vm) for vm in sorted(vms)}


def _look(dom0, vm):
    try:
        if dom0.keyring.exists(vm) and dom0.keyring.bound(vm) not in ("", uuids(dom0.config, vm)[vm]):
            return {"problem": "it is another qube than the one that has access under this name"}
        return {"commands": run(asyncio.wait_for(_look_into(dom0, vm), _LOOKS * dom0.config.answer_wait))}
    except asyncio.TimeoutError:
        return {"problem": "it answers too slowly"}
    except PullError as err:
        return {"problem": str(err)}


async def _look_into(dom0, vm):
    config = dom0.config.for_vm(vm)
    session, _ = await open_session(config, vm)
    try:
        items, _ = await session.poll(0, min(config.vm_queue, ITEMS_MAX))
        found = []
        for item in items:
            try:
                cid = check_cid(item.untrusted_cid)
            except PullError:
                raise FrameError("the qube listed a name that is no command id") from None
            found.append({"id": cid, **await _judge(dom0, config, vm, session, cid, item)})
        return found
    finally:
        await session.close()


async def _judge(dom0, config, vm, session, cid, item):
    untrusted_command = None
    try:
        check_size(item.command_size, config.command_max, "command")
        check_size(item.token_size, TOKEN_MAX, "token")
        untrusted_command = await _whole(session, cid, "command", item.command_size, item.command)
        untrusted_token = await _whole(session, cid, "auth", item.token_size, item.token)
        check_size(item.stdin_size, config.stdin_max, "stdin", "stdin")
        request, _ = dom0.intake.verify(vm, cid.encode("ascii"), untrusted_command, untrusted_token)
    except Refused as refused:
        return {"command": _shown(untrusted_command), "runs": False, "reason": str(refused)}
    return {"command": _shown(untrusted_command), "runs": True, "asks": request.asks}


async def _whole(session, cid, part, size, untrusted_data):
    if untrusted_data is not None:
        return untrusted_data
    untrusted_data = b""
    while len(untrusted_data) < size:
        piece = await session.fetch(cid, part, len(untrusted_data), size - len(untrusted_data))
        untrusted_data += piece
        if len(piece) < session.fetch_max:
            # The last one, or it changed there. As when it is served, none comes in crumbs.
            break
    return untrusted_data


def _shown(untrusted_command):
    return None if untrusted_command is None else shown(untrusted_command[:_COMMAND_SHOWN].decode("utf-8", "replace"))
