"""What is written and booked: metrics file, events, time account, throughput, progress."""

import io
import json
import math

import pytest
from absl import logging

from llmos_jax.train import metrics as lib


def test_file_is_what_an_uninterrupted_run_would_have_written(tmp_path):
    writer = lib.MetricsWriter(tmp_path, is_writer=True)
    for step in range(1, 6):
        writer.write(step, {"train/loss": 1.0 / step, "train/bad": math.nan})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "train/lo')  # killed while writing
    assert [entry["step"] for entry in lib.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    writer = lib.MetricsWriter(tmp_path, is_writer=True, step=3)
    writer.write(4, {"train/loss": 9.0})
    writer.close()
    entries = lib.read_metrics(tmp_path / "metrics.jsonl")
    assert [(entry["step"], entry["train/loss"]) for entry in entries] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]
    assert entries[0]["train/bad"] == "nan"
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = lib.MetricsWriter(tmp_path, is_writer=True)
    for step in (1, 2):
        writer.write(step, {"train/loss": 0.5 * step})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]


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
    account.merge({"step": 12.0})
    assert account.totals()["step"] == 18
    with pytest.raises(KeyError, match="unknown"), account.spend("lunch"):
        pass


def test_throughput_counts_steps_and_waiting_only():
    meter = lib.ThroughputMeter(tokens_per_step=100, flops_per_token=10.0, peak_flops=5000.0)
    meter.update(10, {"step": 1.0, "data_wait": 0.0})
    assert meter.figures() == {}
    meter.update(20, {"step": 4.0, "data_wait": 1.0})
    figures = meter.figures()
    assert figures["throughput/tokens_per_second"] == 250 and figures["throughput/step_seconds"] == 0.4
    assert figures["throughput/data_wait_share"] == 0.25 and figures["throughput/mfu"] == 0.5
    unknown = lib.ThroughputMeter(tokens_per_step=1, flops_per_token=1.0, peak_flops=None)
    unknown.update(0, {"step": 0.0, "data_wait": 0.0})
    unknown.update(1, {"step": 1.0, "data_wait": 0.0})
    assert "throughput/mfu" not in unknown.figures()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    bar = lib.Progress(total=10, start=0, stream=terminal)
    bar.update(5, {"train/loss": 2.5, "throughput/tokens_per_second": 1234.0})
    bar.close()
    assert "5/10" in terminal.getvalue() and "loss 2.5000" in terminal.getvalue() and "1,234" in terminal.getvalue()
    lines = []
    monkeypatch.setattr(logging, "info", lambda form, *values: lines.append(form % values))
    lib.Progress(total=10, start=0, stream=io.StringIO()).update(5, {"train/loss": 2.5})
    assert lines[0].startswith("step 5/10  loss 2.5000  eta ")


def test_durations():
    assert [lib.duration(s) for s in (5, 65, 7265, math.nan)] == ["5s", "1m05s", "2h01m", "?"]
