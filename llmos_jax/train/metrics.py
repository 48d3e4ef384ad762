"""What people and machines see of a run: metrics.jsonl, TensorBoard events, a progress bar, where the time went."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time

from absl import logging

from llmos_jax.compute import host

CATEGORIES = ("init", "compile", "restore", "data_wait", "step", "evaluate", "sample", "save_block", "idle")


class MetricsWriter:
    """Appends to `metrics.jsonl` (one line a step) and to TensorBoard event files.

    Lines after `step` are from a run that was killed past its last checkpoint: they are cut, so that the file is what an
    uninterrupted run would have written. Only the writing process (`is_writer`) touches files.
    """

    def __init__(self, directory, *, is_writer, step=0):
        self.file = pathlib.Path(directory) / "metrics.jsonl"
        self.is_writer, self._events, self._directory = is_writer, None, pathlib.Path(directory)
        if not is_writer:
            return
        if self.file.is_file():
            kept = [entry for entry in read_metrics(self.file) if entry["step"] <= step]
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text("".join(_line(entry) for entry in kept))
            temporary.replace(self.file)
        # Line by line: a killed run loses at most half a line.
        self._stream = open(self.file, "a", buffering=1)  # noqa: SIM115  closed by close()

    def write(self, step, values):
        """Writes flat metrics `area/name_unit`: numbers, text or lists of JSON values."""
        if not self.is_writer or not values:
            return
        self._stream.write(_line({"step": int(step), "time_seconds": time.time()} | values))
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if numbers:
            self._write_events(step, numbers)

    def write_samples(self, step, samples):
        """Writes samples, each {"prompt", "text"}."""
        self.write(step, {"samples": samples})

    def close(self):
        """Flushes and closes the files."""
        if self.is_writer:
            self._stream.close()
            if self._events is not None:
                self._events.close()

    def _write_events(self, step, numbers):
        # Imported at the first write: opening a run does not wait for it.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._events is None:
            self._events = EventFileWriter(str(self._directory))
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
        self._events.add_event(Event(step=int(step), wall_time=time.time(), summary=Summary(value=values)))


def read_metrics(file):
    """Returns the entries of a metrics.jsonl, oldest first; the half line of a killed run is left out."""
    entries = []
    for line in pathlib.Path(file).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


class TimeAccount:
    """Books every second of wall time to a category; the categories' sum is the wall time.

    `with account.spend("compile")`: a nested spend pauses the outer one. What nothing claims is idle.
    """

    def __init__(self, clock=time.perf_counter):
        self._clock, self._stack = clock, ["idle"]
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._since = clock()

    @contextlib.contextmanager
    def spend(self, category):
        """Books the time inside the block to `category`."""
        if category not in self._seconds:
            raise KeyError(f"time category {category!r} is unknown; known: {', '.join(CATEGORIES)}")
        self._settle()
        self._stack.append(category)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def totals(self):
        """Returns seconds by category, up to now."""
        self._settle()
        return dict(self._seconds)

    def merge(self, earlier):
        """Adds the totals of the run's earlier processes."""
        for category, seconds in earlier.items():
            self._seconds[category] = self._seconds.get(category, 0.0) + seconds

    def goodput(self):
        """Returns the share of all booked time that went into training steps."""
        totals = self.totals()
        return totals["step"] / max(sum(totals.values()), 1e-9)

    def _settle(self):
        now = self._clock()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now


class ThroughputMeter:
    """Tokens per second, step time, waiting for data, MFU and memory over the window since the last log."""

    def __init__(self, *, tokens_per_step, flops_per_token, peak_flops, clock=time.perf_counter):
        self.tokens_per_step, self.flops_per_token, self.peak_flops = tokens_per_step, flops_per_token, peak_flops
        self._clock, self._mark, self._figures = clock, None, {}

    def update(self, step, seconds, devices=()):
        """Closes a window at `step`; `seconds`: the account's totals. The first call only opens one.

        Step time counts stepping and waiting for data; evaluations, samples and saves are not in it.
        """
        mark = (step, seconds["step"], seconds["data_wait"])
        if self._mark is not None and step > self._mark[0]:
            steps = step - self._mark[0]
            waited = mark[2] - self._mark[2]
            spent = max(mark[1] - self._mark[1] + waited, 1e-9)
            rate = steps * self.tokens_per_step / spent
            self._figures = {
                "throughput/tokens_per_second": rate,
                "throughput/step_seconds": spent / steps,
                "throughput/data_wait_share": waited / spent,
                "memory/host_peak_bytes": host.peak_memory_bytes(),
            }
            if self.peak_flops:
                self._figures["throughput/mfu"] = rate * self.flops_per_token / self.peak_flops
            stats = [device.memory_stats() for device in devices if device.platform != "cpu"]
            peaks = [entry["peak_bytes_in_use"] for entry in stats if entry and "peak_bytes_in_use" in entry]
            if peaks:
                self._figures["memory/device_peak_bytes"] = max(peaks)
        self._mark = mark

    def figures(self):
        """Returns the figures of the last closed window."""
        return dict(self._figures)


class Progress:
    """A bar with time to go on a terminal, plain lines elsewhere."""

    def __init__(self, *, total, start, fraction=None, stream=None):
        self.total, self.start, self.step = total, start, start
        self._fraction = fraction  # share done, for runs that end by the clock
        self._began, self._bar, self._clock_began = time.monotonic(), None, fraction() if fraction else 0.0
        stream = stream or sys.stderr
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", file=stream, dynamic_ncols=True, smoothing=0.1)

    def update(self, step, values):
        """Shows the figures of `step`."""
        if self._bar is not None:
            self._bar.set_postfix_str(_figures(values), refresh=False)
            self._bar.update(step - self.step)
        else:
            of = f"/{self.total}" if self.total else ""
            logging.info("step %d%s  %s  eta %s", step, of, _figures(values), duration(self._remaining(step)))
        self.step = step

    def message(self, text):
        """Shows a line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.clear()
        logging.info("%s", text)
        if self._bar is not None:
            self._bar.refresh()

    def close(self):
        """Leaves the terminal tidy."""
        if self._bar is not None:
            self._bar.close()

    def _remaining(self, step):
        """Seconds to go, by the steps or by the clock, whichever ends first."""
        spent = time.monotonic() - self._began
        shares = [(step - self.start) / (self.total - self.start)] if self.total else []
        ends = [spent * (1 - share) / share for share in shares if share > 0]
        clock = self._fraction() if self._fraction else 0.0
        if clock > self._clock_began:
            ends.append(spent * (1 - clock) / (clock - self._clock_began))
        return min(ends, default=math.nan)


def duration(seconds):
    """Returns seconds as people say them: 45s, 3m05s, 2h10m."""
    if not math.isfinite(seconds):
        return "?"
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds < 3600 else f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def _figures(values):
    shown = []
    for name, label, form in (
        ("train/loss", "loss", "{:.4f}"),
        ("validation/bits_per_byte", "validation bits/byte", "{:.4f}"),
        ("train/learning_rate", "lr", "{:.2e}"),
        ("throughput/tokens_per_second", "tokens/s", "{:,.0f}"),
        ("throughput/step_seconds", "s/step", "{:.3f}"),
        ("throughput/mfu", "mfu", "{:.0%}"),
        ("train/skipped_steps", "skipped", "{:.0f}"),
    ):
        if name in values and not (label == "skipped" and values[name] == 0):
            shown.append(f"{label} {form.format(values[name])}")
    return "  ".join(shown)


def _line(entry):
    """JSON has no NaN or infinity: they are written as text."""
    safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(safe) + "\n"
