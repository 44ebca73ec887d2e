# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM may have run: rules over exact words, and that what is compared is what a shell would have read."""

import dataclasses
import os
import subprocess
import threading
import time
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from pullrpc import ledger as ledger_module
from pullrpc import policy as policy_module
from pullrpc import service
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import ConfigError, LedgerError, Refused, TransportError
from pullrpc.gate import Request, check_policy
from pullrpc.ids import new_cid
from pullrpc.ledger import Ledger
from pullrpc.policy import SETS, decide, decide_steps, split_plain, split_script
from pullrpc.tokens import make_token

TAGS = {"mine": {"build", "test"}}
POLICY = {
    "allow": ["observe", {"manage": "mine"}, ["qvm-prefs", "work", "memory", "*"], ["echo", "**"]],
    "deny": [["qvm-prefs", "@tag:mine", "netvm", "*"], ["qvm-kill", "test"]],
}


def _tagged(tag):
    return TAGS.get(tag, set())


def _allowed(*argv, policy=POLICY):
    return decide(policy, argv, _tagged).allowed


@pytest.mark.parametrize(
    "argv",
    [
        ("qvm-ls",),
        ("qvm-ls", "--raw-data", "--fields", "name"),
        ("qvm-prefs", "vault", "label"),
        ("qvm-prefs", "work", "memory", "400"),
        ("qvm-prefs", "work", "memory", ""),
        ("qvm-start", "build"),
        ("qvm-prefs", "test", "label", "red"),
        ("echo",),
        ("echo", "-e", "a b"),
    ],
)
def test_what_a_rule_allows_may_run(argv):
    assert _allowed(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ("qvm-prefs", "vault", "label", "red"),
        ("qvm-prefs", "work", "memory"[:-1], "400"),
        ("qvm-prefs", "work", "memory", "400", "500"),
        ("qvm-prefs", "work", "memory", "--default"),
        ("qvm-prefs", "--unset", "memory"),
        ("qvm-prefs", "-D"),
        ("qvm-start", "vault"),
        ("qvm-start", "build", "vault"),
        ("qvm-start", "@tag:mine"),
        ("qvm-prefs", "build", "netvm", "sys-firewall"),
        ("qvm-kill", "test"),
        ("/usr/bin/qvm-ls",),
        ("QVM-LS",),
        ("qvm-ls ",),
        ("bash", "-c", "qvm-ls"),
        ("env", "qvm-ls"),
        ("xl", "destroy", "5"),
    ],
)
def test_all_else_may_not(argv):
    assert not _allowed(*argv)


def test_what_is_denied_is_denied_though_it_is_allowed_too():
    assert _allowed("qvm-kill", "build")
    decision = decide(POLICY, ("qvm-kill", "test"), _tagged)
    assert (decision.allowed, decision.rule) == (False, "deny: qvm-kill test")


@pytest.mark.parametrize("name", ["deny", "ask"])
@pytest.mark.parametrize("rule", ["default_dispvm", "default-dispvm"])
def test_another_spelling_of_a_property_gets_past_no_rule(name, rule):
    # qvm-prefs replaces - by _ in a property's name, and in nothing else.
    rules = [["qvm-prefs", "@tag:mine", rule, "*"], ["qvm-prefs", "--set", "sys-net", rule, "**"]]
    policy = {"allow": [["qvm-prefs", "**"]], name: rules}
    for spelling in ("default_dispvm", "default-dispvm"):
        assert not _allowed("qvm-prefs", "build", spelling, "x", policy=policy)
        assert not _allowed("qvm-prefs", "--set", "sys-net", spelling, "x", policy=policy)
        assert _allowed("qvm-prefs", "--set", "sys_net", spelling, "x", policy=policy)
    assert _allowed("qvm-prefs", "build", "kernelopts", "default-dispvm", policy=policy)
    policy = {"allow": [["qubes-prefs", "*", "*"]], name: [["qubes-prefs", rule, "*"]]}
    assert not any(_allowed("qubes-prefs", spelling, "x", policy=policy) for spelling in ("default_dispvm", "default-dispvm"))
    assert _allowed("qubes-prefs", "clockvm", "default-dispvm", policy=policy)


def test_a_pattern_of_names_is_no_single_word_that_is_allowed():
    policy = {"allow": [["qvm-shutdown", "*"], ["echo", "*"]], "deny": [["qvm-shutdown", "sys-net"]], "ask": [["qvm-remove", "--force", "*"]]}
    for word in ("sys-*", "sys-ne?", "sys-[n]et", "*"):
        assert not _allowed("qvm-shutdown", word, policy=policy)
        assert decide(policy, ("qvm-remove", "--force", word), _tagged).asks
        assert _allowed("echo", word, policy=policy)


@pytest.mark.parametrize(
    "argv",
    [
        ("qvm-kill", "test"),
        ("/usr/bin/qvm-kill", "test"),
        ("qvm-kill", "--force", "test"),
        ("qvm-kill", "test", "-v"),
        ("qvm-kill", "build", "test"),
        ("qvm-kill", "tes*"),
        ("qvm-kill", "build", "[t]est"),
        ("qvm-kill", "--all"),
        ("qvm-kill", "--al", "--exclude", "x"),
        # It kills what has not shut down in time.
        ("qvm-shutdown", "--wait", "test"),
        ("qvm-shutdown", "--wai", "--timeout", "0", "build", "test"),
        ("qvm-shutdown", "-w", "test"),
        ("xl", "destroy", "-f", "test"),
        ("qvm-prefs", "--set", "test", "netvm", "sys-net"),
        ("qvm-prefs", "te?t", "netvm", "sys-net"),
        ("qvm-run", "test", "poweroff"),
        ("qvm-run", "--user", "root", "test", "poweroff"),
        ("qvm-run", "-u", "root", "--", "test", "id"),
        ("qvm-run", "--all", "id"),
        ("qvm-remove", "test", "--force"),
        ("qvm-remove", "--forc", "build", "test"),
    ],
)
def test_what_is_denied_is_denied_in_other_words_too(argv):
    deny = [["qvm-kill", "test"], ["xl", "destroy", "test"], ["qvm-prefs", "test", "netvm", "*"], ["qvm-run", "test", "**"]]
    deny.append(["qvm-remove", "--force", "test"])
    programs = ("qvm-kill", "/usr/bin/qvm-kill", "qvm-shutdown", "xl", "qvm-prefs", "qvm-run", "qvm-remove")
    allow = [[program, "**"] for program in programs]
    decision = decide({"allow": allow, "ask": allow, "deny": deny}, argv, _tagged)
    assert (decision.allowed, decision.asks) == (False, False)
    assert decision.rule.startswith("deny: ")
    # And what is not meant is not forbidden.
    other = tuple("other" if word in ("test", "tes*", "te?t", "[t]est") else word for word in argv if not word.startswith("--al"))
    assert _allowed(*other, policy={"allow": allow, "deny": deny})


def _check_kept_from_running(rule, argv):
    """By deny, and by ask, whatever else is allowed."""
    allow = [[argv[0], "**"]]
    assert not _allowed(*argv, policy={"allow": allow, "deny": [rule]})
    decision = decide({"allow": allow, "ask": [rule]}, argv, _tagged)
    assert (decision.allowed, decision.asks) == (False, True)


@pytest.mark.parametrize(
    ("deny", "argv"),
    [
        (["qvm-run", "test", "poweroff"], ("qvm-run", "test", "ls *.txt")),
        (["qvm-remove", "--force", "test"], ("qvm-remove", "test")),
        (["qvm-shutdown", "--wait", "**"], ("qvm-shutdown", "test")),
        (["qvm-run", "test", "**"], ("qvm-run", "--autostart", "build", "id")),
        (["qvm-run", "test", "**"], ("qvm-run", "build", "ls", "-la")),
        (["qvm-remove", "--force", "test"], ("qvm-remove", "-qv", "test")),
        (["qvm-remove", "test"], ("qvm-remove", "-f", "build")),
        (["qvm-start", "test"], ("qvm-start", "--skip-if-running", "build")),
        (["qvm-prefs", "test", "netvm", "*"], ("qvm-prefs", "test", "netvm")),
        (["qvm-prefs", "test", "netvm", "*"], ("qvm-prefs", "test", "memory", "netvm")),
    ],
)
def test_what_is_denied_is_not_more_than_what_may_be_meant(deny, argv):
    assert _allowed(*argv, policy={"allow": [[argv[0], "**"]], "deny": [deny]})


@pytest.mark.parametrize(
    ("deny", "argv"),
    [
        # The program, and no more words: with whatever words.
        (["qvm-kill"], ("qvm-kill", "test")),
        (["qvm-kill"], ("qvm-kill", "--verbose", "test", "build")),
        (["qvm-kill"], ("qvm-shutdown", "--wait", "test")),
        (["/usr/bin/reboot"], ("reboot", "now")),
        (["qvm-run", "test"], ("qvm-run", "test", "id")),
        (["qvm-prefs", "test", "netvm"], ("qvm-prefs", "test", "netvm", "sys-net")),
        (["qvm-tags", "*"], ("qvm-tags", "test", "list")),
        # Options by a letter, alone or with others, and the other way round.
        (["qvm-remove", "--force", "test"], ("qvm-remove", "-f", "test")),
        (["qvm-remove", "--force", "test"], ("qvm-remove", "-qf", "test")),
        (["qvm-remove", "-f", "test"], ("qvm-remove", "--force", "test")),
        (["qvm-remove", "-f", "test"], ("qvm-remove", "-vf", "test")),
        (["qvm-shutdown", "--wait", "**"], ("qvm-shutdown", "-w", "test")),
        (["qvm-prefs", "--unset", "test", "netvm"], ("qvm-prefs", "-D", "test", "netvm")),
        (["qvm-shutdown", "test"], ("qvm-shutdown", "-a")),
    ],
)
def test_what_is_kept_from_running_is_so_with_more_words_and_by_letters(deny, argv):
    _check_kept_from_running(deny, argv)


@pytest.mark.parametrize(
    ("deny", "argv"),
    [
        # What kills in the end, and what is implied.
        (["qvm-kill", "test"], ("qvm-shutdown", "--timeout", "1", "test")),
        (["qvm-kill", "test"], ("qvm-shutdown", "--t=1", "test")),
        (["qvm-shutdown", "--force", "**"], ("qvm-shutdown", "--all")),
        # Other names of subcommands, programs and VMs.
        (["xl", "destroy", "*"], ("xl", "dest", "test")),
        (["xl", "destroy", "test"], ("xl", "destroy", "7")),
        (["xl", "destroy", "@tag:mine"], ("xl", "-f", "d", "7")),
        (["qvm-tags", "*", "add", "*"], ("qvm-tags", "test", "a", "mine")),
        (["qvm-tags", "*", "set", "*"], ("qvm-tags", "test", "add", "mine")),
        (["qvm-tags", "test", "del", "*"], ("qvm-tags", "test", "u", "mine")),
        (["qvm-device", "block", "attach", "test", "**"], ("qvm-device", "block", "at", "test", "sda")),
        (["qvm-device", "block", "attach", "test", "**"], ("qvm-device", "block", "a", "te?t", "sda")),
        (["qvm-device", "block", "attach", "test", "**"], ("qvm-block", "attach", "test", "sda")),
        (["qvm-usb", "assign", "**"], ("qvm-device", "usb", "s", "test", "x")),
        (["qvm-service", "test", "**"], ("qvm-features", "test", "service.cups", "1")),
        (["qvm-service", "--disable", "test", "cups"], ("qvm-features", "test", "service.cups", "")),
        (["qvm-features", "test", "service.cups", "*"], ("qvm-service", "test", "cups", "on")),
        (["qvm-features", "test", "**"], ("qvm-service", "--enable", "test", "cups")),
        # An option's value in one word with it.
        (["qvm-run", "--user", "root", "**"], ("qvm-run", "--user=root", "test", "id")),
        (["qvm-run", "-u", "root", "**"], ("qvm-run", "-uroot", "test", "id")),
        (["qvm-run", "-u", "root", "**"], ("qvm-run", "-pqu=root", "test", "id")),
        (["qvm-create", "--template", "test", "**"], ("qvm-create", "--template=test", "--label", "red", "x")),
        (["qvm-create", "--template", "@tag:mine", "**"], ("qvm-create", "-pt=build", "x")),
        (["qvm-start", "--cdrom", "*", "test"], ("qvm-start", "--cdrom=dom0:/x", "test")),
        # What begins like an option and is none.
        (["qvm-prefs", "test", "kernelopts", "*"], ("qvm-prefs", "test", "kernelopts", "- init=/bin/sh")),
        (["qvm-prefs", "test", "maxmem", "*"], ("qvm-prefs", "test", "maxmem", "-1")),
        (["qvm-prefs", "test", "kernelopts", "*"], ("qvm-prefs", "--", "test", "kernelopts", "-x")),
    ],
)
def test_what_is_kept_from_running_is_so_by_other_names_and_in_fewer_words(deny, argv):
    _check_kept_from_running(deny, argv)


@pytest.mark.parametrize(
    ("deny", "argv"),
    [
        (["qvm-kill", "test"], ("qvm-shutdown", "--timeout", "1", "other")),
        (["xl", "destroy", "test"], ("xl", "info")),
        (["xl", "destroy", "test"], ("xl", "destroy", "other")),
        (["xl", "vcpu-set", "test", "4"], ("xl", "vcpu-set", "test", "2")),
        (["qvm-tags", "*", "add", "*"], ("qvm-tags", "add", "list")),
        (["qvm-device", "block", "attach", "test", "**"], ("qvm-block", "detach", "test", "sda")),
        (["qvm-device", "block", "attach", "test", "**"], ("qvm-usb", "attach", "test", "sda")),
        (["qvm-service", "test", "**"], ("qvm-features", "test", "gui", "1")),
        (["qvm-features", "test", "gui", "*"], ("qvm-service", "test", "cups", "on")),
        (["qvm-run", "--user", "root", "**"], ("qvm-run", "--user=user", "test", "id")),
        (["qvm-prefs", "test", "kernelopts", "*"], ("qvm-prefs", "test", "memory", "400")),
    ],
)
def test_what_is_none_of_these_names_is_not_kept_from_running(deny, argv):
    assert _allowed(*argv, policy={"allow": [[argv[0], "**"]], "deny": [deny]})


@pytest.mark.parametrize("name", ["deny", "ask"])
@pytest.mark.parametrize("word", ["dest*", "test ", "\ttest", "*.service"])
def test_a_word_that_would_keep_nothing_from_running_is_a_mistake(name, word):
    policy = {"allow": [["xl", word]], name: [["xl", "destroy", word]]}
    with pytest.raises(ConfigError, match="patterns are not known|begins or ends with a blank"):
        policy_module.check_policy(policy)
    policy_module.check_policy({"allow": policy["allow"]})


def test_a_command_has_so_many_words_and_no_more():
    assert len(split_plain("a " * 4096)) == 4096
    for read, text in ((split_plain, "a " * 4097), (split_plain, "a " * (1 << 19)), (split_script, "a " * 2048 + "\n" + "a " * 2049)):
        with pytest.raises(Refused, match="at most 4096 words"):
            read(text)


@pytest.mark.parametrize("argv", [("qvm-kill", "build"), ("qvm-kill", "--force", "build"), ("qvm-shutdown", "--wait", "build"), ("qvm-kill", "b*")])
def test_a_tag_that_is_denied_is_denied_in_other_words_too(argv):
    # As pillar.example has it: managed, but not killed.
    policy = {"allow": [{"manage": "mine"}, [argv[0], "**"]], "deny": [["qvm-kill", "@tag:mine"]]}
    assert not _allowed(*argv, policy=policy)
    assert _allowed("qvm-shutdown", "build", policy=policy)


@pytest.mark.parametrize(
    ("argv", "outcome"),
    [
        (("qvm-remove", "--force", "build"), "asks"),
        # In other words: what is allowed by another rule does not run unasked.
        (("qvm-remove", "build", "--force"), "asks"),
        (("qvm-remove", "--force", "-v", "build"), "asks"),
        (("qvm-kill", "other", "build"), "asks"),
        (("qvm-shutdown", "--wait", "build"), "asks"),
        (("qvm-shutdown", "other"), "allowed"),
        # And nobody is asked about what no rule allows, because a part of it is asked about.
        (("qvm-pause", "other", "build"), "refused"),
    ],
)
def test_what_is_asked_about_does_not_run_unasked_in_other_words(argv, outcome):
    ask = [["qvm-remove", "--force", "@tag:mine"], ["qvm-kill", "@tag:mine"], ["qvm-pause", "@tag:mine"]]
    policy = {"allow": [["qvm-remove", "**"], ["qvm-kill", "**"], ["qvm-shutdown", "**"]], "ask": ask}
    decision = decide(policy, argv, _tagged)
    assert (decision.allowed, decision.asks) == {"asks": (False, True), "allowed": (True, False), "refused": (False, False)}[outcome]
    assert decision.rule.startswith("ask: ") == decision.asks


def test_a_long_line_is_read_piece_by_piece(monkeypatch):
    pieces, real = [], policy_module._PIECE
    monkeypatch.setattr(policy_module, "_PIECE", SimpleNamespace(match=lambda line, at: pieces.append(at) or real.match(line, at)))
    # By the character that was half a minute of dom0's time.
    assert split_plain("a" * (1 << 20)) == ("a" * (1 << 20),)
    assert len(pieces) == 1
    assert split_plain("'a'" * 16384) == ("a" * 16384,)
    assert len(pieces) == 16385
    # Nor in as many pieces as whoever asks would have it read, one after the other.
    for line in ("'a'" * 300000, "''" * 500000, "a''" * 300000):
        with pytest.raises(Refused, match="at most 16384"):
            split_plain(line)
    assert len(pieces) == 16385 + 3 * 16385
    with pytest.raises(Refused, match="this one has 500000"):
        split_script("\na" * 500000)
    with pytest.raises(Refused, match="at most 16384 quoted"):
        split_script("\n".join(["a" + "''" * 1000] * 200))
    # Too many lines are not read at all.
    assert len(pieces) == 4 * 16385


def test_a_command_is_compared_with_rules_as_long_as_that_is_soon_done():
    compared = []

    def tagged(tag):
        compared.append(tag)
        return set()

    policy = {"allow": [["qvm-start", *(["*"] * 62), f"@tag:a{number}"] for number in range(24)]}
    assert decide(policy, ("qvm-start", *("b" * 63)), tagged).reason == "no rule allows it"
    assert len(compared) == 24
    long = ("qvm-start", *("b" * 1000))
    steps = [(at, ("qvm-start", *("b" * 63))) for at in range(1, 64)]
    for decision in (decide(policy, long, tagged), decide_steps(policy, steps, tagged)):
        assert (decision.allowed, decision.asks) == (False, False)
        assert "too many words" in decision.reason
    assert len(compared) == 24
    # With rules as one has them it may be long.
    assert _allowed("qvm-start", *("build",) * 1, policy=POLICY)
    assert decide({"allow": [["echo", "**"]] * 12}, ("echo", *("b" * 4095)), tagged).allowed


def test_a_ping_has_no_other_text_and_no_stdin():
    with pytest.raises(Refused, match="no text but ping"):
        check_policy(_config(policy="none"), None, _tagged, _request("x" * 1000, "ping"))
    with pytest.raises(Refused, match="no stdin"):
        check_policy(_config(policy="none"), None, _tagged, dataclasses.replace(_request("ping", "ping"), stdin_digest=b"d" * 32))
    assert check_policy(_config(policy="none"), None, _tagged, _request("ping", "ping")).by == "ping"


@pytest.mark.parametrize("name", ["netvm", "template", "guivm", "audiovm", "default_dispvm", "management_dispvm", "provides_network", "kernelopts"])
def test_what_ties_a_qube_to_another_is_not_managed_with_it(name):
    policy = {"allow": [{"manage": "mine"}]}
    assert _allowed("qvm-prefs", "build", name, policy=policy)
    for spelling in (name, name.replace("_", "-")):
        assert not _allowed("qvm-prefs", "build", spelling, "helper", policy=policy)


def test_a_tag_is_looked_up_once_for_all_lines_of_a_script():
    asked = []

    def tagged(tag):
        asked.append(tag)
        return _tagged(tag)

    steps = [(at, ("qvm-prefs", "build", "memory", "400")) for at in range(1, 200)]
    assert decide_steps(POLICY, steps, tagged).allowed
    assert asked == ["mine"]


def test_full_none_and_an_empty_list_are_what_they_say():
    assert _allowed("rm", "-rf", "/", policy="full")
    assert not _allowed("true", policy="none")
    assert not _allowed("true", policy={"allow": []})
    assert not _allowed("true", policy={"deny": [["false"]]})


def test_no_set_but_manage_names_a_tag_and_observe_changes_nothing():
    assert all(not word.startswith("@tag:") for rule in SETS["observe"] for word in rule)
    for argv in (("qvm-prefs", "a", "b", "c"), ("qvm-tags", "a", "add", "b"), ("qvm-features", "a", "b", "c"), ("qvm-features", "--unset", "a", "b")):
        assert not _allowed(*argv, policy={"allow": ["observe"]})


def test_tags_that_can_not_be_looked_up_let_nothing_through(tmp_path):
    def fail(tag):
        raise TransportError("qvm-ls ended with exit code 1")

    config = make_config({"vms": {"work": {"policy": POLICY}}}).for_vm("work")
    with pytest.raises(Refused, match="can't tell"):
        check_policy(config, None, fail, _request("qvm-start build"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("qvm-ls", ("qvm-ls",)),
        ("  qvm-prefs   work\tmemory 400 ", ("qvm-prefs", "work", "memory", "400")),
        ("echo 'a $b' \"c d\"e''", ("echo", "a $b", "c de")),
        ("echo '' \"\"", ("echo", "", "")),
        ("echo ünï", ("echo", "ünï")),
        ("echo a=b --c=d", ("echo", "a=b", "--c=d")),
    ],
)
def test_a_line_without_a_shells_signs_is_its_words(line, words):
    assert split_plain(line) == words


@pytest.mark.parametrize(
    "line",
    ["a; b", "a && b", "a | b", "a > b", "a $b", "a `b`", "a $(b)", 'a "$b"', 'a "`b`"', "a *", "a ?", "a [b]", "a {b,c}", "~/a", "a ~", "a # b"]
    + ["a\\ b", "a 'b", 'a "b', "a=b c", "a=b", "a\nb", "!a", "a &", "(a)", "''", "   ", "a\rb", 'a "b\\c"'],
)
def test_a_line_that_needs_a_shell_is_refused(line):
    with pytest.raises(Refused) as caught:
        split_plain(line)
    assert caught.value.code == "policy"
    assert "no shell" in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="abé=:,./-+@%^_'\" \t~*?$`\\!#&|;<>(){}[]\n", max_size=24))
@example("a b'c'\"d\" '' e")
def test_words_are_those_that_bash_reads(line):
    try:
        words = split_plain(line)
    except Refused:
        return
    # Not a program of bash's own: only the words are looked at.
    shown = subprocess.run(["bash", "--norc", "-c", f"printf '%s\\0' x {line}"], capture_output=True, check=True, cwd="/")
    assert shown.stdout.decode().split("\0")[1:-1] == list(words)


def _request(line, form="shell", argv=None):
    return Request("work", new_cid(), line, argv, form, 5, b"", b"mac", b"k" * 32)


def _config(**own):
    return make_config({"vms": {"work": own}}).for_vm("work")


def test_with_rules_a_line_becomes_the_words_that_were_compared():
    allowed = check_policy(_config(policy=POLICY), None, _tagged, _request("echo 'a  b'"))
    assert (allowed.form, allowed.argv) == ("argv", ("echo", "a  b"))
    assert check_policy(_config(), None, _tagged, _request("a | b")).form == "shell"


@pytest.mark.parametrize(
    ("policy", "request_", "text"),
    [
        (POLICY, _request("echo a | sh"), "no shell"),
        (POLICY, _request("echo a\nls | sort", "script"), "line 2"),
        (POLICY, _request("[]", "argv", ("rm", "x")), "qvm-remote-dom0 explain work"),
        ("none", _request("true"), "qvm-remote:vms:work gives it a policy"),
    ],
)
def test_a_refusal_says_what_to_do(policy, request_, text):
    with pytest.raises(Refused) as caught:
        check_policy(_config(policy=policy), None, _tagged, request_)
    assert caught.value.code == "policy"
    assert text in str(caught.value)


def test_a_ping_runs_nothing_and_is_always_answered():
    request = _request("ping", "ping")
    assert check_policy(_config(policy="none"), None, _tagged, request) == dataclasses.replace(request, by="ping")


def test_a_request_that_was_let_through_says_by_which_rule():
    assert check_policy(_config(), None, _tagged, _request("ls | wc")).by == "full"
    assert check_policy(_config(policy=POLICY), None, _tagged, _request("qvm-ls --raw-list")).by == "allow: qvm-ls **"


def test_the_default_holds_for_vms_without_a_policy_alone():
    config = make_config({"default_policy": "none", "vms": {"work": {"policy": "full"}, "dev": {}}})
    assert [config.for_vm(vm).policy_in_force for vm in ("work", "dev", "other")] == ["full", "none", "none"]
    with pytest.raises(ConfigError, match="single VMs only"):
        make_config({"policy": "full"})


@pytest.fixture
def ledger(tmp_path):
    return Ledger(str(tmp_path / "ledger.sqlite"))


def test_access_ends_by_itself(ledger):
    config = _config(until=1000)
    assert check_policy(config, ledger, _tagged, _request("true"), now=999.0)
    with pytest.raises(Refused) as caught:
        check_policy(config, ledger, _tagged, _request("true"), now=1000.0)
    assert caught.value.code == "ended"
    assert "1970-01-01T00:16:40Z" in str(caught.value)


def test_a_clock_that_goes_back_does_not_prolong_it(ledger, tmp_path):
    config = _config(until=100000)
    assert check_policy(config, ledger, _tagged, _request("true"), now=90000.0)
    assert check_policy(config, ledger, _tagged, _request("true"), now=89950.0)
    # Also not over a restart.
    again = Ledger(str(tmp_path / "ledger.sqlite"))
    with pytest.raises(Refused) as caught:
        check_policy(config, again, _tagged, _request("true"), now=80000.0)
    assert caught.value.code == "clock"
    # A grant with another end is another one, and does not bring the first one back.
    assert check_policy(_config(until=85000), again, _tagged, _request("true"), now=80000.0)
    with pytest.raises(Refused):
        check_policy(config, again, _tagged, _request("true"), now=80000.0)


def test_a_clock_that_is_held_or_lies_a_little_each_time_does_not_prolong_it(ledger):
    # Whoever tells dom0 the time lets none pass, or takes back a little now and then. The kernel counts all the same.
    assert ledger.saw_clock("work", 100000, 90000.0, uptime=50.0) == 90000.0
    assert ledger.saw_clock("work", 100000, 90000.0, uptime=51.0) == 90001.0
    for minute in range(1, 170):
        latest = ledger.saw_clock("work", 100000, 90000.0 + minute % 2, uptime=50.0 + 60 * minute)
        assert latest >= 90000 + 60 * minute
    assert latest >= 100000


def test_a_clock_that_is_held_over_reboots_does_not_prolong_it(ledger, monkeypatch):
    for boot in range(20):
        monkeypatch.setattr(ledger_module, "boot_id", lambda boot=boot: f"boot {boot}")
        for uptime in (10.0, 20.0, 610.0):
            latest = ledger.saw_clock("work", 100000, 90000.0, uptime)
    assert latest >= 100000


def test_access_that_was_seen_to_end_does_not_begin_again(ledger):
    config = _config(until=100000)
    for now in (100000.5, 90000.0):
        with pytest.raises(Refused) as caught:
            check_policy(config, ledger, _tagged, _request("true"), now=now)
        assert caught.value.code == "ended"


def test_without_a_ledger_there_is_no_access_for_a_time(ledger):
    ledger.close()
    with pytest.raises((Refused, LedgerError)):
        check_policy(_config(until=1000), ledger, _tagged, _request("true"), now=1.0)


@pytest.fixture
def dom0(tmp_path):
    """dom0's side with a key for work, everything in a folder of this test."""
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "audit.log"}
    folders = {name: str(tmp_path / folder) for name, folder in names.items()}
    one = Dom0(make_config({**folders, "vms": {"work": {"policy": {"allow": [["echo", "**"]]}}}}))
    one.keyring.put("work", os.urandom(32).hex())
    one.folders = folders
    return one


def _accept(dom0, line):
    cid = new_cid()
    token = make_token(dom0.keyring.get("work"), "work", cid, 60, "shell", line)
    assert dom0.intake.claim([(dom0.intake.admit("work", cid.encode(), line, token, -1), 0)]) == {}
    return cid


def test_no_shell_reads_a_line_that_rules_allowed(dom0):
    cid = _accept(dom0, b"echo '$HOME;' \"a  b\"")
    assert dom0.execution.execute("work", cid)["status"] == "done"
    parts = dom0.results.result("work", cid)[1]
    assert b"".join(parts["out"][1](0)) == b"$HOME; a  b\n"
    with pytest.raises(Refused, match="does not let it"):
        _accept(dom0, b"printf a")


def test_a_command_whose_rule_is_gone_when_its_turn_comes_is_not_run(dom0):
    cid = _accept(dom0, b"echo a")
    dom0.config = make_config({**dom0.folders, "vms": {"work": {"policy": "none"}}})
    assert dom0.execution.execute("work", cid)["status"] == "refused"
    err = b"".join(dom0.results.result("work", cid)[1]["err"][1](0))
    assert b"lets this qube run nothing" in err


def test_time_passes_for_a_vm_that_asks_for_nothing(dom0):
    until = int(time.time()) + 3600
    dom0.config = make_config({**dom0.folders, "vms": {"work": {"until": until}, "dev": {}}})
    dom0.note_time()
    with pytest.raises(Refused) as caught:
        check_policy(dom0.config.for_vm("work"), dom0.ledger, _tagged, _request("true"), now=time.time() - 100)
    assert caught.value.code == "clock"


def test_the_service_notes_what_time_it_is_while_nobody_asks_for_anything(dom0, tmp_path, monkeypatch):
    qvm_ls = tmp_path / "qvm-ls"
    qvm_ls.write_text("#!/bin/sh\n")
    qvm_ls.chmod(0o700)
    real, ahead = time.time, [0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    monkeypatch.setattr(service, "_NOTE_EVERY", 0.1)
    until = int(time.time()) + 3600
    dom0.config = make_config({**dom0.folders, "qvm_ls": str(qvm_ls), "discover_interval": 1, "vms": {"work": {"until": until}}})
    one = service.Service(dom0, None, None, lambda *_: None, lambda text: None)
    thread = threading.Thread(target=one.run)

    def latest():
        # As it stands there: whoever asks by saw_clock would note it.
        with dom0.ledger._lock:
            return (dom0.ledger._db.execute("SELECT max(latest) FROM passed").fetchone()[0]) or 0

    thread.start()
    try:
        for at in (0, 3700):
            ahead[0] = at
            deadline = time.monotonic() + 60
            while latest() < until - 3600 + at:
                assert time.monotonic() < deadline, "it was not noted"
                time.sleep(0.02)
    finally:
        one.stop()
        thread.join(60)
    # Its end came while nobody asked; that the clock is set back afterwards gives it no second beginning.
    ahead[0] = 0
    with pytest.raises(Refused) as caught:
        check_policy(dom0.config.for_vm("work"), dom0.ledger, _tagged, _request("true"))
    assert caught.value.code == "ended"


def test_a_command_whose_time_is_over_when_its_turn_comes_is_not_run(dom0):
    cid = _accept(dom0, b"echo a")
    dom0.config = make_config({**dom0.folders, "vms": {"work": {"until": int(time.time()) - 1}}})
    assert dom0.execution.execute("work", cid)["status"] == "refused"
