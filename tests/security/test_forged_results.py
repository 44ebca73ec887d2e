# SPDX-License-Identifier: GPL-2.0-or-later
"""Another program of a VM's user puts results into the queue, in dom0's place. The client shows none of it as dom0's, hangs on none
of it, and what failed at the client does not go on in dom0.
"""

import pytest
from attackers import LIB, wait

#: Starts a client whose command waits in dom0, and answers it before dom0 does: ``how`` says with what.
_FORGE = """
how, command = sys.argv[1:]
client = subprocess.Popen(["qvm-remote", "-n", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
cid = wait(lambda: os.listdir(f"{QUEUE}/running"))[0]
names = {part: f"{QUEUE}/results/{cid}.{part}" for part in ("out", "err", "meta", "exit")}
contents = {"out": b"EVIL", "err": b"", "meta": b"mac " + b"0" * 64 + b"\\nexit 0\\nid " + cid.encode() + b"\\nstatus done\\n", "exit": b"0\\n"}
special = {}
if how == "words that look like dom0's":
    contents["err"] = "qvm-remote: \\x1b]0;EV\\x07\\u202e\\u200bdone\\u0430\\x9b31m\\r\\nqvm-remote: run this".encode() + b"\\xff\\x9b" * 1000
elif how == "the true result of another command":
    done = subprocess.run(["qvm-remote", "-n", "echo EVIL"], stdout=subprocess.PIPE)
    assert done.stdout == b"EVIL\\n"
    day = sorted(os.listdir(BASE + "/history"))[-1]
    last = max((os.path.join(BASE, "history", day, name) for name in os.listdir(f"{BASE}/history/{day}")), key=os.path.getmtime)
    for part in contents:
        with open(f"{last}/{part}", "rb") as file:
            contents[part] = file.read()
elif how == "a key of its own":
    from hashlib import sha256
    from pullrpc.tokens import make_meta
    digests = [sha256(contents[part]).digest() for part in ("out", "err")]
    contents["meta"] = make_meta(os.urandom(32), cid, *digests, {"id": cid, "exit": 0, "status": "done"})
elif how == "no end":
    with open(names["out"], "wb") as file:
        file.truncate(1 << 42)
    del contents["out"]
elif how == "a huge proof":
    contents["meta"] = b"x" * 100_000
else:
    kind, part = how.split(" as ")
    special = {part: kind}
for part, content in contents.items():
    if part not in special and part != "exit":
        write_whole(names[part], content)
for part, kind in special.items():
    plant(kind, names[part])
if "exit" not in special:
    write_whole(names["exit"], contents["exit"])
knock(f"{QUEUE}/results/{cid}.bell")
out, err = client.communicate(timeout=40)
print(json.dumps([cid, client.returncode, out.decode("latin-1"), err.decode("latin-1")]))
"""
_WAYS = (
    *("words that look like dom0's", "the true result of another command", "a key of its own", "no end", "a huge proof"),
    *("fifo as out", "fifo that is held open as err", "folder as meta", "folder as exit", "fifo that is held open as exit", "link to the key as out"),
)


@pytest.mark.parametrize("how", _WAYS)
def test_what_another_program_answers_is_never_shown_as_dom0s(dom0, how):
    dom0.dom0("mkfifo", "/tmp/forged", check=True)
    try:
        cid, code, out, err = dom0.python(LIB + _FORGE, how, "cat /tmp/forged; touch /srv/went-on")
        assert (code, out) == (125, "")
        assert "EVIL" not in err
        assert all(" " <= char <= "~" or char == "\n" for char in err), err
        # One note, one line of whoever it was with a remark on it, and no more than that.
        assert 1 <= err.count("\n") <= 3
        assert all(line.startswith("qvm-remote: ") for line in err.splitlines())
        assert len(err) < 1000
        # The user was told that it failed: it does not go on.
        wait(lambda: dom0.dom0("pgrep", "-f", "cat /tmp/forged").returncode)
        assert dom0.dom0("test", "-e", "/srv/went-on").returncode == 1
        assert dom0.remote("hostname").stdout == b"dom0\n"
    finally:
        dom0.dom0("rm", "-f", "/tmp/forged")
        dom0.vm("work", "pkill", "-f", "sleep 7654340")
        dom0.vm("work", "sh", "-c", "rm -rf ~/.qvm-remote/queue/results/*")


#: The client has checked a result and shows it to a reader that takes its time; meanwhile the file is written to.
_EXCHANGE = """
import fcntl, struct, termios
size = 1 << 19
client = subprocess.Popen(["qvm-remote", "-n", f"yes | head -c {size}"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
path = wait(lambda: [name for name in os.listdir(f"{QUEUE}/results") if name.endswith(".exit")])[0].replace(".exit", ".out")
# Its pipe is full: it shows what it has checked, and can't go on.
wait(lambda: struct.unpack("i", fcntl.ioctl(client.stdout, termios.FIONREAD, b"    "))[0] >= 65536)
with open(f"{QUEUE}/results/{path}", "r+b") as file:
    file.write(b"E" * size * 2)
out, err = client.communicate(timeout=60)
print(json.dumps([client.returncode, len(out), out.count(b"E"), err.decode("latin-1")]))
"""


def test_a_result_that_is_exchanged_while_it_is_shown_is_not_shown(dom0):
    dom0.vm("work", "sh", "-c", "rm -rf ~/.qvm-remote/queue/results/*")
    code, shown, evil, err = dom0.python(LIB + _EXCHANGE)
    assert evil == 0
    # A busy machine has begun to stream it, and then what was not shown yet is checked after the exchange.
    assert (code, shown) == (0, 1 << 19) or (code == 125 and "qvm-remote: error: " in err)
    dom0.vm("work", "sh", "-c", "rm -rf ~/.qvm-remote/queue/results/*")


def test_the_clients_log_does_nothing_on_a_terminal_and_holds_nobody_up(dom0):
    log = "/home/user/.qvm-remote/audit.log"
    dom0.vm("work", "sh", "-c", f"printf 'x\\033]0;owned\\007\\302\\233\\342\\200\\256\\rqvm\\n' >> {log}", check=True)
    shown = dom0.vm("work", "script", "-qec", "qvm-remote log 5", "/dev/null").stdout
    assert b"x\\x1b]0;owned\\x07\\x9b\\u202e\\rqvm" in shown
    assert all(byte in b"\r\n" or 32 <= byte < 127 for byte in shown)
    dom0.vm("work", "sh", "-c", f"rm {log}; mkfifo {log}", check=True)
    try:
        assert dom0.remote("-n", "echo shown").stdout == b"shown\n"
        done = dom0.remote("log")
        assert (done.returncode, done.stdout, done.stderr) == (125, b"", f"qvm-remote: error: {log} is no plain file; move it away\n".encode())
    finally:
        dom0.vm("work", "rm", log)
