#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The version of all that is packaged. The file `version` has it; what can't read that file there has a copy.

    version.py            print it; fail if a copy differs
    version.py 2.1.0      set it everywhere, with an entry in debian/changelog, which all packages' changelogs are made from

Standard library only.
"""

import email.utils
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_VERSION = re.compile(r"(?:0|[1-9]\d*)(?:\.(?:0|[1-9]\d*)){2}", re.ASCII)
#: Where a copy is, between what stands before and after it.
_COPIES = {
    "_utils/pullrpc/__init__.py": re.compile(r'^(__version__ = ")(.*)(")$', re.MULTILINE),
    "FORMULA": re.compile(r"^(version: )(.*)()$", re.MULTILINE),
    "debian/changelog": re.compile(r"\A(qvm-remote \()([^)]*)(-\d+\) )"),
}
#: The time at an entry's end.
_SIGNED = re.compile(r"^ -- .*>  (.*)$", re.MULTILINE)
#: Who signs a release's entry, as debian/control has it.
_MAINTAINER = re.compile(r"^Maintainer: (.*)$", re.MULTILINE)


def read(root=ROOT):
    """Read the version.

    Args:
        root: str, the source tree.

    Returns:
        str
    """
    return _text(root, "version").strip()


def released(root=ROOT):
    """Tell when the version was released.

    Args:
        root: str, the source tree.

    Returns:
        datetime, as its entry in debian/changelog has it.
    """
    return email.utils.parsedate_to_datetime(_SIGNED.search(_text(root, "debian/changelog"))[1])


def differing(root=ROOT):
    """List the copies that are not the version.

    Args:
        root: str, the source tree.

    Returns:
        list of (str, str): a file and what it says; empty where it says nothing.
    """
    found = ((path, pattern.search(_text(root, path))) for path, pattern in _COPIES.items())
    return [(path, match[2] if match else "") for path, match in found if not match or match[2] != read(root)]


def bump(version, root=ROOT, now=None):
    """Set the version in the file and in each copy.

    Args:
        version: str, three numbers.
        root: str, the source tree.
        now: float, seconds since the epoch; default: now.

    Raises:
        ValueError: it is no version, or not a later one.
    """
    if not _VERSION.fullmatch(version):
        raise ValueError(f"{version} is no version: three numbers are, such as 2.1.0")
    if _numbers(version) <= _numbers(read(root)):
        raise ValueError(f"{version} is not later than {read(root)}")
    for path, pattern in _COPIES.items():
        text = _text(root, path)
        if path == "debian/changelog":
            text = _entry(version, _MAINTAINER.search(_text(root, "debian/control"))[1], now) + text
        _write(root, path, pattern.sub(lambda match: match[1] + version + match[3], text, count=1))
    _write(root, "version", version + "\n")


def _numbers(version):
    return [int(number) for number in version.split(".")]


def _entry(version, maintainer, now):
    date = email.utils.formatdate(now)[:-5] + "+0000"
    return f"qvm-remote ({version}-1) unstable; urgency=medium\n\n  * Version {version}; CHANGELOG.md says what is new.\n\n -- {maintainer}  {date}\n\n"


def _text(root, path):
    with open(os.path.join(root, path), encoding="utf-8") as file:
        return file.read()


def _write(root, path, text):
    with open(os.path.join(root, path), "w", encoding="utf-8") as file:
        file.write(text)


def main(argv):
    """Print the version, or set it.

    Args:
        argv: list of str: nothing, or a version.

    Returns:
        int, the exit code.
    """
    if argv:
        try:
            bump(argv[0])
        except ValueError as err:
            print(f"error: {err}", file=sys.stderr)
            return 1
    print(read())
    for path, text in differing():
        print(f"error: {path} says {text or 'no version'}", file=sys.stderr)
    return 1 if differing() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
