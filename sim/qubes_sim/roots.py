# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's file system, made from the host's /usr and nothing else of the host's but a few files of /etc.

All that domains write lies in a memory file system that only the hypervisor's mount namespace has: it is gone with it.
"""

import os
import shutil
import stat
import subprocess

from . import linux

#: Folders of the root that a domain starts with; /home, /rw, /usr/local are its private ones.
_FOLDERS = ("dev", "etc", "home", "mnt", "opt", "proc", "root", "run", "rw", "srv", "sys", "tmp", "usr", "var")
_VAR = ("cache", "lib", "log", "mail", "opt", "spool", "tmp", "local")
#: What programs of the host need of its /etc to work.
_ETC = (
    "alternatives",
    "bash.bashrc",
    "bashrc",
    "crypto-policies",
    "debian_version",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "login.defs",
    "os-release",
    "pki",
    "profile",
    "profile.d",
    "python3",
    "python3.11",
    "services",
    "protocols",
    "shells",
    "ssl",
    "terminfo",
)
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_NSSWITCH = "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"
_PASSWD = "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:user:/home/user:/bin/bash\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
_GROUP = "root:x:0:\ntty:x:5:\nuser:x:1000:\nnogroup:x:65534:\nqubes:x:98:user\n"
#: Folders of /usr that must be the domain's own: an ordinary user's root may not write to those of the host's root.
_WRITABLE = (
    *("bin", "lib", "sbin", "share"),
    *(f"share/{name}" for name in ("bash-completion/completions", "fish/vendor_completions.d", "man/man1", "man/man5", "man/man8", "zsh/site-functions")),
)
_PRIVATE = ("home", "rw", "usrlocal")


class Store:
    """Where everything that domains write is kept.

    Args:
        folder: str, on a memory file system of the hypervisor's own.
    """

    def __init__(self, folder):
        self._folder = folder
        self._base = os.path.join(folder, "base")
        #: Templates, and VMs of theirs, that have a file system of their own in a folder of the host; nothing is written there.
        self._systems = {}

    def give_system(self, name, folder):
        """Have a template begin with a distribution's own file system instead of what this machine has.

        Args:
            name: str.
            folder: str.
        """
        self._systems[name] = folder

    def has_system(self, name):
        """Whether a domain has a file system of its own.

        Returns:
            bool
        """
        return name in self._systems

    def make_base(self):
        """Make the root that all domains begin with."""
        for name in _FOLDERS:
            os.makedirs(os.path.join(self._base, name), exist_ok=True)
        for name in _VAR:
            os.makedirs(os.path.join(self._base, "var", name), exist_ok=True)
        os.chmod(os.path.join(self._base, "root"), 0o700)
        os.chmod(os.path.join(self._base, "var", "tmp"), 0o1777)
        os.symlink("/run", os.path.join(self._base, "var", "run"))
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            # Distributions of today have these as links into /usr.
            if os.path.islink(f"/{name}"):
                os.symlink(os.readlink(f"/{name}"), os.path.join(self._base, name))
        _make_etc(os.path.join(self._base, "etc"))

    def make_private(self, name, owner):
        """Make a domain's persistent folders, once.

        Args:
            name: str.
            owner: int, uid and gid of its user.
        """
        private = self._path(name, "private")
        if os.path.isdir(private):
            return
        for folder in _PRIVATE:
            os.makedirs(os.path.join(private, folder))
        for folder in ("bin", "lib", "sbin", "share", "etc"):
            os.makedirs(os.path.join(private, "usrlocal", folder))
        home = os.path.join(private, "home", "user")
        os.makedirs(home, mode=0o700)
        os.chown(home, owner, owner)

    def reset(self, name, template):
        """Give a domain a fresh root: the base's, or that of its template as it is now.

        Args:
            name: str.
            template: str or None; None for a domain that keeps its own root (a template, dom0).
        """
        if template in self._systems:
            self._systems[name] = self._systems[template]
        if template is not None:
            shutil.rmtree(self._path(name, "volatile"), ignore_errors=True)
            shutil.rmtree(self._path(name, "template"), ignore_errors=True)
            source = self._path(template, "volatile")
            if os.path.isdir(source):
                # A copy, as Qubes takes a snapshot: the template may change while the VM runs. cp keeps overlayfs's marks.
                subprocess.run(["cp", "-a", source, self._path(name, "template")], check=True)
        for part in ("root", "usr"):
            for kind in ("upper", "work"):
                os.makedirs(self._path(name, "volatile", part, kind), exist_ok=True)
        for folder in _WRITABLE:
            os.makedirs(self._path(name, "volatile", "usr", "upper", folder), exist_ok=True)

    def mount(self, name, target, binds=()):
        """Mount a domain's root; called in that domain's own mount namespace.

        Args:
            name: str.
            target: str, a folder.
            binds: list of (source on the host, target in the domain, bool read-only).
        """
        system = self._systems.get(name)
        self._overlay(name, "root", system or self._base, target)
        self._overlay(name, "usr", f"{system or ''}/usr", os.path.join(target, "usr"))
        private = self._path(name, "private")
        for source, place in zip(_PRIVATE, ("home", "rw", "usr/local")):
            os.makedirs(os.path.join(target, place), exist_ok=True)
            linux.bind(os.path.join(private, source), os.path.join(target, place))
        for place, mode in (("run", "0755"), ("tmp", "1777"), ("dev", "0755")):
            linux.mount("tmpfs", os.path.join(target, place), "tmpfs", linux.MS_NOSUID, f"mode={mode}")
        if name == "dom0":
            # The sign by which programs know that systemd is here.
            os.makedirs(os.path.join(target, "run", "systemd", "system"))
        _fill_dev(os.path.join(target, "dev"))
        linux.mount("proc", os.path.join(target, "proc"), "proc", linux.MS_NOSUID | linux.MS_NODEV)
        for source, place, read_only in binds:
            _bind_in(source, target, place, read_only)

    def write(self, name, path, text, mode=0o644):
        """Put a file into a domain's root while it doesn't run.

        Args:
            name: str.
            path: str, absolute.
            text: str.
            mode: int.
        """
        _, top, rest = path.split("/", 2)
        part = self._path(name, "volatile", "usr", "upper", rest) if top == "usr" else self._path(name, "volatile", "root", "upper", top, rest)
        os.makedirs(os.path.dirname(part), exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, mode)

    def forget(self, name):
        """Remove all of a domain."""
        shutil.rmtree(self._path(name), ignore_errors=True)

    def mount_point(self, name):
        """A folder to mount a domain's root on; each domain does so in a mount namespace of its own.

        Returns:
            str
        """
        path = self._path(name, "mnt")
        os.makedirs(path, exist_ok=True)
        return path

    def _overlay(self, name, part, base, target):
        lower = [self._path(name, "template", part, "upper"), base]
        folders = ":".join(folder for folder in lower if os.path.isdir(folder))
        upper, work = (self._path(name, "volatile", part, kind) for kind in ("upper", "work"))
        options = f"lowerdir={folders},upperdir={upper},workdir={work}"
        try:
            linux.mount("overlay", target, "overlay", 0, options)
        except PermissionError:
            # Without the rights of the real root, overlayfs keeps its marks in user attributes.
            linux.mount("overlay", target, "overlay", 0, options + ",userxattr")

    def _path(self, name, *parts):
        return os.path.join(self._folder, "domains", name, *parts)


def _make_etc(etc):
    for name in _ETC:
        source, target = f"/etc/{name}", os.path.join(etc, name)
        if os.path.isdir(source):
            shutil.copytree(source, target, symlinks=True, ignore=_unreadable, ignore_dangling_symlinks=True)
        elif os.path.lexists(source):
            shutil.copy2(source, target, follow_symlinks=False)
    for name, text in (("nsswitch.conf", _NSSWITCH), ("passwd", _PASSWD), ("group", _GROUP), ("machine-id", "0" * 32 + "\n")):
        with open(os.path.join(etc, name), "w", encoding="ascii") as file:
            file.write(text)


def _unreadable(folder, names):
    """Private keys of the host have no place in a simulated domain, and an ordinary user could not copy them."""
    return [name for name in names if name == "private" or not os.access(os.path.join(folder, name), os.R_OK)]


def _fill_dev(dev):
    for name in _DEVICES:
        path = os.path.join(dev, name)
        open(path, "w").close()
        linux.mount(f"/dev/{name}", path, None, linux.MS_BIND)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("ptmx", "pts/ptmx")):
        os.symlink(target, os.path.join(dev, name))
    for name, kind, options in (("pts", "devpts", "newinstance,ptmxmode=0666,mode=0620"), ("shm", "tmpfs", "mode=1777")):
        os.mkdir(os.path.join(dev, name))
        linux.mount(kind, os.path.join(dev, name), kind, linux.MS_NOSUID, options)


def _bind_in(source, root, place, read_only):
    target = root + place
    _make_parents(root, place)
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        if not os.path.exists(target):
            open(target, "w").close()
    linux.bind(source, target, read_only)


def _make_parents(root, place):
    """Make the folders above a place, passable for every user of the domain."""
    own = os.stat(root).st_dev
    path = root
    for name in place.strip("/").split("/")[:-1]:
        path = os.path.join(path, name)
        os.makedirs(path, exist_ok=True)
        found = os.stat(path)
        # What is on another file system may be a folder of the host that was bound before: never to be changed.
        if found.st_dev == own and found.st_mode & 0o055 != 0o055:
            os.chmod(path, stat.S_IMODE(found.st_mode) | 0o055)
