# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator keeps dom0 and VMs apart, and its tools behave as those of Qubes OS do."""

import os
import signal
import subprocess
import time

import pytest
from qubes_sim.handle import Sim

RUN = ("qvm-run", "--pass-io", "--no-gui", "--no-autostart")
ALL_BYTES = bytes(range(256))


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    """dom0, the template ``deb``, the VMs ``work`` and ``other`` running, ``off`` halted."""
    # Deeper than the 107 bytes that a unix socket's path may have.
    folder = tmp_path_factory.mktemp("sim") / ("deep" * 30)
    with Sim(folder) as one:
        one.up(templates=["deb"], vms=["work:deb", "other:deb"])
        one.create("off:deb")
        yield one


def eventually(holds, seconds=60):
    """Whether something comes to hold in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def state(sim, name):
    """A qube's state, as dom0 sees it."""
    rows = sim.dom0("qvm-ls", "--raw-data", "--fields", "name,state").stdout.decode().splitlines()
    return dict(row.split("|") for row in rows)[name]


def status_of(pid):
    """What the kernel says of a process, name to text; empty when it has ended."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            return {name: text.strip() for name, _, text in (line.partition(":") for line in file)}
    except OSError:
        return {}


def hypervisor_pids(root):
    """The processes on this machine that have a mount below a simulator's folder."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/mountinfo", encoding="utf-8") as file:
                if str(root) in file.read():
                    found.append(int(name))
        except OSError:
            # It ended while we looked.
            continue
    return found


# Separation


def test_every_domain_has_its_own_hostname(sim):
    assert sim.dom0("hostname").stdout == b"dom0\n"
    assert sim.vm("work", "hostname").stdout == b"work\n"
    assert sim.vm("other", "hostname").stdout == b"other\n"


def test_a_vm_knows_its_name_from_qubesdb(sim):
    assert sim.vm("work", "qubesdb-read", "/name").stdout == b"work\n"


def test_a_command_in_a_vm_runs_as_its_user_unless_root_is_asked_for(sim):
    assert sim.vm("work", "sh", "-c", "id -un; pwd; umask").stdout == b"user\n/home/user\n0022\n"
    assert sim.vm("work", "id", "-un", user="root").stdout == b"root\n"


@pytest.mark.parametrize("path", ["/etc/seen", "/home/user/seen", "/tmp/seen", "/run/seen", "/var/seen", "/usr/bin/seen", "/dev/shm/seen"])
def test_a_file_of_one_domain_is_in_no_other(sim, path):
    sim.dom0("touch", path, check=True)
    assert sim.vm("work", "test", "-e", path, user="root").returncode == 1
    sim.vm("work", "touch", path + "2", user="root", check=True)
    assert sim.vm("other", "test", "-e", path + "2", user="root").returncode == 1
    assert sim.dom0("test", "-e", path + "2").returncode == 1


def test_no_domain_sees_the_files_of_the_host(sim, tmp_path):
    (tmp_path / "secret").write_text("secret")
    for run in (sim.dom0, lambda *argv: sim.vm("work", *argv, user="root")):
        for path in (str(tmp_path), __file__, "/etc/shadow", "/boot"):
            assert run("test", "-e", path).returncode == 1, path


def test_nothing_of_the_host_is_written_by_a_domain(sim):
    sim.dom0("touch", "/usr/bin/written-by-dom0", check=True)
    sim.vm("work", "touch", "/usr/bin/written-by-work", user="root", check=True)
    assert not os.path.exists("/usr/bin/written-by-dom0") and not os.path.exists("/usr/bin/written-by-work")


def test_processes_of_one_domain_are_invisible_in_the_others(sim):
    with sim.popen_vm("work", "sleep", "4711") as sleeper:
        assert eventually(lambda: b"4711" in sim.vm("work", "ps", "ax").stdout)
        assert b"4711" not in sim.dom0("ps", "ax").stdout
        assert b"4711" not in sim.vm("other", "ps", "ax").stdout
        sleeper.kill()


def test_a_vm_has_no_network_but_loopback(sim):
    lines = sim.vm("work", "cat", "/proc/net/dev").stdout.decode().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in lines] == ["lo"]


def test_no_vm_sees_the_socket_of_qubesd(sim):
    assert sim.dom0("test", "-S", "/run/qubesd.sock").returncode == 0
    assert sim.vm("work", "test", "-e", "/run/qubesd.sock", user="root").returncode == 1


def test_root_in_a_vm_reads_nothing_of_the_caller_from_its_first_process(sim, tmp_path):
    with Sim(tmp_path / "sim") as one:
        os.environ["SIM_SECRET"] = "of-the-host"
        try:
            one.up(vms=["leaky"])
        finally:
            del os.environ["SIM_SECRET"]
        for run in (one.dom0, lambda *argv: one.vm("leaky", *argv, user="root")):
            assert b"of-the-host" not in run("cat", "/proc/1/environ").stdout
        assert b"->" not in one.vm("leaky", "ls", "-l", "/proc/1/fd", user="root").stdout
        assert one.vm("leaky", "sh", "-c", "echo x >> /proc/1/fd/1", user="root").returncode != 0


def test_root_in_a_vm_may_neither_trace_nor_open_by_handle_nor_mount(sim):
    bounding = sim.vm("work", "sh", "-c", "sed -n 's/^CapBnd:.//p' /proc/self/status", user="root").stdout
    for number in (2, 16, 17, 19, 21, 27):
        assert not int(bounding, 16) >> number & 1


def test_root_in_a_vm_may_not_change_the_kernels_settings(sim):
    for path in ("/proc/sys/kernel/printk_ratelimit", "/proc/sys/vm/swappiness"):
        assert b"Read-only" in sim.vm("work", "sh", "-c", f"cat {path} > {path}", user="root").stderr


def test_a_caller_with_a_narrow_umask_gets_usable_domains(tmp_path):
    before = os.umask(0o077)
    try:
        with Sim(tmp_path / "sim") as one:
            one.up(vms=["work"])
            assert one.vm("work", "sh", "-c", "cat /etc/hostname; ls /var/lib").stdout == b"work\n"
    finally:
        os.umask(before)


def test_a_bound_path_is_seen_read_only_and_its_parents_are_passable(tmp_path):
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "file").write_text("shared")
    with Sim(tmp_path / "sim") as one:
        one.up(vms=["work"], dom0_binds=[f"{tmp_path}/share:/root/deep/share"], vm_binds=[f"{tmp_path}/share:/mnt/share:rw"])
        assert one.dom0("cat", "/root/deep/share/file", user="user").stdout == b"shared"
        assert one.dom0("touch", "/root/deep/share/new").returncode == 1
        one.vm("work", "touch", "/mnt/share/new", user="root", check=True)
    assert (tmp_path / "share" / "new").exists()


# Persistence


def test_home_and_usr_local_persist_and_the_root_is_reset_when_a_vm_restarts(sim):
    for path in ("/home/user/kept", "/usr/local/bin/kept", "/rw/kept", "/etc/lost", "/usr/bin/lost", "/var/lib/lost"):
        sim.vm("work", "touch", path, user="root", check=True)
    sim.shutdown("work")
    sim.start("work")
    for path in ("/home/user/kept", "/usr/local/bin/kept", "/rw/kept"):
        assert sim.vm("work", "test", "-e", path, user="root").returncode == 0, path
    for path in ("/etc/lost", "/usr/bin/lost", "/var/lib/lost"):
        assert sim.vm("work", "test", "-e", path, user="root").returncode == 1, path


def test_a_change_of_the_template_is_in_its_vms_after_their_restart_and_not_before(sim):
    sim.start("deb")
    change = "echo new > /etc/from-template; echo 'echo tool' > /usr/bin/tool; chmod 755 /usr/bin/tool; rm /etc/login.defs"
    sim.vm("deb", "sh", "-c", change, user="root", check=True)
    sim.shutdown("deb")
    assert sim.vm("other", "test", "-e", "/etc/from-template").returncode == 1
    sim.shutdown("other")
    sim.start("other")
    assert sim.vm("other", "sh", "-c", "tool").stdout == b"tool\n"
    assert sim.vm("other", "cat", "/etc/from-template").stdout == b"new\n"
    assert sim.vm("other", "test", "-e", "/etc/login.defs").returncode == 1
    assert sim.vm("other", "hostname").stdout == b"other\n"


# qvm-run


def test_qvm_run_passes_every_byte_both_ways(sim):
    assert sim.dom0(*RUN, "work", "cat", data=ALL_BYTES).stdout == ALL_BYTES


def test_qvm_run_passes_ten_megabytes_both_ways(sim):
    data = os.urandom(1 << 20) * 10
    assert sim.dom0(*RUN, "work", "cat", data=data).stdout == data


@pytest.mark.parametrize("code", [0, 1, 2, 125, 126, 127, 255])
def test_qvm_run_passes_the_exit_code_on(sim, code):
    assert sim.dom0(*RUN, "work", f"exit {code}").returncode == code


def test_qvm_run_keeps_stderr_apart(sim):
    done = sim.dom0(*RUN, "work", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


def test_what_follows_the_command_line_on_stdin_is_the_commands(sim):
    assert sim.dom0(*RUN, "work", "head -c 3 >/dev/null; cat", data=b"abcdef; exit 9\n").stdout == b"def; exit 9\n"


def test_an_empty_stdin_is_empty_in_the_vm(sim):
    assert sim.dom0(*RUN, "work", "wc -c").stdout == b"0\n"


def test_qvm_run_without_pass_io_discards_output_and_passes_the_exit_code(sim):
    done = sim.dom0("qvm-run", "-q", "--no-gui", "work", "echo out; echo err >&2; exit 3")
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 3)


def test_arguments_after_the_command_reach_the_vm_unchanged(sim):
    words = ["a b", "$HOME", "*", "-x", "--", "--verbose"]
    done = sim.dom0(*RUN, "work", "printf", "[%s]", *words)
    assert done.stdout == "".join(f"[{word}]" for word in words).encode(), done.stderr


def test_no_shell_runs_a_program_by_its_name(sim):
    assert sim.dom0(*RUN, "--no-shell", "work", "hostname").stdout == b"work\n"
    assert sim.dom0(*RUN, "--no-shell", "work", "exit 3").returncode == 127


def test_qvm_run_as_root_is_root(sim):
    assert sim.dom0(*RUN, "-u", "root", "work", "id -u").stdout == b"0\n"


def test_a_vm_never_gets_a_descriptor_of_dom0(sim):
    sim.dom0("sh", "-c", "echo dom0s > /root/file", check=True)
    link = sim.dom0("sh", "-c", f"{' '.join(RUN)} work 'readlink /proc/self/fd/0' < /root/file").stdout
    assert link.startswith(b"pipe:")


def test_a_halted_vm_is_not_started_with_no_autostart(sim):
    done = sim.dom0(*RUN, "off", "echo ran")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
    assert sim.dom0("qvm-run", "-v", "-p", "-n", "off", "true").stderr == b"Qube 'off' not started\n"
    assert state(sim, "off") == "Halted"


def test_a_halted_vm_is_started_without_no_autostart(sim):
    assert sim.dom0("qvm-run", "--pass-io", "off", "hostname").stdout == b"off\n"
    sim.shutdown("off")


def test_an_unknown_vm_is_a_usage_error(sim):
    done = sim.dom0(*RUN, "nobody", "true")
    assert done.returncode == 2
    assert done.stderr.endswith(b"qvm-run: error: no such domain: 'nobody'\n")


def test_nothing_is_run_in_a_paused_vm_with_no_autostart(sim):
    sim.pause("work")
    try:
        done = sim.dom0(*RUN, "work", "touch /home/user/ran-while-paused")
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
    finally:
        sim.unpause("work")
    assert sim.vm("work", "test", "-e", "/home/user/ran-while-paused").returncode == 1


def test_a_paused_vm_goes_on_without_no_autostart(sim):
    sim.pause("work")
    try:
        assert sim.dom0("qvm-run", "--pass-io", "work", "hostname").stdout == b"work\n"
    finally:
        if state(sim, "work") == "Paused":
            sim.unpause("work")


def test_a_paused_vm_stands_still_and_its_open_session_hangs(sim):
    counter = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"
    with sim.popen_dom0(*RUN, "work", counter, stdout=subprocess.PIPE) as session:
        assert session.stdout.readline() == b"1\n"
        sim.pause("work")
        try:
            os.set_blocking(session.stdout.fileno(), False)

            def is_still():
                # What it had said before is on its way for a moment.
                session.stdout.read()
                time.sleep(0.3)
                return session.stdout.read() is None

            assert eventually(is_still)
            assert session.poll() is None
        finally:
            sim.unpause("work")
        assert eventually(lambda: session.stdout.read())
        session.kill()


def test_killing_qvm_run_ends_the_writer_in_the_vm(sim):
    with sim.popen_dom0("sh", "-c", f"echo $$; exec {' '.join(RUN)} work 'yes killme'", stdout=subprocess.PIPE) as session:
        pid = session.stdout.readline().decode().strip()
        assert session.stdout.read(6) == b"killme"
        sim.dom0("kill", "-KILL", pid, check=True)
        assert eventually(lambda: sim.vm("work", "pgrep", "-x", "yes").returncode == 1)
        session.kill()


def test_killing_qvm_run_closes_the_readers_stdin_in_the_vm(sim):
    command = "cat; touch /home/user/stdin-closed"
    script = f"echo $$; exec {' '.join(RUN)} work '{command}'"
    with sim.popen_dom0("sh", "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as session:
        pid = session.stdout.readline().decode().strip()
        session.stdin.write(b"x")
        session.stdin.flush()
        assert session.stdout.read(1) == b"x"
        sim.dom0("kill", "-KILL", pid, check=True)
        assert eventually(lambda: sim.vm("work", "test", "-e", "/home/user/stdin-closed").returncode == 0)
        session.kill()


def test_killing_a_vm_ends_qvm_run_with_an_error(sim):
    with sim.popen_dom0(*RUN, "work", "echo up; sleep 60", stdout=subprocess.PIPE) as session:
        assert session.stdout.readline() == b"up\n"
        sim.kill("work")
        assert session.stdout.read() == b""
        assert session.wait(60) != 0
    sim.start("work")


def test_qvm_run_waits_for_whoever_holds_its_output(sim):
    assert sim.dom0(*RUN, "work", "(sleep 0.3; echo late) & exit 4").stdout == b"late\n"


def test_a_vm_whose_output_nobody_reads_is_stalled_and_memory_stays_flat(sim):
    def memory():
        return sum(int(status_of(pid).get("RssAnon", "0").split()[0]) for pid in hypervisor_pids(sim.root))

    with sim.popen_dom0(*RUN, "work", "exec dd if=/dev/zero bs=64k 2>/dev/null", stdout=subprocess.PIPE) as session:
        session.stdout.read(1)
        before = memory()
        time.sleep(1)
        assert memory() - before < 4096
        written = sim.vm("work", "sh", "-c", "sed -n 's/^wchar: //p' /proc/$(pgrep -x dd)/io").stdout
        assert int(written) < 4 << 20
        session.kill()


def test_many_qvm_runs_leave_no_descriptor_open_in_the_hypervisor(sim):
    hypervisor = min(hypervisor_pids(sim.root))

    def descriptors():
        return len(os.listdir(f"/proc/{hypervisor}/fd"))

    before = descriptors()
    sim.dom0("sh", "-c", f"for i in 1 2 3 4 5 6 7 8 9 10; do {' '.join(RUN)} work true; done", check=True)
    assert eventually(lambda: descriptors() <= before + 1, 3), (before, descriptors())


# The other tools


def test_qvm_check_tells_all_none_and_some(sim):
    assert sim.dom0("qvm-check", "-q", "work", "off").returncode == 0
    assert sim.dom0("qvm-check", "-q", "work", "nobody").returncode != 0
    assert sim.dom0("qvm-check", "-q", "--running", "work", "other").returncode == 0
    assert sim.dom0("qvm-check", "-q", "--running", "off").returncode == 1
    assert sim.dom0("qvm-check", "-q", "--running", "work", "off").returncode == 3
    assert sim.dom0("qvm-check").returncode == 2


def test_qvm_ls_lists_what_runs_and_any_columns(sim):
    assert sim.dom0("qvm-ls", "--running", "--raw-list").stdout == b"dom0\nother\nwork\n"
    rows = sim.dom0("qvm-ls", "--raw-data", "--fields", "NAME,state,Class").stdout.splitlines()
    assert rows[0] == b"dom0|Running|AdminVM"
    assert b"off|Halted|AppVM" in rows and b"deb|Halted|TemplateVM" in rows


def test_a_preference_is_kept(sim):
    sim.dom0("qvm-prefs", "work", "label", "blue", check=True)
    assert sim.dom0("qvm-prefs", "work", "label").stdout == b"blue\n"
    assert sim.dom0("qvm-prefs", "work", "klass").stdout == b"AppVM\n"
    assert sim.dom0("qvm-prefs", "work", "nonsense").returncode == 2


def test_dom0_starts_shuts_down_pauses_and_kills_vms(sim):
    on, off, held = "Running", "Halted", "Paused"
    for tool, then in (("start", on), ("pause", held), ("unpause", on), ("shutdown", off), ("start", on), ("kill", off)):
        sim.dom0(f"qvm-{tool}", "off", check=True)
        assert state(sim, "off") == then


def test_qubesctl_says_that_it_cannot_target_vms(sim):
    done = sim.dom0("qubesctl", "--skip-dom0", "--targets=work", "state.apply")
    assert done.returncode == 1 and done.stderr.startswith(b"qubesctl: error:")


# The command line


def test_the_exit_code_and_signals_of_a_command_are_passed_on(sim):
    assert sim.dom0("sh", "-c", "exit 125").returncode == 125
    assert sim.vm("work", "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM


def test_killing_the_command_line_kills_the_command(sim):
    with sim.popen_vm("work", "sh", "-c", "sleep 4712 & sleep 4712") as session:
        assert eventually(lambda: sim.vm("work", "pgrep", "-c", "-f", "^sleep 4712").stdout == b"2\n")
        session.kill()
        assert eventually(lambda: sim.vm("work", "pgrep", "-f", "^sleep 4712").returncode == 1)


def test_a_second_up_in_the_same_folder_is_refused(sim):
    done = subprocess.run(sim.command("up"), capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"qubes-sim: error:") and done.stderr.count(b"\n") == 1


def test_wrong_usage_is_exit_code_two_and_a_failed_job_one(sim):
    assert subprocess.run(sim.command("frobnicate"), capture_output=True, check=False).returncode == 2
    assert subprocess.run(sim.command("start", "nobody"), capture_output=True, check=False).returncode == 1


def test_down_leaves_no_process_no_mount_no_file_and_can_be_repeated(tmp_path):
    one = Sim(tmp_path / "sim")
    one.up(vms=["work", "held"])
    one.pause("held")
    with one.popen_vm("work", "sh", "-c", "trap '' TERM HUP; sleep 600 & sleep 600"):
        assert len(hypervisor_pids(one.root)) > 3
        one.down()
    assert eventually(lambda: not hypervisor_pids(one.root))
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        assert one.root not in file.read()
    assert not os.path.exists(one.root)
    one.down()


def test_all_domains_die_with_the_hypervisor(tmp_path):
    with Sim(tmp_path / "sim") as one:
        one.up(vms=["work", "held"])
        one.pause("held")
        pids = hypervisor_pids(one.root)
        # All others come from it. It need not have the lowest number, as the kernel begins again with low ones.
        (hypervisor,) = (pid for pid in pids if int(status_of(pid).get("PPid", pids[0])) not in pids)
        os.kill(hypervisor, signal.SIGKILL)
        assert eventually(lambda: not hypervisor_pids(one.root))


def test_two_simulators_side_by_side_do_not_disturb_each_other(sim, tmp_path):
    with Sim(tmp_path / "sim") as one:
        one.up(vms=["work"])
        one.vm("work", "touch", "/home/user/of-the-second", check=True)
        assert sim.vm("work", "test", "-e", "/home/user/of-the-second").returncode == 1
    assert sim.vm("work", "hostname").stdout == b"work\n"
