# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to have something done in dom0 that are measured side by side, and what they are beside."""

from place import BLOB, BLOB_SIZE, POLL, POLL_INTERVAL, SCRIPT, WORK

#: Names of modes, as in the table.
SPAWN, QVM_RUN, SSH, SSH_MASTER = "spawn in dom0", "qvm-run (dom0 to VM)", "ssh localhost", "ssh localhost, ControlMaster"
SESSION, AGENTLESS, POLLING = "qvm-remote, session", "qvm-remote, agentless", f"qvm-remote, agentless, polling each {POLL_INTERVAL} s"
INTERPRETER = "python3 -IS -c pass (in the VM)"
#: What a row's ratio is to, the first one that there is.
FLOORS = [QVM_RUN, SPAWN]


class Mode:
    """A way to have something done.

    Args:
        name: str.
        probe: Probe, where it is started.
        commands: dict of a kind (``true``, ``ls``, ``out``, ``in``) to a command line.
        script: str, the path of the script there.
    """

    def __init__(self, name, probe, commands, script=""):
        self.name = name
        self._probe = probe
        self._commands = commands
        self._script = script

    def can(self, kind):
        """Whether it can do this."""
        return kind in self._commands

    def sample(self, kind, count=1, parallel=1):
        """Do it.

        Returns:
            list of float, milliseconds of each.
        """
        return self._do(kind, count, parallel)["ms"]

    def seconds(self, kind, count, parallel):
        """Do it so many times, so many at once.

        Returns:
            float, seconds of all together.
        """
        return self._do(kind, count, parallel)["seconds"]

    def _do(self, kind, count, parallel):
        extra = {"stdin": self._script} if kind == "in" else {"reads": True} if kind == "out" else {}
        answer = self._probe.ask("run", argv=self._commands[kind], count=count, parallel=parallel, **extra)
        if kind == "out" and answer["bytes"] != BLOB_SIZE:
            raise RuntimeError(f"{self.name}: {answer['bytes']} bytes came of {BLOB_SIZE}")
        return answer


def fast(place):
    """The modes that answer at once.

    Args:
        place: Place, with WORK served.

    Returns:
        list of Mode
    """
    blob, script = f"/root/{BLOB}", f"/root/{SCRIPT}"
    spawn = {"true": ["true"], "ls": ["qvm-ls"], "out": ["cat", blob], "in": ["/bin/bash", "-s"]}
    run = ["qvm-run", "--pass-io", "--no-gui", "--no-autostart", WORK]
    bare = {"true": [*run, "true"], "out": [*run, f"cat {BLOB}"], "in": [*run, "bash -s"]}
    modes = [Mode(SPAWN, place.probe("dom0"), spawn, script), Mode(QVM_RUN, place.probe("dom0"), bare, script)]
    if place.ssh is not None:
        for name, master in ((SSH, False), (SSH_MASTER, True)):
            here = {"true": "true", "out": f"cat {place.folder}/{BLOB}", "in": "bash -s"}
            there = {kind: place.ssh.argv(master, words) for kind, words in here.items()}
            modes.append(Mode(name, place.probe("host"), there, f"{place.folder}/{SCRIPT}"))
    return [*modes, _remote(SESSION, place.probe(WORK))]


def polled(place, name):
    """The mode without the agent, under whatever interval is in force.

    Args:
        place: Place, with POLL served.
        name: str.

    Returns:
        Mode
    """
    place.stand.vm(POLL, "sh", "-c", f"cat > {SCRIPT}", data=_read(f"{place.folder}/{SCRIPT}"), check=True)
    return _remote(name, place.probe(POLL))


def _remote(name, probe):
    words = {"true": ["-n", "true"], "ls": ["-n", "qvm-ls"], "out": ["-n", f"cat /root/{BLOB}"], "in": []}
    return Mode(name, probe, {kind: ["qvm-remote", *rest] for kind, rest in words.items()}, f"/home/user/{SCRIPT}")


def _read(path):
    with open(path, "rb") as file:
        return file.read()
