# SPDX-License-Identifier: GPL-2.0-or-later
"""Output that appears while the command runs: the real client and the real agent, with a dom0 that sends what a test says."""

import fcntl
import hashlib
import os
import signal
import stat
import struct
import subprocess
import sys
import termios
import time

import pytest
from pullrpc.errors import SessionBroken
from pullrpc.files import knock, write_whole
from pullrpc.frames import PAYLOAD_MAX, FrameReader, encode_frame, write_all
from pullrpc.tokens import chunk_mac, make_meta

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
QVM_REMOTE = [sys.executable, "-IS", os.path.join(ROOT, "client", "qvm-remote")]
#: The client, which waits so long for its request to be taken away that no machine is too slow for it.
_PATIENT = f"""
import sys
sys.path[:0] = [{os.path.join(ROOT, "client")!r}, {os.path.join(ROOT, "_utils")!r}]
from qvm_remote_client import main, request
request._TAKEN_AWAY_WITHIN = 60
sys.exit(main.main(sys.argv[1:]))
"""
KEY = bytes(range(32))
WAIT = 60
#: The module fcntl has it from Python 3.10 on.
_F_GETPIPE_SZ = 1032


class Qube:
    """The VM's side in a folder: the agent in a session with us, and clients."""

    def __init__(self, home):
        self.base = os.path.join(home, ".qvm-remote")
        self.env = {"HOME": home, "PATH": os.environ["PATH"]}
        self.agent = None
        self.clients = []
        self._number = 0
        self.begin()
        self.ask("set-key", KEY.hex().encode())

    def begin(self):
        """Open a session, as dom0 does."""
        self.agent = subprocess.Popen([*QVM_REMOTE, "agent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.env, bufsize=0)
        self._reader = FrameReader(self.agent.stdout.fileno())
        answer = self.ask("hello", v=2, limits={"timeout_max": 300, "command_max": 1 << 20, "stdin_max": 1 << 24, "max_age": 300})
        assert answer["stream"] == 1

    def end(self):
        """Break the session off."""
        self.agent.kill()
        self.agent.wait()
        self.agent.stdin.close()
        self.agent.stdout.close()

    def close(self):
        self.end()
        for client in self.clients:
            client.kill()
            client.wait()
            for file in (client.stdin, client.stdout, client.stderr):
                if file is not None:
                    file.close()

    def ask(self, op, payload=b"", **fields):
        """One request to the agent, and its answer."""
        self._number += 1
        deadline = time.monotonic() + WAIT
        write_all(self.agent.stdin.fileno(), encode_frame({"op": op, "n": self._number, **fields}, payload), deadline)
        answer, self.payload = self._reader.read(PAYLOAD_MAX, deadline)
        assert answer.pop("n") == self._number
        return answer

    def start(self, *words, take=True, program=QVM_REMOTE, **options):
        """Start a client, take its request: (process, command id)."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        client = subprocess.Popen([*program, *words], env=self.env, bufsize=0, **{**pipes, **options})
        self.clients.append(client)
        items = self.ask("poll", wait=WAIT, max=1, inline=1 << 16)["items"]
        cid = items[0][0]
        if take:
            assert self.ask("take", id=cid) == {}
        return client, cid

    def cancelled(self):
        """Wait until a client has given up: its command id."""
        return self.ask("poll", wait=WAIT, max=0, inline=0)["cancels"]

    def path(self, name):
        return os.path.join(self.base, "queue", "results", name)

    def has_history(self, cid):
        return os.path.isdir(os.path.join(self.base, "history", f"{cid[:4]}-{cid[4:6]}-{cid[6:8]}", cid))


class Output:
    """What dom0 sends of one command's output."""

    def __init__(self, qube, cid, key=KEY):
        self._qube = qube
        self.cid = cid
        self._key = key
        self.seq = 0
        self.parts = {"out": b"", "err": b""}

    def put(self, part, data, seq=None, offset=None, mac=None, sent=None):
        """Send a piece; what is given is sent instead of what is true."""
        seq = self.seq if seq is None else seq
        mac = mac or chunk_mac(self._key, self.cid, seq, part, data)
        offset = len(self.parts[part]) if offset is None else offset
        answer = self._qube.ask("put", data if sent is None else sent, id=self.cid, part=part, offset=offset, seq=seq, mac=mac)
        assert "error" not in answer
        self.parts[part] = self.parts[part][:offset] + data
        self.seq = seq + 1
        return answer

    def result(self, exit_code=0, status="done", inline=None, **more):
        """Send the result; inline: what it is instead of what was streamed."""
        parts = self.parts if inline is None else inline
        digests = [hashlib.sha256(parts[part]).digest() for part in ("out", "err")]
        meta = make_meta(self._key, self.cid, *digests, {"id": self.cid, "exit": exit_code, "status": status, **more})
        sizes = {"out": len(parts["out"]), "err": len(parts["err"]), "meta": len(meta)}
        if inline is None:
            assert self._qube.ask("put", meta, id=self.cid, part="meta", offset=0) == {}
            payload = b""
        else:
            payload = parts["out"] + parts["err"] + meta
        return self._qube.ask("result", payload, id=self.cid, exit=exit_code, inline=int(inline is not None), **sizes)


@pytest.fixture
def qube(tmp_path):
    one = Qube(str(tmp_path))
    yield one
    one.close()


def read(file, size):
    """Exactly so many bytes."""
    data = b""
    while len(data) < size:
        more = os.read(file.fileno(), size - len(data))
        assert more, data
        data += more
    return data


def rest(client):
    """Wait for a client's end: (exit code, what is left of its stdout, of its stderr)."""
    out, err = client.communicate(timeout=WAIT)
    return client.returncode, out, err


def test_lines_appear_as_the_command_writes_them_and_once(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    for line in (b"one\n", b"two\n"):
        assert output.put("out", line) == {}
        assert read(client.stdout, 4) == line
    assert output.put("err", b"warn\n") == {}
    assert read(client.stderr, 5) == b"warn\n"
    assert client.poll() is None
    assert output.result(exit_code=7) == {}
    assert rest(client) == (7, b"", b"")
    assert qube.has_history(cid)
    assert os.listdir(qube.path("")) == []


def test_both_streams_keep_dom0s_order(qube):
    client, cid = qube.start("-n", "x", stderr=subprocess.STDOUT)
    output = Output(qube, cid)
    for number in range(50):
        output.put(("out", "err")[number % 3 == 0], b"%d\n" % number)
    whole = b"".join(b"%d\n" % number for number in range(50))
    # While it runs: a result has one stream after the other.
    assert read(client.stdout, len(whole)) == whole
    output.result()
    assert rest(client) == (0, b"", None)


def test_what_was_not_streamed_yet_comes_with_the_result(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    output.put("out", b"begin ")
    assert read(client.stdout, 6) == b"begin "
    whole = {"out": b"begin and end", "err": b"said"}
    assert output.result(inline=whole) == {}
    assert rest(client) == (0, b"and end", b"said")
    assert os.listdir(qube.path("")) == []


def test_a_command_without_streamed_output_is_as_ever(qube):
    client, cid = qube.start("-n", "x")
    Output(qube, cid).result(exit_code=3, inline={"out": b"o", "err": b"e"})
    assert rest(client) == (3, b"o", b"e")


def test_a_piece_sent_twice_is_shown_once(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    output.put("out", b"one\n")
    output.put("out", b"one\n", seq=0, offset=0)
    output.put("out", b"two\n", seq=1)
    output.put("out", b"two\n", seq=1, offset=4)
    output.put("err", b"three\n", seq=2)
    output.result()
    assert rest(client) == (0, b"one\ntwo\n", b"three\n")


def test_a_new_session_goes_on_where_the_last_one_broke(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    output.put("out", b"one\n")
    assert read(client.stdout, 4) == b"one\n"
    qube.end()
    qube.begin()
    output.put("out", b"one\n", seq=0, offset=0)
    output.put("out", b"two\n", seq=1)
    assert read(client.stdout, 4) == b"two\n"
    output.result()
    assert rest(client) == (0, b"", b"")


def test_a_part_that_is_missing_is_never_skipped(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    answer = qube.ask("put", b"x", id=cid, part="out", offset=5, seq=0, mac=chunk_mac(KEY, cid, 0, "out", b"x"))
    assert "missing" in answer["error"]
    output.put("out", b"all")
    output.result()
    assert rest(client) == (0, b"all", b"")


def test_large_output_arrives_whole(qube):
    client, cid = qube.start("-n", "x", stderr=subprocess.DEVNULL)
    output = Output(qube, cid)
    pieces = [os.urandom(PAYLOAD_MAX) for _ in range(40)]
    reader = subprocess.Popen(["sha256sum"], stdin=client.stdout, stdout=subprocess.PIPE)
    client.stdout.close()
    for piece in pieces:
        output.put("out", piece)
        output.put("err", b".")
    output.result()
    told = reader.communicate(timeout=WAIT)[0]
    assert told.split()[0].decode() == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert client.wait(WAIT) == 0


def _assert_stopped(qube, client, cid):
    """Nothing more was shown than "good", dom0 is asked to kill the command, and one line says why."""
    code, out, err = rest(client)
    assert (code, out) == (125, b"")
    assert err.startswith(b"qvm-remote: error: ")
    assert err.count(b"\n") == 1
    assert qube.cancelled() == [cid]
    assert qube.ask("drop", id=cid) == {}
    assert os.listdir(qube.path("")) == []


@pytest.mark.parametrize("is_answered", [True, False])
def test_an_answer_without_proof_is_anybodys_only_if_the_request_stays(qube, is_answered):
    client, cid = qube.start("-n", "x", program=[sys.executable, "-IS", "-c", _PATIENT] if is_answered else QVM_REMOTE)
    for part, data in (("out", b""), ("err", b"qvm-remote: refused: no key\n"), ("meta", b"mac -\n"), ("exit", b"125\n")):
        write_whole(qube.path(f"{cid}.{part}"), data)
    assert knock(qube.path(f"{cid}.bell"))
    # As the agent does it, and somewhat later than it does.
    time.sleep(0.2)
    if is_answered:
        for name in (f"running/{cid}", f"pending/{cid}.auth"):
            os.unlink(os.path.join(qube.base, "queue", name))
    code, _, err = rest(client)
    assert code == 125
    assert b"carries no proof" in err
    assert (b"did not come from dom0" in err) is not is_answered
    assert os.listdir(os.path.join(qube.base, "queue", "pending")) == ([] if is_answered else [f"{cid}.cancel"])


def _foreign_mac(cid):
    return chunk_mac(KEY, "20260101-000000-1-0badcafe", 1, "out", b"evil")


@pytest.mark.parametrize(
    "piece",
    [
        lambda cid: {"data": b"real", "sent": b"evil"},
        lambda cid: {"data": b"evil", "mac": "0" * 64},
        lambda cid: {"data": b"evil", "mac": _foreign_mac(cid)},
        lambda cid: {"data": b"evil", "mac": chunk_mac(bytes(range(1, 33)), cid, 1, "out", b"evil")},
        lambda cid: {"data": b"evil", "mac": chunk_mac(KEY, cid, 1, "err", b"evil")},
        lambda cid: {"data": b"late", "seq": 2},
        lambda cid: {"data": b"good", "seq": 1, "mac": chunk_mac(KEY, cid, 0, "out", b"good")},
    ],
    ids=["bytes", "mac", "another command's", "another key", "the other part", "left out", "the first again as the second"],
)
def test_a_piece_that_is_not_dom0s_next_one_is_never_shown(qube, piece):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    output.put("out", b"good")
    assert read(client.stdout, 4) == b"good"
    output.put("out", **piece(cid))
    _assert_stopped(qube, client, cid)


@pytest.mark.parametrize(
    "line",
    [b"x" * 200, b"x" * 200 + b"\n", b"\n", b"1 out 4\n", b"1 out 300000 " + b"a" * 64 + b"\n", b"1 meta 1 " + b"a" * 64 + b"\n"]
    + [b"-1 out 1 " + b"a" * 64 + b"\n", b"1 out 1 " + b"A" * 64 + b"\n", b"1 out 1 " + b"a" * 64 + b" \n", b"\xff\n"],
)
def test_a_list_of_pieces_that_is_damaged_stops_the_output(qube, line):
    client, cid = qube.start("-n", "x")
    Output(qube, cid).put("out", b"good")
    assert read(client.stdout, 4) == b"good"
    with open(qube.path(f".{cid}.stream"), "ab") as file:
        file.write(line)
    _assert_stopped(qube, client, cid)


@pytest.mark.parametrize("make", [lambda path: os.symlink("/etc/hostname", path), os.mkfifo, os.mkdir], ids=["link", "fifo", "folder"])
@pytest.mark.parametrize("name", [".{}.stream", ".{}.out.part"])
def test_only_plain_files_are_read(qube, make, name):
    client, cid = qube.start("-n", "x")
    make(qube.path(name.format(cid)))
    if name.endswith("part"):
        mac = chunk_mac(KEY, cid, 0, "out", b"x")
        with open(qube.path(f".{cid}.stream"), "w", encoding="ascii") as file:
            file.write(f"0 out 1 {mac}\n")
    code, out, err = rest(client)
    assert (code, out, err.count(b"\n")) == (125, b"", 1)
    assert qube.cancelled() == [cid]


def test_a_piece_whose_bytes_are_cut_off_waits_for_the_result(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    output.put("out", b"good")
    assert read(client.stdout, 4) == b"good"
    mac = chunk_mac(KEY, cid, 1, "out", b"more")
    with open(qube.path(f".{cid}.stream"), "a", encoding="ascii") as file:
        file.write(f"1 out 4 {mac}\n")
    output.result(inline={"out": b"good", "err": b""})
    assert rest(client) == (0, b"", b"")


@pytest.mark.parametrize("words, note", [((), b"qvm-remote: the output above is incomplete\n"), (("-q",), b"")])
def test_a_command_that_was_interrupted_says_so_below_what_it_wrote(qube, words, note):
    client, cid = qube.start("-n", *words, "x")
    output = Output(qube, cid)
    output.put("out", b"some")
    output.put("err", b"warn\n")
    assert read(client.stdout, 4) == b"some"
    assert read(client.stderr, 5) == b"warn\n"
    output.result(exit_code=125, status="interrupted", inline={"out": b"", "err": b"qvm-remote: interrupted\n"})
    assert rest(client) == (125, b"", note + b"qvm-remote: interrupted\n")


def test_a_result_that_is_not_dom0s_is_not_shown_after_a_true_stream(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    output.put("out", b"good")
    assert read(client.stdout, 4) == b"good"
    Output(qube, cid, key=bytes(range(1, 33))).result(inline={"out": b"good, evil", "err": b""})
    code, out, err = rest(client)
    assert (code, out) == (125, b"")
    assert b"not authentic" in err


def test_a_result_is_refused_while_a_part_of_it_is_missing(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    output.put("out", b"good")
    output.parts["out"] = b"good, and more"
    assert "missing" in output.result()["error"]
    assert client.poll() is None
    output.result(inline=output.parts)
    assert rest(client) == (0, b"good, and more", b"")


def test_a_result_that_was_half_stored_is_completed(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    output.put("out", b"good")
    assert read(client.stdout, 4) == b"good"
    os.rename(qube.path(f".{cid}.out.part"), qube.path(f"{cid}.out"))
    assert output.result() == {}
    assert rest(client) == (0, b"", b"")
    assert os.listdir(qube.path("")) == []


def test_a_result_sent_again_after_its_client_took_it_is_stored_nowhere(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    output.put("err", b"good")
    output.result()
    assert rest(client) == (0, b"", b"good")
    assert output.result() == {}
    assert os.listdir(qube.path("")) == []


def test_a_result_is_stored_even_if_the_session_broke_before_the_request_was_taken(qube):
    client, cid = qube.start("-n", "x", take=False)
    output = Output(qube, cid)
    output.put("out", b"good")
    assert output.result() == {}
    assert rest(client) == (0, b"good", b"")


def test_dom0_learns_that_a_client_is_gone(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    assert output.put("out", b"x") == {}
    client.kill()
    client.wait()
    assert output.put("out", b"y") == {"gone": 1}


def test_a_client_without_a_bell_is_not_gone(qube):
    client, cid = qube.start("-n", "x")
    os.unlink(qube.path(f"{cid}.bell"))
    output = Output(qube, cid)
    assert output.put("out", b"x") == {}
    assert read(client.stdout, 1) == b"x"


def test_when_the_reader_leaves_while_output_comes_the_command_is_given_up(qube):
    client, cid = qube.start("-n", "yes")
    output = Output(qube, cid)
    output.put("out", b"y\n")
    assert read(client.stdout, 2) == b"y\n"
    client.stdout.close()
    output.put("out", b"y\n")
    assert client.wait(WAIT) == 128 + signal.SIGPIPE
    assert client.stderr.read() == b""
    assert qube.cancelled() == [cid]


def test_when_the_reader_leaves_a_silent_command_is_given_up(qube):
    client, cid = qube.start("-n", "sleep 1000")
    client.stdout.close()
    assert client.wait(WAIT) == 128 + signal.SIGPIPE
    assert qube.cancelled() == [cid]


def test_a_result_that_nobody_reads_is_kept_in_the_history(qube):
    client, cid = qube.start("-n", "x")
    client.send_signal(signal.SIGSTOP)
    Output(qube, cid).result(inline={"out": b"o" * 100000, "err": b""})
    client.stdout.close()
    client.send_signal(signal.SIGCONT)
    assert client.wait(WAIT) == 128 + signal.SIGPIPE
    assert qube.has_history(cid)
    assert os.listdir(qube.path("")) == []


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)])
def test_a_signal_gives_the_command_up(qube, number, code):
    client, cid = qube.start("-n", "x")
    Output(qube, cid).put("out", b"good")
    assert read(client.stdout, 4) == b"good"
    client.send_signal(number)
    assert rest(client)[:2] == (code, b"")
    assert qube.cancelled() == [cid]


def test_a_signal_once_the_result_is_there_gives_up_nothing(qube):
    client, cid = qube.start("-n", "x")
    output = Output(qube, cid)
    # Its reader takes none of it.
    for _ in range(4):
        output.put("out", b"x" * (1 << 16))
    end = time.monotonic() + WAIT
    while fcntl.ioctl(client.stdout, termios.FIONREAD, bytes(4)) != struct.pack("i", fcntl.fcntl(client.stdout, _F_GETPIPE_SZ)):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert output.result(exit_code=3) == {}
    client.send_signal(signal.SIGTERM)
    code, _, err = rest(client)
    assert (code, err) == (143, f"qvm-remote: interrupted; the command had ended with 3, and its output is kept, see: qvm-remote history show {cid}\n".encode())
    assert qube.has_history(cid)
    assert os.listdir(os.path.join(qube.base, "queue", "pending")) == []


def test_the_disk_of_whoever_reads_is_full(qube):
    with open("/dev/full", "wb") as full:
        client, cid = qube.start("-n", "x", stdout=full)
    Output(qube, cid).put("out", b"good")
    assert client.wait(WAIT) == 125
    assert b"No space left" in client.stderr.read()
    assert qube.cancelled() == [cid]


def test_standard_streams_that_are_closed_are_no_file_of_the_queue(qube):
    qube.start("-n", "x")[0].kill()
    words = ["sh", "-c", 'exec "$@" >&-', "sh", *QVM_REMOTE, "-n", "y"]
    client = subprocess.Popen(words, env=qube.env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    qube.clients.append(client)
    cid = qube.ask("poll", wait=WAIT, max=1, inline=1 << 16)["items"][0][0]
    qube.ask("take", id=cid)
    Output(qube, cid).result(exit_code=4, inline={"out": b"o", "err": b"e"})
    assert client.wait(WAIT) == 4
    assert client.stderr.read() == b"e"


def test_on_a_terminal_the_progress_line_is_gone_before_output_comes(qube):
    main_end, client_end = os.openpty()
    try:
        client, cid = qube.start("-n", "x", stdout=client_end, stderr=client_end)
        os.close(client_end)
        shown = b""
        while b"running in dom0" not in shown:
            shown += os.read(main_end, 4096)
        output = Output(qube, cid)
        output.put("out", b"one\n")
        shown = b""
        while not shown.endswith(b"one\r\n"):
            shown += os.read(main_end, 4096)
        assert shown.endswith(b"\r\033[Kone\r\n")
        output.put("out", b"two\n")
        assert read_fd(main_end, 5) == b"two\r\n"
        output.result()
        assert client.wait(WAIT) == 0
    finally:
        os.close(main_end)


def read_fd(fd, size):
    with os.fdopen(os.dup(fd), "rb", buffering=0) as file:
        return read(file, size)


def test_pieces_are_readable_by_their_owner_alone(qube):
    _, cid = qube.start("-n", "x")
    Output(qube, cid).put("out", b"x")
    for name in (f".{cid}.stream", f".{cid}.out.part"):
        assert stat.S_IMODE(os.stat(qube.path(name)).st_mode) == 0o600


def test_an_idle_agent_finds_what_comes_without_a_knock(qube):
    cid = time.strftime("%Y%m%d-%H%M%S-1-0badcafe", time.gmtime())
    pending = os.path.join(qube.base, "queue", "pending")
    writer = subprocess.Popen(["sh", "-c", 'sleep 3; echo x > "$1/$2"', "sh", pending, cid])
    items = qube.ask("poll", wait=WAIT, max=1, inline=1 << 16)["items"]
    assert [item[0] for item in items] == [cid]
    assert writer.wait(WAIT) == 0


def test_the_agent_ends_with_its_session(qube):
    qube.agent.stdin.close()
    with pytest.raises(SessionBroken):
        qube._reader.read(0, time.monotonic() + WAIT)
    assert qube.agent.wait(WAIT) == 0
    qube.begin()
