# SPDX-License-Identifier: GPL-2.0-or-later
"""What lies in a queue without the rights that the agent needs costs no session: the real agent, run as a user whom rights hold."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile

import pytest
from pullrpc.frames import FrameReader, encode_frame, write_all
from pullrpc.ids import new_cid
from pullrpc.layout import Queue

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
#: Nobody, if we are root: root may do whatever the rights say.
USER = 65534 if os.geteuid() == 0 else os.geteuid()
# All of it is imported first: that user may not be able to read where Python lies.
AGENT = f"""\
import os, sys
sys.path[:0] = [os.path.join({ROOT!r}, folder) for folder in ("_utils", "client")]
import qvm_remote_client.agent, qvm_remote_client.main, qvm_remote_client.migrate
from pullrpc.layout import Queue
if os.geteuid() != {USER}:
    os.setgroups([])
    os.setgid({USER})
    os.setuid({USER})
sys.exit(qvm_remote_client.agent.Agent(Queue(sys.argv[1])).serve())
"""


class Session:
    """A session with an agent of its own."""

    def __init__(self, queue):
        self.queue = queue
        self._agent = subprocess.Popen([sys.executable, "-IS", "-c", AGENT, queue.base], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._reader = FrameReader(self._agent.stdout.fileno())

    def ask(self, op, payload=b"", **request):
        """One request; the agent can do it."""
        write_all(self._agent.stdin.fileno(), encode_frame({"op": op, "n": 1, **request}, payload), None)
        answer, _ = self._reader.read(1 << 20, None)
        assert "error" not in answer
        return answer

    def hello(self):
        return self.ask("hello", limits={"timeout_max": 60})

    def poll(self):
        return self.ask("poll", wait=0, max=24, inline=1 << 16)["items"]

    def end(self):
        self._agent.stdin.close()
        self._agent.stdout.close()
        assert self._agent.wait(60) == 0


@pytest.fixture
def session():
    # Not below pytest's folder, which is its user's alone.
    home = tempfile.mkdtemp(prefix="qvm-remote-rights-")
    os.chown(home, USER, -1)
    queue = Queue(os.path.join(home, ".qvm-remote"))
    queue.make_folders()
    for folder, _, _ in os.walk(queue.base):
        os.chown(folder, USER, -1)
    one = Session(queue)
    yield one
    one.end()
    shutil.rmtree(home, onerror=_make_writable)


def _make_writable(remove, path, _error):
    os.chmod(os.path.dirname(path), 0o700)
    if not os.path.islink(path) and os.path.isdir(path):
        os.chmod(path, 0o700)
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _file(path, mode=0o600, data=b""):
    with open(path, "wb") as file:
        file.write(data)
    os.chown(path, USER, -1)
    os.chmod(path, mode)


def _folder(path, mode, *names):
    os.mkdir(path)
    for name in names:
        _file(os.path.join(path, name))
    os.chown(path, USER, -1)
    os.chmod(path, mode)


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def _serve(session):
    """All that a session does for a command: it is found, taken, streamed, and its result stored."""
    queue, cid = session.queue, new_cid()
    _file(queue.pending(cid), data=b"true")
    _file(queue.pending(f"{cid}.auth"), data=b"token")
    session.hello()
    # Some of what lies in its way is there by now.
    assert [item[0] for item in session.poll()] == [cid]
    session.ask("take", id=cid)
    session.ask("put", b"abc", id=cid, part="out", offset=0, seq=0, mac="0" * 64)
    session.ask("result", b"abcmeta", id=cid, exit=7, inline=1, out=3, err=0, meta=4)
    assert (_read(queue.results(f"{cid}.out")), _read(queue.results(f"{cid}.exit"))) == (b"abc", b"7\n")


def _is_ours(folder):
    return stat.S_ISDIR(os.lstat(folder).st_mode) and stat.S_IMODE(os.lstat(folder).st_mode) == 0o700


MODES = pytest.mark.parametrize("mode", [0, 0o400, 0o500], ids=oct)
NAMES = pytest.mark.parametrize("names", [(), ("inside",)], ids=["empty", "not empty"])


@MODES
@NAMES
def test_where_things_are_put_aside_is_made_ours_again(session, mode, names):
    rejected = session.queue.rejected().rstrip("/")
    _folder(rejected, mode, *names)
    _file(session.queue.pending("no id"))
    _serve(session)
    assert _is_ours(rejected)
    assert len(os.listdir(rejected)) == 1 + len(names)
    assert _read(session.queue.results("no id.exit")) == b"125\n"


def test_a_link_in_the_place_of_what_is_put_aside_is_not_followed(session):
    elsewhere = os.path.join(os.path.dirname(session.queue.base), "elsewhere")
    _folder(elsewhere, 0o500)
    os.symlink(elsewhere, session.queue.rejected().rstrip("/"))
    _file(session.queue.pending("no id"))
    _serve(session)
    assert stat.S_IMODE(os.lstat(elsewhere).st_mode) == 0o500
    assert _is_ours(session.queue.rejected().rstrip("/"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what is another user's")
def test_what_is_another_users_holds_nobody_up(session):
    queue = session.queue
    for path in (queue.rejected().rstrip("/"), queue.pending("no id"), queue.pending(new_cid())):
        os.mkdir(path, 0o700)
    _file(queue.pending("no id either"))
    os.mkfifo(queue.doorbell, 0o600)
    os.close(os.open(queue.agent_lock, os.O_CREAT, 0o600))
    _serve(session)
    assert _read(queue.results("no id either.exit")) == b"125\n"


@MODES
@NAMES
@pytest.mark.parametrize("name", ["no id", "{}", "{}.auth", "{}.in", "{}.cancel"])
def test_a_folder_in_the_queue_is_put_aside_whatever_its_rights(session, mode, names, name):
    cid = new_cid()
    path = session.queue.pending(name.format(cid))
    _folder(path, mode, *names)
    _serve(session)
    if "." in name:
        # It is looked at with its command.
        session.ask("drop", id=cid)
    assert not os.path.lexists(path)


@MODES
@NAMES
def test_a_folder_in_a_commands_place_that_comes_as_it_is_taken_is_put_aside(session, mode, names):
    session.hello()
    cid = new_cid()
    _folder(session.queue.pending(cid), mode, *names)
    session.ask("take", id=cid)
    assert not os.path.lexists(session.queue.pending(cid))
    assert stat.S_ISREG(os.lstat(session.queue.running(cid)).st_mode)


@MODES
@NAMES
@pytest.mark.parametrize("place", ["results/bad.err", "results/bad.exit", "results/{}.out", "results/{}.exit", "results/{}.meta", "running/{}", "results/.{}.stream"])
def test_a_folder_where_something_is_to_be_written_is_put_aside_whatever_its_rights(session, mode, names, place):
    cid, queue = new_cid(), session.queue
    _folder(os.path.join(queue.base, "queue", place.format(cid)), mode, *names)
    for name in (cid, "bad"):
        _file(queue.pending(name))
    session.hello()
    assert len(session.poll()) == 1
    session.ask("take", id=cid)
    session.ask("put", b"abc", id=cid, part="out", offset=0, seq=0, mac="0" * 64)
    session.ask("result", b"abcmeta", id=cid, exit=7, inline=1, out=3, err=0, meta=4)
    assert (_read(queue.results(f"{cid}.exit")), _read(queue.results("bad.exit"))) == (b"7\n", b"125\n")


@pytest.mark.parametrize("name", ["out.part", "stream"])
@pytest.mark.parametrize("mode", [0, 0o400], ids=oct)
def test_a_file_that_can_not_be_written_is_made_anew(session, name, mode):
    cid, queue = new_cid(), session.queue
    _file(queue.running(cid))
    _file(queue.results(f".{cid}.{name}"), mode, b"not ours")
    session.ask("put", b"abc", id=cid, part="out", offset=0, seq=0, mac="0" * 64)
    assert _read(queue.part(cid, "out")) == b"abc"
    assert _read(queue.stream(cid)) == b"0 out 3 " + b"0" * 64 + b"\n"


@pytest.mark.parametrize("mode", [0, 0o400], ids=oct)
def test_a_lock_and_a_doorbell_that_can_not_be_opened_are_made_anew(session, mode):
    queue = session.queue
    _file(queue.agent_lock, mode)
    os.mkfifo(queue.doorbell)
    os.chown(queue.doorbell, USER, -1)
    os.chmod(queue.doorbell, mode)
    _serve(session)
    for path in (queue.agent_lock, queue.doorbell):
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600


@MODES
@pytest.mark.parametrize("folder", ["pending", "running", "results", "."])
def test_the_queues_own_folders_are_made_ours_again(session, folder, mode):
    path = os.path.join(session.queue.base, "queue", folder)
    _file(session.queue.pending("no id"))
    os.chmod(path, mode)
    session.hello()
    assert _is_ours(os.path.normpath(path))
    _serve(session)
