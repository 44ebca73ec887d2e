# SPDX-License-Identifier: GPL-2.0-or-later
"""The service and its commands under the real systemd: the unit's hardening lets it work, and a command's own unit holds it."""

import datetime
import json
import os
import subprocess
import time

import pytest
from qubes_sim.real_systemd import SystemdStand, is_possible

pytestmark = pytest.mark.skipif(not is_possible(), reason="needs root, systemd, and cgroups of its own")
_PILLAR = {"max_age": 60, "limits": {"memory": "256M", "tasks": 64}, "engine": {"discover_interval": 1, "poll_wait": 5}}


@pytest.fixture(scope="module")
def dom0(tmp_path_factory):
    """A dom0 under systemd, with the formula applied, and two VMs."""
    with SystemdStand(os.path.join(str(tmp_path_factory.mktemp("systemd")), "sim")) as stand:
        stand.set_up(_PILLAR)
        stand.wait_served("work", "dev")
        yield stand


def _remote(dom0, *words, **options):
    return dom0.vm("work", "qvm-remote", *words, **options)


def _show(dom0, *properties):
    words = [f"--property={name}" for name in properties]
    shown = dom0.dom0("systemctl", "show", *words, "qvm-remote.service", check=True).stdout.decode().splitlines()
    return dict(line.split("=", 1) for line in shown)


def _until(check, seconds=30):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_the_hardened_service_does_its_work(dom0):
    assert dom0.dom0("cat", "/proc/1/comm").stdout == b"systemd\n"
    done = _remote(dom0, "hostname; id -u; cat /proc/1/comm")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"dom0\n0\nsystemd\n", b"")
    shown = _show(dom0, "ActiveState", "NoNewPrivileges", "ProtectSystem", "FragmentPath")
    assert shown == {
        "ActiveState": "active",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "FragmentPath": "/run/systemd/system/qvm-remote.service",
    }
    # What commands can do, the service itself can't.
    pid = _show(dom0, "MainPID")["MainPID"]
    assert "NoNewPrivs:\t1" in dom0.dom0("cat", f"/proc/{pid}/status").stdout.decode()
    assert _remote(dom0, "touch /etc/made-by-a-command").returncode == 0
    assert dom0.dom0("nsenter", "-t", pid, "-m", "touch", "/etc/made-by-the-service").returncode != 0


def _slots(dom0):
    shown = dom0.dom0("systemctl", "list-units", "--all", "--no-legend", "--plain", "qvm-remote-slot-*").stdout.decode()
    return {line.split()[0] for line in shown.splitlines()}


def _slot_of(shown):
    return next(line for line in shown.stdout.decode().splitlines() if "/qvm.slice/qvm-remote.slice/qvm-remote-slot-" in line)


@pytest.mark.long
def test_a_command_has_a_unit_for_itself_that_the_next_one_may_have(dom0):
    groups = _remote(dom0, "cat /proc/self/cgroup")
    assert "qvm-remote.service" not in groups.stdout.decode()
    assert _slot_of(_remote(dom0, "cat /proc/self/cgroup")) == _slot_of(groups)
    text = "cat /proc/self/cgroup; touch /tmp/here-{0}; while [ ! -e /tmp/here-{1} ]; do sleep 0.05; done"
    with dom0.popen_vm("work", "qvm-remote", "-n", text.format(1, 2), stdout=subprocess.PIPE) as first:
        second = _remote(dom0, "-n", text.format(2, 1))
        assert _slot_of(second).encode() not in first.communicate(timeout=30)[0]
    dom0.dom0("rm", "/tmp/here-1", "/tmp/here-2", check=True)


@pytest.mark.long
def test_what_a_command_leaves_in_memory_is_not_taken_from_the_next_one(dom0):
    for _ in range(4):
        # Two of these are more than a command may use.
        done = _remote(dom0, "-n", "head -c 150M /dev/zero > /dev/shm/left-$QVM_REMOTE_ID && echo kept")
        assert done.stdout == b"kept\n"
    _remote(dom0, "rm /dev/shm/left-*")


@pytest.mark.long
def test_a_command_that_stops_its_supervisor_is_ended_with_its_unit(dom0):
    done = _remote(dom0, "-t", "1", "-n", "setsid env -i sleep 7616 & kill -STOP $PPID; sleep 7616", timeout=90)
    assert done.returncode == 125
    _until(lambda: dom0.dom0("pgrep", "-fx", "sleep 7616").returncode == 1)
    assert _remote(dom0, "hostname").stdout == b"dom0\n"


def test_memory_is_bounded_for_all_processes_of_a_command(dom0):
    # Four of 100 MiB each are within a process's share, and not within the command's.
    # Each keeps them until two were killed, however late it began.
    grow = 'python3 -c \'import os, time; x = bytearray(100 << 20)\nwhile not os.path.exists("over"): time.sleep(0.05)\' || echo killed >> killed'
    text = f"touch killed; for i in 1 2 3 4; do ({grow}) & done; until [ $(wc -l < killed) -ge 2 ]; do sleep 0.1; done; touch over; wait; cat killed"
    done = _remote(dom0, "-n", text, timeout=90)
    assert done.stdout.count(b"killed") in (2, 3)
    assert _remote(dom0, "hostname").stdout == b"dom0\n"


@pytest.mark.long
def test_a_command_of_another_user_is_held_by_the_same_unit(dom0):
    dom0.set_pillar({**_PILLAR, "vms": {"work": {}, "dev": {"run_as": "user"}}})
    dom0.salt("state.apply", "qvm-remote")
    dom0.wait_served("dev")
    done = dom0.vm("dev", "qvm-remote", "id -un; pwd; cat /proc/self/cgroup; systemctl show --property=Version; systemd-run true")
    assert done.stdout.startswith(b"user\n/run/qvm-remote/dev-") and _slot_of(done)
    assert b"Version=" not in done.stdout and done.returncode != 0
    bomb = "bomb() { bomb | bomb & }; bomb; sleep 79; :"
    done = dom0.vm("dev", "qvm-remote", "-t", "3", "-n", bomb, timeout=90)
    assert done.returncode == 124
    _until(lambda: dom0.dom0("pgrep", "-u", "user").returncode == 1)
    assert _remote(dom0, "hostname").stdout == b"dom0\n"


@pytest.mark.long
def test_a_working_folder_is_a_file_system_that_is_gone_with_its_unit(dom0):
    full = _remote(dom0, "-n", "df --output=size -B1 . | tail -n 1; head -c 300M /dev/zero > file; stat -c %s file; kill -9 $PPID; sleep 60", timeout=90)
    assert full.returncode == 125
    _until(lambda: not dom0.dom0("sh", "-c", "grep -c ' /run/qvm-remote/jobs/' /proc/self/mountinfo; ls /run/qvm-remote/jobs").stdout.split()[1:])
    assert _remote(dom0, "-n", "df --output=size -B1 . | tail -n 1").stdout == b"%d\n" % (256 << 20)


def test_a_fork_bomb_is_held_and_swept_away(dom0):
    done = _remote(dom0, "-t", "3", "-n", "bomb() { bomb | bomb & }; bomb; sleep 77; :", timeout=90)
    assert done.returncode == 124
    assert dom0.dom0("pgrep", "-fx", "sleep 77").returncode == 1
    _until(lambda: dom0.dom0("pgrep", "-f", "bomb").returncode == 1)
    assert _remote(dom0, "hostname").stdout == b"dom0\n"


@pytest.mark.long
def test_nothing_that_a_command_leaves_behind_survives_it(dom0):
    done = _remote(dom0, "-n", "setsid sh -c 'setsid sleep 7613 & exec sleep 7612' & sleep 0.2; echo ended")
    assert (done.returncode, done.stdout) == (0, b"ended\n")
    _until(lambda: dom0.dom0("pgrep", "-f", "sleep 761[23]").returncode == 1)


@pytest.mark.long
def test_a_reload_loses_nothing_and_a_stop_says_what_it_interrupted(dom0):
    with dom0.popen_vm("work", "qvm-remote", "-n", "sleep 4; echo still here", stdout=subprocess.PIPE) as running:
        _until(lambda: dom0.dom0("pgrep", "-fx", "sleep 4").returncode == 0)
        dom0.dom0("systemctl", "reload", "qvm-remote", check=True)
        assert running.communicate(timeout=30)[0] == b"still here\n"
    with dom0.popen_vm("work", "qvm-remote", "-n", "sleep 7614", stderr=subprocess.PIPE) as running:
        _until(lambda: dom0.dom0("pgrep", "-fx", "sleep 7614").returncode == 0)
        dom0.dom0("systemctl", "stop", "qvm-remote", timeout=60, check=True)
        assert b"interrupted" in running.communicate(timeout=30)[1]
        assert running.returncode == 125
    assert dom0.dom0("pgrep", "-fx", "sleep 7614").returncode == 1
    assert _show(dom0, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    _until(lambda: not _slots(dom0))
    dom0.dom0("systemctl", "start", "qvm-remote", timeout=60, check=True)
    dom0.wait_served("work")


@pytest.mark.long
def test_a_killed_service_ends_its_commands_and_is_started_again(dom0):
    with dom0.popen_vm("work", "qvm-remote", "-n", "sleep 7615", stderr=subprocess.PIPE) as running:
        _until(lambda: dom0.dom0("pgrep", "-fx", "sleep 7615").returncode == 0)
        before = _show(dom0, "MainPID")
        dom0.dom0("systemctl", "kill", "--signal=KILL", "qvm-remote", check=True)
        _until(lambda: _show(dom0, "MainPID", "ActiveState") not in ({**before, "ActiveState": "active"}, {"MainPID": "0", "ActiveState": "activating"}))
        _until(lambda: dom0.dom0("pgrep", "-fx", "sleep 7615").returncode == 1)
        assert b"interrupted" in running.communicate(timeout=60)[1]
        assert running.returncode == 125
    dom0.wait_served("work", "dev")


@pytest.mark.long
def test_nobody_is_told_interrupted_while_a_command_of_a_killed_service_goes_on(dom0):
    dom0.dom0("rm", "-f", "/tmp/signs", check=True)
    # Neither its supervisor nor a signal that can be ignored ends it, and it may do more than the service, which sees none of its environment.
    line = "trap '' TERM; kill -STOP $PPID; while :; do echo $QVM_REMOTE_ID $EPOCHREALTIME >> /tmp/signs; sleep 0.05; done"
    with dom0.popen_vm("work", "qvm-remote", "-n", line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as client:
        _until(lambda: dom0.dom0("test", "-s", "/tmp/signs").returncode == 0)
        dom0.dom0("systemctl", "kill", "--signal=KILL", "qvm-remote", check=True)
        assert b"interrupted" in client.communicate(timeout=90)[1]
        assert client.returncode == 125
    dom0.wait_served("work", "dev")
    cid, last = dom0.dom0("tail", "-n", "1", "/tmp/signs").stdout.decode().split()
    rows = map(json.loads, dom0.dom0("grep", "-h", cid, "/var/log/qvm-remote/audit.log").stdout.decode().splitlines())
    (ended,) = [row for row in rows if row["what"] == "ended"]
    recorded = datetime.datetime.fromisoformat(ended["time"].replace("Z", "+00:00")).timestamp()
    assert ended["status"] == "interrupted" and float(last) <= recorded
    # It does not go on after all.
    assert dom0.dom0("tail", "-n", "1", "/tmp/signs").stdout.decode().split() == [cid, last]


@pytest.mark.long
def test_what_run_once_runs_goes_on_whatever_becomes_of_the_service_beside_it(dom0):
    def told():
        return int(dom0.dom0("grep", "-c", "another qvm-remote engine", "/var/log/qvm-remote/minion.log").stdout)

    dom0.dom0("systemctl", "stop", "qvm-remote", timeout=60, check=True)
    dom0.dom0("rm", "-f", "/tmp/begun", "/tmp/go-on", check=True)
    line = "touch /tmp/begun; while [ ! -e /tmp/go-on ]; do sleep 0.05; done; echo $QVM_REMOTE_ID"
    with dom0.popen_vm("work", "qvm-remote", "-n", line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        _until(lambda: dom0.vm("work", "sh", "-c", "ls ~/.qvm-remote/queue/pending | grep -c .").stdout == b"2\n")
        words = ("salt-call", "--local", "-c", "/etc/qubes/remote", "qvm_remote.run_once")
        with dom0.popen_dom0(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as once:
            _until(lambda: dom0.dom0("test", "-e", "/tmp/begun").returncode == 0)
            for verb in ("start", "restart"):
                before = told()
                dom0.dom0("systemctl", verb, "qvm-remote", timeout=90, check=True)
                # It waits; it does not end what another one runs.
                _until(lambda before=before: told() > before or client.poll() is not None, 60)
            dom0.dom0("touch", "/tmp/go-on", check=True)
            output, errors = client.communicate(timeout=60)
            assert (client.returncode, errors) == (0, b"")
            assert once.wait(60) == 0
    rows = dom0.dom0("grep", "-h", output.decode().strip(), "/var/log/qvm-remote/audit.log").stdout.decode().splitlines()
    assert [row["status"] for row in map(json.loads, rows) if row["what"] == "ended"] == ["done"]
    dom0.wait_served("work", "dev")


@pytest.mark.long
def test_a_service_that_is_just_starting_is_stopped_too(dom0):
    dom0.dom0("systemctl", "stop", "qvm-remote", timeout=60, check=True)
    dom0.put("/run/systemd/system/qvm-remote.service.d/slow.conf", "[Service]\nExecStartPre=/usr/bin/sleep 60\n")
    dom0.dom0("systemctl", "daemon-reload", check=True)
    dom0.dom0("systemctl", "start", "--no-block", "qvm-remote", check=True)
    _until(lambda: _show(dom0, "ActiveState") == {"ActiveState": "activating"})
    dom0.set_pillar({**_PILLAR, "vms": {"work": {}, "dev": {}}, "service": {"running": False}})
    shown = dom0.salt("state.apply", "qvm-remote.dom0")
    assert {name.split("_|-")[1]: set(ret["changes"]) for name, ret in shown.items()}["qvm-remote-dom0-service"] == {"running"}
    assert _show(dom0, "ActiveState")["ActiveState"] in ("inactive", "failed")
    time.sleep(1)
    assert _show(dom0, "ActiveState")["ActiveState"] in ("inactive", "failed")
    dom0.dom0("rm", "-r", "/run/systemd/system/qvm-remote.service.d", check=True)
    dom0.set_pillar({**_PILLAR, "vms": {"work": {}, "dev": {}}})
    dom0.salt("state.apply", "qvm-remote.dom0")
    dom0.wait_served("work")


@pytest.mark.long
def test_settings_that_name_other_folders_are_opened_to_the_service(dom0):
    folders = {"key_dir": "/etc/qvm-remote-keys", "state_dir": "/srv/qvm-remote-state", "run_dir": "/run/other-qvm-remote", "audit_log": "/var/log/other/audit.log"}
    dom0.set_pillar({**_PILLAR, "vms": {"work": {}, "dev": {}}, "engine": {**_PILLAR["engine"], **folders}})
    # The folders are there only once the service starts; the keys come after it.
    dom0.salt("state.apply", "qvm-remote.dom0")
    dom0.salt("state.apply", "qvm-remote.vm")
    dom0.wait_served("work", "dev")
    assert _remote(dom0, "hostname").stdout == b"dom0\n"
    assert dom0.dom0("grep", "-c", '"what":"run"', folders["audit_log"]).stdout != b"0\n"
    dom0.set_pillar({**_PILLAR, "vms": {"work": {}, "dev": {}}})
    dom0.salt("state.apply", "qvm-remote")
    dom0.wait_served("work")


@pytest.mark.long
def test_enabled_it_lies_where_a_boot_finds_it_and_disabled_it_does_not(dom0):
    dom0.set_pillar({**_PILLAR, "vms": {"work": {}, "dev": {}}, "service": {"enable": True, "accept_risk": True}})
    dom0.salt("state.apply", "qvm-remote.dom0")
    assert dom0.dom0("systemctl", "is-enabled", "qvm-remote").stdout == b"enabled\n"
    assert _show(dom0, "FragmentPath") == {"FragmentPath": "/etc/systemd/system/qvm-remote.service"}
    dom0.set_pillar({**_PILLAR, "vms": {"work": {}, "dev": {}}})
    dom0.salt("state.apply", "qvm-remote.dom0")
    assert _show(dom0, "FragmentPath", "ActiveState") == {"FragmentPath": "/run/systemd/system/qvm-remote.service", "ActiveState": "active"}
    assert not dom0.dom0("find", "/etc/systemd/system", "-name", "qvm-remote*").stdout
    assert _remote(dom0, "hostname").stdout == b"dom0\n"
