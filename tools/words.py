# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command lines of both programs are made of, in one form: read from the tables that their parsers are made from."""

import dataclasses
import os
import sys

from version import ROOT

sys.path[:0] = [os.path.join(ROOT, folder) for folder in ("_utils", "client", "dom0")]

from qvm_remote_client import table, usage  # noqa: E402
from qvm_remote_dom0 import verbs  # noqa: E402

#: What an argument may be: the name of a qube; the id of a command that is in the history, or that waits or runs; one of the program's own
#: commands; another program's command line, to the end; anything else.
VM, KEPT, WAITING, OWN, REST, OTHER = "vm", "kept", "waiting", "own", "rest", "other"


@dataclasses.dataclass(frozen=True)
class Option:
    """An option: its flags (tuple of str), the name of its value (str, empty for a switch), what it does (str)."""

    flags: tuple
    value: str
    help: str


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument: its name (str), its kind (str, see above), what it is (str), whether it may be missing (bool)."""

    name: str
    kind: str
    help: str
    may_miss: bool


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its words (tuple of str, one or two), what it does (str), how it is written (str), its arguments and options (tuples),
    those options that all commands have (tuple), notes (str, sentences).
    """

    words: tuple
    summary: str
    synopsis: str
    arguments: tuple
    options: tuple
    common: tuple
    notes: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A program: its name and what it does (str), its options before a command (tuple), flags after which no command of its own follows
    (tuple of str), its commands (tuple), the first words of two-word commands and what those are about (dict of str to str).
    """

    name: str
    summary: str
    options: tuple
    alone: tuple
    commands: tuple
    groups: dict

    def beginnings(self):
        """All that a command line may have as command so far: nothing, the first word of two, or a whole command.

        Returns:
            dict of tuple of str to (tuple of Option, tuple of Argument, list of (str, str): the words that may follow, and what each does).
        """
        found = {(): (self.options, (), []), **{(word,): (self.commands[0].common, (), []) for word in self.groups}}
        found.update({command.words: ((*command.options, *command.common), command.arguments, []) for command in self.commands})
        summaries = {**{(word,): text for word, text in self.groups.items()}, **{command.words: command.summary for command in self.commands}}
        for words, summary in summaries.items():
            found[words[:-1]][2].append((words[-1], summary))
        return found


def client():
    """The program in a qube.

    Returns:
        Program
    """
    common = tuple(_client_option(option) for option in table.OPTIONS if option.flags[0] in table.COMMON)
    commands = tuple(
        Command(
            command.words,
            command.summary,
            usage.synopsis(command),
            tuple(Argument(one.name, _client_kind(command, one), one.help, not one.is_needed) for one in command.arguments),
            tuple(map(_client_option, command.options)),
            common,
            command.notes,
        )
        for command in table.COMMANDS
        if not command.is_internal
    )
    firsts = dict.fromkeys(command.words[0] for command in commands if len(command.words) == 2)
    whole = {command.words[0] for command in commands if len(command.words) == 1}
    groups = {word: ", ".join(command.words[1] for command in commands if command.words[0] == word) for word in firsts if word not in whole}
    options = tuple(map(_client_option, table.OPTIONS))
    return Program("qvm-remote", table.SUMMARY, options, ("-s", "--exec", "-h", "--help", "--version"), commands, groups)


def _client_option(option):
    return Option(option.flags, option.value, option.help)


def _client_kind(command, argument):
    if argument.kind == "id":
        return WAITING if command.words == ("cancel",) else KEPT
    return OWN if command.words == ("help",) else OTHER


def dom0():
    """The program in dom0.

    Returns:
        Program
    """
    common = (Option(("-h", "--help"), "", "show its help"),)
    commands = tuple(
        Command(
            (verb.name,),
            verb.text,
            _dom0_synopsis(verb),
            tuple(_dom0_argument(one) for one in verb.options if not one.names[0].startswith("-") and not one.hidden),
            _dom0_options(verb.options),
            common,
            verb.more,
        )
        for verb in verbs.VERBS
    )
    summary = verbs.SUMMARY[0].lower() + verbs.SUMMARY[1:].rstrip(".")
    options = (*_dom0_options(verbs.OPTIONS), *common)
    return Program(verbs.PROGRAM, summary, options, ("--once", "--dry-run", "-h", "--help", "--version"), commands, {})


def _dom0_options(options):
    return tuple(Option(one.names, one.metavar, one.text) for one in options if one.names[0].startswith("-") and not one.hidden)


def _dom0_argument(one):
    kinds = {"vm": VM, "command": REST}
    return Argument(one.metavar, kinds[one.names[0]], one.text, one.count == "?")


def _dom0_synopsis(verb):
    # As argparse has it: options first.
    options = [f"[{one.flags[0]}{f' {one.value}' if one.value else ''}]" for one in _dom0_options(verb.options)]
    arguments = [one for one in verb.options if not one.names[0].startswith("-") and not one.hidden]
    shown = [f"[{one.metavar}]" if one.count == "?" else f"{one.metavar}..." if one.count == "..." else one.metavar for one in arguments]
    return " ".join([verb.name, *options, *shown])
