# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's own words: keys, help, bad usage. One clear line each, and nothing is lost."""

import os
import re

import pytest


@pytest.fixture(scope="module")
def vm(stand):
    """A VM with the client and without a key; gives a function that runs qvm-remote there."""
    stand.create("plain")
    stand.start("plain")
    yield lambda *words, data=None: stand.remote(*words, vm="plain", data=data)
    stand.shutdown("plain")


def test_without_a_key_the_client_says_where_it_comes_from(vm):
    done = vm("-n", "true")
    assert (done.returncode, done.stderr) == (
        125,
        b"qvm-remote: error: this qube has no key; if pillar gives it access, dom0 hands one over within a minute (at once by, in dom0: "
        b"sudo qubesctl qvm_remote.hand_over plain); where pillar says key: own, make one: qvm-remote key gen\n",
    )


def test_a_key_is_imported_shown_and_never_replaced_unasked(vm):
    digits = os.urandom(32).hex().encode()
    assert vm("key", "import", data=digits + b"\n").returncode == 0
    assert vm("key", "show", "--secret").stdout == digits + b"\n"
    name, fingerprint = vm("key", "fingerprint").stdout.decode().split()
    assert name == "plain"
    assert digits.decode() not in fingerprint
    refused = vm("key", "gen")
    assert refused.returncode == 125
    assert b"--force replaces it" in refused.stderr
    assert vm("key", "show", "--secret").stdout == digits + b"\n"
    assert vm("key", "gen", "--force").returncode == 0
    assert vm("key", "show", "--secret").stdout != digits + b"\n"


@pytest.mark.parametrize("data", [b"", b"abc\n", b"0x" + b"1" * 62, b"z" * 64, b"ab" * 33])
def test_what_is_no_key_is_not_imported(vm, data):
    done = vm("key", "import", "--force", data=data)
    assert done.returncode == 125
    assert done.stderr.startswith(b"qvm-remote: error: the key")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--nonsense"], ["-z"], ["-t"], ["-t", "0", "true"], ["-t", "x", "true"], ["--exec"], ["--exec", "-s", "x"], ["-n"], ["-n", " "]]
    + [["key"], ["key", "steal"], ["ping", "x"], ["log", "x"]],
)
def test_bad_usage_gets_one_line_that_says_what_to_do(vm, words):
    done = vm(*words)
    assert done.returncode == 125
    assert done.stdout == b""
    assert done.stderr.startswith(b"qvm-remote: error: ")
    assert done.stderr.count(b"\n") == 1


def test_help_names_every_way_to_call_it(vm):
    text = vm("--help").stdout
    for word in (b"-t SEC", b"--exec", b"-s ARG", b"key gen", b"key import", b"ping", b"status", b"log", b"exit codes"):
        assert word in text
    assert vm("--version").stdout.startswith(b"qvm-remote ")


def test_an_argument_that_is_not_text_is_refused_at_once(vm, stand):
    done = stand.vm("plain", "bash", "-c", "qvm-remote -n $'echo \\xff'")
    assert done.returncode == 125
    assert b"not UTF-8 text" in done.stderr


def test_log_shows_what_was_asked(dom0):
    assert dom0.remote("-n", "echo for the log").returncode == 0
    last = dom0.remote("log", "1").stdout
    assert re.fullmatch(rb"\[[0-9T:-]+Z\] DONE id=[0-9a-f-]+ exit=0 status=done\n", last), last
    before = dom0.remote("log", "2").stdout.splitlines()[0]
    assert before.endswith(b" size=16B form=shell cmd=echo for the log") and b"] SUBMIT id=" in before, before


def test_no_start_of_the_client_compiles_its_source(stand):
    listed = "cd /usr/lib/qvm-remote && for f in */*.py; do ls ${f%/*}/__pycache__/$(basename $f .py).*.pyc || exit 1; done"
    assert stand.vm("work", "sh", "-c", listed).returncode == 0


def test_a_qube_is_asked_for_its_name_once_after_each_start(vm, stand):
    stand.vm("plain", "sh", "-c", "mkdir -p -m 0755 /run/user && mkdir -m 0700 /run/user/$(id -u user) && chown user: /run/user/*", user="root", check=True)
    vm("key", "gen", "--force")
    assert vm("key", "fingerprint").stdout.startswith(b"plain ")
    assert stand.vm("plain", "sh", "-c", "cat /run/user/*/qvm-remote-name").stdout == b"plain"
    stand.vm("plain", "sh", "-c", "printf other > /run/user/$(id -u)/qvm-remote-name", check=True)
    assert vm("key", "fingerprint").stdout.startswith(b"other ")
    stand.shutdown("plain")
    stand.start("plain")
    assert vm("key", "fingerprint").stdout.startswith(b"plain ")
