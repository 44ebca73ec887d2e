# SPDX-License-Identifier: GPL-2.0-or-later
"""The sandbox with real processes: what a command gets, what is kept of it, and that nothing of it is left."""

import hashlib
import itertools
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from pullrpc import sandbox
from pullrpc.errors import SandboxError

_MIB = 1 << 20
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMES = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "TMPDIR", "QVM_REMOTE_VM", "QVM_REMOTE_ID"}
_DAEMON = "setsid sh -c 'echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600' </dev/null >/dev/null 2>&1 &\n"
_DAEMON += "while [ ! -e {0} ]; do sleep 0.01; done\n"


class Box:
    """Runs commands in sandboxes under one temporary folder."""

    def __init__(self, folder):
        self.folder = folder
        self.run_dir = str(folder / "run")
        self._numbers = itertools.count(1)

    def start(self, *argv, timeout=60, script=None, stdin=None, output_max=_MIB, cid=None, out_dir=None):
        """Start a command."""
        cid = cid or f"20260101-000000-1-{next(self._numbers):08x}"
        files = out_dir or self.folder
        job = sandbox.Job("work", cid, argv, script, stdin, str(files / f"{cid}.out"), str(files / f"{cid}.err"), timeout)
        limits = sandbox.Limits(self.run_dir, output_max, 1 << 30, 512, 100, 256, _PATH)
        handle = sandbox.start(job, limits)
        handle.job = job
        return handle

    def run(self, *argv, **options):
        """Run a command; give its outcome, stdout and stderr."""
        handle = self.start(*argv, **options)
        outcome = handle.wait()
        return outcome, read(handle.job.out_path), read(handle.job.err_path)

    def sh(self, text, **options):
        """Run shell text."""
        return self.run("/bin/bash", "-c", text, **options)

    def left(self):
        """Names of jobs' folders."""
        return os.listdir(os.path.join(self.run_dir, "jobs"))


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def eventually(check, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.02)
    return False


def pid_in(path):
    assert eventually(path.exists)
    return int(path.read_text())


def supervisor_of(pid):
    return int(read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[1])


@pytest.mark.parametrize("code", [0, 1, 2, 42, 124, 125, 126, 127, 128, 130, 137, 255])
def test_exit_code_is_passed_on_and_is_no_signal(box, code):
    outcome, _, _ = box.sh(f"exit {code}")
    assert (outcome.exit_code, outcome.signal, outcome.timed_out, outcome.cancelled) == (code, None, False, False)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGPIPE, signal.SIGXFSZ])
def test_death_by_signal_is_128_plus_its_number(box, signum):
    outcome, _, _ = box.sh(f"kill -{int(signum)} $$")
    assert (outcome.exit_code, outcome.signal) == (128 + signum, signum)


def test_command_that_does_not_exist_exits_with_127_and_says_so(box):
    outcome, _, err = box.run("no-such-command-here")
    assert outcome.exit_code == 127 and b"no-such-command-here" in err


def test_binary_stdout_and_stderr_are_kept_apart_and_byte_for_byte(box):
    outcome, out, err = box.run(sys.executable, "-c", "import os; b=bytes(range(256))*300; os.write(1,b); os.write(2,b[::-1])")
    assert (out, err) == (bytes(range(256)) * 300, bytes(reversed(bytes(range(256)) * 300)))
    assert (outcome.out_bytes, outcome.err_bytes) == (76800, 76800)


def test_ten_mebibytes_at_the_limit_are_whole_and_not_truncated(box):
    program = "import hashlib,os,sys; b=os.urandom(10<<20); sys.stdout.buffer.write(b); sys.stderr.write(hashlib.sha256(b).hexdigest())"
    outcome, out, err = box.run(sys.executable, "-c", program, output_max=10 * _MIB)
    assert len(out) == 10 * _MIB and hashlib.sha256(out).hexdigest() == err.decode() and not outcome.out_truncated


def test_output_over_the_limit_is_cut_counted_and_never_held_in_memory(box):
    peak = box.folder / "peak"
    text = f"head -c {30 * _MIB} /dev/zero; grep VmHWM /proc/$PPID/status > {peak}"
    outcome, out, _ = box.sh(text, output_max=_MIB)
    assert (len(out), outcome.out_bytes, outcome.out_truncated, outcome.err_truncated) == (_MIB, 30 * _MIB, True, False)
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


def test_timeout_keeps_partial_output_and_exits_with_124(box):
    outcome, out, _ = box.run("yes", timeout=1)
    assert (outcome.exit_code, outcome.timed_out, outcome.signal) == (124, True, None)
    assert out.startswith(b"y\ny\n") and outcome.out_truncated


@pytest.mark.parametrize(("ending", "timeout"), [("exit 3", 60), ("sleep 600", 1)])
def test_daemon_that_left_its_session_dies_with_the_command(box, ending, timeout):
    pid_file = box.folder / "daemon"
    outcome, _, _ = box.sh(_DAEMON.format(pid_file) + ending, timeout=timeout)
    assert outcome.exit_code == (3 if timeout == 60 else 124)
    assert not is_alive(pid_in(pid_file))


def test_processes_that_keep_forking_into_new_sessions_are_all_killed(box):
    marker = f"hydra-{os.getpid()}"
    program = textwrap.dedent(f"""
        import os, time  # {marker}
        for _ in range(8):
            if not os.fork():
                break
        else:
            time.sleep(600)
        while True:
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


def test_environment_is_exactly_the_documented_list(box, monkeypatch):
    monkeypatch.setenv("ENGINE_SECRET", "not for commands")
    _, out, _ = box.run("env", "-0")
    env = dict(item.split("=", 1) for item in out.decode().rstrip("\0").split("\0"))
    assert set(env) == _NAMES
    assert (env["PATH"], env["LANG"], env["TERM"], env["QVM_REMOTE_VM"]) == (_PATH, "C.UTF-8", "dumb", "work")


def test_no_descriptor_but_the_three_is_inherited(box):
    keep, other = os.pipe()
    os.set_inheritable(keep, True)
    _, out, _ = box.run(sys.executable, "-c", "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd'))[:-1])")
    os.close(keep)
    os.close(other)
    assert out == b"[0, 1, 2]\n"


def test_signals_are_at_their_defaults_and_none_is_blocked(box):
    _, out, _ = box.run("cat", "/proc/self/status")
    found = {line.split()[0]: int(line.split()[1], 16) for line in out.splitlines() if line.startswith((b"SigBlk", b"SigIgn", b"SigCgt"))}
    # 32 and 33 are the C library's own: no program can set them, so they are as whoever started the tests left them.
    library = 3 << 31
    assert {name: mask & ~library for name, mask in found.items()} == {b"SigBlk:": 0, b"SigIgn:": 0, b"SigCgt:": 0}


def test_limits_umask_and_session_are_set(box):
    _, out, _ = box.sh("ulimit -n; ulimit -c; umask; ps -o sid= -p $$ | tr -d ' ' | grep -qx $$ && echo own session")
    assert out.split(b"\n")[:4] == [b"256", b"0", b"0077", b"own session"]


def test_working_directory_is_private_is_tmpdir_and_is_removed(box):
    _, out, _ = box.sh('stat -c %a . ; pwd; echo "$TMPDIR"; touch file; mkdir -p d/e/f; ln -s / link')
    mode, cwd, tmpdir = out.decode().split()
    assert mode == "700" and cwd == tmpdir and cwd.startswith(box.run_dir) and box.left() == []


def test_very_deep_tree_is_removed_without_following_symlinks(box):
    victim = box.folder / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    program = f"import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d'); os.symlink({str(victim)!r}, 'l')"
    outcome, _, _ = box.run(sys.executable, "-c", program)
    assert outcome.exit_code == 0 and box.left() == [] and (victim / "file").read_text() == "precious"


def test_clean_up_never_empties_what_was_mounted_in_the_working_directory(box):
    victim = box.folder / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    outcome, out, _ = box.sh(f'mkdir m && mount --bind {victim} m && echo "$PWD/m"')
    try:
        assert outcome.exit_code == 0 and (victim / "file").read_text() == "precious"
    finally:
        points = [line.split()[4] for line in read("/proc/self/mountinfo").decode().splitlines() if box.run_dir in line.split()[4]]
        for point in points:
            subprocess.run(["umount", point], check=True)
    assert points


def test_script_lies_outside_of_the_working_directory_and_is_removed(box):
    outcome, out, _ = box.run("/bin/bash", script=b'ls -A | wc -l\necho "$0"\nexit 9\n')
    count, path = out.decode().split()
    assert (outcome.exit_code, count) == (9, "0") and not os.path.exists(path)


def test_command_is_on_no_command_line_but_its_own(box):
    secret = f"s3cret{os.getpid()}"
    text = f"{secret}=1; tr '\\0' ' ' < /proc/$PPID/cmdline"
    assert secret.encode() not in box.sh(text)[1]


def test_cancel_from_another_thread_ends_the_command(box):
    pid_file = box.folder / "daemon"
    handle = box.start("/bin/bash", "-c", _DAEMON.format(pid_file) + "echo partial; sleep 600")
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


def test_supervisor_killed_is_an_error_and_the_command_dies_with_it(box):
    pid_file = box.folder / "pid"
    handle = box.start("/bin/bash", "-c", f"sleep 600 & echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; wait")
    pid = pid_in(pid_file)
    os.kill(supervisor_of(pid), signal.SIGKILL)
    with pytest.raises(SandboxError):
        handle.wait()
    assert eventually(lambda: not is_alive(pid)) and box.left() == []


def test_daemon_in_a_session_of_its_own_dies_even_when_the_supervisor_is_killed(box):
    pid_file = box.folder / "daemon"
    handle = box.start("/bin/bash", "-c", _DAEMON.format(pid_file) + f"echo $$ > {box.folder}/pid; sleep 600")
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
        text = {_DAEMON.format(pid_file) + "sleep 600"!r}
        files = {str(box.folder / "o")!r}, {str(box.folder / "e")!r}
        job = sandbox.Job("work", "20260101-000000-1-0000eeee", ("/bin/bash", "-c", text), None, None, *files, 600)
        sandbox.start(job, sandbox.Limits({box.run_dir!r}, 1024, 1 << 30, 64, 100, 256, {_PATH!r})).wait()
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
        sandbox.start(job, sandbox.Limits(box.run_dir, 1024, 1 << 30, 64, 100, 256, _PATH))


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
    (box.folder / "run/jobs/work-20260101-000000-1-00000999/tmp/deep").mkdir(parents=True)
    assert (sandbox.sweep(box.run_dir), box.left()) == (1, [])


def test_systemd_run_is_given_limits_and_never_the_command(box, monkeypatch):
    fake = box.folder / "bin"
    fake.mkdir()
    seen = box.folder / "arguments"
    (fake / "systemd-run").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {seen}\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    (fake / "systemd-run").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{_PATH}")
    monkeypatch.setattr(sandbox, "choose_backend", lambda: sandbox.sandbox_systemd)
    monkeypatch.setattr(sys.modules[__name__], "_PATH", f"{fake}:{_PATH}")
    outcome, out, _ = box.sh("echo s3cret; exit 4")
    words = seen.read_text().split("\n")
    assert (outcome.exit_code, out) == (4, b"s3cret\n") and not any("s3cret" in word for word in words)
    assert {"--pipe", "--wait", "--collect", "--slice=qvm-remote.slice", "--property=MemoryMax=1073741824"} <= set(words)
