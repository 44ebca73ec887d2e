# SPDX-License-Identifier: GPL-2.0-or-later
"""As whom a VM's commands are run, from the settings to the result; and that this user gets at nothing of the engine's."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
from pullrpc import sandbox
from pullrpc.accounts import describe_account, find_account
from pullrpc.audit_read import history
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import ConfigError, PillarError, Refused
from pullrpc.ids import new_cid
from pullrpc.pillar import read_pillar
from pullrpc.policy import describe
from pullrpc.tokens import make_token

#: Not as whom test_sandbox_escapes.py runs commands: it kills and counts all processes of that user, whoever started them.
USER = "mail"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run commands as others")


@pytest.fixture
def dom0():
    """dom0's side with keys for work and dev, in a folder that every user can get to."""
    with tempfile.TemporaryDirectory(prefix="qvm-remote-") as folder:
        os.chmod(folder, 0o711)
        names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "log/audit.log"}
        one = Dom0(make_config({name: os.path.join(folder, path) for name, path in names.items()}))
        one.folder = folder
        for vm in ("work", "dev"):
            one.keyring.put(vm, os.urandom(32).hex())
        yield one
        sandbox.close_idle()


def _run_as(dom0, user, policy="full"):
    own = {"work": {"run_as": user, "policy": policy}}
    dom0.config = make_config({**{name: getattr(dom0.config, name) for name in ("key_dir", "state_dir", "run_dir", "audit_log")}, "vms": own})


def _run(dom0, line, vm="work", form="shell"):
    """Run a command; give its status, stdout and stderr."""
    cid = new_cid()
    token = make_token(dom0.keyring.get(vm), vm, cid, 30, form, line)
    assert dom0.intake.claim([(dom0.intake.admit(vm, cid.encode(), line, token, -1), 0)]) == {}
    status = dom0.execution.execute(vm, cid)["status"]
    parts = dom0.results.result(vm, cid)[1]
    return status, *(b"".join(parts[part][1](0)) for part in ("out", "err"))


def test_run_as_is_a_setting_of_single_vms_and_a_users_name():
    assert make_config({}).for_vm("work").run_as == "root"
    assert make_config({"vms": {"work": {"run_as": "alice"}}}).for_vm("work").run_as == "alice"
    with pytest.raises(ConfigError, match="single VMs only"):
        make_config({"run_as": "alice"})
    for wrong in ("a b", "../x", "0", "", 0):
        with pytest.raises(ConfigError, match="run_as must be"):
            make_config({"vms": {"work": {"run_as": wrong}}})


def test_pillar_names_the_user_for_all_for_some_and_for_one():
    listed = [{"name": name, "class": "AppVM", "template": "", "tags": tags, "for_disposables": False} for name, tags in (("work", ["a"]), ("dev", ["a"]), ("web", []))]
    pillar = {"defaults": {"run_as": "one"}, "select": [{"tag": "a", "run_as": "two"}], "vms": {"dev": {"run_as": "three"}, "web": {}}}
    served = read_pillar(pillar, lambda tags: listed).settings["vms"]
    assert {vm: own["run_as"] for vm, own in served.items()} == {"work": "two", "dev": "three", "web": "one"}
    with pytest.raises(PillarError, match="qvm-remote:vms:web:run_as: must be the name of a user of dom0"):
        read_pillar({"vms": {"web": {"run_as": "a;b"}}})


@as_root
def test_it_is_said_as_whom_commands_run():
    assert [describe_account(name) for name in ("root", USER)] == ["root", USER]
    assert describe_account("no-such-user") == "no-such-user (but nothing runs: dom0 has no user no-such-user)"
    assert describe(make_config({"vms": {"work": {"run_as": USER}}}).for_vm("work")) == f"may run anything in dom0, as {USER} (policy: full)"
    rules = make_config({"vms": {"work": {"run_as": USER, "policy": {"allow": [["ls"]]}}}}).for_vm("work")
    assert describe(rules) == f"may run what 1 rules allow and 0 do not forbid, as {USER}"


@as_root
@pytest.mark.parametrize("policy", ["full", {"allow": [["id", "**"]]}])
def test_a_command_runs_as_the_user_and_dom0_keeps_as_whom(dom0, policy):
    _run_as(dom0, USER, policy)
    assert _run(dom0, b"id -un") == ("done", USER.encode() + b"\n", b"")
    assert _run(dom0, b"id -un", "dev") == ("done", b"root\n", b"")
    with open(dom0.config.audit_log, encoding="ascii") as file:
        lines = [json.loads(line) for line in file]
    assert [(line["vm"], line["as"]) for line in lines if line["what"] == "run"] == [("work", USER), ("dev", "root")]
    assert [row["as"] for row in history(dom0.config.audit_log)] == [USER, "root"]


@as_root
def test_the_commands_of_a_script_under_rules_run_as_the_user(dom0, monkeypatch):
    _run_as(dom0, USER, {"allow": [["id", "**"], ["echo", "**"]]})
    dom0.execution.warm()
    # That of the tests may lie where only root can get to; dom0's does not.
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert _run(dom0, b"id -un\necho a\n", form="script") == ("done", USER.encode() + b"\na\n", b"")


@as_root
def test_without_the_user_nothing_runs_and_one_line_says_why(dom0):
    _run_as(dom0, "no-such-user")
    status, out, err = _run(dom0, f"touch {dom0.folder}/ran".encode())
    assert (status, out) == ("refused", b"")
    assert err == b"qvm-remote: dom0 has no user no-such-user; in dom0's pillar, run_as says as whom this qube's commands are run\n"
    assert not os.path.exists(f"{dom0.folder}/ran")
    # A ping runs nothing, and says that the key fits.
    assert _run(dom0, b"ping", form="ping") == ("done", b"pong\n", b"")


@as_root
def test_another_name_of_root_is_root(dom0):
    # A user database of this test's own: the one of this machine stays as it is.
    program = f"""
        import sys; sys.path[:0] = {sys.path!r}
        from pullrpc.accounts import describe_account, find_account
        print(find_account("toor"), describe_account("toor"), find_account("alice").uid)
    """.replace("\n        ", "\n")
    passwd = os.path.join(dom0.folder, "passwd")
    with open("/etc/passwd", encoding="utf-8") as file, open(passwd, "w", encoding="utf-8") as own:
        own.write(file.read() + "toor:x:0:0::/root:/bin/sh\nalice:x:4321:4321::/:/bin/sh\n")
    words = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/passwd && exec "$1" -c "$2"', passwd, sys.executable, program]
    assert subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout == b"None toor, which is root 4321\n"


@as_root
def test_a_user_that_a_namespace_lacks_is_refused_in_so_many_words():
    program = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pullrpc.accounts import *\nprint(describe_account('root'), describe_account({USER!r}))"
    done = subprocess.run(["unshare", "--user", "--map-root-user", sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    assert f"root {USER} (but nothing runs: the user namespace that dom0's engine is in lacks {USER}".encode() in done.stdout


@as_root
def test_an_engine_that_is_not_root_runs_nothing_as_another_user(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    with pytest.raises(Refused, match="dom0's engine is not root"):
        find_account(USER)


_REACH = """
import os, sys
for folder, names, files in os.walk(sys.argv[1]):
    for path in [os.path.join(folder, name) for name in [*names, *files, "made"]]:
        print(path)
"""
_ATTACK = """
import os, sys
def may(what, attempt):
    try:
        attempt()
        print(what, path)
    except OSError:
        pass
for path in sys.argv[1:]:
    may("read", lambda: os.open(path, os.O_RDONLY))
    may("write", lambda: os.open(path, os.O_WRONLY | os.O_CREAT))
    may("chmod", lambda: os.chmod(path, 0o777))
    may("rename", lambda: os.rename(path, path + "2"))
    may("unlink", lambda: os.unlink(path))
    may("link", lambda: os.link(path, os.environ["TMPDIR"] + "/link"))
    may("list", lambda: os.listdir(path))
print("tried", len(sys.argv) - 1)
"""


@as_root
def test_the_user_gets_at_no_file_of_the_engines(dom0):
    # Something of everything: keys, ledger, spool with a result, sandboxes, the log and a whole command beside it.
    assert _run(dom0, b"echo secret #" + b"x" * 2000, "dev")[0] == "done"
    _run_as(dom0, USER)
    walk = subprocess.run([sys.executable, "-c", _REACH, dom0.folder], stdout=subprocess.PIPE, check=True).stdout.decode().split()
    for part in ("dev.key", "ledger.sqlite", "/out", "jobs", "audit.log", ".commands"):
        assert any(path.endswith(part) for path in walk), part
    run_dir = dom0.config.run_dir
    paths = [path for path in walk if not path.startswith(run_dir + "/") and path != f"{dom0.folder}/made"]
    attack = os.path.join(dom0.folder, "attack")
    with open(attack, "w", encoding="utf-8") as file:
        file.write(_ATTACK)
    os.chmod(attack, 0o644)
    paths += [f"{run_dir}/jobs", f"{run_dir}/engine.lock", f"{run_dir}/made", f"{run_dir}/.."]
    status, out, err = _run(dom0, " ".join(["/usr/bin/python3", attack, *paths]).encode())
    assert (status, err) == ("done", b"")
    assert out.decode() == f"tried {len(paths)}\n"
