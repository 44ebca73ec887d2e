#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Install the VM's side of qvm-remote: install_client.py [DESTDIR]. Standard library only."""

import os
import subprocess
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(_ROOT, "_utils"))

from pullrpc.package import COMPILE, client_files, copy_files  # noqa: E402


def main(destination="/"):
    """Copy the files below a folder.

    Args:
        destination: str.
    """
    copy_files(client_files(os.path.join(_ROOT, "client")), destination)
    # A package's build compiles by itself, with the Python that it is for.
    if os.path.realpath(destination) == "/":
        subprocess.run(["/bin/sh", "-c", COMPILE], check=True)


if __name__ == "__main__":
    main(*(word or "/" for word in sys.argv[1:2]))
