# SPDX-License-Identifier: GPL-2.0-or-later
"""The service, agents, sessions, clients and VMs die at random moments while several VMs keep dom0 busy."""

import os

import pytest
from fault_stand import FaultStand, check_end
from load import KILLS, Load, seeded_dice

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


def _play(stand, kills):
    dice = seeded_dice()
    load = Load(stand, _VMS, dice, _PARALLEL)
    for _ in range(kills):
        load.fill()
        load.take(dice.uniform(0.02, 0.7))
        who = dice.choices(list(_WHO), list(_WHO.values()))[0]
        KILLS[who](stand, load, dice.choice(_VMS))
    assert not load.finish()
    beats = stand.wait_settled(dead=_VMS)
    for end in load.ended.values():
        check_end(end, beats.get(end.cid, []))
    assert [end for end in load.ended.values() if end.code == 7], "nothing came through"


def test_whoever_dies_at_some_moments(stand):
    _play(stand, 12)


@pytest.mark.long
def test_whoever_dies_at_hundreds_of_moments(stand):
    _play(stand, int(os.environ.get("QVM_REMOTE_KILLS") or 300))
