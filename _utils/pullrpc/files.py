# SPDX-License-Identifier: GPL-2.0-or-later
"""Small files, written whole and read with a bound, and the standard streams of a program. Used on both sides.

Every file appears by rename: whoever sees a name sees all of its content.
"""

import errno
import os
import stat
import sys

from .errors import PullError


def write_whole(path, data, mode=0o600):
    """Write a file that appears whole or not at all.

    Args:
        path: str.
        data: bytes.
        mode: int, permissions.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    _write(path, data, mode, sync=False)


def write_durably(path, data, mode=0o600):
    """Write a file that appears whole or not at all, and is still there, whole, after a power cut.

    Args:
        path, data, mode: as for :func:`write_whole`.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    _write(path, data, mode, sync=True)
    sync_folder(os.path.dirname(path))


def sync_folder(path):
    """Have the names in a folder survive a power cut.

    Args:
        path: str.

    Raises:
        OSError
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(path, data, mode, sync):
    folder, name = os.path.split(path)
    temp = os.path.join(folder, f".{name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        try:
            write_fully(fd, data)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temp, path)
    except BaseException:
        forget(temp)
        raise


def write_fully(fd, data):
    """Write all of some bytes; wait where the other side is slow to read them.

    Args:
        fd: int.
        data: bytes.

    Raises:
        OSError: it can't be written.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # Whoever started us made it non-blocking. Imported here: hardly anybody does.
            import select

            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()


def make_private(path):
    """Make a folder for nobody but its owner, and the same of each one above it that is missing.

    Args:
        path: str, absolute.

    Raises:
        OSError: it can't be made.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        # os.makedirs gives its mode to the last one alone.
        make_private(os.path.dirname(path))
        make_private(path)


def make_ours(folder):
    """Give us, and nobody else, all rights to a folder; a link is not followed.

    Args:
        folder: str.

    Raises:
        NotADirectoryError: it is none.
        OSError: it is not there, or another user's.
    """
    # So it is opened whatever its rights, and the one that was opened is the one that is changed.
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)


def forget(*paths):
    """Remove files; one that isn't there is as good as removed.

    Args:
        paths: str.
    """
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass


def move(source, target):
    """Move a file, to another disk if need be: a queue may lie in memory, and the history not.

    Args:
        source, target: str; what was at ``target`` goes.

    Raises:
        OSError: it can't be moved, and is where it was.
    """
    try:
        os.rename(source, target)
    except OSError as err:
        if err.errno != errno.EXDEV:
            raise
        # Imported here: it takes longer than the move, where that is a renaming.
        import shutil

        # Not written into: it may have another name as well.
        forget(target)
        shutil.copyfile(source, target, follow_symlinks=False)
        os.chmod(target, 0o600)
        os.unlink(source)


def read_bounded(path, limit):
    """Read a small file.

    Args:
        path: str.
        limit: int, bytes.

    Returns:
        bytes

    Raises:
        OSError: it can't be read.
        PullError: it is longer than the limit, or no regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    data = b""
    try:
        while len(data) <= limit:
            chunk = os.read(fd, limit + 1 - len(data))
            if not chunk:
                break
            data += chunk
    finally:
        os.close(fd)
    if len(data) > limit:
        raise PullError(f"{os.path.basename(path)} is longer than {limit} bytes")
    return data


def open_closed_streams():
    """Open the standard streams that we were started without on /dev/null, so that no other file takes their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            file = open(os.devnull, mode)  # noqa: SIM115
            # What we start is to have it, too.
            os.set_inheritable(file.fileno(), True)
            setattr(sys, name, file)


def discard_stream(number):
    """Have what is written to a standard stream, now and when the program ends, go nowhere: it can't be written.

    Args:
        number: int.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def knock(path):
    """Write a byte to a FIFO if somebody listens; never wait, and write into nothing else that has its name.

    Args:
        path: str.

    Returns:
        bool, False when the FIFO is there, but whoever made it has left.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        # Nobody listens; whoever waits without a bell looks by itself now and then.
        return err.errno != errno.ENXIO
    try:
        info = os.fstat(fd)
        # Another name of a file may have been put there, the key's for one; or of somebody else's FIFO.
        if stat.S_ISFIFO(info.st_mode) and info.st_nlink == 1:
            os.write(fd, b"!")
    except (BlockingIOError, BrokenPipeError):
        pass
    finally:
        os.close(fd)
    return True
