# SPDX-License-Identifier: GPL-2.0-or-later
"""The system calls that Python 3.9 has no name for."""

import ctypes
import fcntl
import os
import socket
import struct

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000,
    0x02000000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
_MS_RELATIME = 1 << 21
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP = 1, 24
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_NR_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result, what):
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def unshare(flags):
    """Leave namespaces for new ones."""
    _check(_libc.unshare(flags), "unshare")


def mount(source, target, kind=None, flags=0, data=None):
    """Mount a file system, or bind a path.

    Args:
        source, target: str.
        kind: str, the file system's name, or None.
        flags: int.
        data: str, its options, or None.

    Raises:
        OSError
    """
    raw = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _check(_libc.mount(raw[0], raw[1], raw[2], ctypes.c_ulong(flags), raw[3]), f"mount {kind or 'bind'} on {target}")


def bind(source, target, read_only=False):
    """Make a path visible at another one."""
    mount(source, target, None, MS_BIND | MS_REC)
    if read_only:
        # In a user namespace, flags that the source was mounted with may not be cleared; so they are kept.
        flags = os.statvfs(target).f_flag
        kept = flags & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME)
        kept |= _MS_RELATIME if flags & os.ST_RELATIME else 0
        mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | kept)


def pivot_root(new_root):
    """Make a mount point the root and let go of the old one."""
    os.chdir(new_root)
    _check(_libc.syscall(_NR_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def set_hostname(name):
    """Name this UTS namespace."""
    raw = name.encode("ascii")
    _check(_libc.sethostname(raw, len(raw)), "sethostname")


def die_with_parent(signum):
    """Get a signal when the thread that forked us ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signum), 0, 0, 0), "prctl")


def drop_capabilities(numbers):
    """Take capabilities away from this process's future programs, for ever."""
    for number in numbers:
        _check(_libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0), "prctl")


def loopback_up():
    """Switch the loopback interface on in this network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
