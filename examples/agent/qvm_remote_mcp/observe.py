# SPDX-License-Identifier: GPL-2.0-or-later
"""The tools that only look."""

from __future__ import annotations

from mcp.types import ToolAnnotations

from .remote import RemoteError
from .words import Property, Vm, VmName

#: What is asked of qvm-ls; dom0's rules name it word by word.
_LIST = ("qvm-ls", "--raw-data", "--fields", "name,state,class,template")
_LOOKS = ToolAnnotations(read_only_hint=True, open_world_hint=False)


def offer(server, dom0, tag):
    """Add them to a server.

    Args:
        server: MCPServer.
        dom0: remote.Dom0.
        tag: str, the tag of the qubes to list; empty for all, which dom0's rules have to allow.
    """

    @server.tool(title="observe: is dom0 there", annotations=_LOOKS)
    async def status() -> str:
        """Say whether dom0 answers this qube, and how fast. Use it first when other tools fail."""
        return await dom0.ping()

    @server.tool(title="observe: list qubes", annotations=_LOOKS)
    async def list_vms() -> list[Vm]:
        """List the qubes you may know of, with state, class and template."""
        return _read_vms(await dom0.run(*_LIST, *(("--tags", tag) if tag else ())))

    @server.tool(title="observe: one qube", annotations=_LOOKS)
    async def vm_info(vm: VmName) -> Vm:
        """Show one qube's state, class and template."""
        return await look_at(dom0, vm)

    @server.tool(title="observe: a qube's properties", annotations=_LOOKS)
    async def vm_prefs(vm: VmName, property: Property | None = None) -> str:
        """Show one property of a qube, or all of them as qvm-prefs prints them."""
        return (await dom0.run("qvm-prefs", vm, *((property,) if property else ()))).rstrip("\n")


async def look_at(dom0, vm):
    """Look at one qube.

    Args:
        dom0: remote.Dom0.
        vm: str, its name.

    Returns:
        Vm

    Raises:
        RemoteError
    """
    (one,) = _read_vms(await dom0.run(*_LIST, vm))
    return one


def _read_vms(text):
    try:
        return [Vm(*line.split("|")) for line in text.splitlines()]
    except TypeError:
        raise RemoteError("dom0's qvm-ls printed something else than the four columns that it was asked for; tell the user") from None
