# SPDX-License-Identifier: GPL-2.0-or-later
"""Is everything of qvm-remote in dom0 as it should be: each finding is one line, and what to type where it isn't.

It mends nothing, and asks running VMs no more than which version of qvm-remote they have. A check that fails in an
unforeseen way is a finding, and keeps no other from being made.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import time

from . import __version__, audit_read, ledger_report, note
from .accounts import describe_account
from .audit_tail import recent
from .config import digest, engine_settings, make_config
from .dom0 import shared
from .errors import PullError
from .handover import ALTERED, LOST, PENDING
from .helper import SCREEN
from .lock import is_held
from .package import COMMAND_PATHS, code_digest, command_files, command_is_installed
from .policy import FULL, tags_of
from .provision import versions
from .transport import running_vms, uuids, vms_with_tag

OK, NOTE, PROBLEM = "ok", "note", "problem"
_PARTS = (
    *("code", "service", "transport", "keys", "VMs", "policy", "questions", "clients", "ledger", "audit log", "spool", "disk", "clock"),
    "logrotate",
)
_UNIT = "qvm-remote.service"
#: Where the unit lies when it is to be there after a reboot, and when it isn't.
_UNITS = ("/etc/systemd/system", "/run/systemd/system")
_APPLY = "qubesctl state.apply qvm-remote"
_SYNC = f"qubesctl saltutil.sync_all refresh=true && {_APPLY}"
_SETUP = re.compile(r"^Environment=QVM_REMOTE_SETUP=([0-9a-f]+)$", re.MULTILINE)
#: Less room than this on a disk stops the work soon, or will before long, bytes.
_ROOM_MIN, _ROOM_LOW = 64 << 20, 512 << 20
#: The share of a VM's room in the spool from which on it is worth a note.
_SPOOL_FULL = 0.8
#: How far dom0's clock may be behind what was logged last, seconds.
_CLOCK_SLACK = 60
_ASK_WAIT = 30


def examine(minion, config_dir):
    """Examine the installation.

    Args:
        minion: dict, the configuration of the service's minion; empty when there is none.
        config_dir: str, the folder where it lies.

    Returns:
        list of dict: ``part`` (what was looked at), ``level`` (ok, note or problem), ``text`` (one sentence), ``mend`` (what to type or
        to write; empty where nothing is to be done).
    """
    examination = _Examination(minion, config_dir)
    if examination.look("configuration", examination.configuration):
        for part in _PARTS:
            examination.look(part, getattr(examination, part.replace(" ", "_").lower()))
    return examination.findings


class _Examination:
    """The checks, in the order of their telling; each notes what it finds."""

    def __init__(self, minion, config_dir):
        self.findings = []
        self._minion = minion
        self._config_dir = config_dir
        self._part = ""
        self._dom0 = self._config = None
        self._running = set()

    def look(self, part, check):
        """Make one check.

        Returns:
            bool, whether it could be made.
        """
        self._part = part
        try:
            check()
        except (PullError, OSError, subprocess.SubprocessError) as err:
            where = f"{err.filename}: {err.strerror}" if isinstance(err, OSError) and err.filename else str(err)
            self._problem(where, "")
            return False
        return True

    def _note(self, text, mend=""):
        self._find(NOTE, text, mend)

    def _problem(self, text, mend):
        self._find(PROBLEM, text, mend)

    def _ok(self, text):
        """Said when the present check has found nothing else."""
        if not any(finding["part"] == self._part for finding in self.findings):
            self._find(OK, text, "")

    def _find(self, level, text, mend):
        self.findings.append({"part": self._part, "level": level, "text": audit_read.shown(text), "mend": mend})

    def configuration(self):
        """The engine's settings, and who may read them."""
        path = os.path.join(self._config_dir, "minion")
        settings = engine_settings(self._minion)
        if settings is None:
            raise PullError(f"{path} configures no engine; write pillar, then type: {_APPLY}")
        self._config = make_config(settings)
        self._dom0 = shared(settings)
        if not _is_roots_alone(path):
            self._problem(f"{path} must belong to root, mode 0600", f"chown root {path} && chmod 0600 {path}")
        self._ok(f"{path} can be used")

    def code(self):
        """Is the code that Salt has, and the command's, what lies in the file roots."""
        roots = (self._minion.get("file_roots") or {}).get("base") or []
        sources = [root for root in roots if os.path.isdir(os.path.join(root, "_utils", "pullrpc"))]
        if not sources:
            self._problem("the formula's files are in none of Salt's file roots", "see README, Install it on Qubes OS")
            return
        wanted = code_digest(roots, "_")
        for name, root in (("the service's Salt", self._minion.get("extension_modules")), ("qubesctl's Salt", "/var/cache/salt/minion/extmods")):
            if root and os.path.isdir(root) and code_digest([root]) != wanted:
                self._problem(f"{name} has another version of the code than {sources[0]}", _SYNC)
        if not command_is_installed(command_files(os.path.join(sources[-1], "dom0"), os.path.join(sources[-1], "_utils", "pullrpc"))):
            self._problem(f"{COMMAND_PATHS[0]} is of another version than {sources[-1]}, or not installed", f"{_APPLY}.dom0")
        self._ok(f"version {__version__}, all of it from {sources[0]}")

    def service(self):
        """Does the service run, under the present settings and as its unit says."""
        units = [path for path in (os.path.join(folder, _UNIT) for folder in _UNITS) if os.path.exists(path)]
        if not units:
            self._problem("there is no service: it is gone after a reboot, or was never applied", _APPLY)
            return
        if _systemctl("is-active", _UNIT) or not is_held(self._config.run_dir):
            self._problem("the service does not run: nobody is served", f"systemctl start {_UNIT}; if it ends again: less {self._minion.get('log_file')}")
            return
        if _systemctl("is-enabled", _UNIT) == 0:
            self._note("it starts at each boot, before anybody looks", "qvm-remote-dom0 disable")
        told = note.read(self._config)
        with open(units[0], encoding="utf-8", errors="replace") as file:
            setup = _SETUP.search(file.read())
        if told.get("settings") != digest(self._config):
            self._problem("it works under other settings than the present ones", f"systemctl reload {_UNIT}")
        if setup and told.get("setup") != setup[1]:
            self._problem("it was started as another unit, minion or code than the present one", f"systemctl restart {_UNIT}")
        if not any(finding["level"] == PROBLEM for finding in self.findings if finding["part"] == self._part):
            self._find(OK, "it runs, as configured", "")

    def transport(self):
        """Can VMs be reached."""
        for program in {self._config.qvm_run, self._config.qvm_ls}:
            if shutil.which(program) is None:
                self._problem(f"{program} is not found through PATH", "qubes-dom0-update qubes-core-admin-client; or set engine: qvm_run, qvm_ls in pillar")
        self._running = running_vms(self._config)
        self._ok(f"{self._config.transport} works; {len(self._running)} VMs run")

    def keys(self):
        """Who may read the keys, and is each of them good."""
        folder = self._config.key_dir
        known = self._dom0.keyring.fingerprints()
        if os.path.isdir(folder) and not known:
            # Asked for by the check of a key otherwise.
            self._dom0.keyring.check_folder()
        for vm, shown in known.items():
            if "problem" in shown:
                self._problem(f"{vm} is refused: {shown['problem']}", f"ls -l {folder}; a new key: qvm-remote-dom0 revoke {vm}, then {_APPLY}.vm")
                continue
            seen = self._dom0.handover.known(vm)
            if seen in (LOST, ALTERED):
                self._problem(f"the key in {vm} is {seen}", f"{_APPLY}.vm")
            elif seen == PENDING or "next" in shown:
                self._note(f"{vm} gets its key when it runs next")
        others = self._dom0.keyring.strangers()
        if others:
            self._note(f"{folder} holds files that are no keys: {', '.join(others[:5])}", "remove them")
        self._ok(f"{len(known)} keys, each of them root's alone and no two the same" if known else "no VM has a key")

    def vms(self):
        """Are there the VMs that have keys, and are they those that the keys are for."""
        there = uuids(self._config)
        for vm in self._dom0.keyring.names():
            if self._dom0.keyring.bound(vm) not in ("", there.get(vm, "")) and vm in there:
                mend = f"{_APPLY}.vm gives it a key of its own; if it is the same, restored from a backup: qubesctl qvm_remote.bind {vm}"
                self._problem(f"{vm} is another qube than the one that the key of this name is for, and is refused", mend)
            elif vm not in there:
                before = f"remove it from pillar (vms: {vm}), then: " if vm in self._config.vms else ""
                self._problem(f"there is no qube {vm}, and it has a key", f"{before}qvm-remote-dom0 revoke {vm}")
        gone = sorted(set(self._config.vms) - set(there) - set(self._dom0.keyring.names()))
        if gone:
            self._note(f"there is no such qube: {', '.join(gone)}", f"remove it from pillar (vms: {gone[0]})")
        self._ok("each of those that have keys is there")

    def policy(self):
        """Who may run what."""
        vms = self._dom0.keyring.names()
        full = [vm for vm in vms if self._config.for_vm(vm).policy_in_force == FULL]
        ended = [vm for vm in vms if 0 < self._config.for_vm(vm).until <= time.time()]
        if full:
            mend = f"in pillar: qvm-remote: vms: {full[0]}: policy: ..., or for all: default_policy: none"
            named = [f"{vm} as {describe_account(self._config.for_vm(vm).run_as)}" for vm in full]
            self._note(f"may run anything in dom0 (policy: full): {', '.join(named)}", mend)
        if ended:
            self._note(f"the access has ended of: {', '.join(ended)}", f"qvm-remote-dom0 revoke {ended[0]}; or another until in pillar")
        users = {}
        for vm in {*vms, *self._config.vms}:
            for tag in tags_of(self._config.for_vm(vm).policy_in_force):
                users.setdefault(tag, []).append(vm)
        for tag, named in sorted(users.items()):
            if not vms_with_tag(tag):
                mend = f"qvm-tags VM add {tag}; or in pillar: the right name of the tag"
                self._note(f"no qube has the tag {tag}, which rules of {', '.join(sorted(named))} name: they fit nothing, what they deny included", mend)
        self._ok("no VM may run whatever it likes")

    def questions(self):
        """Can dom0's user be asked, and told, where that is to be done."""
        config = self._config
        asking = sorted(vm for vm in {*config.vms, *self._dom0.keyring.names()} if _asks(config.for_vm(vm).policy_in_force))
        for word, wanted, setting, program, become in (
            ("ask", bool(asking), config.ask_helper, "zenity", f"every question of {', '.join(asking)} is a no"),
            ("notify", config.notify_refusals, config.notify_helper, "notify-send", "nobody is told of what is refused"),
        ):
            if not wanted or _can_be_run(program if setting == SCREEN else setting):
                continue
            missing = f"{program}, which shows it on the screen, is not here" if setting == SCREEN else f"{setting} is not there, or can't be run"
            package = "libnotify" if word == "notify" else program
            own = f"a program of yours, in pillar: qvm-remote: {word}: helper"
            self._problem(f"{missing}: {become}", f"qubes-dom0-update {package}; or {own}" if setting == SCREEN else f"ls -l {setting}; or {own}")
        self._ok("who is to be asked or told can be" if asking or config.notify_refusals else "nobody is to be asked or told")

    def clients(self):
        """Which version of the client do running VMs have."""
        asked = sorted(self._running & set(self._dom0.keyring.names()))
        for vm, version in versions(self._config, [vm for vm in asked if not self._config.for_vm(vm).accept_v1]).items():
            if isinstance(version, PullError):
                self._problem(f"{vm} does not answer: {version}", f"qvm-run --pass-io {vm} 'qvm-remote status'")
            elif version is None:
                self._note(f"{vm} has no qvm-remote: its commands are polled for", "name its template in pillar, qvm-remote: client: templates, apply, restart it")
            elif version != __version__:
                self._note(f"{vm} has version {version} of qvm-remote, dom0 {__version__}", f"{_APPLY}.client, then restart {vm}")
        self._ok(f"{len(asked)} running VMs have version {__version__}" if asked else "no VM that has a key runs")

    def ledger(self):
        """Is the ledger sound."""
        found = ledger_report.look(self._dom0)
        for text in found["problems"]:
            self._problem(text, found["next"])
        self._ok(f"it is sound and knows {sum(found['commands'].values())} commands")

    def audit_log(self):
        """Is the audit log whole."""
        config = self._config
        found = audit_read.verify(config.audit_log, config.audit_files)
        for text in found["problems"]:
            self._problem(text, "somebody was at the log: compare it with the system's log, where each line has its digest")
        self._ok(f"{found['lines']} lines in {len(found['files'])} files, none is missing or changed")

    def spool(self):
        """Is there room for each VM's results."""
        for vm in {*self._config.vms, *self._dom0.keyring.names()}:
            config, (used, _) = self._config.for_vm(vm), self._dom0.spool.used(vm)
            if used + 2 * config.output_max > config.spool_bytes_max:
                self._problem(f"no more commands are taken from {vm}: {used} bytes of results wait for it", f"start {vm}: it gets them")
            elif used > _SPOOL_FULL * config.spool_bytes_max:
                self._note(f"{used} bytes of results wait for {vm}, of {config.spool_bytes_max} at most", f"start {vm}: it gets them")
        self._ok("there is room for results")

    def disk(self):
        """Is there room on the disks."""
        seen = set()
        for path in (self._config.state_dir, os.path.dirname(self._config.audit_log), self._config.run_dir):
            while not os.path.isdir(path):
                path = os.path.dirname(path)
            if os.stat(path).st_dev in seen:
                continue
            seen.add(os.stat(path).st_dev)
            room = os.statvfs(path)
            free = room.f_bavail * room.f_frsize
            if free < _ROOM_MIN or (room.f_files and not room.f_favail):
                self._problem(f"the disk of {path} is full: {free >> 20} MiB are free; what can't be recorded is not run", f"du -xh --max-depth=3 {path}")
            elif free < _ROOM_LOW:
                self._note(f"the disk of {path} has {free >> 20} MiB left", f"du -xh --max-depth=3 {path}")
        self._ok("there is room")

    def clock(self):
        """Was dom0's clock set back: requests would be stale, temporary access longer."""
        times = [line["time"] for line in recent(self._config.audit_log) if isinstance(line.get("time"), str)]
        limit = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + _CLOCK_SLACK))
        if times and max(times)[:19] > limit:
            self._problem(f"dom0's clock is behind what was logged at {max(times)}", "date; set the clock, for example: qvm-sync-clock")
        self._ok("it is not behind what was logged last")

    def logrotate(self):
        """Is the audit log rotated."""
        path = "/etc/logrotate.d/qvm-remote"
        if not os.path.exists(path):
            self._note(f"there is no {path}: the audit log grows on", f"qubes-dom0-update logrotate; {_APPLY}.dom0")
        self._ok(f"{path} is there")


def _asks(policy):
    return isinstance(policy, dict) and bool(policy.get("ask"))


def _can_be_run(program):
    return shutil.which(program) is not None


def _is_roots_alone(path):
    info = os.stat(path, follow_symlinks=False)
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o077


def _systemctl(*words):
    done = subprocess.run(["systemctl", *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_WAIT, check=False)
    return done.returncode
