# SPDX-License-Identifier: GPL-2.0-or-later
"""The way to dom0: the program qvm-remote, started with an argument vector, and what its end means in words for an agent."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from asyncio.subprocess import DEVNULL, PIPE

import anyio
from mcp.server.mcpserver.exceptions import ToolError

#: qvm-remote's own exit codes.
_TIMEOUT, _FAILED = 124, 125
#: How long qvm-remote may take to give a request up, seconds.
_END_WAIT = 5
#: More than that no model reads with profit, characters.
_TEXT_MAX = 65536
#: Harmless in a shell; where dom0 has rules for this qube it is refused, because it needs one.
_NEEDS_SHELL = ":;:"
_REFUSED_SO = "no shell"
_PREFIXES = ("qvm-remote: error: ", "qvm-remote: ")


class RemoteError(ToolError):
    """dom0 refused, the command failed there, or dom0 can't be reached; the text says which, and is shown to the agent."""


class Dom0:
    """dom0, as far as its policy lets this qube go.

    Args:
        timeout: int, seconds that a command may run.
        program: str, qvm-remote.
    """

    def __init__(self, timeout, program="qvm-remote"):
        self._timeout = timeout
        self._limit = ("-t", str(timeout))
        self._program = program
        self._has_rules = False

    async def run(self, *argv):
        """Run one command with exactly these words.

        Args:
            argv: str, the program first.

        Returns:
            str, what it wrote to stdout.

        Raises:
            RemoteError
        """
        await self._require_rules()
        return self._output(await self._start(*self._limit, "-n", "--exec", "--", *argv), argv[0])

    async def run_script(self, text):
        """Run a script of single commands, one on each line, which dom0 judges as a whole.

        Args:
            text: str.

        Returns:
            str, what its commands wrote to stdout.

        Raises:
            RemoteError
        """
        await self._require_rules()
        return self._output(await self._start(*self._limit, data=text.encode("utf-8")), "the plan")

    async def ping(self):
        """See whether dom0 is there, and takes this qube's key.

        Returns:
            str, its answer in one line.

        Raises:
            RemoteError
        """
        # Without our limit, which a command may need, and a dom0 that does not answer would be waited for.
        return self._output(await self._start("ping"), "ping").strip()

    async def _require_rules(self):
        """Be no way to a dom0 that lets this qube do anything: what a plan promises would not be so there."""
        if self._has_rules:
            return
        done = await self._start(*self._limit, "-n", "--", _NEEDS_SHELL)
        if done.returncode == 0:
            raise RemoteError(
                "dom0 has no rules for this qube: it may run anything there, and nobody is asked. This server does nothing with that. "
                "Tell the user to give the qube a policy of rules in dom0's pillar"
            )
        if done.returncode != _FAILED or _REFUSED_SO not in _readable(done.stderr):
            self._output(done, "the first look at the policy")
        self._has_rules = True

    async def _start(self, *words, data=None):
        argv = [self._program, "-q", *words]
        try:
            # Our own stdin is the agent's: no child may read it.
            process = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL if data is None else PIPE, stdout=PIPE, stderr=PIPE)
        except OSError as err:
            raise RemoteError(f"{self._program} can't be started in this qube: {err.strerror}. Tell the user that its client is not installed here") from None
        try:
            out, err = await process.communicate(data)
        except BaseException:
            # Cancelled. Ended, not killed: so it takes its request back, and dom0 the question.
            if process.returncode is None:
                process.terminate()
            with anyio.move_on_after(_END_WAIT, shield=True):
                await process.wait()
            raise
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def _output(self, done, what):
        """What a command wrote, if it ended well.

        Raises:
            RemoteError: it did not.
        """
        code, said = done.returncode, _readable(done.stderr)
        if code == 0:
            return _readable(done.stdout)
        if code == _TIMEOUT:
            raise RemoteError(f"{what} ran into its time limit of {self._timeout} s in dom0 and was ended; it may have done a part. {said}".strip())
        if code == _FAILED:
            raise RemoteError(f"refused, or no answer: {_without_prefix(said)}\nDo not try to reach the same in another way. Tell the user what you wanted and why.")
        if code > 128:
            raise RemoteError(f"{what} was ended by signal {_signal_name(code - 128)}; it may have done a part. {said}".strip())
        shown = _readable(done.stdout)
        raise RemoteError("\n".join(filter(None, (f"{what} failed in dom0 with exit code {code}: {_without_prefix(said)}", shown and f"before that:\n{shown}"))))


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _without_prefix(text):
    for prefix in _PREFIXES:
        if text.startswith(prefix):
            return text[len(prefix) :]
    return text


def _readable(raw):
    """Bytes as text without control characters, and not more of it than a model can use."""
    text = "".join(char if char.isprintable() or char in "\n\t" else "?" for char in raw.decode("utf-8", "replace"))
    return text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}\n(cut after {_TEXT_MAX} of {len(text)} characters)"
