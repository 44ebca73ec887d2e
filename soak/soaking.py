# SPDX-License-Identifier: GPL-2.0-or-later
"""One soak: set up, look at what there is, load and disturb, let all come to rest, look again."""

import collections
import json
import os
import random
import subprocess
import time

import hostile
import plan
from acts import DISKS, Acts
from fault_stand import KINDS, MARKS, PATIENCE, PROGRAMS, RESULT, Lines, outcome
from judge import Evidence
from load import Load

#: VMs whose clients count; the queue of the last one is on a small disk. And a VM that is an attacker's.
HONEST_VMS, HOSTILE_VM = ("work", "dev", "mail"), "shady"
_HERE = os.path.dirname(os.path.abspath(__file__))
_WATCH = "watch_in_dom0.py"
#: So that no disk is full that nobody filled: an hour's ledger and log have room.
_DISK_SIZE = "96m"
#: Clients of one VM at a time.
_PARALLEL = 3
#: Longest that a client may wait for what does not come, and then some: its command's time, its session's, and a machine with other work.
_CLIENT_MAX = 480
#: Seconds that are kept for the end; less of a short soak.
_END = 30
#: Steps of the plan that are done in any case: each disturbance once, and an attack before each.
_STEPS_MIN = 2 * len(plan.DISTURBANCES)
#: In the last part of the time the service lives on, so that what it leaks can be seen.
_SPARED = 0.75


class Soaking:
    """A soak.

    Args:
        stand: FaultStand, not set up.
        folder: str, of this run.
        seed: int.
    """

    def __init__(self, stand, folder, seed):
        self._stand = stand
        self._seed = seed
        self._errors = os.path.join(folder, "errors")
        self._load = Load(stand, stand.vms, random.Random(f"load {seed}"), _PARALLEL)
        self._hostile = hostile.Hostile(stand, HOSTILE_VM)
        self._acts = Acts(stand, self._load, self._hostile, HOSTILE_VM, HONEST_VMS[-1])
        self._watch = None
        self._deaths = []

    def done(self):
        """What was done, name to count."""
        return {name: self._acts.done.get(name, 0) for name in (*plan.DISTURBANCES, *plan.ATTACKS)}

    def run(self, seconds, say):
        """Soak.

        Args:
            seconds: int, how long all of it is to take.
            say: callable of str, told how far it is.

        Returns:
            Evidence
        """
        begun = time.monotonic()
        say("setting up")
        self._set_up()
        fds, processes, files = self._look_before()
        self._stand.start_service()
        self._acts.prepare()
        self._load.leave(HOSTILE_VM)
        self._disturb(begun + seconds - min(_END, seconds / 3), say)
        say("waiting for the end of all")
        self._acts.undo(everything=True)
        self._live()
        self._load.finish(_CLIENT_MAX)
        unserved = self._unserved()
        left = self._settle()
        more_fds = self._more_fds(fds)
        found, ran = self._ask("evidence"), self._stand.service.ran()
        self._stop()
        evidence = Evidence(
            started=self._load.started,
            ended=self._load.ended,
            killed=self._load.killed,
            ran=ran,
            replayed=self._hostile.replayed,
            attacks=self._hostile.count,
            deaths=self._deaths,
            complaints=self._complaints(),
            unserved=unserved,
            processes=_more(processes, self._processes()),
            files=left + _more(files, self._ask("files")),
            fds=more_fds,
            **found,
        )
        for one in (self._watch, *self._stand.clients.values()):
            one.end()
        say("")
        return evidence

    def _complaints(self):
        """What the service wrote to its stderr, where nobody reads it: what it did not expect."""
        with open(self._errors, encoding="utf-8", errors="replace") as file:
            return [line.rstrip() for line in file if line.strip()]

    def _set_up(self):
        with open(os.path.join(_HERE, _WATCH), encoding="utf-8") as file:
            programs = {_WATCH: file.read(), hostile.PROGRAM: hostile.program()}
        self._stand.errors = open(self._errors, "wb")  # noqa: SIM115 - as long as the stand
        self._stand.set_up(DISKS, _DISK_SIZE, programs)
        self._watch = Lines(self._stand.popen_dom0("/usr/bin/python3", "-s", f"{PROGRAMS}/{_WATCH}", MARKS, stdin=subprocess.PIPE, stdout=subprocess.PIPE))

    def _ask(self, what):
        self._watch.order(what)
        return json.loads(self._watch.next_line())

    def _look_before(self):
        """What there is when all has been used once, and nothing is on its way."""
        for vm in self._stand.vms:
            for kind in KINDS:
                self._load.start(vm, kind)
        self._load.finish(_CLIENT_MAX)
        self._settle()
        fds = self._ask("fds")
        self._stop()
        return fds, self._processes(), self._ask("files")

    def _stop(self):
        self._stand.service.order("stop")
        self._stand.service.process.wait(PATIENCE)

    def _processes(self):
        """Processes of dom0, and of the client in VMs."""
        found = self._ask("processes")
        for vm in self._stand.vms:
            found += self._stand.vm(vm, "pgrep", "-fa", "/usr/bin/qvm-remote", user="root").stdout.decode().splitlines()
        return found

    def _disturb(self, until, say):
        begun = time.monotonic()
        for number, step in enumerate(plan.steps(self._seed, list(self._stand.vms))):
            # Each turn hears what everybody says, also while nothing happens.
            due = time.monotonic() + step.pause
            while time.monotonic() < due:
                self._turn()
            now, is_first = time.monotonic(), number < _STEPS_MIN
            if now >= until and not is_first:
                return
            self._acts.do(step, spare_service=not is_first and now > begun + (until - begun) * _SPARED)
            say(f"{max(0, until - now):.0f} s left; {len(self._load.started)} commands, {self._hostile.count} attacks; {step.name}")

    def _turn(self):
        self._live()
        self._acts.undo()
        self._load.fill()
        self._load.take(0.05)
        self._hostile.listen()

    def _live(self):
        """Start the service if it has ended, as its minion does: it does not begin while it can't write."""
        said = self._stand.service.waiting_lines()
        if self._stand.service.process.poll() is None:
            return
        if not any(line.startswith(("failed", "stopped")) for line in [*said, *self._stand.service.seen]):
            self._deaths.append(f"with {self._stand.service.process.returncode}; it had said {list(self._stand.service.seen)[-3:]}")
        self._stand.start_service()

    def _unserved(self):
        """VMs whose client gets no result although nothing is disturbed any more."""
        self._load.come_back(HOSTILE_VM)
        self._hostile.tidy()
        for vm in self._stand.vms:
            self._load.start(vm, "short")
        newest = list(self._load.started)[-len(self._stand.vms) :]
        self._load.finish(_CLIENT_MAX)
        return [key.partition("-")[0] for key in newest if key not in self._load.ended or outcome(self._load.ended[key]) != RESULT]

    def _settle(self):
        """Wait until no command is on its way; say what is left if that does not come."""
        # Clients that are gone don't fetch their results, nor do attackers.
        for vm in self._stand.vms:
            self._hostile.end(vm)
        left = self._wait(self._left)
        if left:
            # Parts of requests whose clients died while they wrote them: the agent puts them away after a day, and this at once.
            self._hostile.tidy()
            cleaned = {vm: self._stand.vm(vm, "qvm-remote", "queue", "clean") for vm in HONEST_VMS}
            left = self._wait(self._left) + [f"{vm}: {done.stderr.decode()}" for vm, done in cleaned.items() if done.returncode]
        for vm in self._stand.vms:
            self._stand.clients[vm].clear()
        return left

    def _left(self):
        return [f"{place}: {what}" for place, what in self._stand.left(self._stand.vms).items() if what]

    def _more_fds(self, before):
        return self._wait(lambda: _more(collections.Counter(before).elements(), collections.Counter(self._ask("fds")).elements()))

    def _wait(self, left):
        """Wait until nothing is left of something; give what is after some time."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = left()
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.2)


def _more(before, after):
    """What is there, and was not before."""
    return sorted((collections.Counter(after) - collections.Counter(before)).elements())
