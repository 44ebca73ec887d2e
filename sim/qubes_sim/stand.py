# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulator with qvm-remote set up in it, by the formula: for the demo, the end-to-end tests and the benchmark."""

import json
import os
import sys
import time

from .handle import Sim
from .hypervisor import LIBRARY, source

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
#: Where the formula is seen in dom0.
FORMULA = "/srv/formulas/base/qvm-remote-formula"
#: What of the source tree the package installs there. Of a checkout there may be much more, and Salt looks at all of it again and again.
PACKAGED = ("_engines", "_modules", "_states", "_utils", "client", "dom0", "qvm-remote-formula", "pillar.example", "FORMULA")
#: Nobody asks for these, and each of Salt's programs would look them up when it starts.
CHEAP_GRAINS = {"enable_fqdns_grains": False, "enable_lspci": False}
FILE_ROOTS = ["/srv/salt", FORMULA, f"{FORMULA}/qvm-remote-formula"]
_MINION = {
    "file_client": "local",
    "id": "dom0",
    "file_roots": {"base": ["/srv/salt"]},
    "pillar_roots": {"base": ["/srv/pillar"]},
    # As in Qubes, whose qubesctl learns from pillar.items what a VM is to get; since 3008.4 Salt would show stars there.
    "pillar_opts": True,
    "pillar_mask_output": False,
    "log_level": "warning",
    **CHEAP_GRAINS,
}
_READY_WAIT = 60
#: Where dom0's Salt is, wherever it is on this machine: a service may not see every place.
_SALT = "/opt/salt"


class Stand(Sim):
    """dom0 with the formula, a template with the client, VMs with keys.

    Args:
        root: str, its folder.
        template: str.
        vms: list of str.
        say: callable of str, told what is done.
        warm: bool, whether dom0's salt-call is forked from a warm interpreter: for tests, which call it again and again.
    """

    def __init__(self, root, template="debian-13", vms=("work", "dev"), say=lambda text: None, warm=False):
        super().__init__(root)
        self._warm = warm
        self._template = template
        self._vms = list(vms)
        self._say = say

    def set_up(self, pillar=None, extra_binds=()):
        """Bring everything up, by pillar and two states, as a user does.

        Args:
            pillar: dict, what stands under ``qvm-remote`` beside the template and the VMs.
            extra_binds: more paths to show in dom0.

        Raises:
            subprocess.CalledProcessError, RuntimeError: a step failed.
        """
        self._say("starting dom0 and the template")
        self.prepare([self._template], extra_binds)
        self.set_pillar({"client": {"templates": [self._template]}, "vms": {vm: {} for vm in self._vms}, **(pillar or {})})
        self._say("dom0: qubesctl saltutil.sync_all")
        self.salt("saltutil.sync_all")
        self._say(f"dom0: qubesctl state.apply qvm-remote.client (installs the client in {self._template})")
        self.salt("state.apply", "qvm-remote.client")
        for vm in self._vms:
            self._say(f"{vm}: started")
            self.create(f"{vm}:{self._template}")
            self.start(vm)
        self._say("dom0: qubesctl state.apply qvm-remote (gives the VMs their keys, configures and starts the service)")
        self.salt("state.apply", "qvm-remote")

    def prepare(self, templates, extra_binds=()):
        """Bring up a dom0 that has Salt and the formula's files, and nothing of it applied.

        Args:
            templates: list of str.
            extra_binds: more paths to show in dom0.
        """
        self.prepare_bare(templates, [*extra_binds, *(f"{ROOT}/{name}:{FORMULA}/{name}" for name in PACKAGED)])
        self.put("/etc/salt/minion", json.dumps({**_MINION, "file_roots": {"base": FILE_ROOTS}}))
        self.put("/srv/pillar/top.sls", json.dumps({"base": {"dom0": ["qvm-remote"]}}))

    def prepare_bare(self, templates, extra_binds=(), vm_binds=()):
        """Bring up a dom0 that has Salt, and never heard of qvm-remote.

        Args:
            templates: list of str.
            extra_binds: more paths to show in dom0.
            vm_binds: paths to show in all VMs.
        """
        venv = os.path.dirname(os.path.dirname(sys.executable))
        salt = sorted({venv, sys.base_prefix} - {"/usr"})
        self.up(templates=templates, dom0_binds=[*salt, f"{venv}:{_SALT}", *extra_binds], vm_binds=[*salt, *vm_binds])
        for name in ("salt-call", "salt-minion"):
            # A virtual environment does not see dom0's Python library by itself.
            self.put(f"/usr/bin/{name}", f"#!/bin/sh\nPYTHONPATH={LIBRARY} exec {_SALT}/bin/python3 {_SALT}/bin/{name} \"$@\"\n", "0755")
        if self._warm:
            self._warm_up()
        self.put(f"{LIBRARY}/salt", venv)
        # A dom0 with Salt has PyYAML, wherever its Python looks for such.
        link = f'ln -s {_SALT}/lib/python3*/site-packages/yaml "$(python3 -c "import site; print(site.getsitepackages()[0])")"'
        self.dom0("sh", "-c", f"python3 -c 'import yaml' 2>/dev/null || {link}", check=True)
        self.put("/etc/salt/minion", json.dumps(_MINION))

    def _warm_up(self):
        program = f"{LIBRARY}/warm_salt.py"
        self.dom0("mv", "/usr/bin/salt-call", f"{LIBRARY}/salt-call", check=True)
        for path in (program, "/usr/bin/salt-call"):
            self.put(path, source("warm_salt.py"), "0755")
        self.dom0("env", f"PYTHONPATH={LIBRARY}", f"{_SALT}/bin/python3", program, f"{_SALT}/bin/salt-call", check=True)

    def set_pillar(self, pillar):
        """Write what stands under ``qvm-remote`` in pillar."""
        self.put("/srv/pillar/qvm-remote.sls", json.dumps({"qvm-remote": pillar}))

    def stop_engine(self):
        """Stop the service."""
        self.dom0("systemctl", "stop", "qvm-remote.service", timeout=120)

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
        said = "".join(f"{vm} says: {answer.stderr.decode('utf-8', 'replace')}" for vm, answer in zip(vms, answers))
        raise RuntimeError(f"the engine does not serve {', '.join(vms)}; {said}; its log ends with:\n{log}")

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

    def put(self, path, text, mode=""):
        """Write a file in dom0.

        Args:
            path: str.
            text: str.
            mode: str, as chmod takes it; empty to leave it as it is.
        """
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1" && { [ -z "$2" ] || chmod "$2" "$1"; }'
        self.dom0("sh", "-c", script, "sh", path, mode, data=text.encode("utf-8"), check=True)
