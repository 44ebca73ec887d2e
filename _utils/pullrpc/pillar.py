# SPDX-License-Identifier: GPL-2.0-or-later
"""What pillar says, checked and made plain: which VMs, which templates, which settings, which service.

Every mistake is one line that names the pillar path and what is allowed there; nothing is guessed, nothing ignored.
The plan holds no key: a key that stands in pillar is asked for by itself (:func:`given_key`) and never leaves Python.
"""

from __future__ import annotations

import dataclasses
import datetime
import re

from .config import check_setting, make_config
from .errors import ConfigError, KeyringError, PillarError, PullError
from .ids import check_vm_name
from .policy import tags_of
from .tokens import parse_key

_ROOT = "qvm-remote"
#: Pillar's words for a limit, and the setting each is.
_LIMITS = {
    "timeout": "timeout_max",
    "command": "command_max",
    "stdin": "stdin_max",
    "output": "output_max",
    "parallel": "parallel",
    "parallel_per_vm": "vm_parallel",
    "queue": "vm_queue",
    "rate": "rate",
    "rate_day": "rate_day",
    "memory": "memory_max",
    "tasks": "tasks_max",
    "cpu_weight": "cpu_weight",
    "files": "nofile",
    "work": "work_max",
}
#: The same for one VM.
_VM_LIMITS = {"timeout": "timeout_max", "stdin": "stdin_max", "parallel": "vm_parallel", "rate": "rate", "rate_day": "rate_day"}
#: Pillar's words for how dom0's user is asked.
_ASK = {"helper": "ask_helper", "timeout": "ask_timeout"}
#: And for how that one is told of refusals.
_NOTIFY = {"refusals": "notify_refusals", "helper": "notify_helper"}
_SIZES = ("command", "stdin", "output", "memory", "work")
_SIZE = re.compile(r"([0-9]{1,15})([KMGT]?)\Z")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
#: Settings that pillar names directly under ``engine``.
_ENGINE = (
    "spool_bytes_max",
    "spool_max_age",
    "ledger_keep_days",
    "discover_interval",
    "poll_wait",
    "answer_wait",
    "agentless_interval",
    "events",
    "stop_grace",
    "key_dir",
    "state_dir",
    "run_dir",
    "audit_log",
    "audit_files",
    "audit_commands_max",
    "audit_keep_days",
    "syslog",
    "path",
    "qvm_run",
    "qvm_ls",
)
_TOP = (
    *("service", "minion", "transport", "max_age", "default_policy", "ask", "notify", "limits", "client", "defaults", "select", "vms"),
    *("unlisted", "clean", "engine"),
)
_VM = ("state", "key", "user", "run_as", "policy", "until", "accept_v1", "rotate_days", *_VM_LIMITS)
_DAYS = (1, 3650)
#: Ways to select VMs that are not named under ``vms``.
_SELECTORS = ("tag", "template", "name")
#: Classes of VMs that may be selected. A disposable's name is given to the next one, which nobody may have meant.
_SELECTED = ("AppVM", "StandaloneVM")
#: Most names in one note.
_NAMED_MAX = 3
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}\Z")
_PATTERN = re.compile(r"[A-Za-z0-9_.*?-]{1,63}\Z")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What pillar wants.

    Attributes:
        settings: dict, for :func:`pullrpc.config.make_config`; what the engine is configured with.
        service: dict: ``running``, ``enable``, ``accept_risk`` (bool).
        minion: dict: ``id`` and ``master`` (str or None) of the minion that runs the engine.
        templates: list of str, which get the client.
        vms: dict of VM name to a dict: ``state`` (present or absent), ``key`` (own, given, generate), ``rotate_days`` (int or None).
        unlisted: str, ``none``, ``keep`` or ``absent``: what becomes of VMs that have a key and are not in this plan.
        clean_logs: bool, whether ``clean`` removes the audit logs too.
        notes: list of str, what may be meant otherwise: a tag or a selection that nobody has, a template among the VMs.
    """

    settings: dict
    service: dict
    minion: dict
    templates: list
    vms: dict
    unlisted: str
    clean_logs: bool
    notes: list


def read_pillar(pillar, list_vms=None):
    """Check pillar and make the plan.

    Args:
        pillar: dict, what stands under ``qvm-remote``.
        list_vms: callable of a list of tags, as :func:`pullrpc.transport.list_vms`; called only where pillar selects or names VMs.

    Returns:
        Plan

    Raises:
        PillarError: something in it is wrong; one line that names the place.
        PullError: the VMs can't be listed.
    """
    _mapping(pillar, "", _TOP)
    _part(pillar, "defaults")
    rules, named = _select_rules(pillar), _named(pillar)
    policies = [own.get("policy") for own in (_part(pillar, "defaults"), *rules, *named.values())]
    tags = {rule["tag"] for rule in rules if "tag" in rule}.union(*map(tags_of, policies))
    there, unseen = _look(list_vms, tags, rules, named)
    selected = _select(pillar, rules, there)
    vms, served = {}, {}
    for vm in sorted({**selected, **named}):
        own = {**selected.get(vm, _part(pillar, "defaults")), **named.get(vm, {})}
        vms[vm] = {
            "state": own.get("state", "present"),
            "key": "given" if _is_digits(own.get("key", "generate")) else own.get("key", "generate"),
            "rotate_days": own.get("rotate_days"),
        }
        # One that is absent is named to the engine all the same, so that it hears that it is refused.
        if vms[vm]["rotate_days"] and vms[vm]["key"] != "generate":
            if "rotate_days" in named.get(vm, {}):
                _fail(f"vms:{vm}:rotate_days", "needs key: generate; a key of the qube's own is changed there, one given in pillar is changed here")
            vms[vm]["rotate_days"] = None
        served[vm] = {"policy": "none"} if vms[vm]["state"] == "absent" else {"key": vms[vm]["key"], **_vm_settings(own)}
    _check_same_keys(named)
    unlisted = _choice(pillar.get("unlisted", "none"), "unlisted", ("none", "keep", "absent"))
    # Whoever is taken out of pillar must not get more by that than it had.
    settings = {**_engine_settings(pillar), "unlisted": "keep" if unlisted == "keep" else "none", "vms": served}
    try:
        make_config(settings)
    except ConfigError as err:
        # What each line allows by itself may still not fit together.
        _fail("", str(err))
    return Plan(
        settings=settings,
        service=_service(pillar),
        minion=_minion(pillar),
        templates=_templates(pillar),
        vms=vms,
        unlisted=unlisted,
        clean_logs=_flag(_part(pillar, "clean", ("logs",)).get("logs", False), "clean:logs"),
        notes=[f"whether pillar's qubes and tags are there can't be told: {unseen}"] if unseen else _notes(there, rules, served),
    )


def given_key(pillar, vm):
    """Fetch a key that stands in pillar.

    Args:
        pillar: dict, what stands under ``qvm-remote``, checked by :func:`read_pillar`.
        vm: str.

    Returns:
        bytes, 64 hex digits; None when pillar has none for this VM.
    """
    key = ((pillar.get("vms") or {}).get(vm) or {}).get("key")
    return key.encode("ascii") if _is_digits(key) else None


def _fail(path, text):
    place = f"{_ROOT}:{path}" if path else _ROOT
    raise PillarError(f"pillar {place}: {text}")


def _mapping(value, path, allowed):
    if value is None:
        return {}
    if not isinstance(value, dict):
        _fail(path, "must be a mapping")
    for name in value:
        if name not in allowed:
            _fail(f"{path}:{_shown(name)}" if path else _shown(name), f"unknown; allowed here: {', '.join(allowed)}")
    return value


def _shown(name):
    """A name from pillar as it may stand in one line of an error; a key that slipped in there is not repeated."""
    text = str(name)
    return text if _WORD.match(text) else "(a name with characters that none here has)"


def _part(pillar, name, allowed=None):
    if name == "defaults":
        return _vm_mapping(pillar.get("defaults"), "defaults", [word for word in _VM if word != "state"])
    return _mapping(pillar.get(name), name, allowed)


def _flag(value, path):
    if not isinstance(value, bool):
        _fail(path, "must be true or false")
    return value


def _choice(value, path, words):
    if value not in words:
        _fail(path, f"must be one of {', '.join(words)}")
    return value


def _setting(name, value, path):
    try:
        check_setting(name, value)
    except ConfigError as err:
        _fail(path, str(err))
    return value


def _size(value, path):
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match:
        return int(match[1]) * _UNITS[match[2]]
    if isinstance(value, bool) or not isinstance(value, int):
        _fail(path, "must be a number of bytes, or one with K, M, G or T behind it (1G)")
    return value


def _engine_settings(pillar):
    settings = {}
    for name in ("transport", "max_age", "default_policy"):
        if name in pillar:
            settings[name] = _setting(name, pillar[name], name)
    for word, value in _part(pillar, "limits", tuple(_LIMITS)).items():
        path = f"limits:{word}"
        settings[_LIMITS[word]] = _setting(_LIMITS[word], _size(value, path) if word in _SIZES else value, path)
    for part, words in (("ask", _ASK), ("notify", _NOTIFY)):
        for word, value in _part(pillar, part, tuple(words)).items():
            settings[words[word]] = _setting(words[word], value, f"{part}:{word}")
    for name, value in _part(pillar, "engine", _ENGINE).items():
        settings[name] = _setting(name, value, f"engine:{name}")
    return settings


def _service(pillar):
    wanted = {"running": True, "enable": False, "accept_risk": False}
    for name, value in _part(pillar, "service", tuple(wanted)).items():
        wanted[name] = _flag(value, f"service:{name}")
    if wanted["enable"] and not wanted["accept_risk"]:
        _fail(
            "service:enable",
            "true lets every authorized qube command dom0 from each boot on, before anybody looks; set service:accept_risk: true with it, or leave it false",
        )
    return wanted


def _minion(pillar):
    wanted = {"id": None, "master": None}
    for name, value in _part(pillar, "minion", tuple(wanted)).items():
        if value is not None and not (isinstance(value, str) and _WORD.match(value)):
            _fail(f"minion:{name}", "must be a name")
        wanted[name] = value
    return wanted


def _templates(pillar):
    names = _part(pillar, "client", ("templates",)).get("templates") or []
    if not isinstance(names, list):
        _fail("client:templates", "must be a list of names")
    for at, name in enumerate(names):
        _vm_name(name, f"client:templates:{at}")
    if len(set(names)) != len(names):
        _fail("client:templates", "names a template twice")
    return names


def _vm_name(name, path):
    try:
        return check_vm_name(name)
    except PullError as err:
        _fail(path, str(err))


def _named(pillar):
    vms = pillar.get("vms")
    if vms is None:
        return {}
    if not isinstance(vms, dict):
        _fail("vms", "must be a mapping of qubes' names to their settings")
    named = {}
    for vm, own in vms.items():
        _vm_name(vm, f"vms:{_shown(vm)}")
        named[vm] = _vm_mapping(own, f"vms:{vm}", _VM)
    return named


def _vm_mapping(own, path, allowed):
    own = _mapping(own, path, tuple(allowed))
    _choice(own.get("state", "present"), f"{path}:state", ("present", "absent"))
    if "key" in own:
        _check_key(own["key"], f"{path}:key")
    for name in ("user", "run_as"):
        if name in own:
            _setting(name, own[name], f"{path}:{name}")
    if "accept_v1" in own:
        _flag(own["accept_v1"], f"{path}:accept_v1")
    if "policy" in own:
        _setting("policy", own["policy"], f"{path}:policy")
    days = own.get("rotate_days")
    if days is not None and (type(days) is not int or not _DAYS[0] <= days <= _DAYS[1]):
        _fail(f"{path}:rotate_days", f"must be a number of days, {_DAYS[0]} to {_DAYS[1]}")
    _vm_settings(own, path)
    return own


def _vm_settings(own, path=""):
    settings = {name: own[name] for name in ("user", "run_as", "accept_v1", "policy") if name in own}
    if "until" in own:
        settings["until"] = _moment(own["until"], f"{path}:until")
    for word, name in _VM_LIMITS.items():
        if word in own:
            value = _size(own[word], f"{path}:{word}") if word in _SIZES else own[word]
            settings[name] = _setting(name, value, f"{path}:{word}")
    return settings


def _moment(value, path):
    """A time of pillar's in seconds since the epoch; Salt's YAML gives it as text, other renderers as a datetime."""
    try:
        moment = value if isinstance(value, datetime.datetime) else datetime.datetime.fromisoformat(re.sub(r"[Zz]\Z", "+00:00", value))
    except (TypeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is None:
        _fail(path, "must be a time with its zone, like 2026-12-31T18:00:00Z or 2026-12-31T18:00:00+01:00")
    # Not 0, which is no end at all; what lies long ago is over.
    return _setting("until", max(1, int(moment.timestamp())), path)


def _is_digits(key):
    return isinstance(key, str) and key not in ("own", "generate")


def _check_key(key, path):
    if key in ("own", "generate"):
        return
    if isinstance(key, int):
        _fail(path, "must be generate, own or 64 hex digits in quotes (without them YAML reads a number)")
    if not isinstance(key, str):
        _fail(path, "must be generate, own or 64 hex digits")
    if path.split(":")[0] != "vms":
        _fail(path, "must be generate or own: a key belongs to one qube, under vms")
    try:
        parse_key(key.encode("utf-8", "surrogatepass"))
    except KeyringError as err:
        _fail(path, f"{err}; or say generate or own")


def _check_same_keys(named):
    seen = {}
    for vm, own in sorted(named.items()):
        if not _is_digits(own.get("key")) or own.get("state") == "absent":
            continue
        first = seen.setdefault(own["key"].strip().lower(), vm)
        if first != vm:
            _fail(f"vms:{vm}:key", f"is also the key of {first}; give each qube its own")


def _select_rules(pillar):
    rules = pillar.get("select")
    if rules is None:
        return []
    if not isinstance(rules, list):
        _fail("select", "must be a list")
    for at, rule in enumerate(rules):
        _check_rule(rule, f"select:{at}")
    return rules


def _look(list_vms, tags, rules, named):
    """Which VMs there are, where pillar says anything of them; and why that can't be told, where nothing but notes depends on it."""
    if list_vms is None:
        if rules:
            _fail("select", "works in dom0 only: nobody else knows the other qubes")
        return None, None
    if not (rules or named):
        return None, None
    try:
        return list_vms(sorted(tags)), None
    except PullError as err:
        if rules:
            raise
        return None, str(err)


def _select(pillar, rules, there):
    defaults, selected = _part(pillar, "defaults"), {}
    for vm in there or ():
        for rule in rules:
            if _fits_rule(rule, vm):
                own = {name: value for name, value in rule.items() if name not in _SELECTORS}
                selected[vm["name"]] = {**selected.get(vm["name"], defaults), **own}
    return selected


def _notes(there, rules, served):
    """What is no mistake by itself, and seldom meant: a rule that fits nobody forbids nothing."""
    if there is None:
        return []
    users = {}
    for vm, own in served.items():
        for tag in tags_of(own.get("policy")):
            users.setdefault(tag, []).append(vm)
    had = {tag for vm in there for tag in vm["tags"]}
    notes = [f"no qube has the tag {tag}, which rules of {_some(vms)} name" for tag, vms in sorted(users.items()) if tag not in had]
    for at, rule in enumerate(rules):
        if not any(_fits_rule(rule, vm) for vm in there):
            notes.append(f"select:{at} fits no qube")
    for vm in there:
        if vm["name"] in served and vm["class"] == "TemplateVM":
            notes.append(f"{vm['name']} is a template: the access is its own, not that of the qubes based on it; name these instead")
        elif vm["name"] in served and vm["for_disposables"]:
            notes.append(f"{vm['name']} is a template of disposables: each of them gets a copy of its key")
    return notes


def _some(names):
    return ", ".join(names[:_NAMED_MAX]) + (f" and {len(names) - _NAMED_MAX} others" if len(names) > _NAMED_MAX else "")


def _check_rule(rule, path):
    if not isinstance(rule, dict) or not any(name in rule for name in _SELECTORS):
        _fail(path, f"must be a mapping with one or more of {', '.join(_SELECTORS)} (all of them have to fit), and settings")
    for name in _SELECTORS:
        allowed = _WORD if name == "tag" else _PATTERN
        if name in rule and not (isinstance(rule[name], str) and allowed.match(rule[name])):
            _fail(f"{path}:{name}", "must be a name" if name == "tag" else "must be a name; * and ? match any characters and any one")
    allowed = (*_SELECTORS, *(word for word in _VM if word != "state"))
    _mapping(rule, path, allowed)
    _vm_mapping({name: value for name, value in rule.items() if name not in _SELECTORS}, path, allowed)


def _fits_rule(rule, vm):
    # What a template of disposables has in its home, its key too, each disposable gets a copy of.
    if vm["class"] not in _SELECTED or vm["for_disposables"]:
        return False
    if "tag" in rule and rule["tag"] not in vm["tags"]:
        return False
    if "template" in rule and not _fits(rule["template"], vm["template"]):
        return False
    return "name" not in rule or _fits(rule["name"], vm["name"])


def _fits(pattern, name):
    # Not fnmatch: its [...] is nothing that a name here can hold, and its case depends on the system.
    return re.fullmatch("".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in pattern), name) is not None
