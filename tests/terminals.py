# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands as a person types them: on a terminal."""

import os
import select
import subprocess
import time


class Terminal:
    """A command that runs on a terminal of its own."""

    def __init__(self, command):
        self._fd, other = os.openpty()
        self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)
        self.shown = ""
        self._seen = 0

    def until(self, text, seconds=90):
        """Read until it shows a text that it has not shown before."""
        deadline = time.monotonic() + seconds
        while text not in self.shown[self._seen :]:
            assert select.select([self._fd], [], [], max(0, deadline - time.monotonic()))[0], self.shown
            self._read()
        self._seen = self.shown.index(text, self._seen) + len(text)

    def type(self, text):
        """Type something."""
        os.write(self._fd, text.encode())

    def end(self):
        """Read to its end.

        Returns:
            int, the exit code.
        """
        while self._read():
            continue
        os.close(self._fd)
        return self.process.wait(30)

    def _read(self):
        try:
            chunk = os.read(self._fd, 65536)
        except OSError:
            # The last one who had it open has left.
            return False
        self.shown += chunk.decode("utf-8", "replace")
        return bool(chunk)
