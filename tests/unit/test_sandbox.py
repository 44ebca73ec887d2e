# SPDX-License-Identifier: GPL-2.0-or-later
"""The sandbox with real processes: what a command gets, what is kept of it, and that nothing of it is left."""

import fcntl
import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from boxes import DAEMON, MIB, PATH, Box, eventually, in_unit_too, is_alive, long_enough, pid_in, put_in_unit, read, supervisor_of, wait_for
from pullrpc import sandbox, sandbox_slots, supervisor
from pullrpc.errors import SandboxError

_NAMES = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "TMPDIR", "QVM_REMOTE_VM", "QVM_REMOTE_ID"}


@pytest.fixture
def box(tmp_path, request, monkeypatch):
    if getattr(request, "param", "elsewhere") == "in_unit":
        put_in_unit(monkeypatch, str(tmp_path / "run"))
    return Box(tmp_path)


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: supervisor.state(pid) == b"T")


@in_unit_too
@pytest.mark.parametrize("code", [0, 1, 2, 42, 124, 125, 126, 127, 128, 130, 137, 255])
def test_exit_code_is_passed_on_and_is_no_signal(box, code):
    outcome, _, _ = box.sh(f"exit {code}")
    assert (outcome.exit_code, outcome.signal, outcome.timed_out, outcome.cancelled) == (code, None, False, False)


@in_unit_too
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGPIPE, signal.SIGXFSZ])
def test_death_by_signal_is_128_plus_its_number(box, signum):
    outcome, _, _ = box.sh(f"kill -{int(signum)} $$")
    assert (outcome.exit_code, outcome.signal) == (128 + signum, signum)


@in_unit_too
def test_command_that_does_not_exist_exits_with_127_and_says_so(box):
    outcome, _, err = box.run("no-such-command-here")
    assert outcome.exit_code == 127 and b"no-such-command-here" in err


@in_unit_too
def test_first_of_the_path_that_can_be_executed_is(box):
    for name, mode in (("one", 0o644), ("two", 0o755), ("three", 0o755)):
        (box.folder / name).mkdir()
        (box.folder / name / "tool").write_text(f"#!/bin/sh\necho {name}\n")
        (box.folder / name / "tool").chmod(mode)
    box.path = ":".join(str(box.folder / name) for name in ("none", "one", "two", "three"))
    assert box.run("tool")[1] == b"two\n"
    (box.folder / "two/tool").unlink()
    (box.folder / "three/tool").unlink()
    outcome, _, err = box.run("tool")
    assert (outcome.exit_code, err) == (126, b"qvm-remote: tool: Permission denied\n")


@in_unit_too
def test_word_with_a_null_in_it_is_refused(box):
    with pytest.raises(SandboxError, match="null"):
        box.run("echo", "a\0b")


@in_unit_too
def test_binary_stdout_and_stderr_are_kept_apart_and_byte_for_byte(box):
    outcome, out, err = box.run(sys.executable, "-c", "import os; b=bytes(range(256))*300; os.write(1,b); os.write(2,b[::-1])")
    assert (out, err) == (bytes(range(256)) * 300, bytes(reversed(bytes(range(256)) * 300)))
    assert (outcome.out_bytes, outcome.err_bytes) == (76800, 76800)


def test_ten_mebibytes_at_the_limit_are_whole_and_not_truncated(box):
    program = "import hashlib,os,sys; b=os.urandom(10<<20); sys.stdout.buffer.write(b); sys.stderr.write(hashlib.sha256(b).hexdigest())"
    outcome, out, err = box.run(sys.executable, "-c", program, output_max=10 * MIB)
    assert len(out) == 10 * MIB and hashlib.sha256(out).hexdigest() == err.decode() and not outcome.out_truncated


def test_output_over_the_limit_is_cut_counted_and_never_held_in_memory(box):
    peak = box.folder / "peak"
    text = f"head -c {30 * MIB} /dev/zero; grep VmHWM /proc/$PPID/status > {peak}"
    outcome, out, _ = box.sh(text, output_max=MIB)
    assert (len(out), outcome.out_bytes, outcome.out_truncated, outcome.err_truncated) == (MIB, 30 * MIB, True, False)
    assert int(peak.read_text().split()[1]) < 25 * 1024


def test_output_files_are_readable_by_their_owner_only(box):
    handle = box.start("true")
    handle.wait()
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in (handle.job.out_path, handle.job.err_path)} == {0o600}


def test_output_file_that_exists_or_is_a_symlink_is_not_written(box):
    victim = box.folder / "victim"
    victim.write_text("precious")
    (box.folder / "20260101-000000-1-0000abcd.out").symlink_to(victim)
    with pytest.raises(SandboxError):
        box.start("echo", "x", cid="20260101-000000-1-0000abcd").wait()
    assert victim.read_text() == "precious" and box.left() == []


@in_unit_too
def test_timeout_keeps_partial_output_and_exits_with_124(box):
    outcome, out, _ = long_enough(lambda seconds: box.run("yes", timeout=seconds), lambda ended: ended[0].out_bytes > MIB)
    assert (outcome.exit_code, outcome.timed_out, outcome.signal) == (124, True, None)
    assert out.startswith(b"y\ny\n") and outcome.out_truncated


@in_unit_too
@pytest.mark.parametrize(("ending", "timeout"), [("exit 3", 60), ("sleep 600", 1)])
def test_daemon_that_left_its_session_dies_with_the_command(box, ending, timeout):
    pid_file = box.folder / "daemon"
    outcome, _, _ = long_enough(lambda seconds: box.sh(DAEMON.format(pid_file) + ending, timeout=timeout * seconds), lambda _: pid_file.exists())
    assert outcome.exit_code == (3 if timeout == 60 else 124)
    assert not is_alive(pid_in(pid_file))


@in_unit_too
def test_processes_that_keep_forking_into_new_sessions_are_all_killed(box):
    marker = f"hydra-{os.getpid()}"
    program = textwrap.dedent(f"""
        import os, time  # {marker}
        for _ in range(8):
            if not os.fork():
                break
        else:
            time.sleep(600)
        # A test run that is killed is to leave no such thing for long.
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if os.getpid() != os.getsid(0):
                os.setsid()
            if os.fork():
                os._exit(0)
    """)
    outcome, _, _ = box.run(sys.executable, "-c", program, timeout=1)
    assert outcome.timed_out
    assert subprocess.run(["pgrep", "-f", marker], stdout=subprocess.PIPE, check=False).stdout == b""


def test_background_child_that_holds_the_pipes_delays_nothing(box):
    outcome, out, _ = box.sh("echo before; sleep 600 & exit 5")
    assert (outcome.exit_code, out) == (5, b"before\n") and outcome.seconds < 30


def test_background_child_that_never_stops_writing_delays_nothing(box):
    outcome, _, _ = box.sh("yes & sleep 0.3; exit 6")
    assert outcome.exit_code == 6 and outcome.seconds < 30


@in_unit_too
def test_stdin_is_what_was_sent(box):
    sent = box.folder / "in"
    sent.write_bytes(bytes(range(256)) * 1000)
    assert box.run("cat", stdin=str(sent))[1] == sent.read_bytes()


@pytest.mark.parametrize("script", [None, b"cat; readlink /proc/self/fd/0"])
def test_stdin_is_empty_when_none_was_sent(box, script):
    if script is None:
        assert box.run("cat")[1] == b""
    else:
        assert box.run("/bin/bash", script=script)[1] == b"/dev/null\n"


@in_unit_too
def test_environment_is_exactly_the_documented_list(box, monkeypatch):
    monkeypatch.setenv("ENGINE_SECRET", "not for commands")
    _, out, _ = box.run("env", "-0")
    env = dict(item.split("=", 1) for item in out.decode().rstrip("\0").split("\0"))
    assert set(env) == _NAMES
    assert (env["PATH"], env["LANG"], env["TERM"], env["QVM_REMOTE_VM"]) == (PATH, "C.UTF-8", "dumb", "work")


@in_unit_too
def test_no_descriptor_but_the_three_is_inherited(box):
    keep, other = os.pipe()
    os.set_inheritable(keep, True)
    _, out, _ = box.run(sys.executable, "-c", "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd'))[:-1])")
    os.close(keep)
    os.close(other)
    assert out == b"[0, 1, 2]\n"


@in_unit_too
def test_signals_are_at_their_defaults_and_none_is_blocked(box):
    _, out, _ = box.run("cat", "/proc/self/status")
    found = {line.split()[0]: int(line.split()[1], 16) for line in out.splitlines() if line.startswith((b"SigBlk", b"SigIgn", b"SigCgt"))}
    # 32 and 33 are the C library's own: no program can set them, so they are as whoever started the tests left them.
    library = 3 << 31
    assert {name: mask & ~library for name, mask in found.items()} == {b"SigBlk:": 0, b"SigIgn:": 0, b"SigCgt:": 0}


@in_unit_too
def test_limits_umask_and_session_are_set(box):
    _, out, _ = box.sh("ulimit -n; ulimit -c; umask; ps -o sid= -p $$ | tr -d ' ' | grep -qx $$ && echo own session")
    assert out.split(b"\n")[:4] == [b"256", b"0", b"0077", b"own session"]


@in_unit_too
def test_working_directory_is_private_is_tmpdir_and_is_removed(box):
    _, out, _ = box.sh('stat -c %a . ; pwd; echo "$TMPDIR"; touch file; mkdir -p d/e/f; ln -s / link')
    mode, cwd, tmpdir = out.decode().split()
    assert mode == "700" and cwd == tmpdir and cwd.startswith(box.run_dir) and box.left() == []


def test_very_deep_tree_is_removed_without_following_symlinks(box):
    victim = box.folder / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    program = f"import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d'); os.symlink({str(victim)!r}, 'l')"
    outcome, _, _ = box.run(sys.executable, "-c", program, work_max=256 * MIB)
    # A result does not wait for long for the end of the clean-up.
    assert outcome.exit_code == 0 and eventually(lambda: box.left() == []) and (victim / "file").read_text() == "precious"


def test_clean_up_never_empties_what_was_mounted_in_the_working_directory(box):
    victim = box.folder / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    outcome, slot, _ = box.sh(f"mkdir m && mount --bind {victim} m && mount --bind {victim} $TMPDIR/.. && echo $PPID")
    assert outcome.exit_code == 0 and box.slot() != int(slot)
    sandbox.close_idle()
    assert box.mounts() == [] and box.left() == [] and (victim / "file").read_text() == "precious"


@in_unit_too
def test_script_lies_outside_of_the_working_directory_and_is_removed(box):
    outcome, out, _ = box.run("/bin/bash", script=b'ls -A | wc -l\necho "$0"\nexit 9\n')
    count, path = out.decode().split()
    assert (outcome.exit_code, count) == (9, "0") and not os.path.exists(path)


@in_unit_too
def test_command_is_on_no_command_line_but_its_own(box):
    secret = f"s3cret{os.getpid()}"
    text = f"{secret}=1; tr '\\0' ' ' < /proc/$PPID/cmdline"
    assert secret.encode() not in box.sh(text)[1]


@in_unit_too
def test_cancel_from_another_thread_ends_the_command(box):
    pid_file = box.folder / "daemon"
    handle = box.start("/bin/bash", "-c", DAEMON.format(pid_file) + "echo partial; sleep 600")
    daemon = pid_in(pid_file)
    threads = [threading.Thread(target=handle.cancel) for _ in range(3)]
    for thread in threads:
        thread.start()
    outcome = handle.wait()
    for thread in threads:
        thread.join()
    handle.cancel()
    assert (outcome.exit_code, outcome.cancelled, outcome.timed_out) == (130, True, False)
    assert not is_alive(daemon) and box.left() == []


@in_unit_too
def test_supervisor_killed_is_an_error_and_the_command_dies_with_it(box):
    pid_file = box.folder / "pid"
    handle = box.start("/bin/bash", "-c", f"sleep 600 & echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; wait")
    pid = pid_in(pid_file)
    os.kill(supervisor_of(pid), signal.SIGKILL)
    with pytest.raises(SandboxError):
        handle.wait()
    assert eventually(lambda: not is_alive(pid)) and box.left() == []


@in_unit_too
def test_daemon_in_a_session_of_its_own_dies_even_when_the_supervisor_is_killed(box):
    pid_file = box.folder / "daemon"
    handle = box.start("/bin/bash", "-c", DAEMON.format(pid_file) + f"echo $$ > {box.folder}/pid; sleep 600")
    daemon = pid_in(pid_file)
    assert eventually(lambda: (box.folder / "pid").exists() and (box.folder / "pid").read_text().strip())
    os.kill(supervisor_of(int((box.folder / "pid").read_text())), signal.SIGKILL)
    with pytest.raises(SandboxError):
        handle.wait()
    # On a busy machine the kernel may take a moment to carry out the kill.
    survived = not eventually(lambda: not is_alive(daemon))
    if survived:
        os.kill(daemon, signal.SIGKILL)
    assert not survived


def test_engine_killed_leaves_no_process_and_no_folder(box):
    pid_file = box.folder / "daemon"
    program = textwrap.dedent(f"""
        import sys; sys.path[:0] = {sys.path!r}
        from pullrpc import sandbox
        text = {DAEMON.format(pid_file) + "sleep 600"!r}
        files = {str(box.folder / "o")!r}, {str(box.folder / "e")!r}
        job = sandbox.Job("work", "20260101-000000-1-0000eeee", ("/bin/bash", "-c", text), None, None, *files, 600)
        sandbox.start(job, sandbox.Limits({box.run_dir!r}, 1024, 1 << 30, 64, 100, 256, {PATH!r})).wait()
    """)
    engine = subprocess.Popen([sys.executable, "-c", program])
    daemon = pid_in(pid_file)
    engine.kill()
    engine.wait()
    assert eventually(lambda: not is_alive(daemon)) and eventually(lambda: box.left() == [])


def test_full_disk_ends_the_command_with_an_error(box):
    small = box.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    try:
        with pytest.raises(SandboxError, match="[Nn]o space"):
            box.start("yes", out_dir=small).wait()
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert box.left() == []


@pytest.mark.parametrize("which", ["run", "run/jobs"])
@pytest.mark.parametrize("fault", ["symlink", "writable"])
def test_unsafe_run_dir_is_refused_and_nothing_runs(box, which, fault):
    target = box.folder / which
    target.parent.mkdir(exist_ok=True, mode=0o700)
    if fault == "symlink":
        (box.folder / "elsewhere").mkdir(mode=0o700)
        target.symlink_to(box.folder / "elsewhere")
    else:
        target.mkdir()
        target.chmod(0o777)
    with pytest.raises(SandboxError):
        box.start("touch", str(box.folder / "ran")).wait()
    assert not (box.folder / "ran").exists()


def test_second_start_of_an_id_is_refused_and_leaves_the_first_alone(box):
    go = box.folder / "go"
    cid = "20260101-000000-1-0000dddd"
    first = box.start("/bin/bash", "-c", f"while [ ! -e {go} ]; do sleep 0.02; done; test -d \"$TMPDIR\"", cid=cid)
    with pytest.raises(SandboxError):
        box.start("true", cid=cid).wait()
    go.touch()
    assert first.wait().exit_code == 0


def test_bad_vm_name_or_id_is_refused(box):
    job = sandbox.Job("../x", "20260101-000000-1-0000ffff", ("true",), None, None, str(box.folder / "o"), str(box.folder / "e"), 5)
    with pytest.raises(SandboxError):
        sandbox.start(job, sandbox.Limits(box.run_dir, 1024, 1 << 30, 64, 100, 256, PATH))


def test_eight_commands_side_by_side_do_not_mix(box):
    handles = [box.start("/bin/bash", "-c", f"for i in $(seq 200); do echo {n}; done; exit {n}") for n in range(8)]
    for n, handle in enumerate(handles):
        assert handle.wait().exit_code == n
        assert read(handle.job.out_path) == b"%d\n" % n * 200


def test_threads_that_start_commands_do_not_disturb_each_other(box):
    codes = {}
    threads = [threading.Thread(target=lambda n=n: codes.update({n: box.sh(f"exit {n}")[0].exit_code})) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {n: n for n in range(16)}


def test_sweep_removes_and_counts_what_a_dead_engine_left(box):
    box.run("true")
    (box.folder / "run/jobs/slot-0/work-20260101-000000-1-00000999/tmp/deep").mkdir(parents=True)
    assert (sandbox.sweep(box.run_dir), box.left()) == (1, [])


#: An engine that starts a command, says which processes there are (supervisor, command, one that left its group), and dies.
_DYING_ENGINE = """
import os, signal, sys, time; sys.path[:0] = {path!r}
from pullrpc import sandbox
limits = sandbox.Limits({run_dir!r}, 1024, 1 << 30, 64, 100, 256, {search!r})
text = "setsid sleep 600 & echo $PPID $$ $! > {folder}/pids.new; mv {folder}/pids.new {folder}/pids; wait"
sandbox.start(sandbox.Job("work-2", "20260101-000000-1-0000dead", ("/bin/bash", "-c", text), None, None, "{folder}/o", "{folder}/e", 600), limits)
while not os.path.exists("{folder}/pids"):
    time.sleep(0.01)
supervisor = int(open("{folder}/pids").read().split()[0])
os.kill(supervisor, {signum})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("signum", [signal.SIGCONT, signal.SIGSTOP, signal.SIGKILL])
def test_no_command_of_a_dead_engine_runs_when_its_sandboxes_were_swept(box, signum, monkeypatch):
    monkeypatch.setattr(sandbox, "_ORPHANS_WAIT", 0.5 if signum == signal.SIGSTOP else 20)
    program = _DYING_ENGINE.format(path=sys.path, run_dir=box.run_dir, search=PATH, folder=box.folder, signum=int(signum))
    subprocess.run([sys.executable, "-c", program], check=False)
    pids = [int(word) for word in read(box.folder / "pids").split()]
    sandbox.sweep(box.run_dir)
    assert not any(map(is_alive, pids[1:])) and box.left() == []


class _Units:
    """Units in whose processes an engine that has fewer capabilities can't look, and which end some time after they were killed; or never."""

    IN_UNIT = True

    def __init__(self, jobs, pids, after):
        self._jobs, self._pids, self._after = jobs, pids, after
        self.killed = []

    def kill(self, name):
        self.killed.append(name)
        if self._after is not None:
            threading.Timer(self._after, self.end).start()

    def has_ended(self, name):
        return not any(map(is_alive, self._pids))

    def end(self):
        for name in os.listdir(self._jobs):
            supervisor.remove_place(os.path.join(self._jobs, name), unmount=True)
        for pid in filter(is_alive, self._pids):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def left_in_unit(box, monkeypatch):
    """Gives a function that has an engine die, its supervisor too, and what had left the command's group live on in a unit; it gives the units."""
    made = []

    def begin(after):
        program = _DYING_ENGINE.format(path=sys.path, run_dir=box.run_dir, search=PATH, folder=box.folder, signum=int(signal.SIGKILL))
        subprocess.run([sys.executable, "-c", program], check=False)
        made.append(_Units(os.path.join(box.run_dir, "jobs"), [int(read(box.folder / "pids").split()[2])], after))
        monkeypatch.setattr(sandbox_slots, "choose_backend", lambda: made[0])
        monkeypatch.setattr(sandbox, "_has_environment", lambda pid, marks: False)
        return made[0]

    yield begin
    for units in made:
        units.end()


def test_what_a_dead_engine_left_in_a_unit_has_ended_when_its_sandboxes_were_swept(box, left_in_unit):
    units = left_in_unit(after=0.5)
    (name,) = os.listdir(os.path.join(box.run_dir, "jobs"))
    assert sandbox.sweep(box.run_dir) == 1
    assert units.has_ended(name) and units.killed == [name]
    assert eventually(lambda: box.left() == [])


def test_what_can_not_be_seen_to_have_ended_is_not_swept(box, left_in_unit, monkeypatch):
    monkeypatch.setattr(sandbox, "_KILLED_WAIT", 0.3)
    units = left_in_unit(after=None)
    with pytest.raises(SandboxError, match="nobody may be told"):
        sandbox.sweep(box.run_dir)
    # The next try finds it again.
    assert os.listdir(os.path.join(box.run_dir, "jobs")) == units.killed
    units.end()
    assert sandbox.sweep(box.run_dir) == 0


@pytest.fixture
def fake_systemd(box, monkeypatch):
    """Stand-ins for systemd's programs, which note their arguments; gives a function that reads the notes."""
    folder = box.folder / "bin"
    folder.mkdir()
    note = f'printf "%s\\n" "${{0##*/}}" "$@" >> {box.folder}/notes\n'
    keep = f'case "$1" in *ExecStopPost=-*) echo "${{1#*ExecStopPost=-}}" > {box.folder}/post;; esac'
    (folder / "systemd-run").write_text(f'#!/bin/sh\n{note}while [ "$1" != -- ]; do {keep}; shift; done\nshift\nexec "$@"\n')
    # A unit that was killed ends after a while.
    show = f'head -n 1 {box.folder}/states; [ $(wc -l < {box.folder}/states) -eq 1 ] || sed -i 1d {box.folder}/states'
    (box.folder / "states").write_text("active\ndeactivating\ninactive\n")
    (folder / "systemctl").write_text(f"#!/bin/sh\n{note}case $1 in kill) . {box.folder}/post;; show) {show};; esac\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{PATH}")
    monkeypatch.setattr(sandbox_slots, "choose_backend", lambda: sandbox_slots.sandbox_systemd)
    box.path = f"{folder}:{PATH}"
    return lambda: (box.folder / "notes").read_text().split("\n")


def test_systemd_run_is_given_limits_and_never_the_command(box, fake_systemd):
    outcome, out, _ = box.sh("echo s3cret; exit 4")
    words = fake_systemd()
    assert (outcome.exit_code, out) == (4, b"s3cret\n") and not any("s3cret" in word for word in words)
    assert {"--pipe", "--wait", "--collect", "--slice=qvm-remote.slice", "--property=MemoryMax=1073741824"} <= set(words)
    # It would take these for variables and specifiers.
    assert not any("$" in word or "%" in word for word in words)


def test_changed_limits_need_another_unit(box, fake_systemd):
    sandbox.warm(box.limits())
    box.run("true")
    assert fake_systemd().count("systemd-run") == 1
    box.run("true", memory_max=1 << 29)
    assert "--property=MemoryMax=536870912" in fake_systemd()


def _unit(words):
    return next(word for word in words if word.startswith("--unit=")).partition("=")[2]


def test_unit_of_a_broken_supervisor_is_killed_and_has_ended(box, fake_systemd):
    with pytest.raises(SandboxError, match="killed with it"):
        box.sh("kill -9 $PPID")
    words = fake_systemd()
    unit = _unit(words)
    look = ["systemctl", "show", "--property=ActiveState", "--value", unit]
    assert words[words.index("systemctl") :] == ["systemctl", "kill", "--signal=KILL", unit, *look * 3, ""]
    # What it is to do when its unit ends, since the engine may unmount nothing.
    assert box.mounts() == [] and os.listdir(os.path.join(box.run_dir, "jobs")) == []


def test_a_command_whose_unit_does_not_end_is_not_said_to_have_been_killed(box, fake_systemd, monkeypatch):
    monkeypatch.setattr(sandbox, "_KILLED_WAIT", 0.3)
    (box.folder / "states").write_text("deactivating\n")
    with pytest.raises(SandboxError, match="whether the command was killed with it can't be told"):
        box.sh("kill -9 $PPID")


@pytest.mark.parametrize("show", ["exit 0", "echo deactivating", "echo inactive; exit 1", "exec sleep 60"])
def test_a_unit_of_which_systemd_does_not_say_that_it_has_ended_is_not_swept(box, fake_systemd, monkeypatch, show):
    monkeypatch.setattr(sandbox, "_KILLED_WAIT", 0.3)
    monkeypatch.setattr(sandbox_slots.sandbox_systemd, "_ASK_WAIT", 0.3)
    left = box.folder / "run/jobs/slot-0"
    left.mkdir(parents=True)
    (box.folder / "bin/systemctl").write_text(f"#!/bin/sh\n{show}\n")
    with pytest.raises(SandboxError, match="nobody may be told"):
        sandbox.sweep(box.run_dir)
    assert left.exists()


_PROBE = """
import os, resource, time
def settled(look):
    # The supervisor goes on while the command starts: what it still closes then is nothing that stays.
    seen, since = look(), time.monotonic()
    while time.monotonic() - since < 0.3:
        time.sleep(0.02)
        # Nor has it done so while it waits for a processor.
        if look() != seen or open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[0] == "R":
            seen, since = look(), time.monotonic()
    return seen
def lines(path, *names):
    return [line.split() for line in open(path) if line.startswith(names)]
kept = {name: value for name, value in os.environ.items() if name not in ("QVM_REMOTE_ID", "HOME", "TMPDIR")}
print(os.getppid(), kept, os.getcwd() == os.environ["TMPDIR"], os.listdir("."), os.umask(0), os.getpriority(os.PRIO_PROCESS, 0))
print(lines("/proc/self/status", "SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd", "NoNewPrivs", "Seccomp", "Groups", "CapEff"))
print(sorted(os.listdir("/proc/self/fd"))[:3], len(os.listdir("/proc/self/fd")), open("/proc/self/oom_score_adj").read())
print([(name, resource.getrlimit(getattr(resource, name))) for name in dir(resource) if name.startswith("RLIMIT_")])
print(open("/proc/self/cgroup").read(), os.sched_getaffinity(0))
print(settled(lambda: os.listdir(f"/proc/{os.getppid()}/task/{os.getppid()}/../../fd")))
print(open(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read().split() == [str(os.getpid())])
"""
_DIRTY = """
export LEFT=behind; cd /; umask 0; ulimit -n 64; ulimit -f 1; trap '' TERM INT HUP PIPE CHLD; exec 7</dev/null 8</etc/passwd; renice -n 5 $$ >/dev/null
echo 500 > /proc/self/oom_score_adj; touch "$TMPDIR/file"; mkdir -p "$TMPDIR/d/e"; head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2
for i in 1 2 3; do (trap '' TERM HUP; setsid sleep 7733 &) ; done
"""


@in_unit_too
@pytest.mark.parametrize("ending", ["exit 3", "kill -9 $$", "sleep 600", "cancel", "no-such-command"])
def test_next_command_in_the_same_slot_sees_nothing_of_the_last(box, ending):
    before = box.run(sys.executable, "-c", _PROBE)
    if ending == "cancel":
        handle = box.start("/bin/bash", "-c", _DIRTY + f"touch {box.folder}/there; sleep 600")
        assert eventually((box.folder / "there").exists)
        handle.cancel()
        assert handle.wait().cancelled
    elif ending == "no-such-command":
        assert box.run(ending)[0].exit_code == 127
    else:
        box.run("/bin/bash", script=(_DIRTY + ending).encode(), timeout=1, output_max=1000)
    after = box.run(sys.executable, "-c", _PROBE)
    assert before[1:] == after[1:] and before[1].endswith(b"True\n") and box.left() == []
    assert subprocess.run(["pgrep", "-fx", "sleep 7733"], stdout=subprocess.PIPE, check=False).stdout == b""


@in_unit_too
def test_each_command_has_a_session_keyring_of_its_own(box):
    # KEYCTL_GET_KEYRING_ID of KEY_SPEC_SESSION_KEYRING.
    number = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine)
    program = f"import ctypes; print(ctypes.CDLL(None).syscall({number}, 0, -3, 0))"
    first, second = (box.run(sys.executable, "-c", program)[1] for _ in range(2))
    if number is None or b"-" in first:
        pytest.skip("there are no keyrings here")
    assert first != second


def test_cancel_that_comes_late_does_not_hit_the_next_command(box):
    first = box.start("true")
    first.wait()
    second = box.start("/bin/bash", "-c", wait_for(box.folder / "go") + "echo $PPID; exit 7")
    first.cancel()
    (box.folder / "go").touch()
    assert second.wait().exit_code == 7
    assert int(read(second.job.out_path)) == box.slot()


def test_cancel_that_races_with_the_end_never_hits_the_next_command(box):
    handles = []
    over = threading.Event()

    def cancel_all():
        while not over.wait(0.0003):
            for handle in handles[-2:]:
                handle.cancel()

    thread = threading.Thread(target=cancel_all)
    thread.start()
    try:
        for _ in range(300):
            handles.append(box.start("true"))
            assert handles[-1].wait().exit_code in (0, 130)
            assert box.run("true")[0].exit_code == 0
    finally:
        over.set()
        thread.join()


def test_cancel_right_after_the_start_is_never_lost(box):
    for _ in range(50):
        handle = box.start("sleep", "600")
        handle.cancel()
        assert handle.wait().cancelled


def test_idle_slot_that_was_killed_is_replaced(box):
    slot = box.slot()
    os.kill(slot, signal.SIGKILL)
    assert eventually(lambda: not is_alive(slot))
    assert box.slot() not in (slot, 0)


def test_slot_told_to_end_by_the_init_system_ends_and_is_replaced(box):
    idle = box.slot()
    os.kill(idle, signal.SIGTERM)
    assert eventually(lambda: not is_alive(idle))
    handle = box.start("/bin/bash", "-c", f"echo $PPID > {box.folder}/pid.new; mv {box.folder}/pid.new {box.folder}/pid; sleep 600")
    busy = pid_in(box.folder / "pid")
    os.kill(busy, signal.SIGTERM)
    assert handle.wait().cancelled and eventually(lambda: not is_alive(busy))
    assert box.slot() not in (idle, busy)


@in_unit_too
@pytest.mark.parametrize(
    "harm",
    [
        "kill -9 $PPID",
        "kill -STOP $PPID",
        "echo nonsense > /proc/$PPID/fd/1",
        "echo '{\"number\": 0, \"stopped\": null}' > /proc/$PPID/fd/1",
        "echo '[1]' > /proc/$PPID/fd/1",
        "head -c 200000 /dev/zero > /proc/$PPID/fd/1",
    ],
)
def test_command_that_breaks_its_supervisor_ends_with_it_and_the_next_one_has_another(box, monkeypatch, harm):
    monkeypatch.setattr(sandbox, "_BACKSTOP", 0.5)
    slot, daemon = box.slot(), box.folder / "daemon"
    text = DAEMON.format(daemon) + f"echo $$ > {box.folder}/main; {harm}; sleep 600"
    ended = long_enough(lambda seconds: box.broken("/bin/bash", "-c", text, timeout=seconds), lambda _: (box.folder / "main").exists())
    assert isinstance(ended, SandboxError)
    for pid in (slot, pid_in(daemon), pid_in(box.folder / "main")):
        assert eventually(lambda pid=pid: not is_alive(pid))
    assert box.left() == [] and box.slot() != slot


def test_slot_that_reported_an_error_is_replaced(box):
    slot = box.slot()
    (box.folder / "20260101-000000-1-0000abcd.out").touch()
    with pytest.raises(SandboxError):
        box.start("true", cid="20260101-000000-1-0000abcd").wait()
    assert eventually(lambda: not is_alive(slot)) and box.slot() != slot


def test_slot_is_replaced_when_it_has_served_enough(box, monkeypatch):
    monkeypatch.setattr(sandbox_slots, "_COMMANDS_MAX", 2)
    slots = [box.slot() for _ in range(4)]
    assert slots[0] == slots[1] != slots[2] == slots[3]


def test_slots_that_wait_for_long_end_but_for_the_last(box, monkeypatch):
    monkeypatch.setattr(sandbox_slots, "_IDLE_MAX", 0.0)
    handles = [box.start("/bin/bash", "-c", f"echo $PPID; {wait_for(box.folder / 'go')}") for _ in range(4)]
    (box.folder / "go").touch()
    for handle in handles:
        handle.wait()
    slots = [int(read(handle.job.out_path)) for handle in handles]
    assert len(set(slots)) == 4
    assert eventually(lambda: sum(map(is_alive, slots)) == 1)
    assert is_alive(slots[-1]) and box.slot() == slots[-1]


def test_close_idle_ends_the_slots_and_a_later_command_has_a_new_one(box):
    slot = box.slot()
    sandbox.close_idle()
    assert not os.path.exists(f"/proc/{slot}")
    assert box.slot() != slot


@in_unit_too
def test_slot_that_was_stopped_is_seen_before_it_is_given_a_command(box):
    slot = box.slot()
    stop(slot)
    other = box.slot()
    assert other != slot and not is_alive(slot)


def test_slot_that_was_stopped_before_its_first_command_is_seen(box):
    sandbox.close_idle()
    sandbox.warm(box.limits())
    slot = sandbox_slots.pool()._idle[-1]
    assert eventually(lambda: slot.is_well() and slot._pid)
    stop(slot._pid)
    assert box.slot() != slot._pid


def test_warm_slot_is_there_before_its_command(box):
    sandbox.close_idle()
    sandbox.warm(box.limits())
    started = time.clock_gettime(time.CLOCK_BOOTTIME)
    slot = box.slot()
    assert float(read(f"/proc/{slot}/stat").rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK") <= started


@in_unit_too
def test_many_threads_share_slots_without_mixing_commands(box):
    wrong = []

    def work(n):
        for i in range(15):
            if i % 5 == 4:
                handle = box.start("sleep", "600")
                handle.cancel()
                if not handle.wait().cancelled:
                    wrong.append(n)
                continue
            outcome, out, err = box.sh(f"echo {n}-{i}; echo {i}-{n} >&2; exit {n}")
            if (outcome.exit_code, out, err) != (n, b"%d-%d\n" % (n, i), b"%d-%d\n" % (i, n)):
                wrong.append((n, i, outcome, out, err))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and box.left() == []


def test_output_is_told_of_while_the_command_runs(box):
    told = []

    def on_output(*kept):
        told.append(kept)
        for name in {(4, 0): "one", (4, 6): "two", (9, 6): "three"}.get(kept, "-").split("-"):
            if name:
                (box.folder / name).touch()

    text = "echo one\n{}echo error >&2\n{}echo last\n{}".format(*(wait_for(box.folder / name) for name in ("one", "two", "three")))
    handle = box.start("/bin/bash", "-c", text, on_output=on_output, timeout=30)
    assert handle.wait().exit_code == 0
    assert told == [(4, 0), (4, 6), (9, 6)]


def test_output_that_is_told_of_is_in_the_file_and_never_beyond_the_limit(box):
    told = []
    name = "20260101-000000-1-0000aaaa"
    path = box.folder / f"{name}.out"
    text = f"for i in $(seq 60); do head -c 100000 /dev/zero; sleep 0.01; done; {wait_for(box.folder / 'enough')}"

    def on_output(out, err):
        told.append((out, path.stat().st_size))
        if out == 3 * MIB:
            (box.folder / "enough").touch()

    outcome = box.start("/bin/bash", "-c", text, cid=name, on_output=on_output, output_max=3 * MIB, timeout=30).wait()
    assert (outcome.exit_code, outcome.out_bytes, outcome.out_truncated) == (0, 6000000, True)
    assert told == sorted(told) and len(told) > 2 and all(out <= size <= 3 * MIB for out, size in told)


def test_failure_of_whoever_is_told_of_output_changes_nothing(box):
    calls = []

    def on_output(*kept):
        calls.append(kept)
        (box.folder / "told").touch()
        raise OSError("the terminal is gone")

    text = f"echo one; {wait_for(box.folder / 'told')}echo two; sleep 0.1; exit 3"
    handle = box.start("/bin/bash", "-c", text, on_output=on_output)
    assert (handle.wait().exit_code, read(handle.job.out_path)) == (3, b"one\ntwo\n")
    # It isn't asked to fail again.
    assert calls == [(4, 0)]


def test_engine_that_does_not_listen_does_not_hold_up_the_command(box):
    text = f"for i in $(seq 150); do echo $i; sleep 0.02; done; head -c 200000 /dev/zero; touch {box.folder}/done; sleep 600"
    handle = box.start("/bin/bash", "-c", text, on_output=lambda *_: None)
    # As small as it gets; some hundred reports fill it.
    fcntl.fcntl(handle._slot._stdout, 1031, 4096)
    assert eventually((box.folder / "done").exists)
    handle.cancel()
    assert handle.wait().cancelled


def test_forked_process_has_slots_of_its_own(box):
    slot = box.slot()
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if box.slot(cid="20260101-000000-1-0000bbbb") != slot else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert box.slot() == slot


@pytest.mark.parametrize("copy", ["", "if not ctypes.CDLL(None).fork(): time.sleep(600)"])
@pytest.mark.parametrize("busy", [False, True])
def test_slot_ends_with_its_engine_though_a_copy_of_the_pipe_survives(box, copy, busy):
    program = textwrap.dedent(f"""
        import ctypes, sys, time; sys.path[:0] = {sys.path!r}
        from pullrpc import sandbox
        limits = sandbox.Limits({box.run_dir!r}, 1024, 1 << 30, 64, 100, 256, {PATH!r})
        def start(number, text):
            cid = "20260101-000000-1-0000000%d" % number
            files = {str(box.folder)!r} + "/o%d" % number, {str(box.folder)!r} + "/e%d" % number
            return sandbox.start(sandbox.Job("work", cid, ("/bin/sh", "-c", text), None, None, *files, 600), limits)
        start(1, "echo $PPID").wait()
        handle = start(2, "sleep 600") if {busy!r} else None
        {copy or "pass"}
        open({str(box.folder / "there")!r}, "w").close()
        time.sleep(600)
    """)
    engine = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    assert eventually((box.folder / "there").exists)
    slot = int(read(box.folder / "o1"))
    assert is_alive(slot)
    os.kill(engine.pid, signal.SIGKILL)
    engine.wait()
    ended = eventually(lambda: not is_alive(slot)) and eventually(lambda: box.left() == [])
    subprocess.run(["pkill", "-KILL", "-s", str(engine.pid)], check=False)
    assert ended


@in_unit_too
def test_slot_keeps_no_descriptor_of_a_command(box):
    slot = box.slot()
    before = sorted(os.listdir(f"/proc/{slot}/fd"))
    box.run("no-such-command")
    box.sh("yes", timeout=1)
    box.sh(DAEMON.format(box.folder / "daemon") + "exit 1")
    box.run("/bin/bash", script=b"cat; exit 1", stdin=__file__)
    assert box.slot() == slot and sorted(os.listdir(f"/proc/{slot}/fd")) == before


@pytest.mark.parametrize("whose", ["a command's folder", "what a dead supervisor left"])
def test_names_that_a_command_made_are_logged_as_plain_text(whose, caplog, monkeypatch):
    name = os.fsdecode(b"jobs/x\n2026-01-01 all is well\x1b[2J\xff\xc3\xa4")
    if whose == "a command's folder":
        handle = sandbox.Handle.__new__(sandbox.Handle)
        handle._spec = {"name": "work"}
        handle._answer({"cleaned": [f"{name}: Device or resource busy"], "left": 0, "error": "none"})
    else:
        monkeypatch.setattr(supervisor, "remove_place", lambda folder, unmount: [f"{name}: Device or resource busy"])
        sandbox_slots.remove_folder("/run/jobs/1", sandbox_slots.sandbox_subreaper)
    (text,) = [record.getMessage() for record in caplog.records if "could not be removed" in record.getMessage()]
    assert text.isascii() and text.isprintable()
    assert "all is well" in text and "Device or resource busy" in text
