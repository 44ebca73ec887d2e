# SPDX-License-Identifier: GPL-2.0-or-later
"""The real service as a process of its own in dom0, without Salt around it, which can be held at a chosen step of a command's
life: for what happens if it, or whoever it works with, dies right there. Run there by fault_stand.

    service_process.py SETTINGS [STEP]

Orders come on stdin, a line each, and what happens is told on stdout (see the dict at the end). Only this process is changed: what
is tested knows of no steps.
"""

import contextlib
import functools
import json
import os
import signal
import sqlite3
import sys
import threading
import time

import pullrpc.dom0
import pullrpc.duplex
import pullrpc.execution
import pullrpc.intake
import pullrpc.ledger
import pullrpc.puller
import pullrpc.results
import pullrpc.sandbox
import pullrpc.sandbox_slots
import pullrpc.scheduler
import pullrpc.spool
from pullrpc.config import make_config
from pullrpc.errors import PullError, Refused
from pullrpc.keyring import Keyring
from pullrpc.service import Service
from pullrpc.session import Session

#: What every command of a test writes to: a line for each time it beats.
RAN = "/var/tmp/ran"


def _asks(op, **has):
    """Fits a request to the agent."""

    def fits(duplex, request, *_, **__):
        return request["op"] == op and all((name in request) is wanted for name, wanted in has.items())

    return fits


def _always(*_, **__):
    return True


#: Step to where it is (owner, function, before or after it, which of its calls).
STEPS = {
    "queued": (pullrpc.duplex.Duplex, "_on_readable", "before", _always),
    "fetched": (pullrpc.puller.Puller, "_take_in", "before", lambda puller, items, cancels: bool(items)),
    "kept": (pullrpc.intake.Intake, "admit", "after", _always),
    "stdin": (pullrpc.spool.StdinWriter, "close", "before", _always),
    "claiming": (pullrpc.ledger.Ledger, "claim_all", "before", _always),
    "claimed": (pullrpc.ledger.Ledger, "claim_all", "after", _always),
    "submitted": (pullrpc.scheduler.FairPool, "submit", "after", _always),
    "starting": (pullrpc.ledger.Ledger, "start", "before", _always),
    "started": (pullrpc.ledger.Ledger, "start", "after", _always),
    "running": (pullrpc.sandbox, "start", "after", _always),
    "telling": (pullrpc.duplex.Duplex, "ask", "before", _asks("take")),
    "told": (pullrpc.duplex.Duplex, "ask", "after", _asks("take")),
    "streamed": (pullrpc.duplex.Duplex, "ask", "after", _asks("put", mac=True)),
    "ended": (pullrpc.sandbox.Handle, "wait", "after", _always),
    "proven": (pullrpc.spool.Spool, "store_text", "after", lambda spool, vm, cid, part, data: part == pullrpc.spool.META),
    "finishing": (pullrpc.ledger.Ledger, "finish", "before", _always),
    "done": (pullrpc.ledger.Ledger, "finish", "after", _always),
    "delivering": (pullrpc.duplex.Duplex, "ask", "before", _asks("result")),
    "half-delivered": (pullrpc.duplex.Duplex, "ask", "after", _asks("put", mac=False)),
    "sent": (pullrpc.duplex.Duplex, "ask", "after", _asks("result")),
    "answered": (pullrpc.results.Results, "close_deliveries", "before", _always),
    "delivered": (pullrpc.ledger.Ledger, "delivered", "after", _always),
    "closed": (pullrpc.results.Results, "close_deliveries", "after", _always),
    # Of the start after an end that came too soon.
    "recovering": (pullrpc.ledger.Ledger, "unfinished", "after", _always),
    "interrupting": (pullrpc.execution.Execution, "_finish_without_run", "before", _always),
    "recovered": (pullrpc.spool.Spool, "sweep", "after", _always),
}


def _names_in(value):
    """The VMs that a call is about, by what it is given and by whose method it is."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _names_in(one)
    else:
        yield getattr(value, "vm", getattr(value, "_vm", None))


def _name_parts():
    """Have those know their VM that are made for one and are not told so."""
    start, open_session = pullrpc.sandbox.start, Session.open.__func__

    @functools.wraps(start)
    def start_of(job, *args, **kwargs):
        handle = start(job, *args, **kwargs)
        handle.vm = job.vm
        return handle

    async def open_of(cls, config, vm):
        session = await open_session(cls, config, vm)
        session._duplex.vm = vm
        return session

    pullrpc.sandbox.start, Session.open = start_of, classmethod(open_of)


class _Hold:
    """Stops whoever comes to the step that is wanted, with a command of the VM that is wanted, once, until it is let go."""

    def __init__(self):
        self.wanted = self.vm = None
        self._go = threading.Event()

    def want(self, order):
        """Be told what to stop at: a step, and perhaps a VM."""
        step, _, vm = order.partition(" ")
        self.wanted, self.vm = None, vm
        self.wanted = step

    def reached(self, step, args):
        if step != self.wanted or (self.vm and self.vm not in _names_in(args)):
            return
        self.wanted = None
        self._go.clear()
        say(f"at {step}")
        self._go.wait()

    def let_go(self, _):
        self._go.set()


def _watch(hold, step, owner, name, when, fits):
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args, **kwargs):
        is_meant = fits(*args, **kwargs)
        if is_meant and when == "before":
            hold.reached(step, args)
        outcome = original(*args, **kwargs)
        if is_meant and when == "after":
            hold.reached(step, args)
        return outcome

    setattr(owner, name, watched)


def say(text):
    """Tell whoever runs the test."""
    os.write(1, text.encode("utf-8") + b"\n")


def _verify(dom0, vm, cid, command, token):
    try:
        dom0.intake.verify(vm, cid.encode("ascii"), command, token)
    except Refused as refused:
        return {"verified": False, "code": refused.code, "reason": str(refused)}
    return {"verified": True}


def _look(dom0, _):
    """What there is of open commands in dom0."""
    config = dom0.config
    kept = sorted(os.path.join(folder, name) for folder, _, names in os.walk(os.path.join(config.state_dir, "spool")) for name in names)
    working = []
    jobs = os.path.join(config.run_dir, "jobs")
    # A standing supervisor has a folder, and in it one for each command. Another one is of a service that died.
    for slot in os.listdir(jobs):
        path = os.path.join(jobs, slot)
        with contextlib.suppress(FileNotFoundError):
            working += os.listdir(path) if path in pullrpc.sandbox_slots.folders() else [slot]
    try:
        # By the connection that is there: one of our own would leave files open, as long as that one holds its locks.
        with dom0.ledger._lock:
            rows = dom0.ledger._db.execute("SELECT vm, cid, state, status FROM command WHERE state <> 'delivered'").fetchall()
    except sqlite3.Error as err:
        rows = str(err)
    say(json.dumps({"spool": kept, "jobs": working, "ledger": rows}))


def _ran(_):
    with open(RAN, "a+", encoding="ascii") as file:
        file.seek(0)
        say(json.dumps(file.read().splitlines()))


def _kill_session(_, vm):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"/qvm-run") for word in words) and vm.encode("ascii") in words:
            os.kill(int(pid), signal.SIGKILL)
            say("killed")
            return
    say("nothing to kill")


def _rotate(dom0, vm):
    try:
        dom0.access.rotate(vm)
        say("rotated")
    except PullError as err:
        say(f"rotated not: {err}")


def _hand(dom0, vm):
    """Have the new key as the VM's, as if it had been seen there."""
    dom0.keyring.handed(vm, dom0.keyring.staged(vm))
    say("handed")


def _align_audit(dom0, _, block=4096):
    """Have the audit log end with a block of the disk, so that there is no room left in that when the disk is full."""
    path, padding = dom0.config.audit_log, 0
    while True:
        before = os.path.getsize(path)
        dom0.audit.write("padding", "-", note="x" * padding)
        size = os.path.getsize(path)
        if size % block == 0:
            break
        length = size - before - padding
        padding = -size % block - length
        padding += block if padding < 0 else 0
    say("aligned")


def _age_ledger(dom0, _):
    """Have the ledger as old as one that was not made for this test."""
    dom0.ledger._db.execute("UPDATE forgotten SET before = 0")
    say("aged")


def _ledger_read_only(dom0, on):
    """Have SQLite refuse to write, as it does on a disk that has become read-only under it: no such disk can be made of one in use."""
    with dom0.ledger._lock:
        dom0.ledger._db.execute(f"PRAGMA query_only = {on}")
    say(f"ledger read-only {on}")


def _set_clock(_, seconds, real=time.time):
    time.time = lambda: real() + float(seconds)
    say(f"clock {seconds}")


def main():
    """Serve until told to stop."""
    settings = json.loads(sys.argv[1])
    hold = _Hold()
    _name_parts()
    for step, place in STEPS.items():
        _watch(hold, step, *place)
    hold.want(sys.argv[2] if len(sys.argv) > 2 else "")
    for vm in settings["vms"]:
        if not Keyring(make_config(settings).key_dir).exists(vm):
            Keyring(make_config(settings).key_dir).put(vm, os.urandom(32).hex())
    dom0 = pullrpc.dom0.shared(settings)
    service = Service(
        dom0,
        functools.partial(_verify, dom0),
        dom0.execution.execute,
        lambda vm, cid, what, data: say(f"{what} {vm} {cid}"),
        lambda text: say(f"log {text}"),
    )
    orders = {
        "hold": hold.want,
        "go": hold.let_go,
        "die": lambda _: os.kill(os.getpid(), signal.SIGKILL),
        "stop": lambda _: service.stop(),
        "look": functools.partial(_look, dom0),
        "ran": _ran,
        "kill-session": functools.partial(_kill_session, dom0),
        "hand": functools.partial(_hand, dom0),
        "rotate": functools.partial(_rotate, dom0),
        "align-audit": functools.partial(_align_audit, dom0),
        "age-ledger": functools.partial(_age_ledger, dom0),
        "ledger-read-only": functools.partial(_ledger_read_only, dom0),
        "clock": functools.partial(_set_clock, dom0),
    }

    def listen():
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            orders[word](rest)

    threading.Thread(target=listen, daemon=True).start()
    try:
        service.run()
        say("stopped")
    except PullError as err:
        say(f"failed {err}")


main()
