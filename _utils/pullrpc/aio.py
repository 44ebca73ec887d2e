# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting without a thread: for descriptors and for processes, in the one event loop that serves all VMs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import os
import queue
import threading

from .errors import SessionBroken, ThreadError

#: How often to look at a process where the kernel can't tell of its end, seconds.
_LOOK_EVERY = 0.02
_WRITE_SIZE = 1 << 16


def run(coroutine):
    """Run a coroutine to its end, in a loop of its own; for callers that are no coroutines themselves.

    Args:
        coroutine: coroutine.

    Returns:
        what it returns.

    Raises:
        what it raises.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # Called from within somebody else's loop (a Salt minion has one), which must not be entered again.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, asyncio.run, coroutine).result()


class Threads:
    """Some threads for what blocks. As a loop's executor, at half its cost for each call: it is on the way of every command.

    Args:
        count: int, most of them.
        name: str.
    """

    def __init__(self, count, name):
        self._loop = asyncio.get_running_loop()
        self._jobs = queue.SimpleQueue()
        self._lock = threading.Lock()
        #: Calls that are not done yet.
        self._open = 0
        self._count = count
        self._name = name
        self._threads = []

    def call(self, function, *args):
        """Run a function in one of them.

        Args:
            function: callable.
            args: its arguments.

        Returns:
            asyncio.Future of what it returns or raises; it raises ThreadError where there is no thread, and none can be started.
        """
        future = self._loop.create_future()
        with self._lock:
            all_busy = self._open >= len(self._threads)
        if all_busy and len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as err:
                if not self._threads:
                    future.set_exception(ThreadError(f"dom0 can't start a thread ({err}); try again later"))
                    return future
            else:
                self._threads.append(thread)
        with self._lock:
            self._open += 1
        # Salt's loader finds its own context through context variables; a bare thread would have none.
        self._jobs.put((future, contextvars.copy_context(), function, args))
        return future

    def close(self):
        """End them, when they have done what they were given."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self):
        while True:
            job = self._jobs.get()
            if job is None:
                return
            future, context, function, args = job
            try:
                outcome = (context.run(function, *args), None)
            except BaseException as err:  # noqa: BLE001 - it is raised where it is waited for
                outcome = (None, err)
            job = context = function = args = None
            with self._lock:
                self._open -= 1
            try:
                self._loop.call_soon_threadsafe(_hand_over, future, *outcome)
            except RuntimeError:
                # The loop is gone, and whoever waited.
                return
            future = outcome = None


def _hand_over(future, value, error):
    if future.cancelled():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


async def readable(fd, seconds):
    """Wait until a descriptor can be read, or is closed by the other side.

    Args:
        fd: int.
        seconds: float, at most so long; None for ever.

    Returns:
        bool, whether it can be read.
    """
    loop = asyncio.get_running_loop()
    return await _ready(loop.add_reader, loop.remove_reader, fd, seconds)


async def write_all(fd, data, deadline):
    """Write everything to a non-blocking descriptor.

    Args:
        fd: int.
        data: bytes.
        deadline: float, seconds of the loop's clock (``time.monotonic()``).

    Raises:
        SessionBroken: the other side closed it, or did not take the data in time.
    """
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view[:_WRITE_SIZE]) :]
            continue
        except BlockingIOError:
            pass
        except OSError as err:
            raise SessionBroken("the session was closed by the other side") from err
        if not await _ready(loop.add_writer, loop.remove_writer, fd, deadline - loop.time()):
            raise SessionBroken("the other side does not read what it is sent")


async def _ready(add, remove, fd, seconds):
    if seconds is not None and seconds <= 0:
        return False
    ready = asyncio.get_running_loop().create_future()
    add(fd, _resolve, ready)
    try:
        return bool((await asyncio.wait((ready,), timeout=seconds))[0])
    finally:
        remove(fd)


def _resolve(future):
    if not future.done():
        future.set_result(True)


async def ended(process, seconds):
    """Wait for the end of a process.

    Args:
        process: subprocess.Popen.
        seconds: float, at most so long.

    Returns:
        bool, whether it has ended.
    """
    if process.poll() is not None:
        return True
    try:
        fd = os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while process.poll() is None and loop.time() < deadline:
            await asyncio.sleep(_LOOK_EVERY)
        return process.poll() is not None
    try:
        await readable(fd, seconds)
    finally:
        os.close(fd)
    return process.poll() is not None


class Bell:
    """Wakes the one who waits for it; a ring that nobody waits for is kept until somebody does."""

    def __init__(self):
        self._rung = False
        self._waiter = None

    def ring(self):
        """Wake whoever waits; called within the loop."""
        self._rung = True
        if self._waiter is not None:
            _resolve(self._waiter)

    def clear(self):
        """Forget an earlier ring."""
        self._rung = False

    async def wait(self, seconds=None):
        """Wait for a ring, and have it forgotten.

        Args:
            seconds: float, at most so long; None for ever.

        Returns:
            bool, whether it rang.
        """
        if not self._rung and (seconds is None or seconds > 0):
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = None if seconds is None else loop.call_later(seconds, _resolve, self._waiter)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        rung, self._rung = self._rung, False
        return rung
