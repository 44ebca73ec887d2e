# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of ``qvm-remote-dom0``: reads it, has it done, and turns what goes wrong into one line."""

import argparse
import os
import signal
import sys

from pullrpc import __version__
from pullrpc.errors import PullError
from pullrpc.files import discard_stream, open_closed_streams

from . import change, show
from .usage import UsageError
from .verbs import EXIT_CODES, OPTIONS, PROGRAM, SUMMARY, VERBS

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
#: Help is shown as it is written, and no option is guessed from its beginning.
_EXACT = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
#: Where each verb that is not in :mod:`change` is.
_LOOKS = ("keys", "status", "tail", "history", "explain", "doctor", "rehearse")


def main(argv):
    """Run the command line.

    Args:
        argv: list of str, without the program's name.

    Returns:
        int, the exit code.
    """
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # Whatever a command's text has that this terminal's character set has not.
        stream.reconfigure(errors="backslashreplace")
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            # The program has it so while it loads.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        exit_code = _do(argv)
        show.put(now=True)
        return exit_code
    except BrokenPipeError:
        # Whoever read our output went away: end as a program killed by SIGPIPE does.
        discard_stream(1)
        return 128 + signal.SIGPIPE
    except UsageError as err:
        return _end(f"{PROGRAM}: error: {err}\n", _USAGE)
    except PullError as err:
        return _end(f"{PROGRAM}: error: {err}\n", _FAILED)
    except OSError as err:
        return _end(f"{PROGRAM}: error: {f'{err.filename}: {err.strerror}' if err.filename else err}\n", _FAILED)
    except (KeyboardInterrupt, EOFError):
        return _end("\n", _INTERRUPTED)


def _end(text, exit_code):
    for number, stream, more in ((1, sys.stdout, ""), (2, sys.stderr, text)):
        try:
            stream.write(more)
            stream.flush()
        except OSError:
            # The exit code says it. Python would try once more when it ends, and complain.
            discard_stream(number)
    return exit_code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all of this command does."""

    def error(self, message):
        raise UsageError(f"{' '.join(message.split())}; see: {self.prog} --help")


def make_parser():
    """Make the parser from the table of verbs.

    Returns:
        argparse.ArgumentParser
    """
    parser = _Parser(prog=PROGRAM, description=SUMMARY, epilog=EXIT_CODES, **_EXACT)
    for option in OPTIONS:
        _add(parser, option)
    commands = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb in VERBS:
        text = verb.text[0].upper() + verb.text[1:] + "."
        more = f"{verb.more}\n" if verb.more else ""
        also = f"The same by Salt: qubesctl qvm_remote.{verb.function}" if verb.function else ""
        one = commands.add_parser(verb.name, help=verb.text, description=text, epilog=more + also, **_EXACT)
        for option in verb.options:
            _add(one, option)
    return parser


def _add(parser, option):
    text = argparse.SUPPRESS if option.hidden else option.text
    if option.names == ("--version",):
        parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}", help=text)
    elif not option.names[0].startswith("-"):
        count = {"nargs": option.count} if option.count else {}
        parser.add_argument(option.names[0], metavar=option.metavar, help=text, **count)
    elif not option.metavar:
        parser.add_argument(*option.names, action="store_true", help=text)
    else:
        kind = {"type": _number} if type(option.default) is int else {}
        parser.add_argument(*option.names, metavar=option.metavar, default=option.default, help=text, **kind)


def _number(text):
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1000000:
        raise argparse.ArgumentTypeError("must be a number, 1 to 1000000")
    return int(text)


def _do(argv):
    parser = make_parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as ended:
        # It has shown help, or the version.
        return ended.code
    # Some argparse takes it away, and some does not.
    options.after_dashes = argv[argv.index("--") + 1 :] if "--" in argv else None
    if options.verb is None and not options.once:
        parser.error("say what to do: a verb, or --once")
    if options.verb is not None and (options.once or options.dry_run):
        parser.error("--once and --dry-run go without a verb")
    if os.geteuid() != 0:
        raise PullError(f"only root may do that; type: sudo {PROGRAM} ...")
    verb = options.verb or ("rehearse" if options.dry_run else "once")
    if verb in _LOOKS:
        # Imported here: it takes a while, and Salt, which does the rest, a longer one.
        from . import look

        return getattr(look, verb)(options)
    return getattr(change, verb)(options)
