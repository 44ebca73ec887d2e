# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages between the simulator's processes: JSON in a memory file, with file descriptors, over a packet socket."""

import array
import contextlib
import json
import os
import socket

_FDS_MAX = 8


def send(sock, message, fds=()):
    """Send a message.

    Args:
        sock: socket of type SOCK_SEQPACKET.
        message: JSON data, of any size.
        fds: descriptors to hand over.

    Raises:
        OSError: the other side is gone.
    """
    body = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        with open(body, "wb", closefd=False) as file:
            file.write(json.dumps(message).encode("ascii"))
        rights = array.array("i", [body, *fds])
        sock.sendmsg([b"m"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    finally:
        os.close(body)


def receive(sock):
    """Receive a message.

    Args:
        sock: socket of type SOCK_SEQPACKET.

    Returns:
        (JSON data, list of int): message and descriptors; (None, []) when the other side is gone.
    """
    fds = array.array("i")
    try:
        data, ancillary, _, _ = sock.recvmsg(16, socket.CMSG_LEN(_FDS_MAX * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None, []
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    if not data or not fds:
        return None, []
    body = fds.pop(0)
    with open(body, "rb") as file:
        file.seek(0)
        return json.loads(file.read()), list(fds)


@contextlib.contextmanager
def short_path(path):
    """A name for a socket's path that fits the kernel's 107 bytes, however deep it lies.

    Args:
        path: str.

    Yields:
        str
    """
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def listen(path):
    """Make a listening socket at a path, for its owner only.

    Args:
        path: str.

    Returns:
        socket
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with short_path(path) as name:
        sock.bind(name)
    os.chmod(path, 0o600)
    sock.listen(64)
    return sock


def connect(path):
    """Connect to a listening socket.

    Args:
        path: str.

    Returns:
        socket

    Raises:
        OSError: nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with short_path(path) as name:
        sock.connect(name)
    return sock
