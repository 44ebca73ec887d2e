# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0's user is asked about: that all of it is shown, that only a plain yes runs it, and that nobody is worn down."""

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
import types

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from pullrpc import rates as rates_module
from pullrpc import sandbox
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import ConfigError, Refused
from pullrpc.gate import Request, check_policy
from pullrpc.ids import new_cid
from pullrpc.lines import Lines
from pullrpc.policy import decide, decide_steps, describe, split_script
from pullrpc.question import TEXT_MAX, Answer, Question, text_of
from pullrpc.rates import Rates
from pullrpc.tokens import make_token

POLICY = {"allow": [["echo", "**"], ["false"]], "ask": [["printf", "**"], ["echo", "twice"]], "deny": [["printf", "never"]]}


def _nothing(tag):
    return set()


def _request(line, form="shell"):
    return Request("work", new_cid(), line, None, form, 5, b"", b"mac", b"k" * 32)


def _checked(line, form="shell"):
    return check_policy(make_config({"vms": {"work": {"policy": POLICY}}}).for_vm("work"), None, _nothing, _request(line, form))


def test_deny_comes_before_ask_and_ask_before_allow():
    shown = [decide(POLICY, argv, _nothing) for argv in (("printf", "never"), ("printf", "a"), ("echo", "twice"), ("echo", "a"), ("ls",))]
    assert [(one.allowed, one.asks) for one in shown] == [(False, False), (False, True), (False, True), (True, False), (False, False)]
    assert shown[1].rule == "ask: printf **"
    assert "dom0's user is asked about what 2 others name" in describe(make_config({"vms": {"work": {"policy": POLICY}}}).for_vm("work"))


def test_a_script_of_single_commands_is_judged_by_its_strictest_line():
    script = "#!/bin/sh\n# what for\necho a\n\nprintf b\r\n  echo 'c d'\n"
    steps = split_script(script)
    assert steps == [(3, ("echo", "a")), (5, ("printf", "b")), (6, ("echo", "c d"))]
    assert decide_steps(POLICY, steps, _nothing).asks
    assert not decide_steps(POLICY, [*steps, (9, ("printf", "never"))], _nothing).asks
    assert "line 9" in decide_steps(POLICY, [*steps, (9, ("ls",))], _nothing).reason
    assert decide_steps(POLICY, steps[:1], _nothing).allowed
    request = _checked(script, "script")
    assert (request.form, request.asks, request.steps) == ("steps", True, tuple(steps))


@pytest.mark.parametrize("script", ["echo a\nprintf b | sh\n", "echo $(ls)\n", "set -e\n", "# nothing\n", "echo a\n" * 257, "for i in 1; do\necho $i\ndone\n"])
def test_a_script_that_needs_a_shell_is_refused(script):
    with pytest.raises(Refused) as caught:
        _checked(script, "script")
    assert caught.value.code == "policy"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4))
def test_the_text_is_printable_ascii_and_the_words_can_be_read_from_it(words):
    request = dataclasses.replace(_request(""), argv=("printf", *words), form="argv", by="ask: printf **")
    text = text_of(request, "root", 60)
    assert all(" " <= char <= "~" or char == "\n" for char in text)
    line = next(line for line in text.splitlines() if line.startswith("    1  "))[7:]
    read, at = [], 0
    while at < len(line):
        if line[at] == '"':
            word, at = json.JSONDecoder().raw_decode(line, at)
        else:
            end = (line + " ").index(" ", at)
            word, at = line[at:end], end
        read.append(word)
        at += 1
    assert read == ["printf", *words]


def test_what_nobody_would_read_is_refused_before_it_is_asked():
    with pytest.raises(Refused, match="too long to be read"):
        text_of(dataclasses.replace(_request(""), argv=("echo", "a" * TEXT_MAX)), "root", 60)


def _helper(tmp_path, body):
    path = tmp_path / "helper"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("cat > $0.saw; echo yes", "yes"),
        ("exit 0", "failed"),
        ("echo yes; exit 3", "failed"),
        ("echo YES", "failed"),
        ("echo yes sir", "failed"),
        ("exit 1", "no"),
        ("echo yes; exit 1", "no"),
        ("trap '' TERM; echo yes; sleep 60 & wait; sleep 60", "timeout"),
        ("kill -9 $$", "failed"),
    ],
)
def test_only_a_plain_yes_is_a_yes(tmp_path, body, word):
    question = Question(_helper(tmp_path, body), "work", new_cid(), 1 if word == "timeout" else 60)
    assert question.ask("text\n").word == word
    if word == "yes":
        assert (tmp_path / "helper.saw").read_text() == "text\n"


@pytest.fixture
def straggler(tmp_path):
    """Says whether what a helper left behind in another session is still there, and ends it after the test."""
    path = tmp_path / "helper.left"

    def is_there():
        with open(f"/proc/{int(path.read_text())}/stat", encoding="ascii") as file:
            return file.read().split()[2] != "Z"

    yield is_there
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(path.read_text()), signal.SIGKILL)


#: Leaves a process in another session, with what it is given of the helper's streams; its number is in a file once it is there.
_LEAVES = "setsid sh -c 'echo $$ > '$0'.new; mv '$0'.new '$0'.left; exec sleep 60' </dev/null {} & until [ -e $0.left ]; do sleep 0.01; done; "


@pytest.mark.parametrize(
    ("keeps", "body", "word"),
    [
        (">/dev/null", "echo yes", "yes"),
        (">/dev/null", "echo yes; exit 1", "no"),
        (">/dev/null", "echo yes; exit 3", "failed"),
        # Whoever has its stdout may have more to say: that is no answer.
        ("", "echo yes", "timeout"),
        ("", "trap '' TERM; sleep 60 & wait; sleep 60", "timeout"),
    ],
)
def test_what_a_helper_leaves_behind_with_its_streams_is_not_waited_for(tmp_path, straggler, keeps, body, word):
    helper = _helper(tmp_path, _LEAVES.format(keeps) + body)
    # Until it had the time to leave it behind.
    for seconds in (1, 5, 30) if word == "timeout" else (60,):
        answer = Question(helper, "work", new_cid(), seconds).ask("text\n")
        if (tmp_path / "helper.left").exists():
            break
    assert answer.word == word
    assert straggler()


def test_why_a_helper_failed_is_said_though_something_has_its_stderr(tmp_path, straggler):
    question = Question(_helper(tmp_path, _LEAVES.format(">/dev/null") + "echo 'no screen' >&2; exit 2"), "work", new_cid(), 60)
    assert question.ask("text\n") == Answer("failed", "the helper ended with exit code 2: no screen")
    assert straggler()


def test_a_helper_that_is_not_there_is_no_yes_and_the_log_says_so():
    answer = Question("/nowhere/helper", "work", new_cid(), 5).ask("text\n")
    assert answer == Answer("failed", "/nowhere/helper: No such file or directory")


@pytest.mark.parametrize("value", ["zenity", "", "/a b", 5])
def test_the_helper_is_a_path_or_the_one_that_comes_along(value):
    with pytest.raises(ConfigError):
        make_config({"ask_helper": value})


class _World:
    """dom0's side with a key for two VMs, lines that really run commands, and a helper that does as its file says."""

    def __init__(self, tmp_path):
        names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "audit.log"}
        folders = {name: str(tmp_path / folder) for name, folder in names.items()}
        self.folder = tmp_path
        helper = _helper(tmp_path, f'cat > {tmp_path}/asked.$QVM_REMOTE_ID; read a < {tmp_path}/answers; echo "$a"; [ "$a" = yes ]')
        os.mkfifo(tmp_path / "answers")
        self.settings = {**folders, "ask_helper": helper, "ask_timeout": 30, "vms": {vm: {"policy": POLICY} for vm in ("work", "dev")}}
        self.dom0 = Dom0(make_config(self.settings))
        for vm in ("work", "dev"):
            self.dom0.keyring.put(vm, os.urandom(32).hex())
        self.ended, self.logged = {}, []
        self.lines = Lines(self.dom0, self._run, self._unstarted, lambda *_: None, self.logged.append, lambda: None)

    def _run(self, vm, cid):
        self.ended[cid] = self.dom0.execution.execute(vm, cid)["status"]

    def _unstarted(self, vm, cid, reason):
        self.ended[cid] = reason or "late"

    def submit(self, line, vm="work", form="shell"):
        """Bring a request as far as a session does."""
        cid = new_cid()
        token = make_token(self.dom0.keyring.get(vm), vm, cid, 60, form, line)
        request = self.dom0.intake.admit(vm, cid.encode(), line, token, -1)
        if request.asks:
            self.lines.check_question(request)
        assert self.dom0.intake.claim([(request, 0)]) == {}
        assert self.lines.submit(request)
        return cid

    def say(self, word):
        """Answer the question that is asked next."""
        with open(self.folder / "answers", "w", encoding="ascii") as file:
            file.write(word + "\n")

    def wait_end(self, *cids):
        """Wait until commands have ended.

        Returns:
            list of str, how.
        """
        _until(lambda: all(cid in self.ended for cid in cids))
        return [self.ended[cid] for cid in cids]

    def part(self, cid, part, vm="work"):
        """What a command left."""
        return b"".join(self.dom0.results.result(vm, cid)[1][part][1](0))

    def audited(self):
        """The words and answers of the audit log, in order."""
        with open(self.dom0.config.audit_log, encoding="ascii") as file:
            lines = [json.loads(line) for line in file]
        return [(line["what"], line.get("answer", line.get("by"))) for line in lines]


def _until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def world(tmp_path):
    one = _World(tmp_path)
    yield one
    one.lines.close()
    one.lines.wait_idle(10)
    sandbox.close_idle()


def test_what_is_asked_about_runs_after_a_yes_and_not_before(world):
    cid = world.submit(b"printf 'a b'")
    _until(lambda: os.path.exists(world.folder / f"asked.{cid}") and world.lines.open_question)
    assert world.lines.open_question[:2] == ("work", cid)
    assert world.dom0.ledger.state("work", cid)[0] == "claimed"
    world.say("yes")
    assert world.wait_end(cid) == ["done"]
    assert world.part(cid, "out") == b"a b"
    assert '    1  printf "a b"\n' in (world.folder / f"asked.{cid}").read_text()
    kept = world.audited()
    assert [line for line in kept if line[0] in ("asked", "answered", "run")] == [
        ("asked", "ask: printf **"),
        ("answered", "yes"),
        ("run", "ask: printf **; user: yes"),
    ]


def test_a_script_is_asked_about_once_whole_and_runs_line_by_line(world):
    script = b"# a plan\necho one $\nprintf two\n".replace(b" $", b" '$HOME'")
    cid = world.submit(script, form="script")
    world.say("yes")
    assert world.wait_end(cid) == ["done"]
    assert world.part(cid, "out") == b"one $HOME\ntwo"
    shown = (world.folder / f"asked.{cid}").read_text()
    assert '    1  echo one "$HOME"\n    2  printf two\n' in shown


def test_a_script_stops_at_the_first_command_that_fails_and_says_which(world):
    cid = world.submit(b"echo one\nfalse\necho three\n", form="script")
    assert world.wait_end(cid) == ["done"]
    exit_code = world.dom0.results.result("work", cid).exit_code
    assert (exit_code, world.part(cid, "out")) == (1, b"one\n")
    assert b"command 2 of 3 (false) ended with exit code 1; 1 more were not run" in world.part(cid, "err")


def test_a_no_refuses_all_that_waits_from_that_vm_and_makes_it_pause_but_no_other(world):
    first, second = world.submit(b"printf a"), world.submit(b"printf b")
    _until(lambda: world.lines.open_question)
    other = world.submit(b"printf c", vm="dev")
    world.say("no")
    assert world.wait_end(first) == ["refused"]
    assert b"was asked and said no" in world.part(first, "err")
    world.say("yes")
    assert world.wait_end(second, other) == ["refused", "done"]
    assert b"asks again in" in world.part(second, "err")
    with pytest.raises(Refused) as caught:
        world.submit(b"printf d")
    assert caught.value.code == "asked"
    # What needs no question runs meanwhile.
    assert world.wait_end(world.submit(b"echo e")) == ["done"]


def test_one_that_is_withdrawn_is_not_asked_any_more_and_never_runs(world):
    first, second = world.submit(b"printf a"), world.submit(b"printf b")
    _until(lambda: os.path.exists(world.folder / f"asked.{first}"))
    assert world.lines.withdraw("work", second)
    assert world.lines.withdraw("work", first)
    _until(lambda: world.lines.is_done("work"))
    assert world.ended == {}
    # A question that nobody answered, since nobody waited for it, is no no.
    third = world.submit(b"printf c")
    world.say("yes")
    assert world.wait_end(third) == ["done"]


def test_questions_that_come_and_go_count_as_refused(world):
    for number in range(3):
        cid = world.submit(b"printf %d" % number)
        _until(lambda cid=cid: os.path.exists(world.folder / f"asked.{cid}"))
        assert world.lines.withdraw("work", cid)
        _until(lambda: not world.lines.open_question)
    with pytest.raises(Refused) as caught:
        world.submit(b"printf again")
    assert caught.value.code == "asked"


def test_a_yes_is_for_the_user_that_was_named_and_for_no_other(world):
    cid = world.submit(b"printf a")
    _until(lambda: os.path.exists(world.folder / f"asked.{cid}"))
    world.dom0.config = make_config({**world.settings, "vms": {"work": {"policy": POLICY, "run_as": "nobody"}}})
    world.say("yes")
    assert world.wait_end(cid) == ["refused"]
    assert b"as another user" in world.part(cid, "err")


def test_a_yes_is_for_the_request_that_was_shown_and_for_no_other_under_its_id(world):
    cid = world.submit(b"printf a")
    _until(lambda: os.path.exists(world.folder / f"asked.{cid}"))
    # The VM has signed another one as well, and it lies where the one lay that is being asked about.
    token = make_token(world.dom0.keyring.get("work"), "work", cid, 60, "shell", b"printf b")
    world.dom0.spool.store_request("work", cid, b"printf b", token)
    world.say("yes")
    assert world.wait_end(cid) == ["refused"]
    assert world.part(cid, "out") == b""
    assert "run" not in [what for what, _ in world.audited()]


def test_that_it_is_asked_is_in_the_log_before_it_is_shown_and_the_answer_before_it_runs(world):
    log = world.dom0.config.audit_log
    _helper(world.folder, f"cat {log} > {world.folder}/log.asked; cat > /dev/null; echo yes")
    world.dom0.config = make_config({**world.settings, "vms": {"work": {"policy": {"ask": [["cp", "**"]]}}}})
    cid = world.submit(f"cp {log} {world.folder}/log.run".encode())
    assert world.wait_end(cid) == ["done"]
    seen = {name: [(line["what"], line["id"]) for line in map(json.loads, (world.folder / name).read_text().splitlines())] for name in ("log.asked", "log.run")}
    assert seen["log.asked"][-1] == ("asked", cid)
    assert [what for what, _ in seen["log.run"]][-3:] == ["asked", "answered", "run"]


def test_what_is_not_answered_when_the_service_ends_is_given_back_and_not_run(world):
    first, second = world.submit(b"printf a"), world.submit(b"printf b")
    _until(lambda: os.path.exists(world.folder / f"asked.{first}"))
    assert sorted(world.lines.close()) == sorted([("work", first), ("work", second)])
    _until(lambda: world.lines.is_done("work"))
    assert world.ended == {}


def test_a_yes_to_what_no_thread_can_be_started_for_is_not_lost_and_the_next_one_is_asked_about(world, monkeypatch):
    first = world.submit(b"printf a")
    start = threading.Thread.start
    with monkeypatch.context() as full:
        _until(lambda: world.lines.open_question)
        full.setattr(threading.Thread, "start", lambda thread: start(thread) if thread.name != "qvm-remote-run" else _no_room())
        world.say("yes")
        assert "can't start a thread" in world.wait_end(first)[0]
    second = world.submit(b"printf b", vm="dev")
    world.say("yes")
    assert world.wait_end(second) == ["done"]


def _no_room():
    raise RuntimeError("can't start new thread")


def test_a_command_nobody_was_asked_about_is_not_run_whatever_the_engine_does(world):
    cid = world.submit(b"echo a")
    assert world.wait_end(cid) == ["done"]
    cid = new_cid()
    token = make_token(world.dom0.keyring.get("work"), "work", cid, 60, "shell", b"printf a")
    request = world.dom0.intake.admit("work", cid.encode(), b"printf a", token, -1)
    world.dom0.intake.claim([(request, 0)])
    assert world.dom0.execution.execute("work", cid)["status"] == "refused"
    assert b"has to be asked" in world.part(cid, "err")


def test_a_no_stays_a_no_though_the_rules_allow_it_by_now(world):
    cid = world.submit(b"printf a")
    _until(lambda: os.path.exists(world.folder / f"asked.{cid}"))
    world.dom0.config = make_config({**world.settings, "vms": {"work": {"policy": "full"}}})
    world.say("no")
    assert world.wait_end(cid) == ["refused"]


@pytest.fixture
def stopped_clock(monkeypatch):
    """While it stands still, no allowance fills up again."""
    monkeypatch.setattr(rates_module, "time", types.SimpleNamespace(monotonic=lambda: 1000.0))


def test_a_vm_has_a_minutes_commands_at_once_and_no_more(stopped_clock):
    rates = Rates()
    for _ in range(60):
        rates.check("work", 60, 100000)
    with pytest.raises(Refused, match="at most 60 commands a minute") as caught:
        rates.check("work", 60, 100000)
    assert caught.value.code == "rate"
    rates.check("dev", 60, 100000)


def test_a_vm_has_a_days_commands_and_then_waits_for_each_one(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rates = Rates()
    for _ in range(10):
        rates.check("work", 60, 10)
    for _ in range(3):
        # What was refused costs nothing.
        with pytest.raises(Refused, match="at most 10 commands a day from this qube; send it again in 8640 s"):
            rates.check("work", 60, 10)
    now[0] += 8641
    rates.check("work", 60, 10)
    with pytest.raises(Refused, match="commands a day"):
        rates.check("work", 60, 10)


def test_a_vm_over_its_rate_is_told_so_and_nothing_of_it_is_kept(world, stopped_clock):
    world.dom0.config = make_config({**world.settings, "vms": {"work": {"policy": POLICY, "rate": 2}}})
    assert world.wait_end(world.submit(b"echo a"), world.submit(b"echo b")) == ["done", "done"]
    with pytest.raises(Refused, match="at most 2 commands a minute"):
        world.submit(b"echo c")
    assert len(os.listdir(world.dom0.spool.path("work", ""))) == 2
