# SPDX-License-Identifier: GPL-2.0-or-later
"""The gate: whether dom0 believes a request. Nothing runs that did not pass here, and nothing here writes or runs anything.

The checks, in order: shape, key and token, ledger (seen before?), freshness, what the VM may ask for.
The first that fails answers.
"""

from __future__ import annotations

import dataclasses
import time

from .errors import KeyringError, LedgerError, Refused, TransportError
from .ids import check_cid, cid_time
from .ledger import DELIVERED
from .policy import FULL, NONE, decide, decide_steps, split_plain, split_script
from .tokens import parse_token, token_matches
from .validate import check_command, parse_argv

#: How far dom0's clock may be behind while a VM's access has an end, in all, seconds: what keeping time by the network does.
_CLOCK_SLACK = 60
#: What a ping has for a command.
PING = "ping"


@dataclasses.dataclass(frozen=True)
class Request:
    """A request whose shape and token are right.

    Attributes:
        vm, cid: str.
        command: str.
        argv: tuple of str for the form *argv*, else None.
        form: str, one of :data:`pullrpc.tokens.FORMS`, or *steps*: a script whose lines are run one by one, without a shell.
        timeout: int, seconds.
        stdin_digest: bytes, SHA-256 of its stdin; empty when it has none.
        token_mac: bytes, which tells this request from any other.
        key: bytes, the one it was signed with; its result is signed with the same. Not part of its text.
        by: str, the policy or rule that lets it run; empty until that was looked at.
        steps: tuple of (int, tuple of str), the lines of a script that rules allow, for the form *steps*; else None.
        asks: bool, whether it runs only if dom0's user says so.
        uuid: str, the qube that asked; empty while that is not known.
    """

    vm: str
    cid: str
    command: str
    argv: tuple | None
    form: str
    timeout: int
    stdin_digest: bytes
    token_mac: bytes
    key: bytes = dataclasses.field(repr=False)
    by: str = ""
    steps: tuple | None = None
    asks: bool = False
    uuid: str = ""


def authenticate(config, accepted_keys, vm, untrusted_cid, untrusted_command, untrusted_token):
    """Check shape, key and token.

    Args:
        config: Config that holds for this VM.
        accepted_keys: callable without arguments that gives the VM's keys (list of bytes), or raises KeyringError.
        vm: str, the VM dom0 fetched the request from.
        untrusted_cid, untrusted_command, untrusted_token: bytes, as fetched.

    Returns:
        Request

    Raises:
        Refused: why it isn't believed.
    """
    cid = check_cid(untrusted_cid)
    cid_time(cid)
    command = check_command(untrusted_command, config.command_max)
    try:
        keys = accepted_keys()
    except KeyringError as err:
        raise Refused("key", f"{err}; in dom0: sudo qvm-remote-dom0 authorize --from-vm {vm}") from None
    token = parse_token(untrusted_token)
    if token.version == 1 and not config.accept_v1:
        raise Refused("token", "this is a token of qvm-remote 1.x, which dom0 does not accept from this VM; update the client")
    fitting = [key for key in keys if token_matches(key, vm, cid, token, untrusted_command)]
    if not fitting:
        raise Refused("token", "the token does not fit: wrong key, another id, or the command was changed after it was signed")
    timeout = config.timeout_max if token.timeout is None else token.timeout
    if timeout > config.timeout_max:
        raise Refused("timeout", f"a timeout of {timeout} s is over the limit of {config.timeout_max} s that dom0 sets for this VM; use -t")
    argv = parse_argv(command) if token.form == "argv" else None
    return Request(vm, cid, command, argv, token.form, timeout, token.stdin_digest, token.mac, fitting[0])


def check_new(config, ledger, request, now=None):
    """Check that a request was never run and isn't stale.

    Args:
        config: Config that holds for this VM.
        ledger: Ledger.
        request: Request.
        now: float, seconds since the epoch (default: dom0's clock).

    Returns:
        str or None: the ledger's state when this very request is on its way already (shown again after a broken session).

    Raises:
        Refused: it ran before (code ``replay``), is stale (``stale``), or the ledger can't tell (``ledger``).
    """
    try:
        seen = ledger.state(request.vm, request.cid)
        forgotten_before = ledger.forgotten_before(request.vm)
    except LedgerError as err:
        raise Refused("ledger", str(err)) from err
    if seen is not None:
        state, token_mac = seen
        if state == DELIVERED or token_mac != request.token_mac:
            raise Refused("replay", "this id was used before; nothing is ever run twice")
        return state
    age = (time.time() if now is None else now) - cid_time(request.cid)
    if abs(age) > config.max_age:
        side = "old" if age > 0 else "ahead of dom0's clock"
        raise Refused("stale", f"the request is {abs(age):.0f} s {side}, dom0 takes at most {config.max_age} s; check the clocks and send it again")
    if cid_time(request.cid) <= forgotten_before:
        raise Refused("replay", "this id is older than what dom0 remembers of this qube; send it again")
    return None


def check_policy(config, ledger, tagged, request, now=None):
    """Check that a VM may have this command run, and say as what it is run.

    Args:
        config: Config that holds for this VM.
        ledger: Ledger.
        tagged: callable, see :func:`pullrpc.policy.decide`.
        request: Request.
        now: float, seconds since the epoch (default: dom0's clock).

    Returns:
        Request, with ``by``; its line may have been read as the words of a single command.

    Raises:
        Refused: it may not (code ``policy``), its access has ended (``ended``), or dom0 can't tell (``clock``, ``ledger``, ``storage``).
    """
    if request.form == "ping":
        # Runs nothing, and tells nothing but that the key fits: no policy is asked, so that nothing else may come in this way.
        if request.command != PING:
            raise Refused("policy", f"a ping has no text but {PING}")
        if request.stdin_digest:
            raise Refused("policy", "a ping has no stdin")
        return dataclasses.replace(request, by="ping")
    if config.until:
        _check_until(config, ledger, request.vm, time.time() if now is None else now)
    policy = config.policy_in_force
    if policy == FULL:
        return dataclasses.replace(request, by=FULL)
    if policy == NONE:
        raise Refused("policy", f"dom0 lets this qube run nothing (policy: none); in dom0's pillar, qvm-remote:vms:{request.vm} gives it a policy")
    argv = steps = None
    try:
        if request.form == "script":
            steps = tuple(split_script(request.command))
            decision = decide_steps(policy, steps, tagged)
        else:
            argv = request.argv if request.form == "argv" else split_plain(request.command)
            decision = decide(policy, argv, tagged)
    except TransportError as err:
        raise Refused("storage", f"dom0 can't tell whether this qube may run that: {err}") from None
    if not decision.allowed and not decision.asks:
        raise Refused("policy", f"dom0's policy for this qube does not let it run that: {decision.reason} (in dom0: sudo qvm-remote-dom0 explain {request.vm} COMMAND)")
    return dataclasses.replace(request, argv=argv, steps=steps, form="steps" if steps else "argv", by=decision.rule, asks=decision.asks)


def _check_until(config, ledger, vm, now):
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(config.until))
    try:
        # Also when it is over: a clock that is set back after that makes it begin no second time.
        latest = ledger.saw_clock(vm, config.until, now)
    except LedgerError as err:
        raise Refused("ledger", str(err)) from err
    if latest >= config.until:
        raise Refused("ended", f"this qube's access to dom0 ended at {ended}")
    if now < latest - _CLOCK_SLACK:
        raise Refused(
            "clock",
            f"dom0's clock was set back, or held, by {latest - now:.0f} s since this qube got access until {ended}, which would make that longer; "
            "mend the clock, or grant it anew with another end",
        )
