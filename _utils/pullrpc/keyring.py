# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's keys: ``<key_dir>/<vm>.key``, 0600 in a folder 0700, both owned by whoever runs us (root).

A key that is malformed, readable by others, or the same as another VM's is refused both when it is stored and each
time it is used. Keys are never logged, returned to a caller outside this package's checks, or put into an error.

A rotation has two steps. *Staged*: ``<vm>.key.new`` waits to be handed to its VM; both keys work, since the VM may have
either. *Handed*: the new key is ``<vm>.key``, and the one before is ``<vm>.key.old``, whose time says when it was
replaced; it works for what was signed just before, for ``overlap`` seconds at most. What was accepted by then is still run.

``<vm>.key.uuid`` says which qube the key is for, since a name may be given to another one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import secrets
import stat
import time

from .digests import sha256
from .errors import KeyringError, PullError
from .files import forget, read_bounded, sync_folder, write_durably
from .ids import check_vm_name
from .secrecy import keep_out_of_dumps
from .tokens import fingerprint, parse_key

_SUFFIX = ".key"
_STAGED, _OLD = ".key.new", ".key.old"
_BOUND = ".key.uuid"
_UUID_MAX = 64
#: Once the VM has used its new key, the old one works for so long: for clients that had read it just before, seconds.
_AFTER_FIRST_USE = 30
#: A key file is 64 digits and a newline; one byte more shows that it is too long.
_READ_MAX = 66
#: How long after a change of a file its time may stand still, seconds.
_CTIME_STEP = 1.0
#: Why a file can't be read, where it is this process or the machine that lacks something for a moment.
_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class _Unread(KeyringError):
    """A key can't be read now, and may be a good one."""


class Keyring:
    """The key folder. The engine and states work on it at the same time; each step holds a lock, so that none sees half of another.

    Args:
        folder: str, absolute.
    """

    def __init__(self, folder):
        keep_out_of_dumps()
        self._folder = folder
        #: How the files were before they were read, and the VMs by the digests of their keys.
        self._owners = (None, {})

    def names(self):
        """List the VMs that have a key file, good or not.

        Returns:
            list of str; empty when there is no folder.
        """
        return sorted(vm for vm, suffix in self._files() if suffix == _SUFFIX)

    def exists(self, vm):
        """Say whether a VM has a key file, good or not.

        Args:
            vm: str, a checked name.

        Returns:
            bool

        Raises:
            KeyringError: it can't be told.
        """
        return _is_there(self._path(vm))

    def get(self, vm):
        """Fetch a VM's key.

        Args:
            vm: str, a checked name.

        Returns:
            bytes, 32.

        Raises:
            KeyringError: there is none, or it must not be used; the text says why.
        """
        with self._locked(fcntl.LOCK_SH):
            return self._get(vm)

    def newest(self, vm):
        """Fetch the key that a VM should have: the staged one while it is being rotated.

        Args:
            vm: str, a checked name.

        Returns:
            bytes

        Raises:
            KeyringError: as for :meth:`get`.
        """
        with self._locked(fcntl.LOCK_SH):
            key = self._get(vm)
            return self._staged(vm) or key

    def staged(self, vm):
        """Fetch the key that waits to be handed to a VM.

        Args:
            vm: str, a checked name.

        Returns:
            bytes, or None when none waits.

        Raises:
            KeyringError: the folder can't be read.
        """
        with self._locked(fcntl.LOCK_SH):
            return self._staged(vm)

    def accepted(self, vm, overlap):
        """Fetch the keys under which a VM's requests are believed now.

        Args:
            vm: str, a checked name.
            overlap: int, seconds that a replaced key still works.

        Returns:
            list of bytes: the key first, then the staged and the replaced one if there are.

        Raises:
            KeyringError: as for :meth:`get`.
        """
        with self._locked(fcntl.LOCK_SH):
            keys = [self._get(vm), self._staged(vm), self._old(vm) if self._old_works(vm, overlap) else None]
        return [key for key in keys if key]

    def held(self, vm):
        """Fetch all keys of a VM, under which what was accepted from it earlier may have been signed.

        Args:
            vm: str, a checked name.

        Returns:
            list of bytes, as for :meth:`accepted`, whatever the replaced one's age.

        Raises:
            KeyringError: as for :meth:`get`.
        """
        with self._locked(fcntl.LOCK_SH):
            keys = [self._get(vm), self._staged(vm), self._old(vm)]
        return [key for key in keys if key]

    def stage(self, vm, key=None, record=None):
        """Begin a rotation, unless one has begun that leads to the same: the VM may have that key already.

        Args:
            vm: str, a checked name that has a key.
            key: bytes, 32; None to make one, or go on with the one that waits.
            record: callable of the fingerprints of the key before and the new one, called before that is stored; what it raises
                prevents that.

        Returns:
            (str, str): fingerprints of the key before and of the new one.

        Raises:
            KeyringError: the VM has no key, or the new one can't be stored.
        """
        with self._locked():
            old, waiting = fingerprint(self._get(vm)), self._waiting(vm)
            if waiting and key in (None, waiting):
                return old, fingerprint(waiting)
            key = key or secrets.token_bytes(32)
            self._store(vm, key, _STAGED, record and functools.partial(record, old))
        return old, fingerprint(key)

    def handed(self, vm, key):
        """Note that a VM has a key now: a staged one becomes its key, the one before works a little longer.

        Args:
            vm: str, a checked name.
            key: bytes, the one that the VM has.

        Returns:
            bool, whether this ended a rotation's first step.

        Raises:
            KeyringError: the files can't be renamed.
        """
        with self._locked(fcntl.LOCK_SH):
            if self._staged(vm) != key:
                return False
        with self._locked():
            # Looked at again: a state and the engine may see at the same time that the VM has it.
            if self._staged(vm) != key or not self.exists(vm):
                return False
            try:
                forget(self._path(vm, _OLD))
                os.link(self._path(vm), self._path(vm, _OLD), follow_symlinks=False)
                os.utime(self._path(vm, _OLD), follow_symlinks=False)
                # The one step that counts; before it both keys work as staged, after it as handed.
                os.rename(self._path(vm, _STAGED), self._path(vm))
                sync_folder(self._folder)
            except OSError as err:
                raise KeyringError(f"can't store the new key of {vm}: {err.strerror}") from err
        return True

    def retire_old(self, vm, key, overlap):
        """Note that a VM used a key: if it is the new one, the old one's days are numbered.

        Args:
            vm: str, a checked name.
            key: bytes.
            overlap: int, seconds, as for :meth:`accepted`.

        Raises:
            KeyringError: it can't be noted.
        """
        if not os.path.lexists(self._path(vm, _OLD)):
            return
        with self._locked():
            if not self._old_works(vm, overlap) or self._read(vm) != key:
                return
            path = self._path(vm, _OLD)
            try:
                replaced_at = min(os.stat(path, follow_symlinks=False).st_mtime, time.time() - overlap + _AFTER_FIRST_USE)
                os.utime(path, (replaced_at, replaced_at), follow_symlinks=False)
            except OSError as err:
                raise KeyringError(f"can't note the use of the new key of {vm}: {err.strerror}") from err

    def made_at(self, vm):
        """Say when a VM's newest key was stored.

        Args:
            vm: str, a checked name.

        Returns:
            float, seconds since the epoch.

        Raises:
            KeyringError: there is none.
        """
        try:
            return os.stat(self._path(vm, _STAGED if self.staged(vm) else _SUFFIX), follow_symlinks=False).st_mtime
        except OSError as err:
            raise KeyringError(f"dom0 has no key for {vm}: {err.strerror}") from None

    def has_old(self, vm):
        """Say whether a replaced key of a VM is kept."""
        return os.path.lexists(self._path(vm, _OLD))

    def drop_old(self, vm, overlap):
        """Remove a VM's replaced key if it doesn't work any more, and a staged one that can't be used.

        Args:
            vm: str, a checked name.
            overlap: int, seconds, as for :meth:`accepted`.

        Raises:
            KeyringError: one can't be looked at or removed.
        """
        if not self.has_old(vm) and not os.path.lexists(self._path(vm, _STAGED)):
            return
        with self._locked():
            if self.has_old(vm) and not self._old_works(vm, overlap):
                self._forget(vm, _OLD)
            if self._waiting(vm) is None:
                self._forget(vm, _STAGED)

    def fingerprints(self, vm=None):
        """Show which keys there are.

        Args:
            vm: str, a checked name, to look at that VM's alone; each key is compared with all others.

        Returns:
            dict of VM name to a dict: ``fingerprint`` (str), or ``problem`` (str) when the key is refused; ``next`` (str) when
            a new key waits to be handed over.
        """
        shown = {}
        for name in self.names():
            if vm not in (None, name):
                continue
            try:
                shown[name] = {"fingerprint": fingerprint(self.get(name))}
                staged = self.staged(name)
                if staged:
                    shown[name]["next"] = fingerprint(staged)
            except KeyringError as err:
                shown[name] = {"problem": str(err)}
        return shown

    def strangers(self):
        """List what lies in the folder and is no key.

        Returns:
            list of str, names.

        Raises:
            KeyringError: the folder can't be read.
        """
        files = self._files()
        ours = {vm + suffix for vm, suffix in files} | {vm + _BOUND for vm, _ in files}
        return sorted(set(self._entries()) - ours)

    def bound(self, vm):
        """Say which qube a VM's key is for.

        Args:
            vm: str, a checked name.

        Returns:
            str, a UUID; empty when that was never noted.

        Raises:
            KeyringError: it can't be read.
        """
        try:
            uuid = read_bounded(self._path(vm, _BOUND), _UUID_MAX).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return ""
        except (OSError, PullError) as err:
            raise KeyringError(f"can't tell which qube the key of {vm} is for: {err}") from err
        if not uuid:
            raise KeyringError(f"can't tell which qube the key of {vm} is for: {self._path(vm, _BOUND)} is empty or no plain file; in dom0: qvm_remote.bind {vm}")
        return uuid

    def bind(self, vm, uuid):
        """Note which qube a VM's key is for.

        Args:
            vm: str, a checked name that has a key.
            uuid: str.

        Raises:
            KeyringError: it has none, or it can't be noted.
        """
        with self._locked():
            self._read(vm)
            self._bind(vm, uuid)

    def _bind(self, vm, uuid):
        try:
            write_durably(self._path(vm, _BOUND), uuid.encode("ascii") + b"\n", 0o600)
        except OSError as err:
            raise KeyringError(f"can't note which qube the key of {vm} is for: {err.strerror}") from err

    def put(self, vm, untrusted_key, record=None, uuid=""):
        """Store a VM's key, in place of the one it had.

        Args:
            vm: str.
            untrusted_key: bytes or str, 64 hex digits.
            record: callable of its fingerprint, called once it is checked and before it is stored; what it raises prevents that.
            uuid: str, the qube it is for; empty for the first one that is seen under this name.

        Returns:
            str, the key's fingerprint.

        Raises:
            PullError: the name is no VM's; KeyringError: the key is malformed or another VM's, or can't be stored.
        """
        check_vm_name(vm)
        raw = untrusted_key.encode("utf-8", "surrogatepass") if isinstance(untrusted_key, str) else untrusted_key
        key = parse_key(raw.strip(b"\r\n"))
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
        except OSError as err:
            raise KeyringError(f"can't create {self._folder}: {err.strerror}") from err
        with self._locked():
            # A key that is cut off from what it belongs to is to be refused, and not believed of another qube: so where another one's
            # UUID stands, the key comes first, and where none does, which would make it anybody's, the UUID.
            is_first = not _is_there(self._path(vm, _BOUND))
            self._store(vm, key, _SUFFIX, record, uuid if is_first else "")
            if uuid and not is_first:
                self._bind(vm, uuid)
            self._forget(vm, _STAGED, _OLD, *(() if uuid else (_BOUND,)))
        return fingerprint(key)

    def remove(self, vm):
        """Remove a VM's keys; from now on everything it asks for is refused.

        Args:
            vm: str.

        Returns:
            bool, whether there was one.

        Raises:
            PullError: the name is no VM's; KeyringError: it can't be removed.
        """
        check_vm_name(vm)
        if not _is_there(self._folder):
            return False
        # Under the lock: a staged key that becomes the key at this moment would be one that nobody removes.
        with self._locked():
            had_one = any(os.path.lexists(self._path(vm, suffix)) for suffix in (_SUFFIX, _STAGED, _OLD))
            # The key itself goes first: without it the others are never looked at.
            self._forget(vm, _SUFFIX, _STAGED, _OLD, _BOUND)
        return had_one

    @contextlib.contextmanager
    def _locked(self, how=fcntl.LOCK_EX):
        """Hold the folder, among all processes and threads; not to be entered twice."""
        self.check_folder()
        fd = None
        try:
            try:
                fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                fcntl.flock(fd, how)
            except OSError as err:
                raise KeyringError(f"can't lock {self._folder}: {err.strerror}") from err
            yield
        finally:
            if fd is not None:
                os.close(fd)

    def _get(self, vm):
        key = self._read(vm)
        # Looked at again and again: a shared key must not work until the next restart.
        other = self._other_with(vm, key)
        if other:
            raise KeyringError(f"the keys of {vm} and {other} are the same; give each VM its own")
        return key

    def _staged(self, vm):
        return self._usable(vm, _STAGED)

    def _waiting(self, vm):
        """The staged key, as of :meth:`_usable`; but one that can't be read now is not taken for none, since the VM may have it."""
        try:
            return self._read(vm, _STAGED)
        except _Unread:
            raise
        except KeyringError:
            return None

    def _old(self, vm):
        return self._usable(vm, _OLD)

    def _usable(self, vm, suffix):
        """A key that there may be; one that can't be used is as good as none, and keeps no other from being used."""
        try:
            return self._read(vm, suffix)
        except KeyringError:
            return None

    def _store(self, vm, key, suffix, record=None, uuid=""):
        other = self._other_with(vm, key)
        if other:
            raise KeyringError(f"this is already the key of {other}; give each VM its own")
        if record:
            record(fingerprint(key))
        if uuid:
            self._bind(vm, uuid)
        try:
            write_durably(self._path(vm, suffix), key.hex().encode("ascii") + b"\n", 0o600)
        except OSError as err:
            raise KeyringError(f"can't store the key of {vm}: {err.strerror}") from err

    def _forget(self, vm, *suffixes):
        try:
            for suffix in suffixes:
                forget(self._path(vm, suffix))
            sync_folder(self._folder)
        except OSError as err:
            raise KeyringError(f"can't remove the key of {vm}: {err.strerror}") from err

    def _old_works(self, vm, overlap):
        try:
            age = time.time() - os.stat(self._path(vm, _OLD), follow_symlinks=False).st_mtime
        except FileNotFoundError:
            return False
        except OSError as err:
            raise KeyringError(f"can't tell how long ago the key of {vm} was replaced: {err.strerror}") from err
        # A clock that was set back must not give it a second life.
        return 0 <= age <= overlap

    def _path(self, vm, suffix=_SUFFIX):
        return os.path.join(self._folder, vm + suffix)

    def check_folder(self):
        """See that the folder is there, and nobody's but root's.

        Raises:
            KeyringError: it isn't.
        """
        try:
            info = os.lstat(self._folder)
            is_shown = os.path.realpath(self._folder).startswith("/srv/")
        except FileNotFoundError:
            raise KeyringError("dom0 has no key for any VM (the key folder does not exist)") from None
        except OSError as err:
            raise KeyringError(f"can't read {self._folder}: {err.strerror}") from err
        if is_shown:
            raise KeyringError(f"{self._folder} lies under /srv, of which management VMs get a copy; keys must lie elsewhere")
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise KeyringError(f"{self._folder} must be a folder of mode 0700 owned by root; run: chown root DIR; chmod 0700 DIR")

    def _read(self, vm, suffix=_SUFFIX):
        try:
            info, data = _look_into(self._path(vm, suffix), os.O_NOFOLLOW)
        except FileNotFoundError:
            raise KeyringError(f"dom0 has no key for {vm}") from None
        except OSError as err:
            # A link is none, and stays one.
            unread = KeyringError if err.errno == errno.ELOOP else _Unread
            raise unread(f"can't read the key of {vm}: {err.strerror}") from err
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise KeyringError(f"the key file of {vm} must be a plain file of mode 0600 owned by root; check it, then: chown root; chmod 0600")
        try:
            return parse_key(data)
        except KeyringError as err:
            raise KeyringError(f"the key file of {vm} can't be used: {err}") from None

    def _other_with(self, vm, key):
        """Find another VM that has this key (or had, or is to have it), however badly its file is protected."""
        # Before the files are read: what changes while they are is noticed the next time.
        seen, newest = self._look()
        known, owners = self._owners
        if seen != known:
            owners = self._read_owners()
            # A clock of the file system that stands still for a moment would hide a change within it.
            self._owners = (seen if abs(time.time() - newest) > _CTIME_STEP else None, owners)
        return min(owners.get(sha256(key), set()) - {vm}, default=None)

    def _look(self):
        """What tells whether any file has changed since it was read, and the time of the newest change."""
        seen, newest = [], 0.0
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    info = entry.stat(follow_symlinks=False)
                    seen.append((entry.name, info.st_ino, info.st_size, info.st_ctime_ns))
                    newest = max(newest, info.st_ctime)
        except OSError as err:
            raise KeyringError(f"can't read {self._folder}: {err.strerror}") from err
        return seen, newest

    def _read_owners(self):
        owners = {}
        for vm, suffix in self._files():
            try:
                owners.setdefault(sha256(parse_key(_look_into(self._path(vm, suffix))[1])), set()).add(vm)
            except OSError as err:
                # No matter of that file: nobody knows whose key it is.
                if err.errno in _LACKING:
                    raise KeyringError(f"can't compare the key of {vm} with the others: {err.strerror}") from err
            except KeyringError:
                continue
        return owners

    def _files(self):
        """List (VM, suffix) of all key files."""
        found = []
        for entry in self._entries():
            for suffix in (_SUFFIX, _STAGED, _OLD):
                if not entry.endswith(suffix):
                    continue
                try:
                    found.append((check_vm_name(entry[: -len(suffix)]), suffix))
                except PullError:
                    # Not ours; it names no VM, so nobody is let in by it.
                    continue
        return found

    def _entries(self):
        try:
            return os.listdir(self._folder)
        except FileNotFoundError:
            return []
        except OSError as err:
            raise KeyringError(f"can't read {self._folder}: {err.strerror}") from err


def _is_there(path):
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as err:
        raise KeyringError(f"can't look at {path}: {err.strerror}") from err
    return True


def _look_into(path, flags=0):
    """What lies there, and its beginning if that is a plain file: a FIFO must not keep all others waiting."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    try:
        info = os.fstat(fd)
        return info, os.read(fd, _READ_MAX) if stat.S_ISREG(info.st_mode) else b""
    finally:
        os.close(fd)
