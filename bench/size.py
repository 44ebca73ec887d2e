# SPDX-License-Identifier: GPL-2.0-or-later
"""How much is measured: all of it, or as little as still goes through every scenario."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Rounds and numbers.

    Attributes:
        rounds: of ``true`` in the fast modes; poll_rounds: in the modes that poll.
        turns: how often the engine goes back and forth between the two polling intervals.
        transfer_rounds: of a listing, 10 MiB out, 1 MiB in; poll_transfer_rounds: the same in the modes that poll.
        cost_rounds, cost_poll_rounds: of ``true`` with tools that cost what the real ones do.
        clients, client_rounds: how many at once, how often.
        commands: sent down the pipeline; client_commands: by a client program each.
        many, most: running VMs.
        idle_seconds: how long nothing is done.
        traces: of one round trip's stages.
        starts: of the engine.
    """

    rounds: int
    poll_rounds: int
    turns: int
    transfer_rounds: int
    poll_transfer_rounds: int
    cost_rounds: int
    cost_poll_rounds: int
    clients: int
    client_rounds: int
    commands: int
    client_commands: int
    many: int
    most: int
    idle_seconds: float
    traces: int
    starts: int


FULL = Size(
    rounds=100,
    poll_rounds=10,
    turns=2,
    transfer_rounds=10,
    poll_transfer_rounds=2,
    cost_rounds=25,
    cost_poll_rounds=5,
    clients=40,
    client_rounds=3,
    commands=1000,
    client_commands=300,
    many=20,
    most=200,
    idle_seconds=30,
    traces=40,
    starts=3,
)
SHORT = Size(
    rounds=5,
    poll_rounds=2,
    turns=1,
    transfer_rounds=1,
    poll_transfer_rounds=1,
    cost_rounds=2,
    cost_poll_rounds=1,
    clients=8,
    client_rounds=1,
    commands=40,
    client_commands=16,
    many=3,
    most=5,
    idle_seconds=2,
    traces=3,
    starts=1,
)
