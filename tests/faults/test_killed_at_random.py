# SPDX-License-Identifier: GPL-2.0-or-later
"""The service, agents, sessions, clients and VMs die at random moments while several VMs keep dom0 busy."""

import os
import random
import time

import pytest
from fault_stand import KINDS, FaultStand, check_end

#: Who dies, and how often as compared with the others.
_WHO = {"service": 6, "agent": 2, "qvm-run": 2, "client": 2, "vm": 1}
_VMS = ("work", "dev", "mail")
#: Clients of one VM at a time.
_PARALLEL = 3


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """The service, and VMs that have their keys."""
    with FaultStand(str(tmp_path_factory.mktemp("faults")), _VMS, parallel=4) as one:
        one.set_up()
        yield one


class _Load:
    """Keeps some clients at work in each VM."""

    def __init__(self, stand, dice):
        self._stand = stand
        self._dice = dice
        self._number = 0
        self.running = {vm: set() for vm in stand.vms}
        self.killed = set()
        self.ended = []

    def fill(self):
        for vm, keys in self.running.items():
            while len(keys) < _PARALLEL:
                self._number += 1
                key = f"{vm}-{self._number}"
                self._stand.clients[vm].start(key, self._dice.choice(list(KINDS)))
                keys.add(key)

    def take(self, seconds):
        """Hear which clients have ended, for some time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for vm, clients in self._stand.clients.items():
                for line in clients.waiting_lines():
                    if line.startswith('{"ended"'):
                        key, end = clients.take_ended(line)
                        self.running[vm].discard(key)
                        if key not in self.killed:
                            self.ended.append(end)
            time.sleep(0.01)

    def finish(self):
        deadline = time.monotonic() + 90
        while any(self.running.values()):
            assert time.monotonic() < deadline, f"no end of {self.running}"
            self.take(0.1)

    def forget(self, vm):
        """Its clients died with it."""
        self.killed |= self.running[vm]
        self.running[vm] = set()


def _kill(stand, load, dice):
    """Kill somebody; say what stands there now."""
    who = dice.choices(list(_WHO), list(_WHO.values()))[0]
    vm = dice.choice(_VMS)
    if who == "service":
        stand.restart_service()
    elif who == "agent":
        stand.clients[vm].order('{"do": "kill-agent"}')
    elif who == "qvm-run":
        stand.service.order(f"kill-session {vm}")
    elif who == "client" and load.running[vm]:
        key = dice.choice(sorted(load.running[vm]))
        load.killed.add(key)
        stand.clients[vm].kill(key)
    elif who == "vm":
        stand.power_cut(vm)
        load.forget(vm)


def _play(stand, kills, seed):
    dice = random.Random(seed)
    load = _Load(stand, dice)
    for _ in range(kills):
        load.fill()
        load.take(dice.uniform(0.02, 0.7))
        _kill(stand, load, dice)
    load.finish()
    beats = stand.wait_settled(dead=_VMS)
    for end in load.ended:
        check_end(end, beats.get(end.cid, []))
    assert [end for end in load.ended if end.code == 7], "nothing came through"


def _seed():
    return int(os.environ.get("QVM_REMOTE_SEED") or random.randrange(1 << 30))


def test_whoever_dies_at_some_moments(stand):
    seed = _seed()
    print(f"QVM_REMOTE_SEED={seed}")
    _play(stand, 12, seed)


@pytest.mark.long
def test_whoever_dies_at_hundreds_of_moments(stand):
    seed = _seed()
    print(f"QVM_REMOTE_SEED={seed}")
    _play(stand, int(os.environ.get("QVM_REMOTE_KILLS") or 300), seed)
