# SPDX-License-Identifier: GPL-2.0-or-later
"""What was run: ``~/.qvm-remote/history``, a folder for each day (UTC) and in it one for each command.

qvm-remote 1.x kept the same files, with another ``meta``; what it kept is read as well, and never removed.
"""

import os
import stat
import time

from pullrpc.errors import PullError
from pullrpc.files import read_bounded
from pullrpc.ids import is_cid
from pullrpc.layout import RESULT_PARTS
from pullrpc.tokens import META_MAX, read_meta

from .part import Part
from .terminal import one_line, put, put_blocks, put_json

_KEEP_DAYS = 30
#: How our own ``meta`` begins; that of qvm-remote 1.x does not.
_OURS = b"mac "
_UNSIGNED = b"mac -\n"
_EXCERPT = 400
#: Longest output that is shown as JSON, for which it has to be held in memory, bytes.
_JSON_MAX = 64 << 20
#: Room for a command in a table that goes to no terminal, characters.
_COMMAND_WIDTH = 200
_COLUMNS = 50
#: From here on a number is none that we wrote.
_NUMBER_END = 1e9

FITS, DIFFERS, NONE = "fits", "differs", "none"
_PROOFS = {
    FITS: "fits: this is what dom0 sent",
    DIFFERS: "does not fit: changed since, or made under another key than this qube has now",
    NONE: "none: a refusal that dom0 did not sign, or kept by qvm-remote 1.x",
}


def print_list(queue, count, as_json):
    """The command ``history``.

    Args:
        queue: Queue.
        count: int, at most so many.
        as_json: bool.
    """
    found = last(queue, count)
    if as_json:
        put_json(found)
        return
    width = max(20, (os.get_terminal_size(1).columns or 80) - _COLUMNS) if os.isatty(1) else _COMMAND_WIDTH
    if found:
        put(f"{'ID':<34} {'EXIT':>4} {'SECONDS':>8}  COMMAND\n")
    for one in found:
        seconds = "-" if one["seconds"] is None else f"{one['seconds']:.2f}"
        exit_code = "-" if one["exit"] is None else one["exit"]
        put(f"{one_line(os.fsencode(one['id']), 34):<34} {exit_code:>4} {seconds:>8}  {one_line(one['command'].encode('utf-8'), width)}\n")


def print_one(queue, values):
    """The command ``history show``.

    Args:
        queue: Queue.
        values: dict, what was given on the command line.

    Raises:
        PullError: there is no such command, or more than one.
    """
    if sum(name in values for name in ("command", "out", "err", "json")) > 1:
        raise PullError("--command, --out, --err and --json exclude each other; see: qvm-remote history show --help")
    cid, files = find(queue, values.get("ID"))
    for part in ("command", "out", "err"):
        if part in values:
            put_blocks(Part(files[part]).unproven())
            return
    shown = describe(cid, files)
    shown["proof"] = _proof(queue, cid, files)
    texts = {"command": "command", "stdout": "out", "stderr": "err"}
    if "json" in values:
        put_json({**shown, **{name: _held(cid, name, files[part]) for name, part in texts.items()}})
        return
    took = "" if shown["seconds"] is None else f", {shown['seconds']:.3f} s"
    put(f"id:       {one_line(os.fsencode(cid), 80)}\ntime:     {shown['time'] or 'not known'}\n")
    put(f"ended:    exit code {shown['exit']}, {shown['status']}{took}\nproof:    {_PROOFS[shown['proof']]}\n")
    for name, part in texts.items():
        _put_part(name, Part(files[part]))


def _put_part(name, part):
    last = b""

    def blocks():
        nonlocal last
        for block in part.unproven():
            last = block
            yield block

    put(f"{name + ':':<9} {part.size} bytes\n")
    put_blocks(blocks())
    if last and not last.endswith(b"\n"):
        put("\n")


def _held(cid, name, path):
    part = Part(path)
    if part.size > _JSON_MAX:
        raise PullError(f"what {one_line(os.fsencode(cid), 80)} wrote to {name} is too long for --json; see: qvm-remote history show --help")
    return b"".join(part.unproven()).decode("utf-8", "replace")


def last(queue, count):
    """The last commands.

    Args:
        queue: Queue.
        count: int, at most so many.

    Returns:
        list of dict, see :func:`describe`; the newest first.
    """
    found = []
    for cid, files in _entries(queue):
        if len(found) >= count:
            break
        found.append(describe(cid, files))
    return found


def find(queue, wanted):
    """Look a command up.

    Args:
        queue: Queue.
        wanted: str, its id or how that ends; None for the last one.

    Returns:
        (str, dict): its id, and the path of each of its files, whether or not that exists.

    Raises:
        PullError: there is none, or there are several.
    """
    found = {}
    for cid, files in _entries(queue):
        if wanted is None or cid == wanted:
            return cid, files
        if len(wanted) >= 8 and cid.endswith(wanted):
            found.setdefault(cid, files)
    unfetched = None if wanted is None else _unfetched(queue, wanted)
    if unfetched:
        return unfetched
    if len(found) == 1:
        return next(iter(found.items()))
    if wanted is None:
        raise PullError("there is no command in the history yet")
    shown = one_line(os.fsencode(wanted), 64)
    if found:
        raise PullError(f"the ids of several commands end with {shown}; see: qvm-remote history 100")
    raise PullError(f"there is no command with the id {shown} in the history; see: qvm-remote history 100")


def describe(cid, files):
    """Say what is known of a command.

    Args:
        cid: str.
        files: dict, as from :func:`find`.

    Returns:
        dict: ``id``, ``time``, ``command`` (its beginning), ``exit`` (int or None), ``status``, ``seconds`` (float or None),
        ``stdout_bytes``, ``stderr_bytes``.
    """
    meta = _read_small(files["meta"], META_MAX)
    is_ours = meta.startswith(_OURS)
    fields = dict(line.partition(" " if is_ours else "=")[::2] for line in meta.decode("utf-8", "replace").splitlines())
    seconds = _number(fields.get("seconds")) if is_ours else _number(fields.get("duration_ms"))
    if seconds is not None and not is_ours:
        seconds /= 1000
    exit_code = _number(_read_small(files["exit"], 8).decode("ascii", "replace"))
    return {
        "id": cid,
        "time": _time(cid, is_ours),
        "command": _read_small(files["command"], _EXCERPT, cut=True).decode("utf-8", "replace"),
        "exit": None if exit_code is None else int(exit_code),
        "status": _word(fields.get("status", "refused" if is_ours else "done")),
        "seconds": seconds,
        "stdout_bytes": _size(files["out"]),
        "stderr_bytes": _size(files["err"]),
    }


def drop_old_days(history):
    """Remove commands of ours that are older than a history is kept.

    Args:
        history: str, its folder.

    Raises:
        OSError: the folder can't be read.
    """
    import shutil

    oldest = time.strftime("%Y-%m-%d", time.gmtime(time.time() - _KEEP_DAYS * 86400))
    for day in os.listdir(history):
        if not _is_day(day) or day >= oldest:
            continue
        folder = os.path.join(history, day)
        for name in names_in(folder):
            # What has no meta of ours may be all that a user of qvm-remote 1.x has of it.
            if _read_small(os.path.join(folder, name, "meta"), META_MAX).startswith(_OURS):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
        if not names_in(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _entries(queue):
    """All commands, the newest first."""
    for day in sorted(filter(_is_day, names_in(queue.history)), reverse=True):
        folder = os.path.join(queue.history, day)
        for cid in sorted(names_in(folder), reverse=True):
            if os.path.isdir(os.path.join(folder, cid)):
                yield cid, {part: os.path.join(folder, cid, part) for part in ("command", *(part[1:] for part in RESULT_PARTS))}


def _unfetched(queue, cid):
    """A result that could not be moved into the history."""
    if not is_cid(os.fsencode(cid)) or not os.path.exists(queue.results(f"{cid}.exit")):
        return None
    return cid, {part: queue.results(f"{cid}.{part}") for part in ("command", *(part[1:] for part in RESULT_PARTS))}


def _proof(queue, cid, files):
    from .request import load_key

    meta = _read_small(files["meta"], META_MAX)
    if not meta.startswith(_OURS) or meta.startswith(_UNSIGNED):
        return NONE
    try:
        fields, authentic = read_meta(load_key(queue), cid, Part(files["out"]).digest(), Part(files["err"]).digest(), meta)
    except (OSError, PullError):
        return DIFFERS
    is_whole = fields.get("id") == cid and fields.get("exit") == _read_small(files["exit"], 8).decode("ascii", "replace").strip()
    return FITS if authentic and is_whole else DIFFERS


def names_in(folder):
    """The names in a folder.

    Args:
        folder: str.

    Returns:
        list of str; empty when there is no such folder.

    Raises:
        OSError: it can't be read.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_day(name):
    return len(name) == 10 and name[4] == name[7] == "-" and (name[:4] + name[5:7] + name[8:]).isdigit()


def _read_small(path, limit, cut=False):
    """The content of a small file; empty when it can't be read, or is longer (unless it is to be cut)."""
    try:
        if not cut:
            return read_bounded(path, limit)
        # Other programs of this user may have put a FIFO there, or a device.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(fd, limit) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        finally:
            os.close(fd)
    except (OSError, PullError):
        return b""


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _number(text):
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    # Whatever else stands in a file can't be counted with, or shown in a column; nan is neither more nor less than anything.
    return number if abs(number) < _NUMBER_END else None


def _word(text):
    return one_line(text.encode("utf-8"), 20)


def _time(cid, is_ours):
    """When it was asked for, by its id: UTC; the clock of the qube with qvm-remote 1.x."""
    if not is_cid(os.fsencode(cid)):
        return None
    return f"{cid[:4]}-{cid[4:6]}-{cid[6:8]}T{cid[9:11]}:{cid[11:13]}:{cid[13:15]}{'Z' if is_ours else ''}"
