# SPDX-License-Identifier: GPL-2.0-or-later
"""Man pages: of both programs, made of their words, and of pillar, made of pillar.example. In the language of man(7)."""

import re
import textwrap

_WIDTH = 78
#: What the tables do not say: sections after the options, and what else to read.
_CLIENT_FILES = (
    ("~/.qvm-remote/auth.key", "this qube's key"),
    ("~/.qvm-remote/queue/", "what waits for dom0, runs there, and what dom0 has answered"),
    ("~/.qvm-remote/history/", "commands and their results, by day"),
    ("~/.qvm-remote/audit.log", "what was asked for, a line each"),
)
_DOM0_FILES = (
    ("/etc/qubes/remote.d/", "the keys, one file for each qube"),
    ("/etc/qubes/remote/", "the configuration of the service, which qubesctl writes"),
    ("/var/lib/qvm-remote/", "the ledger of all commands, and results that wait for their qubes"),
    ("/var/log/qvm-remote/audit.log", "the audit log"),
)
_CLIENT_EXAMPLES = (
    ("qvm-remote qvm-ls --running", "run a command in dom0"),
    ("qvm-remote 'xl info | grep free_memory'", "leave the pipe to dom0's shell"),
    ("qvm-remote -s work < script.sh", "run a script there with an argument"),
    ("qvm-remote -- log", "run a program there that has the name of a command here"),
)
_DOM0_EXAMPLES = (
    ("qvm-remote-dom0 authorize work --from-vm", "take the key that the qube has made"),
    ("qvm-remote-dom0 explain dev qvm-start work", "see whether the qube's policy lets that run"),
    ("qvm-remote-dom0 history dev --since 2h --outcome refused", "see what was refused of late"),
)


def client(program, exit_codes, forms, notes, version, date):
    """The page of the program in a qube.

    Args:
        program: words.Program.
        exit_codes, forms, notes: as ``qvm_remote_client.table`` has them.
        version, date: str, of the release.

    Returns:
        str
    """
    body = _head(program, 1, version, date)
    own = "|".join(word for word, _ in program.beginnings()[()][2])
    body += [".SH SYNOPSIS", *_forms(program, [*(form for form, _ in forms), f"{own} [OPTION...] [ARG...]"])]
    body += [".SH DESCRIPTION", *_text("Runs a command in dom0, and is to the caller as if that ran here: its output, its exit code, and its stdin.")]
    body += [*_text("A qube writes its commands to its own disk; dom0 fetches, verifies and runs them if it knows the qube's key. No qube ever calls dom0."), ".PP"]
    body += [*_text(notes), *_rows([(f"{program.name} {form}", what) for form, what in forms])]
    body += [".SH OPTIONS", *_options(program.options)]
    body += [".SH COMMANDS", *_text("These are not sent to dom0; -- in front makes their words commands for dom0."), *_commands(program)]
    body += [".SH EXIT STATUS", *_rows(exit_codes)]
    return _end(body, _CLIENT_FILES, _CLIENT_EXAMPLES, "qvm-run(1)")


def dom0(program, exit_codes, functions, version, date):
    """The page of the program in dom0.

    Args:
        program: words.Program.
        exit_codes: str, as ``qvm_remote_dom0.verbs`` has them.
        functions: dict of str to str, for a verb the function of the Salt module that does the same.
        version, date: str, of the release.

    Returns:
        str
    """
    body = _head(program, 8, version, date)
    body += [".SH SYNOPSIS", *_forms(program, ["VERB [OPTION...] [ARG...]", "[--dry-run] --once", "--help | --version"])]
    body += [".SH DESCRIPTION", *_text(f"{program.summary[0].upper()}{program.summary[1:]}. What it does can be done by Salt as well; pillar has the last word.")]
    body += [".SH OPTIONS", *_options(program.options), ".SH VERBS", *_text("Each takes --help, too."), *_commands(program, functions)]
    codes = [tuple(part.strip() for part in one.strip().split(" ", 1)) for one in exit_codes.partition(":")[2].split(";")]
    body += [".SH EXIT STATUS", *_rows(codes)]
    return _end(body, _DOM0_FILES, _DOM0_EXAMPLES, "qvm-remote.conf(5), qubesctl(1)")


def conf(example, version, date):
    """The page of pillar.

    Args:
        example: str, pillar.example.
        version, date: str, of the release.

    Returns:
        str
    """
    lines = example.splitlines()
    root = lines.index("qvm-remote:")
    head = " ".join(line.lstrip("# ") for line in lines[:root])
    body = [_title("qvm-remote.conf", 5, version, date), ".SH NAME", r"qvm\-remote.conf \- settings of qvm\-remote, in the pillar of dom0's Salt", ".SH DESCRIPTION"]
    body += _text("There is no file of that name: the settings stand in dom0's pillar, below /srv/pillar, under the key qvm-remote, and hold from")
    body += [*_text("qubesctl state.apply qvm-remote", bold=True), *_text("on."), ".PP", *_text(re.sub(r"^Pillar of qvm-remote\. ", "", head)), ".SH SETTINGS"]
    for section in _sections(lines[root + 1 :]):
        body += _section(section)
    body += [".SH SEE ALSO", *_see("qvm-remote-dom0(8)")]
    return "\n".join(body) + "\n"


def _sections(lines):
    """Cut the example into its settings on the first level, each with the comments above it."""
    sections, current = [], []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line[2:])
        elif any(not one.lstrip().startswith("#") for one in current):
            sections.append(current)
            current = []
    return sections


def _section(lines):
    name = next(line for line in lines if not line.lstrip().startswith("#"))
    body, text, code = [f".SS {_roff(name.partition(':')[0])}"], [], []
    for line in [*lines, "#"]:
        if line.lstrip().startswith("#"):
            if code:
                body += [*([".PP"] if len(body) > 1 else []), ".nf", *(_protected(_roff(one)) for one in code), ".fi", ".PP"]
            code = []
            text.append(line.strip("# "))
        else:
            body += _text(" ".join(text))
            text = []
            code.append(line)
    # What stands last is the code of what was said before it.
    while body[-1] == ".PP":
        body.pop()
    return body


def _head(program, section, version, date):
    return [_title(program.name, section, version, date), ".SH NAME", *_lines(f"{_roff(program.name)} \\- {_roff(program.summary)}")]


def _title(name, section, version, date):
    return f'.TH {_roff(name.upper())} {section} {date} "{_roff(f"qvm-remote {version}")}" "Qubes OS"'


def _forms(program, forms):
    lines = []
    for at, form in enumerate(forms):
        lines += [*([".br"] if at else []), f".B {_roff(program.name)}", _protected(_roff(form))]
    return lines


def _commands(program, functions=None):
    lines = []
    for command in program.commands:
        lines += [f".SS {_roff(command.synopsis)}", *_text(f"{command.summary[0].upper()}{command.summary[1:]}.")]
        lines += _text(command.notes)
        if functions and functions[command.words[0]]:
            lines += _text(f"By Salt: qubesctl qvm_remote.{functions[command.words[0]]}.")
        lines += _rows([(argument.name, argument.help) for argument in command.arguments])
        lines += _options(command.options)
    return lines


def _options(options):
    lines = []
    for option in options:
        value = rf" \fI{_roff(option.value)}\fR" if option.value else ""
        lines += [".TP", ", ".join(rf"\fB{_roff(flag)}\fR{value}" for flag in option.flags), *_text(option.help)]
    return lines


def _rows(rows):
    return [line for name, text in rows for line in (".TP", rf"\fB{_roff(name)}\fR", *_text(text))]


def _end(body, files, examples, see):
    body += [".SH FILES", *_rows(files), ".SH EXAMPLES", *_rows(examples), ".SH SEE ALSO", *_see(see)]
    return "\n".join(body) + "\n"


def _see(pages):
    shown = [re.sub(r"(.*)\((\d)\)", r".BR \1 (\2)", _roff(page)) for page in pages.split(", ")]
    return [f"{page} ," for page in shown[:-1]] + [shown[-1]]


def _text(text, bold=False):
    return [f".B {line}" if bold else _protected(line) for line in _lines(_roff(text))]


def _lines(roff):
    return textwrap.wrap(roff, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _roff(text):
    return text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")


def _protected(line):
    """A line that can't be taken for a request."""
    return f"\\&{line}" if line.startswith((".", "'")) else line
