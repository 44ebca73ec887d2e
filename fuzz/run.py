#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Fuzz the parsers that read what a VM sent. One line for each target; exits with 1 when a defect was found, whose input is kept, and says
how to see it again. See fuzz/README.rst.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import pkgutil
import re
import sys
import tempfile
import traceback

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(_HERE)
sys.path[:0] = [_HERE, os.path.join(_ROOT, "_utils"), os.path.join(_ROOT, "client")]

import engines  # noqa: E402
import targets  # noqa: E402

#: Where inputs that are worth keeping are kept.
_KEPT = os.path.join(_ROOT, ".cache", "fuzz")
#: What the instrumentation is for: our own code, and targets that stand elsewhere.
_OURS = ["pullrpc", "qvm_remote_client"]


def main(argv):
    """Run the command line.

    Args:
        argv: list of str.

    Returns:
        int, the exit code.
    """
    known = [module.name for module in pkgutil.iter_modules(targets.__path__)]
    parser = argparse.ArgumentParser(prog="fuzz/run.py", description="Fuzz the parsers that read what a VM sent.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(known)}, or a file that is one (default: all)")
    parser.add_argument("--seconds", type=int, default=0, help="for each target")
    parser.add_argument("--runs", type=int, default=0, help="inputs for each target, fewer where one takes long; without either of them, 60 seconds")
    parser.add_argument("--seed", type=int, default=0, help="make the same inputs again")
    parser.add_argument("--engine", choices=["atheris", "hypothesis"], help="default: atheris where it is installed")
    parser.add_argument("--keep", default=_KEPT, metavar="FOLDER", help="where corpus and findings are kept (default: .cache/fuzz)")
    parser.add_argument("--input", metavar="FILE", help="try this one input with one target")
    options = parser.parse_args(argv)
    names = options.targets or known
    for name in names:
        if name not in known and not (name.endswith(".py") and os.path.isfile(name)):
            parser.error(f"there is no target {name}")
    if options.input:
        return _try(names, options.input, parser)
    if not options.seconds and not options.runs:
        options.seconds = 60
    engine = _engine(options.engine)
    if engine is None:
        parser.error("atheris is not installed; python3 tools/bootstrap.py --fuzz installs it, where there is one for this Python")
    loaded = _load_all(names, engine)
    try:
        # All of them, also where one fails.
        return max([_fuzz(name, target, engine, options) for name, target in loaded])
    except KeyboardInterrupt:
        return 130


def _engine(wanted):
    has_atheris = importlib.util.find_spec("atheris") is not None
    if wanted is None and not has_atheris:
        print("atheris is not installed: hypothesis goes on without it, and finds less", flush=True)
    if wanted == "atheris" and not has_atheris:
        return None
    return wanted or ("atheris" if has_atheris else "hypothesis")


def _load_all(names, engine):
    if engine != "atheris":
        return [(name, _load(name)) for name in names]
    import atheris

    with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=[*_OURS, *(_module(name) for name in names if name.endswith(".py"))]):
        return [(name, _load(name)) for name in names]


def _load(name):
    if name.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
        return importlib.import_module(_module(name))
    return importlib.import_module(f"targets.{name}")


def _module(name):
    return os.path.basename(name)[:-3]


def _try(names, path, parser):
    if len(names) != 1:
        parser.error("--input goes with one target")
    with open(path, "rb") as file:
        data = file.read()
    with _scratch():
        try:
            _load(names[0]).check(data)
        except Exception:  # noqa: BLE001 - whatever it is, it is what was looked for
            traceback.print_exc()
            return 1
    print(f"{names[0]}: this input does no harm")
    return 0


@contextlib.contextmanager
def _scratch():
    """What targets write lies in one folder, which goes with its end."""
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a folder of its own is made in it
    with tempfile.TemporaryDirectory(prefix="qvm-remote-fuzz-", dir=fast) as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def _fuzz(name, target, engine, options):
    """Fuzz one target in a process of its own; say how it went: 0, or 1 when something was found."""
    shown = _module(name) if name.endswith(".py") else name
    folder = os.path.join(options.keep, shown)
    os.makedirs(folder, exist_ok=True)
    # By the clock of files, which is a little behind.
    os.utime(folder)
    begun = os.stat(folder).st_mtime_ns
    log = os.path.join(folder, "log")
    with _scratch():
        pid = os.fork()
        if pid == 0:
            _child(target, engine, folder, log, options)
        _, status = os.waitpid(pid, 0)
    with open(log, encoding="utf-8", errors="replace") as file:
        text = file.read()
    runs = re.findall(r"number_of_executed_units: (\d+)|^#(\d+)", text, re.MULTILINE)
    branches = re.findall(r"cov: (\d+)", text)
    line = f"{shown:9} {engine:10} {''.join(runs[-1]) if runs else '?':>9} inputs" + (f" {branches[-1]:>5} branches" if branches else "")
    if status == 0 and "number_of_executed_units" in text:
        print(f"{line}  no defect", flush=True)
        return 0
    print(f"{line}  DEFECT: {_reason(text)}", flush=True)
    found = [entry.path for entry in os.scandir(folder) if entry.name.startswith(("crash-", "timeout-", "oom-")) and entry.stat().st_mtime_ns >= begun]
    for path in found:
        print(f"    {sys.executable} {os.path.relpath(__file__)} {name} --input {os.path.relpath(path)}", flush=True)
    if not found:
        print(f"    see {log}", flush=True)
    return 1


def _child(target, engine, folder, log, options):
    status = 2
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        fuzz = engines.with_atheris if engine == "atheris" else engines.with_hypothesis
        runs = -(-options.runs // getattr(target, "COST", 1))
        fuzz(target, folder, options.seconds, runs, options.seed)
        status = 0
    except SystemExit as end:
        # How atheris ends, whatever it found.
        status = 2 if end.code else 0
    except BaseException:  # noqa: BLE001 - the parent's code must not go on here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reason(text):
    """The line of a log that says most."""
    for pattern in (r"^(\w*(?:Error|Exception|Refused|Broken)\b.*)$", r"ERROR: libFuzzer: (.*)$", r"(.+)\n*\Z"):
        found = re.findall(pattern, text, re.MULTILINE)
        if found:
            return found[-1][:200]
    return "it ended"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
