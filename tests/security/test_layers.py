# SPDX-License-Identifier: GPL-2.0-or-later
"""The layers are independent: each is taken away by itself, is seen to be gone, and all others still hold."""

import contextlib
import json
import os
import subprocess

import pytest
from pullrpc import execution, gate, intake, sandbox
from pullrpc.audit import AuditLog
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import AuditError, Refused
from pullrpc.ids import new_cid
from pullrpc.tokens import make_token

_FORGED = b"v2 10 shell - " + b"0" * 64 + b"\n"


class _World:
    """dom0's side with a VM that has rules, everything in a folder of this test."""

    def __init__(self, folder):
        names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "audit.log"}
        folders = {name: str(folder / name_there) for name, name_there in names.items()}
        rules = {"allow": [["echo", "**"], ["sh", "**"]]}
        self.dom0 = Dom0(make_config({**folders, "timeout_max": 30, "vms": {"work": {"policy": rules}}}))
        self.dom0.keyring.put("work", os.urandom(32).hex())

    def sign(self, line, cid=None, form="shell"):
        """A request as the client makes it."""
        cid = cid or new_cid()
        return "work", cid.encode(), line, make_token(self.dom0.keyring.get("work"), "work", cid, 5, form, line)

    def run(self, request):
        """Bring a request to its end.

        Returns:
            (str, bytes): how it ended, and its stdout.
        """
        admitted = self.dom0.intake.admit(*request, -1)
        refused = self.dom0.intake.claim([(admitted, 0)])
        if refused:
            raise refused[admitted.cid]
        status = self.dom0.execution.execute("work", admitted.cid)["status"]
        out = b"".join(self.dom0.results.result("work", admitted.cid)[1]["out"][1](0))
        self.dom0.results.close_delivery("work", admitted.cid)
        return status, out

    def code(self, request):
        """Why a request is refused; None when it runs."""
        try:
            self.run(request)
        except Refused as refused:
            return refused.code
        return None

    # What each layer is there for, as a question with yes for "it holds".

    def authenticates(self):
        """A request that nobody signed is refused."""
        vm, cid, line, _ = self.sign(b"echo forged")
        return self.code((vm, cid, line, _FORGED)) == "token"

    def validates(self):
        """Control characters are refused although they are signed."""
        return self.code(self.sign(b"echo \x1b[2J")) == "bytes"

    def is_at_most_once(self):
        """What was run is refused when it is shown again."""
        request = self.sign(b"echo once")
        self.run(request)
        return self.code(request) == "replay"

    def keeps_to_rules(self):
        """What no rule allows is refused."""
        return self.code(self.sign(b"touch /nowhere/file")) == "policy"

    def confines(self):
        """A command has nothing of dom0's environment, and what it leaves behind is ended."""
        os.environ["LAYERS_TEST"] = "seen"
        marker = f"31{os.getpid()}"
        _, out = self.run(self.sign(f"sh -c 'echo $LAYERS_TEST; setsid sleep {marker} & exit 0'".encode()))
        left = subprocess.run(["pgrep", "-fx", f"sleep {marker}"], capture_output=True, check=False).returncode == 0
        subprocess.run(["pkill", "-fx", f"sleep {marker}"], check=False)
        return out == b"\n" and not left

    def records(self):
        """What runs is recorded; what can't be recorded when it is taken in, or when it is to begin, does not run."""
        request = self.sign(b"echo recorded")
        self.run(request)
        with open(self.dom0.config.audit_log, encoding="ascii") as file:
            lines = [json.loads(line) for line in file]
        is_recorded = any(line["what"] == "run" and line["id"] == request[1].decode() for line in lines)
        return is_recorded and not any(self._runs_unrecorded(when) for when in ("taken in", "begun"))

    def _runs_unrecorded(self, when):
        """Whether a command is taken in, or runs, although from then on nothing can be written to the log."""
        log, mark = self.dom0.config.audit_log, os.path.join(self.dom0.config.state_dir, f"ran-{when[:2]}")
        request = self.sign(f"sh -c 'echo > {mark}'".encode())
        admitted = self.dom0.intake.admit(*request, -1)
        if when == "begun":
            assert self.dom0.intake.claim([(admitted, 0)]) == {}
        with _nothing_is_written_to(log), contextlib.suppress(AuditError, Refused):
            if when == "taken in" and admitted.cid not in self.dom0.intake.claim([(admitted, 0)]):
                return True
            self.dom0.execution.execute("work", admitted.cid)
        return os.path.exists(mark)


@contextlib.contextmanager
def _nothing_is_written_to(log):
    """Whoever is root may write to any file, but to no folder."""
    os.rename(log, f"{log}.away")
    os.mkdir(log)
    try:
        yield
    finally:
        os.rmdir(log)
        os.rename(f"{log}.away", log)


_HOLDS = ("authenticates", "validates", "is_at_most_once", "keeps_to_rules", "confines", "records")


def _no_authentication(monkeypatch):
    monkeypatch.setattr(gate, "token_matches", lambda *_: True)


def _no_validation(monkeypatch):
    monkeypatch.setattr(gate, "check_command", lambda raw, limit: raw.decode())
    # Rules read no line with such a character: here only the words matter.
    monkeypatch.setattr(gate, "split_plain", lambda line: tuple(line.replace("\x1b", "").replace("'", "").split(" ", 2)))


def _no_policy(monkeypatch):
    for module in (intake, execution):
        monkeypatch.setattr(module, "check_policy", lambda config, ledger, tagged, request, now=None: request)


class _Unconfined:
    """A command as any program would start it."""

    def __init__(self, job):
        with open(job.out_path, "wb") as out, open(job.err_path, "wb") as err:
            self._code = subprocess.run(job.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=False).returncode
        self._size = os.path.getsize(job.out_path)

    def wait(self):
        """As the sandbox's handle has it."""
        return sandbox.Outcome(self._code, None, False, False, self._size, 0, False, False, 0.0)

    def cancel(self):
        """It has ended."""


def _no_sandbox(monkeypatch):
    monkeypatch.setattr(sandbox, "start", lambda job, limits, on_output=None: _Unconfined(job))


def _no_audit(monkeypatch):
    for name in ("write", "write_all"):
        monkeypatch.setattr(AuditLog, name, lambda *_, **__: None)


_LAYERS = {
    "authenticates": _no_authentication,
    "validates": _no_validation,
    "keeps_to_rules": _no_policy,
    "confines": _no_sandbox,
    "records": _no_audit,
}


@pytest.mark.parametrize("gone", sorted(_LAYERS))
def test_without_a_layer_all_others_hold(tmp_path, monkeypatch, gone):
    world = _World(tmp_path)
    for layer in _HOLDS:
        assert getattr(world, layer)(), layer
    _LAYERS[gone](monkeypatch)
    held = {layer: _asks(world, layer) for layer in _HOLDS}
    sandbox.close_idle()
    assert held == {layer: layer != gone for layer in _HOLDS}


def _asks(world, layer):
    try:
        return bool(getattr(world, layer)())
    except (AuditError, FileNotFoundError):
        return False
