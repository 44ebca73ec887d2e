# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things lie in a VM, under ``~/.qvm-remote``. Used in the VM only, by client and agent."""

import os

from .errors import PullError

#: Folders of the queue, relative to the base.
_FOLDERS = ("queue", "queue/pending", "queue/running", "queue/results", "history")
#: What may follow a command id in ``pending/``; the bare id is the command itself.
REQUEST_PARTS = ("", ".auth", ".in")
#: What follows a command id in ``results/``; ``.exit`` is written last.
RESULT_PARTS = (".out", ".err", ".meta", ".exit")


class Queue:
    """The queue of one VM's user.

    Args:
        base: str, the folder (default: ``~/.qvm-remote`` of this user).
    """

    def __init__(self, base=None):
        self.base = base or os.path.join(os.path.expanduser("~"), ".qvm-remote")
        self.key = os.path.join(self.base, "auth.key")
        self.audit = os.path.join(self.base, "audit.log")
        self.limits = os.path.join(self.base, "dom0-limits")
        self.doorbell = os.path.join(self.base, "doorbell")
        self.agent_lock = os.path.join(self.base, "agent.lock")
        self.seen = os.path.join(self.base, "dom0-seen")
        self.history = os.path.join(self.base, "history")

    def make_folders(self):
        """Create what is missing, 0700, and refuse a base that others may enter.

        Raises:
            PullError: the base isn't ours or can't be made.
        """
        try:
            os.makedirs(self.base, mode=0o700, exist_ok=True)
            info = os.stat(self.base)
            if info.st_uid != os.geteuid():
                raise PullError(f"{self.base} belongs to another user; run qvm-remote as its owner")
            if info.st_mode & 0o077:
                os.chmod(self.base, 0o700)
            for folder in _FOLDERS:
                path = os.path.join(self.base, folder)
                if not os.path.isdir(path):
                    os.makedirs(path, mode=0o700, exist_ok=True)
        except OSError as err:
            raise PullError(f"can't create the queue under {self.base}: {err.strerror}") from err

    def pending(self, name=""):
        """Path of a name in ``queue/pending``."""
        return os.path.join(self.base, "queue", "pending", name)

    def running(self, name=""):
        """Path of a name in ``queue/running``."""
        return os.path.join(self.base, "queue", "running", name)

    def results(self, name=""):
        """Path of a name in ``queue/results``."""
        return os.path.join(self.base, "queue", "results", name)

    def rejected(self, name=""):
        """Path of a name in ``queue/rejected``: what lay in ``pending`` under a name that is no command id."""
        return os.path.join(self.base, "queue", "rejected", name)
