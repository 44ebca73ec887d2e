# SPDX-License-Identifier: GPL-2.0-or-later
"""The words of ``qvm-remote``: its commands, options and exit codes, as data. Help, parser, completion and man page are made from it.

To import it does nothing else. The command line of a command for dom0 is read without it (``main``): that has to start fast.
"""


class Option:
    """An option.

    Attributes: flags (tuple of str), value (str, the name of what it takes; empty for a switch), help (str).
    """

    __slots__ = ("flags", "help", "value")

    def __init__(self, flags, help, value=""):
        self.flags = tuple(flags.split())
        self.value = value
        self.help = help

    @property
    def name(self):
        """What it is called in a parsed command line: its long form without dashes."""
        return self.flags[-1].lstrip("-")


class Argument:
    """An argument of a command.

    Attributes: name (str, in capitals), help (str), is_needed (bool), kind (str: ``number``, ``id`` or ``word``).
    """

    __slots__ = ("help", "is_needed", "kind", "name")

    def __init__(self, name, kind, help, is_needed=False):
        self.name = name
        self.kind = kind
        self.help = help
        self.is_needed = is_needed


class Command:
    """A command of ours, which is not sent to dom0.

    Attributes: words (tuple of str, how it is called), summary (str, a line), arguments (tuple of Argument),
        options (tuple of Option), notes (str, sentences, one a line), is_internal (bool, not for people).
    """

    __slots__ = ("arguments", "is_internal", "notes", "options", "summary", "words")

    def __init__(self, words, summary, arguments=(), options=(), notes="", is_internal=False):
        self.words = tuple(words.split())
        self.summary = summary
        self.arguments = arguments
        self.options = options
        self.notes = notes
        self.is_internal = is_internal


SUMMARY = "run a command in dom0 from a qube, as ssh runs one on another machine"

#: How a command for dom0 is written: (arguments, what that does).
FORMS = (
    ("[OPTIONS] COMMAND [ARG...]", "run a command line in dom0"),
    ("[OPTIONS] < script.sh", "run a script in dom0"),
    ("[OPTIONS] -s ARG... < script.sh", "the same, with arguments"),
    ("[OPTIONS] --exec PROGRAM ARG...", "exactly these arguments, no shell"),
)

NOTES = """\
COMMAND and ARGs are joined by spaces and read by dom0's bash, so quote for two shells, or use --exec.
With COMMAND, stdin goes to the command (unless it is a terminal). It is read to its end, 16 MiB at most, before the
command is sent: close it, or give -n, which sends none. The command gets no terminal: nothing interactive.
"""

#: Options before a command for dom0; those of ``COMMON`` are taken by our own commands as well.
OPTIONS = (
    Option("-t --timeout", "let it run SEC seconds (default 300, or dom0's limit for this qube)", "SEC"),
    Option("-n", "send no stdin"),
    Option("-s", "read the script from stdin, ARGs are its $1, $2..."),
    Option("--exec", "pass the argument vector as it is"),
    Option("-q --quiet", "no notes of qvm-remote's own on stderr, errors only"),
    Option("-v --verbose", "say on stderr what happens, with times"),
    Option("--version", "print the version"),
    Option("-h --help", "print this text; after a command, its own"),
)
COMMON = ("-q", "--quiet", "-v", "--verbose", "-h", "--help")

_JSON = Option("--json", "print JSON")
#: As qvm-remote 1.x has it.
_COUNT = Option("-n", "the same as N", "N")
_FORCE = Option("--force", "replace the key that is there; dom0 then has to authorize the new one")
_ID = "the whole id, or its last eight characters"
_ON_A_TERMINAL = "On a terminal control characters are shown escaped (\\x1b); into a file or a pipe every byte goes as it is."

COMMANDS = (
    Command("key gen", "make a new key for this qube", options=(_FORCE,), notes="The key is not shown, its fingerprint is."),
    Command(
        "key show",
        "print the key itself",
        options=(Option("--secret", "don't ask: print it, into a pipe as well"),),
        notes="Whoever has the key can do in dom0 what this qube can. On a terminal it asks before it shows the key.",
    ),
    Command(
        "key import",
        "read a key (64 hex digits) from stdin",
        options=(_FORCE,),
        notes="A key is never taken as an argument: others can read those. On a terminal it is asked for, and not shown.",
    ),
    Command("key fingerprint", "print the name of this qube and its key's fingerprint, which gives nothing away"),
    Command(
        "ping",
        "measure the way to dom0 and back; compare keys, versions and clocks",
        options=(Option("-t --timeout", "wait SEC seconds (default 10)", "SEC"), _JSON),
        notes="What it says of dom0 comes with dom0's proof. If something is wrong, it says what is first, and what to type.",
    ),
    Command(
        "status",
        "is there a key, a session to dom0, something waiting",
        options=(_JSON,),
        notes="Sends nothing and changes nothing. Exits with 1 if something is wrong, and says what.",
    ),
    Command("queue status", "what waits and runs, and whether its client still does", options=(_JSON,), notes="The same: queue."),
    Command(
        "queue clean",
        "put away what clients left that are gone",
        notes="Requests that nobody waits for are taken back and cancelled in dom0; results that nobody fetched go to the history,\n"
        "with as much of the command as the log has.\n"
        "What a client waits for is never touched.",
    ),
    Command("queue debug", "everything that lies in the queue, for a report of a problem", notes="Shows commands, but neither keys nor tokens."),
    Command("queue make", "put this user's queue in order"),
    Command("queue check", "say what is wrong with this user's queue; exits with 1 if something is"),
    Command(
        "log",
        "the last N lines of the log: one for what was asked for, and one for how it ended",
        arguments=(Argument("N", "number", "how many (default 20)"),),
        options=(_COUNT,),
        notes=_ON_A_TERMINAL,
    ),
    Command(
        "history",
        "the last N commands, the newest first, and how they ended",
        arguments=(Argument("N", "number", "how many (default 10)"),),
        options=(_COUNT, _JSON),
        notes="Kept for 30 days. What qvm-remote 1.x kept is shown as well, and stays.",
    ),
    Command(
        "history show",
        "a command, its output, and whether dom0's proof fits it",
        arguments=(Argument("ID", "id", f"{_ID}; without it, the last command"),),
        options=(
            Option("--command", "only the command"),
            Option("--out", "only what it wrote to stdout"),
            Option("--err", "only what it wrote to stderr"),
            _JSON,
        ),
        notes=_ON_A_TERMINAL,
    ),
    Command(
        "cancel",
        "have dom0 kill a command of this qube",
        arguments=(Argument("ID", "id", f"{_ID}; queue status shows those that wait or run", is_needed=True),),
        notes="The client that waits for it ends with 125. If dom0 is not connected, it is told as soon as it is.",
    ),
    Command("help", "print help, of a command if one is named", arguments=(Argument("COMMAND", "word", "one of these commands, in one or two words"),)),
    Command("agent", "answers dom0; started by dom0 alone", is_internal=True),
)

#: What is meant when only the first word of a command is given.
DEFAULTS = {"queue": "status"}

EXIT_CODES = (
    ("0 to 255", "the command's own"),
    ("128+N", "signal N killed it; 141: the reader of the output went away"),
    ("124", "it ran into its timeout"),
    ("125", "qvm-remote refused or failed, and says why"),
    ("130", "interrupted here; the command in dom0 is killed"),
)


def reserved():
    """The words that begin a command of ours; ``--`` in front makes them dom0's.

    Returns:
        tuple of str
    """
    return tuple(dict.fromkeys(command.words[0] for command in COMMANDS))
