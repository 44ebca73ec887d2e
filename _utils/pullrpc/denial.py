# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a command does what a rule forbids, in other words than the rule's. A doubt is yes.

The same program by its path or another name; subcommands by their other names; options that the rule does not name, with a value of
their own or without; those that it names, shortened or by a letter; an option's value in one word with it; more words at the end; one of
several names; all VMs; a shutdown that ends in a kill. Pure functions on words.
"""

from __future__ import annotations

import os
import re

#: Programs all of whose words, but options and what belongs to those, are names of VMs; and those that take --all.
_TAKE_NAMES = ("qvm-check", "qvm-kill", "qvm-ls", "qvm-pause", "qvm-remove", "qvm-shutdown", "qvm-start", "qvm-unpause")
_TAKE_ALL = (*_TAKE_NAMES, "qvm-run")
#: What all Qubes tools have for options that do nothing but to say more or less (qubesadmin.tools.QubesArgumentParser).
_SAY_MORE_OR_LESS = frozenset("qv")
_ALL, _TIMEOUT, _FORCE = "--all", "--timeout", ("--force", "-f")
_ANY, _REST, _TAG = "*", "**", "@"
#: qvm-device for one class of devices, which is the rest of the name (qubesadmin.tools.qvm_device).
_DEVICE_TOOLS = ("qvm-block", "qvm-mic", "qvm-pci", "qvm-usb")
#: Subcommands by their other names, by program (qubesadmin.tools.qvm_tags, qvm_device).
_ALIASES = {
    "qvm-tags": {"a": "add", "set": "add", "d": "del", "unset": "del", "u": "del", "ls": "list", "l": "list"},
    "qvm-device": {"a": "attach", "at": "attach", "d": "detach", "dt": "detach", "s": "assign", "u": "unassign", "i": "info", "ls": "list", "l": "list"},
}
#: A service is a feature by this beginning of its name (qubesadmin.tools.qvm_service).
_SERVICE, _SERVICE_TOOL, _FEATURES_TOOL = "service.", "qvm-service", "qvm-features"
#: To xl, a VM's number is as good as its name.
_NUMBER = re.compile(r"\s*[+-]?[0-9]+\Z")
#: What argparse takes for no option although it begins like one, unless it is one's name; beside what has a blank in it.
_NEGATIVE = re.compile(r"-(\d+|\d*\.\d+)?\Z")
#: No VM has a longer name (qubes.vm).
_NAME_MAX = 31


def forbids(pattern, argv, matches):
    """Say whether a rule that forbids is about a command.

    Args:
        pattern: tuple of str, the rule's words; ``**`` is the last one or none, which makes no difference: what is forbidden with some
            words is so with more of them.
        argv: tuple of str, at least one.
        matches: callable of a word of the rule, a given word, and whether that may be a VM's name (bool).

    Returns:
        bool
    """
    named, *words = _by_class(pattern)
    program, *given = _by_class(argv)
    words = [word for word in words if word != _REST]
    plain = [word for word in words if not word.startswith("-")]
    options = [word for word in words if word.startswith("-")]
    if (program, named) == ("qvm-shutdown", "qvm-kill") and any(map(_may_end_in_a_kill, given)):
        program = named
    elif (program, named) in ((_SERVICE_TOOL, _FEATURES_TOOL), (_FEATURES_TOOL, _SERVICE_TOOL)):
        if not _may_be_a_service(plain[1:2] or [_ANY] if program == _SERVICE_TOOL else given):
            return False
        # One has a value where the other one has on or off, or an option.
        program, options = named, []
        plain, given = _without_prefix(plain[:2]), _without_prefix(given)
    if program != named:
        return False
    is_all = program in _TAKE_ALL and any(_is_option(word, _ALL) for word in given)
    for option in options:
        # It forces what it does to all (qubesadmin.tools.qvm_shutdown).
        is_implied = program == "qvm-shutdown" and is_all and option in _FORCE
        if not is_implied and not any(_may_be_option(one, option) for one in given):
            return False
    # qvm-run has another option under this letter (--autostart), and words that are another program's.
    may_be_all = is_all or (program in _TAKE_NAMES and any(_is_letters(word) and "a" in word for word in given))
    return bool(plain and may_be_all) or _Comparison(program, plain, matches).fits(given)


def _by_class(words):
    """A command or a rule with its program's bare name, and devices as qvm-device has them."""
    program = os.path.basename(words[0])
    return ("qvm-device", program[len("qvm-") :], *words[1:]) if program in _DEVICE_TOOLS else (program, *words[1:])


def _may_end_in_a_kill(word):
    """Whether a word of qvm-shutdown's may mean --wait, or --timeout, which brings it about: then it kills what has not shut down after
    a while (qubesadmin.tools.qvm_shutdown).
    """
    return word.startswith("-") and ("w" in word or _is_option(word, _TIMEOUT) or (_is_letters(word) and "t" in word))


def _may_be_a_service(words):
    return any(word == _ANY or word.startswith(_SERVICE) for word in words)


def _without_prefix(words):
    return [word[len(_SERVICE) :] if word.startswith(_SERVICE) else word for word in words]


class _Comparison:
    """Whether words begin with those of a rule, one after the other, whatever options stand between them.

    Args:
        program: str.
        plain: list of str, the rule's words that are no options.
        matches: as for :func:`forbids`.
    """

    def __init__(self, program, plain, matches):
        self._program = program
        self._plain = plain
        self._matches = matches
        self._aliases = _ALIASES.get(program, {})
        self._takes_names = bool(plain) and program in _TAKE_NAMES

    def fits(self, given):
        """Compare.

        Args:
            given: list of str.

        Returns:
            bool
        """
        # How many of the rule's words have been found, and whether the word before was an option, to which this one may belong.
        states, is_rest = {(0, False)}, False
        for one in given:
            is_option = one.startswith("-")
            is_plain = not is_option or is_rest or " " in one or _NEGATIVE.match(one)
            after = set()
            for found, is_value in states:
                if is_option:
                    after.add((found, True))
                elif is_value or self._takes_names or found == len(self._plain):
                    after.add((found, False))
                if found < len(self._plain) and ((is_plain and self._is_same(found, one)) or (is_option and self._has_value(found, one))):
                    after.add((found + 1, False))
            states, is_rest = after, is_rest or one == "--"
        return any(found == len(self._plain) for found, _ in states)

    def _is_same(self, found, one):
        word = self._plain[found]
        # The words behind the first one are another program's there.
        if word == _ANY or self._matches(word, one, self._program != "qvm-run" or found == 0):
            return True
        if self._program == "xl":
            # It takes the beginning of a subcommand's name for it (xl.c).
            return word.startswith(one) if found == 0 else bool(_NUMBER.match(one)) and not _NUMBER.match(word)
        return self._aliases.get(word, word) == self._aliases.get(one, one)

    def _has_value(self, found, one):
        """Whether an option has the rule's next word with it, as its value."""
        word = self._plain[found]
        if not _is_letters(one):
            return "=" in one and self._is_same(found, one.partition("=")[2])
        if len(one) > 2 and self._is_same(found, one[2:]):
            return True
        # Behind other letters, or behind a =.
        if word.startswith(_TAG):
            return any(self._is_same(found, one[at:]) for at in range(max(3, len(one) - _NAME_MAX), len(one)))
        return one.endswith(word) and len(one) > len(word) + 2


def _may_be_option(given, option):
    """Whether a given word may mean an option: no table says here which letter stands for which long one."""
    if _is_letters(given):
        letters = set(given[1:]) - _SAY_MORE_OR_LESS
        return not letters.isdisjoint(option[1:]) if _is_letters(option) else bool(letters)
    if _is_letters(option):
        return given.startswith("--")
    return _is_option(given, option)


def _is_letters(word):
    """Whether a word is one or several options of one letter each."""
    return len(word) > 1 and word.startswith("-") and not word.startswith("--")


def _is_option(given, option):
    """Whether a given word is an option, which may be shortened, and have its value with it."""
    name = given.partition("=")[0]
    return name == option or (len(name) > 2 and name.startswith("--") and option.startswith(name))
