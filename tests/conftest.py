# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests share: the import paths, and a simulator with the formula applied and the engine in a real salt-minion."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import hypothesis
import pytest
from saltfactories.daemons.minion import SaltMinion

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, folder) for folder in ("_utils", "client", "sim", "tests/security")]

# What is started in the background by a shell ignores these, and so would all that tests start.
for _number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

# No test asserts on time, and this machine may have other things to do.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")

from qubes_sim.stand import CHEAP_GRAINS, FILE_ROOTS, PACKAGED, Stand  # noqa: E402

#: Settings of the engine under test: waits are short, so that tests of time limits are.
ENGINE = {"discover_interval": 1, "poll_wait": 5, "answer_wait": 6, "max_age": 60, "events": "all"}
#: The same in pillar's words; the engine runs in a minion of the tests' own, not in the service.
PILLAR = {"service": {"running": False}, "max_age": 60, "engine": {name: ENGINE[name] for name in ("discover_interval", "poll_wait", "answer_wait", "events")}}


def copy_formula(folder):
    """Put the formula's files into a folder, as its package does.

    Returns:
        list of str, Salt's file roots.
    """
    for name in PACKAGED:
        source, target = os.path.join(ROOT, name), os.path.join(folder, name)
        if os.path.isdir(source):
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    return [folder, os.path.join(folder, "qvm-remote-formula")]


def pytest_unconfigure():
    """Salt logs once more when the interpreter ends, to streams that pytest has closed; nothing is to follow its summary."""
    logging.raiseExceptions = False


class Dom0Minion(SaltMinion):
    """A masterless minion inside the simulated dom0: nothing there can reach the test run, so it is watched through the VMs."""

    @classmethod
    def write_config(cls, config):
        """Write the configuration without what connects a minion to the test run."""
        kept = {key: value for key, value in config.items() if key not in ("engines_dirs", "log_handlers_dirs")}
        kept["engines"] = [engine for engine in config["engines"] if engine != "pytest"]
        if config.get("file_client") == "local":
            # Only now: these are dom0's folders, and pytest-salt-factories makes those that it knows of on this machine.
            kept["file_roots"] = {"base": FILE_ROOTS}
        return super().write_config(kept)

    def get_check_events(self):
        """There is no event to wait for: no master hears it."""
        return []


class Dom0(Stand):
    """The stand of the tests, with the engine in a minion that pytest-salt-factories runs."""

    def attach(self, salt_factories, folder, engine):
        """Configure the minion."""
        wrapper = os.path.join(folder, "salt_minion_in_dom0.py")
        with open(wrapper, "w", encoding="utf-8") as file:
            words = self.command("dom0", "--", "env", f"PATH={folder}/path:/usr/bin:/usr/sbin", "salt-minion")
            file.write(f"import os, sys\nwords = {words!r} + sys.argv[1:]\nos.execv(words[0], words)\n")
        overrides = {"master_type": "disable", "file_client": "local", "user": "root", "engines": [{"qvm_remote": engine}], **CHEAP_GRAINS}
        self.factory = salt_factories.salt_minion_daemon(
            "dom0", factory_class=Dom0Minion, overrides=overrides, start_timeout=180, max_start_attempts=1
        )
        self.factory.script_name = wrapper
        self.call("saltutil.sync_all")

    def start_engine(self):
        """Start the minion; return once both VMs are served."""
        self.factory.start()
        self.wait_served("work", "dev")

    def stop_engine(self):
        """Stop the minion as a service manager does."""
        if self.is_running():
            self.dom0("pkill", "-TERM", "-f", "salt-minion")
            self.factory.terminate()

    def kill_engine(self):
        """Kill all of the minion at once, as the kernel does when memory is short."""
        self.dom0("pkill", "-KILL", "-f", "salt-minion")
        self.factory.terminate()

    def is_running(self):
        """Whether a minion runs in dom0."""
        return self.dom0("pgrep", "-f", "salt-minion").returncode == 0

    def call(self, *words, data=b"", timeout=120):
        """Run salt-call in dom0 with the minion's configuration.

        Returns:
            (int, data): exit code, and what it answered, or its text if that isn't JSON.
        """
        folder = os.path.dirname(self.factory.config["conf_file"])
        done = self.dom0("salt-call", "--local", "-c", folder, "--out=json", *words, data=data, timeout=timeout)
        try:
            return done.returncode, json.loads(done.stdout)["local"]
        except ValueError:
            return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")

    def remote(self, *words, vm="work", data=None, timeout=60):
        """Run qvm-remote in a VM."""
        return self.vm(vm, "qvm-remote", *words, data=data, timeout=timeout)

    def python(self, program, *words, vm="work", timeout=60):
        """Run a Python program in a VM, with the client's library importable; it prints JSON."""
        head = "import sys; sys.path.insert(0, '/usr/lib/qvm-remote')\n"
        done = self.vm(vm, "/usr/bin/python3", "-", *words, data=(head + textwrap.dedent(program)).encode(), timeout=timeout)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)


@pytest.fixture(scope="session")
def salt_factories_config(tmp_path_factory):
    """Where pytest-salt-factories keeps its minions: in a folder of this test run."""
    return {"root_dir": str(tmp_path_factory.mktemp("salt")), "code_dir": ROOT, "inject_sitecustomize": False}


@pytest.fixture(scope="session")
def stand(tmp_path_factory, salt_factories):
    """dom0, a template with the client, the VMs work and dev with keys; no engine yet."""
    folder = str(tmp_path_factory.mktemp("stand"))
    # Shown in dom0, and no more than that: beside it lies the simulator itself.
    shared = os.path.join(folder, "dom0")
    os.makedirs(os.path.join(shared, "path"))
    one = Dom0(os.path.join(folder, "sim"), warm=True)
    try:
        one.set_up(PILLAR, extra_binds=[f"{shared}:{shared}:rw", f"{salt_factories.root_dir}:{salt_factories.root_dir}:rw"])
        one.folder = shared
        one.attach(salt_factories, shared, ENGINE)
        yield one
        one.stop_engine()
    finally:
        one.down()


@pytest.fixture
def dom0(stand):
    """The stand with the engine running and both VMs served."""
    # One program for both: this is before each test, and nearly always there is nothing to do.
    if subprocess.run(stand.command("start", "work", "dev"), capture_output=True, check=False).returncode:
        for vm in ("work", "dev"):
            if subprocess.run(stand.command("start", vm), capture_output=True, check=False).returncode:
                stand.unpause(vm)
    if not stand.is_running():
        stand.start_engine()
    stand.wait_served("work", "dev")
    return stand
