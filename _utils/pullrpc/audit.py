# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's audit log: one JSON line for each thing that was asked, refused, run and delivered.

Every line is printable ASCII of bounded length, whatever a VM sent; no key, token or output is ever in it. The lines are a
chain (see chain.py), so that none can go, change or move unseen. A line that can't be written is an error: what can't be
recorded isn't run.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time

from .audit_files import LET_GO, commands_folder, last_rotated
from .chain import BODY_MAX, Chain
from .commands import Commands
from .errors import AuditError
from .syslog import Syslog

#: Most characters of a command that are recorded, and most that its line may have of it: a character can take twelve of those. Its digest
#: stands beside them. Of what was refused nothing more is kept, nor does it show as much.
_COMMAND_SHOWN, _COMMAND_WRITTEN, _REFUSED_SHOWN = 1024, 2048, 256
#: Most characters of a refusal's reason that are recorded.
_REASON_SHOWN = 256
#: Most characters of a rule that are recorded.
_RULE_SHOWN = 256
#: What the copy for the system's log has of a line's fields. Others read that log: nothing that has words of a command, or a digest by which
#: one could be guessed, and no field that is new and was not thought of.
_COPIED = ("as", "answer", "code", "count", "exit", "fingerprint", "seconds", "status", "uuid")
#: Refusals recorded for one VM within a minute, of those whose token fits and of all others; the rest is counted and recorded as one line.
_REFUSALS_PER_MINUTE = 60
_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


class AuditLog:
    """The audit log; may be used from several threads, and beside other processes.

    Args:
        path: str; its folder is created 0700, the file 0600. Its head (``.head``) and whole commands (``.commands``) lie beside it.
        syslog: bool, whether the system's log is told of each line, where there is one: what happened, not the command.
        files: int, how many files are kept that were rotated away.
    """

    def __init__(self, path, syslog=False, files=12):
        self._chain = Chain(path, lambda: last_rotated(path), files)
        self._lock = threading.Lock()
        #: Minute and count of the last refusals, by VM and whether they were of a token that fits: whoever has no key hides nothing of
        #: what a key was used for.
        self._refusals = {}
        self._syslog = Syslog()
        self._to_syslog = syslog
        self._commands = Commands(commands_folder(path))

    def reconfigure(self, syslog, files):
        """Go on under other settings.

        Args:
            syslog, files: as at the beginning.
        """
        self._to_syslog, self._chain.keep = syslog, files

    def write(self, what, vm, cid="-", sync=False, **fields):
        """Append one line.

        Args:
            what: str, one word.
            vm: str, a checked name.
            cid: str, a checked id, or ``-``.
            sync: bool, whether it is to be on the disk on return.
            fields: JSON data.

        Raises:
            AuditError: it can't be written.
        """
        self.write_all([(what, vm, cid, fields)], sync)

    def write_all(self, records, sync=False):
        """Append lines, all by one write.

        Args:
            records: list of (what, vm, cid, fields), as for :meth:`write`; ``fields`` is a dict.
            sync: bool, whether they are to be on the disk on return.

        Raises:
            AuditError: none of them could be written, or they could not be forced to the disk.
        """
        stamp = _stamp(time.time())
        bodies = [_body(stamp, *record) for record in records]
        written = self._chain.append(bodies, sync)
        if self._to_syslog:
            for (what, vm, cid, fields), (seq, digest) in zip(records, written):
                # The digest first: with it this copy says what the log has to hold, even if all of that was made anew.
                copied = {name: value for name, value in fields.items() if name in _COPIED}
                self._syslog.send(f"{what} {vm} {cid} line {seq} sha256 {digest} {_dump(copied)}")

    def refusal(self, vm, cid, refused):
        """Append a refusal, at a bounded rate: a VM must not be able to fill dom0's disk by being refused.

        Args:
            vm: str.
            cid: str, a checked id, or ``-``.
            refused: Refused.

        Returns:
            bool, False when it was only counted.

        Raises:
            AuditError: it can't be written.
        """
        minute = _minute()
        self.tell_not_shown()
        with self._lock:
            who = vm, refused.command is not None
            _, count = self._refusals.get(who, (minute, 0))
            self._refusals[who] = (minute, count + 1)
        if count >= _REFUSALS_PER_MINUTE:
            return False
        about = {} if refused.command is None else _describe(refused.command, _REFUSED_SHOWN)
        if refused.is_claimed is False:
            about["claimed"] = False
        self.write("refused", vm, cid, code=refused.code, reason=str(refused)[:_REASON_SHOWN], **about)
        return True

    def tell_not_shown(self, at_once=False):
        """Append how many refusals of past minutes were counted only.

        Args:
            at_once: bool, whether this minute has to be told of, too: nobody counts on.

        Raises:
            AuditError: it can't be written; it is tried again.
        """
        minute = _minute()
        with self._lock:
            past = {who: one for who, one in self._refusals.items() if at_once or one[0] != minute}
            self._refusals = {who: one for who, one in self._refusals.items() if who not in past}
        records = [("refusals-not-shown", vm, "-", {"count": count - _REFUSALS_PER_MINUTE}) for (vm, _), (_, count) in past.items() if count > _REFUSALS_PER_MINUTE]
        try:
            if records:
                self.write_all(records)
        except AuditError:
            with self._lock:
                # What was counted meanwhile counts as well.
                for who, (at, count) in past.items():
                    self._refusals[who] = (at, count + self._refusals.get(who, (0, 0))[1])
            raise

    def keep_command(self, vm, cid, raw, bytes_max, days):
        """Keep a command beside the log; on return it is on the disk.

        Args:
            vm, cid: str, checked.
            raw: bytes.
            bytes_max: int, most that all of them may take.
            days: int, for how long they are kept.

        Raises:
            AuditError: it can't be kept, or what goes for it can't be recorded.
        """
        self._commands.keep(vm, cid, raw, bytes_max, days, self._let_go)

    def prune_commands(self, bytes_max, days):
        """Remove whole commands that are too old or too much.

        Args:
            bytes_max, days: as for :meth:`keep_command`.

        Raises:
            AuditError: that can't be recorded, or they can't be removed.
        """
        self._commands.prune(bytes_max, days, self._let_go)

    def _let_go(self, commands):
        """Record that whole commands go, before they do: one that is missing without this was removed by somebody else."""
        self.write_all([(LET_GO, vm, cid, {}) for vm, cid in commands], sync=True)


def describe_command(command):
    """What the log says of a command.

    Args:
        command: str.

    Returns:
        dict: ``command`` (its beginning), ``size`` in bytes and ``sha256`` (of all of it); ``whole`` is False when there is more.
    """
    shown = _describe(command, _COMMAND_SHOWN)
    return shown if len(shown["command"]) == len(command) else {**shown, "whole": False}


def _describe(command, length):
    raw = command.encode("utf-8")
    shown = command[:length]
    if len(_dump(shown)) > _COMMAND_WRITTEN:
        room = _COMMAND_WRITTEN
        for place, character in enumerate(shown):
            room -= len(_dump(character)) - 2
            if room < 0:
                shown = shown[:place]
                break
    return {"command": shown, "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def describe_rule(rule):
    """What the log says of the rule that let a command through.

    Args:
        rule: str.

    Returns:
        str
    """
    return rule[:_RULE_SHOWN]


def _minute():
    return int(time.monotonic() // 60)


def _stamp(now):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


def _body(stamp, what, vm, cid, fields):
    body = _dump({"time": stamp, "what": what, "vm": vm, "id": cid, **fields})
    if len(body) > BODY_MAX:
        body = _dump({"time": stamp, "what": what, "vm": vm, "id": cid, "cut": True})
    return body.encode("ascii")


def _dump(data):
    # JSON takes DEL for printable.
    return _encode(data).replace("\x7f", "\\u007f")
