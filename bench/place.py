# SPDX-License-Identifier: GPL-2.0-or-later
"""Where it is measured: a simulated machine with the formula applied, and a probe in each domain that is measured in.

Brought into each state that a scenario needs by what a user has: pillar, ``state.apply``, qvm-start, systemctl. Nothing here knows
how the engine works.
"""

import os
import subprocess
import time

import machine
from probes import Probe
from qubes_sim.stand import Stand
from ssh import SshServer, SshUnavailable

#: The VM that has a session, and the one that is served without the agent.
WORK, POLL = "work", "poll"
#: Files of what is sent: in dom0, in VMs and on the host alike.
BLOB, BLOB_SIZE, SCRIPT, SCRIPT_SIZE = "bench-blob", 10 << 20, "bench-script", 1 << 20
#: The engine's own interval without the agent is its default, and this one is qvm-remote 1.x's, seconds.
POLL_INTERVAL = 1
_TEMPLATE = "debian-13"
_CONNECT_WAIT = 240
#: What a running VM may need, with the programs on both sides of its session, and what is to be left, bytes.
_VM_MEMORY, _SPARE_MEMORY = 60 << 20, 2 << 30
_MAKE_FILES = f"""\
head -c {BLOB_SIZE} /dev/urandom > "$1/{BLOB}"
{{ echo true; head -c {SCRIPT_SIZE} /dev/zero | tr '\\0' '#' | fold -w 79; }} | head -c {SCRIPT_SIZE} > "$1/{SCRIPT}"
"""


class Place:
    """A machine to measure on.

    Args:
        folder: str, of its own.
        size: Size.
        say: callable of str, told what is done.
    """

    def __init__(self, folder, size, say):
        self.stand = Stand(os.path.join(folder, "sim"), template=_TEMPLATE, vms=[WORK, POLL], say=say)
        self.size = size
        self.say = say
        #: What was left out, and why: list of str.
        self.notes = []
        self.folder = folder
        #: None where there is no OpenSSH.
        self.ssh = None
        self._probes = {}
        self._interval = POLL_INTERVAL
        self._events = "ends"
        self._transport = "qvm-run"
        self._costs = False
        self._fleet = []
        self._running = []
        #: VMs that were seen to be served since the last change.
        self._served = set()

    def set_up(self):
        """Bring all up but the service: its first start is measured, too."""
        self.stand.set_up(self._pillar(running=False))
        self.stand.shutdown(POLL)
        subprocess.run(["/bin/bash", "-c", _MAKE_FILES, "-", self.folder], check=True)
        self.stand.dom0("/bin/bash", "-c", _MAKE_FILES, "-", "/root", check=True)
        self.stand.vm(WORK, "/bin/bash", "-c", _MAKE_FILES, "-", "/home/user", check=True)
        self.say("host: an OpenSSH server on loopback")
        try:
            self.ssh = SshServer()
        except SshUnavailable as err:
            self.notes.append(f"no rows of ssh: {err}")

    def close(self):
        """End everything."""
        for probe in self._probes.values():
            probe.close()
        if self.ssh is not None:
            self.ssh.close()
        self.stand.down()

    def probe(self, where):
        """The probe in a domain, or on the host.

        Args:
            where: str, ``host``, ``dom0`` or a VM that runs.

        Returns:
            Probe
        """
        if where not in self._probes:
            self._probes[where] = Probe(self._starter(where))
        return self._probes[where]

    def start_service(self):
        """Start the service."""
        self.stand.dom0("systemctl", "start", "qvm-remote.service", check=True)

    def stop_service(self):
        """Stop the service."""
        self._served.clear()
        self.stand.stop_engine()

    def serve(self, polled=None, events="ends", transport="qvm-run"):
        """Have the service run, and serve WORK in a session; serve POLL without the agent, or not at all.

        Args:
            polled: int, the interval in seconds; 0 for the default; None for not at all.
            events: str, which of them the engine fires.
            transport: str, by which it reaches VMs.
        """
        wanted = (self._interval if polled is None else polled, events, transport)
        if wanted != (self._interval, self._events, self._transport):
            self._interval, self._events, self._transport = wanted
            self._apply()
        self.start_service()
        if polled is None:
            if POLL in self._probes:
                self._probes.pop(POLL).close()
                self.stand.shutdown(POLL)
                self._served.discard(POLL)
            self._await({WORK: "agent"})
        else:
            self.stand.start(POLL)
            self._await({WORK: "agent", POLL: "agentless"})

    def set_costs(self, real):
        """Have dom0's tools cost what the real ones do, or nothing of it.

        Args:
            real: bool.
        """
        if real != self._costs:
            self.stand.set_real_costs(real)
            self._costs = real

    def have_fleet(self, running):
        """Have all VMs of the fleet, authorized, and so many VMs running and connected; WORK is one of them.

        Args:
            running: int; never less than before.

        Returns:
            list of str, the running ones.
        """
        if not self._fleet:
            room = (machine.memory("MemAvailable") - _SPARE_MEMORY) // _VM_MEMORY
            most = max(1, min(self.size.most, room))
            if most < self.size.most:
                self.notes.append(f"{most} VMs instead of {self.size.most}: there is not more memory")
            self._fleet = [f"fleet-{number:03}" for number in range(self.size.most)]
            self._most = most
            self.say(f"making {len(self._fleet)} VMs")
            self.stand.create(*(f"{vm}:{_TEMPLATE}" for vm in self._fleet))
            self._apply()
        new = self._fleet[len(self._running) : min(running, self._most) - 1]
        costs = self._costs
        # The programs of their sessions stay, and are measured.
        self.set_costs(True)
        if new:
            self.say(f"starting {len(new)} VMs")
            self.stand.start(*new)
            self._running += new
        self.serve()
        self.await_fleet()
        self.set_costs(costs)
        return [WORK, *self._running]

    def await_fleet(self):
        """Wait until all of it that runs is served."""
        self._await(dict.fromkeys((WORK, *self._running), "agent"))

    def begin_anew(self):
        """Have WORK start again, and with it its session."""
        if WORK in self._probes:
            self._probes.pop(WORK).close()
        self.stand.shutdown(WORK)
        self.stand.start(WORK)
        # Until the engine has seen that it was gone, its status is of the old session.
        self.stand.vm(WORK, "qvm-remote", "-n", "true", check=True)
        self._served.discard(WORK)

    def _pillar(self, running=True):
        engine = {"events": self._events, **({"agentless_interval": self._interval} if self._interval else {})}
        vms = {WORK: {}, POLL: {"accept_v1": True}, **{vm: {} for vm in self._fleet}}
        return {"service": {"running": running}, "transport": self._transport, "engine": engine, "vms": vms}

    def _apply(self):
        self.say("dom0: qubesctl state.apply qvm-remote")
        costs = self._costs
        # What an apply costs is measured elsewhere: make bench-fleet.
        self.set_costs(False)
        self._served.clear()
        self.stand.set_pillar({"client": {"templates": [_TEMPLATE]}, **self._pillar()})
        self.stand.salt("state.apply", "qvm-remote", timeout=600)
        self.set_costs(costs)

    def _await(self, kinds):
        """Wait until each of some VMs is served as it should be."""
        deadline = time.monotonic() + _CONNECT_WAIT
        while not self._served >= set(kinds):
            sessions = self.stand.salt("qvm_remote.status")["sessions"]
            self._served = {vm for vm, kind in kinds.items() if sessions.get(vm) == kind}
            if time.monotonic() > deadline:
                raise RuntimeError(f"not served: {sorted(set(kinds) - self._served)}")

    def _starter(self, where):
        if where == "host":
            return lambda *argv, **options: subprocess.Popen(argv, **options)
        if where == "dom0":
            return self.stand.popen_dom0
        return lambda *argv, **options: self.stand.popen_vm(where, *argv, **options)
