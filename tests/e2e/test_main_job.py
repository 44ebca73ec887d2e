# SPDX-License-Identifier: GPL-2.0-or-later
"""The main job through every real part: client, agent, qvm-run, engine in a salt-minion, sandbox, and back."""

import hashlib
import json
import os
import random
import re
import select
import subprocess
import sys
import time

import pytest


def test_a_command_runs_in_dom0_and_its_output_comes_back(dom0):
    done = dom0.remote("hostname")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"dom0\n", b"")


def test_stdout_and_stderr_stay_apart(dom0):
    done = dom0.remote("echo to-out; echo to-err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"to-out\n", b"to-err\n")


def test_every_exit_code_comes_back(dom0):
    done = dom0.vm("work", "bash", "-c", 'for i in $(seq 0 255); do qvm-remote -n "exit $i"; echo $?; done', timeout=300)
    assert done.stdout.split() == [str(code).encode() for code in range(256)]


@pytest.mark.parametrize("number", [1, 9, 11, 15])
def test_death_by_a_signal_is_reported_as_a_shell_does(dom0, number):
    assert dom0.remote(f"kill -{number} $$").returncode == 128 + number


def test_binary_output_of_10_mib_is_exact_on_both_streams(dom0):
    program = "import sys,random; b=random.Random(1).randbytes(10485760); sys.stdout.buffer.write(b); sys.stderr.buffer.write(b[::-1])"
    done = dom0.remote("-q", f"/usr/bin/python3 -c '{program}'")
    expected = random.Random(1).randbytes(10485760)
    assert done.returncode == 0
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(expected).digest()
    assert hashlib.sha256(done.stderr).digest() == hashlib.sha256(expected[::-1]).digest()


def test_output_over_the_limit_is_cut_and_said_so_outside_the_data(dom0):
    done = dom0.remote("head -c 12000000 /dev/zero")
    assert done.stdout == bytes(10485760)
    assert b"stdout was cut after 10485760 of 12000000 bytes" in done.stderr


def test_all_byte_values_pass_through_stdin_and_stdout(dom0):
    data = bytes(range(256)) * 40
    assert dom0.remote("cat", data=data).stdout == data


def test_16_mib_of_stdin_reach_the_command(dom0):
    data = bytes(range(251)) * ((16 << 20) // 251)
    done = dom0.remote("sha256sum", data=data)
    assert done.stdout.split()[0] == hashlib.sha256(data).hexdigest().encode()


def test_stdin_over_the_limit_is_refused_before_anything_is_sent(dom0):
    done = dom0.remote("cat", data=bytes((16 << 20) + 1))
    assert done.returncode == 125
    assert b"stdin is longer than" in done.stderr
    assert done.stdout == b""


def test_with_n_the_command_has_an_empty_stdin(dom0):
    assert dom0.remote("-n", "wc -c", data=b"not for the command").stdout.strip() == b"0"


def test_a_script_on_stdin_runs_in_dom0(dom0):
    done = dom0.remote(data=b"uname -n\nid -un\necho $#\nexit 4\n")
    assert (done.returncode, done.stdout) == (4, b"dom0\nroot\n0\n")


def test_s_gives_arguments_to_the_script(dom0):
    done = dom0.remote("-s", "one two", "three", data=b'printf "<%s>" "$@"\n')
    assert done.stdout == b"<one two><three>"


def test_words_are_joined_by_spaces_as_ssh_does(dom0):
    assert dom0.remote("echo", "a  b", "'c  d'").stdout == b"a b c  d\n"


@pytest.mark.parametrize("word", ["two words", "it's", 'say "hi"', "line\nbreak", "ünï ©ødé", "$HOME `id` $(id)", "*", "", "\\"])
def test_exec_passes_an_argument_exactly(dom0, word):
    assert dom0.remote("--exec", "printf", "<%s>", word).stdout == f"<{word}>".encode()


def test_a_line_with_newlines_and_utf8_is_read_by_dom0s_shell_as_it_is(dom0):
    assert dom0.remote("echo 'é\nü'").stdout == "é\nü\n".encode()


def test_a_word_that_is_a_subcommand_is_reachable_behind_two_dashes(dom0):
    done = dom0.remote("--", "status")
    assert done.returncode == 127
    assert b"status" in done.stderr


def test_a_timeout_ends_every_descendant_and_keeps_what_was_written(dom0):
    done = dom0.remote("-t", "5", "echo before; (setsid sh -c 'setsid sleep 7654321 &' &); sleep 7654321")
    assert (done.returncode, done.stdout) == (124, b"before\n")
    assert b"timed out after 5 s" in done.stderr
    assert dom0.dom0("pgrep", "-f", "sleep 7654321").returncode == 1


def test_a_background_child_that_keeps_the_pipes_delays_nothing_and_is_ended(dom0):
    done = dom0.remote("-t", "30", "sleep 7654322 & echo started")
    assert (done.returncode, done.stdout) == (0, b"started\n")
    assert dom0.dom0("pgrep", "-f", "sleep 7654322").returncode == 1


def test_a_timeout_over_the_limit_is_refused_at_once_never_shortened(dom0):
    done = dom0.remote("-t", "301", "true")
    assert done.returncode == 125
    assert b"over the limit of 300 s" in done.stderr


def test_the_environment_is_exactly_the_documented_one(dom0):
    done = dom0.remote("--exec", "env")
    names = {line.partition(b"=")[0].decode() for line in done.stdout.splitlines()}
    assert names == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "TMPDIR", "QVM_REMOTE_VM", "QVM_REMOTE_ID"}
    assert b"QVM_REMOTE_VM=work\n" in done.stdout


def test_the_command_has_a_private_folder_that_goes_with_it(dom0):
    done = dom0.remote("-n", 'pwd; echo "$TMPDIR"; stat -c %a .; umask; touch x')
    folder, temporary, mode, umask = done.stdout.decode().split()
    assert folder == temporary
    assert folder.startswith("/run/qvm-remote/jobs/slot-") and "/work-" in folder
    assert (mode, umask) == ("700", "0077")
    # What is in it goes after the command, for which the result need not wait.
    _wait(lambda: dom0.dom0("find", "/run/qvm-remote/jobs", "-name", f"{os.path.basename(folder)}*").stdout == b"")


def test_forty_clients_of_one_vm_all_get_their_own_results(dom0):
    script = 'for i in $(seq 40); do (out=$(qvm-remote -n "sleep 0.2; echo $i"); echo "$i $out $?") & done; wait'
    done = dom0.vm("work", "bash", "-c", script, timeout=120)
    assert sorted(done.stdout.splitlines()) == sorted(f"{i} {i} 0".encode() for i in range(1, 41))


def test_two_vms_are_served_side_by_side(dom0):
    # Each waits for the other: they can only end if they run at the same time.
    program = "-n", "-t", "60", "echo $QVM_REMOTE_VM; touch /tmp/met-$QVM_REMOTE_VM; until [ -e /tmp/met-work ] && [ -e /tmp/met-dev ]; do sleep 0.1; done"
    both = [dom0.popen_vm(vm, "qvm-remote", *program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for vm in ("work", "dev")]
    outputs = [one.communicate(timeout=90)[0] for one in both]
    assert outputs == [b"work\n", b"dev\n"]
    assert [one.returncode for one in both] == [0, 0]


def test_an_interrupted_client_kills_its_command_in_dom0(dom0):
    client = dom0.popen_vm("work", "qvm-remote", "-n", "sleep 7654323", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _wait(lambda: dom0.dom0("pgrep", "-f", "sleep 7654323").returncode == 0)
    client.terminate()
    client.communicate(timeout=30)
    _wait(lambda: dom0.dom0("pgrep", "-f", "sleep 7654323").returncode == 1)


def test_ping_needs_the_key_and_runs_nothing(dom0):
    done = dom0.remote("ping")
    assert done.returncode == 0
    assert done.stdout.startswith(b"dom0 answered in ")


def test_events_tell_of_a_command_and_never_of_its_output(dom0):
    listener = """
import json, sys, salt.config, salt.utils.event, time
opts = salt.config.minion_config(sys.argv[1])
bus = salt.utils.event.get_event("minion", opts=opts, listen=True)
# The bus takes a listener in when it comes to that.
while not bus.get_event(wait=1, tag="qvm-remote/"):
    continue
print("listening", flush=True)
def last():
    try:
        with open(sys.argv[2]) as file:
            return file.read()
    except FileNotFoundError:
        return None
end, seen = time.monotonic() + 60, []
while time.monotonic() < end and last() not in [tag for tag, _ in seen]:
    event = bus.get_event(wait=1, tag="qvm-remote/", full=True)
    if event:
        seen.append((event["tag"], json.dumps(event["data"])))
print(json.dumps(seen))
"""
    script, last = f"{dom0.folder}/listen.py", f"{dom0.folder}/last-event"
    dom0.put(script, listener)
    watcher = dom0.popen_dom0(sys.executable, script, dom0.factory.config["conf_file"], last, stdout=subprocess.PIPE)
    end = time.monotonic() + 60
    while not select.select([watcher.stdout], [], [], 1)[0]:
        assert dom0.remote("ping").returncode == 0
        assert time.monotonic() < end, "no event is heard"
    assert watcher.stdout.readline() == b"listening\n"
    done = dom0.remote("-v", "-n", "echo very-$((1))-secret")
    assert done.returncode == 0
    cid = re.search(r"sent (\S+)", done.stderr.decode())[1]
    # Those of others, which ended before, may come as late.
    dom0.put(last, f"qvm-remote/work/{cid}/delivered")
    seen = json.loads(watcher.communicate(timeout=90)[0])
    words = [tag.split("/") for tag, _ in seen]
    assert [word[3] for word in words if word[1:3] == ["work", cid]] == ["accepted", "running", "done", "delivered"]
    assert "very-1-secret" not in json.dumps(seen)


def _wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
