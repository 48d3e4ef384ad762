"""What is written and booked: metrics file, events, time account, throughput, progress."""

import errno
import io
import json
import logging as python_logging
import math
import os
import time

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from llmos_jax import errors
from llmos_jax.train import metrics as lib


def test_file_is_what_an_uninterrupted_run_would_have_written(tmp_path):
    writer = lib.MetricsWriter(tmp_path, is_writer=True)
    for step in range(1, 6):
        writer.write(step, {"train/loss": 1.0 / step, "train/bad": math.nan})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "train/lo')  # killed while writing
    entries = lib.read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5]
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]
    writer = lib.MetricsWriter(tmp_path, is_writer=True, step=3)
    assert writer.lost_seconds == entries[4]["time_seconds"] - entries[3]["time_seconds"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(kept)
    writer.write(4, {"train/loss": 9.0})
    writer.close()
    entries = lib.read_metrics(tmp_path / "metrics.jsonl")
    assert [(entry["step"], entry["train/loss"]) for entry in entries] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]
    assert entries[0]["train/bad"] == "nan"
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("damaged-*"))


def test_every_kind_of_value_is_json(tmp_path):
    writer = lib.MetricsWriter(tmp_path, is_writer=True)
    values = {"a/numpy": np.float32(0.5), "a/jax": jnp.float32(1.5), "a/count": np.int64(3), "a/low": jnp.bfloat16(2.0)}
    writer.write(1, values | {"a/inf": -math.inf, "a/text": "é\u2028\n", "a/list": ["x", {"y": math.nan}], "a/none": None})
    with pytest.raises(TypeError, match="a metric is a number"):
        writer.write(2, {"a/x": object()})
    with pytest.raises(ValueError, match="rename"):
        writer.write(2, {"step": 3})
    writer.close()
    (entry,) = lib.read_metrics(tmp_path / "metrics.jsonl")
    assert entry.pop("time_seconds") == pytest.approx(time.time(), abs=60)
    expected = {"step": 1, "a/numpy": 0.5, "a/jax": 1.5, "a/count": 3, "a/low": 2.0, "a/inf": "-inf", "a/text": "é\u2028\n"}
    assert entry == expected | {"a/list": ["x", {"y": "nan"}], "a/none": None}


def test_damage_within_the_file_is_named_and_kept_aside(tmp_path):
    file = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 1, "time_seconds": 1.0}\n\x80\x00{]\n{"step": 2, "time_seconds": 2.0}\n\x00\x00\x00'
    file.write_bytes(damaged)
    with pytest.raises(errors.DataError, match="line 2"):
        lib.read_metrics(file)
    lib.MetricsWriter(tmp_path, is_writer=True, step=2).close()
    assert [entry["step"] for entry in lib.read_metrics(file)] == [1, 2]
    (aside,) = tmp_path.glob("damaged-*")
    assert aside.read_bytes() == damaged


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(errors.RunDirectoryError, match="metrics.jsonl can't be written"):
        lib.MetricsWriter(tmp_path, is_writer=True)


def test_lines_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "warning", lambda form, *values: told.append(form % values))
    writer = lib.MetricsWriter(tmp_path, is_writer=True)
    write, room = os.write, [50]

    def full(descriptor, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, bytes(data[: room[0]]))
        room[0] -= written
        return written

    writer.write(1, {"train/loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for step in (2, 3, 4):
            writer.write(step, {"train/loss": float(step)})
    assert len(told) == 1 and "No space left" in told[0]
    assert [entry["step"] for entry in lib.read_metrics(tmp_path / "metrics.jsonl")] == [1]
    writer.write(5, {"train/loss": 5.0})
    assert [entry["train/loss"] for entry in lib.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    writer.close()


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = lib.MetricsWriter(tmp_path, is_writer=True)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 0.5 * step, "train/bad": math.inf})
    writer.write_samples(2, [{"prompt": "def ", "text": "f():\n  pass"}])
    os.close(writer._descriptor)  # killed: nothing is closed, nothing is flushed
    resumed = lib.MetricsWriter(tmp_path, is_writer=True, step=2)
    resumed.write(3, {"train/loss": 7.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 7.0)]
    assert events.Scalars("train/bad")[0].value == math.inf
    (text,) = events.Tensors("samples/0")
    assert text.tensor_proto.string_val[0] == b"    def f():\n      pass\n"
    resumed.close()


def test_events_that_fail_leave_the_metrics_alone(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "warning", lambda form, *values: told.append(form % values))

    class Broken:
        def __init__(self, directory, step):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = lib.MetricsWriter(tmp_path, is_writer=True)
    monkeypatch.setattr(lib, "_EventFile", Broken)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    assert lib.read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == 1.0
    assert "events of step 1 can't be written" in told[0]


def test_other_processes_write_nothing(tmp_path):
    writer = lib.MetricsWriter(tmp_path, is_writer=False)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_every_second_is_booked_once():
    now = [0.0]
    account = lib.TimeAccount(clock=lambda: now[0])
    now[0] += 1  # idle
    with account.spend("step"):
        now[0] += 5
        with account.spend("data_wait"):
            now[0] += 2
        now[0] += 1
    with pytest.raises(ValueError), account.spend("evaluate"):
        now[0] += 3
        raise ValueError
    totals = account.totals()
    assert (totals["idle"], totals["step"], totals["data_wait"], totals["evaluate"]) == (1, 6, 2, 3)
    assert sum(totals.values()) == now[0]
    assert account.goodput() == 0.5
    account.merge({"step": 12.0, "redo": 2.0})
    assert account.totals()["step"] == 18 and account.totals()["redo"] == 2
    with pytest.raises(KeyError, match="unknown"), account.spend("lunch"):
        pass


def test_the_sum_is_the_wall_time():
    began = time.perf_counter()
    account = lib.TimeAccount()
    for category in ("compile", "step", "save_block"):
        with account.spend(category):
            time.sleep(0.02)
            with account.spend("data_wait"):
                time.sleep(0.01)
        time.sleep(0.005)
    totals, wall = account.totals(), time.perf_counter() - began
    assert sum(totals.values()) == pytest.approx(wall, rel=0.01)
    assert totals["step"] >= 0.02 and totals["data_wait"] >= 0.03 and totals["idle"] >= 0.015


def test_throughput_counts_steps_and_waiting_only():
    meter = lib.ThroughputMeter(tokens_per_step=100, flops_per_token=10.0, peak_flops=5000.0)
    meter.update(10, {"step": 1.0, "data_wait": 0.0})
    assert meter.figures() == {}
    meter.update(20, {"step": 4.0, "data_wait": 1.0})
    figures = meter.figures()
    assert figures["throughput/tokens_per_second"] == 250 and figures["throughput/step_seconds"] == 0.4
    assert figures["throughput/data_wait_share"] == 0.25 and figures["throughput/mfu"] == 0.5
    assert figures["memory/host_peak_bytes"] > 10**6
    unknown = lib.ThroughputMeter(tokens_per_step=1, flops_per_token=1.0, peak_flops=None)
    unknown.update(0, {"step": 0.0, "data_wait": 0.0})
    unknown.update(1, {"step": 1.0, "data_wait": 0.0})
    assert "throughput/mfu" not in unknown.figures()


def test_a_short_window_is_joined_with_the_one_before():
    meter = lib.ThroughputMeter(tokens_per_step=100, flops_per_token=1.0, peak_flops=None)
    meter.update(10, {"step": 50.0, "data_wait": 0.0})  # with the warm-up: only opens a window
    for step, seconds in ((20, 55.0), (30, 60.0), (31, 62.0)):  # the last step of the run took long
        meter.update(step, {"step": seconds, "data_wait": 0.0})
    assert meter.figures()["throughput/step_seconds"] == pytest.approx(7 / 11)
    meter.update(31, {"step": 99.0, "data_wait": 0.0})  # no step since
    assert meter.figures()["throughput/step_seconds"] == pytest.approx(7 / 11)
    meter.update(41, {"step": 72.0, "data_wait": 0.0})
    assert meter.figures()["throughput/step_seconds"] == pytest.approx(1.0)


class Chip:
    def __init__(self, platform, stats):
        self.platform, self.memory_stats = platform, lambda: stats


def test_the_fullest_device_is_shown():
    meter = lib.ThroughputMeter(tokens_per_step=1, flops_per_token=1.0, peak_flops=None)
    chips = [Chip("gpu", {"peak_bytes_in_use": 5}), Chip("gpu", {"peak_bytes_in_use": 9}), Chip("tpu", None), Chip("cpu", {})]
    meter.update(0, {"step": 0.0, "data_wait": 0.0}, chips)
    meter.update(1, {"step": 1.0, "data_wait": 0.0}, chips)
    assert meter.figures()["memory/device_peak_bytes"] == 9


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    bar = lib.Progress(total=10, start=0, stream=terminal)
    bar.update(5, {"train/loss": 2.5, "throughput/tokens_per_second": 1234.0})
    bar.close()
    shown = terminal.getvalue()
    assert " 50% " in shown and "step 5/10  eta 0s  loss 2.5000  1,234 tokens/s" in shown
    lines = []
    monkeypatch.setattr(logging, "info", lambda form, *values: lines.append(form % values))
    values = {"train/loss": 2.5, "train/learning_rate": 6e-4, "throughput/mfu": 0.41, "train/skipped_steps": 0.0}
    lib.Progress(total=10, start=0, stream=io.StringIO()).update(5, values)
    lib.Progress(total=10, start=5, stream=io.StringIO()).update(5, {"train/skipped_steps": 2.0})
    assert lines == ["step 5/10  loss 2.5000  mfu 41%  lr 6.0e-4  eta 0s", "step 5/10  skipped 2  eta ?"]


def test_log_lines_go_above_the_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    handler = python_logging.StreamHandler(terminal)
    root = python_logging.getLogger()
    root.addHandler(handler)
    try:
        bar = lib.Progress(total=10, start=0, stream=terminal)
        bar.update(5, {})
        python_logging.getLogger("other").warning("disk is slow")
        bar.close()
        python_logging.getLogger("other").warning("later")
    finally:
        root.removeHandler(handler)
    before, _, after = terminal.getvalue().partition("disk is slow\n")
    assert before.endswith(" \r")  # the bar was wiped, and the line begins where it began
    assert "step 5/10" in after and terminal.getvalue().endswith("later\n")
    assert handler.stream is terminal


def test_time_to_go_is_of_what_ends_first(monkeypatch):
    now, clock = [100.0], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = []
    monkeypatch.setattr(logging, "info", lambda form, *values: lines.append(form % values))
    by_steps = lib.Progress(total=100, start=20, stream=io.StringIO())
    by_clock = lib.Progress(total=None, start=20, fraction=lambda: clock[0], stream=io.StringIO())
    both = lib.Progress(total=100, start=20, fraction=lambda: clock[0], stream=io.StringIO())
    now[0], clock[0] = 160.0, 0.5
    for progress in (by_steps, by_clock, both):
        progress.update(40, {})
    assert lines == ["step 40/100  eta 3m00s", "step 40  eta 1m00s", "step 40/100  eta 1m00s"]


def test_figures_as_people_say_them():
    durations = (5, 59.6, 65, 3599.7, 7265, 47 * 3600, 76 * 3600, math.nan)
    assert [lib.duration(s) for s in durations] == ["5s", "1m00s", "1m05s", "1h00m", "2h01m", "47h00m", "3d04h", "?"]
    counts = (0, 950, 999.6, 12_345, 999_600, 3_276_800, 1.5e9, 3e14)
    assert [lib.count(n) for n in counts] == ["0", "950", "1.00 k", "12.3 k", "1.00 M", "3.28 M", "1.50 B", "300 T"]
    sizes = (512, 2048, 1_178_877_952, 3 * 2**40)
    assert [lib.size(n) for n in sizes] == ["512 B", "2.00 KiB", "1.10 GiB", "3.00 TiB"]
