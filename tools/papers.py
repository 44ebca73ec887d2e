#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the man pages and the shells' completions of both programs, from the tables that their parsers are made from, and pillar.example.

    papers.py             write them
    papers.py --check     write nothing; fail if one is not what would be written

They are kept with the sources, below client/share and dom0/share as they lie below /usr/share: states install them on machines
where nothing is built. Standard library only.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import completions  # noqa: E402
import manpages  # noqa: E402
import words  # noqa: E402
from qvm_remote_client import table  # noqa: E402
from qvm_remote_dom0 import verbs  # noqa: E402
from version import ROOT, read, released  # noqa: E402


def make(root=ROOT):
    """Make all of them.

    Args:
        root: str, the source tree that has the version and pillar.example.

    Returns:
        dict of str to str: a path in the source tree, and what is to be there.
    """
    release = read(root), released(root).strftime("%Y-%m-%d")
    with open(os.path.join(root, "pillar.example"), encoding="utf-8") as file:
        example = file.read()
    functions = {verb.name: verb.function for verb in verbs.VERBS}
    client, dom0 = words.client(), words.dom0()
    papers = {
        "client/share/man/man1/qvm-remote.1": manpages.client(client, table.EXIT_CODES, table.FORMS, table.NOTES, *release),
        "dom0/share/man/man8/qvm-remote-dom0.8": manpages.dom0(dom0, verbs.EXIT_CODES, functions, *release),
        "dom0/share/man/man5/qvm-remote.conf.5": manpages.conf(example, *release),
    }
    for side, program in (("client", client), ("dom0", dom0)):
        papers[f"{side}/share/bash-completion/completions/{program.name}"] = completions.bash(program)
        papers[f"{side}/share/zsh/site-functions/_{program.name}"] = completions.zsh(program)
        papers[f"{side}/share/fish/vendor_completions.d/{program.name}.fish"] = completions.fish(program)
    return papers


def differing(root=ROOT):
    """List those that are not what would be made.

    Args:
        root: str, the source tree.

    Returns:
        list of str, paths in it.
    """
    return [path for path, text in make(root).items() if _text(os.path.join(root, path)) != text]


def _text(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def main(argv):
    """Write them, or compare.

    Args:
        argv: list of str.

    Returns:
        int, the exit code.
    """
    if argv == ["--check"]:
        for path in differing():
            print(f"{path} is not what tools/papers.py makes; run: make papers", file=sys.stderr)
        return 1 if differing() else 0
    if argv:
        print("usage: papers.py [--check]", file=sys.stderr)
        return 2
    for path, text in make().items():
        target = os.path.join(ROOT, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
