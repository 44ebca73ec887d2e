# SPDX-License-Identifier: GPL-2.0-or-later
"""A file of lines that only grows, each of which names the one before it by its SHA-256: whoever changes, removes or moves a
line is found out by the lines after it. The chain goes on from file to file when the file is rotated away by a rename.

Beside the file lies its *head*, which says what its last line was, so that a removed end is missed as well; it is also the
lock under which processes take turns. The chain has no key. Who can write to both files can forge all of it: against that
helps a copy of a line's digest somewhere else.

What a crash does to the end of the file is mended by the next write, which says what it found: see the field ``log``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading

from .errors import AuditError
from .files import sync_folder

#: What comes before the first line.
START = "0" * 64
#: Longest line, bytes, without what the chain adds to it.
BODY_MAX = 16384
#: Longest line as it stands in the file, with its newline.
LINE_MAX = BODY_MAX + 1024
#: Size of the head, bytes. It never changes, so that a full disk has room for it; within a sector, so that it is whole.
_HEAD_SIZE = 256
_HEAD = re.compile(rb"[!-~]{1,64} [0-9]{1,18} [0-9]{1,18} [0-9]{1,18} [0-9a-f]{64} *\n")
#: No line has such a number; what is larger by far can't even be printed.
_SEQ_END = 10**18
#: Levels of lists and dicts in a line.
_DEPTH_MAX = 8
_BACKWARDS = 1 << 16
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Head:
    """What is known of the last line.

    Args:
        file: int, number of the file it stands in; the first one is 1.
        seq: int, the line's number.
        digest: str, its SHA-256 in hex.
        synced: int, number of a line up to which all are known to survive a power cut.
        boot: str, the kernel's name for the time since it was booted.
    """

    __slots__ = ("boot", "digest", "file", "seq", "synced")

    def __init__(self, file, seq, digest, synced, boot):
        self.file, self.seq, self.digest, self.synced, self.boot = file, seq, digest, synced, boot

    def pack(self):
        """The head as it is kept.

        Returns:
            bytes
        """
        return f"{self.boot} {self.file} {self.seq} {self.synced} {self.digest}".ljust(_HEAD_SIZE - 1).encode("ascii") + b"\n"


def unpack_head(data):
    """Read a head.

    Args:
        data: bytes.

    Returns:
        Head; None when this is none.
    """
    found = _HEAD.fullmatch(data) if len(data) == _HEAD_SIZE else None
    if found is None:
        return None
    boot, file, seq, synced, digest = found[0].decode("ascii").split()
    return Head(int(file), int(seq), digest, int(synced), boot)


def head_path(path):
    """Where the head of a chain lies.

    Args:
        path: str, its file.

    Returns:
        str
    """
    return f"{path}.head"


def boot_id():
    """Name the time since the kernel was booted.

    Returns:
        str; ``-`` where it is not known.
    """
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            return file.read().strip() or "-"
    except OSError:
        return "-"


def is_lost_by_power_cut(head, seq, boot):
    """Say whether a chain may have lost its end by a power cut: only what was never forced to the disk can be, and only then.

    Args:
        head: Head.
        seq: int, the last line that is there.
        boot: str, as :func:`boot_id` gives it now.

    Returns:
        bool
    """
    return head.boot != boot and head.synced <= seq < head.seq


def read_line(raw):
    """Read a line of a chain.

    Args:
        raw: bytes, without its newline.

    Returns:
        dict, with ``seq`` (int, not negative) and ``prev`` (str) in it; None when this is none.
    """
    if not raw.startswith(b'{"seq":'):
        return None
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not is_number(line.get("seq")) or not isinstance(line.get("prev"), str):
        return None
    # Who writes the log keeps no numbers that long, and no lists in lists: whoever reads it is not to stumble over them.
    return line if _is_flat(line, _DEPTH_MAX) else None


def is_number(value):
    """Say whether something from a line is a number as this file counts with.

    Args:
        value: JSON data.

    Returns:
        bool
    """
    return type(value) is int and 0 <= value < _SEQ_END


def _is_flat(value, depth):
    """Whether data is as simple as what is written here: few levels, no number that can't be printed."""
    if isinstance(value, (dict, list)):
        return depth > 0 and all(_is_flat(one, depth - 1) for one in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or abs(value) < _SEQ_END


class Chain:
    """The writing end; may be used from several threads, and beside other processes.

    Args:
        path: str; its folder is created 0700, file and head 0600.
        older: callable that gives the path of the file that was rotated away last and can be read as it is; None for none.
        keep: int, how many old files are kept: a new one says so, and with it which ones have to be there. May be changed at any time.
    """

    def __init__(self, path, older, keep):
        self.keep = keep
        self._path = path
        self._older = older
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._file = self._head_file = None
        self._at = self._head_at = None
        #: The last line, and the head as we left it on the disk: who finds another one there knows that another process wrote.
        self._head, self._packed = None, b""
        #: The file's size after our last write; None when the file has to be looked at anew.
        self._size = None
        #: What the next line says of the file.
        self._found = {}
        self._synced = self._lost = 0
        self._boot = boot_id()

    def append(self, bodies, sync):
        """Append lines by one write: all of them or none.

        Args:
            bodies: list of bytes, each a JSON object in ASCII, not empty, at most :data:`BODY_MAX` long.
            sync: bool, whether they are to be on the disk on return. Those who ask for that at the same time share one fsync.

        Returns:
            list of (int, str), number and SHA-256 of each line.

        Raises:
            AuditError: they can't be written, or not be forced to the disk.
        """
        if not bodies:
            return []
        try:
            with self._lock, self._turn():
                self._look()
                written = self._write(bodies)
            if sync:
                self._sync(written[-1][0])
        except OSError as err:
            raise AuditError(f"the audit log {self._path} can't be written: {err.strerror}") from err
        return written

    @contextlib.contextmanager
    def _turn(self):
        """Have this process's turn. It is lent by the head that lies there under its name, and no other."""
        while True:
            if self._head_file is None:
                os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
                self._head_file = _open(head_path(self._path), 0)
                self._head_at = _place(os.fstat(self._head_file.fileno()))
                self._packed = b""
            # By a name of its own, lest it is closed before it is unlocked.
            file = self._head_file
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            try:
                if _is_at(head_path(self._path), self._head_at):
                    yield
                    return
                self._head_file = None
            finally:
                fcntl.flock(file.fileno(), fcntl.LOCK_UN)

    def _look(self):
        """See that the file is the one that we know, with nothing in it but what we know; otherwise get to know it."""
        if self._size is not None and self._packed == self._read_head() and _is_at(self._path, self._at, self._size):
            return
        self._size = None
        if self._file is not None:
            # It was rotated away, perhaps: whoever waits for its lines to be on the disk looks at the new one only.
            self._force(self._file, self._head.seq)
        self._open()

    def _write(self, bodies):
        head, found = self._head, self._found
        seq, digest = head.seq, head.digest
        lines, written = [], []
        for body in bodies:
            seq += 1
            shown = f'"log":{json.dumps(found, separators=(",", ":"))},' if found and not written else ""
            line = f'{{"seq":{seq},"prev":"{digest}",{shown}'.encode("ascii") + body[1:]
            digest = hashlib.sha256(line).hexdigest()
            lines.append(line + b"\n")
            written.append((seq, digest))
        self._put((b"\n" if "torn" in found or "closed" in found else b"") + b"".join(lines))
        self._found = {}
        self._head = Head(found.get("file", head.file), seq, digest, max(head.synced, self._synced), self._boot)
        self._put_head()
        return written

    def _put(self, data):
        size, self._size = self._size, None
        done = os.write(self._file.fileno(), data)
        if done != len(data):
            # Only we write now, so what is taken back is ours. Where that fails, too, the next write closes it off.
            os.ftruncate(self._file.fileno(), size)
            raise AuditError(f"the audit log {self._path} can't be written: the disk is full")
        self._size = size + done

    def _read_head(self):
        return os.pread(self._head_file.fileno(), _HEAD_SIZE + 1, 0)

    def _put_head(self):
        self._packed = b""
        packed = self._head.pack()
        if os.pwrite(self._head_file.fileno(), packed, 0) != len(packed):
            raise AuditError(f"{head_path(self._path)} can't be written: the disk is full")
        self._packed = packed

    def _open(self):
        file = _open(self._path, os.O_APPEND)
        fd = file.fileno()
        info = os.fstat(fd)
        size = info.st_size
        last, end = _last_line(fd, size)
        found = _tail(fd, last, end, size)
        if "closed" in found:
            last, found["closed"] = found["closed"], True
        number = _number_of(fd)
        is_new = last is None
        if is_new:
            if not size:
                sync_folder(os.path.dirname(self._path))
            last, number = self._last_of_older(found)
        kept = unpack_head(self._read_head())
        seq, digest = self._go_on_from(kept, last, found)
        number = max(number, kept.file if kept else 0)
        if is_new:
            found.update(file=number + 1, keep=self.keep)
        synced = kept.synced if kept and kept.boot == self._boot else 0 if kept is None else seq
        self._head = Head(number, seq, digest, synced, self._boot)
        self._file, self._at, self._found, self._size = file, _place(info), found, size
        self._synced = max(self._synced, synced)
        if kept is None:
            # Before any line, so that lines without a head mean something.
            self._put_head()
            os.fsync(self._head_file.fileno())

    def _last_of_older(self, found):
        older = self._older()
        if older is None:
            return None, 0
        fd = os.open(older, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Nothing in the new file is on the disk before all of the old one is, whichever process wrote that.
            os.fsync(fd)
            size = os.fstat(fd).st_size
            last, end = _last_line(fd, size)
            tail = _tail(fd, last, end, size)
            if "torn" in tail:
                found["older"] = tail["torn"]
            return tail.get("closed", last), _number_of(fd)
        finally:
            os.close(fd)

    def _go_on_from(self, kept, last, found):
        """Choose the line that the next one follows: the last that is there, unless the head knows of more. Then it is the
        one that the head knows, so that the gap stays in the chain for good.
        """
        if kept is None:
            if last is None:
                return 0, START
            found["headless"] = True
            return last
        there = last or (0, START)
        if there[0] > kept.seq:
            found["ahead"] = there[0] - kept.seq
            return there
        if is_lost_by_power_cut(kept, there[0], self._boot):
            found["lost"] = kept.seq - there[0]
            return there
        return kept.seq, kept.digest

    def _sync(self, seq):
        with self._sync_lock:
            # Whoever waited for the lock meanwhile had its lines forced to the disk by the one that held it.
            if seq <= self._lost:
                raise AuditError(f"the audit log {self._path} could not be forced to the disk")
            if seq <= self._synced:
                return
            with self._lock:
                # By a name of its own: it may be rotated away, and another one opened, while this goes on.
                file, upto = self._file, self._head.seq
            self._force(file, upto)
            with self._lock, self._turn():
                if self._packed and self._packed == self._read_head():
                    self._head.synced = max(self._head.synced, self._synced)
                    self._put_head()


    def _force(self, file, upto):
        """Have the lines up to one on the disk."""
        if upto <= self._synced:
            return
        try:
            os.fsync(file.fileno())
        except OSError:
            # The kernel tells this once, and forgets what it could not write.
            self._lost = max(self._lost, upto)
            raise
        self._synced = max(self._synced, upto)


def _open(path, flags):
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    # An object, which is closed once nobody uses it any more.
    return os.fdopen(fd, "rb", buffering=0)


def _place(info):
    return info.st_dev, info.st_ino


def _is_at(path, place, size=None):
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    return _place(info) == place and size in (None, info.st_size)


def _last_line(fd, size):
    """Find the last whole line of a chain, from the end on.

    Returns:
        ((int, str), int): its number and SHA-256, and where it ends; (None, 0) when there is none.
    """
    rest, at = b"", size
    while at:
        step = min(_BACKWARDS, at)
        at -= step
        first, *parts = (os.pread(fd, step, at) + rest).split(b"\n")
        # What comes after the last newline is no line. The first part may begin before what was read, and is looked at later.
        start = at + len(first) + 1
        whole = []
        for raw in parts[:-1]:
            whole.append((raw, start + len(raw) + 1))
            start += len(raw) + 1
        if not at and parts:
            whole.insert(0, (first, len(first) + 1))
        for raw, end in reversed(whole):
            line = read_line(raw) if len(raw) < LINE_MAX else None
            if line:
                return (line["seq"], hashlib.sha256(raw).hexdigest()), end
        # What is too long for a line stays so without its end.
        rest = first[:LINE_MAX] + (b"\n" if parts else b"")
    return None, 0


def _tail(fd, last, end, size):
    """Look at what comes after the last whole line: nothing, a line that lacks its newline alone, or what a crash left."""
    if end == size:
        return {}
    raw = os.pread(fd, LINE_MAX, end)
    line = read_line(raw) if len(raw) < LINE_MAX else None
    if line and last and (line["seq"], line["prev"]) == (last[0] + 1, last[1]):
        return {"closed": (line["seq"], hashlib.sha256(raw).hexdigest())}
    digest = hashlib.sha256()
    while end < size:
        raw = os.pread(fd, min(_BACKWARDS, size - end), end)
        digest.update(raw)
        end += len(raw)
        if not raw:
            break
    return {"torn": digest.hexdigest()}


def _number_of(fd):
    """The number of a file, which its first line says; 0 when it doesn't."""
    raw = os.pread(fd, LINE_MAX, 0)
    # A first line may have been torn, and closed off by the next one.
    for part in raw.split(b"\n"):
        line = read_line(part)
        found = line.get("log") if line else None
        if isinstance(found, dict) and is_number(found.get("file")):
            return found["file"]
    return 0
