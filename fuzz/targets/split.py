# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines and scripts that need no shell (pullrpc.policy): what is accepted has exactly the words that bash reads in it, and what dom0's user
would be shown of them (pullrpc.question) says exactly these.
"""

import contextlib
import functools
import json
import os
import select
import shutil
import subprocess

from pullrpc.errors import Refused
from pullrpc.gate import Request
from pullrpc.policy import split_plain, split_script
from pullrpc.question import text_of
from pullrpc.validate import check_command

#: Lines are read here, not run. One that does more than name words, if such a one gets through, finds no program, and no
#: builtin but these.
_BASH = r"""
for name in $(compgen -b); do
    case $name in builtin|enable|eval|printf|read|set) ;; *) enable -n "$name" ;; esac
done
while IFS= read -r -d '' line; do
    set -- bad
    eval "set -- x $line"
    printf '%s\0' "$#" "$@"
done
"""
_WAIT = 5
WORDS = (b"'", b'"', b"''", b'""', b"\\", b"$", b"`", b"!", b"~", b"=", b" ", b"\t", b"#", b"*", b"{a,b}", b"\xc2\xa0", b"\xe2\x80\xa8", b"$'", b"^a^b")


def seeds():
    """Command lines."""
    yield from (b"qvm-ls --raw-data", b"  qvm-prefs   work\tmemory 400 ", b"echo 'a $b' \"c d\"e''", b"echo '' \"\"", "echo ünï a=b".encode())
    yield from (b"a; b", b"a > b", b"a $(b)", b"a {b,c}", b"~/a", b"a # b", b"a=b c", b"a 'b\nc'", b"a\\ b", b"echo \xc2\xa0 b", b"a *", b"a ?")
    yield from (b"qvm-ls\n\n # a\r\nqvm-start 'a b'\n", b"a 'b\nc' d\n", b"a\n\tb \"\" \xc3\xa9 \xe2\x80\xae\n", b"a\rb\n", b"a\n\xc2\xa0\nb")


def check(data):
    """Compare the words of a line, and of each line of a script, with those that bash reads."""
    with contextlib.suppress(Refused):
        text = check_command(data, 4096)
        _check_script(text)
        _check_words(text, split_plain(text))


def _check_words(line, words):
    assert words and words[0] and "=" not in words[0]
    assert words_of(line) == ["x", *words], "bash reads other words"
    request = Request("work", "20260131-235959-4711-0badcafe", line, tuple(words), "argv", 5, b"", b"", b"")
    shown = text_of(request, "root", 60)
    assert all(" " <= char <= "~" or char == "\n" for char in shown), "dom0's user is shown what is not printable ASCII"
    assert _read(shown.split("\n")[2][7:]) == list(words), "dom0's user is shown other words"


def _check_script(text):
    try:
        steps = dict(split_script(text))
    except Refused:
        return
    for at, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if at in steps:
            _check_words(line, steps[at])
        else:
            assert line.lstrip(" \t")[:1] in ("", "#"), "a line was left out"


def _read(shown):
    """The words that a line of the question has."""
    words, at = [], 0
    while at < len(shown):
        if shown[at] == '"':
            word, at = json.JSONDecoder().raw_decode(shown, at)
        else:
            word, at = shown[at:].split(" ")[0], at + len(shown[at:].split(" ")[0])
        words.append(word)
        at += 1
    return words


def words_of(line):
    """Have bash read a line.

    Args:
        line: str, without NUL.

    Returns:
        list of str: ``x``, lest the line's first word is taken for a program, and the words; ``bad`` alone when it can't be read.
    """
    bash = _bash()
    os.write(bash.stdin.fileno(), line.encode("utf-8") + b"\0")
    answer = b""
    while not answer.count(b"\0") > int(answer.partition(b"\0")[0] or answer.count(b"\0")):
        ready, _, _ = select.select([bash.stdout], [], [], _WAIT)
        more = os.read(bash.stdout.fileno(), 1 << 16) if ready else b""
        assert more, "bash ended, or waits: the line did more than name words"
        answer += more
    return answer.decode("utf-8", "surrogateescape").split("\0")[1:-1]


@functools.lru_cache(maxsize=1)
def _bash():
    argv = [shutil.which("bash"), "--norc", "--noprofile", "-r", "-c", _BASH]
    # In a folder with many names, one of them (1) of a single character, so that patterns are found out.
    environment = {"PATH": "/nonexistent", "LC_ALL": "C.UTF-8"}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(argv, bufsize=0, cwd="/proc", env=environment, **streams)
