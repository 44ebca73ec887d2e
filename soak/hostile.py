# SPDX-License-Identifier: GPL-2.0-or-later
"""Attackers: programs of users in all VMs, and in one VM the agent, too."""

import json
import os
import subprocess

from attackers import AGENT, AGENT_ATTACKS, KINDS, LIB, has_met
from fault_stand import MARKS, PROGRAMS, Lines

_HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = "attacker_in_vm.py"
#: Requests that are kept to be shown again, the newest ones.
_KEPT_MAX = 200
_AGENT = "/usr/bin/qvm-remote"


def program():
    """The attackers' program.

    Returns:
        str
    """
    with open(os.path.join(_HERE, PROGRAM), encoding="utf-8") as file:
        return f'import sys\nsys.path.insert(0, "/usr/lib/qvm-remote")\n{LIB}\nKINDS, MARKS = {KINDS!r}, {MARKS!r}\n{file.read()}'


class Hostile:
    """All attackers.

    Args:
        stand: FaultStand.
        vm: str, the VM that is an attacker's altogether.

    Attributes:
        count: int, requests made.
        replayed: set of marks of requests that were signed, and shown again.
    """

    def __init__(self, stand, vm):
        self._stand = stand
        self._vm = vm
        self._programs = {}
        self._signed = []
        self.count = 0
        self.replayed = set()

    def begin(self, vm):
        """Have an attacker in a VM."""
        self._programs[vm] = Lines(
            self._stand.popen_vm(vm, "/usr/bin/python3", "-IS", f"{PROGRAMS}/{PROGRAM}", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )

    def end(self, vm):
        """A VM went, and its attacker with it."""
        gone = self._programs.pop(vm, None)
        if gone is not None:
            gone.end()

    def _order(self, vm, **order):
        if vm in self._programs:
            self.count += 1
            self._programs[vm].order(json.dumps(order))

    def listen(self):
        """Hear what attackers say."""
        for vm, one in self._programs.items():
            for line in one.waiting_lines():
                found = json.loads(line)
                if "signed" in found:
                    self._signed.append((vm, found["signed"], found["cid"], found["line"]))
        del self._signed[:-_KEPT_MAX]

    def forge(self, vm, number):
        """Make a request that must not run."""
        self._order(vm, do="attack", number=number, rough=vm == self._vm, mark=f"forged-{self.count}")

    def replay(self, vm, number):
        """Have a request signed and shown twice at once, and an older one once more."""
        mark = f"replayed-{self.count}"
        self.replayed.add(mark)
        self._order(vm, do="sign", mark=mark)
        own = [one for one in self._signed if one[0] == vm]
        if own:
            _, mark, cid, line = own[number % len(own)]
            self._order(vm, do="put", mark=mark, cid=cid, line=line)

    def cross(self, number):
        """Show another VM's request as the attacker's own.

        Returns:
            bool, whether there is one.
        """
        others = [one for one in self._signed if one[0] != self._vm]
        if others:
            _, mark, cid, line = others[number % len(others)]
            self._order(self._vm, do="put", mark=mark, cid=cid, line=line)
        return bool(others)

    def be_agent(self, number):
        """Put an attacker's agent in the place of the VM's."""
        name = sorted(AGENT_ATTACKS)[number % len(AGENT_ATTACKS)]
        path = "/var/tmp/agent"
        self._stand.vm(self._vm, "sh", "-c", f"cat > {path} && chmod 755 {path}", user="root", data=f"{AGENT}{AGENT_ATTACKS[name]}\n".encode(), check=True)
        self._stand.in_vms_root(self._vm, "mount", "--bind", path, _AGENT)
        self._stand.vm(self._vm, "pkill", "-f", "qvm-remote agent", user="root")

    def is_met(self):
        """Whether dom0 has met the attacker's agent."""
        return has_met(self._stand, self._vm)

    def be_itself(self):
        """Bring the VM's own agent back, with the VM as its template has it."""
        self.end(self._vm)
        self._stand.halt(self._vm)
        self._stand.boot(self._vm)
        self.begin(self._vm)

    def tidy(self):
        """Remove what attackers left in their own VM. Its agent may move some of that meanwhile: that goes the next time."""
        self._stand.vm(self._vm, "sh", "-c", "find ~/.qvm-remote/queue -mindepth 2 -delete")
