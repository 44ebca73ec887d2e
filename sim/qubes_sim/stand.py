# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulator with qvm-remote set up in it, by the formula: for the demo, the end-to-end tests and the benchmark."""

import json
import os
import subprocess
import sys
import time

from .handle import Sim

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
#: Where the source tree is seen in dom0: as an installed formula.
FORMULA = "/srv/formulas/base/qvm-remote-formula"
FILE_ROOTS = [FORMULA, f"{FORMULA}/qvm-remote-formula"]
_MINION = {"file_client": "local", "id": "dom0", "file_roots": {"base": FILE_ROOTS}, "pillar_roots": {"base": ["/srv/pillar"]}, "log_level": "warning"}
_READY_WAIT = 60


class Stand(Sim):
    """dom0 with the formula, a template with the client, VMs with keys.

    Args:
        root: str, its folder.
        template: str.
        vms: list of str.
        say: callable of str, told what is done.
    """

    def __init__(self, root, template="debian-13", vms=("work", "dev"), say=lambda text: None):
        super().__init__(root)
        self._template = template
        self._vms = list(vms)
        self._say = say
        self._minion = None

    def set_up(self, engine=None, extra_binds=()):
        """Bring everything up but the engine.

        Args:
            engine: dict, settings of the engine.
            extra_binds: more paths to show in dom0.

        Raises:
            subprocess.CalledProcessError, RuntimeError: a step failed.
        """
        self._say("starting dom0 and the template")
        venv = os.path.dirname(os.path.dirname(sys.executable))
        binds = {venv, sys.base_prefix, *extra_binds} - {"/usr"}
        self.up(templates=[self._template], dom0_binds=[*sorted(binds), f"{ROOT}:{FORMULA}"])
        for name in ("salt-call", "salt-minion"):
            self.dom0("ln", "-s", os.path.join(venv, "bin", name), f"/usr/bin/{name}", check=True)
        pillar = {"qvm-remote": {"engine": engine or {}, "client": {"templates": [self._template]}, "vms": {vm: {} for vm in self._vms}}}
        self.put("/etc/salt/minion", json.dumps(_MINION))
        self.put("/srv/pillar/top.sls", json.dumps({"base": {"*": ["qvm-remote"]}}))
        self.put("/srv/pillar/qvm-remote.sls", json.dumps(pillar))
        self._say("dom0: qubesctl saltutil.sync_all")
        self.salt("saltutil.sync_all")
        self._say(f"dom0: qubesctl state.apply qvm-remote.client (installs the client in {self._template})")
        self.salt("state.apply", "qvm-remote.client")
        for vm in self._vms:
            self._say(f"{vm}: qvm-remote key gen")
            self.create(f"{vm}:{self._template}")
            self.start(vm)
            self.vm(vm, "qvm-remote", "key", "gen", check=True)
        self._say("dom0: qubesctl state.apply qvm-remote (configures the engine, authorizes the VMs)")
        self.salt("state.apply", "qvm-remote")
        self.dom0("salt-call", "--local", "-c", "/etc/qubes/remote", "saltutil.sync_all", timeout=120, check=True)

    def start_engine(self, environment=()):
        """Start the minion with the engine in dom0, and wait until it serves all VMs.

        Args:
            environment: ``NAME=VALUE`` words for the minion.
        """
        self._say("dom0: salt-minion -c /etc/qubes/remote (the engine)")
        self._minion = self.popen_dom0(
            "env", *environment, "salt-minion", "-c", "/etc/qubes/remote", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.wait_served(*self._vms)

    def stop_engine(self):
        """Stop the minion as a service manager does, and wait for its end."""
        if self._minion is not None:
            self._minion.terminate()
            # Salt itself takes some 10 s to end; the engine in it less than one.
            self._minion.wait(60)
            self._minion = None

    def wait_served(self, *vms, seconds=_READY_WAIT):
        """Wait until the engine has a session to each of some VMs.

        Raises:
            RuntimeError: it hasn't, in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answers = [self.vm(vm, "qvm-remote", "-q", "ping") for vm in vms]
            if all(answer.returncode == 0 for answer in answers):
                return
            time.sleep(0.2)
        log = self.dom0("tail", "-n", "40", "/var/log/qvm-remote/minion.log").stdout.decode("utf-8", "replace")
        raise RuntimeError(f"the engine does not serve {', '.join(vms)}; its log ends with:\n{log}")

    def salt(self, *words, timeout=180):
        """Run qubesctl in dom0.

        Returns:
            the answer's data.

        Raises:
            RuntimeError: it failed; the text is what it said.
        """
        done = self.dom0("qubesctl", "--out=json", "--retcode-passthrough", *words, timeout=timeout)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr).decode("utf-8", "replace"))
        return json.loads(done.stdout)["local"]

    def put(self, path, text):
        """Write a file in dom0."""
        self.dom0("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat > "$1"', "sh", path, data=text.encode("utf-8"), check=True)
