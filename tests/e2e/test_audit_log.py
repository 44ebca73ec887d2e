# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's audit log through the engine and salt-call: what is in it, that it is whole, and that nothing runs without it."""

import hashlib
import json
import os
import shutil
import time

LOG = "/var/log/qvm-remote/audit.log"


def _verify(dom0):
    folder = os.path.dirname(dom0.factory.config["conf_file"])
    done = dom0.dom0("salt-call", "--local", "--retcode-passthrough", "-c", folder, "--out=json", "qvm_remote.audit_verify")
    return done.returncode, json.loads(done.stdout)["local"]


def test_a_command_leaves_its_lines_and_the_log_is_whole(dom0):
    # Other tests in this dom0 may have left some.
    before = _verify(dom0)[1]["commands"]
    command = "printf hello; exit 3 # " + "x" * 3000
    assert dom0.remote(command).returncode == 3
    (row,) = dom0.call("qvm_remote.history", "work", "limit=1")[1]
    assert (row["outcome"], row["exit"], row["out"], row["err"], row["by"]) == ("done", 3, 5, 0, "full")
    assert (row["size"], row["sha256"]) == (len(command), hashlib.sha256(command.encode()).hexdigest())
    assert dom0.dom0("cat", f"{LOG}.commands/work/{row['id']}").stdout == command.encode()
    assert dom0.dom0("stat", "-c", "%a", LOG, f"{LOG}.head", f"{LOG}.commands/work/{row['id']}").stdout.split() == [b"600"] * 3
    lines = dom0.call("qvm_remote.audit", "vm=work", "since=10m")[1]
    assert [line["what"] for line in lines if line["id"] == row["id"]][:3] == ["accepted", "run", "ended"]
    code, found = _verify(dom0)
    assert (code, found["problems"], found["commands"]) == (0, [], before + 1)


def test_lines_of_engine_and_salt_call_make_one_chain_across_rotation(dom0):
    assert dom0.remote("true").returncode == 0
    assert dom0.call("qvm_remote.rotate", "work")[0] == 0
    dom0.dom0("mkdir", "-p", "/etc/logrotate.d", check=True)
    assert dom0.call("state.single", "qvm_remote.audit_rotated", "name=x")[0] == 0
    config, state = "/etc/logrotate.d/qvm-remote", "/var/lib/logrotate.status"
    if shutil.which("logrotate", path="/usr/sbin:/usr/bin"):
        dom0.dom0("logrotate", "--force", "--state", state, config, check=True)
    else:
        dom0.dom0("mv", LOG, f"{LOG}.1", check=True)
    assert dom0.remote("true").returncode == 0
    assert dom0.call("qvm_remote.rotate", "work")[0] == 0
    code, found = _verify(dom0)
    assert (code, found["problems"], found["files"]) == (0, [], ["audit.log.1", "audit.log"])


def _wait_delivered(dom0, command):
    """Wait until nothing more is written of a command: that is a moment after its client has the result."""
    deadline = time.monotonic() + 60
    while True:
        lines = [json.loads(line) for line in dom0.dom0("cat", LOG).stdout.splitlines()]
        (cid,) = (line["id"] for line in lines if line.get("command") == command)
        if ("delivered", cid) in [(line["what"], line["id"]) for line in lines]:
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_changed_line_is_found_and_the_exit_code_says_so(dom0):
    before = dom0.dom0("cat", LOG).stdout
    assert dom0.remote("echo something").returncode == 0
    # sed takes away what is written while it works.
    _wait_delivered(dom0, "echo something")
    dom0.dom0("sed", "-i", "s/echo something/echo nothing!!/", LOG, check=True)
    code, found = _verify(dom0)
    assert (code, len(found["problems"])) == (1, 1)
    assert "was changed" in found["problems"][0]
    dom0.dom0("sed", "-i", "s/echo nothing!!/echo something/", LOG, check=True)
    assert _verify(dom0)[1]["problems"] == []
    assert dom0.dom0("cat", LOG).stdout.startswith(before)


def test_nothing_runs_that_cant_be_logged(dom0):
    # What was delivered a moment ago may be recorded in between, and makes the file anew.
    dom0.dom0("sh", "-c", f"until mkdir {LOG} 2>/dev/null; do mv {LOG} {LOG}.1; done", check=True)
    try:
        done = dom0.remote("touch /tmp/ran-without-a-line")
        assert done.returncode == 125
        assert b"audit log" in done.stderr
        assert dom0.dom0("test", "-e", "/tmp/ran-without-a-line").returncode == 1
    finally:
        dom0.dom0("rmdir", LOG, check=True)
    assert dom0.remote("true").returncode == 0
