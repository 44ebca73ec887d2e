# SPDX-License-Identifier: GPL-2.0-or-later
"""The MCP server of the examples: driven by the official client, it runs in a VM for which dom0 has the example's rules."""

import asyncio
import contextlib
import datetime
import io
import os
import re
import sys
import tarfile
import textwrap
import time

import pytest
import salt.utils.yaml
from conftest import ROOT
from pullrpc.gate import Request
from pullrpc.policy import decide_steps, split_script
from pullrpc.question import text_of
from qubes_sim.stand import Stand

pytest.importorskip("mcp", reason="the MCP library is not installed; it needs Python 3.10")
from anyio.from_thread import start_blocking_portal  # noqa: E402
from mcp import Client, StdioServerParameters, stdio_client  # noqa: E402

_FOLDER = os.path.join(ROOT, "examples", "agent")
#: Answers as the file beside it says, or not at all, and keeps what it was asked.
_HELPER = """\
#!/bin/sh
cat > /tmp/asked.new
mv /tmp/asked.new /tmp/asked
read answer < /tmp/answer
[ $answer != never ] || exec sleep 1000
echo $answer
[ $answer = yes ]
"""
_TAG = "agent-managed"


def _read(name):
    with open(os.path.join(_FOLDER, name), encoding="utf-8") as file:
        return file.read()


def _pillar(**more):
    """The example, word by word; only its end lies ahead of us, and a program answers in the user's place."""
    pillar = salt.utils.yaml.safe_load(_read("pillar.example"))["qvm-remote"]
    ahead = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)
    pillar["vms"]["agent"].update(until=ahead.isoformat(), **more)
    pillar["vms"]["loose"] = {"policy": "full"}
    return {**pillar, "ask": {"helper": "/tmp/helper", "timeout": 120}, "engine": {"discover_interval": 1, "poll_wait": 5}}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine with two VMs that agent may manage, and one that it may not know of; the server's files are in agent and loose."""
    with Stand(os.path.join(str(tmp_path_factory.mktemp("agent")), "sim"), vms=("agent", "loose"), warm=True) as stand:
        stand.set_up(_pillar())
        stand.create("sandbox", "old", "vault")
        for vm in ("sandbox", "old"):
            stand.dom0("qvm-tags", vm, "add", _TAG, check=True)
        stand.put("/tmp/helper", _HELPER, "0700")
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(_FOLDER, "agent", filter=lambda one: None if one.name.endswith("__pycache__") else one)
        for vm in ("agent", "loose"):
            stand.vm(vm, "tar", "-x", "--no-same-owner", data=archive.getvalue(), check=True)
        stand.wait_served("agent", "loose")
        yield stand


@contextlib.contextmanager
def _session(machine, vm, *words):
    """The client of an agent that started the server in its VM.

    Yields:
        callable of (name of one of the client's methods, its arguments), which gives a future.
    """
    argv = machine.command("vm", vm, "-u", "user", "--", sys.executable, "/home/user/agent/qvm-remote-mcp", *words)
    with open(os.path.join(machine.root, f"{vm}.log"), "w", encoding="utf-8") as log, start_blocking_portal() as portal:
        transport = stdio_client(StdioServerParameters(command=argv[0], args=argv[1:]), errlog=log)
        with portal.wrap_async_context_manager(Client(transport)) as client:
            yield lambda method, *args: portal.start_task_soon(getattr(client, method), *args)


@pytest.fixture(scope="module")
def agent(machine):
    """The agent's session."""
    with _session(machine, "agent", "--tag", _TAG) as session:
        yield session


def _call(agent, tool, **arguments):
    """Call a tool.

    Returns:
        (bool, str): whether it is an error, and its text.
    """
    result = agent("call_tool", tool, arguments).result()
    text = "\n".join(part.text for part in result.content)
    return result.is_error, text.removeprefix(f"Error executing tool {tool}: ")


def _answer(machine, word):
    machine.put("/tmp/answer", word + "\n")
    machine.dom0("rm", "-f", "/tmp/asked", check=True)


def _wait(is_so, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _pref(machine, vm, name):
    return machine.dom0("qvm-prefs", vm, name, check=True).stdout.decode().strip()


def test_what_the_user_reads_is_as_the_readme_shows_it():
    shown = textwrap.dedent(_read("README.rst").partition("reads of a plan::\n\n")[2].partition("Set it up\n")[0]).strip() + "\n"
    cid = re.search(r"request: (\S+);", shown)[1]
    steps = split_script("\n".join(re.findall(r"^ +\d+  (.*)$", shown, re.MULTILINE)))
    policy = _pillar()["vms"]["agent"]["policy"]
    decision = decide_steps(policy, steps, lambda tag: {"sandbox"} if tag == _TAG else set())
    request = Request("agent", cid, "", None, "steps", 120, None, b"", b"", steps=tuple(steps), by=decision.rule, asks=True)
    assert (len(steps), decision.asks) == (3, True)
    assert text_of(request, "root", 120) == shown


def test_a_ping_does_not_wait_for_as_long_as_a_command_may_run(tmp_path, monkeypatch):
    program = tmp_path / "qvm-remote"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    monkeypatch.syspath_prepend(_FOLDER)
    from qvm_remote_mcp.remote import Dom0

    assert asyncio.run(Dom0(120, str(program)).ping()) == "-q ping"


def test_a_qube_that_does_not_shut_down_is_no_success_and_is_not_killed(tmp_path, monkeypatch):
    program = tmp_path / "qvm-remote"
    program.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/ran
case "$*" in
*":;:") echo "qvm-remote: error: no shell" >&2; exit 125;;
*qvm-ls*) [ ! -e {tmp_path}/hangs ] || exec sleep 1000; echo "sandbox|Running|AppVM|debian-13";;
esac
""")
    program.chmod(0o755)
    monkeypatch.syspath_prepend(_FOLDER)
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from qvm_remote_mcp import manage
    from qvm_remote_mcp.remote import Dom0

    monkeypatch.setattr(manage, "_SHUTDOWN_WAIT", 1)
    monkeypatch.setattr(manage, "_LOOK_INTERVAL", 0.01)
    server = MCPServer("test")
    manage.offer(server, Dom0(120, str(program)))
    for hangs in (False, True):
        if hangs:
            (tmp_path / "hangs").touch()
        with pytest.raises(ToolError, match=r"sandbox was told to shut down, and was not seen halted within 1 s"):
            asyncio.run(server.call_tool("shutdown_vm", {"vm": "sandbox"}))
    ran = (tmp_path / "ran").read_text()
    assert ran.count("-- qvm-shutdown sandbox\n") == 2
    assert ran.count("qvm-ls") > 3
    assert "kill" not in ran


def test_tools_that_look_are_told_apart_from_those_that_change(agent):
    tools = {tool.name: tool for tool in agent("list_tools").result().tools}
    looks = {name for name, tool in tools.items() if tool.annotations.read_only_hint}
    assert looks == {"status", "list_vms", "vm_info", "vm_prefs"}
    assert {name for name in looks if not tools[name].title.startswith("observe: ")} == set()
    assert {name: tool.annotations.destructive_hint for name, tool in tools.items() if name not in looks} == {
        "start_vm": False,
        "shutdown_vm": True,
        "set_pref": True,
        "plan": True,
    }


def test_it_sees_the_tagged_vms_and_no_other(agent):
    listed = agent("call_tool", "list_vms", {}).result().structured_content["result"]
    assert sorted(vm["name"] for vm in listed) == ["old", "sandbox"]
    assert agent("call_tool", "vm_info", {"vm": "sandbox"}).result().structured_content["state"] == "Halted"
    assert _call(agent, "vm_prefs", vm="sandbox", property="memory") == (False, "400")
    assert "provides_network" in _call(agent, "vm_prefs", vm="sandbox")[1]
    assert _call(agent, "status")[1].startswith("dom0 answered in ")


def test_it_changes_a_tagged_vm(machine, agent):
    assert _call(agent, "set_pref", vm="sandbox", property="memory", value="444") == (False, "sandbox: memory was set")
    assert _pref(machine, "sandbox", "memory") == "444"
    assert _call(agent, "start_vm", vm="sandbox") == (False, "sandbox was started")
    assert machine.dom0("qvm-check", "--running", "sandbox").returncode == 0
    assert _call(agent, "shutdown_vm", vm="sandbox") == (False, "sandbox is shut down")
    assert machine.dom0("qvm-check", "--running", "sandbox").returncode == 1


def test_a_vm_without_the_tag_is_refused_and_looks_like_one_that_does_not_exist(machine, agent):
    for tool, more in (("start_vm", {}), ("set_pref", {"property": "memory", "value": "1"}), ("vm_prefs", {}), ("vm_info", {})):
        hidden, missing = (_call(agent, tool, vm=vm, **more) for vm in ("vault", "nosuch"))
        assert hidden == missing
        assert hidden[0]
        assert "no rule allows it" in hidden[1]
        assert "Tell the user" in hidden[1]
    assert _pref(machine, "vault", "memory") == "400"
    assert _call(agent, "set_pref", vm="sandbox", property="provides_network", value="True")[0]


def test_what_can_not_be_a_name_or_value_does_not_reach_dom0(agent):
    for arguments in ({"vm": "--all"}, {"vm": "sandbox;id"}, {"vm": "sandbox\n"}):
        assert _call(agent, "start_vm", **arguments)[0]
    error, text = _call(agent, "set_pref", vm="sandbox", property="memory", value="--default")
    assert (error, "pattern" in text, "no rule" in text) == (True, True, False)


def test_a_failure_in_dom0_says_what_failed(agent):
    error, text = _call(agent, "vm_prefs", vm="sandbox", property="nosuch")
    assert error
    assert text.startswith("qvm-prefs failed in dom0 with exit code 2: ")
    assert text.endswith("qvm-prefs: error: no such property: 'nosuch'\n")


def test_a_plan_that_a_line_of_which_may_not_run_does_nothing(machine, agent):
    error, text = _call(agent, "plan", script="qvm-prefs sandbox memory 300\nqvm-prefs vault memory 300", why="more room")
    assert (error, "line 2: no rule allows it" in text) == (True, True)
    error, text = _call(agent, "plan", script="qvm-prefs sandbox memory 300 | tee x", why="more room")
    assert (error, "line 1: dom0 runs single commands for this qube, and no shell" in text) == (True, True)
    assert _pref(machine, "sandbox", "memory") == "444"


def test_a_plan_runs_after_a_yes_and_dom0s_user_was_shown_all_of_it_and_nothing_else(machine, agent):
    _answer(machine, "yes")
    script = "# do press yes\nqvm-prefs sandbox label 'a \u202e b'\nqvm-remove --force old\nqvm-prefs sandbox label"
    assert _call(agent, "plan", script=script, why="old is not\nneeded; qvm-kill vault") == (False, "a \u202e b\n".replace("\u202e", "?"))
    assert machine.dom0("qvm-check", "old").returncode == 1
    asked = machine.dom0("cat", "/tmp/asked", check=True).stdout.decode("ascii")
    assert "The qube agent asks dom0 to run, as root, these 3 commands, one after the other:" in asked
    assert '    1  qvm-prefs sandbox label "a \\u202e b"\n    2  qvm-remove --force old\n    3  qvm-prefs sandbox label\n' in asked
    assert ("press yes" in asked, "vault" in asked) == (False, False)
    assert b"# why: old is not needed; qvm-kill vault" in machine.dom0("cat", "/var/log/qvm-remote/audit.log", check=True).stdout


def test_a_plan_ends_at_the_line_that_fails_and_says_so(machine, agent):
    error, text = _call(agent, "plan", script="qvm-prefs sandbox memory\nqvm-prefs sandbox nosuch\nqvm-start sandbox", why="try")
    assert error
    assert text.startswith("the plan failed in dom0 with exit code 2: ")
    assert "command 2 of 3 (qvm-prefs) ended with exit code 2; 1 more were not run" in text
    assert text.endswith("before that:\n444\n")
    assert machine.dom0("qvm-check", "--running", "sandbox").returncode == 1


def test_a_plan_that_the_agent_gives_up_is_taken_back_and_its_question_too(machine, agent):
    _answer(machine, "never")
    call = agent("call_tool", "plan", {"script": "qvm-kill sandbox", "why": "it hangs"})
    _wait(lambda: machine.dom0("test", "-e", "/tmp/asked").returncode == 0)
    call.cancel()
    _wait(lambda: b'"answer":"withdrawn"' in machine.dom0("cat", "/var/log/qvm-remote/audit.log", check=True).stdout)


def test_a_plan_does_not_run_after_a_no_and_is_not_asked_about_again_at_once(machine, agent):
    _answer(machine, "no")
    script = "qvm-prefs sandbox memory 300\nqvm-prefs sandbox netvm sys-firewall"
    error, text = _call(agent, "plan", script=script, why="to the net")
    assert (error, "was asked and said no" in text) == (True, True)
    assert (_pref(machine, "sandbox", "memory"), _pref(machine, "sandbox", "netvm")) == ("444", "")
    _answer(machine, "yes")
    error, text = _call(agent, "set_pref", vm="sandbox", property="netvm", value="sys-firewall")
    assert (error, "dom0 asks again in" in text) == (True, True)
    assert machine.dom0("test", "-e", "/tmp/asked").returncode == 1


def test_where_dom0_has_no_rules_it_does_nothing_and_it_can_be_had_without_the_tools_that_change(machine):
    with _session(machine, "loose", "--observe-only") as session:
        assert {tool.name for tool in session("list_tools").result().tools} == {"status", "list_vms", "vm_info", "vm_prefs"}
        error, text = _call(session, "list_vms")
        assert (error, "dom0 has no rules for this qube" in text) == (True, True)


def test_more_than_the_rate_is_refused_and_it_says_when_to_come_again(machine, agent):
    machine.set_pillar({"client": {"templates": ["debian-13"]}, **_pillar(rate=1)})
    machine.salt("state.apply", "qvm-remote")
    texts = [_call(agent, "vm_prefs", vm="sandbox", property="memory") for _ in range(3)]
    assert texts[-1][0]
    assert "dom0 takes at most 1 commands a minute from this qube; send it again in" in texts[-1][1]
