# SPDX-License-Identifier: GPL-2.0-or-later
"""Our own commands, each in a module of its own that is loaded when it is called for."""

from pullrpc.errors import PullError
from pullrpc.layout import Queue


def run(words, options):
    """Run one of our own commands.

    Args:
        words: list of str; the first is reserved.
        options: what stood before it on the command line: attributes ``quiet`` (bool) and ``timeout`` (int or None).

    Returns:
        int, the exit code.

    Raises:
        PullError: bad usage, or it can't be done.
    """
    if words == ["agent"]:
        from .agent import Agent

        return Agent(Queue()).serve()
    from .usage import parse

    if words[0] == "help" and words[1:] not in (["-h"], ["--help"]):
        words = [*words[1:], "--help"]
    command, values = parse(words)
    if command is None:
        from .terminal import put

        put(values["help"])
        return 0
    if command.words == ("agent",):
        raise PullError("agent takes no option; it is started by dom0 alone")
    quiet = options.quiet or "quiet" in values
    return _BY_NAME[command.words[0]](Queue(), command.words[-1], values, quiet, options.timeout)


def _key(queue, action, values, quiet, timeout):
    from .keys import run as run_key

    return run_key(queue, action, values, quiet)


def _ping(queue, action, values, quiet, timeout):
    from .main import seconds_of
    from .ping import ping

    return ping(queue, seconds_of(values["timeout"]) if "timeout" in values else timeout, quiet, "json" in values)


def _status(queue, action, values, quiet, timeout):
    from .status import status

    return status(queue, "json" in values)


def _queue(queue, action, values, quiet, timeout):
    from .leftovers import run as run_queue

    return run_queue(queue, action, values, quiet)


def _log(queue, action, values, quiet, timeout):
    from .journal import show

    show(queue, values.get("N", 20))
    return 0


def _history(queue, action, values, quiet, timeout):
    from .history import print_list, print_one

    if action == "show":
        print_one(queue, values)
    else:
        print_list(queue, values.get("N", 10), "json" in values)
    return 0


def _cancel(queue, action, values, quiet, timeout):
    from .cancel import cancel

    cancel(queue, values["ID"], quiet)
    return 0


_BY_NAME = {"key": _key, "ping": _ping, "status": _status, "queue": _queue, "log": _log, "history": _history, "cancel": _cancel}
