# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's own commands where dom0 has a part in them, and what it says when dom0, its home or its rights are not as they should be."""

import json
import re
import signal
import subprocess
import time

import pytest

#: All that is loaded for a command that goes to dom0 and ends at once.
_LOADED = {
    *("main", "request", "part", "journal"),
    *("pullrpc", "pullrpc.digests", "pullrpc.errors", "pullrpc.files", "pullrpc.ids", "pullrpc.layout", "pullrpc.tokens"),
}


@pytest.fixture(scope="module")
def vm(stand):
    """A VM with the client that dom0 knows nothing of; gives a function that runs a line of shell there."""
    stand.create("stranger")
    stand.start("stranger")
    yield lambda line, user="user": stand.vm("stranger", "sh", "-c", line, user=user)
    stand.shutdown("stranger")


@pytest.fixture(scope="module", autouse=True)
def _empty_queue(stand):
    """What other tests left in the queue of the VM is none of these, nor that dom0 looked into it without the agent."""
    stand.vm("work", "sh", "-c", "cd ~/.qvm-remote/queue && find pending running results rejected -mindepth 1 -delete; rm -rf ~/.qvm-remote/dom0-seen")


def _wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def _start(dom0, *words):
    return dom0.popen_vm("work", "qvm-remote", "-n", *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _fails(done, *texts):
    """What a command that failed should look like: one line, 125, and what it says."""
    text = done.stderr.decode()
    assert (done.returncode, done.stdout, text.count("\n")) == (125, b"", 1)
    for one in texts:
        assert one in text
    assert text.startswith("qvm-remote: error: ")


def test_a_quick_command_loads_only_what_it_needs(dom0):
    # The first one of a day looks whether something of the history is old.
    assert dom0.remote("-n", "true").returncode == 0
    done = dom0.vm("work", "/usr/bin/python3", "-IS", "-X", "importtime", "/usr/bin/qvm-remote", "-n", "true")
    assert done.returncode == 0
    names = {line.split("|")[-1].strip() for line in done.stderr.decode().splitlines()}
    ours = {name.replace("qvm_remote_client.", "") for name in names if name.startswith(("qvm_remote_client.", "pullrpc"))}
    # On a busy machine the wait may be long enough to look whether dom0 is connected.
    assert ours - {"progress"} == _LOADED
    assert not names & {"json", "argparse", "re", "subprocess", "pwd", "hashlib", "signal", "enum", "shutil"}


def test_ping_says_what_dom0_says_of_itself(dom0):
    done = dom0.remote("ping")
    fingerprint = dom0.remote("key", "fingerprint").stdout.split()[-1].decode()
    assert (done.returncode, done.stderr) == (0, b"")
    version = dom0.remote("--version").stdout.decode().split()[-1]
    assert re.fullmatch(
        rf"dom0 answered in \d+ ms\nversion:  dom0 {version}, this qube {version}\nkey:      {fingerprint}, the one that dom0 has\n"
        r"clock:    the same as dom0's, within \d\.\d s\n",
        done.stdout.decode(),
    )
    found = json.loads(dom0.remote("ping", "--json").stdout)
    assert found["version"] == {"dom0": version, "qube": version}
    assert found["key"] == fingerprint
    assert abs(found["clock_ahead_seconds"]) < 60
    # A ping is no command of anybody's.
    assert dom0.remote("history", "1", "--json").stdout.count(b'"ping"') == 0
    assert dom0.vm("work", "ls", ".qvm-remote/queue/results").stdout == b""


def test_a_key_that_dom0_does_not_have_is_said_by_ping(dom0):
    dom0.vm("work", "cp", ".qvm-remote/auth.key", "/home/user/key", check=True)
    try:
        dom0.remote("key", "gen", "--force")
        _fails(dom0.remote("ping"), "the token does not fit: wrong key", "in dom0: sudo qubesctl qvm_remote.hand_over work, which puts dom0's key here; or, ")
    finally:
        dom0.vm("work", "mv", "/home/user/key", ".qvm-remote/auth.key", check=True)
    assert dom0.remote("ping").returncode == 0


def test_status_and_history_tell_of_the_last_command(dom0):
    assert dom0.remote("-n", "echo told; echo warned >&2; exit 4").returncode == 4
    done = dom0.remote("status")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    assert "qube:     work\n" in text
    assert "dom0:     connected\nwaiting:  0\nrunning:  0\nresults:  0 not fetched\n" in text
    assert "exit code 4: echo told; echo warned >&2; exit 4\n" in text
    assert "problem" not in text
    found = json.loads(dom0.remote("status", "--json").stdout)
    assert (found["connected"], found["problem"], found["last"]["exit"]) == (True, None, 4)
    shown = json.loads(dom0.remote("history", "show", "--json").stdout)
    assert (shown["proof"], shown["exit"], shown["stdout"], shown["stderr"]) == ("fits", 4, "told\n", "warned\n")


@pytest.mark.parametrize("word", ["log", "cancel"])
def test_reserved_words_are_commands_of_dom0_after_two_dashes(dom0, word):
    program = f"/usr/local/bin/{word}"
    dom0.put(program, "#!/bin/sh\necho dom0 has its own: $0 $*\n")
    dom0.dom0("chmod", "0755", program, check=True)
    try:
        done = dom0.remote("-n", "--", f"PATH=/usr/local/bin; {word}", "5")
        assert done.stdout.decode() == f"dom0 has its own: {program} 5\n"
        dom0.remote("-n", "--", word, "5")
        assert json.loads(dom0.remote("history", "1", "--json").stdout)[0]["command"] == f"{word} 5"
    finally:
        dom0.dom0("rm", program, check=True)


def test_a_running_command_is_cancelled_from_elsewhere(dom0):
    client = _start(dom0, "echo begun; exec -a cancelled-sleep sleep 300")
    assert client.stdout.readline() == b"begun\n"
    (one,) = json.loads(dom0.remote("queue", "status", "--json").stdout)
    assert (one["state"], one["client"]) == ("running", True)
    # What is waited for is not put away.
    assert dom0.remote("queue", "clean").stdout == b"nothing was left\n"
    done = dom0.remote("cancel", one["id"][-8:])
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"{one['id']} is cancelled\n", b"")
    out, err = client.communicate(timeout=30)
    assert (client.returncode, out) == (125, b"")
    assert err == (
        b"qvm-remote: error: the request is gone from the queue: it was cancelled (qvm-remote cancel), or the queue was emptied; there will be no result\n"
    )
    _wait(lambda: dom0.dom0("pgrep", "-f", "cancelled-sleep").returncode == 1)
    assert json.loads(dom0.remote("queue", "status", "--json").stdout) == []


def test_what_a_killed_client_left_is_put_away(dom0):
    client = _start(dom0, "exec -a forgotten-sleep sleep 300")
    _wait(lambda: dom0.dom0("pgrep", "-f", "forgotten-sleep").returncode == 0)
    dom0.vm("work", "pkill", "-KILL", "-f", "forgotten-sleep", user="root", check=True)
    client.communicate(timeout=30)
    assert b"its client is gone" in dom0.remote("queue").stdout
    assert dom0.remote("queue", "clean").stdout.startswith(b"1 taken back or cancelled, 0 results")
    _wait(lambda: dom0.dom0("pgrep", "-f", "forgotten-sleep").returncode == 1)
    _wait(lambda: dom0.vm("work", "sh", "-c", "ls -A .qvm-remote/queue/*/").stdout.count(b"2") == 0)


def test_a_result_that_could_not_be_written_out_is_not_lost(dom0):
    done = dom0.vm("work", "sh", "-c", "qvm-remote -n hostname > /dev/full")
    text = done.stderr.decode()
    cid = re.search(r"history show (\S+)", text)[1]
    assert done.returncode == 125
    assert text == (
        f"qvm-remote: error: can't write all of the output; it is kept, see: qvm-remote history show {cid} (No space left on device); "
        "the disk is full: free some space and try again\n"
    )
    assert dom0.remote("history", "show", "--out", cid).stdout == b"dom0\n"


def test_a_script_under_set_e_and_cron_has_the_exit_code_and_nothing_else(dom0):
    script = "set -e; qvm-remote -n true; x=$(qvm-remote -n hostname); echo got $x; qvm-remote -n false; echo not reached"
    # As cron does: no terminal, next to nothing in the environment.
    done = dom0.vm("work", "env", "-i", "PATH=/usr/bin:/bin", "setsid", "-w", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"got dom0\n", b"")


def test_without_dom0_ping_says_so_and_takes_its_request_back(dom0):
    dom0.stop_engine()
    _fails(dom0.remote("ping", "-t", "1"), "dom0 is not connected to this qube; in dom0: sudo qubesctl state.apply qvm-remote.dom0\n")
    done = dom0.remote("status")
    assert done.returncode == 1
    assert b"problem:  dom0 is not connected to this qube; in dom0: sudo qubesctl state.apply qvm-remote.dom0\n" in done.stdout
    assert dom0.vm("work", "sh", "-c", "ls .qvm-remote/queue/pending | grep -v cancel").stdout == b""
    dom0.start_engine()


def test_a_qube_that_dom0_never_looked_into_is_told_how_to_begin(vm):
    assert vm("qvm-remote key gen").returncode == 0
    _fails(
        vm("qvm-remote ping -t 1"),
        "dom0 has never looked into this qube; have it named in dom0's pillar (qvm-remote: vms: stranger: {}), then, in dom0: ",
        "sudo qubesctl state.apply qvm-remote\n",
    )
    assert vm("ls .qvm-remote/queue/pending | grep -v cancel; ls .qvm-remote/queue/results").stdout == b""


_OWNER = "run qvm-remote as the owner of that place, or have its owner give you the right"


def test_an_unwritable_home_is_said_and_what_only_reads_works(vm):
    vm("mkdir -p /home/locked && chown root: /home/locked && chmod 0755 /home/locked", user="root")
    for words in ("-n true", "ping", "key gen", "queue make"):
        _fails(vm(f"HOME=/home/locked qvm-remote {words}"), f"can't create the queue under /home/locked/.qvm-remote: Permission denied; {_OWNER}\n")
    for words in ("log", "history", "queue status", "queue debug", "--help"):
        assert vm(f"HOME=/home/locked qvm-remote {words}").stderr == b""
    assert b"problem:  this qube has no key" in vm("HOME=/home/locked qvm-remote status").stdout


def test_a_queue_without_permission_is_said_and_nothing_is_left_behind(vm):
    vm("HOME=/tmp/mine qvm-remote key gen && chmod 0500 /tmp/mine/.qvm-remote/queue/results")
    # Ours again at the next start: it is this user's own folder.
    assert vm("HOME=/tmp/mine qvm-remote queue make; stat -c %a /tmp/mine/.qvm-remote/queue/results").stdout == b"700\n"
    assert vm("ls -A /tmp/mine/.qvm-remote/queue/*/ | grep -v :").stdout.strip() == b""
    vm("cp /tmp/mine/.qvm-remote/auth.key /root-key; chown root: /tmp/mine/.qvm-remote/auth.key", user="root")
    _fails(vm("HOME=/tmp/mine qvm-remote -n true"), "the key /tmp/mine/.qvm-remote/auth.key belongs to another user; run qvm-remote as its owner\n")
    vm("chown root: /tmp/mine/.qvm-remote/queue", user="root")
    _fails(vm("HOME=/tmp/mine qvm-remote -n true"), "/tmp/mine/.qvm-remote/queue belongs to another user; run qvm-remote as its owner\n")


def test_a_user_without_any_home_is_told_to_set_it(vm):
    done = vm("setpriv --reuid 54321 --clear-groups env -u HOME qvm-remote -n true", user="root")
    _fails(done, "user 54321 has no home folder for the queue; set HOME\n")


def test_a_signal_says_so_and_leaves_nothing(vm, stand):
    vm("HOME=/tmp/signal qvm-remote -q key gen")
    client = stand.popen_vm("stranger", "env", "HOME=/tmp/signal", "qvm-remote", "-n", "true", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # The request itself, which comes last.
    _wait(lambda: vm("ls /tmp/signal/.qvm-remote/queue/pending | grep -v auth").stdout)
    vm("pkill -INT -f '^/usr/bin/python3 .*qvm-remote -n true'")
    assert client.communicate(timeout=30)[1] == b"qvm-remote: interrupted; dom0 is asked to kill the command\n"
    assert client.returncode == 128 + signal.SIGINT
    assert vm("ls -A /tmp/signal/.qvm-remote/queue/pending | grep -v cancel").stdout == b""
