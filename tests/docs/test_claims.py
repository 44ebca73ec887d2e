# SPDX-License-Identifier: GPL-2.0-or-later
"""What the documents and the model name is there: the tests behind each promise, the code's own names, and all programs that are used."""

import importlib.util
import os
import re

import pytest
from doc_blocks import DOCS, ROOT

#: A file of tests, and perhaps one test of it; or a test whose file is named before.
_CITED = re.compile(r"\b(\w+/test_\w+)\.py(?:::(test_\w+))?|\b(test_\w+)\b(?!\.py)")
#: Where the code is that the model is of.
_CODE = ("_utils/pullrpc", "client/qvm_remote_client", "_engines")
#: In a comment of the model: a call, a private name, a name of something's.
_NAMED = re.compile(r"\b(?:[a-zA-Z_]\w*\.)+[a-zA-Z_]\w*|\b_\w+|\b\w+(?=\(\))")
#: Debian's packages that the documentation calls otherwise.
_CALLED = {
    "python3-dev": "Python's headers",
    "python3-venv": "and venv",
    "openssh-server": "OpenSSH",
    "openssh-client": "OpenSSH",
    "rpm": "rpmbuild",
    "pacman-package-manager": "pacman",
    "libarchive-tools": "bsdtar",
}


def _read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def _sources(*folders):
    """Text of all Python files there, path to text."""
    found = {}
    for folder in folders:
        for place, _, names in os.walk(os.path.join(ROOT, folder)):
            for name in names:
                if name.endswith(".py"):
                    path = os.path.relpath(os.path.join(place, name), ROOT)
                    found[path] = _read(path)
    return found


@pytest.mark.parametrize("page", ["security.rst", "reliability.rst"])
def test_every_test_that_is_cited_is_there(page):
    tests = _sources("tests")
    missing, count = [], 0
    for file, in_file, alone in _CITED.findall(_read("docs", page)):
        count += 1
        name = in_file or alone
        texts = [tests.get(f"tests/{file}.py", "")] if file else tests.values()
        if not any(f"\ndef {name}(" in text if name else text for text in texts):
            missing.append(f"{file}::{name}" if file else name)
    assert missing == []
    assert count > (50 if page == "security.rst" else 0)


@pytest.mark.parametrize("source", ["README.rst", "qvm_remote.pml"])
def test_every_name_of_the_codes_in_the_model_is_there(source):
    text = _read("model", source)
    named = {name for comment in re.findall(r"/\*(.*?)\*/", text, re.S) for name in _NAMED.findall(comment)}
    if source == "README.rst":
        named = set(re.findall(r"``([\w.]+)``", text))
    named -= {"qvm_remote.pml", "check.py"}
    assert len(named) > 3
    code = _sources(*_CODE)
    all_of_it = "".join(code.values())
    modules = {os.path.splitext(os.path.basename(path))[0] for path in code} | {"pullrpc", "qvm_remote_client"}
    parts = {part for name in named for part in name.split(".")}
    # A function, a class, an attribute, a setting.
    assert {part for part in parts - modules if not re.search(rf"\b(def|class|self\.)\s*{part}\b|^    {part}: ", all_of_it, re.M)} == set()


def _bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", os.path.join(ROOT, "tools", "bootstrap.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_program_that_is_installed_or_started_is_among_the_dependencies():
    text = _read(os.path.relpath(DOCS, ROOT), "dependencies.rst")
    bootstrap = _bootstrap()
    installed = {row[2] for table in (bootstrap._SYSTEM, bootstrap._FOR_BENCH, *bootstrap._ALONE.values()) for row in table}
    assert {name for name in installed if _CALLED.get(name, name).lower() not in text.lower()} == set()
    # What the helpers that come with it show things by.
    helpers = "".join(_read("_utils", "pullrpc", f"{name}_on_screen.py") for name in ("ask", "tell"))
    shown_by = {name for name in ("zenity", "notify-send") if name in helpers}
    assert {name for name in shown_by if name not in text} == set()
    assert len(shown_by) == 2
