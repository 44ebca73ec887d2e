# SPDX-License-Identifier: GPL-2.0-or-later
"""One request: sign it, put it into the queue, wait for dom0's answer, check it.

Whatever happens, a submitted request ends in its result or in a NoResult that says why there is none;
a request that is given up is taken back from the queue, or dom0 is asked to cancel it.
"""

import os
import select
import time

from pullrpc.digests import hasher
from pullrpc.errors import KeyringError, PullError
from pullrpc.files import forget, knock, move, read_bounded, write_fully, write_whole
from pullrpc.ids import check_vm_name, new_cid
from pullrpc.layout import REQUEST_PARTS, RESULT_PARTS
from pullrpc.tokens import META_MAX, make_token, parse_key, read_meta

#: What dom0 takes unless it said otherwise in a session (its defaults; see pullrpc.config).
_DEFAULT_LIMITS = {"timeout_max": 300, "command_max": 1 << 20, "stdin_max": 16 << 20, "max_age": 300}
#: Longest number among them, digits.
_DIGITS_MAX = 15
#: A request nobody has taken, with no session to dom0 open, is given up after this many seconds.
_CONNECT_WAIT = 30
#: dom0 took the request, but the session is gone: how long to wait for another one, seconds.
_RECONNECT_WAIT = 60
#: Without a knock, look for the answer this often, seconds.
_LOOK_EVERY = 0.25
#: A request that was answered is gone this soon, also where the VM stands still for a moment, seconds.
_TAKEN_AWAY_WITHIN = 5.0
#: How often, and how far apart (seconds), the agent's lock has to be found taken: agents share it, so clients can't ask by sharing it as well.
_LOCK_TRIES, _LOCK_PAUSE = 5, 0.002
_CHUNK = 1 << 18
_STDOUT = 1


class NoResult(PullError):
    """dom0's answer never came, or isn't dom0's. Whether the command ran is said in the text."""


class NoAnswer(NoResult):
    """dom0 was waited for as long as was said, and did not answer; the request was taken back."""


class Result:
    """dom0's answer.

    Attributes:
        exit_code (int), authentic (bool), fields (dict of str to str).
        parts (dict of ``out`` and ``err`` to Part): the output, as it was when it was checked.
        shown (dict of ``out`` and ``err`` to int): how many bytes of it have been shown already; None when what was shown
            is not how the result begins.
    """

    def __init__(self, exit_code, authentic, fields, parts, shown):
        self.exit_code = exit_code
        self.authentic = authentic
        self.fields = fields
        self.parts = parts
        self.shown = shown


def limits(queue):
    """What dom0 takes from this VM, as it said in its last session.

    Args:
        queue: Queue.

    Returns:
        dict of str to int.
    """
    known = dict(_DEFAULT_LIMITS)
    try:
        lines = read_bounded(queue.limits, 4096).splitlines()
    except (OSError, PullError):
        return known
    for line in lines:
        untrusted_name, _, untrusted_value = line.partition(b" ")
        name = untrusted_name.decode("ascii", "replace")
        # Other programs of this user may write there, too.
        if name in known and untrusted_value.isdigit() and len(untrusted_value) <= _DIGITS_MAX:
            known[name] = int(untrusted_value)
    return known


def vm_name():
    """This VM's Qubes name.

    Returns:
        str, from qubesdb where there is one, else the host name.
    """
    # A VM is renamed or cloned while it is shut down, and with that this folder is gone: a name that stands here is true.
    kept = f"/run/user/{os.geteuid()}/qvm-remote-name"
    try:
        # Other programs of this user may write there, too. What no qube can be called is asked for anew.
        return check_vm_name(read_bounded(kept, 64).decode("ascii"))
    except (OSError, ValueError, PullError):
        pass
    try:
        name = check_vm_name(_ask_qubesdb())
    except PullError:
        return os.uname().nodename.split(".")[0]
    try:
        write_whole(kept, name.encode("ascii"))
    except (OSError, ValueError):
        # There is no such folder: asking costs one program start each time.
        pass
    return name


def _ask_qubesdb():
    for program in ("/usr/bin/qubesdb-read", "/usr/sbin/qubesdb-read"):
        if os.access(program, os.X_OK):
            return _output_of([program, "/name"])
    return ""


def _output_of(argv):
    # subprocess takes longer to import than the program takes to run.
    read_end, write_end = os.pipe()
    pid = os.posix_spawn(argv[0], argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, write_end, 1)])
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        output = file.read(64)
    os.waitpid(pid, 0)
    return output.decode("ascii", "replace").strip()


def load_key(queue):
    """This VM's key.

    Args:
        queue: Queue.

    Returns:
        bytes

    Raises:
        PullError: there is none, or others can read it.
    """
    try:
        info = os.stat(queue.key)
        if info.st_uid != os.geteuid():
            raise PullError(f"the key {queue.key} belongs to another user; run qvm-remote as its owner")
        if info.st_mode & 0o077:
            raise PullError(_key_advice("exposed_key", queue))
        return parse_key(read_bounded(queue.key, 66))
    except FileNotFoundError:
        raise PullError(_key_advice("no_key", queue)) from None
    except KeyringError as err:
        raise PullError(f"the key file {queue.key} can't be used: {err}; {_key_advice('key_anew', queue)}") from None
    except OSError as err:
        raise PullError(f"can't read the key {queue.key}: {err.strerror}") from err


def _key_advice(what, queue):
    # Imported here: it is needed where all ends.
    from . import advice

    return getattr(advice, what)(queue)


def connected(queue):
    """Whether dom0 holds a session to this VM, or looked in lately without the agent.

    Args:
        queue: Queue.

    Returns:
        bool
    """
    # Imported here: a quick answer comes before this is asked.
    import fcntl

    try:
        fd = os.open(queue.agent_lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return _seen_lately(queue)
    try:
        # An agent's lock stays; another client that looks has it for a moment, too.
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_PAUSE)
        else:
            return True
    finally:
        os.close(fd)
    return _seen_lately(queue)


def _seen_lately(queue):
    try:
        return abs(time.time() - os.stat(queue.seen).st_mtime) < _CONNECT_WAIT
    except OSError:
        return False


def take_back(queue, cid):
    """Take a request back if dom0 has not taken it, and ask dom0 to cancel it in any case.

    Args:
        queue: Queue.
        cid: str.

    Returns:
        bool, False when dom0 can't be asked, since nothing can be written.
    """
    is_asked = True
    try:
        write_whole(queue.pending(f"{cid}.cancel"), b"")
    except OSError:
        # The disk is full: dom0 will run into the client's timeout instead.
        is_asked = False
    _remove(queue, cid)
    knock(queue.doorbell)
    return is_asked


def _remove(queue, cid):
    """Remove a request that dom0 has not taken."""
    try:
        forget(*(queue.pending(name) for name in (cid, *(cid + suffix for suffix in REQUEST_PARTS if suffix), f".{cid}.in")))
    except OSError:
        # Where nothing can be removed, nothing could be written either.
        pass


class Request:
    """A request on its way.

    Args:
        queue: Queue, its folders made.
        form: str, see :data:`pullrpc.tokens.FORMS`.
        command: bytes.
        timeout: int, seconds that the command may run.
        patience: int, seconds to wait for the answer at most; None to wait for as long as there may be one.

    Attributes: cid (str, its id), is_sent (bool, dom0 may have it).
    """

    def __init__(self, queue, form, command, timeout, patience=None):
        self._queue = queue
        self._key = load_key(queue)
        self._form = form
        self._command = command
        self._timeout = timeout
        self._patience = patience
        self._stdin_digest = b""
        self._bell = None
        self._stream = None
        self.is_sent = False
        self.cid = new_cid()

    def add_stdin(self, fd, limit, tick):
        """Copy the command's stdin into the queue, up to its end.

        Args:
            fd: int.
            limit: int, bytes.
            tick: callable, called while waiting.

        Raises:
            PullError: it is longer than dom0 takes, or can't be kept; nothing is left behind.
        """
        path = self._queue.pending(f".{self.cid}.in")
        wait_for_input(fd, tick)
        chunk = os.read(fd, _CHUNK)
        if not chunk:
            return
        digest = hasher(len(chunk))
        size = 0
        try:
            out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                while chunk:
                    size += len(chunk)
                    if size > limit:
                        raise PullError(f"stdin is longer than the {limit} bytes that dom0 takes; send a smaller part, or use -n to send none")
                    digest.update(chunk)
                    write_fully(out, chunk)
                    wait_for_input(fd, tick)
                    chunk = os.read(fd, _CHUNK)
            finally:
                os.close(out)
        except OSError as err:
            forget(path)
            raise PullError(f"can't pass stdin on through the queue {self._queue.pending()}: {err.strerror}; nothing was sent") from err
        except BaseException:
            forget(path)
            raise
        self._stdin_digest = digest.digest()
        # dom0 may have handed over a new one while stdin was read.
        self._key = load_key(self._queue)

    def submit(self):
        """Put the request into the queue; from here on dom0 may take it.

        Raises:
            PullError: the disk is full, or the queue can't be written; nothing was submitted.
        """
        token = make_token(self._key, vm_name(), self.cid, self._timeout, self._form, self._command, self._stdin_digest)
        bell = self._queue.bell(self.cid)
        self.is_sent = True
        try:
            os.mkfifo(bell, 0o600)
            self._bell = os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            if self._stdin_digest:
                os.rename(self._queue.pending(f".{self.cid}.in"), self._queue.pending(f"{self.cid}.in"))
            write_whole(self._queue.pending(f"{self.cid}.auth"), token)
            write_whole(self._queue.pending(self.cid), self._command)
        except OSError as err:
            _remove(self._queue, self.cid)
            self._hang_up()
            raise PullError(f"can't write to the queue {self._queue.pending()}: {err.strerror}; nothing was sent") from err
        knock(self._queue.doorbell)

    def wait(self, tick, show):
        """Wait for dom0's answer.

        Args:
            tick: callable, called several times a second with one word: ``queued``, ``running`` or ``unconnected``.
            show: callable, called with ``out`` or ``err`` and bytes: what the command has written, proven by dom0.

        Returns:
            Result

        Raises:
            NoResult: it can't be waited for any longer; the request was taken back, or dom0 is asked to cancel it.
            BrokenPipeError: nobody reads our output any more; the same was done.
        """
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        # No event is asked for: poll tells by itself when a pipe's reader, or a terminal, is gone.
        poller.register(_STDOUT, 0)
        started = last_connected = looked = time.monotonic()
        while True:
            for fd, events in poller.poll(_LOOK_EVERY * 1000):
                if fd == self._bell:
                    os.read(fd, 4096)
                elif events & select.POLLNVAL:
                    poller.unregister(fd)
                elif not self.has_result():
                    self.give_up()
                    raise BrokenPipeError
            if self.has_result():
                return self.read_result()
            self._show_new(show)
            now = time.monotonic()
            if now - looked < _LOOK_EVERY:
                continue
            looked = now
            taken = not os.path.exists(self._queue.pending(self.cid))
            if taken and not os.path.exists(self._queue.running(self.cid)) and not self.has_result():
                self.give_up()
                raise NoResult("the request is gone from the queue: it was cancelled (qvm-remote cancel), or the queue was emptied; there will be no result")
            if connected(self._queue):
                last_connected = now
            self._check_patience(taken, now - started, now - last_connected)
            tick("unconnected" if now - last_connected > 1 else "running" if taken else "queued")

    def has_result(self):
        """Say whether there is an answer, whosever it is.

        Returns:
            bool
        """
        return os.path.exists(self._queue.results(f"{self.cid}.exit"))

    def _check_patience(self, taken, waited, unconnected):
        if self._patience is not None:
            # Whoever says how long waits no shorter, whatever is wrong.
            if waited > self._patience:
                self.give_up()
                raise NoAnswer(f"dom0 did not answer within {self._patience} s; the request was taken back")
            return
        if not taken and unconnected > _CONNECT_WAIT:
            self.give_up()
            if connected(self._queue):
                # It came while the request was taken back, and may have read it just before.
                raise NoResult("dom0 connected in the very moment when the request was taken back; it is asked to cancel it, but the command may have run")
            raise NoResult(
                f"dom0 has not connected to this qube for {_CONNECT_WAIT} s; the request was taken back and does not run any more. "
                "Is qvm-remote running in dom0 (sudo qubesctl state.apply qvm-remote.dom0), and this qube authorized there? See: qvm-remote ping"
            )
        if not taken and waited > _CONNECT_WAIT:
            max_wait = limits(self._queue)["max_age"] + _CONNECT_WAIT
            if waited > max_wait:
                self.give_up()
                raise NoResult(f"dom0 did not take the request within {max_wait} s; it was taken back and does not run any more")
        if taken and unconnected > _RECONNECT_WAIT:
            self.give_up()
            raise NoResult("dom0 took the request, but its session ended and did not come back; the command may have run")

    def _show_new(self, show):
        """Show what the command has written since; give the request up if it was tampered with, or nobody reads it."""
        try:
            if self._stream is None:
                if not os.path.lexists(self._queue.stream(self.cid)):
                    return
                # Imported here: a command that ends at once has no stream.
                from .stream import Stream

                self._stream = Stream(self._queue, self.cid, self._key)
            for part, data in self._stream.pieces():
                show(part, data)
        except FileNotFoundError:
            # The result has come in this moment, and taken it away.
            return
        except (OSError, PullError):
            self.give_up()
            raise

    def is_open(self):
        """Say whether dom0 has not answered the request yet, as far as the queue shows; waits a moment for it to show that.

        Returns:
            bool
        """
        # The agent stores an answer first, and then takes the request away.
        end = time.monotonic() + _TAKEN_AWAY_WITHIN
        while any(map(os.path.lexists, (self._queue.pending(self.cid), self._queue.running(self.cid)))):
            if time.monotonic() > end:
                return True
            time.sleep(0.02)
        return False

    def give_up(self):
        """Take the request back if dom0 has not taken it, and ask dom0 to cancel it if it may have; once is enough."""
        if self._bell is None:
            # Nothing was sent, or it was given up, or has ended.
            _remove(self._queue, self.cid)
            return
        take_back(self._queue, self.cid)
        self._hang_up()

    def keep(self, unread=False):
        """Move a finished request and its result into the history, and drop days that are too old.

        Args:
            unread: bool, the user does not have all of it: it is not given up where it can't be moved.
        """
        day = os.path.join(self._queue.history, f"{self.cid[:4]}-{self.cid[4:6]}-{self.cid[6:8]}")
        folder = os.path.join(day, self.cid)
        try:
            is_new_day = not os.path.isdir(day)
            os.makedirs(folder, mode=0o700, exist_ok=True)
            for part in RESULT_PARTS:
                source = self._queue.results(self.cid + part)
                if os.path.exists(source):
                    move(source, os.path.join(folder, part[1:]))
            write_whole(os.path.join(folder, "command"), self._command)
            if is_new_day:
                # Imported here: once a day, not at each start.
                from .history import drop_old_days

                drop_old_days(self._queue.history)
        except OSError:
            # The user has the output; a full disk only costs the history.
            if not unread:
                forget(*(self._queue.results(self.cid + part) for part in RESULT_PARTS))
        self._hang_up()

    def forget(self):
        """Remove a result; there is nothing in it that anybody wants to see again."""
        forget(*(self._queue.results(self.cid + part) for part in RESULT_PARTS))
        self._hang_up()

    def read_result(self):
        """Read and check the result that is there.

        Returns:
            Result

        Raises:
            NoResult: it is damaged.
        """
        path = self._queue.results(self.cid)
        shown = self._stream.shown if self._stream is not None else {}
        # Imported here: while dom0 works, it costs nobody time.
        from .part import Part

        try:
            exit_code = int(read_bounded(path + ".exit", 8))
            untrusted_meta = read_bounded(path + ".meta", META_MAX) if os.path.exists(path + ".meta") else b""
            # What was shown is taken as how each part begins; if dom0 proves that, no byte of it is hashed twice.
            parts = {part: Part(f"{path}.{part}") for part in ("out", "err")}
            digests = [parts[part].digest(*shown.get(part, ())) for part in ("out", "err")]
            counts = [shown[part][0] if part in shown else 0 for part in ("out", "err")]
            fields, authentic = self._check(exit_code, digests, untrusted_meta)
            if shown and not authentic:
                # dom0 may have put a reason in its place.
                whole = [parts[part].digest() for part in ("out", "err")]
                fields, authentic = self._check(exit_code, whole, untrusted_meta)
                counts = [count if digest == other else None for count, digest, other in zip(counts, digests, whole)]
        except (OSError, ValueError, PullError) as err:
            if self.is_open():
                # It is none of dom0's. What failed here must not run there.
                self.give_up()
            self._hang_up()
            raise NoResult(f"the result of {self.cid} is damaged: {err}") from err
        if authentic:
            # An agent that was killed may not have come to it. The next one would store the result again, for nobody.
            self._forget_request()
        return Result(exit_code, authentic, fields, parts, dict(zip(("out", "err"), counts)))

    def _forget_request(self):
        _remove(self._queue, self.cid)
        try:
            forget(self._queue.running(self.cid))
        except OSError:
            # Where it can't be removed, no result is stored either.
            pass

    def _check(self, exit_code, digests, untrusted_meta):
        if None in digests:
            return {}, False
        fields, authentic = read_meta(self._key, self.cid, *digests, untrusted_meta)
        return fields, authentic and fields.get("id") == self.cid and fields.get("exit") == str(exit_code)

    def _hang_up(self):
        try:
            forget(self._queue.bell(self.cid))
        except OSError:
            # Where it can't be removed, it could not be made.
            pass
        if self._bell is not None:
            os.close(self._bell)
            self._bell = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self._stream = None


def wait_for_input(fd, tick):
    """Wait until there is something to be read, or its end.

    Args:
        fd: int.
        tick: callable, called with ``stdin`` while waiting.
    """
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLHUP)
    while not poller.poll(500):
        tick("stdin")


