# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's qvm-run, qvm-check, qvm-ls, qvm-start, ..., qubesctl in the simulator: one program under all those names.

Behaves as the tools of qubes-core-admin-client do, as far as qvm-remote and its tests use them. It asks the hypervisor
over a socket that only dom0 has. Stands alone, without the simulator's other modules.
"""

import argparse
import array
import json
import os
import shlex
import socket
import sys
import time

_SOCKET = "/run/qubesd.sock"
#: As in the real tools: 1 for what failed, 2 for wrong usage.
_FAILED = 1
#: Where a managed VM keeps what it was sent, and where this dom0's Salt lies.
_MANAGED, _SALT = "/var/lib/simulated-management", "/usr/lib/qubes/simulated/salt"
#: Here if the tools are to cost what the real ones do: see costs.py.
_COSTS = "/usr/lib/qubes/simulated/costs"


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


def _start_in_vm(message, fds=()):
    time.sleep(_costs().get("qrexec", 0))
    return _ask(message, fds)


def _costs():
    try:
        with open(_COSTS, encoding="ascii") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


def _cost_as_the_real_one():
    """Use processor time and memory as the imports of the real tools do.

    Returns:
        what must be kept for as long as the process lives.
    """
    costs = _costs()
    with open("/proc/self/statm", encoding="ascii") as file:
        own = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    # Written to, so that it is there.
    ballast = b"\1" * max(0, costs.get("memory", 0) - own)
    while time.process_time() < costs.get("cpu", 0):
        pass
    return ballast


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
    answer = _start_in_vm(request, (0, 1, 2) if options.pass_io else ())
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
    parser.add_argument("--tags", nargs="+", metavar="TAG")
    parser.add_argument("--raw-list", action="store_true")
    parser.add_argument("--raw-data", action="store_true")
    parser.add_argument("--fields", "-O", default="name,state,class,template")
    options = parser.parse_args(argv)
    rows = list(_states(parser, *options.VMNAME).values())
    if options.VMNAME:
        rows = [row for row in rows if row["name"] in options.VMNAME]
    if options.tags:
        rows = [row for row in rows if set(row["tags"]) & set(options.tags)]
    wanted = [state for state, flag in (("Running", options.running), ("Paused", options.paused), ("Halted", options.halted)) if flag]
    rows = sorted((row for row in rows if not wanted or row["state"] in wanted), key=lambda row: (row["name"] != "dom0", row["name"]))
    fields = ["name"] if options.raw_list else options.fields.lower().replace("-", "_").split(",")
    if any(field not in ("name", "state", "class", "template", "template_for_dispvms", "uuid") for field in fields):
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
    parser.add_argument("--force", "-f", action="store_true")
    options = parser.parse_args(argv)
    _states(parser, *options.VMNAME)
    if operation == "remove" and not options.force:
        parser.error("the simulator's asks nothing; say --force")
    for name in options.VMNAME:
        _ask({"op": operation, "name": name})
    return 0


def _qvm_prefs(argv):
    parser = _parser("VMNAME")
    parser.add_argument("property", nargs="?")
    parser.add_argument("value", nargs="?")
    options = parser.parse_args(argv)
    if options.property is not None:
        options.property = options.property.replace("-", "_")
    _states(parser, options.VMNAME)
    shown = _ask({"op": "prefs", "name": options.VMNAME, "prop": options.property, "value": options.value})["prefs"]
    if options.property is None:
        sys.stdout.write("".join(f"{name:20} {value}\n" for name, value in sorted(shown.items())))
    elif options.property not in shown:
        parser.error(f"no such property: {options.property!r}")
    elif options.value is None:
        sys.stdout.write(f"{shown[options.property]}\n")
    return 0


def _qvm_tags(argv):
    parser = _parser("VMNAME")
    parser.add_argument("command", nargs="?", default="list", choices=("list", "add", "del"))
    parser.add_argument("tag", nargs="*")
    options = parser.parse_args(argv)
    row = _states(parser, options.VMNAME)[options.VMNAME]
    if options.command == "list":
        shown = [tag for tag in row["tags"] if not options.tag or tag in options.tag]
        sys.stdout.write("".join(f"{tag}\n" for tag in shown))
        return 1 if options.tag and not shown else 0
    for tag in options.tag:
        _ask({"op": "tag", "name": options.VMNAME, "tag": tag, "add": options.command == "add"})
    return 0


def _qvm_features(argv):
    parser = _parser("VMNAME")
    parser.add_argument("feature", nargs="?")
    parser.add_argument("value", nargs="?")
    parser.add_argument("--unset", "--default", "--delete", "-D", action="store_true")
    options = parser.parse_args(argv)
    _states(parser, options.VMNAME)
    features = _ask({"op": "features", "name": options.VMNAME})["features"]
    if options.feature is None:
        sys.stdout.write("".join(f"{name}  {value}\n" for name, value in sorted(features.items())))
    elif options.unset or options.value is not None:
        _ask({"op": "features", "name": options.VMNAME, "feature": options.feature, "value": None if options.unset else options.value})
    elif options.feature in features:
        sys.stdout.write(features[options.feature] + "\n")
    else:
        return 1
    return 0


def _qrexec_client(argv):
    """What the library qubesadmin starts: ``qrexec-client -d VM USER:QUBESRPC SERVICE dom0``. Of services there is the shell."""
    parser = _parser()
    parser.add_argument("-d", dest="vm", required=True)
    parser.add_argument("what")
    options = parser.parse_args(argv)
    user, _, service = options.what.partition(":")
    if service.split()[:2] not in (["QUBESRPC", "qubes.VMShell"], ["QUBESRPC", "qubes.VMShell+"]):
        parser.error(f"no such service in the simulator: {service}")
    request = {"op": "exec", "name": options.vm, "user": "user" if user == "DEFAULT" else user, "autostart": False, "pass_io": True}
    return _start_in_vm({**request, "argv": ["/bin/bash"], "input": ""}, (0, 1, 2))["exit"]


def _qubesctl(argv):
    known = ("--skip-dom0", "--show-output", "--force-color", "--max-concurrency")
    own = [word for word in argv if word.partition("=")[0] in (*known, "--targets")]
    words = [word for word in argv if word not in own]
    if words[:1] == ["top.enable"]:
        return _enable_top(words[1], "pillar=True" in words)
    targets = [name for word in own if word.startswith("--targets=") for name in word.partition("=")[2].split(",")]
    code = 0
    if "--skip-dom0" not in own:
        code = _run(["salt-call", "--local", *words]).returncode
    for name in targets:
        shown, target_code = _manage(name, words)
        result = shown if "--show-output" in own else ["OK" if target_code == 0 else f"ERROR (exit code {target_code})"]
        sys.stdout.write(f"{name}:\n" + "".join(f"  {line}\n" for line in result))
        code = max(code, target_code)
    return code


def _run(argv, **options):
    # Only here and where else it is needed: most of these programs start no other, and they start very often.
    import subprocess

    try:
        return subprocess.run(argv, check=False, **options)
    except FileNotFoundError:
        sys.stderr.write(f"qubesctl: error: there is no {argv[0]} in this dom0\n")
        sys.exit(_FAILED)


def _manage(name, words):
    """Apply states in a VM as the management VM does: with a copy of /srv less the pillar roots, the pillar of this VM alone,
    and no custom modules. Here the states are run in the VM by a Salt that is there; the real one brings its own (salt-ssh).
    """
    import tempfile

    row = _states(_parser(), name)[name]
    answer = _run(["salt-call", "--local", f"--id={name}", "--out=json", "--log-level=quiet", "pillar.items"], capture_output=True)
    kind = {"TemplateVM": "template", "StandaloneVM": "standalone"}.get(row["class"], "app")
    pillar = {**json.loads(answer.stdout)["local"], "qubes": {"type": kind}}
    # By dom0's pillar_opts, as Qubes sets it: what the whole configuration comes to, minion.d included.
    config = pillar.pop("master")
    kept = {
        "id": name,
        "file_client": "local",
        "root_dir": _MANAGED,
        "file_roots": {env: [_MANAGED + root for root in roots] for env, roots in config["file_roots"].items()},
        "pillar_roots": {"base": [f"{_MANAGED}/pillar"]},
    }
    with tempfile.TemporaryDirectory() as folder:
        for path, content in (("minion", kept), ("pillar/combined.sls", pillar), ("pillar/top.sls", {"base": {name: ["combined"]}})):
            os.makedirs(os.path.dirname(f"{folder}/{path}"), exist_ok=True)
            with open(f"{folder}/{path}", "w", encoding="utf-8") as file:
                json.dump(content, file)
        roots = [root for roots in config["pillar_roots"].values() for root in roots]
        skipped = [f"--exclude={path}" for path in (*roots, "__pycache__")]
        tar = _run(["tar", "-c", *skipped, "-C", folder, "minion", "pillar", "/srv", "-P"], capture_output=True)
    if row["state"] == "Halted":
        _ask({"op": "start", "name": name})
    try:
        _in_vm(name, f"mkdir -p {_MANAGED} && tar -x -C {_MANAGED} --transform=s,^/,,", tar.stdout)
        with open(_SALT, encoding="utf-8") as file:
            salt = file.read().strip()
        done = _in_vm(name, " ".join([f"{salt}/bin/salt-call", "--local", f"--config-dir={_MANAGED}", "--retcode-passthrough", *map(shlex.quote, words)]))
        _in_vm(name, f"rm -rf {_MANAGED}")
    finally:
        if row["state"] == "Halted":
            _ask({"op": "shutdown", "name": name})
    untrusted_text = (done.stdout + done.stderr).decode("ascii", "ignore")
    return ["".join(char for char in line if " " <= char <= "~") for line in untrusted_text.splitlines()], done.returncode


def _in_vm(name, command, data=b""):
    return _run(["qvm-run", "--user=root", "--pass-io", "--no-gui", "--", name, command], input=data, capture_output=True)


def _enable_top(name, pillar):
    """``top.enable``, for one top file: the real one merges all that are enabled."""
    with open("/etc/salt/minion", encoding="utf-8") as file:
        roots = json.load(file)["pillar_roots" if pillar else "file_roots"]["base"]
    own = "/srv/pillar" if pillar else "/srv/salt"
    candidates = [f"{root}/{name.replace('.', '/')}{end}" for root in (own, *roots) for end in (".top", "/init.top")]
    found = [path for path in candidates if os.path.exists(path)]
    if not found:
        sys.stderr.write(f"qubesctl: error: there is no top file {name}\n")
        return _FAILED
    import shutil

    shutil.copy(found[0], f"{own}/top.sls")
    return 0


def main():
    """Do what this program's name says.

    Returns:
        int, the exit code.
    """
    name = os.path.basename(sys.argv[0])
    operations = {"qvm-run": _qvm_run, "qvm-check": _qvm_check, "qvm-ls": _qvm_ls, "qvm-prefs": _qvm_prefs, "qubesctl": _qubesctl}
    operations.update({"qvm-tags": _qvm_tags, "qvm-features": _qvm_features, "qrexec-client": _qrexec_client})
    try:
        if name != "qrexec-client":  # the real one is no Python program
            ballast = _cost_as_the_real_one()  # noqa: F841 - kept until we end
        if name in operations:
            return operations[name](sys.argv[1:])
        return _operate(name[len("qvm-") :], sys.argv[1:])
    except (FileNotFoundError, ConnectionError):
        sys.stderr.write(f"{name}: error: qubesd does not answer\n")
        return _FAILED
