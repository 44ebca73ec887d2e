# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0 from nothing, as a user has it: install-dom0.sh brings the formula from a qube, and qvm-remote-dom0 manages it then.

One machine for all of it; the tests are steps of that story and run in their order.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import secrets
import subprocess
import tarfile
import time

import pytest
from qubes_sim.stand import FORMULA, ROOT, Stand
from terminals import Terminal

_PARTS = ("_engines", "_modules", "_states", "_utils", "client", "dom0", "qvm-remote-formula")
_FILES = ("FORMULA", "LICENSE", "README.rst", "pillar.example", "install-dom0.sh")
_COMMAND = "qvm-remote-dom0"


class Machine(Stand):
    """A machine that is set up by hand."""

    def install(self, *words, data=b"", **options):
        """Run install-dom0.sh without a terminal."""
        return self.dom0("sh", "/root/install-dom0.sh", *words, data=data, timeout=180, **options)

    def command_line(self, *words, data=b"", check=False):
        """Run qvm-remote-dom0 without a terminal."""
        return self.dom0(_COMMAND, *words, data=data, timeout=120, check=check)

    def terminal(self, *words):
        """Run a command in dom0 on a terminal."""
        return Terminal(self.command("dom0", "--", *words))

    def put_in_vm(self, path, data, vm="work"):
        """Write a file in a qube."""
        self.vm(vm, "sh", "-c", 'rm -f "$1"; cat > "$1"', "sh", path, data=data, check=True)

    def traces(self):
        """What of dom0's is not there before an installation."""
        found = self.dom0("find", "/srv", "/etc/salt", "/etc/qubes", "/usr/bin", "/usr/lib", "/tmp", "-newer", "/root/begun", "!", "-type", "d")
        # The simulator's own programs leave their bytecode.
        return [path for path in found.stdout.decode().split() if not path.startswith("/usr/lib/qubes/simulated/")]

    def leftovers(self):
        """What an installation had while it was at work."""
        return self.dom0("sh", "-c", "ls -d /srv/formulas/base/.qvm-remote* /tmp/tmp.* 2>/dev/null").stdout.decode().split()


@contextlib.contextmanager
def _endless(process):
    """A process that is ended with the block, whatever happens in there."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def _until(check, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.1)
    return False


def _tree():
    """The source tree as a tar archive, without what a package has not."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in (*_PARTS, *_FILES):
            archive.add(os.path.join(ROOT, name), name, filter=lambda entry: None if "__pycache__" in entry.name else entry)
    return buffer.getvalue()


def _evil(*entries):
    """An archive that has all that is needed, and something else."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("_modules/qvm_remote.py", "_utils/pullrpc/__init__.py", "qvm-remote-formula/qvm-remote/init.sls"):
            archive.addfile(tarfile.TarInfo(name))
        for name, kind, target in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
    return buffer.getvalue()


def _sparse():
    """A small archive that unpacks to a large file."""
    header = bytearray(tarfile.TarInfo("client/large").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    # One piece of nothing at its end (offset, size), and its size when it is unpacked.
    header[386:410] = b"%011o\0%011o\0" % (1 << 30, 0)
    header[483:495] = b"%011o\0" % (1 << 30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return _evil()[: 3 * 512] + bytes(header) + bytes(10240)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """dom0 with Salt that never heard of qvm-remote; a qube with the source tree, others without anything."""
    with Machine(os.path.join(str(tmp_path_factory.mktemp("install")), "sim"), vms=["work"], warm=True) as one:
        one.prepare_bare(["debian-13"])
        one.create("work:debian-13", "dev:debian-13", "spare:debian-13")
        one.start("work", "dev")
        one.vm("work", "sh", "-c", "mkdir qvm-remote-formula && tar -x -C qvm-remote-formula", data=_tree(), check=True)
        one.dom0("touch", "/root/begun", check=True)
        # The line that README gives.
        one.dom0("sh", "-c", "qvm-run --pass-io work 'cat qvm-remote-formula/install-dom0.sh' > /root/install-dom0.sh", check=True)
        yield one


def test_nothing_is_installed_unless_somebody_says_yes_to_the_digest(machine):
    shown = machine.terminal("sh", "/root/install-dom0.sh", "work")
    shown.until("Is it the one that you expect? Type yes: ")
    shown.type("y\n")
    assert shown.end() == 1
    assert "not accepted; nothing was changed" in shown.shown
    # Whoever doubts it can compute it elsewhere, by the command that is shown.
    shown_command = re.search(r"^ +(\(cd .*sha256sum)\r$", shown.shown, re.MULTILINE)[1]
    elsewhere = machine.vm("work", "sh", "-c", shown_command, check=True).stdout.split()[0].decode()
    assert f"  {elsewhere}\r\n" in shown.shown
    for words, line in ([], "nobody is there to be asked"), (["--digest", "0" * 64], "this is not what --digest says"):
        done = machine.install(*words, "work")
        assert done.returncode == 1
        assert line in done.stderr.decode()
    assert machine.traces() == []


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("parent", _evil(("client/../../../etc/evil", tarfile.REGTYPE, "")), "a name in it that qvm-remote has not: client/../../../etc/evil"),
        ("absolute", _evil(("/etc/evil", tarfile.REGTYPE, "")), "a name in it that qvm-remote has not: /etc/evil"),
        ("compiled", _evil(("_modules/__pycache__/test.py", tarfile.REGTYPE, "")), "there is compiled code in it, which qvm-remote has not: _modules/__pycache__"),
        ("extension", _evil(("_utils/pullrpc/policy.abi3.so", tarfile.REGTYPE, "")), "there is compiled code in it, which qvm-remote has not: _utils/"),
        ("hidden", _evil(("client/.bashrc", tarfile.REGTYPE, "")), "a name in it that qvm-remote has not"),
        ("elsewhere", _evil(("etc/evil", tarfile.REGTYPE, "")), "a name in it that qvm-remote has not"),
        ("escapes", _evil(("client/\033]0;evil\007", tarfile.REGTYPE, "")), "a name in it that qvm-remote has not: client/\\033]0;evil\\a"),
        ("symlink", _evil(("client/link", tarfile.SYMTYPE, "/etc")), "a link or a device"),
        ("hardlink", _evil(("client/link", tarfile.LNKTYPE, "/etc/passwd")), "a link or a device"),
        ("device", _evil(("client/disk", tarfile.BLKTYPE, "")), "a link or a device"),
        ("twice", _evil(*[("client/main.py", tarfile.REGTYPE, "")] * 2), "a name twice"),
        ("bomb", _sparse(), "there is too much in it"),
        ("many", _evil(*[(f"client/f{at}", tarfile.REGTYPE, "") for at in range(2001)]), "more than 2000 files"),
        ("packed", gzip.compress(bytes(1 << 22)), "no tar archive, or a compressed one"),
        ("other", b"#!/bin/sh\nreboot\n" * 100, "no tar archive"),
        ("lacking", _evil()[:512] + bytes(10240), "it has no _utils/pullrpc/__init__.py"),
    ],
)
def test_an_archive_that_could_do_harm_is_not_unpacked_though_its_digest_was_accepted(machine, name, data, line):
    machine.put_in_vm("evil.tar", data)
    done = machine.install("--digest", hashlib.sha256(data).hexdigest().upper(), "work", "evil.tar")
    assert done.returncode == 1
    assert line in done.stderr.decode()
    assert b"\033" not in done.stdout + done.stderr
    assert machine.traces() == []


def test_what_never_ends_or_is_not_there_is_thrown_away_unread(machine):
    machine.vm("work", "ln", "-sf", "/dev/zero", "endless.tar", check=True)
    endless = machine.install("work", "endless.tar")
    assert (endless.returncode, "sent more than 16777216 bytes" in endless.stderr.decode()) == (1, True)
    machine.vm("work", "mkfifo", "silent.tar", check=True)
    silent = machine.terminal("sh", "/root/install-dom0.sh", "work", "silent.tar")
    silent.until("Fetching silent.tar")
    assert _until(lambda: machine.dom0("pgrep", "-f", "qvm-run.*silent").returncode == 0)
    silent.type("\x03")
    assert silent.end() == 130
    assert _until(lambda: machine.dom0("pgrep", "-f", "qvm-run.*silent").returncode == 1)
    missing = machine.install("work", "missing")
    assert (missing.returncode, "could not send missing" in missing.stderr.decode()) == (1, True)
    halted = machine.install("spare")
    assert (halted.returncode, "spare does not run" in halted.stderr.decode()) == (1, True)
    assert machine.traces() == []


def test_with_two_yeses_it_is_installed_and_applied_for_that_qube(machine):
    shown = machine.terminal("sh", "/root/install-dom0.sh", "work")
    shown.until("Is it the one that you expect? Type yes: ")
    shown.type("yes\n")
    shown.until("files in /srv/formulas/base/qvm-remote-formula? Type yes: ")
    with open(os.path.join(ROOT, "_modules", "qvm_remote.py"), "rb") as file:
        assert f"{hashlib.sha256(file.read()).hexdigest()}  _modules/qvm_remote.py\r\n" in shown.shown
    assert machine.dom0("ls", FORMULA).returncode != 0
    shown.type("yes\n")
    assert shown.end() == 0, shown.shown
    assert "Done." in shown.shown
    assert machine.dom0("find", FORMULA, "!", "-user", "root", "-o", "-perm", "/022").stdout == b""
    assert machine.leftovers() == []
    # The client came into its template after it had started.
    machine.shutdown("work")
    machine.start("work")
    machine.wait_served("work")
    assert machine.vm("work", "qvm-remote", "hostname").stdout == b"dom0\n"


def test_another_run_upgrades_the_files_and_says_what_pillar_lacks(machine):
    tree = _tree()
    changes = "mkdir new && tar -x -C new && echo 'newer' >> new/README.rst && rm new/qvm-remote-formula/qvm-remote/rotate.sls"
    machine.vm("dev", "sh", "-c", changes, data=tree, check=True)
    digest = re.search(rb"^  ([0-9a-f]{64})$", machine.install("dev", "new").stdout, re.MULTILINE)[1].decode()
    done = machine.install("--digest", digest, "dev", "new")
    assert done.returncode == 1
    assert "pillar does not name dev: write under qvm-remote: vms: dev: {}" in done.stderr.decode()
    assert machine.dom0("tail", "-n", "1", f"{FORMULA}/README.rst").stdout == b"newer\n"
    assert machine.dom0("ls", f"{FORMULA}/qvm-remote-formula/qvm-remote/rotate.sls").returncode != 0
    assert machine.leftovers() == []


@pytest.mark.long
def test_the_same_once_more_changes_no_file(machine):
    digest = re.search(rb"^  ([0-9a-f]{64})$", machine.install("dev", "new").stdout, re.MULTILINE)[1].decode()
    before = machine.dom0("stat", "-c", "%i", FORMULA).stdout
    done = machine.install("--digest", digest, "work", "qvm-remote-formula")
    assert (done.returncode, machine.dom0("stat", "-c", "%i", FORMULA).stdout) == (1, before)
    done = machine.install("--digest", digest, "dev", "new")
    assert b"The same files are installed" in done.stdout
    assert machine.dom0("stat", "-c", "%i", FORMULA).stdout == before


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["status", "--watch"], 2, "--watch draws on a terminal"),
        (["explain", "work"], 2, "say which command"),
        (["history", "--since", "soon"], 2, "a time looks like"),
        (["history", "a b"], 2, "not a VM's name"),
        (["revoke", "../x"], 2, "not a VM's name"),
        (["--config-dir", "/nowhere", "status"], 1, "not set up here"),
        (["enable"], 1, "nobody is there to be asked"),
    ],
)
def test_a_mistake_is_one_line(machine, words, code, line):
    done = machine.command_line(*words)
    assert (done.returncode, done.stdout) == (code, b"")
    assert line in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


def test_no_key_is_taken_from_the_command_line_and_none_is_shown(machine):
    key = secrets.token_hex(32)
    done = machine.command_line("authorize", "spare", key)
    assert (done.returncode, done.stdout, key in done.stderr.decode()) == (2, b"", False)
    assert "give it on stdin" in done.stderr.decode()
    shown = machine.terminal(_COMMAND, "authorize", "spare")
    shown.until("key of spare")
    shown.type(f"{key}\n")
    assert shown.end() == 0
    assert re.search(r"spare is authorized with key \S+; it may run nothing \(policy: none\)", shown.shown)
    assert key not in shown.shown
    listed = json.loads(machine.command_line("keys", "--json").stdout)
    assert listed["spare"]["fingerprint"] in shown.shown
    assert machine.dom0("cat", "/etc/qubes/remote.d/spare.key").stdout.decode().strip() == key
    bad = machine.command_line("authorize", "spare", data=b"rubbish\n")
    assert (bad.returncode, len(bad.stderr.splitlines()), b"64 hex" in bad.stderr) == (1, 1, True)


def test_status_history_and_explain_show_what_was_run(machine):
    sent = machine.vm("work", "qvm-remote", "true # \u202eevil")
    assert sent.returncode == 0
    # That a result was delivered is noted a moment later.
    assert _until(lambda: not json.loads(machine.command_line("status", "--json").stdout)["vms"]["work"]["open"])
    # And how it is served, after that.
    assert _until(lambda: json.loads(machine.command_line("status", "--json").stdout)["vms"]["work"]["session"] == "agent")
    one = json.loads(machine.command_line("status", "--json").stdout)["vms"]["work"]
    assert (one["session"], one["policy"], one["last"]["command"]) == ("agent", "full", "true # \\u202eevil")
    assert one["ran"] >= 2
    assert 0 <= one["p50"] <= one["p99"]
    assert abs(one["since"] - time.time()) < 600
    for words in (["status"], ["history", "work", "-n", "1"]):
        shown = machine.command_line(*words).stdout.decode()
        assert "true # \\u202eevil" in shown
        assert "\u202e" not in shown
    # It has no end.
    with _endless(machine.popen_dom0(_COMMAND, "tail", "-n", "30", stdout=subprocess.PIPE)) as tail:
        shown = ""
        while "true # \\u202eevil" not in shown:
            shown = tail.stdout.readline().decode()
            assert shown
            assert "\u202e" not in shown
    assert machine.command_line("explain", "work", "ls", "-l", "|", "cat").returncode == 0
    # It has a key, and pillar does not name it.
    refused = machine.command_line("explain", "spare", "--", "ls")
    assert (refused.returncode, refused.stdout) == (1, b"refused: its policy is none: it may run nothing\n")


def test_tail_follows_the_log_through_its_rotation(machine):
    with _endless(machine.popen_dom0(_COMMAND, "tail", "-n", "1", "--json", "work", stdout=subprocess.PIPE)) as tail:
        assert json.loads(tail.stdout.readline())["vm"] == "work"
        for rotate in (False, True):
            if rotate:
                machine.dom0("mv", "/var/log/qvm-remote/audit.log", "/var/log/qvm-remote/audit.log.1", check=True)
            assert machine.vm("work", "qvm-remote", "exit 7").returncode == 7
            whats = []
            while whats[-1:] != ["delivered"]:
                line = json.loads(tail.stdout.readline())
                whats.append(line["what"])
                assert line.get("exit", 7) == 7
            assert whats == ["accepted", "run", "ended", "delivered"]


def test_the_live_table_is_kept_up_to_date_until_it_is_interrupted(machine):
    table = machine.terminal(_COMMAND, "status", "--watch")
    table.until("LAST COMMAND")
    machine.vm("work", "qvm-remote", "echo seen", check=True)
    table.until("done: echo seen")
    table.type("\x03")
    assert table.end() == 130
    assert "Traceback" not in table.shown


def test_doctor_finds_what_is_wrong_and_says_what_to_type(machine):
    def findings(*words):
        done = machine.command_line("doctor", *words)
        return done.returncode, {(one["part"], one["level"]): one for one in json.loads(done.stdout)}

    # Only the file that the upgrade replaced, and the qube that has not restarted since, if at all.
    code, before = findings("--json")
    assert code == 0, before
    assert ("service", "ok") in before
    assert "work" in before["policy", "note"]["text"]
    machine.dom0("chmod", "0644", "/etc/qubes/remote.d/work.key", check=True)
    machine.dom0("sh", "-c", "cp -p /etc/qubes/remote.d/spare.key /etc/qubes/remote.d/ghost.key; chmod 0640 /etc/qubes/remote/minion", check=True)
    machine.dom0("sh", "-c", "echo '# newer' >> /srv/formulas/base/qvm-remote-formula/_utils/pullrpc/note.py", check=True)
    machine.dom0("sh", "-c", "sed -i 's/hostname/hostnamE/' /var/log/qvm-remote/audit.log.1", check=True)
    code, found = findings("--json")
    assert code == 1
    told = {part: one for (part, level), one in found.items() if level == "problem"}
    assert set(told) == {"configuration", "code", "keys", "VMs", "audit log"}
    assert told["configuration"]["mend"] == "chown root /etc/qubes/remote/minion && chmod 0600 /etc/qubes/remote/minion"
    assert "no qube ghost" in told["VMs"]["text"]
    assert told["VMs"]["mend"] == "qvm-remote-dom0 revoke ghost"
    lines = machine.command_line("doctor").stdout.decode().splitlines()
    assert any("the keys of ghost and spare are the same" in line for line in lines)
    assert any("the key file of work must be a plain file of mode 0600" in line and "->" in line for line in lines)
    by_salt = machine.dom0("qubesctl", "--out=json", "--log-level=quiet", "--retcode-passthrough", "qvm_remote.doctor", timeout=120)
    assert by_salt.returncode == 1
    assert {one["part"] for one in json.loads(by_salt.stdout)["local"] if one["level"] == "problem"} == set(told)
    machine.dom0("sh", "-c", "chmod 0600 /etc/qubes/remote.d/work.key /etc/qubes/remote/minion; rm /etc/qubes/remote.d/ghost.key", check=True)
    machine.dom0("sh", "-c", "sed -i '$d' /srv/formulas/base/qvm-remote-formula/_utils/pullrpc/note.py", check=True)
    machine.dom0("sh", "-c", "sed -i 's/hostnamE/hostname/' /var/log/qvm-remote/audit.log.1", check=True)
    assert findings("--json")[0] == 0


def test_enable_asks_and_says_what_the_next_apply_does(machine):
    refused = machine.terminal(_COMMAND, "enable")
    refused.until("Type yes to accept this: ")
    refused.type("y\n")
    assert refused.end() == 1
    assert machine.dom0("systemctl", "is-enabled", "qvm-remote").stdout == b"disabled\n"
    accepted = machine.terminal(_COMMAND, "enable")
    accepted.until("Type yes to accept this: ")
    accepted.type("yes\n")
    assert accepted.end() == 0
    assert "with the next apply it runs and does not start at boot; to keep it" in accepted.shown
    assert machine.dom0("systemctl", "is-enabled", "qvm-remote").stdout == b"enabled\n"
    assert machine.dom0("ls", "/run/systemd/system/qvm-remote.service").returncode != 0
    # It runs on as it was, and serves.
    assert machine.vm("work", "qvm-remote", "hostname").stdout == b"dom0\n"


def test_disable_stops_it_and_once_serves_what_waits_after_a_look(machine):
    disabled = machine.command_line("disable")
    assert disabled.returncode == 0, disabled.stderr
    assert b"to keep it, write into pillar, under qvm-remote: service: {running: false}" in disabled.stdout
    assert machine.dom0("systemctl", "is-active", "qvm-remote").stdout == b"inactive\n"
    assert machine.dom0("systemctl", "is-enabled", "qvm-remote").stdout == b"disabled\n"
    doctor = machine.command_line("doctor")
    assert (doctor.returncode, b"the service does not run" in doctor.stdout) == (1, True)
    # A client takes its request back when nobody comes for it; this one asks again.
    asking = "until qvm-remote -n 'touch /tmp/ran; hostname' 2>/dev/null; do :; done"
    with _endless(machine.popen_vm("work", "sh", "-c", asking, stdout=subprocess.PIPE)) as client:
        seen = []

        def look():
            looked = machine.command_line("--dry-run", "--once", check=True).stdout.decode()
            seen.extend(re.findall(r"^work +([0-9a-f-]+) +would run +touch /tmp/ran; hostname$", looked, re.MULTILINE))
            return seen

        assert _until(look, 60)
        assert machine.dom0("ls", "/tmp/ran").returncode != 0
        assert machine.dom0("grep", "-c", seen[0], "/var/log/qvm-remote/audit.log").stdout == b"0\n"
        served = []

        def serve():
            served.append(machine.command_line("--once").stdout)
            # Unless it had just taken its request back, it has its answer.
            return _until(lambda: client.poll() is not None, 5)

        assert _until(serve, 60)
        assert b"work  served" in served[-1]
        assert client.communicate()[0] == b"dom0\n"
    assert machine.dom0("ls", "/tmp/ran").returncode == 0
    assert machine.command_line("--dry-run", "--once").stdout == b"nothing waits\n"


def test_a_revoked_key_is_gone(machine):
    assert machine.command_line("revoke", "spare").returncode == 0
    assert "spare" not in json.loads(machine.command_line("keys", "--json").stdout)
    again = machine.command_line("revoke", "spare")
    assert (again.returncode, again.stderr) == (1, b"qvm-remote-dom0: error: spare has no key\n")
