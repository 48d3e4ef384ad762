"""SIGTERM and Ctrl-C: a request to save and leave, never an abrupt end."""

import signal
import threading

from llmos_jax.errors import Preempted


class Preemption:
    """Notes the first SIGTERM or SIGINT while it is entered; a second Ctrl-C interrupts at once, as usual."""

    def __init__(self):
        self.signal_name = None
        self._previous = {}

    def __enter__(self):
        # Signal handlers belong to the main thread; a run in another thread (a notebook's executor) has none.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def poll(self):
        """Raises Preempted when a signal has arrived."""
        if self.signal_name is not None:
            raise Preempted(f"stopped by {self.signal_name}; run the same command again to go on")

    def _note(self, number, frame):
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
