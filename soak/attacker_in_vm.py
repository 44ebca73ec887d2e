# SPDX-License-Identifier: GPL-2.0-or-later
"""A program of a VM's user that attacks dom0 through the queue. It stands below the library that all attacks share (attackers.LIB), KINDS
and MARKS (see hostile.program). Orders come on stdin and answers go to stdout, a JSON object a line. Each attack is a request that would
leave a mark in dom0 if it ran.
"""

import hashlib

_own = []


def say(**data):
    """Tell whoever runs the soak."""
    os.write(1, json.dumps(data).encode("ascii") + b"\n")


def command_of(mark):
    """What leaves a mark in dom0."""
    return f"echo {mark} $QVM_REMOTE_ID >> {MARKS}".encode("ascii")


def _late(seconds):
    def attack(mark):
        cid, command = new_cid(time.time() + seconds), command_of(mark)
        put(cid, command)
        return cid

    return attack


def _with(line_of):
    """An attack that has its request come with a token line of another kind."""

    def attack(mark):
        cid, command = new_cid(), command_of(mark)
        put(cid, command, line_of(cid, command))
        return cid

    return attack


def _other_stdin(mark):
    cid = new_cid()
    with open(f"{QUEUE}/pending/{cid}.in", "wb") as file:
        file.write(command_of(mark))
    line = make_token(key(), os.uname().nodename, cid, 60, "shell", b"sh", hashlib.sha256(b"true").digest())
    put(cid, b"sh", line)
    return cid


def _planted(mark):
    # Who holds a FIFO open lives on, and there is no end of attacks.
    for kind in (kind for kind in KINDS if "held open" not in kind):
        for suffix in ("", ".auth", ".in", ".cancel"):
            cid = new_cid()
            _own.append(cid)
            plant(kind, f"{QUEUE}/pending/{cid}{suffix}")
            if suffix != ".auth":
                write_whole(f"{QUEUE}/pending/{cid}.auth", token(cid, b"true", os.urandom(32)))
            if suffix != "":
                write_whole(f"{QUEUE}/pending/{cid}", command_of(mark))
    knock(BASE + "/doorbell")
    return new_cid()


def _flood(mark):
    for number in range(300):
        cid = new_cid()
        _own.append(cid)
        write_whole(f"{QUEUE}/pending/{cid if number % 2 else f'no id {number}'}", command_of(mark))
    knock(BASE + "/doorbell")
    return new_cid()


#: Each takes a mark and gives the id that it used.
_FORGED = {
    "wrong key": _with(lambda cid, command: token(cid, command, os.urandom(32))),
    "key of zeros": _with(lambda cid, command: token(cid, command, bytes(32))),
    "another command": _with(lambda cid, command: token(cid, b"true")),
    "another id": _with(lambda cid, command: token(new_cid(), command)),
    "another VM's name": _with(lambda cid, command: make_token(key(), "dom0", cid, 60, "shell", command)),
    "another form": _with(lambda cid, command: token(cid, command).replace(b" shell ", b" script ")),
    "a longer time": _with(lambda cid, command: token(cid, command).replace(b" 60 ", b" 61 ")),
    "no token": _with(lambda cid, command: b""),
    "another stdin": _other_stdin,
    "an old id": _late(-100),
    # So far ahead that its time does not come while it waits in a queue: then it would be a true request.
    "an id to come": _late(86400),
}
#: The same; the clients of this VM have to wait until all that was gone through.
_ROUGH = {"no plain files": _planted, "hundreds of names": _flood}


def _tidy():
    """Nobody fetches the answers."""
    for cid in _own:
        for part in ("out", "err", "meta", "exit"):
            with contextlib.suppress(OSError):
                os.unlink(f"{QUEUE}/results/{cid}.{part}")
    del _own[:-1000]


def main():
    """Attack as ordered, until there is no more."""
    os.makedirs(f"{QUEUE}/pending", exist_ok=True)
    for line in sys.stdin:
        order = json.loads(line)
        _tidy()
        try:
            if order["do"] == "attack":
                attacks = list({**_FORGED, **(_ROUGH if order["rough"] else {})}.values())
                _own.append(attacks[order["number"] % len(attacks)](order["mark"]))
                say(done=order["mark"])
            elif order["do"] == "sign":
                cid, command = new_cid(), command_of(order["mark"])
                line = token(cid, command)
                say(signed=order["mark"], cid=cid, line=line.decode("ascii"))
                _own.append(cid)
                put(cid, command, line)
                put(cid, command, line)
            elif order["do"] == "put":
                _own.append(order["cid"])
                put(order["cid"], command_of(order["mark"]), order["line"].encode("ascii"))
                say(done=order["mark"])
        except (OSError, ValueError, AssertionError) as err:
            # Its disk may be full, or its key on the way.
            say(failed=f"{order}: {err}")


main()
