# SPDX-License-Identifier: GPL-2.0-or-later
"""Help, and the command lines of our own commands; both by the table."""

import os

from pullrpc.errors import PullError

from .table import COMMANDS, COMMON, DEFAULTS, EXIT_CODES, FORMS, NOTES, OPTIONS
from .terminal import one_line

_COLUMN = 26
#: Most of what might have been an option or a command that is shown, characters.
_WORD_MAX = 64
#: What is counted is never larger, so that a slip of the finger costs a message, not memory.
_NUMBER_MAX = 10**6


def parse(words):
    """Read the command line of one of our own commands.

    Args:
        words: list of str; the first is reserved.

    Returns:
        (Command, dict of str to str, int or bool): arguments and options by name. The command is None when help is asked for:
        then the dict has it under ``help``.

    Raises:
        PullError: the command line is none of ours; the text says what to type.
    """
    if any(word in ("-h", "--help") for word in words):
        return None, {"help": help_of(words)}
    command, rest = _find(words)
    options = {flag: option for option in (*command.options, *_common()) for flag in option.flags}
    values, given = {}, []
    while rest:
        word = rest.pop(0)
        flag, has_value, value = word.partition("=") if word.startswith("--") else (word[:2], len(word) > 2, word[2:])
        if not word.startswith("-") or word == "-":
            given.append(word)
        elif flag not in options:
            raise PullError(f"{_name(command)} has no option {_shown(flag)}; {_see(command)}")
        elif has_value and not options[flag].value:
            raise PullError(f"{flag} takes no value; {_see(command)}")
        elif not options[flag].value:
            values[options[flag].name] = True
        elif has_value or rest:
            values[options[flag].name] = value if has_value else rest.pop(0)
        else:
            raise PullError(f"{flag} takes a value; {_see(command)}")
    values.update(_arguments(command, given))
    if "n" in values:
        # Both ways to say it mean the same; what stands alone counts.
        values.setdefault("N", _number(command, "-n", values.pop("n")))
    return command, values


def _common():
    return [option for option in OPTIONS if option.flags[0] in COMMON]


def _find(words):
    """The command that is meant, and what follows its words."""
    group = [command for command in COMMANDS if command.words[0] == words[0]]
    best = next((command for command in group if len(command.words) == 2 and list(command.words) == words[:2]), None)
    if best is None and words[0] in DEFAULTS and (not words[1:] or words[1].startswith("-")):
        best = next(command for command in group if command.words[1] == DEFAULTS[words[0]])
        return best, words[1:]
    best = best or next((command for command in group if len(command.words) == 1), None)
    if best is None:
        choices = " or ".join(f"'{_name(command)}'" for command in group)
        raise PullError(f"use {choices}; to run a program named {words[0]} in dom0: qvm-remote -- {words[0]} ...")
    return best, words[len(best.words) :]


def _arguments(command, given):
    values = {}
    for argument, word in zip(command.arguments, given):
        values[argument.name] = _number(command, argument.name, word) if argument.kind == "number" else word
    missing = [argument.name for argument in command.arguments[len(given) :] if argument.is_needed]
    if missing:
        raise PullError(f"{_name(command)} needs {missing[0]}; {_see(command)}")
    if command.words == ("key", "import") and given:
        raise PullError("a key is never taken as an argument, where others can read it; give it on stdin: qvm-remote key import < FILE")
    if len(given) > len(command.arguments):
        takes = f"at most {len(command.arguments)} argument" if command.arguments else "no argument"
        raise PullError(f"{_name(command)} takes {takes}; {_dom0s(command)}")
    return values


def _number(command, name, word):
    if not (word.isascii() and word.isdigit() and len(word) <= 7 and int(word) <= _NUMBER_MAX):
        raise PullError(f"{name} of {_name(command)} is a whole number up to {_NUMBER_MAX}; {_dom0s(command)}")
    return int(word)


def _shown(word):
    return one_line(os.fsencode(word), _WORD_MAX)


def _name(command):
    return " ".join(command.words)


def _see(command):
    return f"see: qvm-remote {_name(command)} --help"


def _dom0s(command):
    return f"to run a program named {command.words[0]} in dom0: qvm-remote -- {command.words[0]} ..."


def help_of(words):
    """Help for a command, or for all that begin with a word.

    Args:
        words: list of str, the beginning of a command line; empty for the whole of ``qvm-remote``.

    Returns:
        str

    Raises:
        PullError: there is no such command.
    """
    words = [word for word in words if not word.startswith("-")]
    if not words:
        return _main_help()
    group = [command for command in COMMANDS if command.words[0] == words[0]]
    exact = [command for command in group if len(command.words) == 2 and list(command.words) == words[:2]]
    if not group:
        raise PullError(f"qvm-remote has no command {_shown(words[0])}; see: qvm-remote --help")
    return "\n".join(map(_command_help, exact or group))


def synopsis(command):
    """How a command is written.

    Args:
        command: Command.

    Returns:
        str, after ``qvm-remote``: ``history [--json] [N]``.
    """
    options = [f"[{option.flags[0]}{f' {option.value}' if option.value else ''}]" for option in command.options]
    arguments = [argument.name if argument.is_needed else f"[{argument.name}]" for argument in command.arguments]
    return " ".join([_name(command), *options, *arguments])


def _command_help(command):
    lines = [f"usage: qvm-remote {synopsis(command)}", "", f"  {command.summary[0].upper()}{command.summary[1:]}."]
    lines += [f"  {line}" for line in command.notes.splitlines()]
    rows = [(argument.name, argument.help) for argument in command.arguments] + [_option_row(option) for option in command.options]
    lines += ["", *map(_row, rows)] if rows else []
    return "\n".join(lines) + "\n"


def _main_help():
    width = max(len(form) for form, _ in FORMS)
    usage = [f"{'usage:' if number == 0 else '':6} qvm-remote {form:{width}}  {what}" for number, (form, what) in enumerate(FORMS)]
    commands = [(synopsis(command) if len(synopsis(command)) < _COLUMN else _name(command), command.summary) for command in COMMANDS if not command.is_internal]
    internal = [(_name(command), command.summary) for command in COMMANDS if command.is_internal]
    blocks = [
        "\n".join(usage),
        NOTES.rstrip(),
        "\n".join(["options:", *map(_row, map(_option_row, OPTIONS))]),
        "\n".join(["other commands (-- in front makes these words commands for dom0: qvm-remote -- log):", *map(_row, commands + internal)]),
        "\n".join(["exit codes:", *map(_row, EXIT_CODES)]),
    ]
    return "\n\n".join(blocks) + "\n"


def _option_row(option):
    return ", ".join(f"{flag} {option.value}".rstrip() for flag in option.flags), option.help


def _row(row):
    return f"  {row[0]:{_COLUMN - 2}}  {row[1]}"
