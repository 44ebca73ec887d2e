# SPDX-License-Identifier: GPL-2.0-or-later
"""The verbs that only look. Each works on pullrpc directly, with the settings of the service, and answers at once."""

import os
import shutil
import sys
import time

import yaml
from pullrpc import doctor as checks
from pullrpc.audit_read import history as read_history
from pullrpc.audit_read import moment
from pullrpc.audit_tail import follow
from pullrpc.config import engine_settings
from pullrpc.dom0 import shared
from pullrpc.errors import PullError
from pullrpc.ids import check_vm_name
from pullrpc.outcomes import check_outcome
from pullrpc.overview import overview
from pullrpc.rehearsal import explain as explain_now
from pullrpc.rehearsal import rehearse as rehearse_all

from . import show
from .usage import UsageError, checked
from .verbs import PROGRAM

#: How often a table is made anew, and a log looked at, seconds.
_WATCH_EVERY, _TAIL_EVERY = 2.0, 0.2
#: From this many columns on, a table has room for a qube's last command, too.
_WIDE = 120
#: Clears the rest of a line, and all below: what stood there goes without a flicker.
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\033[H", "\033[K", "\033[J"


def minion(config_dir):
    """Read the configuration of the service's minion.

    Args:
        config_dir: str.

    Returns:
        dict; empty when there is none.

    Raises:
        PullError: it can't be read.
    """
    path = os.path.join(config_dir, "minion")
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except FileNotFoundError:
        return {}
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise PullError(f"{path} can't be read; type: qubesctl state.apply qvm-remote.dom0")
    return found


def _dom0(options):
    settings = engine_settings(minion(options.config_dir))
    if settings is None:
        raise PullError(f"qvm-remote is not set up here ({options.config_dir}/minion configures no engine); write pillar, then: qubesctl state.apply qvm-remote")
    return shared(settings)


def keys(options):
    """List the keys."""
    vm = checked(check_vm_name, options.vm)
    found = overview(_dom0(options))["keys"]
    if vm is not None:
        if vm not in found:
            raise PullError(f"{vm} has no key")
        found = {vm: found[vm]}
    if options.json:
        show.as_json(found)
        return 0
    rows = []
    for vm, one in found.items():
        seen = one.get("problem") or f"{one['in_vm']}{', next ' + one['next'] if 'next' in one else ''}"
        rows.append([vm, one.get("fingerprint", "refused"), seen, one["access"]])
    _print(show.table(["VM", "FINGERPRINT", "KEY IN VM", "ACCESS"], rows) if rows else ["no qube has a key"])
    return 0


def status(options):
    """Show the present state, once or again and again."""
    vm = checked(check_vm_name, options.vm)
    dom0 = _dom0(options)
    if not options.watch:
        found = _only(overview(dom0), vm)
        if options.json:
            show.as_json(found)
        else:
            _print(_status_lines(found, _width()))
        return 0
    if options.json or not sys.stdout.isatty():
        raise UsageError("--watch draws on a terminal; programs call 'status --json' again and again")
    show.put(_HOME + _CLEAR_BELOW)
    while True:
        size = shutil.get_terminal_size()
        lines = [show.now(), *_status_lines(_only(overview(dom0), vm), size.columns)][: size.lines - 1]
        show.put(_HOME + "".join(f"{line}{_CLEAR_LINE}\n" for line in lines) + _CLEAR_BELOW, now=True)
        time.sleep(_WATCH_EVERY)


def _only(found, vm):
    """An overview, of one qube alone if one is named."""
    if vm is None:
        return found
    if vm not in found["vms"]:
        raise PullError(_unknown(vm))
    return {**found, **{part: {name: one for name, one in found[part].items() if name == vm} for part in ("keys", "sessions", "vms")}}


def _unknown(vm):
    return f"{vm} has no key, and pillar does not name it"


def _status_lines(found, width):
    vms = found["vms"]
    waits = sum(sum(one["open"].values()) for one in vms.values())
    lines = [f"qvm-remote {found['version']}: engine {found['engine']}, {len(found['sessions'])} sessions, {waits} commands on their way"]
    if found["ledger"] != "sound":
        lines.append(found["ledger"])
    if not vms:
        return [*lines, "no qube has a key; in pillar, under qvm-remote: vms: {NAME: {}}, then: qubesctl state.apply qvm-remote"]
    if found["recent"]:
        lines.append(f"RAN, REFUSED and the times of what ran: since {found['recent'][:19]}Z")
    rows = [_status_row(vm, one, found["keys"].get(vm, {})) for vm, one in vms.items()]
    titles = ["VM", "SESSION", "KEY", "POLICY", "OPEN", "RAN", "REFUSED", "P50", "P99"]
    last = ["LAST COMMAND", *(_last(one) for one in vms.values())]
    if width is None or width >= _WIDE:
        return [show.cut(line, width) for line in lines] + show.table([*titles, last[0]], [[*row, text] for row, text in zip(rows, last[1:])], width)
    # No room beside: below.
    for line, text in zip(show.table(titles, rows), last):
        lines += [line, f"    {text}"]
    return [show.cut(line, width) for line in lines]


def _status_row(vm, one, key):
    age = f" {show.age(time.time() - one['since'])}" if one["session"] and one["since"] else ""
    return [
        vm,
        (one["session"] or "-") + age,
        "refused" if "problem" in key else key.get("in_vm") or "none",
        one["policy"],
        str(sum(one["open"].values())),
        str(one["ran"]),
        str(one["refused"]),
        show.duration(one["p50"]),
        show.duration(one["p99"]),
    ]


def _last(one):
    last = one["last"]
    return f"{str(last['time'])[11:19]} {last['outcome']}: {last['command']}" if last else "-"


def tail(options):
    """Follow the audit log."""
    vm = checked(check_vm_name, options.vm)
    dom0 = _dom0(options)
    if vm is not None and vm not in overview(dom0)["vms"]:
        print(f"{PROGRAM}: {_unknown(vm)}; what the log may say of it is waited for", file=sys.stderr, flush=True)
    config = dom0.config
    for line in follow(config.audit_log, options.lines, lambda: time.sleep(_TAIL_EVERY), vm):
        if options.json:
            show.as_json_line(line)
        else:
            show.put(show.event(line) + "\n")
        show.put(now=True)


def history(options):
    """List commands."""
    vm, outcome = checked(check_vm_name, options.vm), checked(check_outcome, options.outcome)
    since, until = checked(moment, options.since), checked(moment, options.until)
    found = read_history(_dom0(options).config.audit_log, vm, since, until, outcome, options.limit)
    if options.json:
        show.as_json(found)
        return 0
    rows = []
    for row in found:
        outcome = row["outcome"] + (f" {row['code']}" if "code" in row else "")
        exit_code = str(row["exit"]) if "exit" in row else "-"
        rows.append([str(row["time"])[:19], row["vm"], outcome, exit_code, show.duration(row.get("seconds")), row["id"], row.get("command", "-")])
    _print(show.table(["TIME", "VM", "OUTCOME", "EXIT", "TOOK", "ID", "COMMAND"], rows, _width()))
    return 0


def explain(options):
    """Say whether a qube could have a command run, and why."""
    vm = checked(check_vm_name, options.vm)
    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    if words and words[0].startswith("-") and words != options.after_dashes:
        raise UsageError(f"options go before VM: qvm-remote-dom0 explain {words[0]} {vm} COMMAND; of a command that begins so: explain {vm} -- COMMAND")
    if not words:
        raise UsageError("say which command: qvm-remote-dom0 explain VM COMMAND")
    command = words if options.exec else " ".join(words)
    found = explain_now(_dom0(options), vm, command)
    if options.json:
        show.as_json(found)
    else:
        _print([f"{'allowed' if found['allowed'] else 'asked for' if found['asks'] else 'refused'}: {found['reason']}"])
    return 0 if found["allowed"] or found["asks"] else 1


def rehearse(options):
    """Say what would be served now."""
    rows = []
    for vm, one in rehearse_all(_dom0(options)).items():
        if "problem" in one:
            rows.append([vm, "-", "can't be asked", one["problem"]])
        for command in one.get("commands", ()):
            verdict = f"refused: {command['reason']}" if not command["runs"] else "would be asked for" if command["asks"] else "would run"
            rows.append([vm, command["id"], verdict, command["command"] or "-"])
    _print(show.table(["VM", "ID", "VERDICT", "COMMAND"], rows) if rows else ["nothing waits"])
    return 0


def doctor(options):
    """Examine the installation."""
    found = checks.examine(minion(options.config_dir), options.config_dir)
    if options.json:
        show.as_json(found)
    else:
        rows = [[one["level"], one["part"], one["text"] + (f"  ->  {one['mend']}" if one["mend"] else "")] for one in found]
        _print(show.table(["", "PART", "FINDING"], rows))
    return 1 if any(one["level"] == checks.PROBLEM for one in found) else 0


def _print(lines):
    show.put("".join(line + "\n" for line in lines))


def _width():
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
