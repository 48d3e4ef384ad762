"""The watchdog: no phase of a run may last longer than its limit, and no process may vanish unnoticed.

The run marks its phases; a thread compares the age of the last mark with the phase's limit. With many processes a second
thread tells the others that this one lives and how far it is, through the coordinator's store, and notices who has fallen
silent. Either ends the process with exit code 75, with the stacks of all threads in the log file and one line that names
phase, step and the process that is behind: a collective that waits for a lost peer would wait for ever.
"""

import dataclasses
import faulthandler
import json
import os
import pathlib
import socket
import statistics
import threading
import time
from collections import deque

from absl import logging

from llmos_jax.compute import distributed, host
from llmos_jax.config import setting
from llmos_jax.errors import PeerLost, Stuck

_STEPS_REMEMBERED = 64
_BEATS = "llmos/beat"
# The others' watchdogs expire at about the same time: process 0, whose end would abort them, lets them write their stacks.
_LAST_WORDS_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """Limits on phases without progress, in seconds; what takes longer ends the process with exit code 75."""

    is_on: bool = setting(True, help="end a process that makes no progress (never that of a notebook)")
    init_seconds: float = setting(
        1800.0, help="limit of what comes before and after preparing data: devices start there", above=0.0
    )
    floor_seconds: float = setting(300.0, help="least limit of a training step", above=0.0)
    first_step_seconds: float = setting(1800.0, help="least limit of the first steps: they connect processes", above=0.0)
    steps: float = setting(10.0, help="limit of a training step, in median steps, where that is longer", above=1.0)
    compile_seconds: float = setting(7200.0, help="limit of a compilation", above=0.0)
    restore_seconds: float = setting(3600.0, help="limit of a restore", above=0.0)
    save_seconds: float = setting(3600.0, help="limit of a wait for a save", above=0.0)
    evaluate_seconds: float = setting(3600.0, help="limit of one batch of an evaluation, or of the samples", above=0.0)
    data_seconds: float = setting(3600.0, help="limit of a wait for a training batch", above=0.0)


class Watchdog:
    """Watches the phases that `mark` names, and the other processes of the run; runs while it is entered.

    config: WatchdogConfig. log_file: where stacks are dumped. heartbeat_seconds: silence after which a process is lost.
    is_hard: whether it may end the process (a notebook's it may not: it then logs once). end: called with the error.
    """

    def __init__(self, config, log_file, *, heartbeat_seconds=30.0, is_hard=True, end=None):
        self._config, self._log_file, self._silence = config, pathlib.Path(log_file), heartbeat_seconds
        self._end = end or (_end_process if is_hard else lambda error: logging.error("%s", error))
        self._marks, self._phase, self._since, self.step = 0, "init", time.monotonic(), None
        self._durations, self._in_flight = deque(maxlen=_STEPS_REMEMBERED), 1
        self._stop, self._answered, self._heard = threading.Event(), time.monotonic(), {}
        self._threads, self._last_phase = [], "left"

    def mark(self, phase=None):
        """Notes that the run makes progress, and into which phase it goes (none: it stays in the last one)."""
        self._marks += 1
        self._phase, self._since = phase or self._phase, time.monotonic()

    def measured(self, seconds, *, steps):
        """Notes that `steps` training steps took `seconds`: their median sets the limit of later ones."""
        self._durations.append(seconds / steps)
        self._in_flight = max(self._in_flight, steps)  # that many are waited for at once

    def limit_seconds(self, phase):
        """Returns the limit of a phase, or None for one that may take any time."""
        config = self._config
        if phase in ("step", "idle"):
            if not self._durations:
                return max(config.floor_seconds, config.first_step_seconds)
            return max(config.floor_seconds, config.steps * statistics.median(self._durations) * self._in_flight)
        limits = {
            "init": config.init_seconds,
            "compile": config.compile_seconds,
            "restore": config.restore_seconds,
            "save_block": config.save_seconds,
            "evaluate": config.evaluate_seconds,
            "sample": config.evaluate_seconds,
            "data_wait": config.data_seconds,
        }
        return limits.get(phase)

    def __enter__(self):
        if not self._config.is_on:
            return self
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=self._watch, daemon=True, name="watchdog")]
        if distributed.count() > 1:
            self._threads.append(threading.Thread(target=self._beat, daemon=True, name="heartbeat"))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, *_):
        self._last_phase = "left" if kind is None else "stopped"
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=1.0 if kind is None else 0.2)  # its last words may have nobody left to hear them

    def _watch(self):
        while not self._stop.wait(min(1.0, self._config.floor_seconds / 10, self._silence / 10)):
            try:
                error = self._overdue() or self._silent()
            except Exception as problem:  # a watchdog that dies leaves nobody to notice
                logging.error("watchdog: %s: %s", type(problem).__name__, problem)
                continue
            if error is not None and not self._stop.is_set():
                self._dump_stacks(error)
                if isinstance(error, Stuck) and distributed.index() == 0 and distributed.count() > 1:
                    time.sleep(_LAST_WORDS_SECONDS)
                self._end(error)
                return

    def _overdue(self):
        phase, since, limit = self._phase, self._since, self.limit_seconds(self._phase)
        age = time.monotonic() - since
        if limit is None or age <= limit:
            return None
        where = f"phase {phase}" + ("" if self.step is None else f" at step {self.step}")
        return Stuck(f"no progress for {age:.1f} s in {where} (limit {limit:.1f} s){self._who_is_behind()}")

    def _silent(self):
        """Returns the PeerLost of a process that has fallen silent, else None."""
        if distributed.count() == 1:
            return None
        now = time.monotonic()
        if now - self._answered > self._silence:
            return PeerLost(f"process 0, the coordinator, has not answered for {now - self._answered:.1f} s")
        for number, (beat, heard) in list(self._heard.items()):
            if now - heard > self._silence and beat["phase"] != "left":
                return PeerLost(f"process {_described(number, beat)} has been silent for {now - heard:.1f} s")
        return None

    def _beat(self):
        """Tells the others of this process, and on process 0 listens to all of them."""
        store, number, failures = distributed.client(), 0, 0
        while True:
            is_last = self._stop.is_set()
            number += 1
            content = {
                "beat": number, "host": socket.gethostname(), "pid": os.getpid(), "marks": self._marks,
                "phase": self._last_phase if is_last else self._phase, "step": self.step,
            }  # fmt: skip
            try:
                store.key_value_set(f"{_BEATS}/{distributed.index():06d}", json.dumps(content), allow_overwrite=True)
                if distributed.index() == 0:
                    self._listen(store)
                self._answered, failures = time.monotonic(), 0
            except Exception as error:
                failures += 1
                if failures > 1 and not is_last:  # refused, not only late
                    lost = PeerLost(f"process 0, the coordinator, is gone ({str(error).splitlines()[0][:200]})")
                    self._dump_stacks(lost)
                    self._end(lost)
                    return
            if is_last:
                return
            self._stop.wait(self._silence / 10)

    def _listen(self, store):
        now = time.monotonic()
        for number, beat in _beats(store).items():
            known = self._heard.get(number)
            if known is None or known[0]["beat"] != beat["beat"]:
                self._heard[number] = (beat, now)

    def _who_is_behind(self):
        """Returns ": process 3 ... is behind": the one with the fewest marks, for all make the same ones."""
        if distributed.count() == 1:
            return ""
        asked, answer = threading.Event(), {}

        def ask():  # the coordinator may be the one that is gone: it is not waited for longer than this
            try:
                answer.update(_beats(distributed.client()))
            except Exception as error:
                logging.warning("the coordinator can't tell who is behind: %s", str(error).splitlines()[0])
            asked.set()

        threading.Thread(target=ask, daemon=True).start()
        asked.wait(timeout=2.0)
        answer[distributed.index()] = {
            "host": socket.gethostname(), "pid": os.getpid(), "marks": self._marks, "phase": self._phase, "step": self.step
        }  # fmt: skip
        fewest = min(beat["marks"] for beat in answer.values())
        behind = [_described(number, beat) for number, beat in sorted(answer.items()) if beat["marks"] == fewest]
        missing = [str(number) for number in range(distributed.count()) if number not in answer]
        words = f"; not heard of: process {', '.join(missing)}" if missing else ""
        if len(behind) == len(answer):
            return f"; all processes are at the same place: the network or a device does not answer{words}"
        return f"; behind is process {', '.join(behind)}{words}"

    def _dump_stacks(self, error):
        try:
            with open(self._log_file, "a", encoding="utf-8") as stream:
                stream.write(f"watchdog: {error}; stacks of all threads:\n")
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)
        except OSError as reason:
            logging.error("stacks can't be written to %s (%s)", self._log_file, reason.strerror)


def _end_process(error):
    distributed.report(error)
    host.end_process(error.exit_code)


def _beats(store):
    return {int(key.rpartition("/")[2]): json.loads(text) for key, text in store.key_value_dir_get(_BEATS)}


def _described(number, beat):
    where = f"phase {beat['phase']}" + ("" if beat["step"] is None else f" at step {beat['step']}")
    return f"{number} (host {beat['host']}, pid {beat['pid']}, in {where})"
