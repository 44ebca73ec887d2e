# SPDX-License-Identifier: GPL-2.0-or-later
"""Completion, driven as each shell drives it: the same is offered in all of them, and what lies in a folder is never read as a command."""

import os
import pty
import shutil
import subprocess
import sys

import pytest
from terminals import Terminal

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PROGRAMS = {"qvm-remote": "client", "qvm-remote-dom0": "dom0"}
_KEPT = ["20261123-090000-77-00c0ffee", "20261124-180000-1-0badcafe"]
_PENDING, _RUNNING = "20261125-080000-4711-deadbeef", "20261125-080001-4712-feedf00d"
_VMS = {"work", "dev", "web.1"}
#: What runs if a shell reads it.
_ATTACKS = ("$(touch pwned)", "`touch pwned`", ";touch pwned", "20261124-180000-1-0badcafe;touch pwned", "20261124-180000-1-0badcafe.in", "-rf", "dom0", "*")
_OWN = {"key", "queue", "ping", "status", "log", "history", "cancel", "help"}
_VERBS = {"authorize", "revoke", "rotate", "keys", "enable", "disable", "status", "tail", "history", "explain", "doctor"}
#: A command line up to the cursor, and what is offered.
_CASES = {
    "qvm-remote ": _OWN,
    "qvm-remote hi": {"history"},
    "qvm-remote --ex": {"--exec"},
    "qvm-remote -q key ": {"gen", "show", "import", "fingerprint"},
    "qvm-remote -t 5 c": {"cancel"},
    "qvm-remote -t ": set(),
    "qvm-remote --timeout=5 c": {"cancel"},
    "qvm-remote -- ": set(),
    "qvm-remote --exec ": set(),
    "qvm-remote -s ": set(),
    "qvm-remote ls ": set(),
    "qvm-remote ls -": set(),
    "qvm-remote ls key ": set(),
    "qvm-remote key gen --": {"--force", "--quiet", "--verbose", "--help"},
    "qvm-remote key gen ": set(),
    "qvm-remote history ": {"show"},
    "qvm-remote history -n ": set(),
    "qvm-remote history -n 5 --j": {"--json"},
    "qvm-remote history show ": set(_KEPT),
    "qvm-remote history show --o": {"--out"},
    "qvm-remote history show 20261124": {_KEPT[1]},
    "qvm-remote history show --out 20261124": {_KEPT[1]},
    f"qvm-remote history show {_KEPT[0]} ": set(),
    "qvm-remote cancel ": {_PENDING, _RUNNING},
    "qvm-remote help k": {"key"},
    "qvm-remote-dom0 ": _VERBS,
    "qvm-remote-dom0 --o": {"--once"},
    "qvm-remote-dom0 --once ": set(),
    "qvm-remote-dom0 --config-dir /etc/x revoke ": _VMS,
    "qvm-remote-dom0 authorize w": {"work", "web.1"},
    "qvm-remote-dom0 rotate w": {"work", "web.1"},
    "qvm-remote-dom0 history --since ": set(),
    "qvm-remote-dom0 history --since 2h d": {"dev"},
    "qvm-remote-dom0 history work --j": {"--json"},
    "qvm-remote-dom0 tail ": _VMS,
    "qvm-remote-dom0 explain --exec w": {"work", "web.1"},
    "qvm-remote-dom0 explain work ": set(),
    "qvm-remote-dom0 explain work -": set(),
    "qvm-remote-dom0 status --w": {"--watch"},
    "qvm-remote-dom0 status ": _VMS,
    "qvm-remote-dom0 doctor ": set(),
    "qvm-remote-dom0 revoke work ": set(),
}

_BASH = r"""
cd "$HOME" || exit 1
for file in "$@"; do source "$file" || exit 1; done
while IFS= read -r line; do
    # As readline cuts it: at blanks and, by COMP_WORDBREAKS, at each "=".
    read -ra COMP_WORDS <<<"${line//=/ = }"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$line COMP_POINT=${#line}
    read -ra how < <(complete -p "${COMP_WORDS[0]}")
    [[ ${how[1]} == -F ]] || exit 2
    "${how[2]}" "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}" || :
    printf '%s\n' "== $line" "${COMPREPLY[@]}"
done
"""
_FISH = r"""
cd $HOME
for file in $argv
    source $file
end
while read -l line
    echo "== $line"
    complete -C "$line" | string replace -r '\t.*' ''
end
true
"""
#: In its line editor: what is added to the list of what is offered is written down.
_ZSH = r"""
cd ~
fpath=($FUNCTIONS $fpath)
autoload -Uz compinit
compinit -D -u
compadd() {
    local -a hits
    if [[ ${@[1,(i)(-|--)]} != *-[a-zA-Z]#[OAD]* ]]; then
        builtin compadd -O hits "$@"
        print -rl -- $hits >>$OUT
    fi
    builtin compadd "$@"
}
drive() {
    local line
    while IFS= read -r line; do
        print -r -- "== $line" >>$OUT
        BUFFER=$line CURSOR=${#line}
        zle list-choices
    done <$CASES
    exit 0
}
setopt extended_glob
zle -N zle-line-init drive
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a history and a queue, and dom0's qvm-ls; names in each of which are attacks."""
    folder = tmp_path_factory.mktemp("home")
    base = folder / ".qvm-remote"
    for cid in _KEPT:
        (base / "history" / f"{cid[:4]}-{cid[4:6]}-{cid[6:8]}" / cid).mkdir(parents=True)
    for place in (base / "history" / "2026-11-24", base / "queue" / "pending", base / "queue" / "running"):
        place.mkdir(parents=True, exist_ok=True)
        for name in _ATTACKS:
            (place / name).mkdir()
    (base / "queue" / "pending" / _PENDING).touch()
    (base / "queue" / "pending" / f"{_PENDING}.auth").touch()
    (base / "queue" / "running" / _RUNNING).touch()
    (folder / "names").write_text("\n".join([*_VMS, *_ATTACKS, ""]))
    (folder / "bin").mkdir()
    (folder / "bin" / "qvm-ls").write_text(f'#!/bin/sh\n[ "$*" = --raw-list ] && exec cat {folder}/names\n')
    (folder / "bin" / "qvm-ls").chmod(0o755)
    (folder / "cases").write_text("".join(f"{line}\n" for line in _CASES))
    return folder


def _environment(home, **more):
    return {"PATH": f"{home}/bin:{os.environ['PATH']}", "HOME": str(home), "LC_ALL": "C.UTF-8", **more}


def _scripts(folder, name):
    return [os.path.join(_ROOT, side, "share", folder, name.format(program)) for program, side in _PROGRAMS.items()]


def _by_stdin(home, *argv):
    with open(home / "cases", encoding="ascii") as cases:
        done = subprocess.run(argv, stdin=cases, capture_output=True, env=_environment(home), cwd=home, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _bash(home):
    return _by_stdin(home, "bash", "-c", _BASH, "bash", *_scripts("bash-completion/completions", "{}"))


def _fish(home):
    return _by_stdin(home, "fish", "--no-config", "-c", _FISH, *_scripts("fish/vendor_completions.d", "{}.fish"))


def _zsh(home):
    (home / "drive.zsh").write_text(_ZSH)
    (home / "out").touch()
    ours, its = pty.openpty()
    folders = " ".join(map(os.path.dirname, _scripts("zsh/site-functions", "_{}")))
    environment = _environment(home, TERM="dumb", OUT=str(home / "out"), CASES=str(home / "cases"), FUNCTIONS="")
    with subprocess.Popen(["zsh", "-f", "-i"], stdin=its, stdout=its, stderr=its, start_new_session=True, env=environment) as shell:
        os.close(its)
        os.write(ours, f"FUNCTIONS=({folders}); source {home}/drive.zsh\n".encode("ascii"))
        shown = b""
        try:
            while True:
                shown += os.read(ours, 4096)
        except OSError:
            # It has ended.
            os.close(ours)
    assert shell.returncode == 0, shown.decode("utf-8", "replace")
    return (home / "out").read_text()


_DRIVERS = {"bash": _bash, "zsh": _zsh, "fish": _fish}


@pytest.fixture(scope="module", params=list(_DRIVERS))
def offered(request, home):
    """What a shell offers: for each command line a list of words."""
    if request.param != "bash" and not shutil.which(request.param):
        pytest.skip(f"{request.param} is not here; run: python3 tools/bootstrap.py --papers")
    found = {}
    for line in _DRIVERS[request.param](home).splitlines():
        if line.startswith("== "):
            words = found.setdefault(line[3:], [])
        elif line:
            words.append(line)
    return found


@pytest.mark.parametrize("line", _CASES)
def test_what_fits_is_offered_and_nothing_else(line, offered):
    assert set(offered[line]) == _CASES[line]


def test_no_name_was_read_as_a_command(home, offered):
    assert offered
    assert not [path for path in (home / "pwned", home / "bin" / "pwned") if path.exists()]


@pytest.mark.parametrize("program", _PROGRAMS)
def test_what_is_offered_first_is_in_the_help(program, offered):
    done = subprocess.run([sys.executable, "-I", os.path.join(_ROOT, _PROGRAMS[program], program), "--help"], capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and line.split()[0].isalpha()}
    assert set(offered[f"{program} "]) <= listed


@pytest.mark.parametrize("line", ["qvm-remote < mys", "qvm-remote -q -s 1 <mys", "qvm-remote -- cat 2> mys", "qvm-remote-dom0 authorize work < mys"])
def test_bash_completes_the_name_of_a_file_after_a_redirection(tmp_path, line):
    (tmp_path / "myscript").touch()
    scripts = " ".join(_scripts("bash-completion/completions", "{}"))
    terminal = Terminal(["env", "-i", f"PATH={os.environ['PATH']}", f"HOME={tmp_path}", "TERM=dumb", "bash", "--norc", "--noprofile", "-i"])
    try:
        terminal.type(f"cd; for one in {scripts}; do . $one; done; echo rea''dy\n")
        terminal.until("ready")
        terminal.type(f"{line}\t")
        terminal.until("myscript")
        # Without running it.
        terminal.type("\025exit\n")
        assert terminal.end() == 0
    finally:
        terminal.process.kill()


@pytest.mark.parametrize("line", ["qvm-remote history show ", "qvm-remote cancel "])
def test_bash_says_nothing_where_there_is_no_name_and_a_pattern_has_to_fit(tmp_path, line):
    done = subprocess.run(
        ["bash", "-O", "failglob", "-c", _BASH, "bash", *_scripts("bash-completion/completions", "{}")],
        input=f"{line}\n",
        capture_output=True,
        env=_environment(tmp_path),
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split("\n", 1)[0], done.stderr) == (0, f"== {line}", "")
