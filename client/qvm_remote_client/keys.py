# SPDX-License-Identifier: GPL-2.0-or-later
"""This VM's key: make it, show it, take one over. It is printed only when asked for by name, and read from stdin only."""

import os

from pullrpc.errors import KeyringError, PullError
from pullrpc.files import write_whole
from pullrpc.tokens import fingerprint, parse_key

from .request import load_key, vm_name
from .terminal import put, warn

_REVEALS = "whoever has this key can do in dom0 what this qube can"


def run(queue, action, values, quiet, in_fd=0):
    """The command ``key``.

    Args:
        queue: Queue.
        action: str, ``gen``, ``show``, ``import`` or ``fingerprint``.
        values: dict, what was given on the command line.
        quiet: bool, print no notes.
        in_fd: int, where a key is read from.

    Returns:
        int, the exit code.

    Raises:
        PullError: a key that can't be used, must not be replaced, or is not to be shown.
    """
    if action == "fingerprint":
        put(f"{vm_name()} {fingerprint(load_key(queue))}\n")
    elif action == "show":
        _show(queue, "secret" in values, quiet)
    else:
        _replace(queue, action, "force" in values, quiet, in_fd)
    return 0


def _show(queue, is_asked_for, quiet):
    key = load_key(queue)
    on_terminal = os.isatty(1)
    if not is_asked_for:
        if not on_terminal or not os.isatty(0):
            raise PullError(f"{_REVEALS}; to print it all the same: qvm-remote key show --secret; its name without the secret: qvm-remote key fingerprint")
        if not _confirm(f"{_REVEALS}, and it will stand on this screen. Show it? [y/N] "):
            raise PullError("the key was not shown; its name without the secret: qvm-remote key fingerprint")
    elif on_terminal and not quiet:
        warn(_REVEALS)
    put(f"{key.hex()}\n")


def _confirm(question):
    os.write(2, f"qvm-remote: {question}".encode("ascii"))
    return os.read(0, 1024).strip().lower() in (b"y", b"yes")


def _replace(queue, action, force, quiet, in_fd):
    from .main import prepare

    prepare(queue, quiet)
    if os.path.lexists(queue.key) and not force:
        raise PullError(f"there is a key already ({queue.key}); --force replaces it, and dom0 then has to authorize the new one")
    key = os.urandom(32) if action == "gen" else _given_key(in_fd)
    try:
        write_whole(queue.key, key.hex().encode("ascii") + b"\n")
    except OSError as err:
        raise PullError(f"can't write {queue.key}: {err.strerror}") from err
    put(f"key of {vm_name()}: {fingerprint(key)}\n")
    if not quiet:
        from .advice import authorize_new

        warn(f"next, have dom0 authorize it (the key never appears on a command line), {authorize_new()}")


def _given_key(fd):
    try:
        return parse_key(_read_key(fd))
    except KeyringError as err:
        raise PullError(f"{err}; nothing was changed; give 64 hex digits on stdin: qvm-remote key import < FILE") from None


def _read_key(fd):
    if os.isatty(fd):
        return _ask_for_key(fd)
    data = b""
    while len(data) <= 66:
        chunk = os.read(fd, 67 - len(data))
        if not chunk:
            break
        data += chunk
    return data.strip()


def _ask_for_key(fd):
    """Have a key typed or pasted, without showing it."""
    import termios

    before = termios.tcgetattr(fd)
    hidden = termios.tcgetattr(fd)
    hidden[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(fd, termios.TCSAFLUSH, hidden)
        os.write(2, b"qvm-remote: the key, 64 hex digits (not shown): ")
        typed = os.read(fd, 1024).strip()
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
    os.write(2, b"\n")
    return typed
