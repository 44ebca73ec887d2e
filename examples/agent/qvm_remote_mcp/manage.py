# SPDX-License-Identifier: GPL-2.0-or-later
"""The tools that change something."""

from __future__ import annotations

import anyio
from mcp.types import ToolAnnotations

from .observe import look_at
from .remote import RemoteError
from .words import Property, Script, Value, VmName, Why

_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False)
_ENDS = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)
#: How long a qube is waited for, and how often it is looked at, seconds: what the rate in dom0 leaves room for.
_SHUTDOWN_WAIT, _LOOK_INTERVAL = 60, 3
_RUNS_ANYTHING = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=False, open_world_hint=False)


def offer(server, dom0):
    """Add them to a server.

    Args:
        server: MCPServer.
        dom0: remote.Dom0.
    """

    @server.tool(title="manage: start a qube", annotations=_ADDS)
    async def start_vm(vm: VmName) -> str:
        """Start a qube."""
        return await dom0.run("qvm-start", vm) or f"{vm} was started"

    @server.tool(title="manage: shut a qube down", annotations=_ENDS)
    async def shutdown_vm(vm: VmName) -> str:
        """Shut a qube down and wait for it, a minute at most. It is not killed. What is not saved in it is lost."""
        # Not with --wait, which kills it after a while: dom0's user is asked about that.
        await dom0.run("qvm-shutdown", vm)
        with anyio.move_on_after(_SHUTDOWN_WAIT):
            while await _state_after(dom0, vm) != "Halted":
                await anyio.sleep(_LOOK_INTERVAL)
            return f"{vm} is shut down"
        raise RemoteError(f"{vm} was told to shut down, and was not seen halted within {_SHUTDOWN_WAIT} s: look at it again later")

    @server.tool(title="manage: set a property", annotations=_ENDS)
    async def set_pref(vm: VmName, property: Property, value: Value) -> str:
        """Set one property of a qube. The value that it had is gone: read it before."""
        return await dom0.run("qvm-prefs", vm, property, value) or f"{vm}: {property} was set"

    @server.tool(title="manage: run a plan", annotations=_RUNS_ANYTHING)
    async def plan(script: Script, why: Why) -> str:
        """Have several commands run in dom0, one after the other, up to the first that fails; all or none of them are let through.

        dom0's user is shown the whole plan where a line of it needs that, and answers once: this waits for the answer, a minute or
        more. Use it for whatever destroys something, and for steps that only make sense together. A no is final.
        """
        # At the end, so that dom0's messages count lines as the agent does.
        return await dom0.run_script(f"{script}\n# why: {' '.join(why.split())}\n") or "all of it ran; it printed nothing"


async def _state_after(dom0, vm):
    """The state of a qube that was told to shut down."""
    try:
        return (await look_at(dom0, vm)).state
    except RemoteError as err:
        raise RemoteError(f"{vm} was told to shut down; whether it did can't be seen: {err}") from None
