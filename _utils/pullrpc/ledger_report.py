# SPDX-License-Identifier: GPL-2.0-or-later
"""What is wrong with the ledger, and what to type then."""

from __future__ import annotations

from .errors import LedgerDamaged, LedgerError


def look(dom0):
    """Look at all of the ledger.

    Args:
        dom0: Dom0.

    Returns:
        dict: ``ledger`` (its path), ``problems`` (sentences), ``commands`` (state to count), ``next`` (what to type).
    """
    found = {"ledger": dom0.ledger_path, "problems": [], "commands": {}, "next": "nothing is to be done"}
    try:
        dom0.check_ledger()
        ahead = dom0.ledger_ahead()
        if ahead:
            text = "by dom0's clock it was made {:.0f} s from now, and takes no id until then: mend dom0's clock, or set the ledger aside"
            found["problems"] = [text.format(ahead)]
        found["commands"] = dom0.ledger_counts() or {}
    except LedgerDamaged as err:
        found["problems"] = [err.what]
    except LedgerError as err:
        found.update(problems=[str(err)], next="mend that (is the disk full, or read-only?), and look again")
        return found
    if found["problems"]:
        found["next"] = (
            "systemctl stop qvm-remote.service; salt-call --local -c /etc/qubes/remote qvm_remote.ledger_check set_aside=True; "
            "systemctl start qvm-remote.service"
        )
    return found
