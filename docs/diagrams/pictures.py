# SPDX-License-Identifier: GPL-2.0-or-later
"""What the pictures show."""

from svg import Picture


def architecture():
    """Who does what, and over which way."""
    picture = Picture(
        "Architecture",
        "In the VM, the client writes a request into the queue on the VM's disk. In dom0, the engine in a salt-minion opens a session to the agent in the VM, "
        "fetches the request, verifies it, checks the policy, claims it in the ledger, runs it in the sandbox and hands the result back through the same session.",
        960,
        470,
    )
    picture.zone(20, 20, 300, 430, "VM: work")
    picture.box(45, 60, 250, 60, "qvm-remote COMMAND", "signs, waits, prints")
    picture.box(45, 190, 250, 80, "~/.qvm-remote/queue", "pending, running, results", "on the VM's own disk")
    picture.box(45, 350, 250, 60, "agent", "answers, and never asks")
    picture.arrow((110, 120), (110, 190))
    picture.text(102, 160, "request", anchor="end")
    picture.arrow((230, 190), (230, 120))
    picture.text(238, 160, "result", anchor="start")
    picture.arrow((170, 270), (170, 350), ends=2)

    picture.zone(500, 20, 440, 430, "dom0: qvm-remote.service, a salt-minion")
    picture.box(525, 350, 170, 60, "session", "one to each VM", kind="dom0")
    picture.box(525, 250, 170, 60, "verify", "key, token, time", kind="dom0")
    picture.box(525, 150, 170, 60, "policy", "what this VM may run", kind="dom0")
    picture.box(525, 55, 170, 55, "ledger", "claims each id once", kind="dom0")
    picture.box(750, 55, 170, 55, "sandbox", "runs the command", kind="dom0")
    picture.box(750, 150, 170, 60, "spool", "keeps the result", kind="dom0")
    picture.box(750, 250, 170, 60, "audit log", "a line for each step", kind="dom0")
    picture.arrow((610, 350), (610, 310))
    picture.arrow((610, 250), (610, 210))
    picture.arrow((610, 150), (610, 110))
    picture.arrow((695, 82), (750, 82))
    picture.arrow((835, 110), (835, 150))
    picture.arrow((750, 180), (725, 180), (725, 380), (695, 380))
    picture.text(722, 432, "what happens is logged before it takes effect")

    picture.arrow((525, 370), (295, 370))
    picture.text(410, 360, "1. dom0 asks")
    picture.arrow((295, 392), (525, 392))
    picture.text(410, 412, "2. the VM answers")
    picture.text(410, 330, "qvm-run")
    picture.text(410, 180, "No way leads")
    picture.text(410, 198, "from here to")
    picture.text(410, 216, "dom0 unasked.")
    return picture


def layers():
    """Five layers, from outside to inside."""
    picture = Picture(
        "Five layers",
        "A request passes authentication, input validation and the sandbox; audit records each step; and nothing of the service survives a reboot by itself.",
        960,
        470,
    )
    rows = (
        ("1. Authentication", "whoever has not this VM's key;", "a changed, late or second request", "whoever has the key"),
        ("2. Input validation", "what is too large, no id, no text;", "before it becomes a path or a log line", "what the command does"),
        ("3. Sandbox", "output, time, memory or processes", "without end; anything left behind", "root that means to get out"),
        ("4. Audit", "what would leave no trace:", "what can't be recorded isn't run", "root that changes the log"),
        ("5. Transient", "a service that is forgotten:", "after a reboot it is gone", "keys, which stay on disk"),
    )
    picture.text(80, 34, "a request", "name")
    picture.text(265, 34, "layer", "name")
    picture.text(530, 34, "stops", "name")
    picture.text(810, 34, "does not stop", "name")
    for number, (name, stops, more, not_this) in enumerate(rows):
        top = 50 + number * 82
        picture.box(160, top, 210, 66, name, kind="dom0")
        picture.box(390, top, 300, 66, kind="good")
        picture.text(540, top + 29, stops)
        picture.text(540, top + 47, more)
        picture.box(710, top, 230, 66, kind="bad")
        picture.text(825, top + 38, not_this)
    picture.arrow((80, 46), (80, 450))
    for number in range(5):
        picture.arrow((80, 83 + number * 82), (160, 83 + number * 82))
    return picture


def authentication():
    """From the command line to the result, step by step."""
    picture = Picture(
        "Authentication",
        "The client signs a request with its key; dom0 asks for it, checks token and policy, fetches stdin and compares its digest, claims the id and "
        "runs the command; the result carries a proof under the same key, which the client checks before it prints anything.",
        960,
        760,
    )
    client, agent, dom0 = 150, 480, 800
    for x, name, more in ((client, "client", "has the VM's key"), (agent, "agent", "has no say"), (dom0, "dom0", "has all keys")):
        picture.line(x, 70, x, 745)
        picture.box(x - 100, 15, 200, 55, name, more, kind="dom0" if name == "dom0" else "box")

    def step(y, start, end, text):
        picture.arrow((start, y), (end, y))
        picture.text((start + end) / 2, y - 8, text)

    picture.box(20, 90, 280, 82, "makes id and token", "HMAC(key: VM, id, time limit, form,", "digests of command and stdin)")
    step(205, client, agent, "stdin, token, then the command")
    step(240, dom0, agent, "poll: what is there?")
    step(275, agent, dom0, "id, sizes, token, command")
    picture.box(620, 295, 320, 82, "checks before it believes", "sizes, id, UTF-8; key and its qube's UUID;", "token; time within 300 s; policy", kind="dom0")
    step(410, dom0, agent, "fetch: stdin, if there is one")
    step(445, agent, dom0, "stdin, 16 MiB at most")
    picture.box(620, 465, 320, 82, "claims the id, on disk", "stdin has the signed digest,", "the id was never claimed before", kind="dom0")
    picture.box(620, 562, 320, 64, "runs it; signs the result", "asks the user before, if a rule says so", kind="dom0")
    step(655, dom0, agent, "result: out, err, proof")
    step(690, agent, client, "by rename, .exit last")
    picture.box(20, 704, 280, 44, "checks the proof, then prints")
    return picture


def states():
    """A command's way through the queue and the ledger."""
    picture = Picture(
        "States of a command",
        "A command is pending in the VM's queue, then claimed, running, done and delivered in dom0's ledger. It may be refused instead of claimed, and what was "
        "claimed or running when the engine ended is interrupted, which is a way to be done.",
        960,
        400,
    )
    picture.zone(15, 20, 185, 360, "the VM's disk")
    picture.zone(290, 20, 655, 360, "dom0's ledger")
    picture.box(35, 110, 145, 60, "pending", "queue/pending")
    picture.box(310, 110, 110, 60, "claimed", "on disk", kind="dom0")
    picture.box(465, 110, 125, 60, "running", "in the sandbox", kind="dom0")
    picture.box(635, 110, 130, 60, "done", "result is kept", kind="dom0")
    picture.box(810, 110, 120, 60, "delivered", "the VM has it", kind="good")
    picture.arrow((180, 140), (310, 140))
    picture.text(245, 132, "verified")
    picture.arrow((420, 140), (465, 140))
    picture.arrow((590, 140), (635, 140))
    picture.arrow((765, 140), (810, 140))
    picture.text(442, 100, "once")
    picture.text(612, 100, "ended")
    picture.text(787, 100, "VM runs")

    picture.box(35, 270, 145, 60, "refused", "exit code 125", kind="bad")
    picture.arrow((108, 170), (108, 270))
    picture.text(118, 225, "or not", anchor="start")
    picture.arrow((365, 170), (365, 250), (715, 250), (715, 170))
    picture.text(540, 242, "the user or a new policy says no; cancelled")
    picture.arrow((528, 170), (528, 215), (680, 215), (680, 170))
    picture.text(604, 207, "cancelled")
    picture.text(617, 290, "The engine ended in between: both become done, as interrupted.")
    picture.text(617, 314, "No arrow leads back: nothing runs twice.")
    picture.text(617, 338, "A result waits for a VM that is shut down (spool_max_age).")
    return picture


PICTURES = {"architecture": architecture, "layers": layers, "authentication": authentication, "states": states}
