# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``queue``: what lies in the queue, for whom, and what can be put away because nobody waits for it.

A client that waits has its bell open (a FIFO, ``results/<cid>.bell``): what has no such bell was left by one that was killed.
"""

import os
import stat
import time

from pullrpc import __version__
from pullrpc.errors import PullError, Refused
from pullrpc.files import forget, make_ours, move, write_whole
from pullrpc.ids import cid_time, is_cid
from pullrpc.layout import RESULT_PARTS

from . import journal
from .history import names_in
from .request import connected, limits, load_key, take_back, vm_name
from .terminal import one_line, put, put_json

PENDING, RUNNING, RESULT = "pending", "running", "result"
_EXCERPT = 80
#: What was written lately under a name that is no id may be waited for by hand, seconds.
_SETTLED = 60
#: By how much a process may seem to be younger than an id that it has made, seconds: ids count whole ones.
_TICK = 2


def run(queue, action, values, quiet):
    """The command.

    Args:
        queue: Queue.
        action: str.
        values: dict, what was given on the command line.
        quiet: bool, print no notes.

    Returns:
        int, the exit code.

    Raises:
        PullError: the queue can't be used.
    """
    if action in ("make", "clean"):
        from .main import prepare

        prepare(queue, quiet)
    if action == "check":
        return _check(queue)
    if action == "status":
        _print_status(queue, "json" in values)
    elif action == "clean":
        _clean(queue)
    elif action == "debug":
        _debug(queue)
    return 0


def requests_in(queue):
    """List what is on its way.

    Args:
        queue: Queue.

    Returns:
        list of dict: ``id``, ``state`` (pending, running or result), ``client`` (bool, whether somebody waits for it), ``seconds``
        (int, how long it has been so), ``command`` (its beginning; empty when it is not known here any more).
    """
    found = {}
    for state, folder, suffix in ((PENDING, queue.pending, ""), (RUNNING, queue.running, ""), (RESULT, queue.results, ".exit")):
        for name in names_in(folder()):
            cid = name[: len(name) - len(suffix)] if name.endswith(suffix) else name
            if cid + suffix == name and is_cid(os.fsencode(cid)):
                path = folder(name)
                found[cid] = {"id": cid, "state": state, "client": has_client(queue, cid), "seconds": _age(path), "command": _beginning(path, state)}
    return [found[cid] for cid in sorted(found)]


def has_client(queue, cid):
    """Whether a client waits for a command.

    Args:
        queue: Queue.
        cid: str.

    Returns:
        bool
    """
    try:
        os.close(os.open(queue.bell(cid), os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _check(queue):
    # That there is no key yet is the key's matter, not the queue's.
    problems = [problem for problem in queue.problems() if problem != "key-missing"]
    put("".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


def _print_status(queue, as_json):
    found = requests_in(queue)
    if as_json:
        put_json(found)
        return
    count = {state: sum(one["state"] == state for one in found) for state in (PENDING, RUNNING, RESULT)}
    put(f"pending:  {count[PENDING]}, not taken by dom0 yet\nrunning:  {count[RUNNING]}, in dom0\nresults:  {count[RESULT]}, not fetched\n")
    for one in found:
        client = "a client waits" if one["client"] else "its client is gone"
        put(f"{one['id']:<34} {one['state']:<7} {one['seconds']:>6} s  {client}  {one['command']}\n")
    if not all(one["client"] for one in found):
        put("what clients left that are gone is put away by: qvm-remote queue clean\n")


def _clean(queue):
    taken_back = moved = 0
    commands = None
    for one in requests_in(queue):
        # Asked again: it may have ended, or been fetched, since.
        if has_client(queue, one["id"]):
            continue
        if one["state"] == RESULT:
            commands = journal.commands(queue) if commands is None else commands
            moved += _move_to_history(queue, one["id"], commands.get(os.fsencode(one["id"])))
        else:
            taken_back += 1
            take_back(queue, one["id"])
            for path in (queue.pending(one["id"]), queue.running(one["id"])):
                if not _remove(path):
                    _put_aside(queue, path)
            journal.ended(queue, one["id"], 125, "cleaned")
    removed = [path for path in _strays(queue) if _remove(path)]
    if not (taken_back or moved or removed):
        put("nothing was left\n")
        return
    put(f"{taken_back} taken back or cancelled, {moved} results moved to the history, {len(removed)} other files removed\n")


def _move_to_history(queue, cid, command):
    """Have an unfetched result found where fetched ones are."""
    folder = os.path.join(queue.history, f"{cid[:4]}-{cid[4:6]}-{cid[6:8]}", cid)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # Only its client had all of it.
        path = os.path.join(folder, "command")
        if command and not os.path.lexists(path):
            write_whole(path, command)
        # The exit code last: while it lies here, this can be done again.
        for part in RESULT_PARTS:
            path = queue.results(cid + part)
            if os.path.isdir(path) and not os.path.islink(path):
                _put_aside(queue, path)
            elif os.path.exists(path):
                move(path, os.path.join(folder, part[1:]))
    except OSError as err:
        raise PullError(f"can't move the result of {cid} to {folder}: {err.strerror}") from err
    return 1


def _put_aside(queue, folder):
    """Move a folder, which no client and no agent makes there, to where the agent puts what is none of ours; leave it where it can't be moved."""
    rejected = queue.rejected()
    try:
        if not os.path.islink(rejected.rstrip("/")):
            os.makedirs(rejected, mode=0o700, exist_ok=True)
            make_ours(folder)
            os.rename(folder, queue.rejected(os.urandom(8).hex()))
    except OSError:
        return


def _strays(queue):
    """Files that belong to no request that somebody waits for, nor to one that dom0 still has."""
    known = {one["id"] for one in requests_in(queue)}
    for name in names_in(queue.rejected()):
        yield queue.rejected(name)
    for name in names_in(queue.pending()):
        cid, _, rest = name.lstrip(".").partition(".")
        is_loose = rest in ("auth", "in") and is_cid(os.fsencode(cid)) and cid not in known and not has_client(queue, cid)
        # Until stdin is read, its client has no bell.
        if (is_loose and not _client_lives(cid)) or _is_half_written(queue.pending(name)):
            yield queue.pending(name)
    for name in names_in(queue.results()):
        if name.startswith("."):
            # Output of a command that runs: dom0 puts that away, or the agent after a day.
            continue
        cid, _, rest = name.partition(".")
        if not is_cid(os.fsencode(cid)):
            if _age(queue.results(name)) > _SETTLED:
                yield queue.results(name)
        elif rest == "bell" and not has_client(queue, cid) and not _client_lives(cid):
            yield queue.results(name)


def _is_half_written(path):
    """Whether somebody was killed who wrote a file of a request (see pullrpc.files.write_whole)."""
    words = os.path.basename(path).split(".")
    if len(words) not in (4, 5) or words[0] or not is_cid(os.fsencode(words[1])) or not (words[-2].isascii() and words[-2].isdigit()):
        return False
    try:
        return not _is_alive(words[-2], os.lstat(path).st_mtime)
    except FileNotFoundError:
        return False


def _client_lives(cid):
    try:
        return _is_alive(cid.split("-")[2], cid_time(cid))
    except Refused:
        # No client makes an id of a time that there is not.
        return False


def _is_alive(number, since):
    """Whether there is a process of some number that is as old as what it made; another one has got that number since."""
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            # proc(5): the 22nd word, counted behind the program's name, which may hold anything.
            ticks = int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return False
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age < since + _TICK


def _remove(path):
    try:
        forget(path)
    except OSError:
        # A folder, which no client and no agent makes there: left to whoever made it.
        return False
    return True


def _debug(queue):
    put(f"qvm-remote {__version__}, qube {vm_name()}, user {os.geteuid()}, folder {queue.base}\n")
    try:
        from pullrpc.tokens import fingerprint

        put(f"key: {fingerprint(load_key(queue))}\n")
    except PullError as err:
        put(f"key: {err}\n")
    put(f"problems: {', '.join(queue.problems()) or 'none'}\n")
    put(f"dom0: {'connected' if connected(queue) else 'not connected'}; limits: {', '.join(f'{name} {value}' for name, value in sorted(limits(queue).items()))}\n")
    try:
        disk = os.statvfs(queue.base)
        put(f"disk: {disk.f_bavail * disk.f_frsize >> 20} MiB and {disk.f_favail} files left\n")
    except OSError as err:
        put(f"disk: {err.strerror}\n")
    for title, folder in (("", lambda name: os.path.join(queue.base, name)), ("queue/pending", queue.pending), ("queue/running", queue.running)):
        _list(title, folder)
    _list("queue/results", queue.results)
    _list("queue/rejected", queue.rejected)


def _list(title, folder):
    names = sorted(names_in(folder("")))
    put(f"\n{title or '.'}/ ({len(names)} names)\n")
    for name in names:
        try:
            info = os.lstat(folder(name))
        except OSError as err:
            put(f"  {one_line(os.fsencode(name), 60)}: {err.strerror}\n")
            continue
        # Commands only: of the rest, tokens are nobody's business, and output may be large.
        text = _beginning(folder(name), PENDING) if title == "queue/pending" and is_cid(os.fsencode(name)) else ""
        shown = f"{stat.filemode(info.st_mode)} {info.st_size:>9} bytes {_age(folder(name)):>8} s  {one_line(os.fsencode(name), 60)}"
        put(f"  {shown}{'  ' + text if text else ''}\n")


def _age(path):
    try:
        return max(0, int(time.time() - os.lstat(path).st_mtime))
    except OSError:
        return 0


def _beginning(path, state):
    """The beginning of a command. A result has none here, nor has the marker of a command that was sent to dom0 at once."""
    if state == RESULT:
        return ""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return one_line(os.read(fd, _EXCERPT * 4), _EXCERPT) if stat.S_ISREG(os.fstat(fd).st_mode) else ""
    finally:
        os.close(fd)
