"""What people and machines see of a run: metrics.jsonl, TensorBoard events, a progress bar, where the time went."""

import contextlib
import json
import logging as python_logging
import math
import os
import pathlib
import socket
import sys
import time

from absl import logging

from llmos_jax.compute import host
from llmos_jax.errors import DataError, RunDirectoryError

CATEGORIES = ("init", "compile", "restore", "data_wait", "step", "evaluate", "sample", "save_block", "redo", "idle")


class MetricsWriter:
    """Appends to `metrics.jsonl` (one line a write) and to a TensorBoard event file.

    Lines after `step` are from a run that was killed past its last checkpoint: they are cut, as its half-written last
    line is, so that the file is what an uninterrupted run would have written. `lost_seconds` is the time between the first
    and the last line that were cut: at least that much work is done again. Only the writing process (`is_writer`) touches
    files. RunDirectoryError when the file can't be opened.

    A disk that fills up later does not stop a run: lines wait in memory, it is said once, and they are written when there
    is space again.
    """

    def __init__(self, directory, *, is_writer, step=0):
        self.file = pathlib.Path(directory) / "metrics.jsonl"
        self.is_writer, self.lost_seconds = is_writer, 0.0
        self._step, self._waiting, self._events = step, bytearray(), None
        if not is_writer:
            return
        try:
            self.lost_seconds = _cut(self.file, step)
            self._descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise RunDirectoryError(f"{self.file} can't be written ({error.strerror}): mend that, or name another.") from None

    def write(self, step, values):
        """Writes flat metrics `area/name_unit`: numbers (also NumPy's and JAX's scalars), text, lists of JSON values."""
        if not self.is_writer or not values:
            return
        if "step" in values or "time_seconds" in values:
            raise ValueError(f"metrics at step {step}: the names 'step' and 'time_seconds' are the line's own; rename them.")
        entry = {"step": int(step), "time_seconds": time.time()} | {name: _plain(value) for name, value in values.items()}
        # Nothing buffers the line: a killed run loses at most half of one.
        self._append((json.dumps(entry, allow_nan=False) + "\n").encode())
        if not self._waiting:
            self._write_events(entry, values)

    def write_samples(self, step, samples):
        """Writes samples, each {"prompt", "text"}."""
        self.write(step, {"samples": samples})

    def close(self):
        """Closes the files; what a full disk did not take is told, as a number of lines."""
        if not self.is_writer:
            return
        self._append(b"")
        if self._waiting:
            logging.error("%s: the last %d lines could not be written and are lost.", self.file, self._waiting.count(b"\n"))
        os.close(self._descriptor)
        self._close_events()

    def _append(self, line):
        was_waiting = bool(self._waiting)
        self._waiting += line
        try:
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError as error:
            if not was_waiting:
                logging.warning("%s can't be written (%s): its lines wait in memory.", self.file, error.strerror)
        else:
            if was_waiting:
                logging.info("%s is written again.", self.file)

    def _write_events(self, entry, values):
        try:
            if self._events is None:
                self._events = _EventFile(self.file.parent, self._step)
            self._events.write(entry, values)
        except OSError as error:
            logging.warning("TensorBoard events of step %d can't be written (%s).", entry["step"], error.strerror)
            self._close_events()  # the next write begins a new file

    def _close_events(self):
        events, self._events = self._events, None
        try:
            if events is not None:
                events.close()
        except OSError as error:
            logging.warning("TensorBoard events can't be closed (%s): their last ones may be missing.", error.strerror)


def read_metrics(file):
    """Returns the entries of a metrics.jsonl, oldest first; the half line of a killed run is left out.

    Raises DataError on any other line that is damaged.
    """
    lines, damaged = _read_lines(pathlib.Path(file))
    if damaged:
        raise DataError(f"{file}: line {damaged[0]} is not an entry of a metrics file: restore the file or remove the line.")
    return [entry for _, entry in lines]


def _read_lines(file):
    """Returns ([(line, entry)], numbers of damaged lines); a half line at the end, without a line feed, is in neither."""
    lines, damaged = [], []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int):
                raise TypeError
            lines.append((line, entry))
        except (ValueError, TypeError, KeyError):
            damaged.append(number)
    # What follows the last line feed: nothing, or a half line.
    return lines, damaged[:-1] if damaged and damaged[-1] == number else damaged


def _cut(file, step):
    """Cuts entries after `step` and a half last line, atomically; returns the seconds from the first to the last of them."""
    if not file.is_file():
        return 0.0
    lines, damaged = _read_lines(file)
    kept = [(line, entry) for line, entry in lines if entry["step"] <= step]
    content = b"".join(line + b"\n" for line, _ in kept)
    if damaged:
        aside = file.with_name(f"damaged-{int(time.time())}-{file.name}")
        aside.write_bytes(file.read_bytes())
        logging.warning("%s: lines %s are damaged and left out; the file as it was is %s.", file, damaged[:5], aside)
    if content != file.read_bytes():
        temporary = file.with_suffix(".tmp")
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    # From the last line that is kept it would be longer, but that one may be of a process that ended long before.
    times = [entry["time_seconds"] for _, entry in lines if entry["step"] > step]
    return max(times) - min(times) if times else 0.0


def _plain(value):
    """Returns a value as JSON has it; numbers that are not finite become text, for JSON has none."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (int, float)):
        raise TypeError(f"a metric is a number, text or a list of them, not {value!r}.")
    return value if math.isfinite(value) else str(value)


class _EventFile:
    """A TensorBoard event file: numbers as scalars, samples as text. Made at the first write: no run waits for the import.

    It is written by TensorBoard's record writer, not by its event file writer: that one imports TensorFlow where there is one.
    """

    def __init__(self, directory, step):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._make = Event
        self._file = RecordWriter(open(directory / name, "ab"))  # noqa: SIM115  closed by close()
        self._add(file_version="brain.Event:2")
        # Whatever an earlier process wrote from this step on is void.
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, entry, values):
        """Adds one entry of metrics.jsonl; `values` are its metrics before they became JSON."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        parts = []
        for name, value in values.items():
            if isinstance(value, list):
                parts += [_text_summary(f"{name}/{number}", item) for number, item in enumerate(value)]
            elif isinstance(value, str):
                parts.append(_text_summary(name, value))
            elif value is not None:
                parts.append(Summary.Value(tag=name, simple_value=float(value)))
        self._add(step=entry["step"], wall_time=entry["time_seconds"], summary=Summary(value=parts))
        self._file.flush()

    def close(self):
        self._file.close()

    def _add(self, *, wall_time=None, **content):
        self._file.write(self._make(wall_time=wall_time or time.time(), **content).SerializeToString())


def _text_summary(tag, item):
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata

    text = item["prompt"] + item["text"] if isinstance(item, dict) and {"prompt", "text"} <= item.keys() else str(item)
    # TensorBoard reads Markdown; an indented block is shown as it is.
    block = "".join(f"    {line}\n" for line in text.split("\n"))
    tensor = TensorProto(dtype=DT_STRING, string_val=[block.encode("utf-8", "replace")])
    return Summary.Value(tag=tag, metadata=create_summary_metadata(tag, ""), tensor=tensor)


class TimeAccount:
    """Books every second of wall time to a category; the categories' sum is the wall time.

    `with account.spend("compile")`: a nested spend pauses the outer one. What nothing claims is idle.
    `on_change(category)` is called with each category that is entered or returned to. `failed_in`: the innermost category that
    an exception left, or None.
    """

    def __init__(self, clock=time.perf_counter, on_change=lambda category: None):
        self._clock, self._stack, self._on_change = clock, ["idle"], on_change
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self.failed_in = None
        self._since = clock()

    @contextlib.contextmanager
    def spend(self, category):
        """Books the time inside the block to `category`."""
        if category not in self._seconds:
            raise KeyError(f"time category {category!r} is unknown; known: {', '.join(CATEGORIES)}")
        self._settle()
        self._stack.append(category)
        self._on_change(category)
        try:
            yield
        except BaseException:
            self.failed_in = self.failed_in or category
            raise
        finally:
            self._settle()
            self._stack.pop()
            self._on_change(self._stack[-1])

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
    """Tokens per second, step time, waiting for data, MFU and memory over the last full log window.

    Step time counts stepping and waiting for data; evaluations, samples and saves are not in it. A window that an evaluation
    or the run's end closed early is too short to say much: it is joined with the windows before it.
    """

    def __init__(self, *, tokens_per_step, flops_per_token, peak_flops):
        self.tokens_per_step, self.flops_per_token, self.peak_flops = tokens_per_step, flops_per_token, peak_flops
        self._marks, self._longest, self._figures = [], 0, {}

    def update(self, step, seconds, devices=()):
        """Closes a window at `step`; `seconds`: the account's totals. The first call only opens one."""
        if self._marks and step <= self._marks[-1][0]:
            return
        if self._marks:
            self._longest = max(self._longest, step - self._marks[-1][0])
        self._marks.append((step, seconds["step"], seconds["data_wait"]))
        while len(self._marks) > 2 and step - self._marks[1][0] >= self._longest:
            self._marks.pop(0)
        if len(self._marks) > 1:
            self._measure(devices)

    def figures(self):
        """Returns the figures of the last window."""
        return dict(self._figures)

    def _measure(self, devices):
        (first, stepped_before, waited_before), (last, stepped, waited) = self._marks[0], self._marks[-1]
        waited -= waited_before
        spent = max(stepped - stepped_before + waited, 1e-9)
        rate = (last - first) * self.tokens_per_step / spent
        self._figures = {
            "throughput/tokens_per_second": rate,
            "throughput/step_seconds": spent / (last - first),
            "throughput/data_wait_share": waited / spent,
            "memory/host_peak_bytes": host.peak_memory_bytes(),
        }
        if self.peak_flops:
            self._figures["throughput/mfu"] = rate * self.flops_per_token / self.peak_flops
        stats = [device.memory_stats() for device in devices if device.platform != "cpu"]
        peaks = [entry["peak_bytes_in_use"] for entry in stats if entry and "peak_bytes_in_use" in entry]
        if peaks:
            self._figures["memory/device_peak_bytes"] = max(peaks)


class Progress:
    """A bar with time to go on a terminal, plain lines elsewhere.

    total: last step, or none. start: step that the run goes on from. fraction: returns the share of the time that is used
    up, for runs that end by the clock. is_shown: whether this process is the one that speaks. While the
    bar is shown, log lines appear above it.
    """

    def __init__(self, *, total, start, fraction=None, stream=None, is_shown=True):
        self.total, self.start, self.step, self.is_shown = total, start, start, is_shown
        self._fraction = fraction or (lambda: 0.0)
        self._began, self._bar, self._began_at, self._moved = time.monotonic(), None, self._fraction(), []
        stream = stream or sys.stderr
        if is_shown and stream.isatty() and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm

            form = "{percentage:3.0f}% {bar:20} {desc}"
            self._bar = tqdm(total=1.0, initial=self._share(start), bar_format=form, file=stream, dynamic_ncols=True)
            self._bar.set_description_str(f"step {start:,}")
            for handler in _terminal_handlers():
                self._moved.append((handler, handler.setStream(_AboveBar(handler.stream, tqdm))))

    def update(self, step, values):
        """Shows the figures of `step`."""
        self.step = step
        if not self.is_shown:
            return
        of = f"/{self.total}" if self.total else ""
        eta = f"eta {duration(self._remaining(step))}"
        if self._bar is None:
            logging.info("%s", "  ".join([f"step {step}{of}", *_figures(values), eta]))
            return
        # A narrow terminal cuts the line: what people look for comes first.
        self._bar.set_description_str("  ".join([f"step {step}{of}", eta, *_figures(values)]), refresh=False)
        self._bar.n = self._share(step)
        self._bar.refresh()

    def message(self, text):
        """Shows a line that stays, above the bar if there is one."""
        if self.is_shown:
            logging.info("%s", text)

    def close(self):
        """Leaves the terminal tidy."""
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._moved = []
        if self._bar is not None:
            self._bar.close()

    def _share(self, step):
        """Share of the run that is done, by the steps or by the clock, whichever is further."""
        return min(1.0, max(step / self.total if self.total else 0.0, self._fraction()))

    def _remaining(self, step):
        """Seconds to go, by the steps or by the clock, whichever ends first."""
        spent = time.monotonic() - self._began
        ends = []
        if self.total and step > self.start:
            ends.append(spent * (self.total - step) / (step - self.start))
        clock = self._fraction()
        if clock > self._began_at:
            ends.append(spent * (1 - clock) / (clock - self._began_at))
        return min(ends, default=math.nan)


class _AboveBar:
    """The stream of a log handler whose lines go above the bar: they would land in the middle of it."""

    def __init__(self, stream, tqdm):
        self._stream, self._tqdm = stream, tqdm

    def write(self, text):
        with self._tqdm.external_write_mode(file=self._stream):
            self._stream.write(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _terminal_handlers():
    """The log handlers that write to a terminal."""
    found = {logging.get_absl_handler().python_handler, *python_logging.getLogger().handlers}
    return [h for h in found if isinstance(h, python_logging.StreamHandler) and getattr(h.stream, "isatty", bool)()]


def duration(seconds):
    """Returns seconds as people say them: 45s, 3m05s, 2h10m, 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    seconds = round(seconds)
    minutes, hours = seconds // 60, seconds // 3600
    if minutes < 1:
        return f"{seconds}s"
    if hours < 1:
        return f"{minutes}m{seconds % 60:02d}s"
    return f"{hours}h{minutes % 60:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def count(number):
    """Returns a count as people say it, three digits and a unit: 950, 12.3 k, 3.28 M, 1.50 B, 300 T."""
    return _scaled(number, 1000, ("", " k", " M", " B", " T"))


def size(number_bytes):
    """Returns bytes as people say them: 512 B, 1.10 GiB."""
    return _scaled(number_bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(number, base, units):
    power = 0
    # 999.5 is shown as 1000 of a unit: it belongs to the next.
    while power < len(units) - 1 and abs(number) >= 999.5:
        number, power = number / base, power + 1
    digits = 0 if power == 0 else max(0, 2 - math.floor(math.log10(max(abs(number), 1.0))))
    return f"{number:.{digits}f}{units[power]}"


def _figures(values):
    """Returns what is shown of a step's figures, most looked-for first."""
    forms = {
        "train/loss": "loss {:.4f}",
        "validation/bits_per_byte": "validation {:.4f} bits/byte",
        "throughput/tokens_per_second": "{:,.0f} tokens/s",
        "throughput/mfu": "mfu {:.0%}",
        "throughput/step_seconds": "{:.3g} s/step",
        "train/learning_rate": "lr {:.1e}",
        "train/skipped_steps": "skipped {:.0f}",
    }
    shown = {name: value for name, value in values.items() if name != "train/skipped_steps" or value}
    return [form.format(shown[name]).replace("e-0", "e-") for name, form in forms.items() if name in shown]
