# SPDX-License-Identifier: GPL-2.0-or-later
"""How dom0 reaches a VM: by starting ``qvm-run`` and its kin, found through PATH, or by the library ``qubesadmin``
that these are made of, and in no other way.

Nothing here ever starts a VM that is served (``--no-autostart``, always), and no VM can make dom0 call any of it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time

from .aio import ended, readable, write_all
from .errors import PullError, TransportError
from .ids import check_vm_name

#: A list of VM names longer than this is not believed, bytes (more than 30,000 VMs).
_LIST_MAX = 1 << 20
_LIST_WAIT = 30
#: How long a qvm-run told to end may take, seconds.
_END_WAIT = 1.0
_READ_SIZE = 1 << 16
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
#: How long a template may take to start or shut down, seconds.
_START_WAIT = 180


def running_vms(config):
    """List the VMs that are running now, with one program start for all of them.

    Args:
        config: Config.

    Returns:
        set of str

    Raises:
        TransportError: they can't be listed.
    """
    return _running_by_library() if config.transport == "qubesadmin" else _running_by_program(config.qvm_ls)


def uuids(config, *vms):
    """Look up which qubes now have some names: a name may be given to another qube, a UUID is not (core-admin, property ``uuid``).

    Args:
        config: Config.
        vms: str, checked names of qubes that there are; none for all qubes.

    Returns:
        dict of name to str.

    Raises:
        TransportError: there is no such qube, or it can't be told.
    """
    found = _uuids_by_library(vms) if config.transport == "qubesadmin" else _uuids_by_program(config.qvm_ls, vms)
    for vm in vms:
        if not _UUID.match(found.get(vm, "")):
            raise TransportError(f"can't tell which qube {vm} is: qubesd names no UUID of it")
    return {vm: found[vm] for vm in vms} if vms else {vm: uuid for vm, uuid in found.items() if _UUID.match(uuid)}


def _uuids_by_program(program, vms):
    rows = [line.split("|") for line in _list(program, "--raw-data", "--fields", "name,uuid", *(("--", *vms) if vms else ()))]
    if any(len(row) != 2 for row in rows):
        raise TransportError("can't tell which qubes there are: qvm-ls answered in a form that is not known here")
    return dict(rows)


def _uuids_by_library(vms):
    qubesadmin = _qubesadmin()
    try:
        domains = qubesadmin.Qubes().domains
        return {vm: str(domains[vm].uuid) for vm in vms or [one.name for one in domains if one.name != "dom0"]}
    except KeyError as err:
        raise TransportError(f"there is no qube {err}") from None
    except (qubesadmin.exc.QubesException, AttributeError, OSError) as err:
        raise TransportError(f"can't tell which qubes there are: {err}") from err


def list_vms(tags=()):
    """List all VMs of the machine.

    Args:
        tags: iterable of str, the tags that are asked for; one more program start for each.

    Returns:
        list of dict: ``name``, ``class``, ``template`` (str; empty without one), ``tags`` (list of str, those asked for),
        ``for_disposables`` (bool, whether disposables are made from it).

    Raises:
        TransportError: they can't be listed.
    """
    rows = [line.split("|") for line in _list("qvm-ls", "--raw-data", "--fields", "name,class,template,template_for_dispvms")]
    if any(len(row) != 4 for row in rows):
        raise TransportError("can't list the qubes: qvm-ls answered in a form that is not known here")
    tagged = {tag: vms_with_tag(tag) for tag in tags}
    return [
        {
            "name": name,
            "class": klass,
            "template": "" if template == "-" else template,
            "tags": [tag for tag in tagged if name in tagged[tag]],
            # A class without this property has a dash there.
            "for_disposables": for_disposables not in ("-", "False"),
        }
        for name, klass, template, for_disposables in rows
    ]


def vms_with_tag(tag):
    """List the VMs that have a tag now.

    Args:
        tag: str, a constant of pillar's.

    Returns:
        set of str

    Raises:
        TransportError: they can't be listed.
    """
    return set(_list("qvm-ls", "--raw-list", "--tags", tag))


def _running_by_program(program):
    names = set()
    for line in _list(program, "--running", "--raw-list"):
        try:
            names.add(check_vm_name(line.strip()))
        except PullError:
            # dom0 itself is in the list.
            continue
    return names


def _running_by_library():
    qubesadmin = _qubesadmin()
    try:
        app = qubesadmin.Qubes()
        # Only with this does the one call that lists all of them keep their states.
        app.cache_enabled = True
        return {vm.name for vm in app.domains if vm.name != "dom0" and vm.get_power_state() == "Running"}
    except (qubesadmin.exc.QubesException, OSError) as err:
        raise TransportError(f"can't list the running VMs: {err}") from err


def _qubesadmin():
    try:
        import qubesadmin
        import qubesadmin.exc
    except ImportError:
        raise TransportError("transport: qubesadmin needs that library, which is not here; use transport: qvm-run") from None
    return qubesadmin


def _list(program, *words):
    code, lines = _ask(program, *words)
    if code:
        raise TransportError(f"{' '.join((program, *words))} ended with exit code {code}")
    return lines


def _ask(program, *words):
    """The exit code of a program and the lines that it prints, at most so many and in bounded time."""
    asked = " ".join((program, *words))
    try:
        answer = subprocess.run([program, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIST_WAIT, check=False)
    except OSError as err:
        raise TransportError(f"{asked}: {err.strerror}") from err
    except subprocess.TimeoutExpired:
        raise TransportError(f"{asked}: no answer within {_LIST_WAIT} s") from None
    if len(answer.stdout) > _LIST_MAX:
        raise TransportError(f"{asked}: its answer is longer than {_LIST_MAX} bytes")
    return answer.returncode, answer.stdout.decode("ascii", "replace").splitlines()


def features(vm):
    """List what is noted of a VM; Qubes keeps it with the VM, copies it to its clones and removes it with it.

    Args:
        vm: str, a checked name.

    Returns:
        dict of str to str.

    Raises:
        TransportError: there is no such VM, or it can't be asked.
    """
    # All of them: asked for one that it has not, it ends with 1 as it does when it fails.
    code, lines = _ask("qvm-features", "--", vm)
    if code:
        raise TransportError(f"can't ask for the features of {vm}: is there a qube of that name? (qvm-features: exit code {code})")
    return {name: value.strip() for name, _, value in (line.partition(" ") for line in lines)}


def set_feature(vm, name, value):
    """Note something of a VM.

    Args:
        vm: str, a checked name.
        name: str, a constant of ours.
        value: str; None to take the note back.

    Raises:
        TransportError: it can't be done.
    """
    _list("qvm-features", *(["--unset", "--", vm, name] if value is None else ["--", vm, name, value]))


def set_running(vm, run):
    """Start or shut down a template, so that something can be installed there. No VM that is served is ever started.

    Args:
        vm: str, a checked name.
        run: bool.

    Raises:
        TransportError: it can't be done.
    """
    argv = ["qvm-start", "--", vm] if run else ["qvm-shutdown", "--wait", "--", vm]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_START_WAIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise TransportError(f"{argv[0]} {vm}: {err}") from err
    if done.returncode:
        raise TransportError(f"{argv[0]} {vm} ended with exit code {done.returncode}")


class Channel:
    """A program running in a VM, its stdin and stdout in our hands as non-blocking descriptors.

    Args:
        process: subprocess.Popen, as :func:`open_channel` makes it.
    """

    def __init__(self, process):
        self._process = process
        self.in_fd = process.stdin.fileno()
        self.out_fd = process.stdout.fileno()
        os.set_blocking(self.in_fd, False)
        os.set_blocking(self.out_fd, False)

    def close_stdin(self):
        """Tell the program that there is no more to come."""
        self._process.stdin.close()

    async def end(self):
        """Close both directions and see that the program is gone.

        Returns:
            int, its exit code; negative when it had to be killed.
        """
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()
        try:
            for signum in (None, signal.SIGTERM):
                if signum:
                    self._signal(signum)
                if await ended(self._process, _END_WAIT):
                    return self._process.returncode
        except BaseException:
            # Told to end at once: then so is the program.
            self._signal(signal.SIGKILL)
            raise
        self._signal(signal.SIGKILL)
        while not await ended(self._process, _END_WAIT):
            continue
        return self._process.returncode

    def _signal(self, signum):
        _signal_all(self._process, signum)


async def open_channel(config, vm, command, user=None):
    """Start a program in a VM.

    Args:
        config: Config.
        vm: str, a checked name.
        command: str, a constant of ours: nothing from a VM ever becomes part of it but checked ids.
        user: str, who runs it there; the VM's own user by default.

    Returns:
        Channel

    Raises:
        TransportError: it can't be started.
    """
    start = _start_by_library if config.transport == "qubesadmin" else _start_by_program
    # stderr is the VM's to write: not read, so nothing of it can get anywhere.
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True, "bufsize": 0}
    starting = asyncio.get_running_loop().run_in_executor(None, start, config, vm, command, user or config.user, streams)
    try:
        return Channel(await asyncio.shield(starting))
    except asyncio.CancelledError:
        # Nobody waits for it any more, and nobody would end it.
        Channel(await starting)._signal(signal.SIGKILL)
        raise


def _start_by_program(config, vm, command, user, streams):
    argv = [config.qvm_run, "--pass-io", "--no-gui", "--no-autostart", f"--user={user}", "--", vm, command]
    try:
        return subprocess.Popen(argv, **streams)
    except OSError as err:
        raise TransportError(f"can't start {config.qvm_run}: {err.strerror}") from err


def _start_by_library(config, vm, command, user, streams):
    """What ``qvm-run`` does, without a Python program of its own that stays for as long as the session lasts."""
    qubesadmin = _qubesadmin()
    try:
        process = qubesadmin.Qubes().run_service(vm, "qubes.VMShell", user=user, autostart=False, **streams)
    except (qubesadmin.exc.QubesException, OSError) as err:
        raise TransportError(f"can't reach {vm}: {err}") from err
    try:
        # As qvm-run does: the shell reads this line first, and the command what follows.
        os.write(process.stdin.fileno(), f"{command}; exit\n".encode("ascii"))
    except OSError as err:
        _end_at_once(process)
        raise TransportError(f"can't reach {vm}: what was started for it has ended ({err.strerror})") from err
    return process


def _end_at_once(process):
    _signal_all(process, signal.SIGKILL)
    for stream in (process.stdin, process.stdout):
        stream.close()
    process.wait()


def _signal_all(process, signum):
    # To all of its session: qvm-run leaves the qrexec-client that it started behind when it is told to end.
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        return


async def run_bounded(config, vm, command, data, output_max, wait, user=None):
    """Run a program in a VM once, with bounded output and time.

    Args:
        config: Config.
        vm: str, a checked name.
        command: str.
        data: iterable of bytes, its stdin.
        output_max: int, bytes; more ends it.
        wait: float, seconds.
        user: str, who runs it there; the VM's own user by default.

    Returns:
        (int, bytes): exit code and stdout.

    Raises:
        TransportError: it can't be started, wrote too much, or took too long.
        SessionBroken: it doesn't read what it is sent.
    """
    channel = await open_channel(config, vm, command, user)
    deadline = time.monotonic() + wait
    untrusted_output = bytearray()
    try:
        for chunk in data:
            await write_all(channel.in_fd, chunk, deadline)
        channel.close_stdin()
        while True:
            if not await readable(channel.out_fd, deadline - time.monotonic()):
                raise TransportError(f"{vm} did not answer in time")
            try:
                chunk = os.read(channel.out_fd, _READ_SIZE)
            except BlockingIOError:
                continue
            if not chunk:
                break
            untrusted_output += chunk
            if len(untrusted_output) > output_max:
                raise TransportError(f"{vm} sent more than it was asked for")
    finally:
        code = await channel.end()
    return code, bytes(untrusted_output)
