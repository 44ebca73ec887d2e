# SPDX-License-Identifier: GPL-2.0-or-later
"""This VM's key: make it, show it, take one over. It is printed only when asked for by name."""

import os

from pullrpc.errors import PullError
from pullrpc.files import write_whole
from pullrpc.tokens import fingerprint, parse_key

from .request import load_key, vm_name

_USAGE = """\
usage: qvm-remote key gen [--force]      make a new key for this qube
       qvm-remote key show [--secret]    print its fingerprint, or the key itself
       qvm-remote key import [--force]   read a key (64 hex digits) from stdin
"""


def run(words, queue, out, in_fd=0):
    """The subcommand ``key``.

    Args:
        words: list of str, what follows ``key``.
        queue: Queue, its folders made.
        out: text file to print to.
        in_fd: int, where a key is read from.

    Raises:
        PullError: bad usage, or a key that can't be used or must not be replaced.
    """
    if words[:1] in (["-h"], ["--help"]):
        out.write(_USAGE)
        return
    action, options = (words[0], words[1:]) if words else ("", [])
    allowed = {"gen": ["--force"], "show": ["--secret"], "import": ["--force"]}.get(action)
    if allowed is None or any(option not in allowed for option in options):
        raise PullError("use 'key gen', 'key show' or 'key import'; see: qvm-remote key --help")
    if action == "show":
        key = load_key(queue)
        out.write(f"{key.hex()}\n" if options else f"{vm_name()} {fingerprint(key)}\n")
        return
    if os.path.exists(queue.key) and not options:
        raise PullError(f"there is a key already ({queue.key}); --force replaces it, and dom0 then has to authorize the new one")
    key = os.urandom(32) if action == "gen" else parse_key(_read_key(in_fd))
    try:
        write_whole(queue.key, key.hex().encode("ascii") + b"\n")
    except OSError as err:
        raise PullError(f"can't write {queue.key}: {err.strerror}") from err
    out.write(f"key of {vm_name()}: {fingerprint(key)}\n")
    if action == "gen":
        out.write(
            "Next, in dom0 (the key never appears on a command line):\n"
            f"  qvm-run --pass-io {vm_name()} 'qvm-remote key show --secret' | salt-call --local qvm_remote.authorize {vm_name()}\n"
        )


def _read_key(fd):
    data = b""
    while len(data) <= 66:
        chunk = os.read(fd, 67 - len(data))
        if not chunk:
            break
        data += chunk
    return data.strip()
