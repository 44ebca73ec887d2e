# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs of ``qvm-remote-dom0`` and their options, as data: of this the parser, its help, and whatever describes the command are made."""

import dataclasses

from pullrpc.outcomes import OUTCOMES

PROGRAM = "qvm-remote-dom0"
SUMMARY = "Manage in dom0 which qubes may command it, and see what they had it do."
EXIT_CODES = "exit codes: 0 done; 1 it failed, was refused, or something is wrong; 2 wrong usage; 130 interrupted; 141 the reader of the output went away"


@dataclasses.dataclass(frozen=True)
class Option:
    """An option, or a word that a verb takes.

    Attributes:
        names: tuple of str: ``-n``, ``--limit``; one name without dashes for a word.
        text: str, what it does.
        metavar: str, what its value is called; empty for an option without one.
        default: its value when it is not given; an int where the value is a number.
        count: str, as argparse's ``nargs`` for a word: ``?`` may be missing, ``...`` all that follows; empty for just one.
        hidden: bool, whether it is only there to be refused with a reason.
    """

    names: tuple
    text: str
    metavar: str = ""
    default: object = None
    count: str = ""
    hidden: bool = False


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb.

    Attributes:
        name: str.
        text: str, what it does, in one line.
        options: tuple of Option, words first.
        function: str, the function of the execution module that does the same by qubesctl; empty where there is none.
        more: str, what else a reader of its help should know.
    """

    name: str
    text: str
    options: tuple = ()
    function: str = ""
    more: str = ""


_VM = Option(("vm",), "the qube's name", "VM")
_ANY_VM = Option(("vm",), "of this qube only", "VM", count="?")
_JSON = Option(("--json",), "as JSON, for programs")

#: Options without a verb, as qvm-remote 1.x has them.
OPTIONS = (
    Option(("--once",), "without the service: serve what waits in the queues of running qubes now, once"),
    Option(("--dry-run",), "with --once: say what would be run; nothing is taken, run or changed"),
    Option(("--config-dir",), "where the service's configuration lies (default: /etc/qubes/remote)", "DIR", "/etc/qubes/remote"),
    Option(("--version",), "show the version"),
)
VERBS = (
    Verb(
        "authorize",
        "store a qube's key: dom0 knows it then, and runs for it what pillar lets it",
        (
            _VM,
            Option(("key",), "", "KEY", count="?", hidden=True),
            Option(("--from-vm",), "fetch the key from the qube, where 'qvm-remote key gen' made it"),
            Option(("--in-advance",), "there is no such qube yet: the key is for the first one that gets this name"),
        ),
        "authorize",
        "The key is read from stdin; on a terminal it is asked for, and not shown. It is never taken from the command line, where\n"
        "process lists and shell histories would have it. With pillar (vms: NAME) dom0 makes and hands over keys by itself.",
    ),
    Verb("revoke", "remove a qube's key: from then on all that it asks for is refused; what runs is not stopped", (_VM,), "revoke"),
    Verb("rotate", "give a qube a new key, without losing a command", (_VM,), "rotate"),
    Verb("keys", "list who has a key: fingerprints, what was last seen of it in the qube, what that qube may run", (_ANY_VM, _JSON), "keys"),
    Verb(
        "enable",
        "have the service run, now and from each boot on",
        (Option(("--accept-risk",), "for scripts: do not ask"),),
        "enable",
        "Asks for a typed yes. Says what the next state.apply does to it: pillar has the last word.",
    ),
    Verb("disable", "stop the service, and have it come back at no boot", (), "disable", "Says what the next state.apply does to it."),
    Verb(
        "status",
        "show the qubes: session and its age, key, policy, counts, times, the last command",
        (_ANY_VM, Option(("--watch",), "as a table on the terminal that is kept up to date, until Ctrl-C"), _JSON),
        "status",
    ),
    Verb(
        "tail",
        "follow the audit log, until Ctrl-C",
        (_ANY_VM, Option(("-n", "--lines"), "begin with so many old lines (default: 10)", "N", 10), _JSON),
        "audit",
    ),
    Verb(
        "history",
        "list commands, one row for each",
        (
            _ANY_VM,
            Option(("--since",), "not older: 2026-11-24, 2026-11-24T18:00:00Z, or 15m, 2h, 7d for so long ago", "TIME"),
            Option(("--until",), "not younger; as for --since", "TIME"),
            Option(("--outcome",), f"{', '.join(OUTCOMES)}, or an exit code", "WORD"),
            Option(("-n", "--limit"), "at most so many, the newest ones (default: 20)", "N", 20),
            _JSON,
        ),
        "history",
    ),
    Verb(
        "explain",
        "could a qube have a command run now, and by which rule of its policy (exit code 1 if not)",
        (
            _VM,
            Option(("command",), "the command line; several words are joined by spaces", "COMMAND", count="..."),
            Option(("--exec",), "the words are exactly the arguments, as with qvm-remote --exec"),
            _JSON,
        ),
        "explain",
        "Options go before VM.",
    ),
    Verb("doctor", "examine the whole installation, and say what to type where something is wrong (exit code 1 then)", (_JSON,), "doctor"),
)
