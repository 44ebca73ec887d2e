# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that can go wrong, by name. A message says what was wrong and what the reader can do.

No message ever holds a key, a token or a command's output.
"""


class PullError(Exception):
    """Base of all errors of this package; its text is meant for a user."""


class Refused(PullError):
    """dom0 will not run a request. The text is sent to the VM as the reason.

    Args:
        code: one short word for audit, events and tests (``token``, ``replay``, ...).
        message: the reason, in words that help whoever typed the command.

    Attributes:
        command: str, what is refused, once a token is known to fit; else None.
        is_claimed: bool, False for one that is in the audit log as accepted and could not be claimed; else None.
    """

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code
        self.command = self.is_claimed = None


class ConfigError(PullError):
    """A setting is unknown, of the wrong type or out of range. Nothing is started with it."""


class PillarError(PullError):
    """Pillar says something that can't be. Nothing of it is applied; the text names the place."""


class KeyringError(PullError):
    """A key is missing, malformed, shared or badly protected. The VM it belongs to is refused."""


class LedgerError(PullError):
    """The ledger can't be opened or written. Without it nothing runs: a replay could not be told."""


class LedgerDamaged(LedgerError):
    """The ledger is there and can't be believed. It may have forgotten what ran; only its owner can give it up.

    Args:
        message: what is wrong with it.
    """

    def __init__(self, message):
        super().__init__(f"{message}; nothing runs. In dom0, qvm_remote.ledger_check says how to mend that")
        self.what = message


class SpoolError(PullError):
    """A request or result can't be kept on dom0's disk."""


class AuditError(PullError):
    """The audit log can't be written. What can't be recorded isn't run."""


class SandboxError(PullError):
    """The sandbox could not be set up, or was broken from inside. Nothing runs outside it."""


class TransportError(PullError):
    """A VM could not be reached, or the list of VMs could not be read."""


class SessionBroken(PullError):
    """A session ended or its peer broke the protocol. Only this VM is affected."""


class AgentUnable(SessionBroken):
    """The VM's agent says that it can't do what it was asked; the session is sound, and may go on.

    Args:
        message: what it could not do.
        failed: dict of the ids of the results that did not reach it, if it was about results, to why; all others did.
    """

    def __init__(self, message, failed=None):
        super().__init__(message)
        self.failed = dict(failed or {})


class FrameError(SessionBroken):
    """A frame was malformed, over its bound or late."""


class ThreadError(PullError):
    """No thread could be started: dom0 has no room for one. Only what needed it is given up, and its client is told."""


class EngineBusy(PullError):
    """Another engine (or ``run_once``) holds the lock. Two of them never run side by side."""
