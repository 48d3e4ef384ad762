"""SIGTERM and Ctrl-C: a request to save and leave, never an abrupt end."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from llmos_jax.compute import distributed
from llmos_jax.errors import Preempted


class Preemption:
    """Notes SIGTERM or SIGINT while it is entered; a second Ctrl-C interrupts at once, as usual.

    Until `begin` there is nothing to save: a signal raises Preempted where it arrives. After it `poll` raises Preempted. In
    a run of many processes a signal to one of them stops all, at the same call of `poll`: JAX's preemption service agrees
    on it in the background (it takes the highest count of calls that any process has reached, plus one).
    """

    def __init__(self):
        self.signal_name = None
        self._previous, self._has_begun, self._polls = {}, False, 0

    def __enter__(self):
        # Signal handlers belong to the main thread; a run in another thread (a notebook's executor) has none.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that native code installed
        self._previous = {}

    def begin(self):
        """From here on there is something to save. Raises Preempted for a signal that could not end the run before."""
        if self.signal_name is not None:  # raised where exceptions are only printed: in a callback, in a finaliser
            self._raise_early()
        self._has_begun = True
        distributed.start_preemption_service()

    def poll(self):
        """Raises Preempted when a signal has arrived; with many processes on all of them at the same call."""
        self._polls += 1
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._polls):
            self.signal_name = self.signal_name or "SIGTERM to a process of the run"
        elif jax.process_count() > 1:
            return
        if self.signal_name is not None:
            raise Preempted(f"stopped by {self.signal_name}; run the same command again to go on")

    def _note(self, number, frame):
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        if not self._has_begun:
            self._raise_early()
        if distributed.count() > 1:  # only Ctrl-C comes here: JAX's service has taken SIGTERM, and tells the others
            os.kill(os.getpid(), signal.SIGTERM)

    def _raise_early(self):
        raise Preempted(f"stopped by {self.signal_name} before training began; run the same command again")
