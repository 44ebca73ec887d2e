# SPDX-License-Identifier: GPL-2.0-or-later
"""Run single commands one after the other, without a shell, up to the first that fails: what a script is under rules.

A program of its own, started in the sandbox with the path of a file that holds a JSON array of arrays of words; it comes as text,
by ``python3 -I -S -c``. Imports little, and nothing of this package. Its exit code is that of the last command that ran.
"""

import json
import os
import sys

#: As a shell has it: found but not to be executed, not found.
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127


def main(path):
    """Run them.

    Args:
        path: str.

    Returns:
        int, the exit code.
    """
    with open(path, encoding="ascii") as file:
        steps = json.load(file)
    for at, argv in enumerate(steps, 1):
        code = _run(argv)
        if code:
            left = f"; {len(steps) - at} more were not run" if at < len(steps) else ""
            sys.stderr.write(f"qvm-remote: command {at} of {len(steps)} ({argv[0]}) ended with exit code {code}{left}\n")
            return code
    return 0


def _run(argv):
    try:
        pid = os.posix_spawnp(argv[0], argv, os.environ)
    except OSError as err:
        sys.stderr.write(f"qvm-remote: {argv[0]}: {err.strerror}\n")
        return _NOT_FOUND if isinstance(err, (FileNotFoundError, NotADirectoryError)) else _NOT_EXECUTABLE
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
