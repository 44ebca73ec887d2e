# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor: owns all domains, starts and stops them, and carries dom0's qvm-run into a VM, as Xen and qrexec do.

It serves two sockets: one for whoever runs the simulator, and one that only dom0 can see. No VM can reach either, and
nothing a VM does makes it act.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import uuid

from . import domain, linux, wire
from .events import Events
from .relay import Relay
from .roots import Store

#: What qvm-prefs shows of a new VM.
_PREFS = {"label": "red", "autostart": "False", "memory": "400", "netvm": "", "provides_network": "False", "template_for_dispvms": "False"}
_READ_ONLY = ("name", "klass", "template", "uuid")
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]{0,30}\Z")
_RESERVED = ("dom0", "domain-0", "none", "default")
#: Where dom0's Python library lies; the real one is among Python's own packages, where a virtual environment does not look.
LIBRARY = "/usr/lib/qubes/simulated"
#: How long a VM's processes have to end by themselves when it is shut down, seconds.
_SHUTDOWN_GRACE = 0.5
#: Programs of the simulator's in dom0, all of them ``dom0_tools.py`` under these names.
TOOLS = (
    *("qvm-run", "qvm-check", "qvm-ls", "qvm-start", "qvm-shutdown", "qvm-kill", "qvm-pause", "qvm-unpause", "qvm-remove"),
    *("qvm-prefs", "qvm-tags", "qvm-features", "qubesctl", "qrexec-client"),
)
#: A program is no more than this, so that what it does is compiled once and not at each start.
_PROGRAM = """\
#!/usr/bin/python3 -IS
import sys
sys.path.insert(0, "{folder}")
from {module} import main
sys.exit(main())
"""
_QUBESDB = "#!/bin/sh\n# qubesdb of the simulator: a VM's name is all it knows.\n[ \"$1\" = /name ] && echo {name}\n"


class SimError(Exception):
    """What was asked for can't be done; the text says why."""


class Domain:
    """A dom0, template or VM."""

    def __init__(self, name, klass, template):
        self.name = name
        self.klass = klass
        self.uuid = str(uuid.uuid4())
        self.template = template
        self.state = "Halted"
        self.prefs = dict(_PREFS)
        self.tags = set()
        self.features = {}
        self.keeper = None
        self.sock = None
        self.send_lock = threading.Lock()
        self.replies = {}


class Hypervisor:
    """All domains of one simulator.

    Args:
        root: str, its folder.
        store_folder: str, on a memory file system of our own.
        options: dict: ``dom0_binds``, ``vm_binds`` (lists of [source, target, read-only]), ``user`` (int, uid of VMs' users).
    """

    def __init__(self, root, store_folder, options):
        self._root = root
        self._options = options
        self._store = Store(store_folder)
        self._domains = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._forks = queue.Queue()
        self._events = Events()

    def boot(self, templates, vms):
        """Make all domains and start dom0 and the VMs.

        Args:
            templates: list of str: a name, or name=FOLDER for one with a file system of its own.
            vms: list of [name, template or None].
        """
        self._store.make_base()
        self._control = wire.listen(os.path.join(self._root, "control.sock"))
        self._qubesd = wire.listen(os.path.join(self._root, "qubesd.sock"))
        self._add("dom0", "AdminVM", None)
        write_programs(self._store, "dom0_tools", TOOLS)
        write_programs(self._store, "systemctl", ["systemctl"])
        for part in ("__init__.py", "config.py", "events.py", "exc.py"):
            self._store.write("dom0", f"{LIBRARY}/qubesadmin/{part}", source(f"qubesadmin/{part}"))
        self._store.write("dom0", f"{LIBRARY}/qubesadmin/wire.py", source("wire.py"))
        for folder in ("/etc/qubes", "/etc/salt/minion.d", "/etc/systemd/system/multi-user.target.wants", "/srv/salt", "/srv/formulas/base", "/var/lib/qubes"):
            self._store.write("dom0", folder + "/.simulated", "")
        for word in templates or ["template"]:
            name, _, system = word.partition("=")
            if system:
                self._store.give_system(name, system)
            self.create(name, None, "TemplateVM")
        self.start("dom0")
        for name, template in vms:
            self.create(name, template)
            self.start(name)

    def serve(self):
        """Answer until told to end."""
        for listener, answer in ((self._control, self._answer_control), (self._qubesd, self._answer_dom0)):
            threading.Thread(target=self._accept, args=(listener, answer), daemon=True).start()
        while True:
            task = self._forks.get()
            if task is None:
                break
            task()
        for one in list(self._domains.values()):
            self.kill(one.name)

    def create(self, name, template, klass="AppVM"):
        """Make a VM or a template; it isn't started."""
        if not _NAME.match(name) or name.lower() in _RESERVED:
            raise SimError(f"{name!r} can't be the name of a qube")
        if name in self._domains:
            raise SimError(f"there is a qube named {name} already")
        if klass == "AppVM":
            template = template or next(one.name for one in self._domains.values() if one.klass == "TemplateVM")
            if template not in self._domains or self._domains[template].klass != "TemplateVM":
                raise SimError(f"there is no template named {template}")
        self._add(name, klass, template)
        self._store.write(name, "/usr/bin/qubesdb-read", _QUBESDB.format(name=name), 0o755)
        self._events.emit("", "domain-add", vm=name)

    def remove(self, name):
        """Remove a VM that does not run, with all that it has."""
        with self._lock:
            one = self._find(name)
            if one.state != "Halted":
                raise SimError(f"{name} is not halted")
            if any(other.template == name for other in self._domains.values()):
                raise SimError(f"{name} is the template of others")
            with self._events.lock:
                del self._domains[name]
                self._events.emit("", "domain-delete", vm=name)
            self._store.forget(name)

    def start(self, name):
        """Start a domain; one that runs is left alone."""
        with self._lock:
            one = self._find(name)
            if one.state == "Paused":
                raise SimError(f"{name} is paused")
            if one.state == "Running":
                return
            self._emit(one, "domain-pre-start")
            self._store.reset(name, one.template)
            self._identify(one)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            one.sock, one.replies = ours, {}
            one.keeper = self._fork(lambda: domain.start(name, self._store, theirs, self._binds(one), one.klass != "AdminVM"))
            theirs.close()
            message, _ = wire.receive(ours)
            if not message or "ready" not in message:
                os.waitpid(one.keeper, 0)
                self._emit(one, "domain-start-failed")
                raise SimError(f"{name} could not be started: {(message or {}).get('failed', 'it ended at once')}")
            self._set_state(one, "Running", "domain-start")
            threading.Thread(target=self._listen, args=(one, ours, one.keeper), daemon=True).start()

    def shutdown(self, name):
        """End a VM's processes, gently at first."""
        one = self._find(name)
        if one.state == "Paused":
            raise SimError(f"{name} is paused")
        if one.state == "Running":
            self._tell(one, {"op": "halt"})
            deadline = time.monotonic() + _SHUTDOWN_GRACE
            while time.monotonic() < deadline and len(_pids(one.keeper)) > 1:
                time.sleep(0.01)
        self.kill(name)

    def kill(self, name):
        """End a domain as a power cut does."""
        one = self._find(name)
        if one.state == "Halted":
            return
        for pid in _pids(one.keeper):
            _signal(pid, signal.SIGKILL)
        while one.state != "Halted":
            time.sleep(0.005)

    def pause(self, name):
        """Freeze all processes of a VM."""
        one = self._find(name)
        if one.state != "Running":
            raise SimError(f"{name} is not running")
        one.state = "Paused"
        # Until a round finds everybody stopped: processes may start others meanwhile.
        while [_signal(pid, signal.SIGSTOP) for pid in _pids(one.keeper) if _state(pid) not in "TtZX"]:
            time.sleep(0.005)
        self._emit(one, "domain-paused")

    def unpause(self, name):
        """Let a paused VM go on."""
        one = self._find(name)
        if one.state != "Paused":
            raise SimError(f"{name} is not paused")
        one.state = "Running"
        for pid in _pids(one.keeper):
            _signal(pid, signal.SIGCONT)
        self._emit(one, "domain-unpaused")

    def reboot(self):
        """End all domains, and start dom0 anew: what lay on its /run and /tmp is gone."""
        for one in list(self._domains.values()):
            self.kill(one.name)
        self.start("dom0")

    def status(self):
        """Say what there is.

        Returns:
            list of dict: name, class, template, template_for_dispvms, state, pid, tags.
        """
        return [
            {
                "name": one.name,
                "class": one.klass,
                "uuid": one.uuid,
                "template": one.template or "",
                "template_for_dispvms": "" if one.klass == "AdminVM" else one.prefs["template_for_dispvms"],
                "state": one.state,
                "tags": sorted(one.tags),
                "pid": None if one.state == "Halted" else one.keeper,
            }
            for one in list(self._domains.values())
        ]

    def _set_state(self, one, state, event):
        with self._events.lock:
            one.state = state
            self._emit(one, event)

    def _emit(self, one, event):
        # Of dom0 itself there are none.
        if one.klass != "AdminVM":
            self._events.emit(one.name, event)

    def _add(self, name, klass, template):
        one = self._domains[name] = Domain(name, klass, template)
        self._store.make_private(name, self._options["user"])
        self._store.reset(name, template)
        return one

    def _identify(self, one):
        self._store.write(one.name, "/etc/hostname", one.name + "\n")
        self._store.write(one.name, "/etc/hosts", f"127.0.0.1 localhost {one.name}\n")
        if one.klass == "AppVM":
            self._store.write(one.name, "/usr/bin/qubesdb-read", _QUBESDB.format(name=one.name), 0o755)

    def _binds(self, one):
        if one.klass == "AdminVM":
            return [[os.path.join(self._root, "qubesd.sock"), "/run/qubesd.sock", False], *self._options["dom0_binds"]]
        # What is bound belongs to this machine's system, and a template with one of its own has nothing to do with that.
        return [] if self._store.has_system(one.name) else self._options["vm_binds"]

    def _find(self, name):
        if name not in self._domains:
            raise SimError(f"there is no qube named {name}")
        return self._domains[name]

    def _fork(self, start):
        """Call something in the main thread: a domain dies with the thread that forked it."""
        if threading.current_thread() is threading.main_thread():
            return start()
        results = queue.Queue()
        self._forks.put(lambda: results.put(start()))
        return results.get()

    def _listen(self, one, sock, keeper):
        while True:
            message, fds = wire.receive(sock)
            if message is None:
                break
            waiting = one.replies.get(message.get("id"))
            if waiting is not None:
                waiting.put((message, fds))
        os.waitpid(keeper, 0)
        self._set_state(one, "Halted", "domain-shutdown")
        sock.close()
        for waiting in list(one.replies.values()):
            waiting.put((None, []))

    def _tell(self, one, message, fds=()):
        with one.send_lock, contextlib.suppress(OSError):
            wire.send(one.sock, message, fds)

    def _accept(self, listener, answer):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._handle, args=(connection, answer), daemon=True).start()

    def _handle(self, connection, answer):
        with connection:
            message, fds = wire.receive(connection)
            if message is None:
                return
            try:
                wire.send(connection, answer(connection, message, fds) or {})
            except SimError as err:
                with contextlib.suppress(OSError):
                    wire.send(connection, {"error": str(err)})
            except OSError:
                # Whoever asked is gone.
                return

    def _answer_control(self, connection, message, fds):
        operation = message["op"]
        if operation == "down":
            self._forks.put(None)
            return {}
        if operation == "reboot":
            return self.reboot()
        if operation == "run":
            return self._run(connection, message, fds)
        if operation == "create":
            return self.create(message["name"], message["template"])
        if operation == "restart-qubesd":
            return self._events.drop_all()
        return self._answer_common(message)

    def _answer_dom0(self, connection, message, fds):
        if message["op"] == "exec":
            return self._exec(connection, message, fds)
        if message["op"] == "events":
            return self._events.subscribe(fds[0], message["name"])
        if message["op"] == "prefs":
            return self._prefs(message)
        if message["op"] == "tag":
            getattr(self._find(message["name"]).tags, "add" if message["add"] else "discard")(message["tag"])
            return {}
        if message["op"] == "features":
            return self._features(message)
        return self._answer_common(message)

    def _answer_common(self, message):
        operation = message["op"]
        if operation == "status":
            return {"domains": self.status()}
        if operation in ("start", "shutdown", "kill", "pause", "unpause", "remove"):
            if message["name"] == "dom0":
                raise SimError(f"dom0 can't be told to {operation}")
            return getattr(self, operation)(message["name"])
        raise SimError(f"no such operation: {operation}")

    def _prefs(self, message):
        one = self._find(message["name"])
        shown = {**one.prefs, "name": one.name, "klass": one.klass, "template": one.template or "", "uuid": one.uuid}
        if message["value"] is not None:
            if message["prop"] not in shown or message["prop"] in _READ_ONLY:
                raise SimError(f"no such property, or it can't be set: {message['prop']}")
            one.prefs[message["prop"]] = message["value"]
        return {"prefs": shown}

    def _features(self, message):
        features = self._find(message["name"]).features
        if message.get("value") is not None:
            features[message["feature"]] = message["value"]
        elif "feature" in message:
            features.pop(message["feature"], None)
        return {"features": features}

    def _run(self, connection, message, fds):
        """A person at a domain's terminal: the descriptors are theirs, so they are handed over as they are."""
        one = self._find(message["name"])
        if one.state != "Running":
            raise SimError(f"{one.name} is not running")
        return self._wait_for_command(one, connection, {**message, "op": "run"}, fds)

    def _exec(self, connection, message, fds):
        """dom0's qvm-run: bytes are copied, never descriptors handed over."""
        one = self._find(message["name"])
        if one.state == "Halted" and message["autostart"]:
            self.start(one.name)
        if one.state == "Paused" and message["autostart"]:
            self.unpause(one.name)
        if one.state != "Running":
            for fd in fds:
                os.close(fd)
            return {"exit": 1, "state": one.state}
        relay = Relay(fds if message["pass_io"] else [*fds, None, None, None][:3], message["input"].encode("utf-8", "surrogateescape"))
        command = {"op": "run", "argv": message["argv"], "user": message["user"], "tty": False}
        try:
            return self._wait_for_command(one, connection, command, relay.vm_fds, relay)
        finally:
            relay.close()

    def _wait_for_command(self, one, connection, message, fds, relay=None):
        number = next(self._numbers)
        one.replies[number] = replies = queue.Queue()
        if one.state == "Halted":
            # It ended just now, maybe before it could tell this queue.
            replies.put((None, []))
        try:
            self._tell(one, {**message, "id": number}, fds)
            if relay is not None:
                relay.start()
            else:
                for fd in fds:
                    os.close(fd)
            # Whoever asked may go away at any time, and takes the command's session with them.
            threading.Thread(target=self._watch, args=(connection, one, number, relay, replies), daemon=True).start()
            while True:
                reply, handed = replies.get()
                if reply is None:
                    return {"exit": 1, "ended": True}
                if "exit" in reply:
                    if relay is not None:
                        relay.finish()
                    return {"exit": reply["exit"]}
                if handed:
                    wire.send(connection, {"tty": True}, handed)
                    for fd in handed:
                        os.close(fd)
        finally:
            one.replies.pop(number, None)

    def _watch(self, connection, one, number, relay, replies):
        while True:
            try:
                message = wire.receive(connection)[0]
            except OSError:
                return
            if message is None:
                break
            self._tell(one, {"op": "kill", "id": number, "signal": message["signal"]})
        if number not in one.replies:
            return
        if relay is not None:
            # As with qrexec, the process in the VM sees its descriptors closed; it isn't killed.
            relay.stop()
        else:
            self._tell(one, {"op": "kill", "id": number, "signal": int(signal.SIGHUP)})
            time.sleep(0.2)
            self._tell(one, {"op": "kill", "id": number, "signal": int(signal.SIGKILL)})
        replies.put((None, []))


def run(root, options, ready_fd):
    """Be the hypervisor of a simulator: in the background, until told to end. Does not return.

    Args:
        root: str, absolute.
        options: dict, as the command line made it.
        ready_fd: int; one JSON object is written to it once all is up, or has failed.
    """
    store_folder = os.path.join(root, "store")
    try:
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        linux.mount("tmpfs", store_folder, "tmpfs", linux.MS_NOSUID if os.geteuid() else 0, "size=50%,mode=0755")
        hypervisor = Hypervisor(root, store_folder, options)
        hypervisor.boot(options["templates"], options["vms"])
    except (OSError, SimError) as err:
        os.write(ready_fd, json.dumps({"error": str(err)}).encode())
        sys.exit(1)
    os.write(ready_fd, b"{}")
    os.close(ready_fd)
    hypervisor.serve()
    os._exit(0)


def write_programs(store, module, names):
    """Put programs of the simulator's into a dom0 that doesn't run.

    Args:
        store: Store.
        module: str, the module of this package that has ``main``, which goes by the program's name.
        names: list of str, what it is called there.
    """
    store.write("dom0", f"{LIBRARY}/{module}.py", source(f"{module}.py"))
    for name in names:
        store.write("dom0", f"/usr/bin/{name}", _PROGRAM.format(folder=LIBRARY, module=module), 0o755)


def source(name):
    """Read a file of the simulator that is to lie in dom0.

    Args:
        name: str, relative to this package.

    Returns:
        str
    """
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), encoding="utf-8") as file:
        return file.read()


def _pids(keeper):
    """All processes in the namespace of a domain, its first one among them."""
    found = []
    try:
        own = os.readlink(f"/proc/{keeper}/ns/pid_for_children")
    except OSError:
        return found
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/ns/pid") == own:
                    found.append(int(name))
    return found


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return "X"
    return stat[stat.rfind(b")") + 2 : stat.rfind(b")") + 3].decode("ascii")


def _signal(pid, signum):
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True
