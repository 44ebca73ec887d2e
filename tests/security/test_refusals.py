# SPDX-License-Identifier: GPL-2.0-or-later
"""The attack, then the defence: what dom0 must refuse, within a second, with a reason, and without running anything."""

import json

import pytest

#: Makes a request by hand in the VM, changed as the argument says, and waits for dom0's answer.
_CRAFT = """
import json, os, sys, time
from pullrpc.files import knock
from pullrpc.ids import new_cid
from pullrpc.tokens import make_token, parse_key
how, command = sys.argv[1], sys.argv[2].encode()
queue = os.path.expanduser("~/.qvm-remote/queue")
with open(os.path.expanduser("~/.qvm-remote/auth.key"), "rb") as file:
    key = parse_key(file.read())
cid, vm, form = new_cid(), os.uname().nodename, "shell"
if how == "old":
    cid = new_cid(time.time() - 100)
elif how == "ahead":
    cid = new_cid(time.time() + 100)
if how == "empty":
    command = b" \\n"
elif how == "nul":
    command += b"\\0"
elif how == "escape":
    command += b"\\x1b[2J"
elif how == "not-utf8":
    command += b" \\xff\\xfe"
elif how == "large":
    command += b" " * (1 << 20)
elif how == "argv-not-json":
    form = "argv"
token = make_token(os.urandom(32) if how == "wrong-key" else key, "dev" if how == "other-vm" else vm, cid, 86400 if how == "long" else 30, form, command)
if how == "other-id":
    token = make_token(key, vm, new_cid(), 30, form, command)
elif how == "changed":
    command += b" && true"
elif how == "form":
    token = token.replace(b" shell ", b" script ")
elif how == "timeout-changed":
    token = token.replace(b" 30 ", b" 31 ")
elif how == "token-not-ascii":
    token = "v2 30 shell - é".encode() + b"\\n"
elif how == "token-not-utf8":
    token = b"v2 30 shell - \\xff\\n"
elif how == "token-empty":
    token = b""
elif how == "token-large":
    token = token * 10000
elif how == "v1":
    import hmac
    token = hmac.new(key.hex().encode(), cid.encode(), "sha256").hexdigest().encode() + b"\\n"
elif how == "stdin-added":
    with open(f"{queue}/pending/{cid}.in", "wb") as file:
        file.write(b"not signed")
elif how == "stdin-changed":
    import hashlib
    token = make_token(key, vm, cid, 30, form, command, hashlib.sha256(b"this").digest())
    with open(f"{queue}/pending/{cid}.in", "wb") as file:
        file.write(b"that")
if how != "no-token":
    with open(f"{queue}/pending/{cid}.auth", "wb") as file:
        file.write(token)
with open(f"{queue}/pending/.{cid}", "wb") as file:
    file.write(command)
    if how == "sparse":
        file.truncate(1 << 30)
started = time.monotonic()
os.rename(f"{queue}/pending/.{cid}", f"{queue}/pending/{cid}")
knock(os.path.expanduser("~/.qvm-remote/doorbell"))
while not os.path.exists(f"{queue}/results/{cid}.exit") and time.monotonic() - started < 20:
    time.sleep(0.01)
waited = time.monotonic() - started
with open(f"{queue}/results/{cid}.exit") as code, open(f"{queue}/results/{cid}.err") as err:
    print(json.dumps({"exit": int(code.read()), "err": err.read(), "seconds": waited, "cid": cid, "token": token.decode("latin-1")}))
"""
_REASONS = {
    "wrong-key": "the token does not fit",
    "other-vm": "the token does not fit",
    "other-id": "the token does not fit",
    "changed": "the token does not fit",
    "form": "the token does not fit",
    "timeout-changed": "the token does not fit",
    "token-not-ascii": "the token is malformed",
    "token-not-utf8": "the token is malformed",
    "token-empty": "there is no token",
    "token-large": "the token is too large",
    "no-token": "came without a token",
    "v1": "a token of qvm-remote 1.x",
    "old": "old, dom0 takes at most 60 s",
    "ahead": "ahead of dom0's clock",
    "empty": "the command is empty",
    "nul": "control bytes",
    "escape": "control bytes",
    "not-utf8": "not UTF-8",
    "large": "too large",
    "sparse": "too large",
    "long": "over the limit",
    "argv-not-json": "not JSON",
    "stdin-added": "stdin is not what was signed",
    "stdin-changed": "stdin is not what was signed",
}


def _ran(dom0):
    return dom0.dom0("test", "-e", "/srv/attacked").returncode == 0


@pytest.mark.parametrize("how", sorted(_REASONS))
def test_a_bad_request_is_refused_with_its_reason_and_not_run(dom0, how):
    answer = dom0.python(_CRAFT, how, "touch /srv/attacked")
    assert answer["exit"] == 125
    assert _REASONS[how] in answer["err"]
    assert not _ran(dom0)


def test_the_crafting_program_makes_requests_that_run_when_nothing_is_wrong(dom0):
    answer = dom0.python(_CRAFT, "nothing", "touch /srv/crafted")
    assert answer["exit"] == 0
    assert dom0.dom0("test", "-e", "/srv/crafted").returncode == 0


_REPLAY = """
import json, os, sys, time
cid, token, command = sys.argv[1], sys.argv[2], sys.argv[3]
queue = os.path.expanduser("~/.qvm-remote/queue")
for part in ("out", "err", "meta", "exit"):
    if os.path.exists(f"{queue}/results/{cid}.{part}"):
        os.unlink(f"{queue}/results/{cid}.{part}")
with open(f"{queue}/pending/{cid}.auth", "w") as file:
    file.write(token)
with open(f"{queue}/pending/.{cid}", "w") as file:
    file.write(command)
os.rename(f"{queue}/pending/.{cid}", f"{queue}/pending/{cid}")
end = time.monotonic() + 20
while not os.path.exists(f"{queue}/results/{cid}.exit") and time.monotonic() < end:
    time.sleep(0.01)
with open(f"{queue}/results/{cid}.exit") as code, open(f"{queue}/results/{cid}.err") as err:
    print(json.dumps({"exit": int(code.read()), "err": err.read()}))
"""


@pytest.mark.parametrize("restart", [False, True])
def test_a_replay_is_refused_also_after_an_engine_restart(dom0, restart):
    counter = f"/srv/replayed-{restart}"
    command = f"echo x >> {counter}"
    first = dom0.python(_CRAFT, "nothing", command)
    assert first["exit"] == 0
    if restart:
        dom0.stop_engine()
        dom0.start_engine()
    again = dom0.python(_REPLAY, first["cid"], first["token"], command)
    assert again["exit"] == 125
    assert "used before" in again["err"]
    assert dom0.dom0("cat", counter).stdout == b"x\n"


@pytest.mark.parametrize("name", ["a/b", "..", "it's", 'a"b', "new\nline", "$(touch x)", "`id`", "\udcff\udcfe", "20261124-000000-1-0BADCAFE"])
def test_a_file_name_that_is_no_id_harms_nobody_and_the_others_are_served(dom0, name):
    program = """
import json, os, sys
name = os.fsencode(json.loads(sys.argv[1]))
queue = os.path.expanduser("~/.qvm-remote/queue").encode()
path = os.path.join(queue, b"pending", name)
try:
    with open(path, "wb") as file:
        file.write(b"touch /srv/attacked")
except OSError:
    pass
print("1")
"""
    dom0.python(program, json.dumps(name))
    assert dom0.remote("hostname").stdout == b"dom0\n"
    assert not _ran(dom0)
    left = dom0.vm("work", "sh", "-c", "ls -A ~/.qvm-remote/queue/pending")
    assert left.stdout == b""


def test_memory_stays_flat_while_a_sparse_gigabyte_is_refused(dom0):
    def peak():
        pids = dom0.dom0("pgrep", "-f", "salt-minion").stdout.split()
        lines = [dom0.dom0("grep", "VmHWM", f"/proc/{pid.decode()}/status").stdout.split() for pid in pids]
        return max(int(line[1]) for line in lines if line)

    before = peak()
    assert dom0.python(_CRAFT, "sparse", "true")["exit"] == 125
    assert peak() - before < 32 * 1024


def test_without_a_key_everything_is_refused_and_with_an_empty_folder_too(dom0):
    key = dom0.vm("work", "qvm-remote", "key", "show", "--secret").stdout
    other = dom0.vm("dev", "qvm-remote", "key", "show", "--secret").stdout
    try:
        assert dom0.call("qvm_remote.revoke", "work") == (0, True)
        done = dom0.remote("-n", "touch /srv/attacked")
        assert done.returncode == 125
        assert b"dom0 has no key for work" in done.stderr
        assert dom0.call("qvm_remote.revoke", "dev") == (0, True)
        assert dom0.dom0("ls", "-A", "/etc/qubes/remote.d").stdout == b""
        assert dom0.remote("-n", "touch /srv/attacked").returncode == 125
        assert dom0.remote("-n", "touch /srv/attacked", vm="dev").returncode == 125
        dom0.dom0("rmdir", "/etc/qubes/remote.d", check=True)
        assert dom0.remote("-n", "touch /srv/attacked").returncode == 125
        assert not _ran(dom0)
    finally:
        assert dom0.call("qvm_remote.authorize", "work", data=key)[0] == 0
        assert dom0.call("qvm_remote.authorize", "dev", data=other)[0] == 0
    assert dom0.remote("hostname").stdout == b"dom0\n"


@pytest.mark.parametrize("content", [b"", b"abcd\n", b"0x" + b"1" * 62, b"a_b" + b"1" * 61, b"0" * 64, b"0123456789abcdef" * 5])
def test_a_key_that_is_no_key_is_refused_at_authorize_and_at_use(dom0, content):
    code, answer = dom0.call("qvm_remote.authorize", "work", data=content)
    assert code != 0
    assert "the key" in answer
    path = "/etc/qubes/remote.d/work.key"
    good = dom0.dom0("cat", path).stdout
    try:
        dom0.dom0("sh", "-c", f"cat > {path}", data=content, check=True)
        done = dom0.remote("-n", "touch /srv/attacked")
        assert done.returncode == 125
        assert b"the key file of work can't be used" in done.stderr
        assert not _ran(dom0)
    finally:
        dom0.dom0("sh", "-c", f"cat > {path}", data=good, check=True)


@pytest.mark.parametrize("damage", ["chmod 0644 {}", "chmod 0755 $(dirname {})", "mv {0} {0}.real; ln -s {0}.real {0}"])
def test_a_badly_protected_key_is_refused_at_use(dom0, damage):
    path = "/etc/qubes/remote.d/work.key"
    try:
        dom0.dom0("sh", "-c", damage.format(path), check=True)
        done = dom0.remote("-n", "touch /srv/attacked")
        assert done.returncode == 125
        assert not _ran(dom0)
    finally:
        dom0.dom0("sh", "-c", f"[ ! -L {path} ] || mv -f {path}.real {path}; chmod 0700 $(dirname {path}); chmod 0600 {path}", check=True)
    assert dom0.remote("hostname").returncode == 0


def test_the_key_of_another_vm_is_refused_at_authorize_and_at_use(dom0):
    key = dom0.vm("dev", "qvm-remote", "key", "show", "--secret").stdout
    code, answer = dom0.call("qvm_remote.authorize", "work", data=key)
    assert code != 0
    assert "already the key of dev" in answer
    path = "/etc/qubes/remote.d/work.key"
    good = dom0.dom0("cat", path).stdout
    try:
        dom0.dom0("sh", "-c", f"cat > {path}", data=key, check=True)
        for vm in ("work", "dev"):
            assert dom0.remote("-n", "touch /srv/attacked", vm=vm).returncode == 125
        assert not _ran(dom0)
    finally:
        dom0.dom0("sh", "-c", f"cat > {path}", data=good, check=True)


@pytest.mark.parametrize("name", ["../../x", "dom0", "none", "a b", "-x", "x" * 32, "é"])
def test_authorize_refuses_what_is_no_vms_name(dom0, name):
    code, answer = dom0.call("qvm_remote.authorize", "--", name, data=b"ab" * 32)
    assert code != 0
    assert "not a VM's name" in answer


def test_an_unreadable_ledger_refuses_everything(dom0):
    dom0.stop_engine()
    dom0.dom0("sh", "-c", "cd /var/lib/qvm-remote; mkdir kept; mv ledger.sqlite* kept/; echo garbage > ledger.sqlite; chmod 600 ledger.sqlite", check=True)
    try:
        dom0.factory.start()
        code, answer = dom0.call("qvm_remote.status")
        assert code == 0
        assert "is damaged" in answer["ledger"]
        assert answer["commands"] == {}
        # By then an engine that served the VM would have run it; what a client says that waits for longer is another test's matter.
        assert dom0.vm("work", "timeout", "--signal=INT", "8", "qvm-remote", "-n", "touch /srv/attacked").returncode == 124
        assert not _ran(dom0)
    finally:
        dom0.stop_engine()
        dom0.dom0("sh", "-c", "cd /var/lib/qvm-remote; rm -f ledger.sqlite*; mv kept/* .; rmdir kept", check=True)
