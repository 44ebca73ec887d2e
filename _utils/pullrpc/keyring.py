# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's keys: ``<key_dir>/<vm>.key``, 0600 in a folder 0700, both owned by whoever runs us (root).

A key that is malformed, readable by others, or the same as another VM's is refused both when it is stored and each
time it is used. Keys are never logged, returned to a caller outside this package's checks, or put into an error.
"""

from __future__ import annotations

import os
import stat

from .errors import KeyringError, PullError
from .files import forget, write_whole
from .ids import check_vm_name
from .tokens import fingerprint, parse_key

_SUFFIX = ".key"
#: A key file is 64 digits and a newline; one byte more shows that it is too long.
_READ_MAX = 66


class Keyring:
    """The key folder.

    Args:
        folder: str, absolute.
    """

    def __init__(self, folder):
        self._folder = folder

    def names(self):
        """List the VMs that have a key file, good or not.

        Returns:
            list of str; empty when there is no folder.
        """
        found = []
        try:
            entries = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        except OSError as err:
            raise KeyringError(f"can't read {self._folder}: {err.strerror}") from err
        for entry in sorted(entries):
            if not entry.endswith(_SUFFIX):
                continue
            try:
                found.append(check_vm_name(entry[: -len(_SUFFIX)]))
            except PullError:
                continue
        return found

    def get(self, vm):
        """Fetch a VM's key.

        Args:
            vm: str, a checked name.

        Returns:
            bytes, 32.

        Raises:
            KeyringError: there is none, or it must not be used; the text says why.
        """
        self._check_folder()
        key = self._read(vm)
        # Every other key is read each time: a fleet has dozens of small files, and a shared key must not work until the next restart.
        for other in self.names():
            if other != vm and self._same(other, key):
                raise KeyringError(f"the keys of {vm} and {other} are the same; give each VM its own")
        return key

    def fingerprints(self):
        """Show which keys there are.

        Returns:
            dict of VM name to a dict: ``fingerprint`` (str), or ``problem`` (str) when the key is refused.
        """
        shown = {}
        for vm in self.names():
            try:
                shown[vm] = {"fingerprint": fingerprint(self.get(vm))}
            except KeyringError as err:
                shown[vm] = {"problem": str(err)}
        return shown

    def put(self, vm, untrusted_key):
        """Store a VM's key, in place of the one it had.

        Args:
            vm: str.
            untrusted_key: bytes or str, 64 hex digits.

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
        self._check_folder()
        for other in self.names():
            if other != vm and self._same(other, key):
                raise KeyringError(f"this is already the key of {other}; give each VM its own")
        try:
            write_whole(self._path(vm), key.hex().encode("ascii") + b"\n", 0o600)
        except OSError as err:
            raise KeyringError(f"can't store the key of {vm}: {err.strerror}") from err
        return fingerprint(key)

    def remove(self, vm):
        """Remove a VM's key; from now on everything it asks for is refused.

        Args:
            vm: str.

        Returns:
            bool, whether there was one.

        Raises:
            PullError: the name is no VM's; KeyringError: it can't be removed.
        """
        path = self._path(check_vm_name(vm))
        if not os.path.lexists(path):
            return False
        try:
            forget(path)
        except OSError as err:
            raise KeyringError(f"can't remove the key of {vm}: {err.strerror}") from err
        return True

    def _path(self, vm):
        return os.path.join(self._folder, vm + _SUFFIX)

    def _check_folder(self):
        try:
            info = os.lstat(self._folder)
        except FileNotFoundError:
            raise KeyringError("dom0 has no key for any VM (the key folder does not exist)") from None
        except OSError as err:
            raise KeyringError(f"can't read {self._folder}: {err.strerror}") from err
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise KeyringError(f"{self._folder} must be a folder of mode 0700 owned by root; run: chown root DIR; chmod 0700 DIR")

    def _read(self, vm):
        path = self._path(vm)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise KeyringError(f"dom0 has no key for {vm}") from None
        except OSError as err:
            raise KeyringError(f"can't read the key of {vm}: {err.strerror}") from err
        with os.fdopen(fd, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
                raise KeyringError(f"the key file of {vm} must be a plain file of mode 0600 owned by root; check it, then: chown root; chmod 0600")
            data = file.read(_READ_MAX)
        try:
            return parse_key(data)
        except KeyringError as err:
            raise KeyringError(f"the key file of {vm} can't be used: {err}") from None

    def _same(self, other, key):
        """Whether another VM's file holds this key, however badly that file is protected."""
        try:
            with open(self._path(other), "rb") as file:
                return parse_key(file.read(_READ_MAX)) == key
        except (OSError, KeyringError):
            return False
