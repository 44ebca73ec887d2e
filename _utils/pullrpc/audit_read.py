# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading the audit log: is it whole, and what does it say of a VM, a time, an outcome. Changes nothing.

Read from file to file, line by line, however long they are. Whoever reads a log wants to know what an attacker did to it, too:
nothing in it is believed before it is checked, and what is given back can be shown on a terminal.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import fcntl
import gzip
import hashlib
import os
import re
import zlib

from .audit_files import LET_GO, commands_folder, rotated
from .chain import LINE_MAX, START, boot_id, head_path, is_lost_by_power_cut, is_number, read_line, unpack_head
from .commands import list_kept
from .errors import AuditError, PullError
from .outcomes import check_outcome

#: Most problems that are told in full.
_PROBLEMS_MAX = 50
#: Most commands whose end is looked for at the same time.
_OPEN_MAX = 10000
#: How often the list of files is made anew because a file was rotated meanwhile.
_TRIES = 20
_AGO = re.compile(r"([0-9]{1,6})([smhdw])\Z")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_CHUNK = 1 << 20
#: How an ended line's word for it goes on in a history; what it is before that.
_ACCEPTED, _RUNNING, _REFUSED = "accepted", "running", "refused"
#: What lines have of a command.
_ABOUT = ("command", "size", "sha256")


def verify(path, files_max):
    """Look for whatever was removed, changed, added or moved in an audit log, in files that were rotated away as well.

    Args:
        path: str, the audit log.
        files_max: int, how many old files are kept.

    Returns:
        dict: ``files`` (names, oldest first), ``lines`` (int), ``first`` and ``last`` (their numbers; None without lines),
        ``commands`` (whole commands that were compared with their digests), ``problems`` (sentences; empty when all is well), and
        ``notes`` (sentences on what a crash or power cut did).

    Raises:
        AuditError: it can't be read.
    """
    with _opened(path) as (files, head):
        check = _Check(path, head)
        for file in files:
            check.begin(file.name)
            for raw, is_whole in file.lines():
                check.take(raw, is_whole)
            check.end(file.problem)
        check.finish(bool(files) and files[-1].path == path and check.lines_in_file > 0, files_max)
    check.look_at_commands()
    problems = check.problems[:_PROBLEMS_MAX]
    if len(check.problems) > _PROBLEMS_MAX:
        problems.append(f"and {len(check.problems) - _PROBLEMS_MAX} more")
    return {
        "files": [file.name for file in files],
        "lines": check.lines,
        "first": check.first,
        "last": check.last[0] if check.lines else None,
        "commands": check.compared,
        "problems": problems,
        "notes": check.notes[:_PROBLEMS_MAX],
    }


def query(path, vm=None, since=None, until=None, what=None, limit=100):
    """List lines of an audit log.

    Args:
        path: str, the audit log.
        vm: str; None for all.
        since, until: str, see :func:`moment`; None for no bound.
        what: str, the word for what happened; None for all.
        limit: int, most lines; the newest ones are listed.

    Returns:
        list of dict, oldest first. Text in them can be shown on a terminal.

    Raises:
        PullError: an argument can't be; AuditError: the log can't be read.
    """
    since, until = moment(since), moment(until)
    found = collections.deque(maxlen=_checked_limit(limit))
    for line in _lines(path):
        if (vm and line.get("vm") != vm) or (what and line.get("what") != what) or not _is_within(line, since, until):
            continue
        found.append({name: value for name, value in line.items() if name not in ("prev", "log")})
    return [shown(line) for line in found]


def history(path, vm=None, since=None, until=None, outcome=None, limit=20):
    """List commands, one row for each.

    Args:
        path: str, the audit log.
        vm: str; None for all.
        since, until: str, see :func:`moment`; None for no bound.
        outcome: str: ``accepted``, ``running``, ``refused``, a status (``done``, ``timeout``, ``cancelled``, ``interrupted``,
            ``failed``), or an exit code; None for all.
        limit: int, most rows; the newest ones are listed.

    Returns:
        list of dict, oldest first: ``time``, ``vm``, ``id``, ``outcome``, and what is known of ``command`` (its beginning),
        ``size``, ``sha256``, ``by`` (who decided), ``as`` (dom0's user that ran it), ``exit``, ``seconds``, ``out``,
        ``err`` (bytes), ``code`` and ``reason`` (of a refusal).

    Raises:
        PullError: an argument can't be; AuditError: the log can't be read.
    """
    since, until = moment(since), moment(until)
    check_outcome(outcome)
    ended = collections.deque(maxlen=_checked_limit(limit))
    begun = {}

    def fits(row):
        return outcome is None or str(outcome) in (row["outcome"], str(row.get("exit")))

    for line in _lines(path):
        what, name = line.get("what"), (line.get("vm"), line.get("id"))
        if (vm and name[0] != vm) or not all(isinstance(word, str) for word in name):
            continue
        if what == "accepted":
            begun[name] = {**_row(line, _ACCEPTED), **{word: line[word] for word in (*_ABOUT, "whole", "by", "form") if word in line}}
            if len(begun) > _OPEN_MAX:
                del begun[next(iter(begun))]
        elif what == "run" and name in begun:
            # Here the rule has the user's answer with it.
            begun[name].update({"outcome": _RUNNING, **{word: line[word] for word in ("as", "by") if word in line}})
        elif what in ("ended", "refused"):
            # A qube may show the id of a command that runs once more: that is refused, and the command goes on.
            is_own = what == "ended" or line.get("claimed") is False
            row = (begun.pop(name, None) if is_own else None) or {**_row(line, _REFUSED), **{word: line[word] for word in _ABOUT if word in line}}
            row.update({word: line[word] for word in ("exit", "seconds", "out", "err", "signal", "code", "reason") if word in line})
            row["outcome"] = str(line.get("status", _REFUSED))
            if _is_within(row, since, until) and fits(row):
                ended.append(row)
    rows = [*ended, *(row for row in begun.values() if _is_within(row, since, until) and fits(row))]
    return [shown(row) for row in sorted(rows, key=lambda row: str(row["time"]))[-ended.maxlen :]]


def moment(text):
    """Read a time.

    Args:
        text: str, for example ``2026-11-24``, ``2026-11-24T18:00``, ``2026-11-24T18:00:00+01:00`` (without a zone it is UTC), or how
            long ago it is: ``90s``, ``15m``, ``2h``, ``7d``, ``4w``; None.

    Returns:
        str that compares with the times of an audit log's lines; None for None.

    Raises:
        PullError: this is none.
    """
    if text is None:
        return None
    ago = _AGO.match(str(text))
    try:
        if ago:
            found = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=int(ago[1]) * _UNITS[ago[2]])
        else:
            found = datetime.datetime.fromisoformat(re.sub(r"[Zz]\Z", "+00:00", str(text)))
            found = found if found.tzinfo else found.replace(tzinfo=datetime.timezone.utc)
        return found.astimezone(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    except (ValueError, OverflowError):
        raise PullError("a time looks like 2026-11-24, 2026-11-24T18:00:00Z, or 15m, 2h, 7d for so long ago") from None


def open_log(path):
    """Open a file of a log as it is: no link, and no FIFO that one would wait for.

    Args:
        path: str.

    Returns:
        int, a descriptor.

    Raises:
        OSError: it can't be opened.
    """
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def unreadable(path, err):
    """Say that a log can't be read.

    Args:
        path: str.
        err: OSError.

    Returns:
        AuditError
    """
    return AuditError(f"the audit log {path} can't be read: {err.strerror}")


class _File:
    """A file of the log, as it was when it was opened."""

    def __init__(self, path):
        self.path = path
        self.name = os.path.basename(path)
        self.problem = None
        fd = open_log(path)
        self._file = os.fdopen(fd, "rb")
        info = os.fstat(fd)
        self.place = info.st_dev, info.st_ino
        self._left = info.st_size

    def close(self):
        self._file.close()

    def first(self):
        """The number of the first line; files without one come last."""
        found = next((line["seq"] for line in map(read_line, (raw for raw, _ in self.lines())) if line), None)
        self._file.seek(0)
        self.problem = None
        return float("inf") if found is None else found

    def lines(self):
        """What it holds: (bytes without the newline, whether there was one); what is too long for a line comes in parts."""
        packed = self.path.endswith(".gz")
        source, left = (gzip.GzipFile(fileobj=self._file), None) if packed else (self._file, self._left)
        try:
            while left is None or left > 0:
                raw = source.readline(LINE_MAX if left is None else min(LINE_MAX, left))
                if not raw:
                    return
                left = None if left is None else left - len(raw)
                yield raw.removesuffix(b"\n"), raw.endswith(b"\n")
        except (OSError, EOFError, zlib.error) as err:
            self.problem = f"{self.name} can't be read to its end: {err}"


@contextlib.contextmanager
def _opened(path):
    """All files of a log, oldest first, and its head, as they were at one moment."""
    files = []
    try:
        with _held(head_path(path)) as head:
            for _ in range(_TRIES):
                files, changed = _open_all(path, files)
                if not changed:
                    break
        yield sorted(files, key=lambda file: (file.first(), file.path == path)), head
    except OSError as err:
        raise unreadable(path, err) from err
    finally:
        for file in files:
            file.close()


def _open_all(path, before):
    for file in before:
        file.close()
    files = []
    if os.path.isdir(os.path.dirname(path)):
        for one in (*rotated(path), path):
            # logrotate may rename or compress it at this moment; then it is found anew.
            with contextlib.suppress(FileNotFoundError):
                files.append(_File(one))
    return files, [(file.path, file.place) for file in files] != [(file.path, file.place) for file in before]


@contextlib.contextmanager
def _held(path):
    """The head of a chain, while nobody writes to it; None when it isn't there or is none."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        yield None
        return
    with file:
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        yield unpack_head(file.read(LINE_MAX))


class _Check:
    """What is found while the lines pass by."""

    def __init__(self, path, head):
        self._head = head
        self._path = path
        self.problems, self.notes = [], []
        self.lines = self.lines_in_file = self.compared = 0
        self.first = None
        self.last = (0, START)
        self._number = self._first_number = self._left = None
        self._oldest = 1
        self._whole, self._let_go = {}, set()
        self._name, self._garbage, self._bad = "", None, False

    def begin(self, name):
        """A file begins."""
        self._name, self.lines_in_file, self._garbage = name, 0, None

    def take(self, raw, is_whole):
        """A line passes by."""
        line = read_line(raw) if self._garbage is None or self._garbage.at_start else None
        if line is None or not (is_whole or self._follows(line)):
            self._garbage = self._garbage or _Garbage()
            self._garbage.add(raw, is_whole)
            return
        self._check(line, hashlib.sha256(raw).hexdigest())

    def _follows(self, line):
        return (line["seq"], line["prev"]) == (self.last[0] + 1, self.last[1])

    def _check(self, line, digest):
        found = line.get("log") if isinstance(line.get("log"), dict) else {}
        self._check_garbage(found.get("torn"))
        self._check_place(line, found)
        self._check_order(line)
        seq = line["seq"]
        if self._head and seq == self._head.seq and digest != self._head.digest:
            self._problem(f"line {seq} was changed: its head knows it with another digest")
        if "headless" in found:
            self._problem(f"the head was missing when line {seq} was written: lines before it may be missing")
        if "ahead" in found:
            self._note_ahead(_count(found["ahead"]), seq)
        if "lost" in found:
            self.notes.append(f"a power cut came before line {seq}: up to {_count(found['lost'])} lines before it had not reached the disk")
        if line.get("whole") is False:
            self._whole[str(line.get("vm")), str(line.get("id"))] = line.get("sha256")
        elif line.get("what") == LET_GO:
            self._let_go.add((str(line.get("vm")), str(line.get("id"))))
        self.first = seq if self.first is None else self.first
        self.last = seq, digest
        self.lines += 1
        self.lines_in_file += 1

    def _check_garbage(self, torn):
        garbage, self._garbage = self._garbage, None
        if garbage is None:
            if torn is not None:
                self._problem(f"what a crash left after line {self.last[0]} is gone")
        elif torn == garbage.digest():
            self.notes.append(f"{self._name}: a crash broke off the writing after line {self.last[0]}; what it left was closed off")
        else:
            self._problem(f"what follows line {self.last[0]} is no line: it was changed, or put there")

    def _check_place(self, line, found):
        seq, number, keep = line["seq"], found.get("file"), found.get("keep")
        starts_file = is_number(number) and is_number(keep)
        if self.lines_in_file == 0 and not starts_file:
            self._problem(f"the beginning of the file is missing: line {seq} is not the first line of a file")
        elif self.lines_in_file and starts_file:
            self._problem(f"line {seq} is the first line of a file, but stands in the middle of one")
        if self._left not in (None, found.get("older")):
            self._problem(f"what follows line {self.last[0]} in the file before is no line: it was changed, or put there")
        self._left = None
        if starts_file:
            self._number = number
            self._first_number = number if self._first_number is None else self._first_number
            # Those that were to be kept when this one was begun.
            self._oldest = max(self._oldest, number - keep)

    def _check_order(self, line):
        seq = line["seq"]
        if self.first is None:
            if self._number in (None, 1) and (seq, line["prev"]) != (1, START):
                self._problem(f"line {seq} is not the first one of this log")
        elif seq > self.last[0] + 1:
            self._problem(f"{_range(self.last[0] + 1, seq - 1)} missing")
        elif seq <= self.last[0]:
            self._problem(f"line {seq} stands after line {self.last[0]}: it was moved, added or repeated")
        elif line["prev"] != self.last[1]:
            self._problem(f"line {self.last[0]} was changed, or another line {seq} was put in its place")

    def _problem(self, text):
        self.problems.append(f"{self._name}: {text}" if self._name else text)

    def end(self, problem):
        """A file ends."""
        if problem:
            self.problems.append(problem)
        if self._garbage is not None:
            self._left, self._garbage = self._garbage.digest(whole=True), None

    def finish(self, has_current, files_max):
        """All files have passed by."""
        if self._left is not None:
            self.notes.append(f"{self._name}: what follows line {self.last[0]} is no whole line, as after a crash; the next write closes it off")
        head, self._name = self._head, ""
        if head is None:
            if self.lines or os.path.lexists(head_path(self._path)):
                self._problem("the log's head is missing or none: lines at the end may be missing")
        elif self.last[0] > head.seq:
            self._note_ahead(self.last[0] - head.seq, self.last[0] + 1)
        elif self.last[0] < head.seq:
            gap = _range(self.last[0] + 1, head.seq)
            if is_lost_by_power_cut(head, self.last[0], boot_id()):
                self.notes.append(f"{gap} missing at the end; they had not reached the disk when the power was cut, as far as is known")
            else:
                self._problem(f"{gap} missing at the end")
        self._check_first_file(has_current, files_max)

    def _note_ahead(self, count, seq):
        self.notes.append(f"the last {count} lines before line {seq} are not known to the head, as when a process is killed while it writes")

    def _check_first_file(self, has_current, files_max):
        if self._first_number is None:
            return
        # Without a line in the file that is written now, that one is not counted by any line.
        oldest = self._oldest if has_current else max(self._oldest, self._number + 1 - files_max)
        if self._first_number > oldest:
            count = self._first_number - oldest
            self._problem(f"the oldest {'file is' if count == 1 else f'{count} files are'} missing (before line {self.first})")

    def look_at_commands(self):
        """Compare the whole commands that are kept with their digests in the log."""
        folder = commands_folder(self._path)
        kept, missing = {path for _, _, path in list_kept(folder)}, []
        for (vm, cid), digest in self._whole.items():
            path = os.path.join(folder, vm, cid)
            if path in kept:
                self.compared += 1
                if _digest(path) != digest:
                    self.problems.append(f"the whole command {_safe(cid)} of {_safe(vm)} was changed")
            elif (vm, cid) not in self._let_go:
                missing.append((vm, cid))
        if missing:
            # Some may have gone since the log was read.
            gone = {(str(line.get("vm")), str(line.get("id"))) for line in _lines(self._path) if line.get("what") == LET_GO}
            self.problems += [f"the whole command {_safe(cid)} of {_safe(vm)} is missing" for vm, cid in missing if (vm, cid) not in gone]


class _Garbage:
    """Bytes that are no line, and their digest without the newline by which they were closed off."""

    def __init__(self):
        self._digest = hashlib.sha256()
        self._pending = b""
        self.at_start = True

    def add(self, raw, is_whole):
        self._digest.update(self._pending + raw)
        self._pending = b"\n" if is_whole else b""
        self.at_start = is_whole

    def digest(self, whole=False):
        if whole:
            self._digest.update(self._pending)
        return self._digest.hexdigest()


def _lines(path):
    with _opened(path) as (files, _):
        for file in files:
            for raw, _ in file.lines():
                line = read_line(raw)
                if line:
                    yield line


def _row(line, outcome):
    return {"time": line.get("time", ""), "vm": line["vm"], "id": line["id"], "outcome": outcome}


def _is_within(line, since, until):
    at = line.get("time")
    # Without the fraction of the second: a bound has none, and holds for all of it.
    return isinstance(at, str) and (since is None or at[:19] >= since) and (until is None or at[:19] <= until)


def _checked_limit(limit):
    if type(limit) is not int or not 1 <= limit <= 1000000:
        raise PullError("limit must be a number, 1 to 1000000")
    return limit


def _count(value):
    """A number from a line, to be told."""
    return value if is_number(value) else "an unknown number of"


def _range(first, last):
    return f"line {first} is" if first == last else f"lines {first} to {last} are"


def _digest(path):
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_log(path), "rb") as file:
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def shown(data):
    """Make data fit to be shown.

    Args:
        data: JSON data.

    Returns:
        the same in printable ASCII: nothing in it does something on a terminal, is invisible, or looks like another character.
    """
    if isinstance(data, str):
        return _safe(data)
    if isinstance(data, dict):
        return {_safe(str(name)): shown(value) for name, value in data.items()}
    if isinstance(data, list):
        return [shown(value) for value in data]
    return data


def _safe(text):
    return text.encode("unicode_escape").decode("ascii")
