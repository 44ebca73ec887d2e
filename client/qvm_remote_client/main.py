# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of ``qvm-remote``: like ssh's, with dom0 as the only host.

Options are read by hand: argparse takes longer to import than dom0 takes to answer.
"""

# The module signal names these by enum, which takes half as long to import as Python takes to start.
import _signal as signal
import errno
import os
import sys
import time

from pullrpc import __version__
from pullrpc.errors import PullError
from pullrpc.files import discard_stream, open_closed_streams, write_fully
from pullrpc.layout import Queue

from . import journal
from . import request as requests

#: Exit codes of our own; see --help.
EXIT_TIMEOUT, EXIT_FAILED, EXIT_INTERRUPTED = 124, 125, 130
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Longest a command may run when -t isn't given, seconds (or dom0's limit, if that is lower).
_TIMEOUT_DEFAULT = 300
#: Longest number that -t takes, digits; what dom0 takes is less.
_SECONDS_DIGITS = 7
_STREAMS = {"out": 1, "err": 2}
#: Most of a refusal without proof that is shown, characters.
_REASON_MAX = 300
#: Most of a path that is shown with an error, and of what might have been an option, characters.
_PATH_MAX, _FLAG_MAX = 400, 64
#: What dom0 takes in no command, as UTF-8: ASCII's control characters but tab, newline and carriage return, and the second set of them.
_CONTROLS = bytes(byte for byte in range(0x20) if byte not in b"\t\n\r") + b"\x7f"
_C1 = tuple(b"\xc2" + bytes((byte,)) for byte in range(0x80, 0xA0))
#: The words that begin a command of ours (table.reserved(), which is not loaded for a command that goes to dom0).
RESERVED = frozenset(("agent", "cancel", "help", "history", "key", "log", "ping", "queue", "status"))


_SWITCHES = ("--exec", "--quiet", "--verbose", "--help", "--version")


class _Options:
    timeout = None
    no_stdin = False
    script = False
    exec = False
    quiet = False
    verbose = False


def main(argv):
    """Run the command line.

    Args:
        argv: list of str, without the program's name.

    Returns:
        int, the exit code.
    """
    open_closed_streams()
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            # The program has it so while it loads.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        exit_code = _dispatch(argv)
        sys.stdout.flush()
        return exit_code
    except PullError as err:
        return _fail(f"{err}{_advice(err.__cause__)}")
    except BrokenPipeError:
        # Whoever read our output went away: end as a program killed by SIGPIPE does.
        discard_stream(1)
        return 128 + signal.SIGPIPE
    except OSError as err:
        return _fail(f"{err.strerror}{_where(err)}{_advice(err)}")
    except _Interrupted as err:
        return _end("qvm-remote: interrupted\n", _interrupted_by(err.number))
    except KeyboardInterrupt:
        # Nothing was sent, or there is nothing to take back: of a request that was, on_signals_give_up takes care.
        return _end("\n", EXIT_INTERRUPTED)


def _fail(text):
    return _end(f"qvm-remote: error: {text}\n", EXIT_FAILED)


def _end(text, exit_code):
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # Nobody can be told; the exit code says it.
        discard_stream(2)
    return exit_code


def _where(err):
    if not isinstance(err.filename, (str, bytes)):
        return ""
    return f": {_shown(err.filename, _PATH_MAX)}"


def _shown(text, limit):
    # Imported here: it is needed where all ends.
    from .terminal import one_line

    return one_line(os.fsencode(text), limit)


def _advice(cause):
    if not isinstance(cause, OSError):
        return ""
    from .advice import advice

    return advice(cause)


def _keep_out_of_dumps():
    """Leave no core dump, which had the key in it: neither a file, nor (which takes a limit of 1, and not of 0) one piped to a program."""
    # Imported here: while dom0 works, it costs nobody time.
    import resource

    if resource.getrlimit(resource.RLIMIT_CORE)[1] != 0:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def _dispatch(argv):
    options, words, literal = _read_options(argv)
    if words is None:
        return 0
    if words and words[0] in RESERVED and not literal and not (options.script or options.exec):
        from .subcommands import run

        _keep_out_of_dumps()

        return run(words, options)
    queue = Queue()
    if os.geteuid() == 0 and not os.path.lexists(queue.base):
        from .advice import roots_mistake

        mistake = roots_mistake(queue)
        if mistake:
            raise PullError(mistake)
    prepare(queue, options.quiet)
    known = requests.limits(queue)
    progress = Waiting(options.quiet)
    form, command, use_stdin = _command_of(options, words, known, progress)
    return _run(queue, options, known, progress, form, command, use_stdin)


def prepare(queue, quiet):
    """Put the queue in order; the folder of qvm-remote's predecessor becomes ours if there is none.

    Args:
        queue: Queue.
        quiet: bool, don't say that it was moved.

    Raises:
        PullError: it can't be used.
    """
    if not os.path.lexists(queue.base):
        from .migrate import adopt

        note = adopt(queue)
        if note and not quiet:
            sys.stderr.write(f"qvm-remote: {note}\n")
    queue.make_folders()


def _read_options(argv):
    """Split options from words.

    Returns:
        (_Options, list of str, bool): the last says that ``--`` was given. The list is None when all is done.
    """
    options, words = _Options(), list(argv)
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--":
            return options, words, True
        name, has_value, value = word.partition("=")
        if word in ("-h", "--help", "--version"):
            sys.stdout.write(f"qvm-remote {__version__}\n" if word == "--version" else _help())
            return options, None, False
        if word == "--exec":
            options.exec = True
        elif word == "--quiet":
            options.quiet = True
        elif word == "--verbose":
            options.verbose = True
        elif name == "--timeout":
            options.timeout = seconds_of(value if has_value else words.pop(0) if words else "")
        elif name in _SWITCHES:
            raise PullError(f"{name} takes no value; see: qvm-remote --help")
        elif word.startswith("--"):
            raise _no_option(name)
        else:
            _read_short(word[1:], words, options)
    return options, words, False


def _help():
    from .usage import help_of

    return help_of([])


def _read_short(letters, words, options):
    for at, letter in enumerate(letters):
        if letter == "t":
            options.timeout = seconds_of(letters[at + 1 :] or (words.pop(0) if words else ""))
            return
        flag = {"n": "no_stdin", "s": "script", "q": "quiet", "v": "verbose"}.get(letter)
        if flag is None:
            raise _no_option(f"-{letter}")
        setattr(options, flag, True)


def _no_option(flag):
    return PullError(f"there is no option {_shown(flag, _FLAG_MAX)}; see: qvm-remote --help")


def seconds_of(text):
    """Read the value of -t.

    Args:
        text: str.

    Returns:
        int, seconds.

    Raises:
        PullError: it is none.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= _SECONDS_DIGITS and int(text)):
        raise PullError(f"-t takes a whole number of seconds, from 1 to {10**_SECONDS_DIGITS - 1}")
    return int(text)


def _command_of(options, words, known, progress):
    """What to send: (form, command bytes, whether stdin goes to the command)."""
    limit = known["command_max"]
    if options.exec or options.script:
        if options.exec and options.script:
            raise PullError("--exec and -s exclude each other")
        if options.exec and not words:
            raise PullError("--exec needs a program; see: qvm-remote --help")
        # Like 'ssh HOST bash -s -- ARG... < script': the script is the shell's stdin.
        words = words if options.exec else ["/bin/bash", "-s", "--", *words]
        # Imported here: only this form needs it. The whole module json takes longer to import than Python takes to start.
        from _json import encode_basestring_ascii as quoted

        command, form, use_stdin = f"[{', '.join(quoted(_text(word)) for word in words)}]".encode("ascii"), "argv", True
        if options.script and not _has_stdin(options):
            raise PullError("-s reads the script from stdin; give one: qvm-remote -s ARG... < script.sh")
    elif words:
        command, form, use_stdin = " ".join(_text(word) for word in words).encode("utf-8"), "shell", True
    else:
        if not _has_stdin(options):
            raise PullError("no command; give one, or a script on stdin; see: qvm-remote --help")
        command, form, use_stdin = _read_script(known, progress), "script", False
    if not command.strip():
        raise PullError("the command is empty")
    if len(command) > limit:
        raise PullError(f"the command is longer than the {limit} bytes that dom0 takes; send its data on stdin instead")
    return form, command, use_stdin and _has_stdin(options)


def _has_stdin(options):
    """Whether stdin is to be read, and can be: what nohup gives to a command that is typed at a terminal can only be written."""
    if options.no_stdin or os.isatty(0):
        return False
    try:
        os.read(0, 0)
    except OSError as err:
        return err.errno != errno.EBADF
    return True


def _text(word):
    # The bytes that we were called with, whatever the locale takes them for.
    raw = os.fsencode(word)
    _check_text(raw, "an argument", "send its bytes on stdin instead")
    return raw.decode("utf-8")


def _check_text(raw, what, advice):
    """What dom0 refuses (pullrpc.validate.check_command, which takes longer to load) is better said here."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        raise PullError(f"{what} is not UTF-8 text; dom0 takes no other; {advice}") from None
    if raw.translate(None, _CONTROLS) != raw or (not raw.isascii() and any(char in raw for char in _C1)):
        raise PullError(f"{what} contains control characters; dom0 takes none but tab, newline and carriage return; {advice}")


def _read_script(known, progress):
    data, limit = b"", known["command_max"]
    try:
        while len(data) <= limit:
            requests.wait_for_input(0, progress.tick)
            chunk = os.read(0, 1 << 16)
            if not chunk:
                break
            data += chunk
    finally:
        progress.end()
    if len(data) > limit:
        raise PullError(f"the script is longer than the {limit} bytes that dom0 takes as a command; with -s it may have {known['stdin_max']}: qvm-remote -s < FILE")
    _check_text(data, "the script", "with -s it is passed on as it is: qvm-remote -s < FILE")
    return data


def _run(queue, options, known, progress, form, command, use_stdin):
    timeout = options.timeout or min(_TIMEOUT_DEFAULT, known["timeout_max"])
    if timeout > known["timeout_max"]:
        where = f"in pillar, qvm-remote: vms: {requests.vm_name()}: timeout"
        raise PullError(f"-t {timeout} is over the limit of {known['timeout_max']} s that dom0 sets for this qube ({where})")
    started = time.monotonic()
    request = requests.Request(queue, form, command, timeout)
    journal.submitted(queue, request.cid, form, command)
    on_signals_give_up(request, progress, lambda exit_code: journal.ended(queue, request.cid, exit_code, "given-up"))

    def show(part, data):
        progress.end()
        write_fully(_STREAMS[part], data)

    told = []
    try:
        if use_stdin:
            _keep_out_of_dumps()
            request.add_stdin(0, known["stdin_max"], progress.tick)
        request.submit()
        _keep_out_of_dumps()
        if options.verbose:
            sys.stderr.write(f"qvm-remote: sent {request.cid} ({form}, {len(command)} bytes, timeout {timeout} s)\n")
        try:
            result = request.wait(progress.tick, show)
            _on_signals(lambda number, _frame: told.append(number))
        except _Interrupted as err:
            # What the answer is, and whose, is known in a moment.
            told.append(err.number)
            result = request.read_result()
        is_given_up = not result.authentic and request.is_open()
        if is_given_up:
            # It was answered by somebody else. What failed here must not run there.
            request.give_up()
    except (OSError, PullError):
        # Nobody waits for it any more, and it is taken back in any case.
        _on_signals(_go_on)
        request.give_up()
        journal.ended(queue, request.cid, EXIT_FAILED, "no-result")
        raise
    finally:
        progress.end()
    if is_given_up:
        sys.stderr.write("qvm-remote: what follows did not come from dom0, which has not answered yet; it is asked to kill the command\n")
    # Whether or not somebody reads all of it. What is not proven to be dom0's word is anybody's.
    exit_code, status = (result.exit_code, result.fields.get("status", "refused")) if result.authentic else (EXIT_FAILED, "refused")
    unread = True
    try:
        try:
            _on_signals(_interrupt)
            if told:
                raise _Interrupted(told[0])
            _show(result, options)
            if options.verbose:
                sys.stderr.write(f"qvm-remote: {request.cid} ended with {exit_code} after {time.monotonic() - started:.3f} s\n")
            unread = False
        finally:
            # What is left takes no time, and must not end halfway.
            _on_signals(_go_on)
    except _Interrupted as err:
        kept = f"the command had ended with {exit_code}, and its output" if result.authentic else "the answer"
        return _end(f"qvm-remote: interrupted; {kept} is kept, see: qvm-remote history show {request.cid}\n", _interrupted_by(err.number))
    except BrokenPipeError:
        raise
    except OSError as err:
        raise PullError(f"can't write all of the output; it is kept, see: qvm-remote history show {request.cid} ({err.strerror})") from err
    finally:
        journal.ended(queue, request.cid, exit_code, status)
        request.keep(unread)
    return exit_code


class _Interrupted(KeyboardInterrupt):
    """We were told to end when there was an answer already."""

    def __init__(self, number):
        self.number = number


def _interrupted_by(number):
    return EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number


def _interrupt(number, _frame):
    # A terminal that is closed has more than one sent: no other is to land where this one is answered.
    _on_signals(_go_on)
    raise _Interrupted(number)


def _go_on(_number, _frame):
    """A signal that changes nothing any more. Ignored, one that came just before would find nothing to call (Python before 3.9.3)."""


def _on_signals(handler):
    for number in _ENDING:
        # What our caller has us ignore, as nohup does, and a shell with what it starts in the background, is none of our business.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _show(result, options):
    """Print a result, if it is dom0's; say what went wrong, if it isn't."""
    if not result.authentic:
        reason = reason_of(result)
        sys.stderr.write(f"qvm-remote: error: {reason or 'the answer is not authentic: it was not made by dom0 with the key of this qube'}\n")
        if reason:
            sys.stderr.write("qvm-remote: (this refusal carries no proof from dom0: the keys here and in dom0 differ, dom0 has none, or it was refused unread)\n")
        return
    if result.shown["out"] is not None:
        _copy(result.parts["out"], 1, result.shown["out"])
    if None in result.shown.values() and not options.quiet:
        sys.stderr.write("qvm-remote: the output above is incomplete\n")
    _copy(result.parts["err"], 2, result.shown["err"] or 0)
    fields = result.fields
    if fields.get("status") == "timeout":
        sys.stderr.write(f"qvm-remote: timed out after {fields.get('timeout')} s; the command was killed\n")
    if not options.quiet:
        for name, stream in (("out", "stdout"), ("err", "stderr")):
            if fields.get(f"{name}-truncated") == "1":
                kept = result.parts[name].size
                sys.stderr.write(f"qvm-remote: {stream} was cut after {kept} of {fields.get(f'{name}-bytes')} bytes\n")


def reason_of(result):
    """The reason that a result gives for there being no other, fit for a terminal whether or not it is dom0's.

    Args:
        result: Result.

    Returns:
        str, one line of printable ASCII, so that it can't look like anything else; empty when there is none.
    """
    from .terminal import one_line

    raw = result.parts["err"].beginning(4 * _REASON_MAX)
    prefix = b"qvm-remote: "
    text = one_line(raw[len(prefix) :] if raw.startswith(prefix) else raw, _REASON_MAX)
    return text.encode("ascii", "backslashreplace").decode("ascii")


def _copy(part, fd, start):
    """Write a part of the result on to a descriptor, from ``start`` on."""
    for block in part.blocks(start):
        write_fully(fd, block)


def on_signals_give_up(request, progress, on_end=lambda exit_code: None):
    """End the command when we are told to end. Once there is an answer, that is raised, as _Interrupted: there may be nothing to end.

    Args:
        request: Request.
        progress: Waiting.
        on_end: callable of int, told the exit code.
    """

    def give_up(number, frame):
        if request.has_result():
            _interrupt(number, frame)
        request.give_up()
        try:
            progress.end()
            os.write(2, b"qvm-remote: interrupted; dom0 is asked to kill the command\n" if request.is_sent else b"qvm-remote: interrupted; nothing was sent\n")
        except OSError:
            pass
        exit_code = _interrupted_by(number)
        on_end(exit_code)
        # Not sys.exit: the interpreter may be anywhere; everything that must be done is done.
        os._exit(exit_code)

    _on_signals(give_up)


class Waiting:
    """Shows that a long wait is alive. What that takes is loaded when it has become one.

    Args:
        quiet: bool, show nothing.
    """

    def __init__(self, quiet):
        self._shows = not quiet
        self._started = time.monotonic()
        self._line = None

    def tick(self, what):
        """Called now and then with the word for what is waited for."""
        if not self._shows:
            return
        if self._line is None:
            from .progress import Progress, is_wanted

            self._line = Progress(self._started)
            self._shows = is_wanted()
        if self._shows:
            self._line.tick(what)

    def end(self):
        """Show nothing any more: from now on the terminal is the output's."""
        self._shows = False
        if self._line is not None:
            self._line.clear()
