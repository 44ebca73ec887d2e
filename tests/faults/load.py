# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps real clients at work in several VMs, and kills whoever takes part in their commands."""

import json
import os
import random
import time

from fault_stand import KINDS, MARKS


def seeded_dice():
    """Dice whose seed is printed; QVM_REMOTE_SEED has them fall the same way again.

    Returns:
        random.Random
    """
    seed = int(os.environ.get("QVM_REMOTE_SEED") or random.randrange(1 << 30))
    print(f"QVM_REMOTE_SEED={seed}")
    return random.Random(seed)


class Load:
    """Clients at work: some in each VM at a time.

    Each command writes its client's key and its id to :data:`fault_stand.MARKS` in dom0, before all else.

    Args:
        stand: FaultStand, or what else has ``clients``: dict of VM to fault_stand.Clients.
        vms: VMs with clients.
        dice: random.Random.
        parallel: int, clients of one VM at a time.

    Attributes:
        started: dict of key to (vm, kind).
        running: dict of VM to set of keys.
        killed: set of keys whose client was killed, or ended with its VM.
        ended: dict of key to Ended, of all the others that have ended.
    """

    def __init__(self, stand, vms, dice, parallel):
        self._stand = stand
        self._dice = dice
        self._parallel = parallel
        self._away = set()
        self.started = {}
        self.running = {vm: set() for vm in vms}
        self.killed = set()
        self.ended = {}

    def start(self, vm, kind):
        """Start a client."""
        key = f"{vm}-{len(self.started) + 1}"
        self.started[key] = (vm, kind)
        *options, command = KINDS[kind][0]
        self._stand.clients[vm].start(key, kind, [*options, f"echo {key} $QVM_REMOTE_ID >> {MARKS}; {command}"])
        self.running[vm].add(key)

    def fill(self):
        """Start what there is room for."""
        for vm, keys in self.running.items():
            while len(keys) < self._parallel and vm not in self._away:
                self.start(vm, self._dice.choice(list(KINDS)))

    def take(self, seconds):
        """Hear which clients have ended, for some time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for vm in self.running:
                for line in self._stand.clients[vm].waiting_lines():
                    if line.startswith('{"ended"'):
                        self._take(vm, line)
            time.sleep(0.01)

    def _take(self, vm, line):
        key, end = self._stand.clients[vm].take_ended(line)
        self.running[vm].discard(key)
        if key not in self.killed:
            self.ended[key] = end

    def finish(self, seconds=90):
        """Wait until all have ended.

        Returns:
            set of keys that have not, in time.
        """
        deadline = time.monotonic() + seconds
        while any(self.running.values()) and time.monotonic() < deadline:
            self.take(0.1)
        return set().union(*self.running.values())

    def kill_one(self, vm):
        """Kill a client of a VM, if there is one."""
        if self.running[vm]:
            key = self._dice.choice(sorted(self.running[vm]))
            self.killed.add(key)
            self._stand.clients[vm].kill(key)

    def forget(self, vm):
        """A VM's clients died with it."""
        self.killed |= self.running[vm]
        self.running[vm] = set()

    def leave(self, vm):
        """A VM goes away: start none in it any more."""
        self._away.add(vm)

    def come_back(self, vm):
        """A VM is there again."""
        self._away.discard(vm)


def kill_agent(stand, _, vm):
    """Kill the agent of a VM."""
    stand.clients[vm].order(json.dumps({"do": "kill-agent"}))


def kill_session(stand, _, vm):
    """Kill dom0's end of the session to a VM."""
    stand.service.order(f"kill-session {vm}")


def kill_client(_, load, vm):
    """Kill a client."""
    load.kill_one(vm)


def cut_power(stand, load, vm):
    """Kill a VM with all that is in it."""
    stand.power_cut(vm)
    load.forget(vm)


def kill_service(stand, _load, _vm):
    """Kill the service; another one stands there at once."""
    stand.restart_service()


#: Who is killed, and how: callables of the FaultStand, the Load, and a VM.
KILLS = {"service": kill_service, "agent": kill_agent, "qvm-run": kill_session, "client": kill_client, "vm": cut_power}
