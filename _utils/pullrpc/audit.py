# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's audit log: one JSON line for each thing that was asked, refused, run and delivered.

Every line is printable ASCII of bounded length, whatever a VM sent; no key, token or output is ever in it.
A line that can't be written is an error: what can't be recorded isn't run.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time

from .errors import AuditError

#: Most characters of a command that are recorded; its digest stands beside them.
_COMMAND_SHOWN = 1024
#: Longest line, bytes: a command of 4-byte characters, escaped, and the other fields.
_LINE_MAX = 16384
#: Refusals recorded for one VM within a minute; the rest is counted and recorded as one line.
_REFUSALS_PER_MINUTE = 60


class AuditLog:
    """The audit log; may be used from several threads.

    Args:
        path: str; its folder is created 0700, the file 0600.
    """

    def __init__(self, path):
        self._path = path
        self._lock = threading.Lock()
        self._refusals = {}

    def write(self, what, vm, cid="-", **fields):
        """Append one line.

        Args:
            what: str, one word.
            vm: str, a checked name.
            cid: str, a checked id, or ``-``.
            fields: JSON data.

        Raises:
            AuditError: it can't be written.
        """
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        line = json.dumps({"time": stamp, "what": what, "vm": vm, "id": cid, **fields}, ensure_ascii=True, separators=(",", ":"))
        if len(line) > _LINE_MAX:
            line = json.dumps({"time": stamp, "what": what, "vm": vm, "id": cid, "cut": True})
        with self._lock:
            try:
                os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
                fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    data = line.encode("ascii") + b"\n"
                    if os.write(fd, data) != len(data):
                        raise AuditError(f"the audit log {self._path} can't be written: the disk is full")
                finally:
                    os.close(fd)
            except OSError as err:
                raise AuditError(f"the audit log {self._path} can't be written: {err.strerror}") from err

    def refusal(self, vm, cid, code):
        """Append a refusal, at a bounded rate: a VM must not be able to fill dom0's disk by being refused.

        Args:
            vm: str.
            cid: str, a checked id, or ``-``.
            code: str, one word.

        Returns:
            bool, False when it was only counted.

        Raises:
            AuditError: it can't be written.
        """
        minute = int(time.monotonic() // 60)
        with self._lock:
            last, count = self._refusals.get(vm, (minute, 0))
            if last != minute:
                skipped, count = max(0, count - _REFUSALS_PER_MINUTE), 0
            else:
                skipped = 0
            self._refusals[vm] = (minute, count + 1)
        if skipped:
            self.write("refusals-not-shown", vm, count=skipped)
        if count >= _REFUSALS_PER_MINUTE:
            return False
        self.write("refused", vm, cid, code=code)
        return True


def describe_command(command):
    """What the log says of a command.

    Args:
        command: str.

    Returns:
        dict: ``command`` (its beginning) and ``sha256`` (of all of it).
    """
    raw = command.encode("utf-8")
    return {"command": command[:_COMMAND_SHOWN], "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
