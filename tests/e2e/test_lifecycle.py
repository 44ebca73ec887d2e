# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs and engines come and go; commands end in exactly one result or a clear error, and nothing runs twice."""

import json
import subprocess
import time

import salt.utils.yaml


def _wait(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def _start_remote(dom0, line, vm="work"):
    return dom0.popen_vm(vm, "qvm-remote", "-n", line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _runs(dom0, what):
    return dom0.dom0("pgrep", "-f", what).returncode == 0


def test_a_vm_that_was_shut_down_is_served_again_without_a_restart_and_never_started_by_us(dom0):
    dom0.shutdown("work")
    time.sleep(3)
    assert dom0.dom0("qvm-check", "--running", "work").returncode == 1
    dom0.start("work")
    dom0.wait_served("work", seconds=40)


def test_a_vm_made_after_the_engine_started_is_served_once_it_has_a_key(dom0):
    dom0.create("late")
    dom0.start("late")
    dom0.vm("late", "qvm-remote", "key", "gen", check=True)
    code, answer = dom0.call("qvm_remote.authorize", "late", "from_vm=True")
    assert code == 0
    assert answer["vm"] == "late"
    dom0.wait_served("late", seconds=40)
    assert dom0.call("qvm_remote.revoke", "late") == (0, True)
    dom0.shutdown("late")


def test_a_paused_vm_goes_on_after_unpause(dom0):
    dom0.pause("work")
    time.sleep(2)
    assert dom0.remote("hostname", vm="dev").stdout == b"dom0\n"
    dom0.unpause("work")
    dom0.wait_served("work", seconds=40)


def test_a_vm_paused_for_longer_than_a_session_lives_is_served_again(dom0):
    dom0.pause("work")
    time.sleep(15)
    dom0.unpause("work")
    dom0.wait_served("work", seconds=40)


def test_a_vm_killed_in_mid_command_gets_the_result_when_it_is_back(dom0):
    marker, go = "/tmp/killed-in-mid-command", "/tmp/killed-go-on"
    _start_remote(dom0, f"until [ -e {go} ]; do sleep 0.1; done; echo x >> {marker}; echo late")
    _wait(lambda: _runs(dom0, "killed-in-mid-command"))
    dom0.kill("work")
    dom0.dom0("touch", go, check=True)
    _wait(lambda: dom0.dom0("cat", marker).stdout == b"x\n")
    dom0.start("work")
    dom0.wait_served("work", seconds=40)
    found = dom0.vm("work", "sh", "-c", "cat ~/.qvm-remote/queue/results/*.out")
    assert found.stdout == b"late\n"
    assert dom0.dom0("cat", marker).stdout == b"x\n"


def test_the_engine_stops_on_sigterm_in_bounded_time_and_leaves_nothing_behind(dom0):
    client = _start_remote(dom0, "echo began; sleep 7654331")
    _wait(lambda: _runs(dom0, "sleep 7654331"))
    dom0.dom0("pkill", "-TERM", "-f", "salt-minion")
    # How its minion ends is Salt's matter, as below.
    _wait(lambda: dom0.dom0("flock", "-n", "/run/qvm-remote/engine.lock", "true").returncode == 0, 15)
    output, errors = client.communicate(timeout=30)
    assert client.returncode == 125
    assert output == b"began\n"
    assert b"interrupted" in errors
    assert not _runs(dom0, "sleep 7654331|qvm-run|supervisor.py")
    assert dom0.dom0("ls", "-A", "/run/qvm-remote/jobs").stdout == b""
    # It ends as it sees that nobody asks any more.
    _wait(lambda: dom0.vm("work", "pgrep", "-f", "qvm-remote agent").returncode == 1)
    dom0.stop_engine()
    dom0.start_engine()


def test_a_configuration_that_is_no_yaml_ends_nothing_that_runs(dom0):
    path, log = dom0.factory.config["conf_file"], dom0.factory.config["log_file"]

    def told():
        return dom0.dom0("cat", log, check=True).stdout.count(b"the new settings are not used")

    before, engine, told_before = dom0.dom0("cat", path, check=True).stdout, dom0.dom0("cat", "/run/qvm-remote/engine.lock").stdout, told()
    client = _start_remote(dom0, "touch /tmp/under-old-settings; while [ ! -e /tmp/settings-go-on ]; do sleep 0.1; done; echo whole")
    _wait(lambda: dom0.dom0("test", "-e", "/tmp/under-old-settings").returncode == 0)
    dom0.put(path, "engines: [{\n")
    try:
        dom0.dom0("kill", "-HUP", engine.decode(), check=True)
        _wait(lambda: told() > told_before)
    finally:
        dom0.dom0("sh", "-c", f"cat > {path}", data=before, check=True)
        dom0.dom0("touch", "/tmp/settings-go-on", check=True)
    output, errors = client.communicate(timeout=60)
    assert (client.returncode, output, errors) == (0, b"whole\n", b"")
    assert dom0.dom0("cat", "/run/qvm-remote/engine.lock").stdout == engine
    assert dom0.remote("hostname").stdout == b"dom0\n"


def test_a_command_interrupted_by_a_killed_engine_is_reported_and_never_run_again(dom0):
    marker = "/tmp/killed-engine"
    client = _start_remote(dom0, f"echo x >> {marker}; sleep 7654332")
    _wait(lambda: dom0.dom0("test", "-s", marker).returncode == 0)
    dom0.kill_engine()
    _wait(lambda: not _runs(dom0, "sleep 7654332"))
    dom0.start_engine()
    _, errors = client.communicate(timeout=60)
    assert client.returncode == 125
    assert b"interrupted" in errors
    assert dom0.dom0("cat", marker).stdout == b"x\n"


def test_run_once_is_refused_while_an_engine_is_at_work(dom0):
    code, answer = dom0.call("qvm_remote.run_once")
    assert code != 0
    assert "another qvm-remote engine" in answer
    assert dom0.remote("hostname").stdout == b"dom0\n"


def test_a_second_engine_waits_and_nothing_runs_twice(dom0):
    folder, log = f"{dom0.folder}/second", f"{dom0.folder}/second/var/log/salt/minion"
    config = salt.utils.yaml.safe_load(dom0.dom0("cat", dom0.factory.config["conf_file"], check=True).stdout)
    config.update(root_dir=folder, log_file=log, log_level_logfile="warning")
    dom0.put(f"{folder}/minion", json.dumps(config))
    dom0.dom0("salt-call", "--local", "-c", folder, "saltutil.sync_all", check=True)
    dom0.dom0("mkdir", "-p", f"{folder}/var/log/salt", check=True)
    second = dom0.popen_dom0("salt-minion", "-c", folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(lambda: b"another qvm-remote engine" in dom0.dom0("cat", log).stdout, 60)
        for number in range(5):
            assert dom0.remote("-n", f"echo {number} >> /tmp/second-engine").returncode == 0
        assert dom0.dom0("cat", "/tmp/second-engine").stdout == b"0\n1\n2\n3\n4\n"
    finally:
        # How a minion ends is Salt's matter: told to by a signal, it now and then waits for ever for an engine that has ended.
        dom0.dom0("pkill", "-KILL", "-f", folder)
        second.wait(20)


def test_run_once_serves_what_waits_when_no_engine_runs(dom0):
    dom0.stop_engine()
    client = _start_remote(dom0, "hostname; exit 5")
    _wait(lambda: dom0.vm("work", "sh", "-c", "ls ~/.qvm-remote/queue/pending | grep -c .").stdout == b"2\n")
    code, answer = dom0.call("qvm_remote.run_once")
    assert (code, answer) == (0, {"work": "served", "dev": "served"})
    assert client.communicate(timeout=30)[0] == b"dom0\n"
    assert client.returncode == 5
    dom0.start_engine()


def test_without_a_session_the_client_takes_its_request_back_and_says_so(dom0):
    dom0.stop_engine()
    done = dom0.remote("-n", "touch /tmp/must-not-run", timeout=90)
    assert done.returncode == 125
    assert b"taken back and does not run any more" in done.stderr
    dom0.start_engine()
    assert dom0.remote("hostname").stdout == b"dom0\n"
    assert dom0.dom0("test", "-e", "/tmp/must-not-run").returncode == 1


def test_a_vm_without_the_agent_is_served_all_the_same(dom0):
    # As with a template that has no client: nothing named qvm-remote is in the PATH of qvm-run's shell.
    dom0.vm("work", "mv", "/usr/bin/qvm-remote", "/usr/lib/qvm-remote/launcher", user="root", check=True)
    dom0.stop_engine()
    dom0.factory.start()
    program = "/usr/bin/python3", "-IS", "/usr/lib/qvm-remote/launcher"
    try:
        # A client waits for half a minute, and a minion may take that long to start.
        _wait(lambda: dom0.call("qvm_remote.status")[1]["sessions"].get("work") == "agentless", 60)
        done = dom0.vm("work", *program, "cat; echo err >&2; exit 6", data=bytes(range(256)) * 2000)
        assert (done.returncode, done.stdout, done.stderr) == (6, bytes(range(256)) * 2000, b"err\n")
        many = "for i in $(seq 8); do (out=$(/usr/bin/python3 -IS /usr/lib/qvm-remote/launcher -n \"echo $i\"); echo $i $out) & done; wait"
        assert sorted(dom0.vm("work", "bash", "-c", many).stdout.splitlines()) == [f"{i} {i}".encode() for i in range(1, 9)]
    finally:
        dom0.vm("work", "mv", "/usr/lib/qvm-remote/launcher", "/usr/bin/qvm-remote", user="root", check=True)
        dom0.stop_engine()


def test_status_shows_engine_sessions_and_fingerprints_never_keys(dom0):
    _wait(lambda: dom0.call("qvm_remote.status")[1]["sessions"].get("work") == "agent")
    code, answer = dom0.call("qvm_remote.status")
    assert code == 0
    assert answer["engine"] == "running"
    shown = dom0.vm("work", "qvm-remote", "key", "fingerprint").stdout.decode().split()
    assert answer["keys"]["work"] == {"fingerprint": shown[1], "in_vm": "fits", "access": "may run anything in dom0, as root (policy: full)"}
    secret = dom0.vm("work", "qvm-remote", "key", "show", "--secret").stdout.decode().strip()
    assert secret not in str(answer)
    found = dom0.dom0("grep", "-rlF", "-D", "skip", secret, "/var", "/run", "/srv/pillar", "/etc/salt", dom0.folder)
    assert found.stdout == b""


def test_ping_from_dom0_measures_a_session(dom0):
    code, answer = dom0.call("qvm_remote.ping", "work")
    assert code == 0
    assert answer["vm"] == "work"
    assert answer["milliseconds"] >= 0
