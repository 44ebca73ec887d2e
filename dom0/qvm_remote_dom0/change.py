# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs that change something: each is a function of the execution module, called through Salt."""

import getpass
import sys

from pullrpc.errors import PullError
from pullrpc.ids import check_vm_name

from . import show
from .salt import call
from .usage import UsageError, checked

_APPLY = "then qubesctl state.apply qvm-remote"
#: A key and a newline; one byte more shows that it is too long.
_KEY_READ_MAX = 66
_RISK = """\
With this, the service starts at each boot of dom0, before anybody looks. From then on every authorized qube may command
dom0: whoever controls such a qube, or its key, controls this whole machine, within what its policy allows
(qvm-remote-dom0 keys shows it). Without it, the service is gone after a reboot until the formula is applied again.
"""


def authorize(options):
    """Store a key, from stdin or from the qube."""
    vm = checked(check_vm_name, options.vm)
    if options.key is not None:
        raise UsageError(
            "no key is taken from the command line, where process lists and shell histories have it (this one does by now: make another); "
            f"give it on stdin, or type: qvm-remote-dom0 authorize --from-vm {vm}"
        )
    if options.from_vm:
        stored = call("authorize", vm, config_dir=options.config_dir, from_vm=True)
    else:
        more = {"in_advance": True} if options.in_advance else {}
        stored = call("authorize", vm, config_dir=options.config_dir, key=_read_key(vm), **more)
    _say(f"{vm} is authorized with key {stored['fingerprint']}; it {call('access', vm, config_dir=options.config_dir)}")
    if options.from_vm and stored["known"]:
        _say(f"dom0 had this very key already; for another one: qvm-remote-dom0 rotate {vm}, or, if others may have it: qvm-remote-dom0 revoke {vm}, {_APPLY}")
    return 0


def _read_key(vm):
    if sys.stdin.isatty():
        return getpass.getpass(f"key of {vm} (64 hex digits; it is not shown): ").encode("utf-8", "surrogatepass")[:_KEY_READ_MAX]
    return sys.stdin.buffer.read(_KEY_READ_MAX)


def revoke(options):
    """Remove a key."""
    vm = checked(check_vm_name, options.vm)
    if not call("revoke", vm, config_dir=options.config_dir):
        raise PullError(f"{vm} has no key")
    _say(f"{vm} has no key any more; pillar may give it another with the next apply, unless it says there: vms: {vm}: state: absent")
    return 0


def rotate(options):
    """Change a key."""
    vm = checked(check_vm_name, options.vm)
    rotated = call("rotate", vm, config_dir=options.config_dir)
    if "problem" in rotated:
        raise PullError(rotated["problem"])
    where = "and has it" if rotated["handed"] else "and gets it when it runs next; until then the old one works"
    _say(f"{vm} has a new key {rotated['new']} (before: {rotated['old']}), {where}")
    return 0


def enable(options):
    """Have the service at each boot, once somebody has said yes to it."""
    if not options.accept_risk:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise PullError("nobody is there to be asked; a script that is to enable the service says: enable --accept-risk")
        show.put(_RISK)
        if input("Type yes to accept this: ").strip() != "yes":
            raise PullError("not enabled; nothing was changed")
    return _say_done(call("enable", accept_risk=True))


def disable(options):
    """Have no service."""
    return _say_done(call("disable"))


def _say_done(done):
    _say(done["comment"])
    _say(done["next_apply"])
    return 0


def once(options):
    """Serve what waits."""
    served = call("run_once", config_dir=options.config_dir)
    _say(*(show.table(["VM", "OUTCOME"], [[vm, text] for vm, text in sorted(served.items())]) if served else ["no qube that may ask runs"]))
    return 0 if all(text == "served" for text in served.values()) else 1


def _say(*lines):
    show.put("".join(f"{line}\n" for line in lines))
