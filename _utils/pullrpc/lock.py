# SPDX-License-Identifier: GPL-2.0-or-later
"""The lock that lets one engine, or one ``run_once``, work at a time."""

from __future__ import annotations

import fcntl
import os
import stat

from .errors import EngineBusy, PullError, SpoolError
from .files import read_bounded, write_whole
from .supervisor import start_time

#: Names the minion whose engine was told to stop.
_STOPPED = "stopped"
#: How often the lock may be taken away while it is taken.
_TRIES = 3

_BUSY = (
    "another qvm-remote engine (or run_once) is at work in dom0, and there is only ever one; "
    "the service, if it is that, serves what waits already; for --once: systemctl stop qvm-remote"
)


class EngineLock:
    """Held from ``with`` to its end; the kernel drops it when the process dies, however it dies.

    Args:
        run_dir: str, absolute; created 0700.
        takes_signals: bool, whether signals make this process take new settings over, or end; it then leaves its pid.

    Raises:
        EngineBusy: another process holds it; SpoolError: the folder can't be used.
    """

    def __init__(self, run_dir, takes_signals=False):
        self._run_dir = run_dir
        self._takes_signals = takes_signals
        self._fd = None

    def __enter__(self):
        for _ in range(_TRIES):
            if self._take():
                return self
        raise EngineBusy(_BUSY)

    def _take(self):
        """Take it; say whether it is the one that the others see."""
        path = os.path.join(self._run_dir, "engine.lock")
        try:
            os.makedirs(self._run_dir, mode=0o700, exist_ok=True)
            info = os.lstat(self._run_dir)
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
                raise SpoolError(f"{self._run_dir} must be a folder that only root can write to")
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(path, self._fd):
                # Removed meanwhile: whoever comes next makes another one in its place.
                self.__exit__()
                return False
            os.ftruncate(self._fd, 0)
            if self._takes_signals:
                os.write(self._fd, str(os.getpid()).encode("ascii"))
        except BlockingIOError:
            self.__exit__()
            raise EngineBusy(_BUSY) from None
        except OSError as err:
            self.__exit__()
            raise SpoolError(f"can't use {self._run_dir}: {err.strerror}") from err
        return True

    def __exit__(self, *_):
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_held(run_dir):
    """Say whether an engine is at work.

    Args:
        run_dir: str.

    Returns:
        bool
    """
    try:
        fd = os.open(os.path.join(run_dir, "engine.lock"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def signal_engine(run_dir, signum):
    """Send a signal to the engine at work.

    Args:
        run_dir: str.
        signum: int.

    Returns:
        bool, False when none is at work.

    Raises:
        EngineBusy: what is at work does not listen (``run_once``).
    """
    if not is_held(run_dir):
        return False
    try:
        with open(os.path.join(run_dir, "engine.lock"), encoding="ascii") as file:
            os.kill(int(file.read(16)), signum)
    except (OSError, ValueError):
        raise EngineBusy("what is at work in dom0 is no engine and takes no orders; try again once it has ended") from None
    return True


def note_stopped(run_dir, minion):
    """Leave word that the engine of a minion was told to serve nobody any more. That holds for as long as this minion lives.

    Args:
        run_dir: str.
        minion: int, its pid.

    Raises:
        OSError: it can't be noted.
    """
    write_whole(os.path.join(run_dir, _STOPPED), _name(minion))


def was_stopped(run_dir, minion):
    """Say whether a minion's engine was told to serve nobody any more: another engine in its place is not to, either.

    Args:
        run_dir: str.
        minion: int, its pid.

    Returns:
        bool
    """
    try:
        return read_bounded(os.path.join(run_dir, _STOPPED), 64) == _name(minion)
    except (OSError, PullError):
        # It was told nothing, or is gone.
        return False


def _is_at(path, fd):
    """Whether a path names an open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _name(pid):
    """One process, for as long as the machine runs."""
    return f"{pid} {start_time(pid)}\n".encode("ascii")
