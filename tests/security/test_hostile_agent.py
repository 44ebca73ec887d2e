# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM whose agent is an attacker's: it ends its own session, and nothing else."""

import re
import time

import pytest
from attackers import AGENT_ATTACKS, be_agent, be_itself, in_session, wait

#: How long an attack goes on if dom0 does not end it at once, seconds.
_LASTS = 1.5


def _memory(dom0):
    """What all of the minion's processes have in memory, and the most that each ever had, KiB."""
    lines = dom0.dom0("sh", "-c", "for pid in $(pgrep -f salt-minion); do grep -E 'VmRSS|VmHWM' /proc/$pid/status; done; true", check=True).stdout.decode()
    return [sum(int(size) for size in re.findall(rf"{which}:\s+(\d+)", lines)) for which in ("VmRSS", "VmHWM")]


@pytest.mark.parametrize("attack", sorted(AGENT_ATTACKS))
def test_a_hostile_agent_harms_its_own_session_only(dom0, attack):
    before, most_before = _memory(dom0)
    be_agent(dom0, "dev", AGENT_ATTACKS[attack])
    end = time.monotonic() + _LASTS
    served = 0
    while not served or (in_session(dom0, "dev") and time.monotonic() < end):
        assert dom0.remote("hostname").stdout == b"dom0\n"
        served += 1
    assert dom0.dom0("pgrep", "-f", "salt-minion").returncode == 0
    # What was taken and given back meanwhile counts.
    _, most = _memory(dom0)
    assert most == most_before or most - before < 64 * 1024
    # Its template's own agent is back with the next start: so is the service.
    be_itself(dom0, "dev")


def test_refusals_do_not_fill_the_audit_log(dom0):
    def lines():
        return int(dom0.dom0("sh", "-c", "grep -c refused /var/log/qvm-remote/audit.log || :").stdout)

    before = lines()
    # Another VM than that of the attacks above, whose floods have used up what it may write in this minute.
    be_agent(dom0, "work", AGENT_ATTACKS["refusal-flood"])
    try:
        wait(lambda: lines() - before > 50, 80)
        time.sleep(6)
        # Sixty a minute are written, and the flood may lie in two of them.
        assert lines() - before <= 120
    finally:
        be_itself(dom0, "work")


def test_a_vm_without_agent_and_shell_does_not_keep_dom0_busy(dom0):
    shim, count = f"{dom0.folder}/path/qvm-run", f"{dom0.folder}/starts"
    dom0.put(shim, f"#!/bin/sh\necho start >> {count}\nexec /usr/bin/qvm-run \"$@\"\n")
    dom0.dom0("chmod", "0755", shim, check=True)

    def starts():
        return dom0.dom0("cat", count).stdout.count(b"start")

    try:
        dom0.vm("dev", "sh", "-c", "rm /usr/bin/qvm-remote; mv /home/user /home/away; pkill -f 'qvm-remote agent'", user="root")
        wait(lambda: starts() >= 2)
        time.sleep(8)
        # Two for each try, with pauses of 1, 2 and 4 seconds between them; without a pause it were dozens.
        assert starts() <= 12
    finally:
        dom0.vm("dev", "mv", "/home/away", "/home/user", user="root")
        dom0.dom0("rm", "-f", shim, count)
        dom0.shutdown("dev")
        dom0.start("dev")
    dom0.wait_served("dev", seconds=40)
