# SPDX-License-Identifier: GPL-2.0-or-later
"""A probe (see probe.py) somewhere, as an object."""

import json
import os
import subprocess

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "probe.py"), encoding="utf-8") as _file:
    _PROGRAM = _file.read()

_END_WAIT = 3


class ProbeError(Exception):
    """What was to be measured failed; the text says how."""


class Probe:
    """An interpreter that measures where it stands.

    Args:
        start: callable that takes the words of a command and subprocess.Popen's options, and starts it there.
    """

    def __init__(self, start):
        self._process = start("/usr/bin/python3", "-IS", "-c", _PROGRAM, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, do, **request):
        """Have something done there; see the functions of probe.py.

        Returns:
            dict

        Raises:
            ProbeError
        """
        self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the probe has ended"}
        if "error" in answer:
            raise ProbeError(answer["error"])
        return answer

    def close(self):
        """End it."""
        self._process.stdin.close()
        try:
            self._process.wait(_END_WAIT)
        except subprocess.TimeoutExpired:
            # It was in the midst of something: we were interrupted.
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
