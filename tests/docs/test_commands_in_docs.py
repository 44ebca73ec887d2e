# SPDX-License-Identifier: GPL-2.0-or-later
"""Every command that the documentation shows at a prompt is typed, in the simulator, and gives what is shown below it."""

import os

import pytest
import yaml
from doc_blocks import blocks, commands, fits, pages
from qubes_sim.stand import Stand

_PAGES = [page for page in pages() if any(language == "console" for language, _ in blocks(page))]
#: Nobody sits at the simulator's screen, and nobody wants to wait for it.
_HERE = {"ask": {"helper": "/usr/bin/false"}, "engine": {"discover_interval": 1, "poll_wait": 5}}

#: Longest that a command may take on a machine that has much else to do, seconds.
_LONGEST = 300


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine with the names that the documentation uses."""
    root = os.path.join(str(tmp_path_factory.mktemp("docs")), "sim")
    with Stand(root, template="fedora-41", vms=("work", "dev", "helper"), warm=True) as stand:
        stand.set_up(_HERE)
        stand.wait_served("work", "dev", "helper")
        yield stand
        stand.stop_engine()


@pytest.mark.parametrize("page", _PAGES)
def test_what_a_page_shows_is_what_happens(machine, page):
    for language, text in blocks(page):
        if language == "yaml":
            pillar = yaml.safe_load(text).get("qvm-remote", {})
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
    if shown:
        assert fits(shown, output), f"{line}\n{output}"
    else:
        assert done.returncode == 0, f"{line}\n{output}"


def test_there_are_pages_to_type():
    assert {"tutorial/simulator.rst", "howto/agent.rst"} <= set(_PAGES)
