# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's settings: defaults, types, bounds. An unknown or wrong setting is an error, never ignored:
a misspelt limit must not become no limit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re

from .errors import ConfigError, PullError
from .helper import SCREEN
from .ids import check_vm_name
from .policy import FULL, NONE, check_policy

_MIB = 1 << 20
#: What a setting must be, in words for whoever writes YAML.
_TYPES = {int: "a whole number, without quotes", bool: "true or false, without quotes", str: "text"}
_YAML_WORD = " (YAML reads no, on, yes as true or false: put it in quotes)"
#: (lowest, highest) of each whole-number setting.
_BOUNDS = {
    "timeout_max": (1, 604800),
    "max_age": (5, 3600),
    "command_max": (1, _MIB),
    "stdin_max": (0, 1 << 30),
    "output_max": (1024, 1 << 30),
    "spool_bytes_max": (_MIB, 1 << 40),
    "spool_max_age": (60, 30 * 86400),
    "ledger_keep_days": (1, 3650),
    "audit_files": (1, 1000),
    "audit_commands_max": (2 * _MIB, 1 << 40),
    "audit_keep_days": (1, 3650),
    "parallel": (1, 256),
    "vm_parallel": (1, 256),
    "vm_queue": (1, 1024),
    "poll_wait": (1, 300),
    "answer_wait": (1, 300),
    "discover_interval": (1, 3600),
    # In less than the longest a qube can't be removed, made anew under its name and started, unseen between two turns.
    "agentless_interval": (1, 10),
    "stop_grace": (0, 8),
    "memory_max": (16 * _MIB, 1 << 50),
    "tasks_max": (8, 1 << 20),
    "cpu_weight": (1, 10000),
    "nofile": (64, 1 << 20),
    # A script has to fit in, too.
    "work_max": (2 * _MIB, 1 << 40),
    "until": (0, 1 << 40),
    "ask_timeout": (5, 3600),
    "rate": (1, 1000000),
    "rate_day": (1, 100000000),
}
#: Words that a setting may have.
_CHOICES = {
    "transport": ("qvm-run", "qubesadmin"),
    "key": ("own", "given", "generate"),
    "default_policy": (FULL, NONE),
    "unlisted": ("keep", NONE),
    "events": ("ends", "all"),
}
#: A Linux user's name (useradd's rule, without the trailing dollar sign).
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}\Z")
#: Characters of a path that neither a shell nor a unit file reads in a way of its own.
_PATH = re.compile(r"/[A-Za-z0-9_.+/-]*\Z")
#: Settings that name a program which shows dom0's user something.
_HELPERS = ("ask_helper", "notify_helper")
#: Folders that are made, kept and removed with qvm-remote, and so must be its own.
_OWN_FOLDERS = ("key_dir", "state_dir", "run_dir")
#: Settings that only make sense for one VM, and those that a VM may have of its own, under ``vms``.
_ONLY_PER_VM = ("accept_v1", "key", "policy", "run_as", "until", "user")
_PER_VM = ("timeout_max", "stdin_max", "vm_parallel", "rate", "rate_day", *_ONLY_PER_VM)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings. Sizes are bytes, times seconds, unless a name says otherwise.

    Attributes:
        key_dir: folder of the keys, one ``<vm>.key`` each.
        state_dir: ledger and spool; must survive a reboot.
        run_dir: lock and sandboxes; must not survive one.
        audit_log: the audit log; its head and whole commands lie beside it.
        audit_files: how many files of it are kept after their rotation.
        audit_commands_max, audit_keep_days: how many bytes of whole commands are kept (the oldest of the VM with most go first), and for how long.
        syslog: whether the system's log is told of each line (not of the command), where there is one.
        transport: ``qvm-run``, or ``qubesadmin`` (the library, which starts no Python program for each session).
        qvm_run, qvm_ls: programs, found through PATH.
        timeout_max: longest a command may run.
        max_age: furthest a command id's time may be from dom0's clock, either way.
        command_max, stdin_max: largest request.
        output_max: most that is kept of stdout and of stderr each.
        spool_bytes_max: most that is kept on disk for one VM.
        spool_max_age: how long a result waits for its VM.
        ledger_keep_days: how long a used id is remembered.
        parallel, vm_parallel: most commands running, in all and for one VM.
        vm_queue: most commands of one VM accepted and waiting.
        poll_wait: how long a poll may wait in the VM.
        answer_wait: how long any other answer may take.
        discover_interval: how often running VMs are listed.
        agentless_interval: how often a VM without the agent is asked.
        rate, rate_day: most commands of one VM accepted within a minute, and within a day.
        ask_helper: the program that puts questions to dom0's user, or ``screen`` for the one that comes with qvm-remote.
        ask_timeout: how long that user has to answer.
        notify_refusals: whether that user is told on the screen of what is refused, and of questions that ran out of time.
        notify_helper: the program that shows it, or ``screen`` for the one that comes with qvm-remote.
        events: ``ends`` (how commands ended, sessions, keys) or ``all`` (each step of a command, too).
        stop_grace: how long running commands may go on once the engine is told to stop.
        memory_max, tasks_max, cpu_weight, nofile, work_max: limits of one command.
        path: PATH of commands.
        accept_v1: take the tokens of qvm-remote 1.x, which do not bind the command; per VM only.
        key: where the VM's key comes from: ``own`` (the VM made it), ``given`` (from pillar), ``generate`` (dom0 makes it, and
            the engine hands it over again when the VM lost it); per VM only.
        user: who runs the agent in the VM, and whose home has the queue; per VM only.
        run_as: dom0's user as whom the VM's commands are run (see pullrpc.accounts); per VM only.
        default_policy: ``full`` or ``none``, for VMs without a policy.
        unlisted: ``keep`` or ``none``: whether a VM that has a key and isn't under ``vms`` has the default policy, or may run nothing.
        policy: what the VM may have run (see pullrpc.policy), empty for the default; per VM only.
        until: when the VM's access ends, seconds since the epoch, 0 for never; per VM only.
        vms: settings per VM; a VM named here is served (and refused, while it has no key).
    """

    key_dir: str = "/etc/qubes/remote.d"
    state_dir: str = "/var/lib/qvm-remote"
    run_dir: str = "/run/qvm-remote"
    audit_log: str = "/var/log/qvm-remote/audit.log"
    audit_files: int = 12
    audit_commands_max: int = 64 * _MIB
    audit_keep_days: int = 90
    syslog: bool = True
    transport: str = "qvm-run"
    qvm_run: str = "qvm-run"
    qvm_ls: str = "qvm-ls"
    timeout_max: int = 300
    max_age: int = 300
    command_max: int = _MIB
    stdin_max: int = 16 * _MIB
    output_max: int = 10 * _MIB
    spool_bytes_max: int = 512 * _MIB
    spool_max_age: int = 86400
    ledger_keep_days: int = 90
    parallel: int = 8
    vm_parallel: int = 4
    vm_queue: int = 64
    poll_wait: int = 240
    answer_wait: int = 20
    discover_interval: int = 5
    agentless_interval: int = 2
    rate: int = 6000
    rate_day: int = 100000
    ask_helper: str = SCREEN
    ask_timeout: int = 60
    notify_refusals: bool = False
    notify_helper: str = SCREEN
    events: str = "ends"
    stop_grace: int = 3
    memory_max: int = 1024 * _MIB
    tasks_max: int = 512
    cpu_weight: int = 100
    nofile: int = 4096
    work_max: int = 256 * _MIB
    path: str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    accept_v1: bool = False
    key: str = "own"
    user: str = "user"
    run_as: str = "root"
    default_policy: str = FULL
    unlisted: str = "keep"
    policy: str | dict = ""
    until: int = 0
    vms: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        # No setting, so that it is none of the fields; the instance is frozen all the same.
        object.__setattr__(self, "_of_vm", {})

    @property
    def policy_in_force(self):
        """The VM's policy, or the default one."""
        return self.policy or self.default_policy

    def for_vm(self, vm):
        """The settings that hold for one VM.

        Args:
            vm: str.

        Returns:
            Config, without the other VMs' settings: it changes when this VM's do, and only then.
        """
        # Asked for several times for each command.
        if vm not in self._of_vm:
            own = self.vms.get(vm, {"policy": NONE} if self.unlisted == NONE else {})
            self._of_vm[vm] = dataclasses.replace(self, **{**own, "vms": {}})
        return self._of_vm[vm]


def make_config(settings=None):
    """Check settings and fill in defaults.

    Args:
        settings: dict, as from pillar or an engine's arguments; None for all defaults.

    Returns:
        Config

    Raises:
        ConfigError: a setting is unknown, of the wrong type, or out of range; the text names it.
    """
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigError("the settings of qvm-remote must be a mapping")
    for name in _ONLY_PER_VM:
        if name in settings:
            raise ConfigError(f"{name} is set for single VMs only, under vms: NAME")
    _check_settings(settings, "")
    clean = dict(settings)
    clean["vms"] = _check_vms(settings.get("vms"))
    config = Config(**clean)
    for vm in ("", *config.vms):
        own = config.for_vm(vm)
        needed = 2 * own.output_max + own.stdin_max
        if needed > own.spool_bytes_max:
            where = f"vms: {vm}: " if vm else ""
            raise ConfigError(
                f"{where}a command may leave up to {needed} bytes (output_max twice, and stdin_max; in pillar limits:output and limits:stdin): "
                "spool_bytes_max must be at least that (in pillar engine:spool_bytes_max)"
            )
    return config


def engine_settings(minion):
    """Find the engine's settings in a minion's configuration.

    Args:
        minion: dict.

    Returns:
        dict, not checked; None when it has no such engine.
    """
    for engine in minion.get("engines") or []:
        if isinstance(engine, dict) and "qvm_remote" in engine:
            return engine["qvm_remote"] or {}
    return None


def digest(config):
    """Name a whole configuration, to tell it from another.

    Args:
        config: Config.

    Returns:
        str, hex.
    """
    return hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode("ascii")).hexdigest()


def _check_vms(vms):
    if vms is None:
        return {}
    if isinstance(vms, (list, tuple)):
        vms = {vm: {} for vm in vms}
    if not isinstance(vms, dict):
        raise ConfigError("vms must be a mapping of VM names to their settings, or a list of VM names")
    for vm, own in vms.items():
        try:
            check_vm_name(vm)
        except PullError as err:
            raise ConfigError(f"vms: {vm!r} is {err}") from None
        if own is not None and not isinstance(own, dict):
            raise ConfigError(f"vms: {vm}: must be a mapping of settings")
        for name in own or {}:
            if name not in _PER_VM:
                raise ConfigError(f"vms: {vm}: {name!r} is no setting of a VM; those are {', '.join(_PER_VM)}")
        _check_settings(own or {}, f"vms: {vm}: ")
    return {vm: dict(own or {}) for vm, own in vms.items()}


def check_setting(name, value):
    """Check one setting.

    Args:
        name: str.
        value: whatever it was set to.

    Raises:
        ConfigError: it is none, or its value can't be; the text does not name it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Config) if field.name != "vms"}
    if name not in defaults:
        raise ConfigError("is no setting of qvm-remote")
    if name == "policy":
        check_policy(value)
        return
    wanted = type(defaults[name])
    # bool is an int in Python; 'parallel: true' is a mistake all the same.
    if type(value) is not wanted:
        raise ConfigError(f"must be {_TYPES[wanted]}{_YAML_WORD if wanted is str and isinstance(value, bool) else ''}")
    if name in _BOUNDS and not _BOUNDS[name][0] <= value <= _BOUNDS[name][1]:
        raise ConfigError(f"must lie between {_BOUNDS[name][0]} and {_BOUNDS[name][1]}")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ConfigError(f"must be one of {', '.join(_CHOICES[name])}")
    if name == "user" and not _USER.match(value):
        raise ConfigError("must be the name of a user in the qube (small letters, digits, - and _)")
    if name == "run_as" and not _USER.match(value):
        raise ConfigError("must be the name of a user of dom0 (small letters, digits, - and _)")
    if isinstance(value, str) and (not value or "\n" in value or "\0" in value):
        raise ConfigError("must be one line of text")
    if name in _HELPERS and value != SCREEN and not _PATH.match(value):
        raise ConfigError(f"must be {SCREEN}, or the absolute path of a program")
    if name in (*_OWN_FOLDERS, "audit_log") and not (_PATH.match(value) and os.path.normpath(value) == value and not value.startswith("//")):
        raise ConfigError("must be an absolute path of letters, digits, '_', '.', '+' and '-', without '..' and '//'")
    if name == "key_dir" and f"{value}/".startswith("/srv/"):
        raise ConfigError("must not lie under /srv: management VMs get a copy of it")
    if name in _OWN_FOLDERS and value != defaults[name] and "qvm-remote" not in os.path.basename(value):
        raise ConfigError(f"must be a folder of its own, with qvm-remote in its name (as in {os.path.join(os.path.dirname(value), 'qvm-remote')})")


def _check_settings(settings, where):
    for name, value in settings.items():
        if name == "vms":
            continue
        try:
            check_setting(name, value)
        except ConfigError as err:
            # repr: a name that is no setting's may hold anything.
            shown = name if name in {field.name for field in dataclasses.fields(Config)} else repr(name)
            raise ConfigError(f"{where}{shown} {err}") from None
