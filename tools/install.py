#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Install the files of one side: install.py client|formula [DESTDIR]. The packages are made with it. Standard library only."""

import os
import subprocess
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(_ROOT, "_utils"))

from pullrpc.package import COMPILE, client_files, copy_files  # noqa: E402

#: Where dom0's formula lies, and what of the source tree belongs to it.
_FORMULA = "srv/formulas/base/qvm-remote-formula"
_FORMULA_PARTS = ("FORMULA", "pillar.example", "_engines", "_modules", "_states", "_utils", "client", "dom0", "qvm-remote-formula")
#: Names the formula's folder to dom0's Salt.
_FORMULA_CONFIG = ("etc/salt/minion.d/qvm-remote.conf", "rpm/minion.conf")


def formula_files():
    """List the files of dom0's side.

    Returns:
        list of (target path without the leading slash, source path, mode), sorted.
    """
    files = [(_FORMULA_CONFIG[0], os.path.join(_ROOT, _FORMULA_CONFIG[1]), 0o644)]
    for part in _FORMULA_PARTS:
        for path in _files_below(os.path.join(_ROOT, part)):
            mode = 0o755 if os.access(path, os.X_OK) else 0o644
            files.append((f"{_FORMULA}/{os.path.relpath(path, _ROOT)}", path, mode))
    return sorted(files)


def _files_below(path):
    if os.path.isfile(path):
        yield path
    for folder, _, names in os.walk(path):
        for name in names:
            # What Python leaves beside the sources when they run from a checkout is nobody's to install.
            if os.path.basename(folder) != "__pycache__":
                yield os.path.join(folder, name)


def main(side="", destination="/"):
    """Copy the files of a side below a folder.

    Args:
        side: str, ``client`` or ``formula``.
        destination: str.

    Returns:
        int, the exit code.
    """
    if side not in ("client", "formula"):
        print("usage: install.py client|formula [DESTDIR]", file=sys.stderr)
        return 2
    os.umask(0o022)
    copy_files(client_files(os.path.join(_ROOT, "client")) if side == "client" else formula_files(), destination)
    # A package has its bytecode made where it is installed, by the Python that it is for.
    if side == "client" and os.path.realpath(destination) == "/":
        subprocess.run(["/bin/sh", "-c", COMPILE], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*(word or "/" for word in sys.argv[1:3])))
