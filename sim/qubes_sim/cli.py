# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of the simulator."""

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import sys
import termios
import time

from . import wire

_OPERATIONS = ("start", "shutdown", "pause", "unpause", "kill", "remove")
#: With hundreds of VMs it takes a while, seconds.
_DOWN_WAIT = 60
#: All that the hypervisor, and so the first process of each domain, has of its caller's environment.
_KEPT_ENVIRONMENT = ("PATH", "LC_CTYPE")
#: None stands for what differs: root, and of a VM its name; user.
_QUICK = (("dom0", "--root", None), ("dom0", "--root", None, "-u", None), ("vm", "--root", None, None, "-u", None))
_USAGE = """\
A Qubes OS to develop against: dom0 and VMs are Linux namespaces with their own file systems, users and host names.
In dom0, qvm-run, qvm-ls and their kin work; nothing else connects dom0 and the VMs."""


class _Failed(Exception):
    """What was asked for can't be done; the text says why."""


def main(argv):
    """Run the command line.

    Args:
        argv: list of str.

    Returns:
        int: 0, 1 for what failed, 2 for wrong usage; for ``dom0`` and ``vm`` the command's exit code.
    """
    # What follows "--" is the command's: argparse must not look at it.
    at = argv.index("--") if "--" in argv else len(argv)
    try:
        run = _read_quickly(argv[:at])
        if run:
            return _run_in(*run, argv[at + 1 :])
        options = _parser().parse_args(argv[:at])
        options.command = argv[at + 1 :]
        if options.command and options.do is not _run:
            _parser().error("only dom0 and vm take a command")
        return options.do(os.path.abspath(options.root), options)
    except (_Failed, OSError) as err:
        sys.stderr.write(f"qubes-sim: error: {err}\n")
        return 1


def _read_quickly(words):
    """Read the forms in which handle.py runs a command, thousands of times in a run of the tests: argparse takes longer than all else.

    Returns:
        (root, domain, user); None for any other form.
    """
    for form in _QUICK:
        if len(words) == len(form) and all(own in (None, word) for own, word in zip(form, words)):
            values = [word for own, word in zip(form, words) if own is None]
            if not any(value.startswith("-") for value in values):
                root, domain, user = values if form[0] == "vm" else [values[0], "dom0", *values[1:], "root"][:3]
                return os.path.abspath(root), domain, user
    return None


def _parser():
    import argparse

    parser = argparse.ArgumentParser(prog="qubes-sim", description=_USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name, do, text):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--root", required=True, metavar="DIR", help="the simulator's folder")
        command.set_defaults(do=do, operation=name)
        return command

    up = add("up", _up, "start dom0, make templates, make and start VMs")
    up.add_argument("--template", action="append", default=[], metavar="NAME[=FOLDER]", help="FOLDER: the file system of a distribution, for its root")
    up.add_argument("--vm", action="append", default=[], metavar="NAME[:TEMPLATE]")
    up.add_argument("--dom0-bind", action="append", default=[], metavar="SRC[:DST[:rw]]", help="show a path of the host in dom0")
    up.add_argument("--vm-bind", action="append", default=[], metavar="SRC[:DST[:rw]]", help="show a path of the host in all VMs")
    add("down", _down, "end everything")
    for name in ("dom0", "vm"):
        command = add(name, _run, f"run a command in {'dom0, as root' if name == 'dom0' else 'a VM, as its user'}")
        if name == "vm":
            command.add_argument("name", metavar="NAME")
        command.add_argument("-u", "--user", default="root" if name == "dom0" else "user")
        command.usage = f"qubes-sim {name} --root DIR {'NAME ' if name == 'vm' else ''}[-u USER] [-- CMD...]"
    create = add("create", _operate, "make VMs; they aren't started")
    create.add_argument("names", nargs="+", metavar="NAME[:TEMPLATE]")
    for name in _OPERATIONS:
        add(name, _operate, f"{name} VMs").add_argument("names", nargs="+", metavar="NAME")
    add("restart-qubesd", _restart_qubesd, "end the connections of all that listen to events in dom0")
    add("reboot", _reboot, "end all domains and start dom0 anew, with the services that are enabled there")
    add("status", _status, "list the domains")
    return parser


def _up(root, options):
    # Only here: this program starts for each command that a test runs in a domain, and none of them needs it.
    from . import hypervisor

    if set(os.environ) - set(_KEPT_ENVIRONMENT):
        # Root in a domain can read what its first process was started with, and the caller's environment may hold secrets.
        kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        os.execve(sys.executable, [sys.executable, *sys.argv], kept)
    with contextlib.suppress(OSError):
        wire.connect(os.path.join(root, "control.sock")).close()
        raise _Failed(f"a simulator is up in {root}")
    os.makedirs(os.path.join(root, "store"), exist_ok=True)
    os.chmod(root, 0o700)
    for name in ("control.sock", "qubesd.sock"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(root, name))
    settings = {
        "templates": options.template,
        "vms": [[*vm.split(":", 1), None][:2] for vm in options.vm],
        "dom0_binds": [bind_option(text) for text in options.dom0_bind],
        "vm_binds": [bind_option(text) for text in options.vm_bind],
        "user": 1000,
    }
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(read_end)
        _daemonize(root)
        settings["user"] = _own_ids()
        hypervisor.run(root, settings, write_end)
    os.close(write_end)
    os.wait()
    answer = json.loads(os.read(read_end, 4096) or b'{"error": "it ended at once; see hypervisor.log there"}')
    os.close(read_end)
    if "error" in answer:
        _remove(root)
        raise _Failed(answer["error"])
    return 0


def bind_option(text):
    """Read a path to show in a domain.

    Args:
        text: str, ``SRC[:DST[:rw]]``.

    Returns:
        list of (absolute source, target, bool read-only).

    Raises:
        OSError: there is no such path.
    """
    source, target, mode = [*text.split(":"), "", ""][:3]
    if not os.path.exists(source):
        raise FileNotFoundError(f"there is no {source} to bind")
    return [os.path.abspath(source), target or os.path.abspath(source), mode != "rw"]


def _daemonize(root):
    """Become a process of init's: of no terminal, no session of the caller's, no descriptor of his."""
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    # The caller's must not make folders of the domains unreadable.
    os.umask(0o022)
    log = os.open(os.path.join(root, "hypervisor.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _own_ids():
    """An ordinary user becomes root of a user namespace.

    Returns:
        int, the uid of VMs' users: 1000, or 0 where there is but one id.
    """
    if os.geteuid() == 0:
        return 1000
    # Only here, as in _up.
    import pwd
    import shutil
    import subprocess

    from . import linux

    uid, gid = os.getuid(), os.getgid()
    name = pwd.getpwuid(uid).pw_name
    ranges = [_subordinate(path, name, uid) for path in ("/etc/subuid", "/etc/subgid")]
    mappers = [shutil.which("newuidmap"), shutil.which("newgidmap")]
    read_end, write_end = os.pipe()
    pid = os.getpid()
    if all(ranges) and all(mappers):
        helper = os.fork()
        if helper == 0:
            os.read(read_end, 1)
            for mapper, own, (start, count) in zip(mappers, (uid, gid), ranges):
                if subprocess.run([mapper, str(pid), "0", str(own), "1", "1", str(start), str(count)], check=False).returncode:
                    os._exit(1)
            os._exit(0)
        linux.unshare(linux.CLONE_NEWUSER)
        os.write(write_end, b"!")
        if os.waitpid(helper, 0)[1] == 0:
            return 1000
        raise _Failed("newuidmap refused")
    linux.unshare(linux.CLONE_NEWUSER)
    for path, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{path}", "w", encoding="ascii") as file:
            file.write(text)
    return 0


def _subordinate(path, name, uid):
    with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
        for line in file:
            owner, start, count = line.strip().split(":")
            if owner in (name, str(uid)) and int(count) > 1000:
                return int(start), int(count)
    return None


def _down(root, options):
    try:
        with wire.connect(os.path.join(root, "control.sock")) as sock:
            wire.send(sock, {"op": "down"})
            deadline = time.monotonic() + _DOWN_WAIT
            while time.monotonic() < deadline and _is_up(root):
                time.sleep(0.02)
    except OSError:
        # None is up; what an ended one left goes all the same.
        pass
    if _is_up(root):
        raise _Failed("the simulator does not end")
    _remove(root)
    return 0


def _is_up(root):
    try:
        wire.connect(os.path.join(root, "control.sock")).close()
    except OSError:
        return False
    return True


def _remove(root):
    for name in ("control.sock", "qubesd.sock", "hypervisor.log"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(root, name))
    for folder in (os.path.join(root, "store"), root):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _ask(root, message, fds=()):
    try:
        sock = wire.connect(os.path.join(root, "control.sock"))
    except OSError:
        raise _Failed(f"no simulator is up in {root}; start one: qubes-sim up --root {root}") from None
    wire.send(sock, message, fds)
    return sock


def _answer(sock):
    answer, fds = wire.receive(sock)
    if answer is None:
        raise _Failed("the simulator has ended")
    if "error" in answer:
        raise _Failed(answer["error"])
    return answer, fds


def _operate(root, options):
    for text in options.names:
        name, _, template = text.partition(":")
        with _ask(root, {"op": options.operation, "name": name, "template": template or None}) as sock:
            _answer(sock)
    return 0


def _restart_qubesd(root, options):
    with _ask(root, {"op": options.operation}) as sock:
        _answer(sock)
    return 0


def _reboot(root, options):
    with _ask(root, {"op": "reboot"}) as sock:
        _answer(sock)
    boot = {"op": "run", "name": "dom0", "user": "root", "argv": ["/usr/bin/systemctl", "boot-simulated-dom0"], "tty": False}
    with _ask(root, boot, (0, 1, 2)) as sock:
        return _answer(sock)[0]["exit"]


def _status(root, options):
    with _ask(root, {"op": "status"}) as sock:
        rows = _answer(sock)[0]["domains"]
    for row in [{"name": "NAME", "class": "CLASS", "template": "TEMPLATE", "state": "STATE", "pid": "PID"}, *rows]:
        print(f"{row['name']:32}{row['class']:12}{row['template']:24}{row['state']:10}{row['pid'] or '-'}")
    return 0


def _run(root, options):
    return _run_in(root, options.name if options.operation == "vm" else "dom0", options.user, options.command)


def _run_in(root, name, user, command):
    is_terminal = os.isatty(0) and os.isatty(1)
    message = {"op": "run", "name": name, "user": user, "argv": command or ["/bin/bash", "-l"], "tty": is_terminal}
    if is_terminal:
        message["term"] = os.environ.get("TERM", "")
        return _run_on_terminal(_ask(root, message))
    with _ask(root, message, (0, 1, 2)) as sock:
        # The command is not our child; whoever signals us means it.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda number, _: wire.send(sock, {"signal": number}))
        return _answer(sock)[0]["exit"]


def _run_on_terminal(sock):
    """Pass keys and output between this terminal and one in the domain."""
    import tty

    _, fds = _answer(sock)
    master = fds[0]

    def resize(*_):
        fcntl.ioctl(master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, struct.pack("4H", 0, 0, 0, 0)))

    before = termios.tcgetattr(0)
    signal.signal(signal.SIGWINCH, resize)
    resize()
    tty.setraw(0)
    try:
        poller = select.poll()
        for fd in (0, master, sock.fileno()):
            poller.register(fd, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == sock.fileno():
                    return _answer(sock)[0]["exit"]
                with contextlib.suppress(OSError):
                    os.write(master if fd == 0 else 1, os.read(fd, 65536))
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
