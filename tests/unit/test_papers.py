# SPDX-License-Identifier: GPL-2.0-or-later
"""Man pages: that they are of these sources, say what the help says, and are well formed; and that completion is of these sources."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from pullrpc import package, pillar

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(_ROOT, "tools"))

import papers  # noqa: E402
from qvm_remote_client import table, usage  # noqa: E402
from qvm_remote_dom0 import main, verbs  # noqa: E402

_PAGES = {
    "qvm-remote": "client/share/man/man1/qvm-remote.1",
    "qvm-remote-dom0": "dom0/share/man/man8/qvm-remote-dom0.8",
    "qvm-remote.conf": "dom0/share/man/man5/qvm-remote.conf.5",
}
_FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


def _source(path):
    with open(os.path.join(_ROOT, path), encoding="utf-8") as file:
        return file.read()


def _plain(page):
    """The text of a man page, in one line, without what is written for its formatter alone."""
    lines = [re.sub(r"^\.(SS|SH|B|BR) ", "", line) for line in _source(_PAGES[page]).splitlines() if not re.match(r"\.(TP|PP|br|nf|fi|TH)\b", line)]
    text = " ".join(lines)
    for roff, plain in ((r"\fB", ""), (r"\fI", ""), (r"\fR", ""), (r"\&", ""), (r"\-", "-"), (r"\(dq", '"'), (r"\e", "\\")):
        text = text.replace(roff, plain)
    return _words(text)


def _words(text):
    return " ".join(text.split())


def _help_of_client(*words):
    return usage.help_of(list(words))


def _help_of_dom0(capsys, *words):
    assert main.main([*words, "--help"]) == 0
    return capsys.readouterr().out


def test_what_is_kept_is_what_is_made():
    assert papers.differing() == []


def test_what_is_not_made_of_these_sources_is_named(tmp_path):
    # A version and an example of pillar that are not ours.
    for name in ("version", "debian/changelog", "pillar.example", *papers.make()):
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        shutil.copy(os.path.join(_ROOT, name), tmp_path / name)
    assert papers.differing(tmp_path) == []
    (tmp_path / "pillar.example").write_text(_source("pillar.example").replace("max_age: 300", "max_age: 301"))
    os.unlink(tmp_path / "client/share/zsh/site-functions/_qvm-remote")
    assert papers.differing(tmp_path) == ["dom0/share/man/man5/qvm-remote.conf.5", "client/share/zsh/site-functions/_qvm-remote"]
    (tmp_path / "version").write_text("9.9.9\n")
    assert [path for path in papers.differing(tmp_path) if "/man/" in path] == list(_PAGES.values())


def test_all_that_is_made_is_installed_and_nothing_else():
    sides = {"client": package.client_files(os.path.join(_ROOT, "client")), "dom0": package.command_files(os.path.join(_ROOT, "dom0"))}
    for side, files in sides.items():
        made = {path.replace(f"{side}/", "usr/", 1): os.path.join(_ROOT, path) for path in papers.make() if path.startswith(f"{side}/")}
        assert {target: source for target, source, _ in files if target.startswith("usr/share/")} == made
        tracked = subprocess.run(["git", "-C", _ROOT, "ls-files", f"{side}/share"], capture_output=True, text=True, check=False).stdout.split()
        assert {path.replace(f"{side}/", "usr/", 1) for path in tracked} in (set(made), set())
        paths = package.CLIENT_PATHS if side == "client" else package.COMMAND_PATHS
        # What is removed with the rest.
        assert {f"/{target}" for target in made} <= set(paths)


def test_the_page_of_the_client_says_what_its_help_says():
    page = _plain("qvm-remote")
    done = subprocess.run([sys.executable, "-I", os.path.join(_ROOT, "client", "qvm-remote"), "--help"], capture_output=True, text=True, check=True)
    assert done.stdout == _help_of_client()
    helps = done.stdout
    for words in {command.words for command in table.COMMANDS if not command.is_internal}:
        shown = _help_of_client(*words)
        helps += shown
        usages = re.findall(r"^usage: qvm-remote (.*)$", shown, re.MULTILINE)
        assert usages and all(usage in page for usage in usages)
    # What is for dom0 alone is for no page.
    helps = re.sub(r"^  agent .*\n", "", helps, flags=re.MULTILINE)
    assert [line for line in _rows(helps) if line not in page] == []
    assert set(_FLAG.findall(page)) - {"--running"} == set(_FLAG.findall(helps))


def _rows(shown):
    """What the lines of a help say, each without what it begins with where that is a column of its own, and both parts of such a line."""
    for line in shown.splitlines():
        for part in re.split(r" {2,}", line.strip()):
            if part and not part.startswith(("usage:", "options:", "exit codes:", "other commands")):
                yield _summary(part)


def _summary(part):
    # A sentence in the page where it is a line in a table.
    return part[1:].rstrip(".") if part[0].isalpha() else part.rstrip(".")


def test_the_page_of_dom0s_command_says_what_its_help_says(capsys):
    page = _plain("qvm-remote-dom0")
    done = subprocess.run([sys.executable, "-I", os.path.join(_ROOT, "dom0", "qvm-remote-dom0"), "--help"], capture_output=True, text=True, check=True)
    helps = done.stdout
    for verb in verbs.VERBS:
        shown = _help_of_dom0(capsys, verb.name)
        helps += shown
        text = _words(shown)
        assert f"By Salt: qubesctl qvm_remote.{verb.function}" in page and f"qubesctl qvm_remote.{verb.function}" in text
        assert _words(verb.more) in page and _words(verb.more) in text
        for option in verb.options:
            assert option.hidden or (_words(option.text) in page and _words(option.text) in text)
    assert set(_FLAG.findall(page)) == set(_FLAG.findall(helps.replace("qvm-remote --exec", "")))
    # Each command in a heading of its own.
    assert re.findall(r"^\.SS (\w+)", _source(_PAGES["qvm-remote-dom0"]), re.MULTILINE) == [verb.name for verb in verbs.VERBS]
    for code in ("0", "1", "2", "130"):
        assert f"\\fB{code}\\fR" in _source(_PAGES["qvm-remote-dom0"])


def test_the_page_of_pillar_has_each_setting_and_all_that_the_example_says():
    page = _plain("qvm-remote.conf")
    example = _source("pillar.example").split("qvm-remote:\n", 1)[1]
    blocks = re.findall(r"(?:^ *#.*\n)+", example, re.MULTILINE)
    assert len(blocks) > 30
    for block in blocks:
        assert _words(re.sub(r"^ *# ?", "", block, flags=re.MULTILINE)) in page
    for line in example.splitlines():
        assert line.strip().startswith("#") or _words(line) in page
    sections = re.findall(r"^\.SS (.*)$", _source(_PAGES["qvm-remote.conf"]), re.MULTILINE)
    assert sorted(sections) == sorted(pillar._TOP)
    for name in (*pillar._LIMITS, *pillar._ASK, *pillar._NOTIFY, *pillar._ENGINE, *pillar._VM):
        assert re.search(rf"\b{name}:", page), name


@pytest.mark.parametrize("page", _PAGES.values())
def test_a_page_is_well_formed(page):
    checks = {"mandoc": ["-Tlint", "-Wstyle"], "groff": ["-man", "-ww", "-Tascii", "-z"]}
    there = [program for program in checks if shutil.which(program)]
    if not there:
        pytest.skip("neither mandoc nor groff is here; run: python3 tools/bootstrap.py --papers")
    for program in there:
        done = subprocess.run([program, *checks[program], os.path.join(_ROOT, page)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), program
