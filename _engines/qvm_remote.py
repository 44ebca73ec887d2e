# SPDX-License-Identifier: GPL-2.0-or-later
"""Salt engine of qvm-remote, for dom0: runs the pull loop inside a (masterless) salt-minion.

.. code-block:: yaml

    engines:
      - qvm_remote:
          timeout_max: 300
          vms:
            work: {}

It never raises: with settings it can't use it says so in the log and serves nobody, until it is stopped; with a full disk, a
ledger that is damaged, or without descriptors, until that is mended.
SIGHUP makes it read the minion's configuration again and go on under the new settings, or, if it can't use them, under the old ones;
commands that run are not disturbed.
SIGUSR1 makes it end its work and stay, idle, until the minion is stopped: that gives an engine less than a second. If it dies
meanwhile, the one that its minion starts in its place stays idle, too.

Events on the minion's bus, and on its master's if it has one, all with ``vm``, ``id`` (``-`` when none is meant) and
``time`` (seconds since the epoch; they are fired a moment later) in their data:

========================================== ===========================================================================
``qvm-remote/<vm>/-/connected``            a session began; ``kind``: agent or agentless
``qvm-remote/<vm>/-/broken``               the VM broke the protocol; ``reason``
``qvm-remote/<vm>/-/key-handed``           a pending or new key reached the VM
``qvm-remote/<vm>/-/key-mended``           the VM had lost or altered its key; it has it again
``qvm-remote/<vm>/-/key-lost``             the VM has no key any more; also ``key-altered``
``qvm-remote/<vm>/-/key-not-handed``       the VM could not store its key; once, until it can
``qvm-remote/<vm>/-/unable``               the VM can't do what dom0 asks; ``reason``; once, until it can
``qvm-remote/<vm>/<id>/accepted`` (*)      verified and claimed; it will run once
``qvm-remote/<vm>/<id>/refused``           it will not run; ``code``: id, size, key, token, stale, replay, ...
``qvm-remote/<vm>/<id>/running`` (*)       it begins
``qvm-remote/<vm>/<id>/asked``             dom0's user is asked about it
``qvm-remote/<vm>/<id>/answered``          ``answer``: yes, no, timeout, failed, withdrawn
``qvm-remote/<vm>/<id>/done``              it ended; ``exit``, ``status``, ``seconds``
``qvm-remote/<vm>/<id>/delivered`` (*)     its result is in the VM
``qvm-remote/<vm>/<id>/cancelled``         its client gave up
========================================== ===========================================================================

(*) with the setting ``events: all`` only: to fire one takes dom0 about as long as to run a small command.
"""

import collections
import contextlib
import logging
import os
import signal
import sys
import threading
import time

import pullrpc.config
import pullrpc.dom0
import pullrpc.errors
import pullrpc.frames
import pullrpc.lock
import pullrpc.notifier
import pullrpc.service
import salt.config
import salt.utils.event
from salt.exceptions import CommandExecutionError

log = logging.getLogger(__name__)

__virtualname__ = "qvm_remote"
#: Another engine (or run_once) is at work: try again this often, seconds.
_BUSY_RETRY = 2.0
#: The disk is full, the ledger damaged, ...: look whether that was mended this often, seconds.
_TROUBLE_RETRY = 15.0
#: The minion that started us may die without a word: look this often, seconds.
_PARENT_CHECK = 1.0
#: How long a thread keeps the interpreter while another one wants it, seconds.
_SWITCH_INTERVAL = 0.0005
#: Events of one VM that wait for the bus; beyond that they are dropped: events inform, they never delay a command.
_EVENTS_VM_MAX = 1000
#: An event waits so long at most, seconds, for the commands that were accepted within this time to be delivered: they have the
#: interpreter first.
_EVENTS_WAIT = 0.25
#: After an event the thread rests so many times as long as that took, but no longer than so many seconds: a burst of commands
#: leaves it the time in between.
_EVENTS_REST, _EVENTS_REST_MAX = 3, 0.03
#: Steps of a command that are told of only where all events are wanted.
_STEPS = ("accepted", "running", "delivered")


def __virtual__():
    return __virtualname__


def start(**config):
    """Serve all authorized VMs until the minion stops.

    Args:
        config: settings, see :class:`pullrpc.config.Config` and pillar.example.
    """
    # This process is the engine's alone. Its threads hand a command on several times, and none is to wait 5 ms for the interpreter.
    sys.setswitchinterval(_SWITCH_INTERVAL)
    signals = _Signals()
    events, notifier = _Events(__opts__), pullrpc.notifier.Notifier(log.warning)
    try:
        _serve_until_stopped(config, signals, events, notifier)
    finally:
        events.close()
        notifier.close()


def _serve_until_stopped(config, signals, events, notifier):
    waiting_logged, trouble = False, None
    while not signals.is_set:
        if signals.is_idle:
            log.warning("qvm-remote was stopped; it serves nobody until this minion is started anew")
            signals.wait(None)
            continue
        try:
            service = _make_service(config, signals, events, notifier)
            with contextlib.closing(service):
                if not signals.is_idle:
                    service.run()
        except pullrpc.errors.EngineBusy as err:
            if not waiting_logged:
                log.warning("%s; waiting for it to end", err)
            waiting_logged = True
            signals.wait(_BUSY_RETRY)
        except pullrpc.errors.ConfigError as err:
            # Ending would only make the minion start us again, and again.
            log.critical("qvm-remote serves nobody: %s. Mend that, then restart this minion", err)
            signals.wait(None)
        except (pullrpc.errors.PullError, OSError) as err:
            # The latter: no descriptors are left, say, or a disk fails. What ran was interrupted, and is recorded once that can be.
            if str(err) != trouble:
                log.critical("qvm-remote serves nobody: %s. It is tried again each %.0f s", err, _TROUBLE_RETRY)
            trouble = str(err)
            signals.wait(_TROUBLE_RETRY)


def _make_service(config, signals, events, notifier):
    current = {"settings": config}
    # Taken out of the loader once: these keep Salt's context with them, whatever thread calls them.
    verify = __salt__["qvm_remote.verify"]
    execute = __salt__["qvm_remote.execute"]

    def take_over():
        new = _settings_in_file()
        pullrpc.dom0.reconfigure(current["settings"], new)
        current["settings"] = new
        log.warning("qvm-remote goes on under new settings")

    def run_verify(vm, cid, command, token):
        try:
            return verify(vm, cid, command, token, config=current["settings"])
        except CommandExecutionError as err:
            raise pullrpc.errors.Refused("storage", str(err)) from None

    def run_execute(vm, cid):
        try:
            return execute(vm, cid, config=current["settings"])
        except CommandExecutionError as err:
            raise pullrpc.errors.PullError(str(err)) from None

    dom0 = pullrpc.dom0.shared(config)

    def emit(vm, cid, what, data):
        events.note(vm, cid, what)
        notifier.note(dom0.config, vm, cid, what, data)
        if what not in _STEPS or dom0.config.events == "all":
            events.put(vm, cid, what, data)

    setup = os.environ.get("QVM_REMOTE_SETUP", "")
    service = pullrpc.service.Service(dom0, run_verify, run_execute, emit, log.warning, take_over, setup)
    signals.set_service(service)
    return service


def _settings_in_file():
    path = __opts__["conf_file"]
    try:
        settings = pullrpc.config.engine_settings(salt.config.minion_config(path))
    except (SystemExit, OSError, ValueError) as err:
        # By the first of these Salt ends whoever asks it to read what is no YAML; it has logged what is wrong.
        raise pullrpc.errors.ConfigError(f"the minion's configuration, {path}, can't be read") from err
    if settings is None:
        raise pullrpc.errors.ConfigError("the minion's configuration does not have this engine any more; stop the service instead")
    return settings


class _Signals:
    """SIGHUP makes the service read its settings again; SIGTERM and SIGINT, and the death of the minion that started us, end the
    service in an orderly way, and so does SIGUSR1, after which there is to be no other.
    """

    def __init__(self):
        self.is_set = False
        self.is_idle = False
        self._service = None
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, self._on_reload)
        signal.signal(signal.SIGUSR1, self._on_idle)
        threading.Thread(target=self._watch_parent, args=(os.getppid(),), name="qvm-remote-parent", daemon=True).start()

    def set_service(self, service):
        """Say what to stop."""
        self._service = service
        self.is_idle = self.is_idle or pullrpc.lock.was_stopped(service.dom0.config.run_dir, os.getppid())
        if self.is_set or self.is_idle:
            service.stop()

    def wait(self, seconds):
        """Wait for a signal, at most so long."""
        pullrpc.frames.wait_readable([self._read], None if seconds is None else time.monotonic() + seconds)

    def _on_signal(self, number, frame):
        self.is_set = True
        try:
            os.write(self._write, b"!")
        except BlockingIOError:
            # Full of earlier signals: it knows.
            pass
        if self._service is not None:
            self._service.stop()

    def _on_reload(self, number, frame):
        if self._service is not None:
            self._service.reload()

    def _on_idle(self, number, frame):
        self.is_idle = True
        if self._service is None:
            return
        try:
            # First of all: from here on no other engine is to begin where this one ends, however that comes about.
            pullrpc.lock.note_stopped(self._service.dom0.config.run_dir, os.getppid())
        except OSError as err:
            log.warning("qvm-remote: that it was stopped can't be noted: %s", err.strerror)
        self._service.stop()

    def _watch_parent(self, parent):
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK)
        self._on_signal(signal.SIGTERM, None)


class _Events:
    """Fires ``qvm-remote/<vm>/<cid>/<what>`` on the minion's bus from a thread of its own, so that nothing waits for it.

    VMs take turns, each with a bounded line: one with many events neither delays nor displaces another's.
    """

    def __init__(self, opts):
        self._opts = opts
        # A masterless minion has nobody to send them on to.
        self._has_master = opts.get("master_type") != "disable"
        #: VM to a deque of (when it was taken in, tag, data); an empty one is not kept.
        self._lines = collections.OrderedDict()
        #: Commands that are on their way, and when they were accepted; the oldest first.
        self._on_way = {}
        self._closing = False
        #: Opened for the first event, and anew after one that could not be fired.
        self._bus, self._is_failing = None, False
        lock = threading.Lock()
        # Two of them: an event that comes is no reason to wake the thread while it gives way to commands.
        self._arrived, self._calmed = threading.Condition(lock), threading.Condition(lock)
        self._thread = threading.Thread(target=self._work, name="qvm-remote-events", daemon=True)
        self._thread.start()

    def note(self, vm, cid, what):
        """Hear of a step, whether or not there is to be an event of it."""
        with self._calmed:
            if what == "accepted":
                self._forget_old()
                self._on_way[vm, cid] = time.monotonic()
            elif what in ("delivered", "cancelled"):
                self._on_way.pop((vm, cid), None)
                if not self._on_way:
                    self._calmed.notify()

    def put(self, vm, cid, what, data):
        """Fire an event soon; the arguments are checked names and words of ours, never output or keys."""
        event = {"vm": vm, "id": cid, "time": round(time.time(), 6), **data}
        with self._arrived:
            line = self._lines.setdefault(vm, collections.deque())
            if len(line) < _EVENTS_VM_MAX:
                line.append((time.monotonic(), f"qvm-remote/{vm}/{cid}/{what}", event))
                self._arrived.notify()

    def close(self):
        """Fire what waits, for a moment at most."""
        with self._arrived:
            self._closing = True
            self._arrived.notify()
        self._thread.join(1.0)

    def _next(self):
        """Wait for an event, and take it out of its line.

        Returns:
            (float, str, dict): when it was taken in, tag, data; None when there is none and none will come.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: self._lines or self._closing)
            if not self._lines:
                return None
            vm, line = next(iter(self._lines.items()))
            event = line.popleft()
            # To the end of the round, so that the others are served first.
            self._lines.move_to_end(vm)
            if not line:
                del self._lines[vm]
            return event

    def _wait_for_calm(self, taken):
        """Give way to commands that were just accepted; however many follow, no event waits for longer than it may."""
        with self._calmed:
            while True:
                self._forget_old()
                now = time.monotonic()
                if not self._on_way or now >= taken + _EVENTS_WAIT:
                    return
                self._calmed.wait(min(taken, max(self._on_way.values())) + _EVENTS_WAIT - now)

    def _forget_old(self):
        # What takes longer than that is no matter of a moment.
        while self._on_way:
            oldest, accepted = next(iter(self._on_way.items()))
            if time.monotonic() < accepted + _EVENTS_WAIT:
                return
            del self._on_way[oldest]

    def _work(self):
        with contextlib.ExitStack() as buses:
            while True:
                event = self._next()
                if event is None:
                    return
                taken, tag, data = event
                self._wait_for_calm(taken)
                began = time.monotonic()
                self._fire(buses, tag, data)
                time.sleep(min(_EVENTS_REST_MAX, _EVENTS_REST * (time.monotonic() - began)))

    def _fire(self, buses, tag, data):
        try:
            self._bus = self._bus or buses.enter_context(salt.utils.event.get_event("minion", opts=self._opts, listen=False))
            self._bus.fire_event(data, tag)
            if self._has_master:
                # The minion passes what it finds under this tag on to its master.
                self._bus.fire_master(data, tag)
            self._is_failing = False
        except Exception as err:  # noqa: BLE001 - whatever it is, the next event is to be fired
            if not self._is_failing:
                # The first in a row: those that follow fail for the same reason.
                log.warning("qvm-remote: events can't be fired; commands run all the same: %s", err)
            self._is_failing, self._bus = True, None
            with contextlib.suppress(Exception):
                buses.close()
