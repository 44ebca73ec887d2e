# SPDX-License-Identifier: GPL-2.0-or-later
"""What stands in the documentation's blocks of code: commands with their output, and YAML."""

import glob
import os
import re
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DOCS = os.path.join(ROOT, "docs")
_BLOCK = re.compile(r"^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n|\n)+)", re.M)
_PROMPT = re.compile(r"(?:user@([a-z]+)\$|root@(dom0)#) (.*)")


def pages():
    """List the pages.

    Returns:
        list of str, paths under docs/.
    """
    return sorted(os.path.relpath(path, DOCS) for path in glob.glob(f"{DOCS}/**/*.rst", recursive=True))


def blocks(page):
    """List a page's blocks of code.

    Args:
        page: str, its path under docs/.

    Returns:
        list of (str, str): language and text.
    """
    with open(os.path.join(DOCS, page), encoding="utf-8") as file:
        found = _BLOCK.findall(file.read())
    return [(language, textwrap.dedent(text).strip() + "\n") for _, language, text in found]


def commands(text):
    """Take a console's text apart.

    Args:
        text: str, prompts with commands, each with its output below.

    Returns:
        list of (str, str, str): where (a VM's name, or dom0), the command line, the output.
    """
    found = []
    for line in text.splitlines():
        prompt = _PROMPT.match(line)
        if prompt:
            found.append([prompt[1] or prompt[2], prompt[3], ""])
        else:
            assert found, f"output without a command: {line}"
            found[-1][2] += line + "\n"
    return [tuple(one) for one in found]


def fits(shown, output):
    """Say whether some output is as it is shown, where ``...`` stands for anything.

    Args:
        shown, output: str.

    Returns:
        bool
    """
    pattern = ".*?".join(re.escape(part) for part in shown.strip().split("..."))
    return re.fullmatch(pattern, output.strip(), re.S) is not None
