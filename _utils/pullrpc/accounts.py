# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's users, as which commands may be run.

Looked up when a command begins, never before: what holds is what dom0's user database says then.
"""

from __future__ import annotations

import dataclasses
import os
import pwd

from .errors import Refused

ROOT = "root"


@dataclasses.dataclass(frozen=True)
class Account:
    """A user of dom0, other than the engine's own.

    Attributes:
        name: str.
        uid, gid: int.
        groups: tuple of int, all of its groups.
        home: str.
    """

    name: str
    uid: int
    gid: int
    groups: tuple
    home: str


def find_account(name):
    """Look up the user that commands are to be run as.

    Args:
        name: str, as ``run_as`` has it.

    Returns:
        Account; None for the engine's own user, root, under whatever name.

    Raises:
        Refused: there is no such user, or the engine can't run anything as that one (code ``run_as``).
    """
    account, problem = _look_up(name)
    if problem:
        raise Refused("run_as", f"{problem}; in dom0's pillar, run_as says as whom this qube's commands are run")
    return account


def describe_account(name):
    """Say as whom commands are run.

    Args:
        name: str, as ``run_as`` has it.

    Returns:
        str, a few words.
    """
    account, problem = _look_up(name)
    if problem:
        return f"{name} (but nothing runs: {problem})"
    return name if account or name == ROOT else f"{name}, which is root"


def _look_up(name):
    """The account if it is another one than the engine's, and what is wrong with it, if anything is."""
    if name == ROOT:
        return None, None
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None, f"dom0 has no user {name}"
    if entry.pw_uid == os.geteuid():
        return None, None
    if os.geteuid():
        return None, f"dom0's engine is not root, so that it can run nothing as {name}"
    account = Account(name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)), entry.pw_dir)
    if not (_are_mapped("uid", [account.uid]) and _are_mapped("gid", [account.gid, *account.groups])):
        return None, f"the user namespace that dom0's engine is in lacks {name} (uid {account.uid}) or a group of it"
    return account, None


def _are_mapped(kind, wanted):
    """Say whether some ids are there: in a user namespace not all are."""
    with open(f"/proc/self/{kind}_map", encoding="ascii") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return all(any(first <= one < first + count for first, _, count in ranges) for one in wanted)
