# SPDX-License-Identifier: GPL-2.0-or-later
"""Every command that the documentation shows at a prompt is typed, in the simulator, and gives what is shown below it."""

import os
import time

import pytest
import yaml
from doc_blocks import blocks, commands, fits, pages
from qubes_sim.stand import Stand

#: Installs all that the other pages use.
_TUTORIAL = "tutorial/qubes.rst"
#: Each of these applies the states again, and again.
_LONG = ("howto/fleet.rst", "howto/recover.rst", "howto/rotate.rst", "howto/temporary-grant.rst")
_PAGES = [page for page in pages() if any(language == "console" for language, _ in blocks(page))]
#: Nobody sits at the simulator's screen.
_HERE = {"ask": {"helper": "/usr/bin/false"}}
#: Longest that a command may take on a machine that has much else to do, seconds.
_LONGEST = 300


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine that has been set up as the tutorial says, with the names that the documentation uses."""
    root = os.path.join(str(tmp_path_factory.mktemp("docs")), "sim")
    with Stand(root, template="fedora-41", warm=True) as stand:
        stand.prepare(["fedora-41"])
        stand.create(*(f"{vm}:fedora-41" for vm in ("work", "dev", "helper")))
        _type_page(stand, _TUTORIAL)
        stand.start("dev", "helper")
        yield stand


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.long] * (page in _LONG)) for page in _PAGES if page != _TUTORIAL])
def test_what_a_page_shows_is_what_happens(machine, page):
    _type_page(machine, page)


def _type_page(machine, page):
    for language, text in blocks(page):
        if language == "yaml" and text.startswith("qvm-remote:"):
            pillar = yaml.safe_load(text)["qvm-remote"]
            # Others are authorized in a page of its own; work always is.
            whole = {**_HERE, **pillar, "vms": {"work": {}, **pillar.get("vms", {})}}
            # In YAML, as it is shown: it has times, which JSON has not.
            machine.put("/srv/pillar/qvm-remote.sls", yaml.safe_dump({"qvm-remote": whole}))
        elif language == "console":
            for where, line, shown in commands(text):
                _type(machine, where, line, shown)


def _type(machine, where, line, shown):
    argv = ["bash", "-c", f"exec 2>&1; {line}"]
    done = machine.dom0(*argv, timeout=_LONGEST) if where == "dom0" else machine.vm(where, *argv, timeout=_LONGEST)
    output = done.stdout.decode("utf-8", "replace")
    # What is to fail says so: with "; echo $?".
    assert done.returncode == 0, f"{line}\n{output}"
    assert fits(shown or "...", output), f"{line}\n{output}"
    if where == "dom0" and "state.apply" in line:
        # New settings reach a qube with its next session, a moment later.
        time.sleep(3)
    if (where, line) == ("dom0", "qvm-start work"):
        # The key takes a moment, and nobody types that fast.
        machine.wait_served("work")


def test_there_are_pages_to_type():
    assert {"tutorial/simulator.rst", "howto/agent.rst", _TUTORIAL, *_LONG} <= set(_PAGES)
