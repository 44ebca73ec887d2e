# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a command does what a rule forbids, in other words than the rule's. A doubt is yes.

The same program by its path; options that the rule does not name, with a word of their own or without; those that it names, shortened or
by a letter; more words at the end; one of several names; all VMs; a shutdown that ends in a kill. Pure functions on words.
"""

from __future__ import annotations

import os

#: Programs all of whose words, but options and what belongs to those, are names of VMs; and those that take --all.
_TAKE_NAMES = ("qvm-check", "qvm-kill", "qvm-ls", "qvm-pause", "qvm-remove", "qvm-shutdown", "qvm-start", "qvm-unpause")
_TAKE_ALL = (*_TAKE_NAMES, "qvm-run")
#: What all Qubes tools have for options that do nothing but to say more or less (qubesadmin.tools.QubesArgumentParser).
_SAY_MORE_OR_LESS = frozenset("qv")
_ALL = "--all"


def forbids(pattern, argv, matches):
    """Say whether a rule that forbids is about a command.

    Args:
        pattern: tuple of str, the rule's words; ``**`` is the last one or none, which makes no difference: what is forbidden with some
            words is so with more of them.
        argv: tuple of str, at least one.
        matches: callable of a word of the rule, a given word, and whether that stands where a VM's name does (bool).

    Returns:
        bool
    """
    program, given = os.path.basename(argv[0]), argv[1:]
    if program == "qvm-shutdown" and os.path.basename(pattern[0]) == "qvm-kill" and any(word.startswith("-") and "w" in word for word in given):
        # With --wait it kills what has not shut down after a while (qubesadmin.tools.qvm_shutdown).
        program = "qvm-kill"
    if program != os.path.basename(pattern[0]):
        return False
    words = [word for word in pattern[1:] if word != "**"]
    plain = [word for word in words if not word.startswith("-")]
    if not all(any(_may_be_option(one, word) for one in given) for word in words if word.startswith("-")):
        return False
    # qvm-run has another option under this letter (--autostart), and words that are another program's.
    may_be_all = program in _TAKE_NAMES and any(_is_letters(word) and "a" in word for word in given)
    if plain and (may_be_all or (program in _TAKE_ALL and any(_is_option(word, _ALL) for word in given))):
        return True
    return _fit(plain, given, matches, takes_names=bool(plain) and program in _TAKE_NAMES)


def _fit(plain, given, matches, takes_names):
    """Whether words begin with those of a rule, one after the other, whatever options stand between them."""
    # How many of the rule's words have been found, and whether the word before was an option, to which this one may belong.
    states = {(0, False)}
    for one in given:
        if one.startswith("-"):
            states = {(found, True) for found, _ in states}
            continue
        after = set()
        for found, is_value in states:
            is_name = takes_names or found == 0
            if found < len(plain) and matches(plain[found], one, is_name):
                after.add((found + 1, False))
            if is_value or takes_names or found == len(plain):
                after.add((found, False))
        states = after
    return any(found == len(plain) for found, _ in states)


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
