# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things lie in a VM, under ``~/.qvm-remote``. Used in the VM only, by client and agent."""

import os
import stat

from .errors import PullError

#: Folders of the queue, relative to the base.
_FOLDERS = ("queue", "queue/pending", "queue/running", "queue/results", "history")
#: What may follow a command id in ``pending/``; the bare id is the command itself.
REQUEST_PARTS = ("", ".auth", ".in")
#: What follows a command id in ``results/``; ``.exit`` is written last.
RESULT_PARTS = (".out", ".err", ".meta", ".exit")
#: What :meth:`Queue.problems` may find; dom0 takes no other word from an agent.
PROBLEMS = ("folder-missing", "folder-symlink", "folder-owner", "folder-mode", "key-missing", "key-symlink", "key-owner", "key-mode", "key-malformed")


class Queue:
    """The queue of one VM's user.

    Args:
        base: str, the folder (default: ``~/.qvm-remote`` of this user).

    Raises:
        PullError: this user has no home.
    """

    def __init__(self, base=None):
        self.base = base or os.path.join(_home(), ".qvm-remote")
        self.key = os.path.join(self.base, "auth.key")
        self.audit = os.path.join(self.base, "audit.log")
        self.limits = os.path.join(self.base, "dom0-limits")
        self.doorbell = os.path.join(self.base, "doorbell")
        self.agent_lock = os.path.join(self.base, "agent.lock")
        self.seen = os.path.join(self.base, "dom0-seen")
        self.history = os.path.join(self.base, "history")

    def make_folders(self):
        """Create what is missing, 0700; take others' rights away. A symbolic link is followed nowhere.

        Raises:
            PullError: a folder isn't ours, is a link, or can't be made.
        """
        try:
            for folder in ("", *_FOLDERS):
                path = os.path.join(self.base, folder).rstrip("/")
                problem = _folder_problem(path)
                if problem == "folder-missing":
                    os.makedirs(path, mode=0o700, exist_ok=True)
                elif problem == "folder-mode":
                    os.chmod(path, 0o700)
                elif problem == "folder-owner":
                    raise PullError(f"{path} belongs to another user; run qvm-remote as its owner")
                elif problem:
                    raise PullError(f"{path} must be a folder, and no symbolic link; move it away")
        except OSError as err:
            raise PullError(f"can't create the queue under {self.base}: {err.strerror}") from err

    def problems(self):
        """Say what is wrong with folders and key; changes nothing.

        Returns:
            list of str, words of :data:`PROBLEMS`.
        """
        found = {_folder_problem(os.path.join(self.base, folder).rstrip("/")) for folder in ("", *_FOLDERS)}
        found.add(_problem(self.key, "key", stat.S_ISREG, 0o177))
        return sorted(found - {None})

    def pending(self, name=""):
        """Path of a name in ``queue/pending``."""
        return os.path.join(self.base, "queue", "pending", name)

    def running(self, name=""):
        """Path of a name in ``queue/running``."""
        return os.path.join(self.base, "queue", "running", name)

    def results(self, name=""):
        """Path of a name in ``queue/results``."""
        return os.path.join(self.base, "queue", "results", name)

    def part(self, cid, part):
        """Path of a part of a result that is not whole yet: ``out``, ``err`` or ``meta``."""
        return self.results(f".{cid}.{part}.part")

    def stream(self, cid):
        """Path of the list of the pieces that a running command has written so far, a line each: ``<seq> <part> <size> <mac>``."""
        return self.results(f".{cid}.stream")

    def bell(self, cid):
        """Path of the FIFO that wakes the client of a command."""
        return self.results(f"{cid}.bell")

    def rejected(self, name=""):
        """Path of a name in ``queue/rejected``: what lay in ``pending`` under a name that is no command id."""
        return os.path.join(self.base, "queue", "rejected", name)


def _home():
    home = os.environ.get("HOME", "")
    if home.startswith("/"):
        return home
    # Whoever started us has set none. Imported here: a user's shell always does.
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise PullError(f"user {os.getuid()} has no home folder for the queue; set HOME") from None


def _folder_problem(path):
    return _problem(path, "folder", stat.S_ISDIR, 0o077, 0o700)


def _problem(path, kind, is_kind, forbidden, needed=0):
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return f"{kind}-missing"
    except PermissionError:
        # Nobody may look into the folder that it is in.
        return "folder-mode"
    if not is_kind(info.st_mode):
        return f"{kind}-symlink"
    if info.st_uid != os.geteuid():
        return f"{kind}-owner"
    return f"{kind}-mode" if info.st_mode & forbidden or info.st_mode & needed != needed else None
