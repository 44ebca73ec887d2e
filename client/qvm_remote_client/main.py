# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of ``qvm-remote``: like ssh's, with dom0 as the only host.

Options are read by hand: argparse takes longer to import than dom0 takes to answer.
"""

# The module signal names these by enum, which takes half as long to import as Python takes to start.
import _signal as signal
import os
import sys
import time

from pullrpc import __version__
from pullrpc.errors import PullError
from pullrpc.files import write_fully
from pullrpc.layout import Queue

from . import request as requests

#: Exit codes of our own; see --help.
EXIT_TIMEOUT, EXIT_FAILED, EXIT_INTERRUPTED = 124, 125, 130
#: Longest a command may run when -t isn't given, seconds (or dom0's limit, if that is lower).
_TIMEOUT_DEFAULT = 300
_HISTORY_DAYS = 30
#: Begin to show that we are alive after this many seconds.
_SHOW_AFTER = 1.5
_STREAMS = {"out": 1, "err": 2}
_SUBCOMMANDS = ("agent", "help", "key", "log", "ping", "queue", "status")

_HELP = """\
usage: qvm-remote [OPTIONS] COMMAND [ARG...]     run a command line in dom0, as with ssh
       qvm-remote [OPTIONS] < script.sh          run a script in dom0
       qvm-remote [OPTIONS] -s ARG... < script   the same, with arguments
       qvm-remote [OPTIONS] --exec PROGRAM ARG...   exactly these arguments, no shell

COMMAND and ARGs are joined by spaces and read by dom0's bash, so quote for two shells, or use --exec.
With COMMAND, stdin goes to the command (unless it is a terminal): close it, or give -n, where there is none to send.

options:
  -t SEC, --timeout SEC   let it run SEC seconds (default 300, or dom0's limit for this qube)
  -n                      send no stdin
  -s                      read the script from stdin, ARGs are its $1, $2...
  --exec                  pass the argument vector as it is
  -q, --quiet             no notes of qvm-remote's own on stderr, errors only
  -v, --verbose           say on stderr what happens, with times
  --version, -h, --help

other commands (-- in front makes any of these words a command for dom0):
  qvm-remote key gen|show|import    this qube's key
  qvm-remote ping                   measure the way to dom0 and back, key included
  qvm-remote status                 is there a key, a session, something waiting
  qvm-remote queue make|check       put this user's queue in order, or say what is wrong with it
  qvm-remote log [N]                the last N (20) requests
  qvm-remote agent                  answers dom0; started by dom0 alone

exit codes: the command's own; 128+N if signal N killed it; 124 it ran into its timeout;
125 qvm-remote refused or failed, and says why; 130 interrupted here (the command in dom0 is killed).
"""


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
    _open_closed_streams()
    try:
        exit_code = _dispatch(argv)
        sys.stdout.flush()
        return exit_code
    except PullError as err:
        sys.stderr.write(f"qvm-remote: error: {err}\n")
        return EXIT_FAILED
    except BrokenPipeError:
        # Whoever read our output went away: end as a program killed by SIGPIPE does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as err:
        sys.stderr.write(f"qvm-remote: error: {err.strerror}{f': {err.filename}' if err.filename else ''}\n")
        return EXIT_FAILED


def _open_closed_streams():
    """Have no file of the queue take the number of a standard stream that we were started without."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _dispatch(argv):
    options, words, literal = _read_options(argv)
    if words is None:
        return 0
    if words and words[0] in _SUBCOMMANDS and not literal and not (options.script or options.exec):
        return _subcommand(words[0], words[1:], options)
    queue = Queue()
    queue.make_folders()
    known = requests.limits(queue)
    form, command, use_stdin = _command_of(options, words, known["command_max"])
    return _run(queue, options, known, form, command, use_stdin)


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
            sys.stdout.write(_HELP if word != "--version" else f"qvm-remote {__version__}\n")
            return options, None, False
        if word == "--exec":
            options.exec = True
        elif word == "--quiet":
            options.quiet = True
        elif word == "--verbose":
            options.verbose = True
        elif name == "--timeout":
            options.timeout = _seconds(value if has_value else words.pop(0) if words else "")
        elif word.startswith("--"):
            raise PullError(f"there is no option {name}; see: qvm-remote --help")
        else:
            _read_short(word[1:], words, options)
    return options, words, False


def _read_short(letters, words, options):
    for at, letter in enumerate(letters):
        if letter == "t":
            options.timeout = _seconds(letters[at + 1 :] or (words.pop(0) if words else ""))
            return
        flag = {"n": "no_stdin", "s": "script", "q": "quiet", "v": "verbose"}.get(letter)
        if flag is None:
            raise PullError(f"there is no option -{letter}; see: qvm-remote --help")
        setattr(options, flag, True)


def _seconds(text):
    if not (text.isascii() and text.isdigit() and 0 < int(text[:8]) and len(text) <= 7):
        raise PullError("-t takes a whole number of seconds, 1 or more")
    return int(text)


def _command_of(options, words, limit):
    """What to send: (form, command bytes, whether stdin goes to the command)."""
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
        if options.script and (options.no_stdin or os.isatty(0)):
            raise PullError("-s reads the script from stdin; give one: qvm-remote -s ARG... < script.sh")
    elif words:
        command, form, use_stdin = " ".join(_text(word) for word in words).encode("utf-8"), "shell", True
    else:
        if options.no_stdin or os.isatty(0):
            raise PullError("no command; give one, or a script on stdin; see: qvm-remote --help")
        command, form, use_stdin = _read_script(limit), "script", False
    if not command.strip():
        raise PullError("the command is empty")
    if len(command) > limit:
        raise PullError(f"the command is longer than the {limit} bytes that dom0 takes; send its data on stdin instead")
    return form, command, use_stdin and not options.no_stdin and not os.isatty(0)


def _text(word):
    # An argument that is not UTF-8 reaches us with surrogates; dom0 takes text only.
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        raise PullError("an argument is not UTF-8 text; dom0 takes no other; send its bytes on stdin instead") from None
    return word


def _read_script(limit):
    data = b""
    while len(data) <= limit:
        chunk = os.read(0, 1 << 16)
        if not chunk:
            break
        data += chunk
    return data


def _run(queue, options, known, form, command, use_stdin):
    timeout = options.timeout or min(_TIMEOUT_DEFAULT, known["timeout_max"])
    if timeout > known["timeout_max"]:
        raise PullError(f"-t {timeout} is over the limit of {known['timeout_max']} s that dom0 sets for this qube (timeout_max)")
    progress = _Progress(options.quiet)
    started = time.monotonic()
    request = requests.Request(queue, form, command, timeout)
    _on_signals_give_up(request, progress)
    if use_stdin:
        request.add_stdin(0, known["stdin_max"], progress.tick)
    request.submit()
    if options.verbose:
        sys.stderr.write(f"qvm-remote: sent {request.cid} ({form}, {len(command)} bytes, timeout {timeout} s)\n")
    # Imported here: while dom0 works, it costs nobody time.
    from . import journal

    def show(part, data):
        progress.end()
        write_fully(_STREAMS[part], data)

    try:
        result = request.wait(progress.tick, show)
    except (OSError, PullError):
        journal.append(queue, request.cid, form, command, EXIT_FAILED, "no result")
        raise
    finally:
        progress.end()
    exit_code = EXIT_FAILED
    try:
        exit_code = _show(result, options)
        if options.verbose:
            sys.stderr.write(f"qvm-remote: {request.cid} ended with {exit_code} after {time.monotonic() - started:.3f} s\n")
    finally:
        # Whether or not somebody read all of it.
        journal.append(queue, request.cid, form, command, exit_code, result.fields.get("status", "refused"))
        request.keep(_HISTORY_DAYS)
    return exit_code


def _show(result, options):
    """Print a result, if it is dom0's; say what went wrong, if it isn't."""
    if not result.authentic:
        reason = _safe_text(result.err_path)
        sys.stderr.write(f"qvm-remote: error: {reason or 'the answer is not authentic: it was not made by dom0 with the key of this qube'}\n")
        if reason:
            sys.stderr.write("qvm-remote: (this refusal carries no proof from dom0: the keys here and in dom0 differ, dom0 has none, or it was refused unread)\n")
        return EXIT_FAILED
    if result.shown["out"] is not None:
        _copy(result.out_path, 1, result.shown["out"])
    if None in result.shown.values() and not options.quiet:
        sys.stderr.write("qvm-remote: the output above is incomplete\n")
    _copy(result.err_path, 2, result.shown["err"] or 0)
    fields = result.fields
    if fields.get("status") == "timeout":
        sys.stderr.write(f"qvm-remote: timed out after {fields.get('timeout')} s; the command was killed\n")
    if not options.quiet:
        for name, stream in (("out", "stdout"), ("err", "stderr")):
            if fields.get(f"{name}-truncated") == "1":
                kept = os.stat(result.out_path if name == "out" else result.err_path).st_size
                sys.stderr.write(f"qvm-remote: {stream} was cut after {kept} of {fields.get(f'{name}-bytes')} bytes\n")
    return result.exit_code


def _safe_text(path):
    """An unproven refusal's reason, fit for a terminal."""
    try:
        with open(path, "rb") as file:
            raw = file.read(1000)
    except OSError:
        return ""
    text = "".join(char if char.isprintable() else "?" for char in raw.decode("utf-8", "replace").strip())
    prefix = "qvm-remote: "
    return text[len(prefix) :] if text.startswith(prefix) else text


def _copy(path, fd, start):
    """Write a file's bytes from ``start`` on to a descriptor."""
    try:
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.lseek(source, start, os.SEEK_SET)
        while True:
            chunk = os.read(source, 1 << 18)
            if not chunk:
                return
            write_fully(fd, chunk)
    finally:
        os.close(source)


def _on_signals_give_up(request, progress):
    def give_up(number, _frame):
        request.give_up()
        progress.end()
        sys.stderr.write("qvm-remote: interrupted; dom0 is asked to kill the command\n")
        # Not sys.exit: the interpreter may be anywhere; everything that must be done is done.
        os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, give_up)


class _Progress:
    """Shows that a long wait is alive: one line on a terminal's stderr, rewritten in place."""

    _TEXTS = {
        "queued": "waiting for dom0 to take the request",
        "running": "running in dom0",
        "unconnected": "waiting for dom0 to connect",
        "stdin": "reading stdin (use -n to send none)",
    }

    def __init__(self, quiet):
        self._shows = not quiet and os.isatty(2)
        self._started = time.monotonic()
        self._shown = False

    def tick(self, what):
        waited = time.monotonic() - self._started
        if self._shows and waited > _SHOW_AFTER:
            sys.stderr.write(f"\r\033[Kqvm-remote: {self._TEXTS[what]}, {waited:.0f} s")
            sys.stderr.flush()
            self._shown = True

    def end(self):
        """Take the line away, and show none again: from now on the terminal is the output's."""
        self._shows = False
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
            self._shown = False


def _subcommand(name, words, options):
    if name == "help":
        sys.stdout.write(_HELP)
        return 0
    queue = Queue()
    if name == "agent":
        from .agent import Agent

        return Agent(queue).serve()
    if name == "queue":
        return _queue(queue, words)
    queue.make_folders()
    if name == "key":
        from . import keys

        keys.run(words, queue, sys.stdout)
        return 0
    if name == "ping":
        return _ping(queue, words, options)
    from . import journal

    if name == "log":
        journal.show(queue, words, sys.stdout)
        return 0
    return journal.status(queue, words, sys.stdout)


def _queue(queue, words):
    if words not in (["make"], ["check"]):
        raise PullError("use 'queue make' or 'queue check'; to run a program named queue in dom0: qvm-remote -- queue ...")
    if words == ["make"]:
        queue.make_folders()
        return 0
    # That there is no key yet is the key's matter, not the queue's.
    problems = [problem for problem in queue.problems() if problem != "key-missing"]
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    return 1 if problems else 0


def _ping(queue, words, options):
    if words:
        raise PullError("ping takes no argument; to run a program of that name in dom0: qvm-remote -- ping ...")
    progress = _Progress(options.quiet)
    request = requests.Request(queue, "ping", b"ping", options.timeout or 10)
    _on_signals_give_up(request, progress)
    started = time.monotonic()
    request.submit()
    try:
        # dom0 answers a ping at once, in one piece.
        result = request.wait(progress.tick, lambda part, data: None)
    finally:
        progress.end()
    waited = (time.monotonic() - started) * 1000
    if result.authentic and result.exit_code == 0:
        sys.stdout.write(f"dom0 answered in {waited:.0f} ms\n")
        request.keep(_HISTORY_DAYS)
        return 0
    exit_code = _show(result, options)
    request.keep(_HISTORY_DAYS)
    return exit_code
