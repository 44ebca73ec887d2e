# SPDX-License-Identifier: GPL-2.0-or-later
"""The words that an agent may give, as types: their schema tells it what is possible before dom0 has to refuse."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field

VmName = Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9_.-]{0,30}$", description="a qube's name")]
Property = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$", description="a property, as qvm-prefs names it: label, memory, vcpus...")]
#: No option: one in a value's place would turn the command into another.
Value = Annotated[str, Field(pattern=r"^([^\x00-\x1f\x7f-][^\x00-\x1f\x7f]*)?$", max_length=256, description="the new value")]
Script = Annotated[
    str,
    Field(
        max_length=16384,
        description="one command on each line, for example 'qvm-shutdown --wait NAME'; no shell reads it, so no pipes, variables or patterns; "
        "a line that begins with # is a comment, which dom0's user is not shown",
    ),
]
Why = Annotated[str, Field(min_length=1, max_length=500, description="what the plan is for; kept in dom0's log, not shown in the question")]


@dataclasses.dataclass(frozen=True)
class Vm:
    """A qube, as qvm-ls shows it."""

    name: str
    state: str
    klass: str
    template: str
