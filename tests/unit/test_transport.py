# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs by which dom0 reaches a VM: none of them outlives its use."""

import asyncio
import os
import subprocess
import time
import types

import pytest
from pullrpc import transport
from pullrpc.aio import run
from pullrpc.config import make_config
from pullrpc.dom0 import Dom0
from pullrpc.errors import TransportError
from pullrpc.service import Service
from pullrpc.transport import list_vms, open_channel

#: As qvm-run does: starts a child that talks to the VM, and leaves it behind when it is told to end.
_QVM_RUN = """\
#!/bin/sh
sleep 600 &
echo $! > {folder}/child
wait
"""


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        # The last one: it went between the two.
        return False


def test_a_session_that_has_to_be_killed_leaves_no_process_behind(tmp_path):
    program = tmp_path / "qvm-run"
    program.write_text(_QVM_RUN.format(folder=tmp_path))
    program.chmod(0o755)
    child = tmp_path / "child"

    async def begin_and_end():
        channel = await open_channel(make_config({"qvm_run": str(program)}), "work", "true")
        while not child.exists() or not child.read_text().strip():
            time.sleep(0.01)
        pid = int(child.read_text())
        assert _is_alive(pid)
        assert await channel.end() < 0
        return pid

    pid = run(begin_and_end())
    deadline = time.monotonic() + 20
    while _is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_template_whose_name_ends_in_a_dash_keeps_it(tmp_path, monkeypatch):
    program = tmp_path / "qvm-ls"
    program.write_text("#!/bin/sh\nprintf '%s\\n' 'one|AppVM|debian-|False' 'two|AppVM|-|-' 'three|StandaloneVM||False'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert {vm["name"]: vm["template"] for vm in list_vms()} == {"one": "debian-", "two": "", "three": ""}


#: Knows all qubes but the one that is gone, and answers for the first one when it may.
_QVM_LS = """\
#!/bin/sh
shift 4
echo "$@" >> {folder}/looks
for vm; do
    [ "$vm" = gone ] && exit 1
    while [ "$vm" = first ] && [ ! -e {folder}/go ]; do sleep 0.01; done
    echo "$vm|11111111-1111-1111-1111-111111111111"
done
"""


def test_a_qube_that_is_gone_keeps_no_other_from_being_looked_up_with_it(tmp_path):
    program, looks = tmp_path / "qvm-ls", tmp_path / "looks"
    program.write_text(_QVM_LS.format(folder=tmp_path))
    program.chmod(0o755)
    names = {"key_dir": "qvm-remote-keys", "state_dir": "qvm-remote", "run_dir": "qvm-remote-run", "audit_log": "audit.log"}
    dom0 = Dom0(make_config({"qvm_ls": str(program), **{name: str(tmp_path / folder) for name, folder in names.items()}}))
    service = Service(dom0, None, None, lambda *_: None, lambda text: None)

    async def look_up():
        first = asyncio.ensure_future(service.uuid_of("first"))
        while not looks.exists():
            await asyncio.sleep(0.01)
        # These come while the first one is looked up, and share a look.
        others = [asyncio.ensure_future(service.uuid_of(vm)) for vm in ("work", "gone", "dev", "work")]
        await asyncio.sleep(0)
        (tmp_path / "go").touch()
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, work, gone, dev, again = run(service._in_loop(look_up()))
    assert {first, work, dev, again} == {"11111111-1111-1111-1111-111111111111"}
    assert isinstance(gone, TransportError)
    assert looks.read_text().splitlines() == ["first", "dev gone work", "dev", "gone", "work"]


def test_a_program_that_ends_as_it_is_told_what_to_run_is_a_vm_that_can_not_be_reached(tmp_path, monkeypatch):
    class Gone(Exception):
        """What qubesadmin raises."""

    started = []

    class Qubes:
        def run_service(self, vm, service, user, autostart, **streams):
            # It has left its stdin, and leaves a child behind.
            started.append(subprocess.Popen(["sh", "-c", f"exec <&-; sleep 600 & echo $! > {tmp_path}/child; wait"], **streams))
            while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
                time.sleep(0.01)
            return started[-1]

    library = types.SimpleNamespace(Qubes=Qubes, exc=types.SimpleNamespace(QubesException=Gone))
    monkeypatch.setattr(transport, "_qubesadmin", lambda: library)

    async def begin():
        with pytest.raises(TransportError, match="can't reach work"):
            await open_channel(make_config({"transport": "qubesadmin"}), "work", "true")

    run(begin())
    (process,) = started
    assert process.returncode is not None
    assert process.stdin.closed and process.stdout.closed
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 20
    while _is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
