# SPDX-License-Identifier: GPL-2.0-or-later
"""What a step of the plan does. Some last a while; each knows how it is undone."""

import subprocess
import time

from fault_stand import AUDIT, PATIENCE, STATE
from load import KILLS

RUN = "/run/qvm-remote"
_SPOOL, _NOTES, _COMMANDS = f"{STATE}/spool", f"{STATE}/handover", f"{AUDIT}/audit.log.commands"
#: dom0's small disks, outer ones first; and those of them that nobody has a file open on all the time, so that they can be made read-only.
DISKS = (STATE, _SPOOL, _NOTES, AUDIT, _COMMANDS, RUN)
_CAN_BE_READ_ONLY = (_SPOOL, _NOTES, _COMMANDS)
_QUEUE = "/home/user/.qvm-remote/queue"
#: What lasts longer than the plan says, seconds: dom0 comes back to a VM whose agent ended after a second and more.
_LONGER = {"hostile agent": 2}


class Acts:
    """Does what the plan says, as far as it can be done just now.

    Args:
        stand: FaultStand.
        load: Load.
        hostile: Hostile.
        hostile_vm: str; small_vm: str, the VM whose queue is on a small disk.

    Attributes:
        done: dict of name to int, how often it was done.
    """

    def __init__(self, stand, load, hostile, hostile_vm, small_vm):
        self._stand = stand
        self._load = load
        self._hostile = hostile
        self._hostile_vm = hostile_vm
        self._small_vm = small_vm
        # What is not as it should be, and how it becomes so again.
        self._undo = {}
        self.done = {}

    def prepare(self):
        """Put what is needed into the VMs."""
        self._mount_queue()
        for vm in self._stand.vms:
            self._hostile.begin(vm)

    def do(self, step, spare_service):
        """Do a step.

        Args:
            step: Step.
            spare_service: bool, leave the service as it is.
        """
        if step.name.startswith("service") and spare_service:
            return
        try:
            undo = _DOES[step.name](self, step)
        except subprocess.CalledProcessError:
            # A disk that is just being written to is not made read-only.
            return
        if undo is _NOTHING:
            return
        self.done[step.name] = self.done.get(step.name, 0) + 1
        if undo is not None:
            what, how = undo
            self._undo[what] = (time.monotonic() + step.seconds + _LONGER.get(step.name, 0), how)

    def undo(self, everything=False):
        """Undo what has lasted long enough."""
        now = time.monotonic()
        for what, (until, how) in list(self._undo.items()):
            if everything or until <= now:
                del self._undo[what]
                how()

    def _kill(self, who, step):
        if step.vm in self._undo or (who in ("agent", "client", "vm") and step.vm == self._hostile_vm):
            return _NOTHING
        if who == "vm":
            self._go(step.vm)
        KILLS[who](self._stand, self._load, step.vm)
        if who == "vm":
            self._come(step.vm)
        return None

    def _restart(self, _):
        if self._stand.service.process.poll() is None:
            self._stand.service.order("stop")
            self._stand.service.process.wait(PATIENCE)
        self._stand.start_service()

    def _go(self, vm):
        self._hostile.end(vm)
        self._undo.pop(f"queue of {vm}", None)

    def _come(self, vm):
        if vm == self._small_vm:
            self._mount_queue()
        self._hostile.begin(vm)
        self._load.come_back(vm)

    def _halt(self, step):
        vm = step.vm
        if vm in self._undo or vm == self._hostile_vm:
            return _NOTHING
        self._go(vm)
        self._load.leave(vm)
        self._stand.halt(vm)
        self._load.forget(vm)

        def start():
            self._stand.boot(vm)
            self._come(vm)

        return vm, start

    def _pause(self, step):
        vm = step.vm
        if vm in self._undo or vm == self._hostile_vm:
            return _NOTHING
        # Whoever told it of a new client would wait for it.
        self._load.leave(vm)
        self._stand.pause(vm)

        def unpause():
            self._stand.unpause(vm)
            self._load.come_back(vm)

        return vm, unpause

    def _fill(self, step):
        path = DISKS[step.number % len(DISKS)]
        if path in self._undo:
            return _NOTHING
        self._stand.fill(path)
        return path, lambda: self._stand.free(path)

    def _read_only(self, step):
        path = _CAN_BE_READ_ONLY[step.number % len(_CAN_BE_READ_ONLY)]
        if path in self._undo:
            return _NOTHING
        self._stand.make_read_only(path)
        return path, lambda: self._stand.make_read_only(path, on=False)

    def _fill_queue(self, _):
        vm = self._small_vm
        what = f"queue of {vm}"
        if what in self._undo or vm in self._undo:
            return _NOTHING
        self._stand.fill(_QUEUE, vm)
        return what, lambda: self._stand.free(_QUEUE, vm)

    def _mount_queue(self):
        """Have the queue of a VM on a small disk. No client is there at that time."""
        vm = self._small_vm
        uid = self._stand.vm(vm, "sh", "-c", f"mkdir -p {_QUEUE}; id -u", check=True).stdout.decode().strip()
        self._stand.in_vms_root(vm, "mount", "-t", "tmpfs", "-o", f"size=16m,mode=700,uid={uid},gid={uid}", "tmpfs", _QUEUE)
        # Its agent makes the folders when it begins.
        KILLS["agent"](self._stand, self._load, vm)

    def _be_agent(self, step):
        if "agent" in self._undo:
            return _NOTHING
        self._hostile.be_agent(step.number)

        def be_itself():
            if not self._hostile.is_met():
                # The service may have been away: dom0 has met nobody.
                self.done[step.name] -= 1
            self._hostile.be_itself()

        return "agent", be_itself

    def _attack(self, how, step):
        if step.vm in self._undo:
            return _NOTHING
        return _NOTHING if how(step) is False else None


_NOTHING = object()
_DOES = {
    "service killed": lambda acts, step: acts._kill("service", step),
    "service stopped and started": Acts._restart,
    "agent killed": lambda acts, step: acts._kill("agent", step),
    "qvm-run killed": lambda acts, step: acts._kill("qvm-run", step),
    "client killed": lambda acts, step: acts._kill("client", step),
    "VM killed": lambda acts, step: acts._kill("vm", step),
    "VM halted": Acts._halt,
    "VM paused": Acts._pause,
    "dom0's disk full": Acts._fill,
    "dom0's disk read-only": Acts._read_only,
    "VM's disk full": Acts._fill_queue,
    "hostile agent": Acts._be_agent,
    "forged request": lambda acts, step: acts._attack(lambda step: acts._hostile.forge(step.vm, step.number), step),
    "signed request replayed": lambda acts, step: acts._attack(lambda step: acts._hostile.replay(step.vm, step.number), step),
    "another VM's request": lambda acts, step: acts._attack(lambda step: acts._hostile.cross(step.number), step),
}
