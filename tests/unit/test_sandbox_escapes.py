# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that mean to break out of the sandbox, harm another one, or stay: as root, and as a user of dom0 who isn't.

Each is contained, all of it is gone afterwards, and another command runs to its end meanwhile.
"""

import array
import contextlib
import os
import pathlib
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap

import pytest
from boxes import MIB, Box, eventually, in_unit_too, is_alive, long_enough, put_in_unit, read
from pullrpc import sandbox, sandbox_slots
from pullrpc.errors import SandboxError

#: Root of a user namespace has no others, and may mount.
_IS_ROOT = os.geteuid() == 0
_HAS_OTHERS = _IS_ROOT and pathlib.Path("/proc/self/uid_map").read_text().split()[2] == str((1 << 32) - 1)
mounts = pytest.mark.skipif(not _IS_ROOT, reason="only root can mount: a working folder is a plain one here")
remounts = pytest.mark.skipif(not _HAS_OTHERS, reason="only the machine's root can remount")
as_others = pytest.mark.skipif(not _HAS_OTHERS, reason="only root can run commands as others")
#: Users of every system, as whom nothing runs elsewhere.
USER, OTHER = "games", "nobody"
_RUN_AS = ["root", pytest.param(USER, marks=as_others)]


@pytest.fixture
def box(request, monkeypatch):
    """A place that other users can get to, with a folder ``common`` that they can write to."""
    with tempfile.TemporaryDirectory(prefix="qvm-remote-") as folder:
        os.chmod(folder, 0o711)
        one = Box(pathlib.Path(folder))
        if getattr(request, "param", "elsewhere") == "in_unit":
            put_in_unit(monkeypatch, one.run_dir)
        one.common = one.folder / "common"
        one.common.mkdir()
        one.common.chmod(0o777)
        yield one
        sandbox.close_idle()
        assert one.left() == [] and one.mounts() == []


@contextlib.contextmanager
def bystander(box, **options):
    """Another command, begun before whatever happens and ended after it, with all that it needs."""
    fifo = box.common / f"go-{os.urandom(4).hex()}"
    os.mkfifo(fifo)
    os.chmod(fifo, 0o666)
    # It has that open before it says so.
    text = f"exec 3<> {fifo}; echo begun; echo own > own; read -r _ <&3; head -c 100000 /dev/zero > more && (cat own) && exit 9"
    handle = box.start("/bin/bash", "-c", text, **options)
    assert eventually(lambda: os.path.exists(handle.job.out_path) and read(handle.job.out_path) == b"begun\n")
    yield
    # Without a reader this is an error: then that command has ended.
    go = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    os.write(go, b"\n")
    os.close(go)
    assert handle.wait().exit_code == 9
    assert read(handle.job.out_path) == b"begun\nown\n"


def python(box, program, *words, **options):
    """Run a Python program."""
    return box.run("/usr/bin/python3", "-I", "-S", "-c", textwrap.dedent(program), *map(str, words), **options)


def processes_of(user):
    """Pids of a user's processes."""
    return subprocess.run(["pgrep", "-u", user], stdout=subprocess.PIPE, check=False).stdout.split()


# What any command may try, root's too.


@mounts
@in_unit_too
def test_a_working_directory_that_is_filled_leaves_room_for_everybody_else(box):
    text = "head -c 64M /dev/zero > file; stat -c %s file; for i in $(seq 3000); do : > $i || break; done 2> errors; ls | wc -l; echo $PPID"
    with bystander(box, work_max=2 * MIB):
        _, out, err = box.sh(text, work_max=2 * MIB)
        size, files, slot = map(int, out.split())
        assert size <= 2 * MIB and files <= 512 and b"No space left" in err
        # The next one in the same slot has all of it again.
        assert box.sh("head -c 1M /dev/zero > file && mkdir -p a/b && echo $PPID", work_max=2 * MIB)[1] == b"%d\n" % slot


@mounts
@pytest.mark.parametrize(
    "harm",
    [
        *("umount -l $TMPDIR/..", "mount -t tmpfs none $TMPDIR/.."),
        *(pytest.param(f"mount -o remount,{how} $TMPDIR/..", marks=remounts) for how in ("size=64M", "ro")),
    ],
)
def test_bounds_that_root_changed_are_not_the_next_commands(box, harm):
    before = box.sh("stat -f -c '%b %c' .", work_max=2 * MIB)[1]
    slot = int(box.sh(f"{harm} && echo $PPID", work_max=2 * MIB)[1])
    outcome, out, _ = box.sh("stat -f -c '%b %c' . && touch $TMPDIR/file && echo $PPID", work_max=2 * MIB)
    assert outcome.exit_code == 0 and out.startswith(before) and int(out.split()[-1]) != slot


@contextlib.contextmanager
def kept_outside(box):
    """Somebody outside of all commands, whom one may hand a descriptor; gives the shell text that does so, and who has it then."""
    path = str(box.common / "keeper")
    hand = f"import array, socket; s = socket.socket(socket.AF_UNIX); s.connect({path!r})\n"
    hand += "s.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [fd]))])\n"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.listen()

        def take():
            with listener.accept()[0] as peer:
                _, [(_, _, data)], _, _ = peer.recvmsg(1, socket.CMSG_SPACE(4))
            return array.array("i", data)[0]

        yield hand, take


@mounts
def test_room_that_somebody_outside_still_holds_is_not_taken_from_the_next_command(box):
    with kept_outside(box) as (hand, take):
        program = "import os; fd = os.open('f', os.O_RDWR | os.O_CREAT); os.write(fd, bytes(1 << 20)); os.unlink('f'); print(os.getppid())\n"
        _, out, _ = box.run("/usr/bin/python3", "-c", program + hand, work_max=2 * MIB)
        fd = take()
        assert os.fstat(fd).st_size == MIB
        outcome, after, _ = box.sh("head -c 1900000 /dev/zero > file && echo $PPID", work_max=2 * MIB)
        assert outcome.exit_code == 0 and after != out
        os.close(fd)


@pytest.mark.parametrize("run_as", _RUN_AS)
def test_an_output_that_somebody_outside_still_holds_delays_nothing_and_reaches_no_other_command(box, run_as):
    with kept_outside(box) as (hand, take):
        _, out, _ = box.run("/usr/bin/python3", "-c", "import os; print(os.getppid(), flush=True); fd = 1\n" + hand, run_as=run_as)
        fd = take()
        with pytest.raises(BrokenPipeError):
            os.write(fd, b"late\n")
        assert box.sh("echo $PPID", run_as=run_as)[1] == out
        os.close(fd)


def test_a_command_without_stdio_works_on(box):
    outcome, out, err = box.sh(f"echo a; exec <&- >&- 2>&-; sleep 0.3; touch {box.common}/there; exit 3")
    assert (outcome.exit_code, out, err) == (3, b"a\n", b"") and (box.common / "there").exists()


def test_a_gibibyte_of_output_is_counted_and_all_but_its_beginning_is_dropped(box):
    with bystander(box):
        outcome, out, _ = box.run("head", "-c", str(1 << 30), "/dev/zero")
        assert (outcome.exit_code, outcome.out_bytes, outcome.out_truncated, len(out)) == (0, 1 << 30, True, MIB)


_DEAF = "python3 -ISc 'import signal, time; signal.pthread_sigmask(0, range(1, 65)); time.sleep(600)'"


@in_unit_too
@pytest.mark.parametrize("ending", ["cancel", "timeout"])
@pytest.mark.parametrize("text", ["trap '' TERM INT HUP QUIT; while :; do sleep 600; done", "kill -STOP $$"])
def test_a_command_that_hears_no_signal_or_stands_still_is_ended(box, ending, text):
    with bystander(box):
        pids = box.common / "pids"
        text = f"echo $$ > {pids}; {_DEAF} & echo $! >> {pids}; {text}"

        def are_there(*_):
            return pids.exists() and pids.read_text().count("\n") == 2

        if ending == "cancel":
            handle = box.start("/bin/bash", "-c", text)
            assert eventually(are_there)
            handle.cancel()
            outcome = handle.wait()
        else:
            outcome, _, _ = long_enough(lambda seconds: box.run("/bin/bash", "-c", text, timeout=seconds), are_there)
        assert outcome.exit_code == {"cancel": 130, "timeout": 124}[ending]
        assert not any(map(is_alive, map(int, pids.read_text().split())))


@in_unit_too
def test_no_process_gets_into_the_group_of_its_supervisor_or_of_another_command(box):
    program = """
        import os, sys, time
        for pid in (os.getppid(), int(sys.argv[1])):
            try:
                os.setpgid(0, os.getpgid(pid))
                print("in")
            except PermissionError:
                print("out")
        if not os.fork():
            os.setpgid(0, 0)
            open(sys.argv[2] + ".new", "w").write(str(os.getpid()))
            os.rename(sys.argv[2] + ".new", sys.argv[2])
            time.sleep(600)
        while not os.path.exists(sys.argv[2]):
            time.sleep(0.01)
    """
    with bystander(box):
        _, out, _ = python(box, program, *children_of(box), box.common / "pid")
        assert out == b"out\nout\n" and not is_alive(int((box.common / "pid").read_text()))


def children_of(box):
    """Pids of commands that run in a box."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"\0TMPDIR={box.run_dir}".encode() in read(f"/proc/{name}/environ"):
                found.append(int(name))
    return found


_LEAVE = {
    "another user's": f"setpriv --reuid={USER} --clear-groups setsid sh -c 'trap \"\" TERM HUP; echo $$ > {{0}}.new; mv {{0}}.new {{0}}; while :; do sleep 600; done' &",
    "in a pid namespace": "unshare --pid --fork setsid sh -c 'trap \"\" TERM HUP; sleep 7734 & wait' & while ! pgrep -f -x 'sleep 7734' > {0}; do sleep 0.02; done",
    "adopted by another": """python3 -c 'import ctypes, os, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); os.setsid()
if not os.fork():
    os.setsid()
    if os.fork(): os._exit(0)
    open("{0}.new", "w").write(str(os.getpid())); os.rename("{0}.new", "{0}"); time.sleep(600)
time.sleep(600)' &""",
}
_NEEDS = {"another user's": as_others, "in a pid namespace": mounts}


@in_unit_too
@pytest.mark.parametrize("which", [pytest.param(which, marks=_NEEDS.get(which, ())) for which in sorted(_LEAVE)])
def test_what_a_command_leaves_behind_is_ended_whosever_and_wherever_it_is(box, which):
    pid = box.common / "pid"
    with bystander(box):
        outcome, out, _ = box.sh(_LEAVE[which].format(pid) + f"\nwhile [ ! -s {pid} ]; do sleep 0.02; done; echo $PPID")
        assert outcome.exit_code == 0 and not is_alive(int(pid.read_text()))
        assert box.sh("echo $PPID")[1] == out


@pytest.mark.parametrize("run_as", _RUN_AS)
def test_a_memory_bomb_hits_its_own_bound(box, run_as):
    program = """
        held = []
        try:
            while len(held) < 400:
                held.append(bytearray(1 << 20))
        except MemoryError:
            pass
        print(len(held))
    """
    with bystander(box, memory_max=128 * MIB):
        assert 64 < int(python(box, program, memory_max=128 * MIB, run_as=run_as)[1]) < 128


def test_a_supervisor_that_is_traced_is_given_up_with_its_command(box, monkeypatch):
    monkeypatch.setattr(sandbox, "_BACKSTOP", 0.5)
    said = box.common / "said"
    # PTRACE_ATTACH stops it.
    program = f"import ctypes, os, time; print(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0), os.getppid(), file=open({str(said)!r}, 'w')); time.sleep(600)"
    with bystander(box):
        ended = long_enough(lambda seconds: box.broken("/usr/bin/python3", "-c", program, timeout=seconds), lambda _: said.exists() and said.read_text())
        assert isinstance(ended, SandboxError)
        result, slot = map(int, said.read_text().split())
        assert result == 0 and eventually(lambda: not is_alive(slot)) and box.slot() != slot


@pytest.mark.skipif(_IS_ROOT, reason="it is run as root")
def test_what_takes_mounts_holds_for_root_of_a_user_namespace(tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("this machine lets an ordinary user make no user namespace")
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}", os.path.abspath(__file__)]
    names = "filled or bounds or room or leaves"
    done = subprocess.run([*namespace, *program, "-k", names], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 9


# What a command may try that is run as another user than root.


@as_others
@in_unit_too
def test_a_command_of_another_user_is_nothing_but_that_user(box):
    text = "id -u; id -g; id -G; pwd; echo $TMPDIR; echo $HOME $USER $LOGNAME; stat -c '%U %a' .; umask; touch file && ls; grep -E 'Cap|NoNew' /proc/self/status"
    outcome, out, err = box.sh(text, run_as=OTHER)
    lines = out.decode().split("\n")
    assert (outcome.exit_code, err) == (0, b"")
    assert lines[:3] == ["65534"] * 3
    assert lines[3] == lines[4] and lines[3].startswith(f"{box.run_dir}/work-")
    assert lines[5:9] == [f"/nonexistent {OTHER} {OTHER}", f"{OTHER} 700", "0077", "file"]
    held = dict(line.split() for line in lines[9:-1])
    assert {name: int(held[name], 16) for name in ("CapInh:", "CapPrm:", "CapEff:", "CapAmb:")} == dict.fromkeys(("CapInh:", "CapPrm:", "CapEff:", "CapAmb:"), 0)
    assert held["NoNewPrivs:"] == "1"
    # And the next one in the same slot is root again.
    assert box.sh("id -u; touch /proc/self/oom_score_adj")[1] == b"0\n"


@as_others
def test_no_program_makes_another_user_root(box):
    become = box.common / "become"
    # What sudo is: root's, and whoever runs it is root.
    become.write_bytes(read("/usr/bin/id"))
    become.chmod(0o4755)
    assert subprocess.run([str(become), "-u"], user=USER, stdout=subprocess.PIPE, check=True).stdout == b"0\n"
    assert box.run(str(become), "-u", run_as=USER)[1] != b"0\n"


@as_others
def test_no_service_of_root_on_the_system_bus_can_be_asked_by_another_user(box, monkeypatch):
    bus = box.common / "bus"
    bus.mkdir()
    bus.chmod(0o755)
    program = sandbox_slots._SOURCE.replace(b'_HIDDEN = ("/run/dbus",)', b"_HIDDEN = (%r,)" % str(bus))
    assert program != sandbox_slots._SOURCE
    monkeypatch.setattr(sandbox_slots, "_SOURCE", program)
    ask = f"import socket; socket.socket(socket.AF_UNIX).connect('{bus}/socket'); print('asked')"
    (box.common / "ask").write_text(ask)
    (box.common / "ask").chmod(0o644)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{bus}/socket")
        os.chmod(f"{bus}/socket", 0o777)
        listener.listen()
        assert box.run("/usr/bin/python3", "-c", ask)[1] == b"asked\n"
        assert subprocess.run(["/usr/bin/python3", "-c", ask], user=USER, stdout=subprocess.PIPE, check=True).stdout == b"asked\n"
        assert b"PermissionError" in box.run("/usr/bin/python3", "-c", ask, run_as=USER)[2]
        # Nor is what hides it taken away by who is root of a namespace of his own.
        uncover = f"umount {bus}; umount -l {bus}; exec python3 {box.common}/ask"
        assert b"PermissionError" in box.run("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", uncover, run_as=USER)[2]


@as_others
def test_stdin_and_output_can_be_opened_by_their_names_and_stay_the_engines(box):
    sent = box.folder / "in"
    sent.write_bytes(b"sent\n")
    sent.chmod(0o600)
    handle = box.start(
        "/bin/bash",
        "-c",
        f"cat /dev/stdin > /dev/stdout; echo more > /dev/stderr; echo x >> {sent}; echo x 1<>/dev/stdin; chmod 666 /dev/stdin; echo x >> {box.folder}/$QVM_REMOTE_ID.out",
        stdin=str(sent),
        run_as=USER,
    )
    assert handle.wait().exit_code == 1
    assert read(handle.job.out_path) == read(sent) == b"sent\n"
    assert read(handle.job.err_path).startswith(b"more\n")
    assert {(os.stat(path).st_uid, stat.S_IMODE(os.stat(path).st_mode)) for path in (handle.job.out_path, handle.job.err_path)} == {(0, 0o600)}
    assert (sent.stat().st_uid, stat.S_IMODE(sent.stat().st_mode) & 0o027) == (0, 0)


@as_others
def test_a_script_of_another_user_can_be_read_by_that_user_and_not_be_changed(box):
    outcome, out, err = box.run("/bin/bash", script=b'cat "$0"; echo x >> "$0"; rm -f "$0"; cat /dev/null > "$0"', run_as=USER)
    assert out.startswith(b'cat "$0"') and b"Permission denied" in err and outcome.exit_code == 1


@as_others
def test_another_user_gets_at_nothing_of_another_command(box):
    attack = """
        import os, sys
        def reach(path):
            for attempt in (lambda: os.listdir(path), lambda: os.open(path, os.O_RDONLY), lambda: os.open(path, os.O_WRONLY), lambda: os.readlink(path)):
                try:
                    attempt()
                    print("reached", path)
                except OSError:
                    pass
        for pid in sys.argv[2:]:
            for name in ("", "cmdline", "status", "comm", "environ", "cwd", "root", "fd", "fd/0", "fd/1", "mem", "cwd/own"):
                reach(f"/proc/{pid}/{name}")
            try:
                os.kill(int(pid), 9)
                print("killed", pid)
            except PermissionError:
                pass
        reach(sys.argv[1] + "/jobs")
        print(os.path.dirname(os.environ["TMPDIR"]) == sys.argv[1], os.listdir("."))
    """
    with bystander(box), bystander(box, run_as=OTHER):
        mine = children_of(box)
        assert len(mine) == 2
        outcome, out, _ = python(box, attack, box.run_dir, *mine, run_as=USER)
        assert (outcome.exit_code, out) == (0, b"True []\n")


@as_others
def test_another_user_can_not_touch_its_supervisor(box):
    program = """
        import ctypes, os, signal
        parent = os.getppid()
        print(ctypes.CDLL(None).ptrace(16, parent, 0, 0))
        for attempt in (
            lambda: os.kill(parent, signal.SIGKILL),
            lambda: os.kill(parent, signal.SIGSTOP),
            lambda: os.open(f"/proc/{parent}/fd/1", os.O_WRONLY),
            lambda: os.open(f"/proc/{parent}/mem", os.O_RDWR),
            lambda: os.open(f"/proc/{parent}/oom_score_adj", os.O_WRONLY),
            lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
        ):
            try:
                attempt()
                print("could")
            except (PermissionError, FileNotFoundError):
                pass
    """
    slot = box.slot()
    outcome, out, _ = python(box, program, run_as=USER)
    assert (outcome.exit_code, out) == (0, b"-1\n") and box.slot() == slot


@as_others
def test_another_user_who_kills_all_it_may_kills_nobody_elses(box):
    with bystander(box), bystander(box, run_as=OTHER):
        slot = box.slot()
        outcome, _, _ = box.sh("sleep 600 & kill -9 -1; exit 4", run_as=USER)
        assert outcome.exit_code == 4 and box.slot() == slot and processes_of(USER) == []


@as_others
def test_another_user_who_takes_all_processes_takes_them_from_itself_alone(box):
    program = """
        import os, signal, sys, time
        count = 0
        try:
            while count < 300:
                if not os.fork():
                    os.setsid()
                    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
                    time.sleep(600)
                count += 1
        except BlockingIOError:
            pass
        print(count, flush=True)
        # A test run that is killed is to leave no such thing for long.
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                os.fork() or os.setsid()
            except OSError:
                pass
    """
    with bystander(box), bystander(box, run_as=OTHER, tasks_max=40):
        outcome, out, _ = long_enough(lambda seconds: python(box, program, run_as=USER, tasks_max=40, timeout=2 * seconds), lambda ended: ended[1])
        assert outcome.timed_out and int(out) < 40 and processes_of(USER) == []
        assert box.sh("echo $(echo on)", run_as=USER, tasks_max=40)[1] == b"on\n"


@as_others
def test_a_daemon_of_another_user_in_namespaces_of_its_own_dies_with_its_command(box):
    pid = box.common / "pid"
    text = f"setsid unshare --user --map-root-user --pid --fork setsid sleep 600 &\nwhile ! pgrep -u {USER} -x sleep > {pid}; do sleep 0.02; done"
    with bystander(box):
        outcome, _, _ = box.sh(text, run_as=USER)
        assert outcome.exit_code == 0 and not is_alive(int(pid.read_text())) and processes_of(USER) == []


@as_others
@in_unit_too
def test_a_command_of_another_user_dies_with_its_supervisor_though_nobody_looks(box):
    handle = box.start("/bin/bash", "-c", "echo $$ $PPID; read -r _ < <(sleep 600)", run_as=USER)
    assert eventually(lambda: os.path.exists(handle.job.out_path) and read(handle.job.out_path))
    pid, supervisor = map(int, read(handle.job.out_path).split())
    os.kill(supervisor, signal.SIGKILL)
    assert eventually(lambda: not is_alive(pid))
    with pytest.raises(SandboxError):
        handle.wait()
    assert eventually(lambda: processes_of(USER) == [])


@as_others
def test_where_another_user_can_not_reach_its_working_directory_nothing_runs(box):
    box.folder.chmod(0o700)
    handle = box.start("touch", str(box.common / "ran"), run_as=USER)
    with pytest.raises(SandboxError, match=f"{USER} can't reach its working directory"):
        handle.wait()
    assert not (box.common / "ran").exists()
