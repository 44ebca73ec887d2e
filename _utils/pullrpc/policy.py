# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM may have done, once dom0 knows that it is the VM that asks: rules over the exact words of one command.

With any policy but ``full`` no shell is involved: what is compared with the rules is what is executed, word by word. Rules
that can't be read let nothing through. Pure functions on plain data, so that they can be fuzzed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import time

from .accounts import describe_account
from .denial import forbids
from .errors import ConfigError, Refused
from .validate import ARGV_MAX, check_command

FULL, NONE = "full", "none"
#: A policy's lists, in the order in which they are looked at; the first of them with a rule that fits decides.
_LISTS = ("deny", "ask", "allow")
_SAYS = {"deny": "forbids it", "ask": "has dom0's user asked", "allow": "allows it"}
#: Any one word that is no option; whatever follows, options included; the name of a VM that has this tag.
_ANY, _REST, _TAG = "*", "**", "@tag:"
_POLICIES = "must be full, none, or a mapping with allow, ask and deny"
_RULES_MAX, _WORDS_MAX, _WORD_MAX = 256, 64, 1024
#: Most of a word that an error repeats, characters.
_SHOWN_MAX = 40
#: Most commands in a script.
_STEPS_MAX = 256
#: Most pieces (blanks, words in quotes or not) that words are made of: a word may be of any number of them.
_PIECES_MAX = 4 * ARGV_MAX
#: Most words that a command has, times the words of all rules: each may have to be compared with each, while whoever asks gives the
#: commands' words, and is refused for nothing but dom0's time.
_COMPARED_MAX = 100_000
_PROGRAM = re.compile(r"[A-Za-z0-9_/.+-]+\Z")
_TAG_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}\Z")
#: What a line without a shell is made of: blanks, characters that a shell takes as they are, and text in either kind of quotes.
_PIECE = re.compile(
    r"""(?P<space>[ \t]+)|(?P<plain>[A-Za-z0-9_@%+=:,./^\x80-\U0010ffff-]+)|'(?P<single>[^']*)'|"(?P<double>[^"$`\\!]*)\""""
)
#: Properties whose values stay within their VM. Others connect it with another one: its netvm and template, whose screen and sound it
#: gets (guivm, audiovm), in which VM it opens things (default_dispvm), which one manages it.
_OWN_PROPERTIES = ("autostart", "include_in_backups", "label", "maxmem", "memory", "qrexec_timeout", "shutdown_timeout", "vcpus")
#: Which of its words that are no options is the name of a property, by program (qubesadmin.tools.qvm_prefs, for both).
_PROPERTY = {"qvm-prefs": 1, "qubes-prefs": 0}
#: By these, one word of a Qubes tool is the names of many VMs (qubesadmin.tools.VmNameAction, since R4.3).
_PATTERN = frozenset("*?[]")
#: Sets of rules by name. ``observe`` only looks; ``manage`` starts, ends and sets up the VMs of one tag.
SETS = {
    "observe": (
        ("qvm-ls", _REST),
        ("qvm-check", _REST),
        ("qvm-prefs", _ANY),
        ("qvm-prefs", _ANY, _ANY),
        ("qvm-features", _ANY),
        ("qvm-features", _ANY, _ANY),
        ("qvm-tags", _ANY),
        ("qvm-tags", _ANY, "list"),
        ("xl", "info"),
        ("xl", "list"),
        ("xl", "uptime"),
        ("hostname",),
        ("uptime",),
        ("uname", _REST),
    ),
    "manage": (
        ("qvm-start", _TAG),
        ("qvm-shutdown", _TAG),
        ("qvm-shutdown", "--wait", _TAG),
        ("qvm-kill", _TAG),
        ("qvm-pause", _TAG),
        ("qvm-unpause", _TAG),
        ("qvm-prefs", _TAG),
        ("qvm-prefs", _TAG, _ANY),
        *(("qvm-prefs", _TAG, name, _ANY) for name in _OWN_PROPERTIES),
    ),
}


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the rules say of a command.

    Attributes:
        allowed: bool, whether it may run without more ado.
        rule: str, the rule that decided, as pillar would have it; empty when none did.
        reason: str, in words that help.
        asks: bool, whether dom0's user decides; it is not allowed then.
    """

    allowed: bool
    rule: str
    reason: str
    asks: bool = False


_TOO_MUCH = Decision(False, "", "it has too many words to be compared with so many rules; send it in parts")


def check_policy(policy):
    """Check a policy's form.

    Args:
        policy: whatever the settings say.

    Raises:
        ConfigError: it is none; the text says what is allowed.
    """
    if policy in (FULL, NONE):
        return
    if not isinstance(policy, dict) or not policy:
        raise ConfigError(_POLICIES)
    for name in policy:
        if name not in _LISTS:
            shown = name if isinstance(name, str) and _TAG_NAME.match(name) else "one of its names"
            raise ConfigError(f"{shown} is unknown; {_POLICIES}")
    for name, rules in policy.items():
        if not isinstance(rules, list) or len(rules) > _RULES_MAX:
            raise ConfigError(f"{name} must be a list of at most {_RULES_MAX} rules")
        for at, rule in enumerate(rules, 1):
            try:
                for pattern in _expand(rule):
                    _check_no_pattern(pattern, also_others=name != "allow")
            except ConfigError as err:
                raise ConfigError(f"{name}, rule {at}: {err}") from None


def _expand(rule):
    """The word patterns that a rule stands for: itself, or those of a named set."""
    if isinstance(rule, str):
        if rule not in SETS or rule == "manage":
            raise ConfigError("a name must be observe; the other set needs a tag (manage: TAG); single rules are lists of words")
        return SETS[rule]
    if isinstance(rule, dict):
        if set(rule) != {"manage"} or not isinstance(rule["manage"], str) or not _TAG_NAME.match(rule["manage"]):
            raise ConfigError("a mapping must be manage: TAG")
        return tuple(tuple(word + rule["manage"] if word == _TAG else word for word in pattern) for pattern in SETS["manage"])
    if not isinstance(rule, (list, tuple)) or not 1 <= len(rule) <= _WORDS_MAX:
        raise ConfigError("must be a list of words, the first of them a program, or the name of a set")
    for at, word in enumerate(rule):
        if not isinstance(word, str) or len(word) > _WORD_MAX:
            raise ConfigError("every word must be text (numbers, and on, yes, true and their like, in quotes)")
        if word == _REST and at != len(rule) - 1:
            raise ConfigError(f"{_REST} may only be the last word")
        if word.startswith(_TAG) and not _TAG_NAME.match(word[len(_TAG) :]):
            raise ConfigError(f"{_TAG} needs a tag's name behind it")
    if not _PROGRAM.match(rule[0]):
        raise ConfigError("the first word must be the program itself, without wildcards")
    return (tuple(rule),)


def _check_no_pattern(pattern, also_others):
    """Check that no word of a rule could only be meant as a pattern, or was written by mistake: compared as it stands it would hardly fit
    anything, and where it is to forbid, it would forbid nothing.
    """
    is_of_qubes = _takes_patterns(pattern)
    for word in pattern:
        marks = _PATTERN if is_of_qubes else {"*"} if also_others else ()
        if word not in (_ANY, _REST) and (any(mark in word for mark in marks) or (word.startswith("@") and not word.startswith(_TAG))):
            raise ConfigError(f"{word[:_SHOWN_MAX]!r}: patterns are not known here; {_ANY} is any one word, {_TAG}NAME a qube with that tag")
        if (is_of_qubes or also_others) and word != word.strip():
            raise ConfigError(f"{word[:_SHOWN_MAX]!r} begins or ends with a blank, which no name does")


def tags_of(policy):
    """List the tags that a policy's rules name.

    Args:
        policy: as :func:`check_policy` takes it; None for no policy.

    Returns:
        set of str
    """
    if not isinstance(policy, dict):
        return set()
    patterns = [pattern for rules in policy.values() for rule in rules for pattern in _expand(rule)]
    return {word[len(_TAG) :] for pattern in patterns for word in pattern if word.startswith(_TAG)}


def decide(policy, argv, tagged):
    """Say whether a command may run.

    Args:
        policy: as :func:`check_policy` takes it.
        argv: tuple of str.
        tagged: callable of a tag that gives the names of the VMs that have it; called only where a rule asks for one.

    Returns:
        Decision
    """
    if policy == FULL:
        return Decision(True, FULL, "its policy is full: it may run anything")
    if policy == NONE:
        return Decision(False, NONE, "its policy is none: it may run nothing")
    return _decide(_rules(policy), argv, functools.lru_cache(maxsize=None)(tagged))


def _rules(policy):
    """The rules of a policy in the order in which they are looked at: list, words, words with one spelling."""
    patterns = ((name, pattern) for name in _LISTS for rule in policy.get(name, ()) for pattern in _expand(rule))
    return [(name, pattern, _spelled(pattern)) for name, pattern in patterns]


def _is_too_much(rules, count):
    return count * sum(len(pattern) for _, pattern, _ in rules) > _COMPARED_MAX


def _decide(rules, argv, tagged):
    if _is_too_much(rules, len(argv)):
        return _TOO_MUCH
    # All rules see the same tags: to ask for them costs a program's start.
    given = _spelled(argv)
    for name, pattern, spelled in rules if argv else ():
        if _fits(name, spelled, given, tagged) or (name == "deny" and _may_mean(spelled, given, tagged)):
            if name == "allow":
                # What the user may be meant to be asked about does not run unasked; what nothing allows is not asked about for it.
                asked = (other for list_, other, words in rules if list_ == "ask" and _may_mean(words, given, tagged))
                name, pattern = next((("ask", other) for other in asked), (name, pattern))
            shown = f"{name}: {' '.join(pattern)}"
            return Decision(name == "allow", shown, f"the rule '{shown}' {_SAYS[name]}", name == "ask")
    return Decision(False, "", "no rule allows it")


def decide_steps(policy, steps, tagged):
    """Say whether a script of single commands may run: all of them, or none.

    Args:
        policy: as :func:`check_policy` takes it, with rules.
        steps: list of (number of its line, tuple of str).
        tagged: as for :func:`decide`.

    Returns:
        Decision; its rule is that of the first command that decides, its reason names that line.
    """
    tagged = functools.lru_cache(maxsize=None)(tagged)
    if policy in (FULL, NONE):
        return decide(policy, (), tagged)
    rules = _rules(policy)
    if _is_too_much(rules, sum(len(argv) for _, argv in steps)):
        return _TOO_MUCH
    decisions = [(at, _decide(rules, argv, tagged)) for at, argv in steps]
    for deciding in (lambda one: not one.allowed and not one.asks, lambda one: one.asks):
        for at, decision in decisions:
            if deciding(decision):
                return dataclasses.replace(decision, reason=f"line {at}: {decision.reason}")
    return decisions[0][1]


def explain(policy, command, tagged):
    """Say whether a command would be let through, and which rule decides.

    Args:
        policy: as :func:`check_policy` takes it.
        command: str, a command line, or a script of single commands; or a list of exact words.
        tagged: as for :func:`decide`.

    Returns:
        dict: ``allowed`` and ``asks`` (bool), ``reason``, ``rule`` (empty when none decided), ``words`` (list; of a script a list of
        lists; None where a shell reads the line).
    """
    words = None
    try:
        if isinstance(command, str):
            # What is no command whatever the policy is.
            check_command(command.encode("utf-8", "surrogatepass"), len(command) * 4)
        elif not command or not command[0]:
            raise Refused("argv", "the argument vector names no program")
        if isinstance(command, (list, tuple)):
            words = list(command)
            decision = decide(policy, tuple(words), tagged)
        elif policy in (FULL, NONE):
            decision = decide(policy, (), tagged)
        elif "\n" in command.strip():
            steps = split_script(command)
            words = [list(argv) for _, argv in steps]
            decision = decide_steps(policy, steps, tagged)
        else:
            words = list(split_plain(command))
            decision = decide(policy, tuple(words), tagged)
    except Refused as refused:
        return {"allowed": False, "asks": False, "reason": str(refused), "rule": "", "words": None}
    return {"allowed": decision.allowed, "asks": decision.asks, "reason": decision.reason, "rule": decision.rule, "words": words}


def _spelled(words):
    """A command or a rule with one spelling for what is the same: these tools take a property's name with - for _."""
    which = _PROPERTY.get(os.path.basename(words[0])) if words else None
    # They have no option that takes a word of its own.
    plain = [at for at, word in enumerate(words) if at and not word.startswith("-")]
    if which is None or len(plain) <= which:
        return words
    at = plain[which]
    return (*words[:at], words[at].replace("-", "_"), *words[at + 1 :])


def _fits(name, pattern, argv, tagged):
    """Whether a rule of one of the lists is about a command, word by word."""
    fixed = pattern[:-1] if pattern[-1] == _REST else pattern
    if len(argv) < len(fixed) or (len(argv) > len(fixed) and fixed is pattern):
        return False
    # A pattern of names is no one word that may be allowed.
    takes_patterns = name != "allow" or not _takes_patterns(argv)
    return all(_matches(word, given, tagged) and (word != _ANY or takes_patterns or _PATTERN.isdisjoint(given)) for word, given in zip(fixed, argv))


def _may_mean(pattern, argv, tagged):
    """Whether a rule that keeps something from running is about a command, whatever words that has for it."""
    takes_patterns = _takes_patterns(argv)

    def matches(word, given, may_be_names):
        # The names that a pattern stands for may be among those that are meant.
        is_any = takes_patterns and (may_be_names or word.startswith(_TAG)) and not _PATTERN.isdisjoint(given)
        return is_any or _matches(word, given, tagged)

    return forbids(pattern, argv, matches)


def _takes_patterns(argv):
    return os.path.basename(argv[0]).startswith("qvm-")


def _matches(word, given, tagged):
    if word == _ANY:
        # An option in a name's or value's place may turn the command into another.
        return not given.startswith("-")
    if word.startswith(_TAG):
        return given in tagged(word[len(_TAG) :])
    return word == given


def describe(config, now=None):
    """Say in one line what a VM may have run, and as whom.

    Args:
        config: Config that holds for the VM.
        now: float, seconds since the epoch (default: dom0's clock).

    Returns:
        str
    """
    policy = config.policy_in_force
    if policy == FULL:
        text = f"may run anything in dom0, as {describe_account(config.run_as)} (policy: full)"
    elif policy == NONE:
        text = "may run nothing (policy: none)"
    else:
        text = f"may run what {len(policy.get('allow', ()))} rules allow and {len(policy.get('deny', ()))} do not forbid, as {describe_account(config.run_as)}"
        if policy.get("ask"):
            text += f"; dom0's user is asked about what {len(policy['ask'])} others name"
    if not config.until:
        return text
    ended = (time.time() if now is None else now) >= config.until
    return f"{text}, {'which ended' if ended else 'until'} {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(config.until))}"


def split_plain(line):
    """Read a command line that needs no shell: words and quotes, nothing else.

    Args:
        line: str.

    Returns:
        tuple of str, at least one.

    Raises:
        Refused: a shell would do more with it than to split it (code ``policy``).
    """
    words, at, count = [], 0, 0
    while at < len(line):
        if len(words) == ARGV_MAX:
            raise Refused("policy", f"for this qube dom0 takes commands of at most {ARGV_MAX} words")
        # Each piece once: a line is long, and whoever sends it may be no friend.
        pieces = []
        while at < len(line):
            piece = _PIECE.match(line, at)
            if piece is None:
                raise _needs_shell()
            at, count = piece.end(), count + 1
            if count > _PIECES_MAX:
                raise Refused("policy", f"for this qube dom0 takes commands of at most {_PIECES_MAX} blanks and quoted parts of words")
            if piece["space"]:
                break
            pieces.append(piece["plain"] or piece["single"] or piece["double"] or "")
        if pieces:
            words.append("".join(pieces))
    if not words or not words[0] or "=" in words[0]:
        raise _needs_shell()
    return tuple(words)


def split_script(text):
    """Read a script that needs no shell: one command on each line; empty lines and those that begin with ``#`` mean nothing.

    Args:
        text: str.

    Returns:
        list of (int, tuple of str): the number of each line, from 1, and its words; at least one.

    Raises:
        Refused: there is none, there are too many, or a shell would do more with one (code ``policy``).
    """
    lines = ((at, line.strip(" \t")) for at, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1))
    lines = [(at, line) for at, line in lines if line and not line.startswith("#")]
    if not 1 <= len(lines) <= _STEPS_MAX:
        raise Refused("policy", f"for this qube dom0 takes scripts of 1 to {_STEPS_MAX} lines, each a single command; this one has {len(lines)}")
    steps, count = [], 0
    # Each has its own bound on pieces; together they have one as well.
    if sum(line.count("'") + line.count('"') for _, line in lines) > 2 * _PIECES_MAX:
        raise Refused("policy", f"for this qube dom0 takes scripts of at most {_PIECES_MAX} quoted parts of words")
    for at, line in lines:
        try:
            steps.append((at, split_plain(line)))
        except Refused as refused:
            raise Refused(refused.code, f"line {at}: {refused}") from None
        count += len(steps[-1][1])
        if count > ARGV_MAX:
            raise Refused("policy", f"for this qube dom0 takes scripts of at most {ARGV_MAX} words")
    return steps


def _needs_shell():
    return Refused(
        "policy",
        "dom0 runs single commands for this qube, and no shell: no pipes, redirections, variables, patterns or several commands; "
        "send one command, with words in quotes where needed, or use --exec; a script may have one such command on each line",
    )
