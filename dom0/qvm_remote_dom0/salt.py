# SPDX-License-Identifier: GPL-2.0-or-later
"""Functions of the execution module, called through Salt."""

import json
import re
import subprocess

from pullrpc.errors import PullError

#: What salt-call puts before the text of an error.
_ERROR = re.compile(r"Error running '[^']*': (.*)", re.DOTALL)


def call(function, *words, config_dir=None, key=None, **named):
    """Call a function.

    Args:
        function: str, its name in the module qvm_remote.
        words: JSON data, its arguments.
        config_dir: str, of which minion; None for dom0's own, whose pillar an apply works with.
        key: bytes for its stdin; None to leave it ours. Nothing secret may be among the arguments.
        named: JSON data, more arguments.

    Returns:
        what it returns.

    Raises:
        PullError: it failed; the text is what it said.
    """
    # As JSON, which is YAML: a qube may be called "on".
    given = [*map(json.dumps, words), *(f"{name}={json.dumps(value)}" for name, value in named.items())]
    where = ["--config-dir", config_dir] if config_dir else []
    argv = ["salt-call", "--local", "--out=json", "--log-level=quiet", "--retcode-passthrough", *where, f"qvm_remote.{function}", *given]
    try:
        done = subprocess.run(argv, input=key, capture_output=True, check=False)
    except OSError as err:
        raise PullError(f"salt-call can't be started: {err.strerror}") from None
    try:
        return json.loads(done.stdout)["local"]
    except (ValueError, KeyError, TypeError):
        raise PullError(_reason(done.stderr.decode("utf-8", "replace") or done.stdout.decode("utf-8", "replace"))) from None


def _reason(said):
    found = _ERROR.search(said)
    lines = (found[1] if found else said).strip().splitlines()
    return lines[0 if found else -1] if lines else "Salt said nothing; see /var/log/salt/minion"
