#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Build the packages: dom0's and a qube's as RPM, a qube's for Debian and for Arch Linux. Prints their digests.

    packages.py [--into DIR] [KIND...]     KIND: rpm, deb, arch; all that this machine has the tools for by default

Needs no rights beyond a user's. The same commit gives the same bytes, wherever and whenever it is built: all times are that of
the commit (SOURCE_DATE_EPOCH, if that is set). What is packed is what git tracks. Standard library only.
"""

import argparse
import email.utils
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from version import ROOT, read, released  # noqa: E402

#: What a kind is built with.
_PROGRAMS = {"rpm": "rpmbuild", "deb": "dpkg-buildpackage", "arch": "makepkg"}
_SPECS = ("qvm-remote-formula", "qvm-remote")
#: Nothing of the machine, the folder or the moment goes into an RPM; and its documents lie where Fedora has them.
_RPM_DEFINES = {
    "_buildhost": "localhost",
    "use_source_date_epoch_as_buildtime": "1",
    "clamp_mtime_to_source_date_epoch": "1",
    "source_date_epoch_from_changelog": "0",
    "dist": "%{nil}",
    "_docdir_fmt": "%%{NAME}",
}
#: rpmbuild and makepkg write the folder's name into packages, so each build is at the same place, in a mount namespace of its own.
#: Root is needed for that, and makepkg refuses to run as root: it is a user again who builds.
_PLACE = "/mnt"
_AT_THE_PLACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
_AT_THE_PLACE += ['mount --bind . "$1" && cd "$1/$2" && shift 2 && exec unshare --user --map-user=1000 --map-group=1000 "$@"', "sh", _PLACE]
_ENTRY = re.compile(r"^qvm-remote \((?P<version>[^)]+)\) .*?\n\n(?P<text>.*?)\n\n -- (?P<who>.*?)  (?P<date>.*?)$", re.MULTILINE | re.DOTALL)


class BuildFailed(Exception):
    """A package could not be built; the text says which step failed, and what it said."""


class Source:
    """The source tree as it goes into a package.

    Args:
        root: str.
        epoch: int, the time that all of it has, seconds since the epoch.
    """

    def __init__(self, root, epoch):
        self.root = root
        self.epoch = epoch
        self.version = read(root)
        self.files = _tracked(root)

    def archive(self, path, prefix):
        """Pack all files as ``prefix/...``.

        Args:
            path: str, where to: a .tar.gz.
            prefix: str.
        """
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name in self.files:
                self._add(archive, name, f"{prefix}/{name}")
        with open(path, "wb") as file:
            file.write(gzip.compress(packed.getvalue(), mtime=self.epoch))
        os.utime(path, (self.epoch, self.epoch))

    def unpack(self, folder):
        """Write all files below a folder.

        Args:
            folder: str.
        """
        for name in self.files:
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(os.path.join(self.root, name), target)
            os.chmod(target, self._mode(name))
            os.utime(target, (self.epoch, self.epoch))

    def render(self, name, target):
        """Write a file from its template, as Qubes Builder does.

        Args:
            name: str, the template's path in the source tree, ending in ``.in``.
            target: str.
        """
        values = {"@VERSION@": self.version, "@REL@": "1", "@CHANGELOG@": _rpm_changelog(self._text("debian/changelog"))}
        text = self._text(name)
        for word, value in values.items():
            text = text.replace(word, value)
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)
        os.utime(target, (self.epoch, self.epoch))

    def _add(self, archive, name, target):
        with open(os.path.join(self.root, name), "rb") as file:
            data = file.read()
        entry = tarfile.TarInfo(target)
        entry.size, entry.mode, entry.mtime, entry.uname, entry.gname = len(data), self._mode(name), self.epoch, "root", "root"
        archive.addfile(entry, io.BytesIO(data))

    def _mode(self, name):
        return 0o755 if os.access(os.path.join(self.root, name), os.X_OK) else 0o644

    def _text(self, name):
        with open(os.path.join(self.root, name), encoding="utf-8") as file:
            return file.read()


def _tracked(root):
    if not os.path.exists(os.path.join(root, ".git")):
        # An unpacked source archive: all that is there.
        found = (os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names)
        return sorted(name for name in found if "__pycache__" not in name)
    return sorted(name for name in _git(root, "ls-files", "-z").split("\0") if os.path.isfile(os.path.join(root, name)))


def _git(root, *words):
    done = subprocess.run(["git", "-C", root, *words], capture_output=True, check=False)
    if done.returncode:
        raise BuildFailed(f"git {words[0]} failed in {root}: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout.decode("utf-8")


def source_time(root):
    """The time that all of the source tree has in a package.

    Args:
        root: str.

    Returns:
        int, seconds since the epoch: SOURCE_DATE_EPOCH, else the last commit's, else (in an unpacked archive) the changelog's.
    """
    if os.environ.get("SOURCE_DATE_EPOCH"):
        return int(os.environ["SOURCE_DATE_EPOCH"])
    if os.path.exists(os.path.join(root, ".git")):
        return int(_git(root, "log", "-1", "--format=%ct"))
    return int(released(root).timestamp())


def _rpm_changelog(text):
    """Debian's changelog in the form of a spec file's."""
    entries = []
    for match in _ENTRY.finditer(text):
        date = email.utils.parsedate_to_datetime(match["date"])
        lines = re.sub(r"^  \* ", "- ", match["text"], flags=re.MULTILINE)
        entries.append(f"* {time.strftime('%a %b %d %Y', date.utctimetuple())} {match['who']} - {match['version']}\n{lines}")
    return "\n\n".join(entries)


def build_rpm(source, folder):
    """Build the source and binary packages of both sides.

    Args:
        source: Source.
        folder: str, an empty one to work in.

    Returns:
        list of str, paths.

    Raises:
        BuildFailed
    """
    defines = [word for name, value in {**_RPM_DEFINES, "_topdir": _PLACE}.items() for word in ("--define", f"{name} {value}")]
    for name in _SPECS:
        os.makedirs(os.path.join(folder, "SOURCES"), exist_ok=True)
        source.archive(os.path.join(folder, "SOURCES", f"{name}-{source.version}.tar.gz"), f"{name}-{source.version}")
        source.render(f"rpm/{name}.spec.in", os.path.join(folder, f"{name}.spec"))
        # Without --nodeps rpmbuild looks for python3 in a database of RPMs that Debian does not have.
        _run(["rpmbuild", "-ba", "--nodeps", *defines, f"{name}.spec"], folder, source)
    return _found(folder, ".rpm")


def build_deb(source, folder):
    """Build the source and binary package of a qube's side.

    Args:
        source: Source.
        folder: str, an empty one to work in.

    Returns:
        list of str, paths.

    Raises:
        BuildFailed
    """
    tree = os.path.join(folder, f"qvm-remote-{source.version}")
    source.archive(os.path.join(folder, f"qvm-remote_{source.version}.orig.tar.gz"), os.path.basename(tree))
    source.unpack(tree)
    _run(["dpkg-buildpackage", "--no-sign", "--diff-ignore", "--tar-ignore"], folder, source, below=os.path.basename(tree))
    return _found(folder, ".deb", ".dsc", ".tar.gz", ".tar.xz")


def build_arch(source, folder):
    """Build the package of a qube's side for Arch Linux.

    Args:
        source: Source.
        folder: str, an empty one to work in.

    Returns:
        list of str, paths.

    Raises:
        BuildFailed
    """
    source.archive(os.path.join(folder, f"qvm-remote-{source.version}-1.tar.gz"), f"qvm-remote-{source.version}-1")
    source.render("archlinux/PKGBUILD.in", os.path.join(folder, "PKGBUILD"))
    os.mkdir(os.path.join(folder, "archlinux"))
    shutil.copy(os.path.join(source.root, "archlinux", "qvm-remote.install"), os.path.join(folder, "archlinux"))
    places = dict.fromkeys(("PKGDEST", "SRCDEST", "SRCPKGDEST", "LOGDEST", "BUILDDIR"), _PLACE)
    options = {"PACKAGER": "qvm-remote maintainers <maintainers@qvm-remote.example>", "PKGEXT": ".pkg.tar.zst", "CARCH": "x86_64"}
    _run(["makepkg", "--nodeps", "--noconfirm"], folder, source, {**places, **options})
    return _found(folder, ".pkg.tar.zst")


_BUILDERS = {"rpm": build_rpm, "deb": build_deb, "arch": build_arch}


def _run(argv, folder, source, more=None, below="."):
    environment = {"PATH": os.environ["PATH"], "HOME": _PLACE, "LC_ALL": "C.UTF-8", "TZ": "UTC", "SOURCE_DATE_EPOCH": str(source.epoch), **(more or {})}
    done = subprocess.run(
        [*_AT_THE_PLACE, below, *argv], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip().splitlines()[-20:]
        raise BuildFailed("\n".join([f"{argv[0]} failed ({done.returncode}); it said:", *said]))


def _found(folder, *endings):
    return sorted(os.path.join(path, name) for path, _, names in os.walk(folder) for name in names if name.endswith(endings) and "SOURCES" not in path)


def build(kinds, into, root=ROOT):
    """Build packages.

    Args:
        kinds: iterable of str: ``rpm``, ``deb``, ``arch``.
        into: str, the folder for them; it is made.
        root: str, the source tree.

    Returns:
        dict of str to str: a file's name to its SHA-256.

    Raises:
        BuildFailed
    """
    os.umask(0o022)
    source = Source(root, source_time(root))
    os.makedirs(into, exist_ok=True)
    digests = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="qvm-remote-") as folder:
            work = os.path.join(folder, kind)
            os.mkdir(work)
            for path in _BUILDERS[kind](source, work):
                shutil.copy(path, into)
                with open(path, "rb") as file:
                    digests[os.path.basename(path)] = hashlib.sha256(file.read()).hexdigest()
    return digests


def main(argv):
    """Build what can be built here.

    Args:
        argv: list of str.

    Returns:
        int, the exit code: 1 if a package could not be built, or one that was asked for by name lacks its tool.
    """
    parser = argparse.ArgumentParser(prog="packages.py", description="Build the packages; print their SHA-256.")
    parser.add_argument("--into", metavar="DIR", default=os.path.join(ROOT, "dist"), help="the folder for them (default: dist)")
    parser.add_argument("kinds", metavar="KIND", nargs="*", help="rpm, deb, arch (default: all that this machine can build)")
    options = parser.parse_args(argv)
    unknown = [kind for kind in options.kinds if kind not in _BUILDERS]
    if unknown:
        parser.error(f"there is no kind of package named {unknown[0]}; these are: {', '.join(_BUILDERS)}")
    missing = [kind for kind, program in _PROGRAMS.items() if not shutil.which(program) and kind in (options.kinds or _BUILDERS)]
    for kind in missing:
        print(f"{'error' if options.kinds else 'left out'}: {kind}: {_PROGRAMS[kind]} is not here", file=sys.stderr)
    if options.kinds and missing:
        return 1
    try:
        digests = build([kind for kind in options.kinds or _BUILDERS if kind not in missing], options.into)
    except BuildFailed as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    with open(os.path.join(options.into, "SHA256SUMS"), "w", encoding="ascii") as file:
        file.writelines(lines)
    sys.stdout.writelines(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
