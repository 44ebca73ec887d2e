# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent: answers the requests of a session that dom0 opened, one answer each, and never writes a byte otherwise.

It only moves files between dom0's requests and the queue; it holds no key and decides nothing. Other programs of this user may
put anything there: whatever is no plain file, or no file of ours alone, is never opened and never waited for, but put aside.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import stat
import time

from pullrpc import __version__
from pullrpc.errors import PullError, SessionBroken
from pullrpc.files import forget, knock, make_ours, read_bounded, write_fully, write_whole
from pullrpc.frames import HEADER_MAX, PAYLOAD_MAX, FrameReader, encode_frame, wait_readable, write_all
from pullrpc.ids import is_cid
from pullrpc.layout import REQUEST_PARTS
from pullrpc.tokens import fingerprint, parse_key

#: How often the queue is looked at without a knock at the doorbell, seconds.
_SCAN_EVERY = 2.0
#: Without a knock, and while its folder looks unchanged, the queue is listed all the same this often, seconds.
_LIST_EVERY = 20.0
#: A folder changed this lately may change again without showing it: file systems count time in ticks. Nanoseconds.
_SETTLES_AFTER = 1_000_000_000
#: How often the agent's lock is asked for at each look at the queue: whoever keeps it must not hold the session up.
_LOCK_TRIES = 10
#: Most commands named in one answer: each takes up to 80 bytes of a header of 4096.
_ITEMS_MAX = 24
_CANCELS_MAX = 16
#: Most names of the queue that are looked at in one go, so that dom0 is heard in between however many there are.
_NAMES_MAX = 4096
#: Most names that are none of ours and are answered in one go; after so many of them in a session they are removed without a word.
_REJECTS_MAX, _REJECTED_KEPT = 64, 1000
#: Results that nobody fetched are removed after this many seconds: later than any command may take.
_RESULTS_KEPT = 8 * 86400
#: Most files of a folder that are looked at for that when a session begins.
_TIDIED_MAX = 20000


class Agent:
    """One session.

    Args:
        queue: Queue.
        in_fd, out_fd: int, dom0's requests and our answers.
    """

    def __init__(self, queue, in_fd=0, out_fd=1):
        self._queue = queue
        self._reader = FrameReader(in_fd)
        self._out_fd = out_fd
        self._bell = None
        self._lock = None
        self._ended = False
        #: The listing of the queue that is gone through, and when the folder had changed last as it began; None between two of them.
        self._names = self._listed = None
        #: How many names were put aside.
        self._rejected = 0

    def serve(self):
        """Answer until dom0 ends the session.

        Returns:
            int, the exit code.
        """
        handlers = {
            "hello": self._hello,
            "key": self._key,
            "set-key": self._set_key,
            "poll": self._poll,
            "fetch": self._fetch,
            "take": self._take,
            "put": self._put,
            "result": self._result,
            "drop": self._drop,
            "bye": self._bye,
        }
        try:
            while not self._ended:
                request, payload = self._reader.read(PAYLOAD_MAX, None)
                try:
                    answer, data = handlers.get(request.get("op"), self._unknown)(request, payload)
                except OSError as err:
                    answer, data = {"error": f"the qube can't do this: {err.strerror}"}, b""
                except PullError as err:
                    answer, data = {"error": str(err)[:200]}, b""
                except (KeyError, TypeError, ValueError):
                    answer, data = {"error": "this agent can't read that request; update qvm-remote in the template"}, b""
                answer["n"] = request.get("n")
                write_all(self._out_fd, encode_frame(answer, data), None)
        except SessionBroken:
            return 0
        finally:
            self._hang_up()
        return 0

    def _unknown(self, request, payload):
        return {"error": "this agent does not know that request; update qvm-remote in the template"}, b""

    def _key(self, request, payload):
        """Say what key there is, and whether queue and key are in order. Nothing is changed: dom0 may only want to know."""
        try:
            found = fingerprint(parse_key(read_bounded(self._queue.key, 66)))
        except (OSError, PullError):
            found = None
        problems = self._queue.problems()
        if found is None and not any(problem.startswith("key-") for problem in problems):
            problems.append("key-malformed")
        return {"fingerprint": found, "problems": problems}, b""

    def _set_key(self, request, payload):
        key = parse_key(payload)
        self._make_folders()
        write_whole(self._queue.key, key.hex().encode("ascii") + b"\n")
        return {}, b""

    def _make_folders(self):
        # Imported here, as main imports us.
        from .main import prepare

        # Without a word: whatever we write is taken for an answer.
        prepare(self._queue, quiet=True)

    def _hello(self, request, payload):
        self._make_folders()
        limits = request.get("limits")
        if not isinstance(limits, dict):
            raise PullError("hello without limits")
        lines = "".join(f"{name} {int(value)}\n" for name, value in sorted(limits.items()))
        try:
            self._write(self._queue.limits, lines.encode("ascii"))
        except OSError as err:
            # A full disk keeps no session from beginning. The client goes by what dom0 took before; dom0 looks at it in any case.
            if err.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        self._tidy()
        return {"v": 2, "agent": __version__, "stream": 1}, b""

    def _poll(self, request, payload):
        deadline = time.monotonic() + min(300, max(0, int(request["wait"])))
        room = min(_ITEMS_MAX, int(request["max"]))
        seen, list_at = None, 0
        while True:
            self._open_bell()
            now = time.monotonic()
            changed, items, cancels = os.stat(self._queue.pending()).st_mtime_ns, [], []
            if changed != seen or now >= list_at or self._names is not None:
                items, cancels = self._scan(room, changed)
                seen = self._listed if time.time_ns() - changed > _SETTLES_AFTER else None
                list_at = now + _LIST_EVERY
            if items or cancels or now >= deadline or self._reader.pending():
                break
            ready = wait_readable([self._reader.fileno(), self._bell], min(deadline, now + (_SCAN_EVERY if self._names is None else 0)))
            if self._bell in ready:
                # Whoever else reads here, a second agent for one, may have been quicker: it was a knock all the same.
                with contextlib.suppress(BlockingIOError):
                    os.read(self._bell, 65536)
                seen = None
            if self._reader.fileno() in ready:
                break
        return self._describe(items, cancels, min(PAYLOAD_MAX, int(request["inline"])))

    def _describe(self, items, cancels, inline_max):
        """List commands with their sizes; put small ones into the payload at once, sparing a round trip each."""
        described, payload = [], b""
        for cid in items:
            sizes = [self._size(cid + suffix) for suffix in REQUEST_PARTS]
            if sizes[0] < 0:
                # Its client has just taken it back.
                continue
            inline = b""
            if 0 <= sizes[1] and sizes[0] + sizes[1] <= inline_max - len(payload):
                inline = self._read_request(cid, sizes)
            payload += inline
            described.append([cid, *sizes, int(bool(inline))])
        while described and len(json.dumps([described, cancels], separators=(",", ":"))) > HEADER_MAX - 128:
            last = described.pop()
            if last[-1]:
                payload = payload[: -(last[1] + last[2])]
        return {"items": described, "cancels": cancels}, payload

    def _read_request(self, cid, sizes):
        """Command and token in one; nothing where they can't be read, or are changing: then dom0 asks for them, or refuses."""
        try:
            parts = [read_bounded(self._queue.pending(cid + suffix), size) for suffix, size in zip(REQUEST_PARTS[:2], sizes)]
        except (OSError, PullError):
            return b""
        return b"".join(parts) if [len(part) for part in parts] == sizes[:2] else b""

    def _scan(self, room, changed):
        """Look at the next names of the queue, from the first one again once all were looked at: (commands, cancels)."""
        if self._names is None:
            self._names, self._listed = os.scandir(os.fsencode(self._queue.pending())), changed
        items, cancels, count, rejects = [], [], 0, 0
        for entry in itertools.islice(self._names, _NAMES_MAX):
            raw, count = entry.name, count + 1
            if raw.startswith(b"."):
                continue
            stem, dot, suffix = raw.partition(b".")
            if is_cid(stem) and dot + suffix in (b".auth", b".in"):
                continue
            if is_cid(stem) and dot + suffix == b".cancel":
                cancels.append(stem.decode("ascii"))
            elif is_cid(raw) and self._is_plain(raw):
                items.append(raw.decode("ascii"))
            else:
                # What is another user's, or a mount, can't be moved: it stays there, and holds nobody up.
                with contextlib.suppress(OSError):
                    self._reject(raw)
                rejects += 1
                if rejects == _REJECTS_MAX:
                    break
        else:
            if count < _NAMES_MAX:
                self._names.close()
                self._names = None
        return sorted(items)[:room] if room > 0 else [], sorted(cancels)[:_CANCELS_MAX]

    def _is_plain(self, raw):
        try:
            return stat.S_ISREG(os.lstat(os.path.join(os.fsencode(self._queue.pending()), raw)).st_mode)
        except OSError:
            return False

    def _reject(self, raw):
        """Answer a name that no client makes here: it can't be sent to dom0, and must not hold up the others."""
        source = os.path.join(self._queue.pending(), os.fsdecode(raw))
        if not os.path.lexists(source):
            return
        if is_cid(raw):
            # What came with it belongs to no request now.
            self._forget(source + ".auth", source + ".in")
        if self._rejected >= _REJECTED_KEPT and not stat.S_ISDIR(os.lstat(source).st_mode):
            forget(source)
            return
        if not self._put_aside(source):
            return
        self._rejected += 1
        # Room for the dot, the suffix and the temporary name within the 255 bytes of a file name.
        if len(raw) <= 200:
            target = self._queue.results(os.fsdecode(raw))
            self._write(target + ".err", b"qvm-remote: refused: this file name is not a command id (YYYYMMDD-HHMMSS-PID-8HEX)\n")
            self._write(target + ".exit", b"125\n")

    def _put_aside(self, path):
        """Move away what is none of ours, whatever its rights; say whether it was still there."""
        target = self._rejected_folder() + os.urandom(8).hex()
        try:
            try:
                os.rename(path, target)
            except PermissionError:
                # Who moves a folder writes into it: its parent's name.
                make_ours(path)
                os.rename(path, target)
        except FileNotFoundError:
            return False
        return True

    def _rejected_folder(self):
        """The folder for what is none of ours, there and ours to write into."""
        folder = self._queue.rejected()
        path = folder.rstrip("/")
        try:
            make_ours(path)
            return folder
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            forget(path)
        except PermissionError:
            # It is another user's. Where it stays, it may be moved all the same.
            os.rename(path, f"{path}.{os.urandom(8).hex()}")
        os.mkdir(path, 0o700)
        return folder

    def _clear(self, path, is_kind=stat.S_ISREG):
        """Have nothing lie where a plain file of ours (or one of another kind) is to be opened, but that file."""
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            return
        if not _is_single(info, is_kind):
            self._put_aside(path)

    def _write(self, path, data):
        """Write a file, whatever lies there."""
        try:
            write_whole(path, data)
        except IsADirectoryError:
            self._put_aside(path)
            write_whole(path, data)

    def _rename(self, source, target):
        """Rename a file, whatever lies there."""
        try:
            os.rename(source, target)
        except IsADirectoryError:
            self._put_aside(target)
            os.rename(source, target)

    def _forget(self, *paths):
        for path in paths:
            try:
                forget(path)
            except IsADirectoryError:
                self._put_aside(path)

    def _size(self, name):
        """Size of a file of the queue, bytes; -1 when there is no plain one."""
        try:
            info = os.lstat(self._queue.pending(name))
        except FileNotFoundError:
            return -1
        return info.st_size if stat.S_ISREG(info.st_mode) else -1

    def _fetch(self, request, payload):
        suffix = {"command": "", "auth": ".auth", "in": ".in"}[request["part"]]
        path = self._queue.pending(_checked(request["id"]) + suffix)
        size = min(PAYLOAD_MAX, int(request["size"]))
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a plain file")
            return {}, os.pread(fd, size, int(request["offset"]))
        finally:
            os.close(fd)

    def _take(self, request, payload):
        cid = _checked(request["id"])
        # A folder that has come there since would be moved as well, or, without rights, not be moved.
        self._clear(self._queue.pending(cid))
        try:
            self._rename(self._queue.pending(cid), self._queue.running(cid))
        except FileNotFoundError:
            # Its client gave up in this moment; the marker stays true all the same.
            self._write(self._queue.running(cid), b"")
        return {}, b""

    def _put(self, request, payload):
        """Store a piece of a result; one that comes with a proof is also told to the client, which waits for it.

        dom0 sends a piece again if it did not see the answer: it must do no harm to store it twice.
        """
        cid, part, offset = _checked(request["id"]), request["part"], int(request["offset"])
        path = self._part(cid, part)
        fd = self._open(path, os.O_WRONLY)
        try:
            size = os.fstat(fd).st_size
            if size < offset:
                raise PullError("a part of a result is missing")
            os.lseek(fd, offset, os.SEEK_SET)
            # Written before what lies behind it is cut off: the client may be reading the same bytes.
            write_fully(fd, payload)
            if size > offset + len(payload):
                os.ftruncate(fd, offset + len(payload))
        except OSError:
            # The disk is full, most likely: half a piece is good for nothing, and would keep it so. One that was stored before stays.
            os.ftruncate(fd, max(offset, size))
            if max(offset, size) == 0:
                forget(path)
            raise
        finally:
            os.close(fd)
        if "mac" not in request:
            return {}, b""
        self._note_piece(cid, f"{int(request['seq'])} {part} {len(payload)} {request['mac']}\n".encode("ascii"))
        return ({} if knock(self._queue.bell(cid)) else {"gone": 1}), b""

    def _open(self, path, how):
        """Open a plain file of ours, and no other."""
        self._clear(path)
        how |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(path, how, 0o600)
        except PermissionError:
            # Somebody took the rights from it, or it is another user's.
            self._put_aside(path)
            fd = os.open(path, how, 0o600)
        # Whoever puts something there may have done so since.
        if not _is_single(os.fstat(fd), stat.S_ISREG):
            os.close(fd)
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        return fd

    def _note_piece(self, cid, line):
        fd = self._open(self._queue.stream(cid), os.O_WRONLY | os.O_APPEND)
        try:
            written = os.write(fd, line)
            if written < len(line):
                # The disk is full. Without its beginning, the same line can be written there again.
                os.ftruncate(fd, os.fstat(fd).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)

    def _result(self, request, payload):
        """Complete a result. dom0 says so again if it did not see the answer."""
        cid = _checked(request["id"])
        if not any(map(os.path.lexists, (self._queue.running(cid), self._queue.pending(cid)))):
            # The request is gone: all was done the first time, and the client may have taken it; or the client gave up.
            self._forget_request(cid)
            return {}, b""
        start = 0
        for part in ("out", "err", "meta"):
            size, path = int(request[part]), self._queue.results(f"{cid}.{part}")
            if request["inline"] or size == 0:
                self._write(path, payload[start : start + size])
                start += size
            elif os.path.lexists(self._part(cid, part)):
                _check_whole(self._part(cid, part), size)
                self._rename(self._part(cid, part), path)
            else:
                _check_whole(path, size)
        self._write(self._queue.results(f"{cid}.exit"), b"%d\n" % int(request["exit"]))
        self._forget_request(cid)
        if not knock(self._queue.bell(cid)):
            # Its client was killed, and can't take it away.
            forget(self._queue.bell(cid))
        return {}, b""

    def _drop(self, request, payload):
        self._forget_request(_checked(request["id"]))
        return {}, b""

    def _bye(self, request, payload):
        self._ended = True
        return {}, b""

    def _part(self, cid, part):
        if part not in ("out", "err", "meta"):
            raise PullError("no such part of a result")
        return self._queue.part(cid, part)

    def _forget_request(self, cid):
        self._forget(*(self._queue.pending(cid + suffix) for suffix in (*REQUEST_PARTS, ".cancel")), self._queue.running(cid))
        # Left where dom0's result is another than what it had streamed, or where the client gave up.
        self._forget(self._queue.stream(cid), *(self._queue.part(cid, part) for part in ("out", "err", "meta")))

    def _open_bell(self):
        self._hold_lock()
        if self._bell is not None:
            if _is_still(self._queue.doorbell, self._bell):
                return
            os.close(self._bell)
            self._bell = None
        self._clear(self._queue.doorbell, stat.S_ISFIFO)
        try:
            self._bell = self._open_fifo(self._queue.doorbell)
        except PermissionError:
            self._put_aside(self._queue.doorbell)
            self._bell = self._open_fifo(self._queue.doorbell)

    def _open_fifo(self, path):
        # Another session's does as well.
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # Opened for writing too: with no writer left a FIFO would read as closed for ever.
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _hold_lock(self):
        """Hold the lock by which clients see that there is a session; whoever took it away since has it for nobody."""
        if self._lock is not None and not _is_still(self._queue.agent_lock, self._lock):
            os.close(self._lock)
            self._lock = None
        if self._lock is None:
            self._lock = self._open(self._queue.agent_lock, os.O_RDWR)
        for _ in range(_LOCK_TRIES):
            if _lock(self._lock, fcntl.LOCK_SH):
                return
            # A client that looks whether it is free has it for a moment. While somebody keeps it, clients see a session all the same.
            time.sleep(0.01)

    def _hang_up(self):
        """Leave no doorbell behind that nobody hears, but don't take another session's."""
        try:
            if self._lock is not None and _is_still(self._queue.agent_lock, self._lock) and _lock(self._lock, fcntl.LOCK_EX):
                self._forget(self._queue.doorbell)
        except OSError:
            # Nobody is there to be told. The next session makes another one.
            pass
        for fd in (self._lock, self._bell):
            if fd is not None:
                os.close(fd)
        self._lock = self._bell = None

    def _tidy(self):
        """Remove results whose client is long gone, and what a broken session left half written."""
        now = time.time()
        for folder in (self._queue.results(), self._queue.pending(), self._queue.running(), self._queue.rejected().rstrip("/")):
            if os.path.islink(folder) or not os.path.isdir(folder):
                continue
            # One that can't be read, or written into, is made ours again when there is something to be put there.
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in itertools.islice(entries, _TIDIED_MAX):
                    self._tidy_one(folder, entry, now)

    def _tidy_one(self, folder, entry, now):
        try:
            age = now - entry.stat(follow_symlinks=False).st_mtime
        except FileNotFoundError:
            return
        half_written = entry.name.startswith(".") and age > 86400 and not self._runs(entry.name[1:])
        unfetched = folder != self._queue.pending() and age > _RESULTS_KEPT
        # Of a client that was killed just before it put its command there.
        alone = folder == self._queue.pending() and age > 86400 and self._is_alone(entry.name)
        if (half_written or unfetched or alone) and not entry.is_dir(follow_symlinks=False):
            forget(entry.path)

    def _is_alone(self, name):
        """Whether a name is that of a part of a request that lacks its command."""
        cid, dot, _ = name.partition(".")
        return bool(dot) and not any(map(os.path.lexists, (self._queue.pending(cid), self._queue.running(cid))))

    def _runs(self, name):
        """Whether a name begins with the id of a command that dom0 has: what that wrote long ago is still wanted."""
        cid = name.partition(".")[0]
        return bool(cid) and os.path.lexists(self._queue.running(cid))


def _is_single(info, is_kind):
    """Whether a file is of a kind, and has this one name: by another one it may be anything of this user's, the key for example."""
    return is_kind(info.st_mode) and info.st_nlink == 1


def _is_still(path, fd):
    """Whether a name still is that of an open file of ours, and the only one."""
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return os.path.samestat(info, os.fstat(fd)) and info.st_nlink == 1


def _lock(fd, how):
    """Lock a file if nobody else's lock is in the way; say whether it is locked."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_whole(path, size):
    info = os.lstat(path) if os.path.lexists(path) else None
    if info is None or not stat.S_ISREG(info.st_mode) or info.st_size != size:
        raise PullError("a part of a result is missing")


def _checked(cid):
    if not isinstance(cid, str) or not is_cid(cid.encode("utf-8", "surrogatepass")):
        raise PullError("not a command id")
    return cid
