# SPDX-License-Identifier: GPL-2.0-or-later
"""Execution module, states and engine through Salt's own loader, with everything synced as qubesctl does."""

import ast
import contextlib
import hmac
import json
import os
import time

import pullrpc.config
import pullrpc.dom0
import pullrpc.lock
import pullrpc.note
import pytest
import salt.config
import salt.loader
from conftest import ROOT, copy_formula
from pullrpc.ids import new_cid
from pullrpc.outcomes import OUTCOMES
from pullrpc.tokens import fingerprint, make_token
from saltfactories.utils.functional import Loaders


@pytest.fixture(scope="module")
def loaders(tmp_path_factory):
    """Salt's loaders with the formula's modules."""
    root = str(tmp_path_factory.mktemp("minion"))
    opts = salt.config.minion_config(None)
    opts.update(root_dir=root, cachedir=os.path.join(root, "cache"), extension_modules=os.path.join(root, "extmods"))
    opts.update(file_client="local", file_roots={"base": copy_formula(os.path.join(root, "formula"))}, id="dom0", pillar_roots={"base": []})
    # It syncs everything by itself, and empties the cache each time it is reset: so extmods lie elsewhere.
    return Loaders(opts)


@pytest.fixture(autouse=True)
def _names_anew(loaders):
    """Another test may have given a name to another qube, and names are kept for some seconds."""
    loaders.context.pop("qvm_remote.uuids", None)


@pytest.fixture
def settings(tmp_path):
    """Settings of an engine that keeps everything in a folder of this test."""
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "log/audit.log"}
    # There is no qubesd here. Of these none runs.
    qvm_ls = tmp_path / "qvm-ls"
    rows = "".join(f"{vm}|6f1f0f3c-0000-4000-8000-{at:012}\n" for at, vm in enumerate(("work", "dev", "old")))
    qvm_ls.write_text(f"#!/bin/sh\ncase \"$*\" in *name,uuid*) printf '{rows}';; esac\n")
    qvm_ls.chmod(0o700)
    return {"qvm_ls": str(qvm_ls), **{name: str(tmp_path / folder) for name, folder in names.items()}}


@pytest.fixture
def key(tmp_path):
    """A key, and a file that holds it."""
    raw = os.urandom(32)
    path = tmp_path / "key"
    path.write_text(raw.hex() + "\n")
    return raw, str(path)


def test_authorize_shows_the_fingerprint_that_the_vm_shows(loaders, settings, key):
    assert loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings) == {"vm": "work", "fingerprint": fingerprint(key[0]), "known": False}
    assert loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings)["known"] is True
    assert loaders.modules.qvm_remote.keys(config=settings) == {"work": {"fingerprint": fingerprint(key[0])}}
    assert os.stat(os.path.join(settings["key_dir"], "work.key")).st_mode & 0o777 == 0o600
    assert os.stat(settings["key_dir"]).st_mode & 0o777 == 0o700


def test_nobody_is_authorized_for_whom_gets_a_name_later_unless_that_is_said(loaders, settings, key):
    for test in (True, False):
        for state in (loaders.states.qvm_remote.authorized, loaders.states.qvm_remote.key_present):
            ret = state("wrok", key="generate", settings=settings, test=test)
            assert (ret.result, ret.changes) == (False, {})
            assert ret.comment == "there is no qube wrok; mend its name in pillar (vms: wrok), or remove it there if the qube was removed"
    with pytest.raises(salt.exceptions.CommandExecutionError, match="there is no qube wrok, so that nobody was authorized"):
        loaders.modules.qvm_remote.authorize("wrok", key_file=key[1], config=settings)
    with pytest.raises(salt.exceptions.CommandExecutionError, match="there is no qube wrok"):
        loaders.modules.qvm_remote.generate("wrok", config=settings)
    assert loaders.modules.qvm_remote.keys(config=settings) == {}
    assert loaders.modules.qvm_remote.authorize("wrok", key_file=key[1], config=settings, in_advance=True)["vm"] == "wrok"
    ret = loaders.states.qvm_remote.authorized("wrok", key="generate", settings=settings)
    assert (ret.result, ret.comment.endswith("; it has a key: qvm-remote-dom0 revoke wrok")) == (False, True)


def test_pillar_without_qvm_remote_and_pillar_that_can_not_be_read_are_problems(loaders, monkeypatch):
    assert loaders.modules.qvm_remote.plan()["problem"].startswith("dom0's pillar has no qvm-remote; is it in /srv/pillar")
    assert loaders.modules.qvm_remote.plan()["vms"] == {}
    module = loaders.modules.qvm_remote.plan.__globals__
    for content in ({}, None):
        monkeypatch.setitem(module, "__pillar__", {"qvm-remote": content})
        assert "problem" not in loaders.modules.qvm_remote.plan()
    errors = ["Rendering SLS 'qvm-remote' failed, render error: a line with a key in it"]
    monkeypatch.setitem(module, "__pillar__", {"qvm-remote": {}, "_errors": errors})
    assert loaders.modules.qvm_remote.plan() == {
        "problem": "Salt can't read dom0's pillar, and applies nothing; what is wrong there says: qubesctl pillar.items"
    }


def test_doctor_by_salt_says_what_an_apply_says_of_pillar(loaders, monkeypatch):
    module = loaders.modules.qvm_remote.doctor.__globals__
    monkeypatch.setitem(module, "_service_minion", lambda: {"engines": [{"qvm_remote": {"timeout_max": 0}}]})
    listed = [{"name": "work", "class": "AppVM", "template": "", "tags": [], "for_disposables": False}]
    monkeypatch.setitem(module, "_list_vms", lambda tags: listed)
    for pillar, level, text in (
        ({}, "problem", "dom0's pillar has no qvm-remote; "),
        ({"qvm-remote": {"select": [{"tag": "agnet"}]}}, "note", "select:0 fits no qube"),
        ({"qvm-remote": {"vms": {"work": {}}}}, "ok", "it can be applied"),
    ):
        monkeypatch.setitem(module, "__pillar__", pillar)
        (one,) = (one for one in loaders.modules.qvm_remote.doctor() if one["part"] == "pillar")
        assert (one["level"], one["text"].startswith(text)) == (level, True)
    loaders.context.pop("retcode")


def test_verify_believes_the_token_and_nothing_else(loaders, settings, key):
    loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings)
    cid = new_cid()
    token = make_token(key[0], "work", cid, 30, "shell", b"hostname")
    assert loaders.modules.qvm_remote.verify("work", cid, "hostname", token, config=settings) == {"verified": True, "state": None}
    changed = loaders.modules.qvm_remote.verify("work", cid, "hostname;", token, config=settings)
    assert (changed["verified"], changed["code"]) == (False, "token")
    other = loaders.modules.qvm_remote.verify("dev", cid, "hostname", token, config=settings)
    assert (other["verified"], other["code"]) == (False, "key")


def test_explain_says_first_that_a_vm_has_no_key_or_that_its_access_has_ended(loaders, settings, key):
    explain = loaders.modules.qvm_remote.explain
    assert explain("work", "ls", config=settings)["allowed"] is False
    loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings)
    assert explain("dev", "ls", config=settings)["reason"] == "dom0 has no key for dev"
    shown = explain("work", "ls", config=settings)
    assert (shown["allowed"], shown["as"]) == (True, "root")
    shown = explain("work", "ls", config={**settings, "vms": {"work": {"until": 1767225600}}})
    assert (shown["allowed"], shown["asks"], shown["reason"]) == (False, False, "this qube's access to dom0 ended at 2026-01-01T00:00:00Z")


@pytest.mark.parametrize(("command", "word"), [(["qvm-prefs", "work", "memory", 400], "400"), (400, "400"), (True, "True")])
def test_what_yaml_took_for_something_else_is_not_explained(loaders, settings, command, word):
    with pytest.raises(salt.exceptions.CommandExecutionError, match=f"put {word} in quotes"):
        loaders.modules.qvm_remote.explain("work", command, config=settings)


def test_an_outcome_that_there_is_not_is_refused(loaders, settings):
    for outcome in (*OUTCOMES, 0, "255", None):
        assert loaders.modules.qvm_remote.history(outcome=outcome, config=settings) == []
    for outcome in ("foo", 256, "-1", ""):
        with pytest.raises(salt.exceptions.CommandExecutionError, match=f"outcome is {', '.join(OUTCOMES)}, or an exit code"):
            loaders.modules.qvm_remote.history(outcome=outcome, config=settings)


def test_a_v1_token_is_believed_only_from_a_vm_that_is_allowed_to(loaders, settings, key):
    loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings)
    cid = new_cid()
    token = hmac.new(key[0].hex().encode(), cid.encode(), "sha256").hexdigest()
    refused = loaders.modules.qvm_remote.verify("work", cid, "hostname", token, config=settings)
    assert (refused["verified"], refused["code"]) == (False, "token")
    allowed = {**settings, "vms": {"work": {"accept_v1": True}}}
    assert loaders.modules.qvm_remote.verify("work", cid, "hostname", token, config=allowed)["verified"] is True
    assert loaders.modules.qvm_remote.verify("work", new_cid(), "hostname", token, config=allowed)["verified"] is False


def test_ledger_check_says_what_is_wrong_and_sets_it_aside_when_told_to(loaders, settings, key):
    loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings)
    path = os.path.join(settings["state_dir"], "ledger.sqlite")
    assert loaders.modules.qvm_remote.ledger_check(config=settings)["problems"] == []
    assert loaders.modules.qvm_remote.status(config=settings)["ledger"] == "sound"
    with pytest.raises(salt.exceptions.CommandExecutionError, match="is sound, and stays"):
        loaders.modules.qvm_remote.ledger_check(set_aside=True, config=settings)
    pullrpc.dom0.shared(settings)._close_ledger()
    with open(path, "r+b") as file:
        file.write(b"garbage" * 100)
    found = loaders.modules.qvm_remote.ledger_check(config=settings)
    assert (found["ledger"], len(found["problems"])) == (path, 1)
    assert loaders.context.pop("retcode") == 1
    assert "set_aside=True" in found["next"]
    shown = loaders.modules.qvm_remote.status(config=settings)
    assert "qvm_remote.ledger_check" in shown["ledger"]
    assert shown["commands"] == {}
    with pullrpc.lock.EngineLock(settings["run_dir"]), pytest.raises(salt.exceptions.CommandExecutionError, match="is at work"):
        loaders.modules.qvm_remote.ledger_check(set_aside=True, config=settings)
    found = loaders.modules.qvm_remote.ledger_check(set_aside=True, config=settings)
    assert (found["problems"], found["next"]) == ([], "nothing is to be done")
    with open(found["set_aside"], "rb") as file:
        assert file.read(7) == b"garbage"
    assert loaders.modules.qvm_remote.status(config=settings)["ledger"] == "sound"


def test_execute_runs_nothing_that_was_not_claimed(loaders, settings, key):
    loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings)
    with pytest.raises(salt.exceptions.CommandExecutionError, match="not waiting to run"):
        loaders.modules.qvm_remote.execute("work", new_cid(), config=settings)
    assert not os.path.exists(os.path.join(settings["state_dir"], "spool"))


@pytest.mark.parametrize(
    ("function", "words"),
    [("run_once", ()), ("rehearse", ()), ("verify", ("work", "id", "ls", "v2")), ("execute", ("work", "id")), ("explain", ("work", "ls"))],
)
def test_nothing_runs_where_nothing_was_set_up(loaders, function, words):
    # A key may be there: without the settings nobody knows what its VM may do.
    with pytest.raises(salt.exceptions.CommandExecutionError, match="not set up here, and nothing is run"):
        getattr(loaders.modules.qvm_remote, function)(*words)


def test_a_vm_is_safe_only_under_an_engine_of_which_it_is_known_what_it_lets_it_do(loaders, settings):
    is_safe = loaders.modules.qvm_remote.is_safe
    wanted = {**settings, "vms": {"work": {"policy": "none"}}}
    assert is_safe("work", config=wanted) is True
    known, used = pullrpc.config.make_config({}), pullrpc.config.make_config(settings)
    with pullrpc.lock.EngineLock(settings["run_dir"]):
        # It is just beginning; then it has other settings than the file that it was given; then these, by which all may do anything.
        assert is_safe("work", config=wanted) is False
        for digest in ("another", pullrpc.config.digest(known)):
            pullrpc.note.write(used, {"settings": digest})
            assert is_safe("work", config=wanted) is False
        assert is_safe(["work"], config={**settings, "vms": {"work": {"policy": "full"}}}) is True
        pullrpc.note.write(used, {"settings": pullrpc.config.digest(pullrpc.config.make_config(wanted))})
        assert is_safe("work", config=wanted) is True


def test_without_an_engine_a_vm_is_safe_if_the_next_one_lets_it_do_no_more(loaders, settings, tmp_path, monkeypatch):
    is_safe = loaders.modules.qvm_remote.is_safe
    monkeypatch.setitem(is_safe.__globals__, "_SERVICE_CONFIG", str(tmp_path))
    wanted = {**settings, "vms": {"work": {"policy": "none"}}}
    assert is_safe("work", config=wanted) is True
    for given, safe in (
        ({**settings, "vms": {}}, False),
        ({**settings, "unlisted": "none", "vms": {}}, True),
        (wanted, True),
        ({**wanted, "paralel": 3}, False),
    ):
        (tmp_path / "minion").write_text(json.dumps({"engines": [{"qvm_remote": given}]}))
        assert is_safe("work", config=wanted) is safe
    (tmp_path / "minion").write_text("engines: {")
    assert is_safe("work", config=wanted) is False
    # One that has no engine in it starts none.
    (tmp_path / "minion").write_text("id: dom0")
    assert is_safe("work", config=wanted) is True


def test_a_vm_is_not_safe_where_its_old_tokens_are_believed_and_are_not_to_be(loaders, settings, monkeypatch):
    is_safe = loaders.modules.qvm_remote.is_safe
    wanted = {**settings, "vms": {"work": {"policy": "full"}}}
    with _engine_at_work(monkeypatch, {**settings, "vms": {"work": {"policy": "full", "accept_v1": True}}}):
        assert is_safe("work", config=wanted) is False
    with _engine_at_work(monkeypatch, {**settings, "vms": {"work": {"policy": "none", "accept_v1": True}}}):
        assert is_safe("work", config=wanted) is True


@contextlib.contextmanager
def _engine_at_work(monkeypatch, given):
    """An engine that has these settings, as the minion's configuration gave them to it."""
    # Here, and not in the module: for states Salt loads that anew.
    monkeypatch.setattr(pullrpc.config, "engine_settings", lambda minion: given)
    used = pullrpc.config.make_config(given)
    with pullrpc.lock.EngineLock(used.run_dir):
        pullrpc.note.write(used, {"settings": pullrpc.config.digest(used)})
        yield


def _make_anew(loaders, settings):
    """Give the name work to another qube."""
    with open(settings["qvm_ls"], "r+", encoding="ascii") as file:
        listing = file.read()
        file.seek(0)
        file.write(listing.replace("work|6f1f0f3c-", "work|6f1f0f3d-"))
    loaders.context.pop("qvm_remote.uuids", None)


def test_a_qube_made_anew_under_a_name_gets_no_key_before_the_engine_knows_what_it_may_do(loaders, settings, monkeypatch):
    states, modules = loaders.states.qvm_remote, loaders.modules.qvm_remote
    old, wanted = ({**settings, "unlisted": "none", "vms": {"work": {"policy": policy}}} for policy in ("full", "none"))
    first = states.key_present("work", key="generate", settings=old).changes["key"]["new"]
    _make_anew(loaders, settings)
    with _engine_at_work(monkeypatch, old):
        would = states.key_present("work", key="generate", settings=wanted, test=True)
        assert (would.result, would.changes) == (None, {"key": {"old": first, "new": "a new key"}})
        assert would.comment.endswith("which would lose it; this one would get access of its own")
        ret = states.key_present("work", key="generate", settings=wanted)
        assert (ret.result, ret.changes) == (False, {"key": {"old": first, "new": None}})
        assert ret.comment.endswith("which lost it; the service does not know yet what work may do: apply all of it (sudo qubesctl state.apply qvm-remote)")
        # It is not for this one, whatever that may do.
        assert modules.keys(config=wanted) == {}
        again = states.key_present("work", key="generate", settings=wanted)
        assert (again.result, again.changes, modules.keys(config=wanted)) == (False, {}, {})
    # One that lets it run nothing may know no more of it than that.
    with _engine_at_work(monkeypatch, {**wanted, "vms": {}}):
        assert states.key_present("work", key="generate", settings=wanted).result is True


def test_what_a_state_says_that_a_vm_may_do_is_what_the_service_knows(loaders, settings, monkeypatch):
    states = loaders.states.qvm_remote
    old, wanted = ({**settings, "unlisted": "none", "vms": {"work": {"policy": policy}}} for policy in ("full", "none"))
    assert states.authorized("work", settings=old).result is True
    nothing, later = "may run nothing (policy: none)", ", once the service knows that (sudo qubesctl state.apply qvm-remote)"
    for given, told in ((old, nothing + later), (wanted, nothing)):
        with _engine_at_work(monkeypatch, given):
            assert states.authorized("work", settings=wanted).comment.endswith(f"; it {told}")
            assert states.unlisted("x", listed=[], settings={**wanted, "vms": {}}).comment.endswith(f": work {nothing}{later if given is old else ''}")


def test_revoke_says_whether_there_was_a_key(loaders, settings, key):
    loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings)
    assert loaders.modules.qvm_remote.revoke("work", config=settings) is True
    assert loaders.modules.qvm_remote.revoke("work", config=settings) is False
    assert loaders.modules.qvm_remote.keys(config=settings) == {}


def test_a_misspelt_setting_is_an_error(loaders, settings):
    with pytest.raises(salt.exceptions.CommandExecutionError, match="'timeout_maxx' is no setting"):
        loaders.modules.qvm_remote.keys(config={**settings, "timeout_maxx": 5})


def test_the_audit_log_is_verified_and_read(loaders, settings, key):
    loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings)
    loaders.modules.qvm_remote.revoke("work", config=settings)
    assert [line["what"] for line in loaders.modules.qvm_remote.audit("work", config=settings)] == ["authorized", "revoked"]
    assert loaders.modules.qvm_remote.history(config=settings) == []
    assert loaders.modules.qvm_remote.audit_verify(config=settings)["problems"] == []
    assert not loaders.context.get("retcode")
    with open(settings["audit_log"], "r+b") as file:
        file.write(file.read().replace(b"revoked", b"whatnot"))
    assert loaders.modules.qvm_remote.audit_verify(config=settings)["problems"]
    assert loaders.context.pop("retcode") == 1
    with pytest.raises(salt.exceptions.CommandExecutionError, match="a time looks like"):
        loaders.modules.qvm_remote.audit(since="soon", config=settings)


def test_no_key_is_stored_without_a_line_that_says_so(loaders, settings, key):
    os.makedirs(settings["audit_log"])
    with pytest.raises(salt.exceptions.CommandExecutionError, match="audit log"):
        loaders.modules.qvm_remote.authorize("work", key_file=key[1], config=settings)
    assert loaders.modules.qvm_remote.keys(config=settings) == {}


def test_enable_wants_the_risk_accepted_and_a_service(loaders):
    with pytest.raises(salt.exceptions.CommandExecutionError, match="accept_risk=True"):
        loaders.modules.qvm_remote.enable()
    with pytest.raises(salt.exceptions.CommandExecutionError, match="accept_risk=True"):
        loaders.modules.qvm_remote.enable(accept_risk="no")
    for function, words in ((loaders.modules.qvm_remote.enable, {"accept_risk": True}), (loaders.modules.qvm_remote.disable, {})):
        with pytest.raises(salt.exceptions.CommandExecutionError, match="there is no service yet"):
            function(**words)


def test_doctor_of_nothing_says_how_to_begin(loaders):
    found = loaders.modules.qvm_remote.doctor()
    assert [(one["part"], one["level"]) for one in found] == [("configuration", "problem")]
    assert "write pillar, then type: qubesctl state.apply qvm-remote" in found[0]["text"]
    assert loaders.context.pop("retcode") == 1


def test_a_test_run_says_that_the_command_would_be_installed(loaders):
    ret = loaders.states.qvm_remote.command_installed("x", test=True)
    assert (ret.result, ret.changes) == (None, {"/usr/bin/qvm-remote-dom0": {"old": None, "new": "installed"}})
    assert not os.path.exists("/usr/bin/qvm-remote-dom0")


@pytest.mark.parametrize("test", [False, True])
def test_audit_rotated_configures_logrotate_once(loaders, settings, tmp_path, test):
    path = tmp_path / "logrotate.d" / "qvm-remote"
    missing = loaders.states.qvm_remote.audit_rotated("x", path=str(path), settings=settings, test=test)
    assert (missing.result, missing.changes, "without logrotate" in missing.comment) == (True, {}, True)
    path.parent.mkdir()
    ret = loaders.states.qvm_remote.audit_rotated("x", path=str(path), settings=settings, test=test)
    assert (ret.result, path.exists(), set(ret.changes)) == (None if test else True, not test, {str(path)})
    if not test:
        assert f"{settings['audit_log']} {{" in path.read_text()
        assert loaders.states.qvm_remote.audit_rotated("x", path=str(path), settings=settings).changes == {}


@pytest.mark.parametrize(("kind", "example"), [("_modules", "CLI Example:"), ("_states", ".. code-block:: yaml")])
def test_every_public_function_shows_how_to_use_it(kind, example):
    with open(os.path.join(ROOT, kind, "qvm_remote.py"), encoding="utf-8") as file:
        functions = [node for node in ast.parse(file.read()).body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert len(functions) > 9
    for function in functions:
        shown = ast.get_docstring(function)
        assert example in shown, function.name
        assert f"qvm_remote.{function.name}" in shown, function.name


def test_the_engine_is_found_by_salts_loader(loaders):
    assert "qvm_remote.start" in salt.loader.engines(loaders.opts, loaders.modules, None, loaders.utils)


@pytest.mark.parametrize("test", [False, True])
def test_key_absent_removes_a_key_once(loaders, settings, key, test):
    loaders.modules.qvm_remote.authorize("old", key_file=key[1], config=settings)
    ret = loaders.states.qvm_remote.key_absent("old", settings=settings, test=test)
    assert ret.result is (None if test else True)
    assert ret.changes == {"old": {"old": fingerprint(key[0]), "new": None}}
    assert bool(loaders.modules.qvm_remote.keys(config=settings)) is test
    again = loaders.states.qvm_remote.key_absent("never", settings=settings)
    assert (again.result, again.changes) == (True, {})


@pytest.mark.parametrize("days", [0, 90])
def test_a_key_whose_age_a_clock_that_was_set_back_hides_is_rotated(loaders, settings, days):
    states = loaders.states.qvm_remote
    made = states.key_present("work", key="generate", settings=settings).changes["key"]["new"]
    assert states.key_rotated("work", days=90, settings=settings).changes == {}
    path = os.path.join(settings["key_dir"], "work.key")
    os.utime(path, (time.time() + 400 * 86400,) * 2)
    ret = states.key_rotated("work", days=days, settings=settings)
    assert (ret.result, ret.changes["key"]["old"]) == (True, made)
    assert loaders.modules.qvm_remote.keys(config=settings)["work"]["next"] == ret.changes["key"]["new"] != made
    assert states.key_rotated("work", days=90, settings=settings).changes == {}


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("days_ahead", [400, -400])
def test_a_new_key_that_waits_is_not_rotated_again_whatever_its_age(loaders, settings, days_ahead, test):
    states = loaders.states.qvm_remote
    states.key_present("work", key="generate", settings=settings)
    waits = loaders.modules.qvm_remote.rotate("work", config=settings)["new"]
    os.utime(os.path.join(settings["key_dir"], "work.key.new"), (time.time() + days_ahead * 86400,) * 2)
    ret = states.key_rotated("work", days=90, settings=settings, test=test)
    assert (ret.result, ret.changes) == (True, {})
    shut_down = "" if test else "; it is shut down and gets its key when it runs next"
    assert ret.comment == f"work has not used its new key {waits} yet{shut_down}"
    assert loaders.modules.qvm_remote.keys(config=settings)["work"]["next"] == waits


@pytest.mark.parametrize("test", [False, True])
def test_a_key_that_is_for_whoever_comes_first_is_for_the_qube_that_the_states_find(loaders, settings, key, test):
    modules, states = loaders.modules.qvm_remote, loaders.states.qvm_remote
    modules.authorize("late", key_file=key[1], in_advance=True, config=settings)
    with open(settings["qvm_ls"], "r+", encoding="ascii") as file:
        listing = file.read()
        file.seek(0)
        file.write(listing.replace("work|", "late|"))
    loaders.context.pop("qvm_remote.uuids")
    ret = states.key_present("late", key="generate", settings=settings, test=test)
    uuid = "6f1f0f3c-0000-4000-8000-000000000000"
    assert (ret.result, ret.changes) == (None if test else True, {"bound": {"old": None, "new": uuid}})
    assert ret.comment.endswith(f"late is authorized with key {fingerprint(key[0])}")
    assert modules.identity("late", config=settings)["bound"] == ("" if test else uuid)
    if not test:
        assert states.key_present("late", key="generate", settings=settings).changes == {}


def test_what_the_settings_in_force_name_is_taken_back_too(loaders, settings, tmp_path):
    states = loaders.states.qvm_remote
    states.key_present("work", key="generate", settings=settings)
    # Without pillar nothing says where that key is, but what the service was configured with.
    without, folder = {**settings, "key_dir": str(tmp_path / "qvm-remote-others")}, tmp_path / "remote"
    states.engine_configured(str(folder), settings=settings)
    ret = states.absent("x", config_dir=str(folder), settings=without, test=True)
    assert (ret.result, settings["key_dir"] in ret.changes["folders"]["old"], "work is shut down and keeps its queue" in ret.comment) == (None, True, True)
    states.key_present("dev", key="generate", settings=without)
    ret = states.absent("x", config_dir=str(folder), settings=without, test=True)
    assert {settings["key_dir"], without["key_dir"]} <= set(ret.changes["folders"]["old"])
    for text in ("engines: {", json.dumps({"engines": [{"qvm_remote": {"paralel": 3}}]})):
        (folder / "minion").write_text(text)
        ret = states.absent("x", config_dir=str(folder), settings=without, test=True)
        assert (ret.result, ret.comment.endswith("see what it names, remove it, and apply this again")) == (False, True)


@pytest.mark.parametrize("test", [False, True])
def test_engine_configured_writes_the_minions_configuration_once(loaders, settings, tmp_path, test):
    folder = str(tmp_path / "remote")
    path = os.path.join(folder, "minion")
    ret = loaders.states.qvm_remote.engine_configured(folder, settings=settings, test=test)
    assert ret.result is (None if test else True)
    assert os.path.exists(path) is not test
    if test:
        return
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert salt.config.minion_config(path)["engines"] == [{"qvm_remote": settings}]
    again = loaders.states.qvm_remote.engine_configured(folder, settings=settings)
    assert (again.result, again.changes) == (True, {})


def test_a_wrong_setting_fails_the_state_and_writes_nothing(loaders, settings, tmp_path):
    ret = loaders.states.qvm_remote.engine_configured(str(tmp_path / "remote"), settings={**settings, "parallel": -1})
    assert ret.result is False
    assert "parallel must lie between" in ret.comment
    assert not os.path.exists(tmp_path / "remote")
