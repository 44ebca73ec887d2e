# SPDX-License-Identifier: GPL-2.0-or-later
"""Pillar: what it may say, what becomes of it, and that a mistake is one line which names the place."""

import dataclasses
import datetime
import os

import pytest
import salt.utils.yaml
from pullrpc.config import Config, make_config
from pullrpc.errors import PillarError, TransportError
from pullrpc.pillar import given_key, read_pillar

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
KEY = "4f1d2c3b5a69788796a5b4c3d2e1f00112233445566778899aabbccddeeff001"
VMS = [
    {"name": "dom0", "class": "AdminVM", "template": "", "tags": [], "for_disposables": False},
    {"name": "fedora-41", "class": "TemplateVM", "template": "", "tags": ["remote"], "for_disposables": False},
    {"name": "work", "class": "AppVM", "template": "fedora-41", "tags": ["remote"], "for_disposables": False},
    {"name": "dev", "class": "AppVM", "template": "fedora-41", "tags": [], "for_disposables": False},
    {"name": "web", "class": "AppVM", "template": "debian-13", "tags": ["remote", "slow"], "for_disposables": False},
    {"name": "fedora-41-dvm", "class": "AppVM", "template": "fedora-41", "tags": ["remote"], "for_disposables": True},
    {"name": "disp7", "class": "DispVM", "template": "fedora-41-dvm", "tags": ["remote"], "for_disposables": False},
]


def _list_vms(tags):
    return [{**vm, "tags": [tag for tag in vm["tags"] if tag in tags]} for vm in VMS]


@pytest.mark.parametrize(
    ("pillar", "place", "allowed"),
    [
        ({"limit": {}}, "limit:", "allowed here: service, minion, transport"),
        ({"limits": {"timeouts": 5}}, "limits:timeouts:", "allowed here: timeout, command"),
        ({"limits": {"parallel": -1}}, "limits:parallel:", "between 1 and 256"),
        ({"limits": {"timeout": True}}, "limits:timeout:", "must be a whole number"),
        ({"limits": {"memory": "1 GB"}}, "limits:memory:", "a number of bytes, or one with K, M, G or T"),
        ({"limits": {"memory": "1K"}}, "limits:memory:", "must lie between"),
        ({"limits": [1]}, "limits:", "must be a mapping"),
        ({"max_age": "300"}, "max_age:", "must be a whole number, without quotes"),
        ({"default_policy": False}, "default_policy:", "must be text (YAML reads no, on, yes as true or false: put it in quotes)"),
        ({"notify": {"refusals": "yes"}}, "notify:refusals:", "must be true or false, without quotes"),
        ({"transport": "qrexec"}, "transport:", "one of qvm-run, qubesadmin"),
        ({"service": {"running": "yes"}}, "service:running:", "true or false"),
        ({"service": {"enable": True}}, "service:enable:", "set service:accept_risk: true"),
        ({"minion": {"master": "a b"}}, "minion:master:", "must be a name"),
        ({"client": {"templates": "fedora-41"}}, "client:templates:", "must be a list"),
        ({"client": {"templates": ["fedora-41", "dom0"]}}, "client:templates:1:", "not a VM's name"),
        ({"client": {"templates": ["a", "a"]}}, "client:templates:", "twice"),
        ({"vms": ["work"]}, "vms:", "must be a mapping"),
        ({"vms": {"dom0": {}}}, "vms:dom0:", "never dom0"),
        ({"vms": {"my vm": {}}}, "vms:", "not a VM's name"),
        ({"vms": {"work": {"keys": "generate"}}}, "vms:work:keys:", "allowed here: state, key, user"),
        ({"vms": {"work": {"key": "made"}}}, "vms:work:key:", "64 hex digits"),
        ({"vms": {"work": {"key": KEY[:-1]}}}, "vms:work:key:", "63 characters"),
        ({"vms": {"work": {"key": int("1" * 64)}}}, "vms:work:key:", "in quotes"),
        ({"vms": {"work": {"key": "0" * 64}}}, "vms:work:key:", "not random"),
        ({"vms": {"work": {"key": KEY}, "dev": {"key": KEY.upper()}}}, "vms:work:key:", "is also the key of dev"),
        ({"vms": {"work": {"state": "gone"}}}, "vms:work:state:", "one of present, absent"),
        ({"vms": {"work": {"timeout": 0}}}, "vms:work:timeout:", "between 1 and"),
        ({"vms": {"work": {"user": "a; b"}}}, "vms:work:user:", "name of a user"),
        ({"vms": {"work": {"accept_v1": 1}}}, "vms:work:accept_v1:", "true or false"),
        ({"vms": {"work": {"rotate_days": 0}}}, "vms:work:rotate_days:", "1 to 3650"),
        ({"vms": {"work": {"key": "own", "rotate_days": 5}}}, "vms:work:rotate_days:", "needs key: generate"),
        ({"vms": {"work": {"key": KEY, "rotate_days": 5}}}, "vms:work:rotate_days:", "needs key: generate"),
        ({"defaults": {"key": "own"}, "vms": {"work": {"rotate_days": 5}}}, "vms:work:rotate_days:", "needs key: generate"),
        ({"defaults": {"state": "absent"}}, "defaults:state:", "allowed here: key, user"),
        ({"defaults": {"key": KEY}}, "defaults:key:", "belongs to one qube"),
        ({"select": [{"timeout": 5}]}, "select:0:", "one or more of tag, template, name"),
        ({"select": [{"tag": "a", "colour": "red"}]}, "select:0:colour:", "allowed here: tag, template, name"),
        ({"select": [{"tag": "a*"}]}, "select:0:tag:", "must be a name"),
        ({"unlisted": "revoke"}, "unlisted:", "one of none, keep, absent"),
        ({"clean": {"logs": "all"}}, "clean:logs:", "true or false"),
        ({"engine": {"key_dir": "/srv/keys"}}, "engine:key_dir:", "must not lie under /srv"),
        ({"engine": {"key_dir": "/etc/../srv/keys"}}, "engine:key_dir:", "without '..'"),
        ({"engine": {"key_dir": "//srv/keys"}}, "engine:key_dir:", "without '..' and '//'"),
        ({"engine": {"run_dir": "/run/qvm-remote x"}}, "engine:run_dir:", "letters, digits"),
        ({"engine": {"audit_log": "/var/log/%n.log"}}, "engine:audit_log:", "letters, digits"),
        ({"engine": {"state_dir": "/var"}}, "engine:state_dir:", "as in /qvm-remote"),
        ({"default_policy": "some"}, "default_policy:", "one of full, none"),
        ({"vms": {"work": {"policy": "some"}}}, "vms:work:policy:", "must be full, none, or a mapping"),
        ({"vms": {"work": {"policy": {}}}}, "vms:work:policy:", "must be full, none, or a mapping"),
        ({"vms": {"work": {"policy": {"alow": []}}}}, "vms:work:policy:", "alow is unknown; must be full, none, or a mapping with allow, ask and deny"),
        ({"vms": {"work": {"policy": {KEY: []}}}}, "vms:work:policy:", "one of its names is unknown"),
        ({"vms": {"work": {"policy": {"allow": "observe"}}}}, "vms:work:policy:", "must be a list"),
        ({"vms": {"work": {"policy": {"allow": ["watch"]}}}}, "vms:work:policy:", "allow, rule 1: a name must be observe"),
        ({"vms": {"work": {"policy": {"allow": [["qvm-ls"], ["*"]]}}}}, "vms:work:policy:", "allow, rule 2: the first word must be the program"),
        ({"vms": {"work": {"policy": {"allow": [["qvm-prefs", "work", "memory", 400]]}}}}, "vms:work:policy:", "numbers, and on, yes, true and their like, in quotes"),
        ({"vms": {"work": {"policy": {"deny": [["qvm-ls", "**", "x"]]}}}}, "vms:work:policy:", "only be the last word"),
        ({"vms": {"work": {"policy": {"deny": [["qvm-start", "@tag:"]]}}}}, "vms:work:policy:", "needs a tag's name"),
        ({"vms": {"work": {"policy": {"allow": [{"manage": "a b"}]}}}}, "vms:work:policy:", "must be manage: TAG"),
        # Each of these would fit nothing, and as a deny let everything through.
        ({"vms": {"work": {"policy": {"deny": [["qvm-shutdown", "de*"]]}}}}, "vms:work:policy:", "deny, rule 1: 'de*': patterns are not known here"),
        ({"vms": {"work": {"policy": {"deny": [["qvm-shutdown", "sys-?"]]}}}}, "vms:work:policy:", "'sys-?': patterns are not known here"),
        ({"vms": {"work": {"policy": {"deny": [["qvm-shutdown", "sys-[n]et"]]}}}}, "vms:work:policy:", "* is any one word"),
        ({"vms": {"work": {"policy": {"ask": [["qvm-ls", "--all", "*.log"]]}}}}, "vms:work:policy:", "'*.log': patterns are not known here"),
        ({"vms": {"work": {"policy": {"deny": [["qvm-kill", "***"]]}}}}, "vms:work:policy:", "'***': patterns are not known here"),
        ({"vms": {"work": {"policy": {"deny": [["qvm-kill", "@anyvm"]]}}}}, "vms:work:policy:", "'@anyvm': patterns are not known here; * is any one word, @tag:NAME"),
        ({"vms": {"work": {"policy": {"deny": [["qvm-kill", "@tags:a"]]}}}}, "vms:work:policy:", "a qube with that tag"),
        ({"vms": {"work": {"until": "2026-12-31"}}}, "vms:work:until:", "a time with its zone"),
        ({"vms": {"work": {"until": "2026-12-31T18:00:00"}}}, "vms:work:until:", "a time with its zone"),
        ({"vms": {"work": {"until": 5}}}, "vms:work:until:", "a time with its zone"),
        ({"vms": {"work": {"until": None}}}, "vms:work:until:", "a time with its zone"),
        ({"limits": {"output": "300M"}}, "", "limits:output and limits:stdin): spool_bytes_max must be at least that (in pillar engine:spool_bytes_max)"),
        ({"vms": {"work": {"stdin": "500M"}}}, "", "vms: work: a command may leave"),
        ({"engine": {"timeout_max": 5}}, "engine:timeout_max:", "allowed here: spool_bytes_max"),
        ("work", "", "must be a mapping"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place_and_what_is_allowed(pillar, place, allowed):
    with pytest.raises(PillarError) as caught:
        read_pillar(pillar, _list_vms)
    text = str(caught.value)
    assert text.startswith(f"pillar qvm-remote:{place}" if place else "pillar qvm-remote: ")
    assert allowed in text
    assert "\n" not in text
    # Not even a wrong key is repeated: it may be the right one of another qube.
    assert KEY[:20] not in text.lower()


def test_a_key_in_the_wrong_place_is_not_repeated():
    with pytest.raises(PillarError) as caught:
        read_pillar({"vms": {"work": {KEY: "key"}}}, _list_vms)
    assert KEY not in str(caught.value)


def test_the_plan_holds_no_key():
    pillar = {"vms": {"dev": {"key": KEY}, "work": {}}}
    plan = read_pillar(pillar)
    assert KEY not in repr(plan)
    assert {vm: own["key"] for vm, own in plan.vms.items()} == {"dev": "given", "work": "generate"}
    assert given_key(pillar, "dev") == KEY.encode()
    assert given_key(pillar, "work") is None


def test_words_become_settings():
    pillar = {
        "transport": "qubesadmin",
        "max_age": 60,
        "limits": {"memory": "1G", "output": "5M", "parallel_per_vm": 2, "command": 1000},
        "defaults": {"user": "alice"},
        "vms": {"work": {"timeout": 60, "parallel": 1}, "old": {"state": "absent"}},
    }
    config = make_config(read_pillar(pillar).settings)
    assert (config.transport, config.max_age, config.memory_max, config.output_max) == ("qubesadmin", 60, 1 << 30, 5 << 20)
    work, other = config.for_vm("work"), config.for_vm("other")
    assert (work.timeout_max, work.vm_parallel, work.user, work.key) == (60, 1, "alice", "generate")
    assert (other.timeout_max, other.vm_parallel) == (300, 2)
    # Still named to the engine, so that it hears that it is refused.
    assert "old" in config.vms


def test_vms_are_selected_by_tag_template_and_name_and_their_own_entry_wins():
    pillar = {
        "defaults": {"timeout": 10},
        "select": [{"tag": "remote", "timeout": 20}, {"template": "debian-*", "name": "w?b", "timeout": 30}],
        "vms": {"dev": {"parallel": 1}, "web": {"user": "bob"}},
    }
    plan = read_pillar(pillar, _list_vms)
    assert sorted(plan.vms) == ["dev", "web", "work"]
    assert {vm: own["timeout_max"] for vm, own in plan.settings["vms"].items()} == {"dev": 10, "web": 30, "work": 20}
    assert plan.settings["vms"]["web"]["user"] == "bob"


def test_a_tag_and_a_selection_that_nobody_has_and_a_template_among_the_vms_are_said():
    rules = {"allow": ["observe", {"manage": "remote"}], "deny": [["qvm-kill", "@tag:nosuchtag"]]}
    pillar = {
        "select": [{"name": "w*"}, {"tag": "agnet", "policy": "none"}],
        "vms": {"dev": {"policy": rules}, "fedora-41": {}, "fedora-41-dvm": {}, "work": {"policy": rules}},
    }
    assert read_pillar(pillar, _list_vms).notes == [
        "no qube has the tag nosuchtag, which rules of dev, work name",
        "select:1 fits no qube",
        "fedora-41 is a template: the access is its own, not that of the qubes based on it; name these instead",
        "fedora-41-dvm is a template of disposables: each of them gets a copy of its key",
    ]
    assert read_pillar({"vms": {"dev": {"policy": rules}}}).notes == []


def test_qubes_that_can_not_be_listed_cost_a_note_and_a_selection_by_them_the_plan():
    def fail(tags):
        raise TransportError("qvm-ls ended with exit code 1")

    assert read_pillar({"vms": {"dev": {}}}, fail).notes == ["whether pillar's qubes and tags are there can't be told: qvm-ls ended with exit code 1"]
    assert read_pillar({}, fail).notes == []
    with pytest.raises(TransportError):
        read_pillar({"select": [{"name": "*"}]}, fail)


def test_neither_templates_nor_disposables_nor_their_templates_are_selected():
    assert sorted(read_pillar({"select": [{"name": "*"}]}, _list_vms).vms) == ["dev", "web", "work"]


def test_an_absent_vm_stays_absent_though_its_tag_selects_it():
    plan = read_pillar({"select": [{"tag": "remote"}], "vms": {"work": {"state": "absent"}}}, _list_vms)
    assert plan.vms["work"]["state"] == "absent"
    assert plan.vms["web"]["state"] == "present"


def test_the_example_has_every_setting_with_its_default():
    with open(os.path.join(_ROOT, "pillar.example"), encoding="utf-8") as file:
        example = salt.utils.yaml.safe_load(file)["qvm-remote"]
    plan = read_pillar(example, _list_vms)
    known = {field.name: field.default for field in dataclasses.fields(Config) if field.name not in ("accept_v1", "key", "policy", "run_as", "until", "user", "vms")}
    # By pillar whoever it does not name may do nothing; without pillar whoever was authorized by hand has the default policy.
    assert {name: value for name, value in plan.settings.items() if name != "vms"} == {**known, "unlisted": "none"}
    empty = read_pillar({})
    assert (plan.service, plan.minion, plan.unlisted, plan.clean_logs) == (empty.service, empty.minion, empty.unlisted, empty.clean_logs)
    assert make_config(plan.settings).for_vm("builder").timeout_max == 3600


def test_days_of_rotation_for_all_hold_for_those_whose_key_dom0_makes():
    plan = read_pillar({"defaults": {"rotate_days": 90}, "vms": {"dev": {"key": KEY}, "laptop": {"key": "own"}, "work": {}}})
    assert {vm: own["rotate_days"] for vm, own in plan.vms.items()} == {"dev": None, "laptop": None, "work": 90}


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"vms": {}},
        {"vms": {"work": {}}},
        {"defaults": {"policy": "full"}},
        {"select": [{"tag": "gone"}]},
        {"vms": {"dev": {"state": "absent"}}},
        {"unlisted": "absent"},
    ],
)
def test_whoever_is_taken_out_of_pillar_may_run_nothing(left):
    before = {"vms": {"dev": {"policy": {"allow": ["observe"]}, "run_as": "nobody", "until": "2026-12-31T18:00:00Z"}}}
    assert make_config(read_pillar(before).settings).for_vm("dev").policy_in_force != "none"
    assert make_config(read_pillar(left, _list_vms).settings).for_vm("dev").policy_in_force == "none"


def test_whoever_is_kept_has_the_default_policy():
    assert make_config(read_pillar({"unlisted": "keep"}).settings).for_vm("dev").policy_in_force == "full"
    assert make_config(read_pillar({"unlisted": "keep", "default_policy": "none"}).settings).for_vm("dev").policy_in_force == "none"
    assert make_config().for_vm("dev").policy_in_force == "full"


def test_no_disposable_is_selected():
    named = (("disp1234", "DispVM"), ("work", "AppVM"))
    listed = [{"name": name, "class": klass, "template": "fedora-41-dvm", "tags": [], "for_disposables": False} for name, klass in named]
    assert list(read_pillar({"select": [{"template": "fedora-*"}]}, lambda tags: listed).vms) == ["work"]


def test_an_end_of_access_is_a_moment_wherever_its_zone_is():
    texts = ("2026-12-31T18:00:00Z", "2026-12-31T19:00:00+01:00", "2026-12-31T18:00+00:00")
    ends = {read_pillar({"vms": {"work": {"until": text}}}).settings["vms"]["work"]["until"] for text in texts}
    assert ends == {int(datetime.datetime(2026, 12, 31, 18, tzinfo=datetime.timezone.utc).timestamp())}
    # What is over is over, however long it has been: 0 would be no end.
    for text in ("1970-01-01T00:00:00Z", "1970-01-01T01:00:00+01:00", "1970-01-01T00:00:00.900Z", "1969-01-01T00:00:00Z", "0001-01-01T00:00:00Z"):
        assert read_pillar({"vms": {"work": {"until": text}}}).settings["vms"]["work"]["until"] == 1
    read = salt.utils.yaml.safe_load("{vms: {work: {until: 2026-12-31T18:00:00Z}}}")
    assert {read_pillar(read).settings["vms"]["work"]["until"]} == ends
