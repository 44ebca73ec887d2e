# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's side, put together: what it keeps, and what it does with a request, from the VM's key to the result's delivery.

Both the execution module and the pull loop work through it. It never talks to a VM.
"""

from __future__ import annotations

import json
import os
import threading

from .access import Access
from .config import make_config
from .errors import ConfigError
from .execution import Execution
from .intake import Intake
from .results import Results
from .stores import Stores

_shared = {}
_shared_lock = threading.Lock()


def shared(settings):
    """dom0's side for some settings, one for each process: engine and execution module work on the same one.

    Args:
        settings: dict or None, as for :func:`pullrpc.config.make_config`.

    Returns:
        Dom0

    Raises:
        ConfigError: a setting is wrong.
    """
    name = _shared_name(settings)
    with _shared_lock:
        if name not in _shared:
            _shared[name] = Dom0(make_config(settings))
        return _shared[name]


def reconfigure(settings, new_settings):
    """Have this process's :class:`Dom0` go on under other settings; what runs is not disturbed.

    Args:
        settings, new_settings: dict, as for :func:`shared`.

    Returns:
        Dom0

    Raises:
        ConfigError: a setting is wrong, or can't be changed while the service runs.
    """
    config = make_config(new_settings)
    dom0 = shared(settings)
    for name in ("key_dir", "state_dir", "run_dir", "audit_log"):
        if getattr(config, name) != getattr(dom0.config, name):
            raise ConfigError(f"{name} can't be changed while the service runs; restart it")
    with _shared_lock:
        dom0.config = config
        dom0.audit.reconfigure(config.syslog, config.audit_files)
        _shared[_shared_name(new_settings)] = dom0
    return dom0


def _shared_name(settings):
    # With the pid: a forked process must not use its parent's database connection.
    return os.getpid(), json.dumps(settings, sort_keys=True, default=str)


class Dom0(Stores):
    """What dom0 keeps, and its parts that work with that.

    Args:
        config: Config.
    """

    def __init__(self, config):
        super().__init__(config)
        self.intake = Intake(self)
        self.results = Results(self)
        self.execution = Execution(self, self.results)
        self.access = Access(self)
