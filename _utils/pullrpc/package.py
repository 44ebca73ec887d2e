# SPDX-License-Identifier: GPL-2.0-or-later
"""What belongs to the VM's side, and where it goes there: one list for the Makefile, the states and the packages."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile

#: The modules of this package that client and agent import.
_SHARED = ("__init__", "digests", "errors", "files", "frames", "ids", "layout", "tokens")
_LIBRARY = "usr/lib/qvm-remote"
#: All that these files and folders are is the client's.
CLIENT_PATHS = ("/usr/bin/qvm-remote", f"/{_LIBRARY}")
#: By what a template's shell tells whether the client there is a package's, which its package manager alone may touch.
IS_PACKAGE = " || ".join(f"{query} {CLIENT_PATHS[0]}" for query in ("dpkg-query --search", "rpm --query --file", "pacman --query --owns"))
#: What root's shell does once the files are there. A user can't write bytecode there, and would compile the source at each
#: start. What an older version left goes first: by their times, all that was ever unpacked looks alike.
COMPILE = f"umask 022; rm -rf /{_LIBRARY}/*/__pycache__; /usr/bin/python3 -m compileall -q /{_LIBRARY} >/dev/null 2>&1 || :"


def client_files(client_dir):
    """List the files of the VM's side.

    Args:
        client_dir: str, the folder ``client`` of the source tree.

    Returns:
        list of (target path without the leading slash, source path, mode), sorted.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    files = [("usr/bin/qvm-remote", os.path.join(client_dir, "qvm-remote"), 0o755)]
    for name in _SHARED:
        files.append((f"{_LIBRARY}/pullrpc/{name}.py", os.path.join(here, f"{name}.py"), 0o644))
    modules = os.path.join(client_dir, "qvm_remote_client")
    for name in os.listdir(modules):
        if name.endswith(".py"):
            files.append((f"{_LIBRARY}/qvm_remote_client/{name}", os.path.join(modules, name), 0o644))
    return sorted(files)


def client_archive(client_dir):
    """Pack the files of the VM's side; the same files always give the same bytes.

    Args:
        client_dir: str, as for :func:`client_files`.

    Returns:
        (bytes, str): a tar archive whose paths are relative to ``/``, and the SHA-256 of it in hex.

    Raises:
        OSError: a file is missing.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for target, source, mode in client_files(client_dir):
            with open(source, "rb") as file:
                data = file.read()
            entry = tarfile.TarInfo(target)
            entry.size, entry.mode, entry.uname, entry.gname = len(data), mode, "root", "root"
            archive.addfile(entry, io.BytesIO(data))
    data = buffer.getvalue()
    return data, hashlib.sha256(data).hexdigest()
