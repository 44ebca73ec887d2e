# SPDX-License-Identifier: GPL-2.0-or-later
"""What belongs to the VM's side, and to dom0's command, and where it goes: one list for the Makefile, the states and the packages."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import subprocess
import tarfile

from .files import write_whole

#: The modules of this package that client and agent import.
_SHARED = ("__init__", "digests", "errors", "files", "frames", "ids", "layout", "tokens")
_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBRARY = "usr/lib/qvm-remote"
#: Below usr/share, and below the folder ``share`` of each side: man pages, and completion for bash, zsh and fish.
_CLIENT_SHARE = (
    "man/man1/qvm-remote.1",
    "bash-completion/completions/qvm-remote",
    "fish/vendor_completions.d/qvm-remote.fish",
    "zsh/site-functions/_qvm-remote",
)
_COMMAND_SHARE = (
    "man/man5/qvm-remote.conf.5",
    "man/man8/qvm-remote-dom0.8",
    "bash-completion/completions/qvm-remote-dom0",
    "fish/vendor_completions.d/qvm-remote-dom0.fish",
    "zsh/site-functions/_qvm-remote-dom0",
)
#: All that these files and folders are is the client's.
CLIENT_PATHS = ("/usr/bin/qvm-remote", f"/{_LIBRARY}", *(f"/usr/share/{name}" for name in _CLIENT_SHARE))
#: By what a template's shell tells whether the client there is a package's, which its package manager alone may touch.
IS_PACKAGE = " || ".join(f"{query} {CLIENT_PATHS[0]}" for query in ("dpkg-query --search", "rpm --query --file", "pacman --query --owns"))
#: What root's shell does once the files are there. A user can't write bytecode there, and would compile the source at each
#: start. What an older version left goes first: by their times, all that was ever unpacked looks alike.
_COMPILE = "umask 022; rm -rf /{0}/*/__pycache__; /usr/bin/python3 -m compileall -q /{0} >/dev/null 2>&1 || :"
COMPILE = _COMPILE.format(_LIBRARY)
_COMMAND, _COMMAND_LIBRARY = "usr/bin/qvm-remote-dom0", "usr/lib/qvm-remote-dom0"
#: All that these are is dom0's command's.
COMMAND_PATHS = (f"/{_COMMAND}", f"/{_COMMAND_LIBRARY}", *(f"/usr/share/{name}" for name in _COMMAND_SHARE))


def client_files(client_dir):
    """List the files of the VM's side.

    Args:
        client_dir: str, the folder ``client`` of the source tree.

    Returns:
        list of (target path without the leading slash, source path, mode), sorted.
    """
    shared = [(f"{_LIBRARY}/pullrpc/{name}.py", os.path.join(_HERE, f"{name}.py"), 0o644) for name in _SHARED]
    launcher = ("usr/bin/qvm-remote", os.path.join(client_dir, "qvm-remote"), 0o755)
    own = _modules(_LIBRARY, os.path.join(client_dir, "qvm_remote_client"))
    return sorted([launcher, *shared, *own, *_papers(_CLIENT_SHARE, client_dir)])


def command_files(command_dir, package_dir=_HERE):
    """List the files of dom0's command ``qvm-remote-dom0``: its own, and all of this package.

    Args:
        command_dir: str, the folder ``dom0`` of the source tree.
        package_dir: str, where this package's files are taken from.

    Returns:
        list as for :func:`client_files`.
    """
    launcher = (_COMMAND, os.path.join(command_dir, "qvm-remote-dom0"), 0o755)
    own = _modules(_COMMAND_LIBRARY, os.path.join(command_dir, "qvm_remote_dom0"))
    return sorted([launcher, *own, *_modules(_COMMAND_LIBRARY, package_dir), *_papers(_COMMAND_SHARE, command_dir)])


def _papers(names, folder):
    return [(f"usr/share/{name}", os.path.join(folder, "share", name), 0o644) for name in names]


def _modules(library, folder):
    """The modules of a package, as they go into a library."""
    name = os.path.basename(folder)
    return [(f"{library}/{name}/{os.path.basename(path)}", path, 0o644) for path in glob.glob(os.path.join(glob.escape(folder), "*.py"))]


def command_is_installed(files):
    """Say whether just these files are what is installed as dom0's command.

    Args:
        files: list, as :func:`command_files` gives it.

    Returns:
        bool
    """
    found = glob.glob(f"/{_COMMAND_LIBRARY}/*/*.py")
    wanted = {f"/{target}" for target, _, _ in files}
    return wanted.issuperset(found) and all(_is_same(f"/{target}", source, mode) for target, source, mode in files)


def _is_same(path, source, mode):
    try:
        return os.stat(path, follow_symlinks=False).st_mode & 0o7777 == mode and _bytes(path) == _bytes(source)
    except OSError:
        return False


def install_command(files):
    """Install dom0's command here; what is left of another version goes.

    Args:
        files: list, as :func:`command_files` gives it.

    Raises:
        OSError: a file can't be written.
    """
    wanted = {f"/{target}" for target, _, _ in files}
    for path in glob.glob(f"/{_COMMAND_LIBRARY}/*/*.py"):
        if path not in wanted:
            os.unlink(path)
    # The command itself last: what it needs is there by then.
    copy_files([file for file in files if file[0] != _COMMAND])
    subprocess.run(["/bin/sh", "-c", _COMPILE.format(_COMMAND_LIBRARY)], check=False)
    copy_files([file for file in files if file[0] == _COMMAND])


def copy_files(files, destination="/"):
    """Copy files to where they belong.

    Args:
        files: list of (target path without the leading slash, source path, mode).
        destination: str, the folder below which they go.

    Raises:
        OSError: one can't be read or written.
    """
    for target, source, mode in files:
        path = os.path.join(destination, target)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        write_whole(path, _bytes(source), mode)
        os.chmod(path, mode)


def _bytes(path):
    with open(path, "rb") as file:
        return file.read()


def code_digest(roots, prefix=""):
    """Name the code of this formula that Salt works with, to tell it from another version's.

    Args:
        roots: list of str, where ``utils``, ``modules`` and ``engines`` lie; a file counts where it is found first, as for Salt.
        prefix: str, what their names begin with: ``_`` in a source tree.

    Returns:
        str, hex: the SHA-256 of all of it.

    Raises:
        OSError: a file can't be read.
    """
    found = {}
    for root in roots:
        for name in ("utils/pullrpc/*.py", "modules/qvm_remote.py", "engines/qvm_remote.py"):
            for path in glob.glob(os.path.join(glob.escape(root), prefix + name)):
                found.setdefault(os.path.relpath(path, root), path)
    digest = hashlib.sha256()
    # In an order that is the same wherever they lie.
    for name in sorted(found):
        digest.update(_bytes(found[name]))
    return digest.hexdigest()


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
            data = _bytes(source)
            entry = tarfile.TarInfo(target)
            entry.size, entry.mode, entry.uname, entry.gname = len(data), mode, "root", "root"
            archive.addfile(entry, io.BytesIO(data))
    data = buffer.getvalue()
    return data, hashlib.sha256(data).hexdigest()
