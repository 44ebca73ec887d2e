# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries bytes between dom0's end and the VM's end of a qrexec connection, as qrexec does: by copying.

A VM never gets a descriptor of dom0's. Each direction holds one small buffer, so whoever doesn't read stalls whoever writes.
"""

import os
import select
import threading

#: What a pipe takes without blocking once poll() says that it can be written to (POSIX: PIPE_BUF).
_PIECE = 4096
_READ = 1 << 16


class Relay:
    """Three copies between dom0's descriptors and pipes of the VM.

    Args:
        dom0_fds: three descriptors, owned from now on: stdin to read from, stdout and stderr to write to (each may be None).
        first_input: bytes to send before stdin.
    """

    def __init__(self, dom0_fds, first_input=b""):
        self._stopped, self._stop = os.pipe2(os.O_CLOEXEC)
        self._lock = threading.Lock()
        vm_in, to_vm = os.pipe2(os.O_CLOEXEC)
        from_vm, vm_out = os.pipe2(os.O_CLOEXEC)
        from_vm_err, vm_err = os.pipe2(os.O_CLOEXEC)
        #: What the VM's process gets.
        self.vm_fds = [vm_in, vm_out, vm_err]
        self._input = self._copier(dom0_fds[0], to_vm, first_input)
        self._outputs = [self._copier(from_vm, dom0_fds[1]), self._copier(from_vm_err, dom0_fds[2])]

    def start(self):
        """Begin to copy; the VM's process has its descriptors."""
        for fd in self.vm_fds:
            os.close(fd)
        for thread in (self._input, *self._outputs):
            thread.start()

    def finish(self):
        """Wait until all output is through, then end."""
        for thread in self._outputs:
            thread.join()
        self.stop()
        self._input.join()

    def stop(self):
        """End all copies now; both sides see their descriptors closed."""
        # Whoever waits for the command and whoever watches its caller may both call this.
        with self._lock:
            if self._stop is not None:
                os.close(self._stop)
                self._stop = None

    def close(self):
        """End all copies and let go of the last descriptor."""
        self.stop()
        for thread in (self._input, *self._outputs):
            thread.join()
        os.close(self._stopped)

    def _copier(self, source, target, first=b""):
        return threading.Thread(target=self._copy, args=(source, target, first), daemon=True)

    def _copy(self, source, target, data):
        try:
            while True:
                while data:
                    if target is None:
                        break
                    if not self._wait(target, select.POLLOUT):
                        return
                    data = data[os.write(target, data[:_PIECE]) :]
                if source is None or not self._wait(source, select.POLLIN):
                    return
                data = os.read(source, _READ)
                if not data:
                    return
        except OSError:
            # One side is gone: so is the connection, in this direction.
            return
        finally:
            for fd in (source, target):
                if fd is not None:
                    os.close(fd)

    def _wait(self, fd, what):
        poller = select.poll()
        poller.register(self._stopped, 0)
        poller.register(fd, what)
        return all(ready != self._stopped for ready, _ in poller.poll())
