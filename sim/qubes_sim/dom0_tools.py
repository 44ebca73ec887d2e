#!/usr/bin/python3 -IS
# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's qvm-run, qvm-check, qvm-ls, qvm-start, ..., qubesctl in the simulator: one program under all those names.

Behaves as the tools of qubes-core-admin-client do, as far as qvm-remote and its tests use them. It asks the hypervisor
over a socket that only dom0 has. Stands alone, without the simulator's other modules.
"""

import argparse
import array
import json
import os
import socket
import sys

_SOCKET = "/run/qubesd.sock"
#: As in the real tools: 1 for what failed, 2 for wrong usage.
_FAILED = 1


def _ask(message, fds=()):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(_SOCKET)
        body = os.memfd_create("message", os.MFD_CLOEXEC)
        os.write(body, json.dumps(message).encode("ascii"))
        rights = array.array("i", [body, *fds])
        sock.sendmsg([b"m"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        os.close(body)
        _, ancillary, _, _ = sock.recvmsg(16, socket.CMSG_LEN(4))
        if not ancillary:
            sys.exit(_FAILED)
        fd = array.array("i", ancillary[0][2])[0]
        with open(fd, "rb") as file:
            file.seek(0)
            answer = json.loads(file.read())
    if "error" in answer:
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {answer['error']}\n")
        sys.exit(_FAILED)
    return answer


def _parser(*names):
    parser = argparse.ArgumentParser(prog=os.path.basename(sys.argv[0]))
    parser.add_argument("--verbose", "-v", action="count", default=0)
    parser.add_argument("--quiet", "-q", action="count", default=0)
    for name in names:
        parser.add_argument(name)
    return parser


def _states(parser, *names):
    states = {one["name"]: one for one in _ask({"op": "status"})["domains"]}
    for name in names:
        if name not in states:
            parser.error(f"no such domain: {name!r}")
    return states


def _qvm_run(argv):
    parser = _parser("VMNAME")
    parser.add_argument("COMMAND")
    # What follows the command is the command's, its options and a "--" too.
    parser.add_argument("ARGUMENTS", nargs=argparse.REMAINDER)
    parser.add_argument("--user", "-u", default="user")
    parser.add_argument("--pass-io", "-p", action="store_true")
    parser.add_argument("--autostart", "--auto", "-a", dest="autostart", action="store_true", default=True)
    parser.add_argument("--no-autostart", "--no-auto", "-n", dest="autostart", action="store_false")
    parser.add_argument("--gui", action="store_true")
    parser.add_argument("--no-gui", action="store_true")
    parser.add_argument("--no-shell", action="store_true")
    parser.add_argument("--filter-escape-chars", action="store_true")
    parser.add_argument("--no-filter-escape-chars", action="store_true")
    options = parser.parse_args(argv)
    _states(parser, options.VMNAME)
    request = {"op": "exec", "name": options.VMNAME, "user": options.user, "autostart": options.autostart, "pass_io": options.pass_io}
    if options.no_shell or options.ARGUMENTS:
        request.update({"argv": [options.COMMAND, *options.ARGUMENTS], "input": ""})
    else:
        # The service qubes.VMShell: a shell that reads the command as its first line, and leaves the rest of stdin to it.
        request.update({"argv": ["/bin/bash"], "input": options.COMMAND.rstrip("\n") + "; exit\n"})
    answer = _ask(request, (0, 1, 2) if options.pass_io else ())
    if "state" in answer and options.verbose:
        problem = "is paused" if answer["state"] == "Paused" else "not started"
        sys.stderr.write(f"Qube '{options.VMNAME}' {problem}\n")
    return answer["exit"]


def _qvm_check(argv):
    parser = _parser()
    parser.add_argument("VMNAME", nargs="+")
    parser.add_argument("--running", action="store_true")
    parser.add_argument("--paused", action="store_true")
    parser.add_argument("--template", action="store_true")
    options = parser.parse_args(argv)
    states = {one["name"]: one for one in _ask({"op": "status"})["domains"]}
    if options.running or options.paused:
        wanted = [name for name in options.VMNAME if states.get(name, {}).get("state") == ("Running" if options.running else "Paused")]
    elif options.template:
        wanted = [name for name in options.VMNAME if states.get(name, {}).get("class") == "TemplateVM"]
    else:
        wanted = [name for name in options.VMNAME if name in states]
    return 0 if len(wanted) == len(options.VMNAME) else 1 if not wanted else 3


def _qvm_ls(argv):
    parser = _parser()
    parser.add_argument("VMNAME", nargs="*")
    parser.add_argument("--running", action="store_true")
    parser.add_argument("--paused", action="store_true")
    parser.add_argument("--halted", action="store_true")
    parser.add_argument("--raw-list", action="store_true")
    parser.add_argument("--raw-data", action="store_true")
    parser.add_argument("--fields", "-O", default="name,state,class,template")
    options = parser.parse_args(argv)
    rows = list(_states(parser, *options.VMNAME).values())
    if options.VMNAME:
        rows = [row for row in rows if row["name"] in options.VMNAME]
    wanted = [state for state, flag in (("Running", options.running), ("Paused", options.paused), ("Halted", options.halted)) if flag]
    rows = sorted((row for row in rows if not wanted or row["state"] in wanted), key=lambda row: (row["name"] != "dom0", row["name"]))
    fields = ["name"] if options.raw_list else options.fields.lower().split(",")
    if any(field not in ("name", "state", "class", "template") for field in fields):
        parser.error(f"no such column in: {options.fields}")
    table = [[row[field] or "-" for field in fields] for row in rows]
    if options.raw_list or options.raw_data:
        lines = ["|".join(row) for row in table]
    else:
        table.insert(0, [field.upper() for field in fields])
        widths = [max(len(row[at]) for row in table) for at in range(len(fields))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    sys.stdout.write("".join(line + "\n" for line in lines))
    return 0


def _operate(operation, argv):
    parser = _parser()
    parser.add_argument("VMNAME", nargs="+")
    parser.add_argument("--wait", action="store_true")
    options = parser.parse_args(argv)
    _states(parser, *options.VMNAME)
    for name in options.VMNAME:
        _ask({"op": operation, "name": name})
    return 0


def _qvm_prefs(argv):
    parser = _parser("VMNAME")
    parser.add_argument("property", nargs="?")
    parser.add_argument("value", nargs="?")
    options = parser.parse_args(argv)
    _states(parser, options.VMNAME)
    shown = _ask({"op": "prefs", "name": options.VMNAME, "prop": options.property, "value": options.value})["prefs"]
    if options.property is None:
        sys.stdout.write("".join(f"{name:20} {value}\n" for name, value in sorted(shown.items())))
    elif options.property not in shown:
        parser.error(f"no such property: {options.property!r}")
    elif options.value is None:
        sys.stdout.write(f"{shown[options.property]}\n")
    return 0


def _qubesctl(argv):
    options = [word for word in argv if word.startswith("--")]
    words = [word for word in argv if not word.startswith("--")]
    targets = [word for word in options if word.startswith("--targets=") or word in ("--templates", "--app", "--all", "--standalones")]
    if targets or "--skip-dom0" in options:
        sys.stderr.write("qubesctl: error: states for VMs (--targets) are not simulated; apply those of dom0\n")
        return _FAILED
    kept = [word for word in options if word not in ("--show-output", "--force-color")]
    try:
        os.execvp("salt-call", ["salt-call", "--local", *kept, *words])
    except FileNotFoundError:
        sys.stderr.write("qubesctl: error: there is no salt-call in this dom0\n")
    return _FAILED


def main():
    """Do what this program's name says.

    Returns:
        int, the exit code.
    """
    name = os.path.basename(sys.argv[0])
    operations = {"qvm-run": _qvm_run, "qvm-check": _qvm_check, "qvm-ls": _qvm_ls, "qvm-prefs": _qvm_prefs, "qubesctl": _qubesctl}
    try:
        if name in operations:
            return operations[name](sys.argv[1:])
        return _operate(name[len("qvm-") :], sys.argv[1:])
    except (FileNotFoundError, ConnectionError):
        sys.stderr.write(f"{name}: error: qubesd does not answer\n")
        return _FAILED


if __name__ == "__main__":
    sys.exit(main())
