# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``ping``: the way to dom0 and back, and what dom0 says of itself, with its proof; or the first thing that is wrong."""

import time

from pullrpc import __version__
from pullrpc.errors import PullError
from pullrpc.tokens import fingerprint

from . import request as requests
from .advice import authorize_again, roots_mistake, trouble_here, trouble_on_the_way
from .main import Waiting, on_signals_give_up, prepare, reason_of
from .terminal import put, put_json

_WAIT_DEFAULT = 10
#: A clock that differs by less is called the same, seconds: clocks of VMs are set now and then only.
_SAME_CLOCK = 0.1
_SET_CLOCK = "set this qube's clock: sudo qvm-sync-clock"


def ping(queue, timeout, quiet, as_json):
    """Ask dom0 for a sign of life.

    Args:
        queue: Queue.
        timeout: int, seconds to wait; None for the default.
        quiet: bool, show no progress.
        as_json: bool.

    Returns:
        int, the exit code.

    Raises:
        PullError: what is wrong first, and what to type.
    """
    trouble = roots_mistake(queue)
    if trouble is None:
        prepare(queue, quiet)
        trouble = trouble_here(queue)
    if trouble:
        raise PullError(trouble)
    timeout = timeout or _WAIT_DEFAULT
    progress = Waiting(quiet)
    request = requests.Request(queue, "ping", b"ping", min(timeout, requests.limits(queue)["timeout_max"]), patience=timeout)
    on_signals_give_up(request, progress)
    sent, started = time.time(), time.monotonic()
    request.submit()
    try:
        # dom0 answers a ping at once, in one piece.
        result = request.wait(progress.tick, lambda part, data: None)
    except requests.NoAnswer:
        raise PullError(trouble_on_the_way(queue) or _silent(timeout)) from None
    except KeyboardInterrupt:
        # Its answer is there, for nobody.
        request.forget()
        raise
    finally:
        progress.end()
    took = time.monotonic() - started
    try:
        if not result.authentic:
            raise PullError(f"{reason_of(result) or 'the answer carries no proof from dom0'}; {authorize_again()}")
        if result.exit_code:
            raise PullError(_reason(result))
        found = _what_it_says(result.fields, fingerprint(requests.load_key(queue)), sent, took)
    finally:
        request.forget()
    put_json(found) if as_json else put(_as_text(found, requests.limits(queue)["max_age"]))
    return 0


def _silent(timeout):
    told = "dom0 holds a session to this qube, but did not answer within"
    return f"{told} {timeout} s; look into /var/log/qvm-remote/minion.log there, then, in dom0: sudo systemctl restart qvm-remote"


def _reason(result):
    """The reason of a refusal that dom0 proved."""
    reason = reason_of(result)
    return f"{reason}; {_SET_CLOCK}" if "clock" in reason else reason


def _what_it_says(fields, key, sent, took):
    """Take dom0's answer apart; what an older dom0 does not tell is None."""
    try:
        # dom0 looked at its clock somewhere between; in the middle, as far as we can know.
        ahead = float(fields["time"]) - (sent + took / 2)
    except (KeyError, ValueError):
        ahead = None
    return {
        "milliseconds": round(took * 1000, 1),
        "version": {"dom0": fields.get("version"), "qube": __version__},
        "key": key,
        "clock_ahead_seconds": None if ahead is None else round(ahead, 3),
        "clock_uncertainty_seconds": None if ahead is None else round(took / 2, 3),
    }


def _as_text(found, max_age):
    ahead, margin = found["clock_ahead_seconds"], found["clock_uncertainty_seconds"]
    if ahead is None:
        clock = "dom0 does not tell its time; update the formula"
    elif abs(ahead) <= max(margin, _SAME_CLOCK):
        clock = f"the same as dom0's, within {max(margin, _SAME_CLOCK):.1f} s"
    else:
        clock = f"dom0's is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this qube's"
        if abs(ahead) > max_age / 2:
            clock += f" (at {max_age} s it refuses what this qube asks for); {_SET_CLOCK}"
    version = found["version"]["dom0"]
    said = f"dom0 {version}, this qube {found['version']['qube']}" if version else f"this qube {found['version']['qube']}; dom0 does not tell its own"
    return f"dom0 answered in {found['milliseconds']:.0f} ms\nversion:  {said}\nkey:      {found['key']}, the one that dom0 has\nclock:    {clock}\n"
