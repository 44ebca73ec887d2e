# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's own commands, driven as a person would: the real program, with a terminal where one matters, and no dom0."""

import fcntl
import json
import os
import pwd
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pullrpc.digests import sha256
from pullrpc.errors import PullError, Refused
from pullrpc.frames import encode_frame
from pullrpc.ids import new_cid
from pullrpc.layout import Queue
from pullrpc.tokens import fingerprint, make_meta
from pullrpc.validate import check_command
from qvm_remote_client import journal, request, table, usage
from qvm_remote_client import main as client_main
from qvm_remote_client.history import drop_old_days
from qvm_remote_client.request import vm_name
from terminals import Terminal

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
QVM_REMOTE = [sys.executable, "-IS", os.path.join(ROOT, "client", "qvm-remote")]
KEY = bytes(range(32))
CID = "20260301-101112-4711-0badcafe"
OLD_CID = "20250102-030405-99-deadbeef"
#: A client that is long gone: no process has this number.
GONE_CID = "20260301-101113-4194999-0badbeef"
QUEUE_COMMANDS = ("'queue status'", "'queue clean'", "'queue debug'", "'queue make'", "'queue check'")
ERROR = "qvm-remote: error: "
NO_KEY = "root has no key here; " if os.geteuid() == 0 else "this qube has no key; "


class Qube:
    """A user's home, and qvm-remote run in it."""

    def __init__(self, home):
        self.home = home
        self.base = home / ".qvm-remote"
        self.env = {"HOME": str(home), "PATH": os.environ["PATH"]}

    def run(self, *words, data=b"", env=None):
        """Run qvm-remote in pipes: (exit code, stdout, stderr)."""
        done = subprocess.run([*QVM_REMOTE, *words], input=data, capture_output=True, env=self.env if env is None else env, timeout=120, check=False)
        return done.returncode, done.stdout, done.stderr

    def ok(self, *words, data=b""):
        """The same, where nothing goes wrong: stdout."""
        code, out, err = self.run(*words, data=data)
        assert (code, err) == (0, b"")
        return out

    def error(self, *words, data=b"", code=125):
        """The same, where something goes wrong: the one line that says so."""
        done = self.run(*words, data=data)
        assert done[:2] == (code, b"")
        text = done[2].decode()
        assert text.startswith(ERROR)
        assert text.endswith("\n")
        assert text.count("\n") == 1
        return text[len(ERROR) : -1]

    def type(self, typed, *words):
        """Run it on a terminal: (exit code, all that the terminal shows). What is typed is typed once there is a question."""
        main_end, client_end = os.openpty()
        client = subprocess.Popen([*QVM_REMOTE, *words], stdin=client_end, stdout=client_end, stderr=client_end, env=self.env, start_new_session=True)
        os.close(client_end)
        shown = b""
        try:
            while True:
                assert select.select([main_end], [], [], 60)[0]
                try:
                    more = os.read(main_end, 65536)
                except OSError:
                    # The client's end is closed.
                    break
                shown += more
                if typed and (b"? [y/N] " in shown or b"(not shown): " in shown):
                    os.write(main_end, typed)
                    typed = b""
            return client.wait(60), shown.replace(b"\r\n", b"\n")
        finally:
            client.kill()
            client.wait()
            os.close(main_end)

    def has_key(self, text=None):
        self.base.mkdir(mode=0o700, exist_ok=True)
        path = self.base / "auth.key"
        path.write_text(text or KEY.hex() + "\n")
        path.chmod(0o600)

    def put(self, name, data=b""):
        """A file below ~/.qvm-remote."""
        path = self.base / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def did(self, cid, command, out=b"", err=b"", exit_code=0, seconds="0.250"):
        """A command in the history, with dom0's proof."""
        fields = {"id": cid, "exit": exit_code, "status": "done", "seconds": seconds}
        meta = make_meta(KEY, cid, sha256(out), sha256(err), fields)
        for name, data in (("command", command), ("out", out), ("err", err), ("exit", b"%d\n" % exit_code), ("meta", meta)):
            self.put(f"history/{cid[:4]}-{cid[4:6]}-{cid[6:8]}/{cid}/{name}", data)

    def did_with_1x(self, cid, command, out=b"", exit_code=0):
        """A command in the history as qvm-remote 1.x keeps it."""
        meta = f"id={cid}\nstarted=2025-01-02T03:04:05\nduration_ms=1500\nexit_code={exit_code}\n"
        for name, data in (("command", command + b"\n"), ("out", out), ("err", b""), ("exit", b"%d" % exit_code), ("meta", meta.encode())):
            self.put(f"history/{cid[:4]}-{cid[4:6]}-{cid[6:8]}/{cid}/{name}", data)

    def waits(self, cid):
        """What a client that waits has open."""
        bell = self.base / "queue" / "results" / f"{cid}.bell"
        bell.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.mkfifo(bell)
        return os.open(bell, os.O_RDWR | os.O_NONBLOCK)


@pytest.fixture
def qube(tmp_path):
    return Qube(tmp_path)


# The words, and help


def test_the_words_that_main_knows_are_those_of_the_table():
    assert set(table.reserved()) == client_main.RESERVED


def test_the_table_is_data_that_can_be_had_without_anything_else():
    program = (
        f"import sys; sys.path.insert(0, {os.path.join(ROOT, 'client')!r}); before = set(sys.modules)\n"
        "from qvm_remote_client import table\nprint(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, check=True)
    assert done.stdout.decode() == "['qvm_remote_client', 'qvm_remote_client.table']\n"


@pytest.mark.parametrize("option", table.OPTIONS, ids=lambda option: option.name)
def test_each_option_of_the_table_is_one_that_a_command_for_dom0_takes(option, capsys):
    for flag in option.flags:
        given = [flag, *(["7"] if option.value else [])]
        options, words, _ = client_main._read_options([*given, "true"])
        if option.name in ("help", "version"):
            assert words is None
            assert capsys.readouterr().out.startswith("usage: " if option.name == "help" else "qvm-remote ")
        else:
            assert words == ["true"]
            assert vars(options)


def test_help_names_all_there_is(qube):
    text = qube.ok("--help").decode()
    assert text == qube.ok("help").decode() == qube.ok("-h").decode()
    for form, _ in table.FORMS:
        assert f"qvm-remote {form}" in text
    for option in table.OPTIONS:
        assert ", ".join(f"{flag} {option.value}".strip() for flag in option.flags) in text
    for command in table.COMMANDS:
        assert f"\n  {' '.join(command.words)}" in text
        assert command.summary in text
    for code, _ in table.EXIT_CODES:
        assert f"\n  {code} " in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", table.COMMANDS, ids=lambda command: "-".join(command.words))
def test_each_command_has_help_of_its_own(qube, command):
    text = qube.ok(*command.words, "--help").decode()
    assert text.startswith(f"usage: qvm-remote {usage.synopsis(command)}\n")
    assert command.summary[1:] in text
    for option in command.options:
        assert all(flag in text for flag in option.flags)
        assert option.help in text
    for argument in command.arguments:
        assert f"  {argument.name} " in text
    assert not qube.base.exists()


def test_help_of_a_word_is_that_of_all_its_commands(qube):
    text = qube.ok("help", "key").decode()
    assert text == qube.ok("key", "--help").decode()
    assert qube.ok("help", "key", "gen") == qube.ok("key", "gen", "--help")
    assert qube.ok("help", "history", "show") == qube.ok("history", "show", "--help")
    assert re.findall("usage: qvm-remote (key [a-z]+)", text) == ["key gen", "key show", "key import", "key fingerprint"]
    assert qube.error("help", "nonsense") == "qvm-remote has no command nonsense; see: qvm-remote --help"


@pytest.mark.parametrize(
    "words, text",
    [
        (["key"], "use 'key gen' or 'key show' or 'key import' or 'key fingerprint'; to run a program named key in dom0: qvm-remote -- key ..."),
        (["key", "steal"], "use 'key gen' or 'key show' or 'key import' or 'key fingerprint'; to run a program named key in dom0: qvm-remote -- key ..."),
        (["key", "gen", "--soft"], "key gen has no option --soft; see: qvm-remote key gen --help"),
        (["key", "gen", "--force=1"], "--force takes no value; see: qvm-remote key gen --help"),
        (["status", "-qv"], "-q takes no value; see: qvm-remote status --help"),
        (["--quiet=3", "true"], "--quiet takes no value; see: qvm-remote --help"),
        (["--exec=ls"], "--exec takes no value; see: qvm-remote --help"),
        (["-t", "99999999", "true"], "-t takes a whole number of seconds, from 1 to 9999999"),
        (["ping", "x"], "ping takes no argument; to run a program named ping in dom0: qvm-remote -- ping ..."),
        (["ping", "-t"], "-t takes a value; see: qvm-remote ping --help"),
        (["ping", "-t", "0"], "-t takes a whole number of seconds, from 1 to 9999999"),
        (["status", "--xml"], "status has no option --xml; see: qvm-remote status --help"),
        (["queue", "eat"], f"use {' or '.join(QUEUE_COMMANDS)}; to run a program named queue in dom0: qvm-remote -- queue ..."),
        (["log", "x"], "N of log is a whole number up to 1000000; to run a program named log in dom0: qvm-remote -- log ..."),
        (["log", "99999999999999999999"], "N of log is a whole number up to 1000000; to run a program named log in dom0: qvm-remote -- log ..."),
        (["log", "-n", "x"], "-n of log is a whole number up to 1000000; to run a program named log in dom0: qvm-remote -- log ..."),
        (["log", "1", "2"], "log takes at most 1 argument; to run a program named log in dom0: qvm-remote -- log ..."),
        (["history", "-5"], "history has no option -5; see: qvm-remote history --help"),
        (["history", "show"], "there is no command in the history yet"),
        (["history", "show", CID], f"there is no command with the id {CID} in the history; see: qvm-remote history 100"),
        (["history", "show", "--json", "--out"], "--command, --out, --err and --json exclude each other; see: qvm-remote history show --help"),
        (["history", "show", "--out", "--err"], "--command, --out, --err and --json exclude each other; see: qvm-remote history show --help"),
        (["cancel"], "cancel needs ID; see: qvm-remote cancel --help"),
        (["cancel", CID], f"no command {CID} waits or runs; those that do are shown by: qvm-remote queue status"),
        (["cancel", "\x1b[2J"], "no command \\x1b[2J waits or runs; those that do are shown by: qvm-remote queue status"),
        (["--\x1b[2J\nx", "true"], "there is no option --\\x1b[2J\\nx; see: qvm-remote --help"),
        (["-n\x07", "true"], "there is no option -\\x07; see: qvm-remote --help"),
        (["log", "--\x1b[2J"], "log has no option --\\x1b[2J; see: qvm-remote log --help"),
        (["help", "\x1b[2J\nx"], "qvm-remote has no command \\x1b[2J\\nx; see: qvm-remote --help"),
        (["agent", "-q"], "agent takes no option; it is started by dom0 alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_gets_one_line_that_says_what_to_type(qube, words, text):
    assert qube.error(*words) == text
    # Nobody has asked for anything yet.
    assert not qube.base.exists()


# Keys


def test_a_new_key_is_kept_from_sight_and_says_what_is_next(qube):
    code, out, err = qube.run("key", "gen")
    secret = (qube.base / "auth.key").read_text().strip()
    assert code == 0
    assert re.fullmatch(r"key of \S+: ([0-9a-f]{4}:){3}[0-9a-f]{4}\n", out.decode())
    assert err.decode().startswith(
        "qvm-remote: next, have dom0 authorize it (the key never appears on a command line), in dom0: sudo qvm-remote-dom0 authorize --from-vm "
    )
    assert secret.encode() not in out + err
    assert stat.S_IMODE((qube.base / "auth.key").stat().st_mode) == 0o600
    assert out.split()[-1] == qube.ok("key", "fingerprint").split()[-1] == fingerprint(bytes.fromhex(secret)).encode()
    assert qube.error("key", "gen") == f"there is a key already ({qube.base}/auth.key); --force replaces it, and dom0 then has to authorize the new one"
    assert qube.run("-q", "key", "gen", "--force")[2] == b""
    assert (qube.base / "auth.key").read_text().strip() != secret


def test_a_key_goes_into_a_pipe_only_when_that_is_said(qube):
    qube.has_key()
    text = qube.error("key", "show")
    assert text == (
        "whoever has this key can do in dom0 what this qube can; to print it all the same: qvm-remote key show --secret; "
        "its name without the secret: qvm-remote key fingerprint"
    )
    assert qube.ok("key", "show", "--secret") == KEY.hex().encode() + b"\n"


def test_on_a_terminal_a_key_is_shown_after_a_yes(qube):
    qube.has_key()
    code, shown = qube.type(b"y\n", "key", "show")
    assert code == 0
    assert b"whoever has this key can do in dom0 what this qube can, and it will stand on this screen. Show it? [y/N]" in shown
    assert shown.endswith(KEY.hex().encode() + b"\n")


@pytest.mark.parametrize("typed", [b"n\n", b"\n", b"\x04"])
def test_on_a_terminal_a_key_is_not_shown_without_a_yes(qube, typed):
    qube.has_key()
    code, shown = qube.type(typed, "key", "show")
    assert code == 125
    assert b"the key was not shown" in shown
    assert KEY.hex().encode() not in shown


def test_on_a_terminal_a_key_that_is_asked_for_comes_with_a_warning(qube):
    qube.has_key()
    assert qube.type(b"", "key", "show", "--secret")[1] == b"qvm-remote: whoever has this key can do in dom0 what this qube can\n" + KEY.hex().encode() + b"\n"


def test_a_key_is_never_taken_as_an_argument(qube):
    text = qube.error("key", "import", KEY.hex())
    assert text == "a key is never taken as an argument, where others can read it; give it on stdin: qvm-remote key import < FILE"
    assert not qube.base.exists()


def test_a_key_that_is_typed_is_not_shown(qube):
    code, shown = qube.type(KEY.hex().encode() + b"\n", "key", "import")
    assert code == 0
    assert KEY.hex().encode() not in shown
    assert fingerprint(KEY).encode() in shown
    assert (qube.base / "auth.key").read_text() == KEY.hex() + "\n"


@pytest.mark.parametrize("words", [["key", "show"], ["key", "import", "--force"]])
def test_ctrl_c_at_a_question_ends_quietly(qube, words):
    qube.has_key()
    main_end, client_end = os.openpty()
    client = subprocess.Popen([*QVM_REMOTE, *words], stdin=client_end, stdout=client_end, stderr=subprocess.PIPE, env=qube.env)
    asked = b""
    while not asked.endswith((b"? [y/N] ", b"(not shown): ")):
        asked += os.read(client.stderr.fileno(), 4096)
    client.send_signal(signal.SIGINT)
    assert (client.communicate(timeout=60)[1], client.returncode) == (b"\n", 130)
    # What is typed next is seen again.
    assert termios.tcgetattr(client_end)[3] & termios.ECHO
    os.close(main_end)
    os.close(client_end)
    assert (qube.base / "auth.key").read_text() == KEY.hex() + "\n"


@pytest.mark.parametrize("text", [KEY.hex(), KEY.hex().upper(), KEY.hex().upper() + "\n"])
def test_a_key_file_of_qvm_remote_1x_serves_as_it_is(qube, text):
    qube.has_key(text)
    assert qube.ok("key", "fingerprint").split()[-1] == fingerprint(KEY).encode()


def test_a_key_that_others_can_read_is_not_used(qube):
    qube.has_key()
    (qube.base / "auth.key").chmod(0o644)
    path = f"{qube.base}/auth.key"
    assert qube.error("key", "fingerprint") == (
        f"others may have read the key {path}; run: chmod 600 {path}; and for another key, in dom0: sudo qvm-remote-dom0 revoke {vm_name()}; "
        "sudo qubesctl state.apply qvm-remote.vm (with key: own, before that, here: qvm-remote key gen --force)"
    )


@pytest.mark.parametrize(("text", "said"), [("", "the key is empty"), ("12\n", "64 hex digits"), ("g" * 64, "64 hex digits, nothing else")])
def test_a_key_file_that_is_none_is_named_with_what_to_do(qube, text, said):
    qube.has_key()
    (qube.base / "auth.key").write_text(text)
    error = qube.error("key", "fingerprint")
    assert error.startswith(f"the key file {qube.base}/auth.key can't be used: the key")
    assert said in error
    assert f"; in dom0: sudo qvm-remote-dom0 revoke {vm_name()}; sudo qubesctl state.apply qvm-remote.vm (" in error
    imported = qube.error("key", "import", "--force", data=text.encode())
    assert said in imported
    assert imported.endswith("; nothing was changed; give 64 hex digits on stdin: qvm-remote key import < FILE")


@pytest.mark.skipif(os.geteuid() != 0, reason="root's mistake is root's")
@pytest.mark.parametrize("words", [["hostname"], ["ping"], ["-n", "true"]])
def test_root_by_sudo_is_told_so_and_gets_no_folder(qube, words):
    assert qube.error(*words).startswith("root has no key here; run qvm-remote without sudo, as the qube's user (")
    assert not qube.base.exists()
    # Root's own queue, by user: root, or from 1.x, is one like any other.
    (qube.home / ".qubes-remote").mkdir()
    assert qube.run(*words)[0] == 125
    assert qube.base.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is only to be had by root")
def test_without_a_key_it_is_said_where_keys_come_from(tmp_path):
    program = f"""
import os, sys
sys.path[:0] = [{os.path.join(ROOT, "client")!r}, {os.path.join(ROOT, "_utils")!r}]
os.environ["HOME"] = {str(tmp_path)!r}
from pullrpc.layout import Queue
from qvm_remote_client import advice
os.setresuid(65534, 65534, 65534)
print(advice.no_key(Queue()))
"""
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, check=True)
    assert done.stdout.decode() == (
        "this qube has no key; if pillar gives it access, dom0 hands one over within a minute (at once by, in dom0: "
        f"sudo qubesctl qvm_remote.hand_over {vm_name()}); where pillar says key: own, make one: qvm-remote key gen\n"
    )


# What dom0 would refuse


@given(st.text(alphabet="ab \t\n\r\0\x07\x1b\x7f\x80\x9f\xa0é\u200b\u202e😀", max_size=8) | st.binary(max_size=6))
def test_what_dom0_refuses_of_a_text_is_refused_here_and_nothing_else(text):
    raw = text.encode() if isinstance(text, str) else text
    try:
        check_command(b"x" + raw, 100)
        is_good = True
    except Refused:
        is_good = False
    if is_good:
        client_main._check_text(raw, "it", "")
    else:
        with pytest.raises(PullError):
            client_main._check_text(raw, "it", "")


@pytest.mark.parametrize("words", [["echo \x1b[2J"], ["--exec", "echo", "a\x07"], ["echo", "\u009b"]])
def test_control_characters_are_refused_before_anything_is_sent(qube, words):
    qube.has_key()
    assert qube.error(*words) == (
        "an argument contains control characters; dom0 takes none but tab, newline and carriage return; send its bytes on stdin instead"
    )
    assert qube.error(data=b"echo \x1b[2J\n") == (
        "the script contains control characters; dom0 takes none but tab, newline and carriage return; "
        "with -s it is passed on as it is: qvm-remote -s < FILE"
    )
    assert qube.error(data=b"echo \xff\n").startswith("the script is not UTF-8 text; ")
    assert not (qube.base / "audit.log").exists()


def test_what_is_too_long_says_what_to_do(qube):
    qube.has_key()
    assert qube.error(data=b"#" * (1 << 20) + b"\n") == (
        "the script is longer than the 1048576 bytes that dom0 takes as a command; with -s it may have 16777216: qvm-remote -s < FILE"
    )
    assert qube.error("-t", "301", "-n", "true") == (
        f"-t 301 is over the limit of 300 s that dom0 sets for this qube (in pillar, qvm-remote: vms: {vm_name()}: timeout)"
    )


def test_a_script_that_does_not_come_is_waited_for_visibly(qube):
    qube.has_key()
    main_end, client_end = os.openpty()
    client = subprocess.Popen(QVM_REMOTE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=client_end, env=qube.env, start_new_session=True)
    try:
        shown = b""
        while b"reading stdin (use -n to send none)" not in shown:
            assert select.select([main_end], [], [], 60)[0]
            shown += os.read(main_end, 4096)
    finally:
        client.kill()
        client.communicate()
        os.close(main_end)
        os.close(client_end)


@pytest.mark.parametrize(("launcher", "package"), [("client/qvm-remote", "qvm_remote_client"), ("dom0/qvm-remote-dom0", "qvm_remote_dom0")])
@pytest.mark.parametrize("is_ignored", [False, True])
def test_an_interrupt_while_the_program_loads_ends_it_without_a_traceback(tmp_path, launcher, package, is_ignored):
    shutil.copy(os.path.join(ROOT, launcher), tmp_path / "program")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / package / "main.py").write_text("import os\nos.kill(os.getpid(), 2)\nmain = lambda argv: 7\n")
    start = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"] if is_ignored else []
    done = subprocess.run([*start, sys.executable, "-IS", str(tmp_path / "program")], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7 if is_ignored else -signal.SIGINT, b"", b"")


# What went before


def test_the_folder_of_the_predecessor_is_moved_once_and_said_so(qube):
    qube.has_key()
    qube.did_with_1x(OLD_CID, b"qvm-ls")
    old = qube.home / ".qubes-remote"
    qube.base.rename(old)
    code, out, err = qube.run("queue", "make")
    assert (code, out) == (0, b"")
    assert err.decode() == f"qvm-remote: moved {old} to {qube.base}: its key, log and history are used from there now\n"
    assert not old.exists()
    assert qube.ok("key", "fingerprint").split()[-1] == fingerprint(KEY).encode()
    assert OLD_CID.encode() in qube.ok("history")
    assert qube.ok("queue", "make") == b""
    assert stat.S_IMODE(qube.base.stat().st_mode) == 0o700


def test_the_folder_of_the_predecessor_is_left_alone_where_there_is_one_of_ours(qube):
    old = qube.home / ".qubes-remote"
    old.mkdir()
    qube.has_key()
    assert qube.ok("queue", "make") == b""
    assert old.exists()


def test_a_link_in_the_place_of_the_predecessors_folder_is_not_followed(qube):
    (qube.home / "elsewhere").mkdir()
    (qube.home / ".qubes-remote").symlink_to(qube.home / "elsewhere")
    assert qube.ok("queue", "make") == b""
    assert (qube.home / ".qubes-remote").is_symlink()
    assert not qube.base.is_symlink()


def test_a_home_that_is_no_folder_is_said_once(qube):
    (qube.home / "file").touch()
    base = qube.home / "file" / ".qvm-remote"
    assert Qube(qube.home / "file").error("queue", "make") == f"can't create the queue under {base}: Not a directory"


def test_the_agent_moves_the_predecessors_folder_too_without_a_word(qube):
    qube.has_key()
    qube.base.rename(qube.home / ".qubes-remote")
    hello = encode_frame({"op": "hello", "n": 1, "v": 2, "limits": {"timeout_max": 300}}, b"")
    code, out, err = qube.run("agent", data=hello)
    assert (code, err) == (0, b"")
    assert b'"v":2' in out.replace(b" ", b"")
    assert (qube.base / "auth.key").exists()


def test_without_a_home_in_the_environment_it_is_the_users(qube):
    home = pwd.getpwuid(os.getuid()).pw_dir
    for env in ({}, {"HOME": ""}, {"HOME": "relative"}):
        code, out, err = qube.run("status", "--json", env=env)
        assert err == b""
        assert json.loads(out)["folder"] == os.path.join(home, ".qvm-remote")


# History and log


def test_history_lists_the_newest_first_with_what_1x_kept(qube):
    qube.has_key()
    qube.did_with_1x(OLD_CID, b"qvm-ls", exit_code=2)
    qube.did(CID, b"echo one\necho two")
    rows = qube.ok("history").decode().splitlines()
    assert rows[0].split() == ["ID", "EXIT", "SECONDS", "COMMAND"]
    assert rows[1].split(None, 3) == [CID, "0", "0.25", "echo one\\necho two"]
    assert rows[2].split(None, 3) == [OLD_CID, "2", "1.50", "qvm-ls"]
    assert len(qube.ok("history", "1").splitlines()) == len(qube.ok("history", "-n1").splitlines()) == 2
    first, second = json.loads(qube.ok("history", "--json"))
    assert first == {
        **{"id": CID, "time": "2026-03-01T10:11:12Z", "command": "echo one\necho two", "exit": 0, "status": "done", "seconds": 0.25},
        **{"stdout_bytes": 0, "stderr_bytes": 0},
    }
    assert (second["id"], second["time"], second["exit"], second["seconds"]) == (OLD_CID, "2025-01-02T03:04:05", 2, 1.5)


def test_without_a_history_there_is_nothing_to_list(qube):
    assert qube.ok("history") == b""
    assert qube.ok("history", "--json") == b"[]\n"
    assert qube.ok("log") == b""
    assert not qube.base.exists()


def test_history_show_gives_all_of_a_command_and_says_whose_it_is(qube):
    qube.has_key()
    qube.did(CID, b"printf", out=b"no newline", err=b"warn\n", exit_code=3)
    for words in ([CID], ["0badcafe"], []):
        assert qube.ok("history", "show", *words).decode() == (
            f"id:       {CID}\ntime:     2026-03-01T10:11:12Z\nended:    exit code 3, done, 0.250 s\nproof:    fits: this is what dom0 sent\n"
            "command:  6 bytes\nprintf\nstdout:   10 bytes\nno newline\nstderr:   5 bytes\nwarn\n"
        )
    shown = json.loads(qube.ok("history", "show", "--json", CID))
    assert (shown["proof"], shown["command"], shown["stdout"], shown["stderr"]) == ("fits", "printf", "no newline", "warn\n")
    assert qube.ok("history", "show", "--out") == b"no newline"
    assert qube.ok("history", "show", "--err", CID) == b"warn\n"
    assert qube.ok("history", "show", "--command", CID) == b"printf"


@pytest.mark.parametrize("part, data", [("out", b"other"), ("err", b"other"), ("exit", b"1\n")])
def test_history_show_tells_what_was_changed_since(qube, part, data):
    qube.has_key()
    qube.did(CID, b"x", out=b"o")
    qube.put(f"history/2026-03-01/{CID}/{part}", data)
    assert json.loads(qube.ok("history", "show", "--json"))["proof"] == "differs"


def test_history_show_claims_no_proof_that_1x_did_not_give(qube):
    qube.has_key()
    qube.did_with_1x(OLD_CID, b"x", out=b"o")
    assert json.loads(qube.ok("history", "show", "--json"))["proof"] == "none"


def test_an_end_of_an_id_that_fits_two_commands_is_refused(qube):
    qube.did(CID, b"x")
    qube.did(CID.replace("4711", "4712"), b"x")
    assert qube.error("history", "show", "0badcafe") == "the ids of several commands end with 0badcafe; see: qvm-remote history 100"


def test_an_id_leads_nowhere_else(qube):
    qube.did(CID, b"x")
    (qube.home / "exit").write_text("0")
    for name in ("../../..", f"../2026-03-01/{CID}", "."):
        assert qube.error("history", "show", name).startswith("there is no command with the id ")


HOSTILE = b"\x1b]0;title\x07\x1b[2Jplain\tand \xc3\xa9\xe2\x80\xae\xff\r\n"
ESCAPED = "\\x1b]0;title\\x07\\x1b[2Jplain\tand é\\u202e\\xff\\r\n"


def test_what_a_command_wrote_can_not_drive_a_terminal_and_is_whole_in_a_pipe(qube):
    qube.has_key()
    qube.did(CID, b"x", out=HOSTILE)
    assert qube.ok("history", "show", "--out") == HOSTILE
    assert HOSTILE in qube.ok("history", "show")
    # A terminal expands no tab that way; what it is sent has it.
    assert qube.type(b"", "history", "show", "--out") == (0, ESCAPED.encode())
    assert ESCAPED.encode() in qube.type(b"", "history", "show")[1]


@pytest.mark.parametrize("part", ["command", "out", "err", "meta", "exit"])
@pytest.mark.parametrize("kind", ["fifo", "link to a device", "folder"])
def test_what_is_no_plain_file_in_the_history_is_neither_waited_for_nor_read(qube, part, kind):
    qube.has_key()
    qube.did(CID, b"x")
    path = qube.base / "history" / "2026-03-01" / CID / part
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert CID.encode() in qube.ok("history")
    assert CID.encode() in qube.run("status")[1]
    for words in ([], ["--json"], *([f"--{name}"] for name in ("command", "out", "err"))):
        if part in ("meta", "exit") or (words and words[0] not in ("--json", f"--{part}")):
            qube.ok("history", "show", *words)
        else:
            code, _, err = qube.run("history", "show", *words)
            assert code == 125
            assert err.startswith(ERROR.encode())
            assert b"Traceback" not in err


def test_history_show_holds_no_more_than_a_block_of_what_a_command_wrote(qube, tmp_path):
    qube.has_key()
    # A character of three bytes lies across each end of a block.
    out = b"\xff" + "€".encode() * (1 << 20)
    qube.did(CID, b"x", out=out)
    assert qube.ok("history", "show", "--out") == out
    assert qube.type(b"", "history", "show", "--out") == (0, b"\\xff" + out[1:])
    with open(qube.base / "history" / "2026-03-01" / CID / "out", "r+b") as file:
        file.truncate(600 << 20)
    # A hole takes no room on the disk, and would in memory.
    shell = ["sh", "-c", 'ulimit -v 300000; exec "$@" | wc -c', "sh", *QVM_REMOTE, "history", "show", "--out"]
    assert subprocess.run(shell, env=qube.env, capture_output=True, check=True).stdout.split() == [b"%d" % (600 << 20)]
    assert qube.error("history", "show", "--json").startswith(f"what {CID} wrote to stdout is too long for --json; ")


def test_the_log_can_not_drive_a_terminal_and_is_whole_in_a_pipe(qube):
    qube.put("audit.log", HOSTILE)
    assert qube.ok("log") == HOSTILE
    assert qube.type(b"", "log") == (0, ESCAPED.encode())


def test_a_list_has_one_line_for_a_command_whatever_is_in_it(qube):
    qube.did(CID, b"echo \x1b[31m\nx")
    for shown in (qube.ok("history"), qube.type(b"", "history")[1]):
        assert b"echo \\x1b[31m\\nx\n" in shown
        assert b"\x1b" not in shown


@pytest.mark.parametrize("number", [b"nan", b"inf", b"-inf", b"1e9999", b"9e99"])
def test_what_is_no_number_that_we_wrote_is_not_known(qube, number):
    qube.did_with_1x(OLD_CID, b"x")
    folder = f"history/2025-01-02/{OLD_CID}"
    qube.put(f"{folder}/exit", number)
    qube.put(f"{folder}/meta", b"duration_ms=" + number)
    assert qube.ok("history").splitlines()[1].split() == [OLD_CID.encode(), b"-", b"-", b"x"]
    assert b"ended:    exit code None, done\n" in qube.ok("history", "show")
    assert b"exit code None: x\n" in qube.run("status")[1]


def test_log_has_a_line_for_a_request_and_one_for_its_end_and_says_so(qube):
    qube.ok("queue", "make")
    queue = Queue(str(qube.base))
    journal.submitted(queue, CID, "shell", b"qvm-ls")
    journal.ended(queue, CID, 0, "done")
    assert [line.split()[1] for line in qube.ok("log", "2").splitlines()] == [b"SUBMIT", b"DONE"]
    assert "The last N lines of the log: one for what was asked for, and one for how it ended." in qube.ok("log", "--help").decode()


def test_log_goes_on_in_the_older_file(qube):
    qube.put("audit.log.1", b"".join(b"old %d\n" % n for n in range(30)))
    qube.put("audit.log", b"new 0\nnew 1\n")
    assert qube.ok("log", "3") == b"old 29\nnew 0\nnew 1\n"
    assert qube.ok("log", "1") == qube.ok("log", "-n", "1") == b"new 1\n"
    assert qube.ok("log", "0") == b""
    assert qube.ok("log").startswith(b"old 12\n")


def test_log_shows_the_end_of_a_log_of_any_length(qube):
    line = b"[2025-01-02 03:04:05] SUBMIT id=20250102-030405-%05d-deadbeef size=6B cmd=qvm-ls\n"
    qube.put("audit.log", b"".join(line % n for n in range(60000)))
    assert (qube.base / "audit.log").stat().st_size > 4 << 20
    assert qube.ok("log", "2") == line % 59998 + line % 59999
    # No line that only its end is known of.
    assert {len(one) for one in qube.ok("log", "1000000").splitlines(keepends=True)} == {len(line % 0)}


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_what_is_no_file_in_the_place_of_the_log_is_named(qube, make):
    qube.put("audit.log.1", b"old\n")
    make(qube.base / "audit.log")
    assert qube.error("log") == f"{qube.base}/audit.log is no plain file; move it away"


def test_what_is_old_goes_but_nothing_that_1x_kept(qube):
    old = "20250102-030405-99-0000beef"
    qube.did(old, b"ours")
    qube.did_with_1x(OLD_CID, b"theirs")
    qube.did("20250103-030405-99-0000beef", b"ours alone that day")
    recent = time.strftime("%Y%m%d-000000-1-0000beef", time.gmtime())
    qube.did(recent, b"new")
    qube.put("history/notes.txt", b"somebody's")
    drop_old_days(str(qube.base / "history"))
    assert [row["id"] for row in json.loads(qube.ok("history", "--json"))] == [recent, OLD_CID]
    assert sorted(os.listdir(qube.base / "history")) == ["2025-01-02", f"{recent[:4]}-{recent[4:6]}-{recent[6:8]}", "notes.txt"]


# What others answer


@pytest.mark.parametrize("status", [b"\xff", b"\x1b[2J", "é".encode(), b""])
def test_a_status_without_proof_is_no_word_of_the_log(qube, status):
    qube.has_key()
    client = subprocess.Popen([*QVM_REMOTE, "-n", "true"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=qube.env)
    _wait(lambda: list(qube.base.glob("queue/pending/*.auth")))
    cid = next(iter(qube.base.glob("queue/pending/*.auth"))).stem
    for part, data in (("out", b""), ("err", b""), ("meta", b"mac -\nexit 0\nstatus " + status + b"\n"), ("exit.new", b"0\n")):
        path = qube.put(f"queue/results/{cid}.{part}", data)
    # It is read as soon as it is there.
    path.rename(path.with_suffix(""))
    out, err = client.communicate(timeout=60)
    assert (client.returncode, out) == (125, b"")
    assert b"Traceback" not in err
    assert (qube.base / "audit.log").read_bytes().endswith(f"DONE id={cid} exit=125 status=refused\n".encode())


def test_the_clients_log_takes_any_text_on_one_line(qube):
    qube.ok("queue", "make")
    journal.ended(Queue(str(qube.base)), CID, 0, "\ufffd\udcff\x1b[2J\nDONE")
    assert qube.ok("log").endswith(b" exit=0 status=\\ufffd\\udcff\\x1b[2J\\nDONE\n")


WRONG_NAMES = ["\x1b[2J", "two words", "a\n", "dom0", "1st", "x" * 32, "\ufffd"]


@pytest.mark.parametrize("wrong", WRONG_NAMES)
def test_a_name_that_no_qube_can_have_is_not_this_ones(monkeypatch, wrong):
    kept = {}
    monkeypatch.setattr(request, "write_whole", lambda path, data: kept.update({path: data}))
    monkeypatch.setattr(request, "_ask_qubesdb", lambda: "work")
    monkeypatch.setattr(request, "read_bounded", lambda path, limit: wrong.encode())
    # It is asked for anew, and that is kept.
    assert request.vm_name() == "work"
    assert list(kept.values()) == [b"work"]
    kept.clear()
    monkeypatch.setattr(request, "_ask_qubesdb", lambda: wrong)
    assert request.vm_name() == os.uname().nodename.split(".")[0]
    assert kept == {}
    monkeypatch.setattr(request, "read_bounded", lambda path, limit: b"personal")
    assert request.vm_name() == "personal"


def test_limits_are_those_that_there_are_and_numbers(qube):
    queue = Queue(str(qube.base))
    qube.put("dom0-limits", b"timeout_max 60\n\x1b[2J 5\nstdin_max -1\nmax_age 1_0\ncommand_max \x1b[2J\nmore 7\n")
    assert request.limits(queue) == {**request._DEFAULT_LIMITS, "timeout_max": 60}
    assert b"\x1b" not in qube.ok("queue", "debug")


def test_no_name_in_the_history_or_in_an_error_drives_a_terminal(qube):
    qube.has_key()
    qube.put("history/2026-03-01/z\x1b[2J\n/command", b"x")
    assert b"\ntime:     not known\n" in qube.ok("history", "show")
    for out in (qube.run("status")[1], qube.type(b"", "status")[1], qube.ok("history"), qube.ok("history", "show")):
        assert b"z\\x1b[2J" in out
        assert b"\x1b" not in out
    other = Qube(qube.home / "a\x1b[2J\nhome")
    other.base.mkdir(parents=True)
    (other.base / "audit.log").symlink_to("elsewhere")
    assert "a\\x1b[2J\\nhome" in other.error("log")


@pytest.mark.parametrize(("how", "is_an_agents"), [(fcntl.LOCK_EX, False), (fcntl.LOCK_SH, True)], ids=["client", "agent"])
def test_only_a_lock_that_stays_is_an_agents(qube, monkeypatch, how, is_an_agents):
    held = os.open(qube.put("agent.lock"), os.O_RDWR)
    fcntl.flock(held, how)
    # Another client has it for the moment in which it looks.
    monkeypatch.setattr(request.time, "sleep", lambda seconds: None if is_an_agents else fcntl.flock(held, fcntl.LOCK_UN))
    assert request.connected(Queue(str(qube.base))) is is_an_agents
    os.close(held)


# Status and queue


def test_status_says_what_is_wrong_first_and_changes_nothing(qube):
    code, out, err = qube.run("status")
    assert (code, err) == (1, b"")
    assert f"problem:  {NO_KEY}" in out.decode()
    assert not qube.base.exists()
    qube.has_key()
    code, out, _ = qube.run("status", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["key"] == fingerprint(KEY)
    assert found["problem"].startswith(
        "dom0 has never looked into this qube; have it named in dom0's pillar (qvm-remote: vms: "
    )
    qube.put("dom0-limits", b"timeout_max 60\n")
    found = json.loads(qube.run("status", "--json")[1])
    assert found["problem"] == "dom0 is not connected to this qube; in dom0: sudo qubesctl state.apply qvm-remote.dom0"
    assert (found["connected"], found["limits"]["timeout_max"]) == (False, 60)


def test_status_has_its_table_where_the_history_can_not_be_read(qube):
    qube.has_key()
    qube.ok("queue", "make")
    # So it is for root, too.
    (qube.base / "history" / "2026-03-01").symlink_to("2026-03-01")
    code, out, err = qube.run("status")
    assert (code, err) == (1, b"")
    assert f"key:      {fingerprint(KEY)}\n" in out.decode()
    with open(qube.put("agent.lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert qube.run("status")[1].decode().endswith(f"problem:  can't read the history {qube.base}/history: Too many levels of symbolic links\n")


def test_a_queue_that_is_no_folder_is_said_first(qube):
    (qube.home / "elsewhere").mkdir()
    qube.base.symlink_to(qube.home / "elsewhere")
    found = json.loads(qube.run("status", "--json")[1])
    assert found["problem"].startswith(f"the queue {qube.base} can't be used: it, or a folder in it, is no folder but a symbolic link")
    assert qube.error("-n", "true") == f"{qube.base} must be a folder, and no symbolic link; move it away"


def test_queue_status_tells_what_is_waited_for_from_what_was_left(qube):
    qube.put(f"queue/pending/{CID}", b"waited for")
    qube.put(f"queue/running/{GONE_CID}", b"left \x1b behind")
    bell = qube.waits(CID)
    try:
        text = qube.ok("queue").decode()
        assert re.sub(r"\d+ s", "", text) == re.sub(r"\d+ s", "", qube.ok("queue", "status").decode())
        assert "pending:  1, not taken by dom0 yet\nrunning:  1, in dom0\nresults:  0, not fetched\n" in text
        assert re.search(rf"{CID} +pending +\d+ s  a client waits  waited for\n", text)
        assert re.search(rf"{GONE_CID} +running +\d+ s  its client is gone  left \\x1b behind\n", text)
        assert text.endswith("what clients left that are gone is put away by: qvm-remote queue clean\n")
        first, second = json.loads(qube.ok("queue", "status", "--json"))
        assert (first["id"], first["state"], first["client"], first["command"]) == (CID, "pending", True, "waited for")
        assert (second["id"], second["state"], second["client"]) == (GONE_CID, "running", False)
    finally:
        os.close(bell)


def test_queue_alone_takes_the_options_of_queue_status(qube):
    assert json.loads(qube.ok("queue", "--json")) == []
    assert qube.ok("queue", "-q") == qube.ok("queue", "status", "-q") == qube.ok("-q", "queue")
    assert qube.error("queue", "--xml") == "queue status has no option --xml; see: qvm-remote queue status --help"
    assert qube.error("queue", "-q", "clean").startswith("queue status takes no argument; ")


def test_queue_clean_puts_away_what_nobody_waits_for_and_nothing_else(qube):
    result = GONE_CID.replace("0badbeef", "0000beef")
    running = GONE_CID.replace("0badbeef", "1111beef")
    for cid in (CID, GONE_CID):
        qube.put(f"queue/pending/{cid}", b"x")
        qube.put(f"queue/pending/{cid}.auth", b"token")
        qube.put(f"queue/pending/{cid}.in", b"stdin")
    qube.put(f"queue/running/{running}", b"y")
    for part, data in (("out", b"kept"), ("err", b""), ("meta", b""), ("exit", b"0\n")):
        qube.put(f"queue/results/{result}.{part}", data)
    qube.put("queue/rejected/1.1", b"")
    bell = qube.waits(CID)
    os.close(qube.waits(GONE_CID))
    try:
        assert qube.ok("queue", "clean") == b"2 taken back or cancelled, 1 results moved to the history, 2 other files removed\n"
        pending = os.listdir(qube.base / "queue" / "pending")
        assert sorted(pending) == sorted([CID, f"{CID}.auth", f"{CID}.in", f"{GONE_CID}.cancel", f"{running}.cancel"])
        assert os.listdir(qube.base / "queue" / "running") == []
        assert os.listdir(qube.base / "queue" / "results") == [f"{CID}.bell"]
        assert qube.ok("history", "show", "--out", result) == b"kept"
        assert b" exit=125 status=cleaned\n" in qube.ok("log")
        assert qube.ok("queue", "clean") == b"nothing was left\n"
    finally:
        os.close(bell)


@pytest.mark.parametrize("is_older", [False, True])
def test_a_result_that_is_put_away_has_the_command_that_the_log_has(qube, is_older):
    qube.ok("queue", "make")
    long_one = GONE_CID.replace("0badbeef", "0000beef")
    commands = {GONE_CID: "printf 'é\\n'\n\techo \\x41 cmd=2".encode(), long_one: b"x" * 1000}
    for cid, command in commands.items():
        journal.submitted(Queue(str(qube.base)), cid, "shell", command)
        qube.put(f"queue/results/{cid}.exit", b"0\n")
    # One that the log does not have any more.
    qube.put(f"queue/results/{CID}.exit", b"0\n")
    if is_older:
        (qube.base / "audit.log").rename(qube.base / "audit.log.1")
    assert qube.ok("queue", "clean").endswith(b" 3 results moved to the history, 0 other files removed\n")
    assert qube.ok("history", "show", "--command", GONE_CID) == commands[GONE_CID]
    assert qube.ok("history", "show", "--command", long_one) == b"x" * 400 + b"..."
    assert [one["command"] for one in json.loads(qube.ok("history", "--json")) if one["id"] == CID] == [""]


def test_the_log_is_read_once_for_all_results_that_are_put_away(qube):
    qube.ok("queue", "make")
    cids = [GONE_CID[:-4] + f"{number:04x}" for number in range(5)]
    for cid in cids:
        qube.put(f"queue/results/{cid}.exit", b"0\n")
        journal.submitted(Queue(str(qube.base)), cid, "shell", cid.encode())
    # Each log goes as it is read.
    program = (
        f"import os, sys; sys.path[:0] = [{os.path.join(ROOT, 'client')!r}, {os.path.join(ROOT, '_utils')!r}]\n"
        "from qvm_remote_client import journal, main\nread = journal._last_lines\n"
        "journal._last_lines = lambda path: (read(path), os.path.exists(path) and os.unlink(path))[0]\nmain.main(['queue', 'clean'])"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", program], env=qube.env, capture_output=True, timeout=60, check=True)
    assert b" 5 results moved" in done.stdout
    assert {one["id"]: one["command"] for one in json.loads(qube.ok("history", "--json"))} == {cid: cid for cid in cids}


def test_a_log_that_others_wrote_to_keeps_no_result_from_the_history(qube):
    qube.put("audit.log", f"] SUBMIT id={GONE_CID} cmd=\\x\\N{{\n] SUBMIT id={GONE_CID}".encode() + b" size=9B cmd=\xff\\ud800\\q\n")
    qube.put(f"queue/results/{GONE_CID}.exit", b"0\n")
    assert b" 1 results moved" in qube.ok("queue", "clean")
    (qube.base / "audit.log").unlink()
    (qube.base / "audit.log").mkdir()
    qube.put(f"queue/results/{CID}.exit", b"0\n")
    assert b" 1 results moved" in qube.ok("queue", "clean")


def test_results_reach_the_history_from_a_queue_on_a_disk_of_its_own(qube):
    qube.ok("queue", "make")
    results = str(qube.base / "queue" / "results")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", results], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        for part, data in (("out", b"kept"), ("err", b""), ("meta", b"m"), ("exit", b"0\n")):
            qube.put(f"queue/results/{GONE_CID}.{part}", data)
        assert qube.ok("queue", "clean") == b"0 taken back or cancelled, 1 results moved to the history, 0 other files removed\n"
        assert os.listdir(results) == []
        assert qube.ok("history", "show", "--out", GONE_CID) == b"kept"
    finally:
        subprocess.run(["umount", "-l", results], check=True)


@pytest.mark.parametrize("part", ["", ".auth", ".cancel"])
def test_queue_clean_removes_what_somebody_was_killed_over_and_not_what_is_being_written(qube, part):
    gone = subprocess.Popen(["true"])
    gone.wait()
    cid = f"20261124-120000-{gone.pid}-0badcafe"
    # The third one's process is younger than the file: it has got the number of one that is gone.
    qube.put(f"queue/pending/.{cid}{part}.{gone.pid}.0badcafe", b"half")
    younger = qube.put(f"queue/pending/.{cid}{part}.{os.getpid()}.1badcafe", b"half")
    os.utime(younger, (1, 1))
    written = qube.put(f"queue/pending/.{cid}{part}.{os.getpid()}.2badcafe", b"half")
    foreign = qube.put("queue/pending/.a.b.1.2badcafe", b"a name that is none of ours")
    qube.ok("queue", "clean")
    assert written.exists()
    assert {path.name for path in qube.base.glob("queue/pending/.*")} <= {written.name, foreign.name}


def test_queue_clean_leaves_the_stdin_that_a_client_is_still_reading(qube):
    reading = new_cid()
    # Of a client that had our number before us, in a qube that was started anew.
    of_another = f"20260301-101112-{os.getpid()}-0badcafe"
    for cid in (reading, GONE_CID, of_another):
        qube.put(f"queue/pending/.{cid}.in", b"so far")
    qube.ok("queue", "clean")
    assert os.listdir(qube.base / "queue" / "pending") == [f".{reading}.in"]


@pytest.mark.parametrize("name", ["{}.auth", ".{}.in"])
def test_queue_clean_takes_a_date_that_there_is_not_for_nobodys(qube, name):
    # A process has that number.
    path = qube.put(f"queue/pending/{name.format('99999999-999999-1-aaaaaaaa')}")
    assert qube.ok("queue", "clean").endswith(b", 1 other files removed\n")
    assert not path.exists()


@pytest.mark.parametrize("mode", [0o700, 0o500], ids=oct)
@pytest.mark.parametrize("name", ["pending/{}", "pending/{}.auth", "running/{}", "results/{}.exit", "results/{}.out", "rejected/1", "results/no id"])
def test_queue_clean_goes_on_where_there_is_a_folder(qube, name, mode):
    last = GONE_CID.replace("0badbeef", "ffffffff")
    place = qube.put(f"queue/{name.format(GONE_CID)}/inside").parent
    if name.endswith("out"):
        qube.put(f"queue/results/{GONE_CID}.exit", b"0\n")
    place.chmod(mode)
    qube.put(f"queue/running/{last}")
    qube.ok("queue", "clean")
    assert os.listdir(qube.base / "queue" / "running") == []
    assert (qube.base / "queue" / "pending" / f"{last}.cancel").exists()
    assert json.loads(qube.ok("queue", "status", "--json")) == []
    if name.endswith(("}", ".exit", ".out")):
        assert len(os.listdir(qube.base / "queue" / "rejected")) == 1


def test_queue_debug_shows_everything_but_secrets(qube):
    qube.has_key()
    qube.put(f"queue/pending/{CID}", b"a command \x1b[31m")
    qube.put(f"queue/pending/{CID}.auth", b"v2 300 shell - secret-token\n")
    qube.put("queue/pending/bad\x1bname", b"")
    os.mkfifo(qube.base / "queue" / "pending" / GONE_CID)
    text = qube.ok("queue", "debug").decode()
    for shown in (f"key: {fingerprint(KEY)}\n", f"{CID}  a command \\x1b[31m\n", f"{CID}.auth\n", "bad\\x1bname", "prw-", "queue/pending/ (4 names)", "dom0: not"):
        assert shown in text
    assert "secret-token" not in text
    assert KEY.hex() not in text
    assert "\x1b" not in text


def test_queue_check_and_make(qube):
    assert qube.run("queue", "check") == (1, b"folder-missing\n", b"")
    assert qube.ok("queue", "make") == b""
    assert qube.ok("queue", "check") == b""


def test_a_command_that_has_ended_is_not_cancelled(qube):
    qube.did(CID, b"x")
    assert qube.error("cancel", "0badcafe") == "0badcafe has ended already; see: qvm-remote history show 0badcafe"


def test_a_cancel_is_kept_for_a_dom0_that_is_not_connected(qube):
    qube.put(f"queue/running/{CID}", b"x")
    assert qube.error("cancel", "0badcafe") == (
        f"can't ask dom0 to cancel {CID}: nothing can be written to the queue {qube.base}/queue/pending/; is the disk full?"
    )
    qube.ok("queue", "make")
    text = qube.ok("cancel", "0badcafe").decode()
    assert text == f"{CID} is taken back; if dom0 runs it, it is told to kill it as soon as it connects to this qube\n"
    assert os.listdir(qube.base / "queue" / "pending") == [f"{CID}.cancel"]


# Signals


@pytest.mark.parametrize(("words", "begun"), [([], "queue/pending"), (["cancel", "0badcafe"], f"queue/pending/{CID}.cancel")])
def test_ctrl_c_where_nothing_is_sent_ends_quietly(qube, words, begun):
    qube.has_key()
    if words:
        qube.ok("queue", "make")
        qube.put(f"queue/running/{CID}", b"x")
    # A dom0 that is connected, and does nothing.
    with open(qube.put("agent.lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        client = subprocess.Popen([*QVM_REMOTE, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=qube.env)
        _wait(lambda: (qube.base / begun).exists())
        client.send_signal(signal.SIGINT)
        out, err = client.communicate(timeout=60)
    assert (client.returncode, out, err) == (130, b"", b"\n")


def test_a_signal_that_the_caller_ignores_is_ignored(qube):
    qube.has_key()
    # As nohup does, and a shell with what it starts in the background.
    shell = ["sh", "-c", 'trap "" HUP INT; exec "$@"', "sh", *QVM_REMOTE, "-n", "true"]
    client = subprocess.Popen(shell, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=qube.env)
    _wait(lambda: list(qube.base.glob("queue/pending/*.auth")))
    # Of several, the lowest number is looked at first.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        client.send_signal(number)
    assert client.wait(60) == 128 + signal.SIGTERM
    client.stderr.close()


def _wait(is_so):
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("words", [["true"], ["--exec", "true"]])
def test_a_stdin_that_can_not_be_read_is_none(qube, words):
    qube.has_key()
    # As nohup gives it to what is typed at a terminal.
    shell = ["sh", "-c", 'exec nohup "$@"', "sh", *QVM_REMOTE, *words]
    main_end, client_end = os.openpty()
    client = subprocess.Popen(shell, stdin=client_end, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=qube.env, start_new_session=True)
    os.close(client_end)
    try:
        _wait(lambda: list(qube.base.glob("queue/pending/*.auth")) or client.poll() is not None)
        assert not list(qube.base.glob("queue/pending/*.in"))
    finally:
        client.terminate()
        said = client.communicate(timeout=20)[0]
        os.close(main_end)
    assert (client.returncode, b"error" in said) == (128 + signal.SIGTERM, False)


@pytest.mark.parametrize(("words", "said"), [([], "no command; give one, or "), (["-s"], "-s reads the script from stdin; give one: ")])
def test_a_stdin_that_can_not_be_read_is_no_script(qube, tmp_path, words, said):
    qube.has_key()
    with open(tmp_path / "file", "wb") as stdin:
        done = subprocess.run([*QVM_REMOTE, *words], stdin=stdin, capture_output=True, env=qube.env, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr.decode().startswith(ERROR + said)


@pytest.mark.parametrize("is_pipe", [False, True])
def test_a_command_goes_on_for_no_client_that_can_not_say_what_it_was_asked_to(qube, is_pipe):
    qube.has_key()
    if is_pipe:
        reader, stderr = os.pipe()
        os.close(reader)
    else:
        stderr = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run([*QVM_REMOTE, "-v", "-n", "true"], env=qube.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, timeout=30, check=False)
    os.close(stderr)
    assert done.returncode == (128 + signal.SIGPIPE if is_pipe else 125)
    (left,) = os.listdir(qube.base / "queue" / "pending")
    assert left.endswith(".cancel")
    assert os.listdir(qube.base / "queue" / "results") == []
    assert b" exit=125 status=no-result\n" in qube.ok("log")


def test_ctrl_c_while_stdin_is_read_asks_dom0_for_nothing(qube):
    qube.has_key()
    client = subprocess.Popen([*QVM_REMOTE, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=qube.env)
    client.stdin.write(b"so far")
    client.stdin.flush()
    _wait(lambda: list(qube.base.glob("queue/pending/.*.in")))
    client.send_signal(signal.SIGINT)
    assert (client.communicate(timeout=20), client.returncode) == ((b"", b"qvm-remote: interrupted; nothing was sent\n"), 130)
    assert os.listdir(qube.base / "queue" / "pending") == []
    assert b" exit=130 status=given-up\n" in qube.ok("log")


def _asking(qube):
    """A client that has sent its request, with a reader that takes no output: (process, end of its stdout to read from, id)."""
    qube.has_key()
    reader, stdout = os.pipe()
    client = subprocess.Popen([*QVM_REMOTE, "-n", "true"], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, env=qube.env)
    os.close(stdout)
    _wait(lambda: list(qube.base.glob("queue/pending/*.auth")))
    return client, reader, next(iter(qube.base.glob("queue/pending/*.auth"))).stem


def _stuck(qube, exit_code):
    """The same one, whose command has ended, with more output than its reader takes."""
    client, reader, cid = _asking(qube)
    meta = make_meta(KEY, cid, sha256(MUCH), sha256(b""), {"id": cid, "exit": exit_code, "status": "done", "seconds": "0.250"})
    for part, data in (("out", MUCH), ("err", b""), ("meta", meta), ("exit.new", b"%d\n" % exit_code)):
        path = qube.put(f"queue/results/{cid}.{part}", data)
    # It is read as soon as it is there.
    path.rename(path.with_suffix(""))
    _wait(lambda: fcntl.ioctl(reader, termios.FIONREAD, b"\0" * 4) == struct.pack("i", fcntl.fcntl(reader, F_GETPIPE_SZ)))
    return client, reader, cid


MUCH = b"x" * (1 << 20)
#: The module fcntl has it from Python 3.10 on.
F_GETPIPE_SZ = 1032


def _has_kept(qube, cid, exit_code, out=MUCH):
    assert qube.ok("log", "1").endswith(f"] DONE id={cid} exit={exit_code} status=done\n".encode())
    (one,) = json.loads(qube.ok("history", "--json"))
    assert (one["id"], one["command"], one["exit"]) == (cid, "true", exit_code)
    assert qube.ok("history", "show", "--out", cid) == out
    assert json.loads(qube.ok("queue", "status", "--json")) == []
    assert os.listdir(qube.base / "queue" / "pending") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_result_is_shown_says_that_the_command_had_ended(qube, number):
    client, reader, cid = _stuck(qube, 3)
    client.send_signal(number)
    err = client.communicate(timeout=20)[1].decode()
    os.close(reader)
    assert client.returncode == 128 + number
    assert err == f"qvm-remote: interrupted; the command had ended with 3, and its output is kept, see: qvm-remote history show {cid}\n"
    _has_kept(qube, cid, 3)


@pytest.mark.parametrize("numbers", [(signal.SIGHUP, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_two_signals_at_once_while_a_result_is_shown_are_one(qube, numbers):
    client, reader, cid = _stuck(qube, 3)
    # As a terminal that is closed: the second comes while the first is answered.
    client.send_signal(signal.SIGSTOP)
    for number in numbers:
        client.send_signal(number)
    client.send_signal(signal.SIGCONT)
    err = client.communicate(timeout=20)[1].decode()
    os.close(reader)
    assert client.returncode in [128 + number for number in numbers]
    assert err == f"qvm-remote: interrupted; the command had ended with 3, and its output is kept, see: qvm-remote history show {cid}\n"
    _has_kept(qube, cid, 3)


@pytest.mark.parametrize("moment", ["before it is read", "while it is checked"])
def test_a_signal_once_a_result_is_there_says_that_the_command_had_ended(qube, moment):
    size = 1 << 8 if moment == "before it is read" else 1 << 28
    # Should the signal come late, it is shown to nobody who reads.
    client, reader, cid = _asking(qube)
    meta = make_meta(KEY, cid, sha256(bytes(size)), sha256(b""), {"id": cid, "exit": 3, "status": "done"})
    if size == 1 << 8:
        client.send_signal(signal.SIGSTOP)
    for part, data in (("out", b""), ("err", b""), ("meta", meta), ("exit.new", b"3\n")):
        path = qube.put(f"queue/results/{cid}.{part}", data)
    os.truncate(qube.base / f"queue/results/{cid}.out", size)
    path.rename(path.with_suffix(""))
    if size > 1 << 8:
        _wait(lambda: any(os.path.basename(one) == f"{cid}.out" for one in _open_files(client.pid)))
    client.send_signal(signal.SIGTERM)
    client.send_signal(signal.SIGCONT)
    err = client.communicate(timeout=60)[1].decode()
    os.close(reader)
    assert client.returncode == 128 + signal.SIGTERM
    assert err == f"qvm-remote: interrupted; the command had ended with 3, and its output is kept, see: qvm-remote history show {cid}\n"
    _has_kept(qube, cid, 3, bytes(size))


def _open_files(pid):
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue


def test_a_signal_once_an_answer_is_there_that_is_not_dom0s_has_dom0_kill_the_command(qube):
    qube.has_key()
    client = subprocess.Popen([*QVM_REMOTE, "-n", "true"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=qube.env)
    _wait(lambda: list(qube.base.glob("queue/pending/*.auth")))
    cid = next(iter(qube.base.glob("queue/pending/*.auth"))).stem
    client.send_signal(signal.SIGSTOP)
    qube.put(f"queue/results/{cid}.exit", b"0\n")
    client.send_signal(signal.SIGTERM)
    client.send_signal(signal.SIGCONT)
    err = client.communicate(timeout=60)[1].decode().splitlines()
    assert client.returncode == 128 + signal.SIGTERM
    assert (len(err), err[0].endswith("; it is asked to kill the command")) == (2, True)
    assert err[1] == f"qvm-remote: interrupted; the answer is kept, see: qvm-remote history show {cid}"
    assert os.listdir(qube.base / "queue" / "pending") == [f"{cid}.cancel"]
    assert b" exit=125 status=refused\n" in qube.ok("log")


def test_a_signal_once_a_ping_is_answered_leaves_nothing_behind(qube):
    qube.has_key()
    client = subprocess.Popen([*QVM_REMOTE, "ping"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=qube.env)
    _wait(lambda: list(qube.base.glob("queue/pending/*.auth")))
    client.send_signal(signal.SIGSTOP)
    qube.put(f"queue/results/{next(iter(qube.base.glob('queue/pending/*.auth'))).stem}.exit", b"0\n")
    client.send_signal(signal.SIGTERM)
    client.send_signal(signal.SIGCONT)
    assert (client.communicate(timeout=60), client.returncode) == ((b"", b"qvm-remote: interrupted\n"), 128 + signal.SIGTERM)
    assert os.listdir(qube.base / "queue" / "results") == []


def test_a_command_whose_reader_goes_away_after_its_end_is_logged_as_it_ended(qube):
    client, reader, cid = _stuck(qube, 0)
    os.close(reader)
    assert (client.communicate(timeout=20)[1], client.returncode) == (b"", 128 + signal.SIGPIPE)
    _has_kept(qube, cid, 0)


# Disks, readers, locales


@pytest.fixture
def full_disk(tmp_path):
    """A home on a disk without room for another byte."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("this user can't mount a small file system")
    one = Qube(folder)
    one.has_key()
    one.ok("queue", "make")
    with open(folder / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096):
                pass
        except OSError:
            pass
    yield one
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_nothing_is_left_behind(full_disk):
    queue = f"{full_disk.base}/queue/pending/"
    text = "No space left on device; nothing was sent; the disk is full: free some space and try again"
    assert full_disk.error("-n", "true") == f"can't write to the queue {queue}: {text}"
    assert full_disk.error("cat", data=b"x" * 9000) == f"can't pass stdin on through the queue {queue}: {text}"
    assert full_disk.error("ping") == f"can't write to the queue {full_disk.base}; the disk is full: free some space and try again"
    assert full_disk.error("key", "gen", "--force") == (
        f"can't write {full_disk.base}/auth.key: No space left on device; the disk is full: free some space and try again"
    )
    assert full_disk.ok("key", "fingerprint").split()[-1] == fingerprint(KEY).encode()
    for name in ("pending", "running", "results"):
        assert os.listdir(full_disk.base / "queue" / name) == []


def test_a_reader_that_goes_away_is_no_error_with_a_traceback(qube):
    qube.put("audit.log", b"a line\n" * 100000)
    done = subprocess.run(["bash", "-c", '"$@" | head -n 1; echo ${PIPESTATUS[0]}', "sh", *QVM_REMOTE, "log", "100000"], env=qube.env, capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (b"a line\n141\n", b"")


def test_an_error_that_nobody_can_be_told_has_its_exit_code(qube):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*QVM_REMOTE, "-n", "true"], env=qube.env, stdin=subprocess.DEVNULL, stderr=full, check=False)
    assert done.returncode == 125


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8"])
def test_text_is_utf_8_whatever_the_locale(qube, locale):
    qube.has_key()
    qube.did(CID, "echo é".encode())
    done = subprocess.run([*QVM_REMOTE, "history"], env={**qube.env, "LC_ALL": locale}, capture_output=True, check=True)
    assert "echo é\n".encode() in done.stdout


def test_without_anything_in_the_environment_it_still_says_what_is_wrong(qube):
    shutil.rmtree(qube.base, ignore_errors=True)
    done = subprocess.run(["env", "-i", f"HOME={qube.home}", *QVM_REMOTE, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (125, b"", done.stderr)
    assert done.stderr.startswith(f"{ERROR}{NO_KEY}".encode())


# A long wait


def _shows(waited, size=(24, 80), **env):
    """What a wait of so many seconds shows on a terminal of a size (lines, columns), and whether it is taken away."""
    program = (
        f"import sys, time; sys.path[:0] = [{os.path.join(ROOT, 'client')!r}, {os.path.join(ROOT, '_utils')!r}]\n"
        "from qvm_remote_client.main import Waiting\nline = Waiting(quiet='-q' in sys.argv)\n"
        f"time.monotonic = lambda: line._started + {waited}\nline.tick('running'); line.end(); line.tick('running')"
    )
    main_end, client_end = os.openpty()
    fcntl.ioctl(client_end, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    words = ["-q"] if env.pop("quiet", False) else []
    subprocess.run([sys.executable, "-IS", "-c", program, *words], stdin=subprocess.DEVNULL, stderr=client_end, env=env, check=True, start_new_session=True)
    os.write(client_end, b"$")
    os.close(client_end)
    shown = b""
    while not shown.endswith(b"$"):
        shown += os.read(main_end, 4096)
    os.close(main_end)
    return shown


def test_a_long_wait_is_shown_and_its_line_is_taken_away():
    assert re.fullmatch(rb"\r\x1b\[K[|/\\-] qvm-remote: running in dom0, 61 s\r\x1b\[K\$", _shows(61, TERM="xterm"))
    # One that wrapped could not be taken away.
    assert _shows(61, (24, 20), TERM="xterm") == b"\r\x1b[K/ qvm-remote: runni\r\x1b[K$"
    assert b"running in dom0, 61 s" in _shows(61, (0, 0))


def test_a_short_wait_shows_nothing_nor_does_a_quiet_one_or_a_dumb_terminal():
    assert _shows(0.5, TERM="xterm") == _shows(61, TERM="dumb") == _shows(61, TERM="xterm", quiet=True) == b"$"


def test_in_the_background_no_line_is_taken_away():
    program = (
        f"import os, sys, time; sys.path[:0] = [{os.path.join(ROOT, 'client')!r}, {os.path.join(ROOT, '_utils')!r}]\n"
        "from qvm_remote_client.progress import Progress\n"
        "os.open(os.ttyname(2), os.O_RDWR)\nline = Progress(time.monotonic() - 61)\n"
        "if os.fork() == 0:\n"
        "    line.tick('running')\n    os.setpgid(0, 0)\n    line.clear()\n    os._exit(0)\n"
        "os.wait()\nos.write(2, b'$')"
    )
    terminal = Terminal([sys.executable, "-IS", "-c", program])
    assert terminal.end() == 0
    assert re.fullmatch(r"\r\x1b\[K. qvm-remote: running in dom0, \d+ s\$", terminal.shown)
