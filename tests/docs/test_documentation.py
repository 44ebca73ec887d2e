# SPDX-License-Identifier: GPL-2.0-or-later
"""The documentation can be built without a warning, its pictures are what their source makes, and what it lists is what the code has."""

import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import yaml
from doc_blocks import DOCS, ROOT, blocks, fits, pages
from pullrpc.pillar import read_pillar
from qvm_remote_client.table import EXIT_CODES

sys.path.insert(0, os.path.join(DOCS, "diagrams"))

import pictures  # noqa: E402


def test_sphinx_builds_it_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    # Nothing of a run is kept in the source tree.
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees", DOCS, tmp_path / "html"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    module = (tmp_path / "html" / "reference" / "module.html").read_text(encoding="utf-8")
    # From the docstrings, by the mocked Salt.
    assert 'id="modules.qvm_remote.history"' in module
    assert "Args:" not in module


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_its_source_makes(name):
    with open(os.path.join(DOCS, "diagrams", f"{name}.svg"), encoding="utf-8") as file:
        assert file.read() == pictures.PICTURES[name]().svg(), "type: make diagrams"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_no_words_of_a_picture_are_in_the_way_of_others_or_outside(name):
    picture = pictures.PICTURES[name]()
    for one in picture.words:
        assert (one.left >= 0, one.top >= 0, one.right <= picture.width, one.bottom <= picture.height) == (True,) * 4, one
    for one, other in itertools.combinations(picture.words, 2):
        apart = one.right <= other.left or other.right <= one.left or one.bottom <= other.top or other.bottom <= one.top
        assert apart, (one, other)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_has_colours_for_light_and_dark_and_words_for_who_can_not_see_it(name):
    svg = pictures.PICTURES[name]().svg()
    root = ElementTree.fromstring(svg)
    assert [root[0].tag, root[1].tag] == ["{http://www.w3.org/2000/svg}title", "{http://www.w3.org/2000/svg}desc"]
    light, dark = svg.split("@media (prefers-color-scheme: dark) {")
    # Only the weight of a name is its own: its colour is that of all text.
    kinds = set(re.findall(r'class="(\w+)"', svg)) - {"name"}
    assert kinds >= {"page", "note"}
    for colours in (light, dark):
        assert {kind for kind in kinds if f".{kind} {{" not in colours} == set()
        assert "text {" in colours


def test_every_pillar_that_is_shown_is_taken():
    shown = [yaml.safe_load(text) for page in pages() for language, text in blocks(page) if language == "yaml"]
    pillars = [found["qvm-remote"] for found in shown if "qvm-remote" in found]
    assert len(pillars) > 3
    for pillar in pillars:
        read_pillar(pillar, lambda tags: {})


def test_every_reason_to_refuse_is_listed():
    code = "".join(_read(f"_utils/pullrpc/{name}") for name in sorted(os.listdir(os.path.join(ROOT, "_utils", "pullrpc"))) if name.endswith(".py"))
    words = set(re.findall(r'Refused\(\s*"([a-z]+)"', code))
    assert "replay" in words
    assert words <= set(re.findall(r"^``([a-z]+)``  ", _read("docs/reference/exit-codes.rst"), re.M))


def test_every_exit_code_is_listed():
    shown = set(re.findall(r"^([0-9]+(?:\+N)?)  ", _read("docs/reference/exit-codes.rst"), re.M))
    assert {code for code, _ in EXIT_CODES if code != "0 to 255"} <= shown


def test_every_request_of_a_session_is_listed():
    answered = set(re.findall(r'^ +"([a-z-]+)": self\._', _read("client/qvm_remote_client/agent.py"), re.M))
    assert "poll" in answered
    assert answered == set(re.findall(r"^``([a-z-]+)``  ", _read("docs/reference/protocol.rst").partition("``op``")[2], re.M))


def test_dots_stand_for_anything_and_nothing_else_does():
    assert fits("a...\nc", "ab\nb\nc\n")
    assert not fits("a...\nc", "ab\ncd\n")
    assert not fits("a.c", "abc")


def _read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()
