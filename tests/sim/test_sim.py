# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator behaves as Qubes does where qvm-remote relies on it."""

import subprocess
import time

import pytest
from qubes_sim import costs
from qubes_sim.handle import Sim


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    with Sim(tmp_path_factory.mktemp("sim") / "s") as one:
        one.up(templates=["t"], vms=["work:t", "dev"])
        yield one


def _tool(sim, *words, **options):
    done = sim.dom0(*words, **options)
    return done.returncode, done.stdout, done.stderr


def _wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def _wait_runs(sim, vm, *words):
    """Wait until a command line runs in a VM: what was started a moment ago need not have come that far."""
    _wait(lambda: sim.vm(vm, "pgrep", *words).returncode == 0)


def test_every_domain_has_its_own_name_and_files(sim):
    assert sim.dom0("hostname").stdout == b"dom0\n"
    assert sim.vm("work", "sh", "-c", "hostname; id -un; pwd").stdout == b"work\nuser\n/home/user\n"
    sim.dom0("touch", "/srv/only-dom0", "/tmp/only-dom0", check=True)
    sim.vm("work", "touch", "/tmp/only-work", check=True)
    assert b"only" not in sim.vm("dev", "sh", "-c", "ls -a /srv /root /tmp /home/user 2>&1", user="root").stdout
    assert sim.vm("work", "sh", "-c", "ls /root", user="root").stdout == b""


def test_no_domain_sees_another_ones_processes(sim):
    marked = sim.popen_vm("dev", "sleep", "9654321")
    _wait_runs(sim, "dev", "-fx", "sleep 9654321")
    assert sim.vm("work", "pgrep", "-f", "sleep 9654321").returncode == 1
    assert sim.dom0("pgrep", "-f", "sleep 9654321").returncode == 1
    marked.terminate()
    marked.wait(60)


def test_home_and_usr_local_persist_and_the_root_does_not(sim):
    sim.vm("work", "sh", "-c", "echo kept > ~/kept; echo kept > /usr/local/kept; echo lost > /usr/lost; echo lost > /etc/lost", user="root", check=True)
    sim.vm("work", "sh", "-c", "echo kept > ~/kept", check=True)
    sim.shutdown("work")
    sim.start("work")
    assert sim.vm("work", "sh", "-c", "cat ~/kept /usr/local/kept").stdout == b"kept\nkept\n"
    assert sim.vm("work", "sh", "-c", "ls /usr/lost /etc/lost").returncode != 0


def test_a_vm_gets_its_templates_root_when_it_starts(sim):
    sim.start("t")
    sim.vm("t", "sh", "-c", "echo tool > /usr/bin/from-template", user="root", check=True)
    sim.shutdown("t")
    assert sim.vm("work", "cat", "/usr/bin/from-template").returncode != 0
    sim.shutdown("work")
    sim.start("work")
    assert sim.vm("work", "cat", "/usr/bin/from-template").stdout == b"tool\n"


@pytest.mark.parametrize("code", [0, 1, 125, 127, 255])
def test_qvm_run_passes_exit_code_and_both_streams(sim, code):
    assert _tool(sim, "qvm-run", "--pass-io", "work", f"echo out; echo err >&2; exit {code}") == (code, b"out\n", b"err\n")


def test_qvm_run_passes_all_bytes_both_ways_and_leaves_stdin_to_the_command(sim):
    data = bytes(range(256)) * 40000
    assert _tool(sim, "qvm-run", "--pass-io", "work", "cat", data=data) == (0, data, b"")


def test_with_arguments_qvm_run_uses_no_shell(sim):
    assert _tool(sim, "qvm-run", "--pass-io", "work", "--", "printf", "<%s>", "a b", "$HOME")[1] == b"<a b><$HOME>"


def test_without_pass_io_there_is_no_output(sim):
    assert _tool(sim, "qvm-run", "work", "echo out; exit 3") == (3, b"", b"")


def test_user_root_is_possible(sim):
    assert _tool(sim, "qvm-run", "-p", "-u", "root", "work", "id -u")[1] == b"0\n"


def test_a_halted_vm_is_not_started_with_no_autostart(sim):
    sim.create("idle")
    assert _tool(sim, "qvm-run", "--pass-io", "--no-autostart", "idle", "true") == (1, b"", b"")
    assert b"not started" in _tool(sim, "qvm-run", "-v", "--pass-io", "--no-autostart", "idle", "true")[2]
    assert _tool(sim, "qvm-check", "--running", "idle")[0] == 1
    assert _tool(sim, "qvm-run", "--pass-io", "idle", "hostname")[1] == b"idle\n"
    assert _tool(sim, "qvm-check", "--running", "idle")[0] == 0
    sim.kill("idle")


def test_an_unknown_vm_is_a_usage_error(sim):
    code, _, err = _tool(sim, "qvm-run", "--pass-io", "nobody", "true")
    assert code == 2
    assert b"no such domain: 'nobody'" in err


def test_a_paused_vm_stands_still_and_runs_nothing_new(sim):
    counting = sim.popen_vm("work", "sh", "-c", "while :; do echo x >> /tmp/count; sleep 0.02; done")
    _wait(lambda: sim.vm("work", "cat", "/tmp/count").stdout)
    sim.pause("work")
    assert _tool(sim, "qvm-run", "-v", "--pass-io", "--no-autostart", "work", "true")[0] == 1
    assert b"work" not in _tool(sim, "qvm-ls", "--running", "--raw-list")[1].split()
    sim.unpause("work")
    assert int(sim.vm("work", "sh", "-c", "wc -l < /tmp/count").stdout) > 0
    counting.terminate()
    counting.wait(60)


def test_qvm_check_and_qvm_ls_answer_as_the_real_ones(sim):
    sim.create("off")
    assert _tool(sim, "qvm-check", "work", "off")[0] == 0
    assert _tool(sim, "qvm-check", "--running", "work", "off")[0] == 3
    assert _tool(sim, "qvm-check", "nobody")[0] == 1
    assert _tool(sim, "qvm-ls", "--running", "--raw-list")[1].split() == [b"dom0", b"dev", b"work"]
    assert b"off|Halted|AppVM\n" in _tool(sim, "qvm-ls", "--raw-data", "--fields", "name,state,class")[1]


def test_preferences_can_be_read_and_set(sim):
    assert _tool(sim, "qvm-prefs", "work", "label")[1] == b"red\n"
    assert _tool(sim, "qvm-prefs", "work", "label", "blue")[0] == 0
    assert _tool(sim, "qvm-prefs", "work", "label")[1] == b"blue\n"
    assert _tool(sim, "qvm-prefs", "work", "no-such")[0] == 2


def test_a_writer_in_a_vm_stalls_when_nobody_reads(sim):
    def written():
        return sim.vm("work", "cat", "/tmp/written").stdout

    def stands_still():
        first = written()
        time.sleep(1)
        return first and written() == first

    reader = sim.popen_dom0("qvm-run", "--pass-io", "work", "for i in $(seq 100000); do head -c 65536 /dev/zero; echo $i > /tmp/written; done", stdout=subprocess.PIPE)
    _wait(stands_still)
    # Not since it has come to its end.
    assert int(written()) < 1000
    reader.stdout.close()
    reader.terminate()
    reader.wait(60)


def test_killing_qvm_run_closes_the_descriptors_in_the_vm(sim):
    caller = sim.popen_dom0("qvm-run", "--pass-io", "work", "cat; echo eof > /tmp/saw-eof", stdin=subprocess.PIPE)
    _wait_runs(sim, "work", "-x", "cat")
    sim.dom0("pkill", "-KILL", "-f", "qvm-run", check=True)
    caller.wait(60)
    _wait(lambda: sim.vm("work", "cat", "/tmp/saw-eof").stdout == b"eof\n")


def test_killing_a_vm_ends_qvm_run(sim):
    caller = sim.popen_dom0("qvm-run", "--pass-io", "dev", "sleep 1000")
    _wait_runs(sim, "dev", "-fx", "sleep 1000")
    sim.kill("dev")
    assert caller.wait(60) != 0
    sim.start("dev")


def test_down_leaves_no_process_and_no_mount(tmp_path):
    one = Sim(tmp_path / "other")
    one.up(vms=["a"])
    one.vm("a", "sh", "-c", "setsid sleep 9654322 >/dev/null 2>&1 &")
    one.down()
    assert subprocess.run(["pgrep", "-f", "sleep 9654322"], capture_output=True, check=False).returncode == 1
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).returncode == 1
    with open("/proc/mounts", encoding="utf-8") as file:
        assert str(tmp_path) not in file.read()
    assert not (tmp_path / "other").exists()


def test_bad_usage_is_one_line_and_says_what_to_do(tmp_path):
    one = Sim(tmp_path / "none")
    done = one.dom0("true")
    assert done.returncode == 1
    assert done.stderr.startswith(b"qubes-sim: error: no simulator is up in")
    assert done.stderr.count(b"\n") == 1


_USED = """\
import os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
used = os.wait4(pid, 0)[2]
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def test_tools_take_the_processor_and_memory_of_the_real_ones_when_told_to(sim):
    def used(*argv):
        seconds, kilobytes = map(float, sim.dom0("/usr/bin/python3", "-IS", "-c", _USED, *argv, check=True).stdout.splitlines()[-1].split())
        return seconds > 0.9 * costs.REAL["cpu"], kilobytes * 1024 > 0.9 * costs.REAL["memory"]

    sim.set_real_costs(True)
    assert used("qvm-run", "work", "true") == used("qvm-ls") == (True, True)
    assert used("qrexec-client", "-d", "work", "DEFAULT:QUBESRPC qubes.VMShell+ dom0") == (False, False)
    sim.set_real_costs(False)
    assert used("qvm-run", "work", "true") == (False, False)


def test_several_qubes_can_be_made_started_and_removed_at_once(sim):
    sim.create("one:t", "two:t")
    sim.start("one", "two")
    assert sim.dom0("qvm-check", "--running", "one", "two").returncode == 0
    sim.shutdown("one", "two")
    sim.remove("one", "two")
    assert sim.dom0("qvm-check", "one", "two").returncode == 1
