# SPDX-License-Identifier: GPL-2.0-or-later
"""How the agent goes through its queue: a bounded number of names at a time, however many there are, and it reaches each of them."""

import asyncio
import errno
import fcntl
import os
import shutil
import stat
import subprocess

import pytest
from pullrpc import agentless
from pullrpc.config import make_config
from pullrpc.errors import AgentUnable, FrameError, SessionBroken, SpoolError
from pullrpc.files import knock
from pullrpc.ids import new_cid
from pullrpc.layout import Queue
from pullrpc.results import of_bytes
from pullrpc.session import Delivery
from qvm_remote_client import agent as module
from qvm_remote_client import journal
from qvm_remote_client.agent import Agent
from qvm_remote_client.request import connected


class _Counted:
    """A listing of a folder that counts what is taken from it."""

    scandir = staticmethod(os.scandir)
    taken = 0

    def __init__(self, path):
        self._entries = self.scandir(path)

    def __iter__(self):
        return self

    def __next__(self):
        entry = next(self._entries)
        _Counted.taken += 1
        return entry

    def close(self):
        self._entries.close()


@pytest.fixture
def agent(tmp_path, monkeypatch):
    queue = Queue(str(tmp_path / ".qvm-remote"))
    queue.make_folders()
    pipe = os.pipe()
    one = Agent(queue, *pipe)
    one.pending = queue.pending
    monkeypatch.setattr(module.os, "scandir", _Counted)
    yield one
    for fd in pipe:
        os.close(fd)


def _touch(path):
    os.close(os.open(path, os.O_CREAT, 0o600))


def _scan(agent):
    """One step: (commands found, names looked at)."""
    _Counted.taken = 0
    return agent._scan(24, 0)[0], _Counted.taken


def test_a_step_looks_at_a_bounded_number_of_names_and_some_steps_at_all(agent):
    # Names that stay: the temporary files of others, and tokens without a command.
    for number in range(5000):
        _touch(agent.pending(f".half-written-{number}"))
        _touch(agent.pending(f"{new_cid()}.auth"))
    _touch(agent.pending(cid := new_cid()))
    for _ in range(2):
        found = []
        for _ in range(3):
            commands, taken = _scan(agent)
            assert taken <= module._NAMES_MAX
            found += commands
        # All of it was gone through, and it begins anew.
        assert found == [cid]
        assert agent._names is None


def test_a_step_answers_a_bounded_number_of_names_that_are_no_id(agent):
    for number in range(200):
        _touch(agent.pending(f"no id {number}"))
    left = []
    while os.listdir(agent.pending()):
        _scan(agent)
        left.append(len(os.listdir(agent.pending())))
        assert len(left) < 10
    assert left[0] == 200 - module._REJECTS_MAX


def test_of_what_is_put_aside_a_bounded_number_is_kept(agent, monkeypatch):
    monkeypatch.setattr(module, "_REJECTED_KEPT", 10)
    for number in range(50):
        _touch(agent.pending(f"no id {number}"))
    _scan(agent)
    assert os.listdir(agent.pending()) == []
    assert len(os.listdir(agent._queue.rejected())) == 10
    assert len(os.listdir(agent._queue.results())) == 20


def _device(path):
    """A device that may be read without end; whose folder's user is root can have one lie anywhere."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root may make a device here")


@pytest.mark.parametrize("suffix", ["", ".auth", ".in"])
def test_a_device_in_the_queue_is_never_read(agent, monkeypatch, suffix):
    cid = new_cid()
    for part in {"", ".auth", ".in"} - {suffix}:
        _touch(agent.pending(cid + part))
    _device(agent.pending(cid + suffix))
    opened = []
    monkeypatch.setattr(module.os, "open", lambda path, *args, real=os.open, **kwargs: opened.append(path) or real(path, *args, **kwargs))
    found, _ = agent._scan(24, 0)
    described, payload = agent._describe(found, [], 1 << 16)
    assert payload == b""
    # One in the command's place is no request; beside it, it is told as none, and nobody asks for it.
    sizes = [item[1:4] for item in described["items"]]
    assert sizes == {"": [], ".auth": [[0, -1, 0]], ".in": [[0, 0, -1]]}[suffix]
    assert [path for path in opened if str(path).endswith(cid + suffix)] == []
    left = agent._queue.rejected() if suffix == "" else agent.pending()
    assert [name for name in os.listdir(left) if stat.S_ISCHR(os.lstat(os.path.join(left, name)).st_mode)]


@pytest.mark.parametrize("suffix", ["", ".auth", ".in"])
def test_without_the_agent_too_a_device_in_the_queue_is_never_read(tmp_path, suffix):
    queue = Queue(str(tmp_path / ".qvm-remote"))
    queue.make_folders()
    cid = new_cid()
    for part in {"", ".auth", ".in"} - {suffix}:
        _touch(queue.pending(cid + part))
    _device(queue.pending(cid + suffix))
    script = f"{agentless._BEGIN}set -- 24 65536\n{agentless._LIST}"
    # A shell that reads it is ended with those that it has started.
    words = ["timeout", "30", "/bin/sh", "-s"]
    done = subprocess.run(words, input=script.encode(), env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, check=True)
    sizes = {"": [], ".auth": [f"I {cid} 0 -1 0"], ".in": [f"I {cid} 0 0 -1"]}[suffix]
    assert [line for line in done.stdout.decode().splitlines() if line.startswith("I ")] == sizes


@pytest.fixture
def other(tmp_path):
    """A file of the same user's that nobody may write into by another name of it, its key for example; looked at afterwards."""
    path = str(tmp_path / "other")
    with open(path, "wb") as file:
        file.write(b"of another use")
    yield path
    with open(path, "rb") as file:
        assert file.read() == b"of another use"


def test_a_knock_is_for_a_fifo_alone(other, tmp_path):
    # Nobody waits there: it is not said to be gone.
    assert knock(other) is True
    bell = str(tmp_path / "bell")
    os.mkfifo(bell)
    assert knock(bell) is False
    fd = os.open(bell, os.O_RDWR | os.O_NONBLOCK)
    try:
        assert knock(bell) is True
        assert os.read(fd, 10) == b"!"
        # The bell of somebody else, perhaps.
        os.link(bell, str(tmp_path / "second"))
        assert knock(bell) is True
        with pytest.raises(BlockingIOError):
            os.read(fd, 10)
    finally:
        os.close(fd)


_PARTS = {"out": 3, "err": 0, "meta": 4}


@pytest.mark.parametrize("name", ["{}.bell", "{}.out", "{}.exit", ".{}.out.part", ".{}.stream"])
def test_the_agent_writes_into_no_file_that_has_a_second_name(agent, other, name):
    cid = new_cid()
    _touch(agent.pending(cid))
    os.link(other, agent._queue.results(name.format(cid)))
    put = {"id": cid, "part": "out", "offset": 0, "seq": 0, "mac": "0" * 64}
    agent._put(put, b"abc")
    agent._result({"id": cid, "exit": 7, "inline": 1, **_PARTS}, b"abcmeta")
    with open(agent._queue.results(f"{cid}.out"), "rb") as file:
        assert file.read() == b"abc"


def test_the_agent_writes_into_no_second_name_that_comes_as_it_opens_the_file(agent, other, monkeypatch):
    cid = new_cid()
    real = os.open

    def exchange(path, *args, **kwargs):
        if path == agent._queue.part(cid, "out"):
            os.link(other, path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(module.os, "open", exchange)
    with pytest.raises(OSError):
        agent._put({"id": cid, "part": "out", "offset": 0}, b"abc")


@pytest.mark.parametrize("name", ["no id.err", "no id.exit"])
def test_the_agents_answer_to_what_is_no_id_goes_into_no_second_name(agent, other, name):
    os.link(other, agent._queue.results(name))
    _touch(agent.pending("no id"))
    _scan(agent)
    with open(agent._queue.results(name), "rb") as file:
        assert file.read() != b"of another use"


def test_the_clients_log_goes_into_no_second_name(agent, other):
    os.link(other, agent._queue.audit)
    journal.submitted(agent._queue, new_cid(), "shell", b"true")


def _shell(*words):
    return pytest.param(words, id=words[0], marks=pytest.mark.skipif(shutil.which(words[0]) is None, reason=f"{words[0]} is not installed"))


_SHELLS = [_shell("dash", "-s"), _shell("bash", "--posix", "-s"), _shell("busybox", "sh", "-s")]


@pytest.fixture(params=_SHELLS)
def turns(request, tmp_path, monkeypatch):
    """A conversation with a VM that has no agent, whose shell is one of those that there are."""
    queue = Queue(str(tmp_path / ".qvm-remote"))
    queue.make_folders()

    async def run_here(config, vm, words, data, output_max, wait):
        done = subprocess.run(
            ["timeout", "20", *one.under, *request.param], input=b"".join(data), env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, check=False
        )
        one.said.append(done.stderr)
        return done.returncode, done.stdout

    monkeypatch.setattr(agentless, "run_bounded", run_here)
    one = asyncio.run(_begun(make_config({"agentless_interval": 1}), "work"))
    one.queue, one.said, one.under = queue, [], []
    yield one
    assert not any(one.said)


async def _begun(*args):
    # In a loop, as a puller does: Python 3.9 takes its lock for one that is there by then.
    return agentless.Agentless(*args)


async def _deliver(turns, results):
    return [cid async for cid in turns.deliver(results)]


async def _serve(turns, waits, gone):
    """All that is ever told to a VM without an agent: of a request that waits, and of one that its client has taken back meanwhile."""
    await turns.hello()
    # The second time, of what is there by then.
    for _ in range(2):
        await turns.take([waits, gone])
        await turns.poll(0, 24)
    result = Delivery(waits, 7, {part: of_bytes(data) for part, data in (("out", b"x" * 300_000), ("err", b""), ("meta", b"meta"))})
    assert await _deliver(turns, [result]) == [waits]
    await turns.set_key(bytes(32))


#: Where the shell's script puts something, and where it has it before.
_PLACES = [
    *("dom0-seen", ".dom0-seen.part", "dom0-limits", ".dom0-limits", ".dom0-limits.part", "auth.key", ".auth.key.part"),
    *("queue/running/{waits}", "queue/running/{gone}", "queue/results/no id.err", "queue/results/.no id.err.part", "queue/results/no id.exit"),
    *(f"queue/results/{name}" for part in ("out", "err", "meta", "exit") for name in (f"{{waits}}.{part}", f".{{waits}}.{part}.part")),
]


@pytest.mark.parametrize("kind", ["hard link", "link", "fifo", "folder"])
def test_without_the_agent_too_nothing_is_written_into_what_lies_there(turns, other, kind):
    waits, gone, queue = new_cid(), new_cid(), turns.queue
    for place in _PLACES:
        path = os.path.join(queue.base, place.format(waits=waits, gone=gone))
        if kind == "hard link":
            os.link(other, path)
        elif kind == "link":
            os.symlink(other, path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif place != "auth.key":
            # Whatever a folder in the key's place is, it is not ours to take away.
            os.makedirs(os.path.join(path, "inside"))
    for name in ("no id", waits):
        _touch(queue.pending(name))
    asyncio.run(_serve(turns, waits, gone))
    found = {}
    for place in ("dom0-seen", "dom0-limits", "auth.key", *(f"queue/results/{one}" for one in ("no id.err", "no id.exit", f"{waits}.out", f"{waits}.exit"))):
        with open(os.path.join(queue.base, place), "rb") as file:
            found[os.path.basename(place)] = file.read()
    assert found["dom0-seen"] == b""
    assert found["dom0-limits"].startswith(b"timeout_max ")
    assert found["auth.key"] == b"00" * 32 + b"\n"
    assert (found["no id.exit"], found[f"{waits}.exit"], found[f"{waits}.out"]) == (b"125\n", b"7\n", b"x" * 300_000)
    # A marker that was made by hand is as good as one of ours, if it is a plain file.
    assert stat.S_ISREG(os.lstat(queue.running(gone)).st_mode)


@pytest.mark.parametrize("folder", ["", "queue", "queue/running", "queue/results"])
def test_without_the_agent_too_a_link_in_a_folders_place_is_not_followed(turns, tmp_path, folder):
    path = os.path.join(turns.queue.base, folder).rstrip("/")
    os.rename(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    # There would be something to answer.
    _touch(turns.queue.pending("no id"))
    before = sorted(os.walk(tmp_path / "elsewhere"))
    cid = new_cid()

    async def serve():
        await turns.hello()
        await turns.take([cid])
        assert await turns.poll(0, 24) == ([], [])

    asyncio.run(serve())
    assert sorted(os.walk(tmp_path / "elsewhere")) == before


def test_without_the_agent_too_a_result_that_there_is_no_room_for_is_no_end_of_the_conversation(turns):
    cid = new_cid()
    result = Delivery(cid, 7, {"out": of_bytes(b"x" * 300_000), "err": of_bytes(b""), "meta": of_bytes(b"meta")})
    # As a full disk does, it cuts what is written.
    turns.under = ["prlimit", "--fsize=8192"]
    with pytest.raises(AgentUnable):
        asyncio.run(_deliver(turns, [result]))
    turns.under, turns.said = [], []
    assert asyncio.run(_deliver(turns, [result])) == [cid]


@pytest.mark.parametrize("begun", [b"", b"begun"])
def test_a_piece_that_there_is_no_room_for_leaves_none_of_it_behind(agent, monkeypatch, begun):
    cid = new_cid()
    _touch(agent._queue.running(cid))
    if begun:
        agent._put({"id": cid, "part": "out", "offset": 0}, begun)

    def write_some(fd, data):
        os.write(fd, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(module, "write_fully", write_some)
        with pytest.raises(OSError, match="No space left"):
            agent._put({"id": cid, "part": "out", "offset": len(begun)}, b"abcdef")
    part = agent._queue.part(cid, "out")
    if not begun:
        assert not os.path.lexists(part)
    else:
        with open(part, "rb") as file:
            assert file.read() == begun
    agent._put({"id": cid, "part": "out", "offset": len(begun)}, b"abcdef")
    with open(part, "rb") as file:
        assert file.read() == begun + b"abcdef"


def test_a_piece_that_was_stored_before_stays_where_it_can_not_be_stored_again(agent, monkeypatch):
    cid = new_cid()
    _touch(agent._queue.running(cid))
    agent._put({"id": cid, "part": "out", "offset": 0}, b"abc")

    def write_nothing(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_fully", write_nothing)
    with pytest.raises(OSError, match="No space left"):
        agent._put({"id": cid, "part": "out", "offset": 0}, b"abc")
    with open(agent._queue.part(cid, "out"), "rb") as file:
        assert file.read() == b"abc"


_LOOK = {"wait": 0, "max": 24, "inline": 0}


@pytest.fixture
def looking(agent):
    """An agent that has looked at its queue, and will hang up."""
    agent._poll(_LOOK, b"")
    assert connected(agent._queue)
    yield agent
    agent._hang_up()


def _remove(path, tmp_path):
    os.unlink(path)


def _exchange(path, tmp_path):
    os.unlink(path)
    _touch(path)


def _link_elsewhere(path, tmp_path):
    os.link(path, tmp_path / "second")


def _put_folder_there(path, tmp_path):
    os.unlink(path)
    os.mkdir(path)


_HARM = pytest.mark.parametrize("harm", [_remove, _exchange, _link_elsewhere, _put_folder_there])


@_HARM
def test_a_session_whose_lock_was_taken_away_has_one_again(looking, tmp_path, harm):
    harm(looking._queue.agent_lock, tmp_path)
    looking._poll(_LOOK, b"")
    assert connected(looking._queue)
    assert os.lstat(looking._queue.agent_lock).st_nlink == 1


@_HARM
def test_a_session_whose_doorbell_was_taken_away_has_one_again(looking, tmp_path, harm):
    harm(looking._queue.doorbell, tmp_path)
    looking._poll(_LOOK, b"")
    assert knock(looking._queue.doorbell) is True
    assert os.read(looking._bell, 10) == b"!"


def test_a_session_that_lost_its_lock_leaves_the_doorbell_to_the_one_that_has_it(looking):
    os.unlink(looking._queue.agent_lock)
    other = Agent(looking._queue)
    try:
        other._poll(_LOOK, b"")
        looking._hang_up()
        assert connected(looking._queue)
        assert knock(looking._queue.doorbell) is True
        assert os.read(other._bell, 10) == b"!"
    finally:
        other._hang_up()


def test_a_lock_that_somebody_keeps_is_not_waited_for(agent):
    held = os.open(agent._queue.agent_lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        agent._poll(_LOOK, b"")
        assert connected(agent._queue)
        fcntl.flock(held, fcntl.LOCK_UN)
        agent._poll(_LOOK, b"")
        assert connected(agent._queue)
    finally:
        agent._hang_up()
        os.close(held)


@pytest.mark.parametrize("suffix", ["", ".auth", ".in"])
def test_without_the_agent_too_what_vanishes_as_it_is_looked_at_is_not_there(turns, monkeypatch, suffix):
    cid, queue = "20260301-101112-4711-0badcafe", turns.queue
    for part in ("", ".auth", ".in"):
        _touch(queue.pending(cid + part))
    # Its client takes it away just before it is counted. The command is counted first, then what comes with it.
    nth = ["", ".auth", ".in"].index(suffix) + 1
    taken = f'if [ "$(command wc -l < "$HOME/asked")" -eq {nth} ]; then rm -f {cid}{suffix}; return 1; fi'
    wc = f'wc() {{ echo >> "$HOME/asked"; {taken}; command wc "$@"; }}\n'
    monkeypatch.setattr(agentless, "_LIST", wc + agentless._LIST)
    items, cancels = asyncio.run(turns.poll(0, 24))
    assert cancels == []
    assert [(item.command_size, item.token_size, item.stdin_size) for item in items] == {"": [], ".auth": [(0, -1, 0)], ".in": [(0, 0, -1)]}[suffix]


@pytest.mark.parametrize("name", ["no id", "20260301-101112-4711-0badcafe"])
def test_what_vanishes_as_it_is_put_aside_costs_nothing_and_gets_no_answer(agent, monkeypatch, name):
    os.mkdir(agent.pending(name))
    # It must not be taken for one that can't be moved.
    real, failed = os.rename, []

    def rename(source, target):
        if source == agent.pending(name):
            os.rmdir(source)
        try:
            real(source, target)
        except OSError as err:
            failed.append(type(err))
            raise

    with monkeypatch.context() as vanishing:
        vanishing.setattr(module.os, "rename", rename)
        assert agent._scan(24, 0) == ([], [])
    assert failed == [FileNotFoundError]
    assert os.listdir(agent._queue.results()) == []
    assert agent._rejected == 0


def _small(size=10):
    return Delivery(new_cid(), 7, {"out": of_bytes(b"x" * size), "err": of_bytes(b""), "meta": of_bytes(b"meta")})


async def _deliver_some(turns, results):
    reached = []
    with pytest.raises(AgentUnable) as caught:
        async for cid in turns.deliver(results):
            reached.append(cid)
    return reached, caught.value.failed


def _unreadable(message, before=0):
    """A part of a result that dom0 can't read (on) from its disk."""

    def chunks(offset):
        for _ in range(before):
            yield b"x" * (1 << 18)
        raise SpoolError(message)

    return 4 << 18, chunks


def test_without_the_agent_a_result_that_is_cut_off_does_not_reach_the_vm(turns):
    results = [_small(), _small()]
    # Its files went between the look at their sizes and the reading.
    results[0].parts["out"] = (10, lambda offset: [])
    reached, failed = asyncio.run(_deliver_some(turns, results))
    assert (reached, list(failed)) == ([results[1].cid], [results[0].cid])
    assert not [name for name in os.listdir(os.path.join(turns.queue.base, "queue/results")) if results[0].cid in name]


@pytest.mark.parametrize("before", [0, 2])
def test_without_the_agent_too_a_result_that_dom0_can_not_read_holds_up_no_other(turns, before):
    results = [_small(), _small(), _small()]
    bad = results[1]
    bad.parts["out"] = _unreadable("can't read it", before)
    reached, failed = asyncio.run(_deliver_some(turns, results))
    assert (reached, failed) == ([results[0].cid, results[2].cid], {bad.cid: "can't read it"})
    assert not [name for name in os.listdir(os.path.join(turns.queue.base, "queue/results")) if bad.cid in name]


@pytest.mark.parametrize("trouble", ["no room", "a part can't be made", "a part can't be kept", "its last file can't be kept"])
def test_without_the_agent_too_a_result_that_fails_holds_up_no_other_and_keeps_no_room(turns, trouble):
    results = [_small(), _small(20_000 if trouble == "no room" else 10), _small(0), _small()]
    bad = results[1].cid
    for result in results:
        _touch(turns.queue.pending(result.cid))
    turns.under = ["prlimit", "--fsize=8192"]
    if trouble != "no room":
        name = {"a part can't be made": f".{bad}.out.part", "a part can't be kept": f"{bad}.meta", "its last file can't be kept": f"{bad}.exit"}[trouble]
        place = os.path.join(turns.queue.base, "queue/results", name)
        os.makedirs(os.path.join(place, "inside"))
        # Not even root removes that, or moves something into its place.
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False).returncode:
            pytest.skip("nothing can be mounted here")
    try:
        assert asyncio.run(_deliver_some(turns, results)) == ([result.cid for result in results if result.cid != bad], {bad: agentless._UNABLE})
    finally:
        if trouble != "no room":
            subprocess.run(["umount", "-l", place], check=True)
    # What the shell says of it stays in the VM.
    turns.said = []
    for result in results:
        names = {name for name in os.listdir(os.path.join(turns.queue.base, "queue/results")) if result.cid in name and "part" not in name}
        if result.cid != bad:
            assert names == {f"{result.cid}.{part}" for part in ("out", "err", "meta", "exit")}
            assert not os.path.exists(turns.queue.pending(result.cid))
        elif trouble == "no room":
            assert names == set()
    assert os.path.exists(turns.queue.pending(bad))
    turns.under = []
    assert asyncio.run(_deliver(turns, results[1:2])) == [bad]
    with open(os.path.join(turns.queue.base, "queue/results", f"{bad}.exit"), "rb") as file:
        assert file.read() == b"7\n"


def test_without_the_agent_too_only_what_was_sent_can_be_delivered(turns, monkeypatch):
    results, other = [_small(), _small()], new_cid()
    first = results[0].cid.encode()
    said = {
        first + b"\nEND\n": None,
        b"END\n": None,
        first + b"\n" + first + b"\nEND\n": FrameError,
        other.encode() + b"\nEND\n": FrameError,
        b"\xff\nEND\n": FrameError,
        b"\n\nEND\n": FrameError,
        first + b"\n": SessionBroken,
        b"": SessionBroken,
        first + b"\nEND\n\n": SessionBroken,
    }
    for untrusted_output, error in said.items():

        async def say(config, vm, words, data, output_max, wait, untrusted_output=untrusted_output):
            assert output_max < 200
            return 0, untrusted_output

        monkeypatch.setattr(agentless, "run_bounded", say)
        if error:
            with pytest.raises(error) as caught:
                asyncio.run(_deliver(turns, results))
            assert caught.type is error
            continue
        reached = [results[0].cid] if first in untrusted_output else []
        assert asyncio.run(_deliver_some(turns, results)) == (reached, {result.cid: agentless._UNABLE for result in results if result.cid not in reached})
