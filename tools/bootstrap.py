#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Prepare a developer's machine for `make demo` and `make test`: a virtual environment in .venv, and the few system
packages that can't come with it. Says what it does; does nothing when all is there. With --bench also what `make bench`
needs beside: OpenSSH; with --model what `make model` needs, with --packages what the tests of packages in `make test` need, with
--all-packages what `make packages` and its longer tests do, with --papers what tests of man pages, completion and other shells do, alone; with
--fuzz, in .venv, what `make fuzz` is better with. Standard library only.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_VENV = os.path.join(_ROOT, ".venv")
_REQUIREMENTS = os.path.join(_ROOT, "requirements-dev.txt")
_STAMP = os.path.join(_VENV, "prepared")
_HEADER = os.path.join(sysconfig.get_paths()["include"], "Python.h")
#: Before each try to install packages: a mirror may be out of reach for a moment, and apt-get waits for nobody who has its lists, seconds.
_PAUSES = (0, 10, 20)
#: Where a server may be that a user's PATH has not.
_SBIN = os.environ.get("PATH", "") + ":/usr/sbin"
#: What must be there: a test for it, and the packages that bring it (Debian, Fedora).
_SYSTEM = (
    ("the C compiler, to build salt's dependency timelib", lambda: shutil.which("cc") or shutil.which("gcc"), "gcc", "gcc"),
    ("Python's headers, for the same", lambda: os.path.exists(_HEADER), "python3-dev", "python3-devel"),
    ("Python's venv module", lambda: _can_import("ensurepip") and _can_import("venv"), "python3-venv", "python3"),
    ("systemd-analyze, to check the service's unit", lambda: shutil.which("systemd-analyze"), "systemd", "systemd"),
    ("socat, for the tests' channels to a master", lambda: shutil.which("socat"), "socat", "socat"),
    ("GnuPG, for make release and its test", lambda: shutil.which("gpg") and shutil.which("gpgv"), "gnupg", "gnupg2"),
    ("logrotate, to rotate the audit log in a test", lambda: shutil.which("logrotate", path="/usr/sbin:/usr/bin:/sbin:/bin"), "logrotate", "logrotate"),
    ("shellcheck, for make lint", lambda: shutil.which("shellcheck"), "shellcheck", "ShellCheck"),
)
#: What make model needs, and nothing else here does.
_FOR_MODEL = (
    ("spin, to check the model", lambda: shutil.which("spin"), "spin", "spin"),
    ("gcc, to build what spin makes of it", lambda: shutil.which("gcc"), "gcc", "gcc"),
)
#: For fuzzing, where there is one built for this Python and machine; building it needs a clang of its own.
_FUZZER = "atheris>=2.3"
#: To build RPMs and a Debian package, which is quick to install. None: there is no such package.
_FOR_PACKAGES = (
    ("rpmbuild", lambda: shutil.which("rpmbuild"), "rpm", "rpm-build"),
    ("dpkg-buildpackage", lambda: shutil.which("dpkg-buildpackage"), "dpkg-dev", "dpkg-dev"),
    ("debhelper", lambda: shutil.which("dh"), "debhelper", "debhelper"),
    ("dh-python, by which the client's bytecode is made on Debian", lambda: shutil.which("dh_python3"), "dh-python", None),
    ("mmdebstrap, to make a template that is a Debian of its own", lambda: shutil.which("mmdebstrap"), "mmdebstrap", None),
)
#: And one for Arch Linux, and to look at all of them as their distributions do.
_FOR_ALL_PACKAGES = (
    *_FOR_PACKAGES,
    ("makepkg", lambda: shutil.which("makepkg"), "makepkg", "pacman"),
    ("pacman, without which makepkg does not start", lambda: shutil.which("pacman"), "pacman-package-manager", "pacman"),
    ("fakeroot, for makepkg", lambda: shutil.which("fakeroot"), "fakeroot", "fakeroot"),
    ("bsdtar, for the same", lambda: shutil.which("bsdtar"), "libarchive-tools", "bsdtar"),
    ("zstd, for the same", lambda: shutil.which("zstd"), "zstd", "zstd"),
    ("rpmlint", lambda: shutil.which("rpmlint"), "rpmlint", "rpmlint"),
    ("lintian", lambda: shutil.which("lintian"), "lintian", None),
)
#: To look at man pages and completion as those who use them do, and at the queue of a qube without the agent by every shell that may be there.
_FOR_PAPERS = (
    ("mandoc, to check man pages", lambda: shutil.which("mandoc"), "mandoc", "mandoc"),
    ("zsh, to check its completion", lambda: shutil.which("zsh"), "zsh", "zsh"),
    ("fish, for the same", lambda: shutil.which("fish"), "fish", "fish"),
    ("busybox, whose shell may be a qube's", lambda: shutil.which("busybox"), "busybox", "busybox"),
)
#: What these options install, and nothing beside it.
_ALONE = {"--model": _FOR_MODEL, "--packages": _FOR_PACKAGES, "--all-packages": _FOR_ALL_PACKAGES, "--papers": _FOR_PAPERS}
#: For the benchmark alone: a demo must not bring a server to somebody's machine.
_FOR_BENCH = (
    ("sshd, which make bench starts on loopback with its own keys", lambda: shutil.which("sshd", path=_SBIN), "openssh-server", "openssh-server"),
    ("ssh, for the same", lambda: shutil.which("ssh"), "openssh-client", "openssh-clients"),
)


def main(argv):
    """Prepare the machine.

    Args:
        argv: list of str: one option, or nothing.

    Returns:
        int, the exit code.
    """
    if argv == ["--fuzz"]:
        return _install_fuzzer()
    if argv and argv[0] in _ALONE:
        # The tools of packages recommend compilers and more; the model needs what gcc recommends.
        options = [] if argv == ["--model"] else ["--no-install-recommends"]
        return 0 if _install_system(_missing(_ALONE[argv[0]]), *options) else 1
    with open(_REQUIREMENTS, "rb") as file:
        wanted = hashlib.sha256(file.read() + sys.version.encode()).hexdigest()
    needed = _SYSTEM + (_FOR_BENCH if "--bench" in argv else ())
    if not _install_system(_missing(needed)):
        return 1
    return 0 if _prepared() == wanted else _install_venv(wanted)


def _can_import(name):
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def _prepared():
    try:
        with open(_STAMP, encoding="ascii") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _missing(needed):
    return [(what, debian, fedora) for what, is_there, debian, fedora in needed if not is_there()]


def _install_system(missing, *apt_options):
    if not missing:
        return True
    for what, _, _ in missing:
        print(f"missing: {what}", flush=True)
    debs, rpms = ([row[place] for row in missing if row[place]] for place in (1, 2))
    pauses = _PAUSES
    # The headers must be those of the Python that runs this: another version's package would not help.
    if shutil.which("apt-get"):
        # dpkg may be at work for somebody else: for updates at the machine's start, for another of these.
        commands = [["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "-o", "DPkg::Lock::Timeout=600", *apt_options, *debs]]
    elif shutil.which("dnf"):
        # That tries again, and waits, by itself.
        commands, pauses = [["dnf", "install", "-y", "-q", *rpms]] if rpms else [], (0,)
    else:
        print("error: neither apt-get nor dnf is here; install the above by hand, then run this again", file=sys.stderr)
        return False
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    for pause in pauses:
        time.sleep(pause)
        if all([_run(as_root + command) or command[1] == "update" for command in commands]):
            return True
    print("error: that failed; install the above by hand, then run this again", file=sys.stderr)
    return False


def _run(command):
    print("running: " + " ".join(command), flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment, check=False).returncode == 0


def _install_venv(wanted):
    print("preparing .venv: salt, pytest-salt-factories and the linters (a minute or two the first time)", flush=True)
    steps = (
        [sys.executable, "-m", "venv", "--clear", _VENV],
        [os.path.join(_VENV, "bin", "pip"), "install", "--quiet", "--disable-pip-version-check", "-r", _REQUIREMENTS],
    )
    for step in steps:
        if subprocess.run(step, stdin=subprocess.DEVNULL, check=False).returncode:
            print(f"error: this failed: {' '.join(step)}", file=sys.stderr)
            return 1
    with open(_STAMP, "w", encoding="ascii") as file:
        file.write(wanted)
    return 0


def _install_fuzzer():
    there = subprocess.run([os.path.join(_VENV, "bin", "python"), "-c", "import atheris"], capture_output=True, check=False)
    if there.returncode == 0:
        return 0
    pip = [os.path.join(_VENV, "bin", "pip"), "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", _FUZZER]
    if subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
        print(f"there is no {_FUZZER} for this Python and machine, or it can't be fetched: fuzzing goes on with hypothesis alone", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
