"""Whole runs through the public functions: resume, signals, damage, identity. Rows R1, R7, C1, C6, N1 and N2."""

import collections
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llmos_jax import api
from llmos_jax.compute import host
from llmos_jax.errors import (
    CheckpointError,
    ConfigError,
    DataIdentityMismatch,
    DeviceMemoryError,
    Preempted,
    RunDirectoryError,
    TrainingDiverged,
)
from llmos_jax.serve.generate import Generator
from llmos_jax.serve.sample import SamplingConfig
from llmos_jax.train import loop
from llmos_jax.train.checkpoint import verify_checkpoints
from llmos_jax.train.directory import DONE_FILE
from llmos_jax.train.metrics import read_metrics

STEPS = 30
BASE = {
    "train.steps": STEPS,
    "train.log_every_steps": 5,
    "train.evaluate_every_steps": "none",
    "checkpoint.every_steps": 10,
    "checkpoint.keep": 3,
    "model.layers": 1,  # most of a run of a model as small as this is tracing and compiling
    "model.dropout": 0.1,
    "task.evaluation_batches": 1,
    "task.sample_tokens": 1,
    "optim.schedule": "constant",  # so that more `steps` prolong a run and change nothing before
    "optim.warmup": 0.0,
    "optim.ema": 0.9,
}


def settings_for(**overrides):
    changed = BASE | {name.replace("__", "."): value for name, value in overrides.items()}
    return api.load_settings("experiments/gpt.py:smoke", [(name, str(value)) for name, value in changed.items()])[0]


def losses(directory):
    return {e["step"]: e["train/loss"] for e in read_metrics(directory / "metrics.jsonl") if "train/loss" in e}


def final_params(directory, step=None):
    return jax.tree.map(np.asarray, api.load(directory, step=step).params)


@contextlib.contextmanager
def hashed_batches():
    """Yields {index: hash} of all batches that are made in the block."""
    real, hashes = loop.make_batch, collections.defaultdict(set)

    def make(task, placement, rows, index):
        batch = real(task, placement, rows, index)
        digest = hashlib.sha256()
        for name, values in sorted(batch.items()):
            digest.update(name.encode() + np.asarray(values).tobytes())
        hashes[index].add(digest.hexdigest())
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_batch", make)
        yield hashes


@pytest.fixture(scope="module")
def uninterrupted_batches(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    with hashed_batches() as batches:
        api.run_training(settings_for(), directory)
    return directory, batches


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_batches):
    return uninterrupted_batches[0]


def command(directory, *flags):
    overrides = [f"--config.{name}={value}" for name, value in BASE.items()]
    return [
        sys.executable,
        "-m",
        "llmos_jax.main",
        "--config=experiments/gpt.py:smoke",
        f"--workdir={directory}",
        *overrides,
        *flags,
    ]


def test_a_run_learns_and_leaves_what_it_promises(uninterrupted):
    curve = losses(uninterrupted)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS] < curve[1] - 0.3
    names = {entry.name for entry in uninterrupted.iterdir()}
    assert {"settings.json", "metrics.jsonl", "checkpoints", "tokenizer.json", "report.html", "log.txt", DONE_FILE} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    summary = json.loads((uninterrupted / DONE_FILE).read_text())
    assert {"loss", "perplexity", "bits_per_byte"} <= set(summary["evaluation"])
    assert "throughput/tokens_per_second" in summary["throughput"] and "throughput/mfu" in summary["throughput"]
    samples = [entry["samples"] for entry in read_metrics(uninterrupted / "metrics.jsonl") if "samples" in entry]
    assert samples and all(sample["prompt"] for sample in samples[-1])


def test_a_run_goes_over_stages_and_back(tmp_path):
    """Saved in the layers' natural order, drawn from and read where they lie: in several blocks a stage, and cut three ways."""
    common = dict(model__layers=4, model__execution="scan", model__dropout=0.0)
    stages = dict(mesh__pipeline=2, mesh__pipeline_repeats=2, mesh__data=2, mesh__model=2)
    api.run_training(settings_for(train__steps=6, **common), tmp_path / "plain")
    for steps, mesh, tokens in ((2, stages, 1), (4, {}, 1), (6, stages, 12)):
        settings = settings_for(train__steps=steps, task__sample_tokens=tokens, **common, **mesh)
        api.run_training(settings, tmp_path / "over")
    curves = [losses(tmp_path / name) for name in ("plain", "over")]
    assert list(curves[0]) == list(curves[1]) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(curves[1].values()), list(curves[0].values()), rtol=1e-5)

    samples = [entry["samples"] for entry in read_metrics(tmp_path / "over" / "metrics.jsonl") if "samples" in entry][-1]
    assert len(set(samples[0]["text"])) > 3
    sampling = SamplingConfig(max_tokens=12, temperature=settings.task.temperature, seed=settings.seed)
    whole, staged = api.load(tmp_path / "over"), api.load(tmp_path / "over", mesh=settings.mesh)
    drawn = whole.generate(settings.task.prompts, sampling)
    assert [sample["text"] for sample in samples] == [done.text for done in drawn]
    scores = [model.score(["def "], ["foo(bar)"])[0].loglikelihood for model in (whole, staged)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_what_was_trained_outlives_its_samples(tmp_path, monkeypatch):
    """An error in the last evaluation or samples does not cost the steps, and the same command does what is missing."""
    settings = settings_for(train__steps=4, checkpoint__every_steps="none")
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            api.run_training(settings, tmp_path)
    assert [row.step for row in verify_checkpoints(tmp_path / "checkpoints") if row.is_good] == [4]
    assert api.run_training(settings, tmp_path)["step"] == 4
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    assert len([entry for entry in read_metrics(tmp_path / "metrics.jsonl") if "samples" in entry]) == 1


def test_resumed_run_is_bitwise_the_same(uninterrupted_batches, tmp_path):
    """Row R1: ten steps, exit, resume to thirty; another rhythm of logging changes nothing."""
    uninterrupted, expected = uninterrupted_batches
    api.run_training(settings_for(train__steps=10), tmp_path)
    with hashed_batches() as batches:
        api.run_training(settings_for(train__log_every_steps=3), tmp_path)
    assert min(batches) == 10 and all(batches[index] == expected[index] for index in range(10, STEPS))
    assert len(set().union(*expected.values())) == len(expected)  # or equal hashes would say nothing
    assert losses(tmp_path) == losses(uninterrupted) and len(losses(tmp_path)) == STEPS
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path), final_params(uninterrupted))


def strike(directory, number, step):
    """Starts the run, sends it the signal when `step` is logged; returns (exit code, what it said)."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command(directory), stderr=subprocess.PIPE, text=True, env=environment) as process:
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith(f"step {step}/"):
                break
        process.send_signal(number)
        sent = time.monotonic()
        said += process.stderr.read()
        code = process.wait(timeout=60)
    assert time.monotonic() - sent < 60  # 1.5 s on a quiet machine; tests share theirs
    return code, said


def test_signals_lose_no_step_and_a_kill_what_was_not_saved(uninterrupted, tmp_path):
    """Row R7: exit code 42 at once after SIGTERM and Ctrl-C; and kill -9 at any moment: the metrics file and the curve are
    bitwise those of the uninterrupted run."""
    for number, step in ((signal.SIGTERM, 5), (signal.SIGINT, 15)):
        code, said = strike(tmp_path, number, step)
        assert code == 42 and "Preempted: stopped by" in said, said
        stopped_at = max(losses(tmp_path))
        assert stopped_at >= step and (tmp_path / "checkpoints" / str(stopped_at)).is_dir()
    code, said = strike(tmp_path, signal.SIGKILL, 25)
    assert code == -signal.SIGKILL and f"restored step {stopped_at}" in said, said
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(re.search(r"restored step (\d+)", done.stderr)[1]) < 25, done.stderr
    assert losses(tmp_path) == losses(uninterrupted)


def test_an_evaluation_that_was_due_is_not_lost_to_a_signal(tmp_path, monkeypatch):
    """Stopped between a step and its evaluation: the next process evaluates first, and never twice."""
    due = {"train__steps": 12, "train__evaluate_every_steps": 6, "train__log_every_steps": 1}
    real = loop.Preemption.poll
    calls = []

    def poll(self):
        calls.append(1)
        if len(calls) == 7:  # the seventh turn of the loop, before its evaluation
            self.signal_name = "SIGTERM"
        real(self)

    monkeypatch.setattr(loop.Preemption, "poll", poll)
    with pytest.raises(Preempted):
        api.run_training(settings_for(**due), tmp_path)
    for steps in (12, 18):
        api.run_training(settings_for(**due | {"train__steps": steps}), tmp_path)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "validation/loss" in entry] == [6, 12, 18]


def test_a_crash_right_after_a_save_loses_no_line_of_metrics(uninterrupted, tmp_path, monkeypatch):
    """Log windows longer than the way to the save: what the checkpoint holds, the metrics file holds, too."""
    real = loop._save

    def save_and_crash(run, state, position):
        real(run, state, position)
        run.checkpointer.wait()
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", save_and_crash)
        with pytest.raises(RuntimeError, match="crash"):
            api.run_training(settings_for(train__log_every_steps=100), tmp_path)
    assert list(losses(tmp_path)) == list(range(1, 11))
    api.run_training(settings_for(), tmp_path)
    assert list(losses(tmp_path)) == list(losses(uninterrupted))


def test_a_finished_run_says_so_and_is_left_alone(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    start = time.monotonic()
    summary = api.run_training(settings_for(), uninterrupted)
    assert summary["step"] == STEPS and time.monotonic() - start < 2
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_damage_falls_back_and_the_curve_is_the_same(uninterrupted, tmp_path):
    """Row C1 end to end: the newest step is damaged, the one before is trained on."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / DONE_FILE).unlink()
    newest = run / "checkpoints" / str(STEPS)
    for file in (newest / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))
    api.run_training(settings_for(), run)
    assert (run / "checkpoints" / f"quarantine-{STEPS}").is_dir()
    assert losses(run) == losses(uninterrupted)


def test_another_experiment_is_refused_and_nothing_lost(uninterrupted):
    before = sorted(p.name for p in uninterrupted.iterdir())
    with pytest.raises(RunDirectoryError, match="holds another experiment .*optim.learning_rate"):
        api.run_training(settings_for(optim__learning_rate=1e-4, train__steps=40), uninterrupted)
    with pytest.raises(RunDirectoryError, match="seed: 0 -> 1"):
        api.run_training(settings_for(seed=1, train__steps=40), uninterrupted)
    assert sorted(p.name for p in uninterrupted.iterdir()) == before
    (uninterrupted / "settings.json").rename(uninterrupted / "kept")
    (uninterrupted / "settings.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="settings.json is not JSON"):
        api.run_training(settings_for(train__steps=40), uninterrupted)
    (uninterrupted / "kept").replace(uninterrupted / "settings.json")


def test_unusable_run_directories(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="can't be used"):
        api.run_training(settings_for(), tmp_path / "file")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        api.load(tmp_path)
    with pytest.raises(RunDirectoryError, match="init_from=.* is no run directory"):
        api.run_training(settings_for(train__init_from=tmp_path / "nothing"), tmp_path / "new")


def test_warm_start_begins_where_the_other_run_ended(uninterrupted, tmp_path):
    api.run_training(settings_for(train__init_from=uninterrupted, train__steps=2, optim__learning_rate=1e-6), tmp_path / "warm")
    assert losses(tmp_path / "warm")[1] < losses(uninterrupted)[1] - 0.3


def test_warm_start_from_another_tokenizer_is_refused(uninterrupted, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(uninterrupted, other)
    (other / "tokenizer.json").write_text('{"another": 1}')
    with pytest.raises(DataIdentityMismatch, match="another tokenizer.json than this run"):
        api.run_training(settings_for(train__init_from=other, train__steps=2), tmp_path / "warm")


def test_a_run_whose_weights_are_not_saved_does_not_end_as_done(tmp_path, monkeypatch):
    """Row C4: the disk is full at the last save; once there is room, the same command ends what was begun."""
    flags = {"train__steps": 4, "checkpoint__every_steps": 2}
    real = host.free_disk_bytes
    monkeypatch.setattr(host, "free_disk_bytes", lambda path: 1000)
    with pytest.raises(CheckpointError, match="step 4 could not be saved"):
        api.run_training(settings_for(**flags), tmp_path)
    assert not (tmp_path / DONE_FILE).exists()
    monkeypatch.setattr(host, "free_disk_bytes", real)
    api.run_training(settings_for(**flags), tmp_path)
    assert (tmp_path / DONE_FILE).exists() and api.load(tmp_path)


def test_samples_and_traces_on_request(tmp_path):
    """Samples have a rhythm of their own; a profiler trace covers the steps that were named."""
    api.run_training(settings_for(train__steps=6, train__sample_every_steps=2, train__profile_steps="3,4"), tmp_path)
    sampled = [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl") if "samples" in entry]
    assert sampled == [2, 4, 6]
    assert [file for file in (tmp_path / "profile").rglob("*") if file.is_file()]


def test_training_by_the_clock_ends_in_time_and_goes_on_where_it_was(tmp_path):
    """The schedule reaches its end with the clock; a prolonged run counts the time that was used."""
    flags = {"train__steps": "none", "train__max_seconds": 3.0, "optim__schedule": "linear", "optim__final_share": 0.0}
    summary = api.run_training(settings_for(**flags), tmp_path)
    assert 3.0 <= summary["elapsed_seconds"] < 30 and summary["step"] > 5
    rates = [e["train/learning_rate"] for e in read_metrics(tmp_path / "metrics.jsonl") if "train/learning_rate" in e]
    assert rates[-1] < 0.2 * max(rates)
    again = api.run_training(
        settings_for(**flags | {"train__max_seconds": 1000.0, "train__steps": summary["step"] + 2}), tmp_path
    )
    assert again["step"] == summary["step"] + 2 and again["elapsed_seconds"] > summary["elapsed_seconds"]


def test_batches_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="batch_size=12 is not divisible by 8 data shards.*the next size that is: 16"):
        api.run_training(settings_for(train__batch_size=12), tmp_path / "run")
    for mesh, message in (
        ({"mesh__context": 4}, "data.length of 100 can't be cut into 2 chunks for each of the 4 shards.*: 104"),
        ({"mesh__model": 8}, "data.length=100 is not divisible by the 8 shards of mesh axis context x model.*: 104, or set"),
    ):
        with pytest.raises(ConfigError, match=message):
            api.run_training(settings_for(data__length=100, model__context=128, model__heads=8, **mesh), tmp_path / "length")
    with pytest.raises(ConfigError, match="train.microbatches=3"):
        settings_for(train__microbatches=3)
    with pytest.raises(ConfigError, match="model.context=32 is shorter than .*data.length=64"):
        api.run_training(settings_for(model__context=32), tmp_path / "run2")
    with pytest.raises(ConfigError, match="model.context=128 is longer than .*data.length=64: .* never be trained"):
        api.run_training(settings_for(model__context=128), tmp_path / "run2")
    with pytest.raises(ConfigError, match="init_from is empty"):
        settings_for(train__init_from="")
    with pytest.raises(ConfigError, match="model.vocab_size=100 is smaller than the tokenizer's 257"):
        api.run_training(settings_for(model__vocab_size=100), tmp_path / "run3")


def test_a_model_that_does_not_fit_says_what_takes_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.memory, "device_limit_bytes", lambda device: 100_000)
    with pytest.raises(
        DeviceMemoryError,
        match=r"needs .* MiB per device and there are 0.10 MiB: .*(optimizer|parameters|activations).*batch_size",
    ):
        api.run_training(settings_for(), tmp_path / "run")


@pytest.mark.parametrize(
    ("where", "doing"),
    [("step", "in a training step"), ("evaluate", "in an evaluation"), ("compile", "while the training step was compiled")],
)
def test_a_device_that_runs_out_says_in_what_and_the_advice_can_be_followed(where, doing, tmp_path, monkeypatch):
    def run_out(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nA table")

    real = loop._compile

    def compile_step(run):
        if where == "compile":
            run_out()
        compiled = real(run)
        return run_out if where == "step" else compiled

    monkeypatch.setattr(loop, "_compile", compile_step)
    if where == "evaluate":
        monkeypatch.setattr("llmos_jax.evaluate.evaluator.make_evaluator", lambda *_: run_out)
    account = "parameters .* MiB" if where == "compile" else r"needs .* per device and there are .* activations 0.6"
    with pytest.raises(DeviceMemoryError, match=rf"{doing} \(.*allocating 5 bytes. A table\): .*{account}.*raise train.micro"):
        api.run_training(settings_for(train__steps=2), tmp_path)
    if where != "evaluate":  # no step is lost with another batch: the directory is not this one's yet
        monkeypatch.undo()
        api.run_training(settings_for(train__steps=2, train__batch_size=16), tmp_path)


def test_a_refused_command_leaves_the_run_as_it_was(tmp_path):
    """Other text makes another tokenizer: neither it nor the settings may replace those that the weights were trained with."""
    source, run = tmp_path / "text.txt", tmp_path / "run"
    given = [(name, str(value)) for name, value in BASE.items() if name != "train.steps"]
    command = f"experiments/gpt.py:smoke,data={source},tokenizer=bpe:300"
    source.write_text("the quick brown fox\n" * 200)
    api.run_training(api.load_settings(command, [*given, ("train.steps", "2")])[0], run)
    kept = {name: (run / name).read_text() for name in ("tokenizer.json", "settings.json")}
    source.write_text("entirely different words, over and over\n" * 200)
    with pytest.raises(DataIdentityMismatch, match="does not belong to this data"):
        api.run_training(api.load_settings(command, [*given, ("train.steps", "3")])[0], run)
    assert {name: (run / name).read_text() for name in kept} == kept


def test_bad_batches_are_skipped_bitwise_and_too_many_stop_the_run(uninterrupted, tmp_path, monkeypatch):
    """Rows N1 and N2 through the whole loop: a poisoned batch leaves the next losses as if it had not been."""
    real = loop.make_batch

    def poisoned(bad):
        def make(task, placement, rows, index):
            batch = real(task, placement, rows, index - sum(b < index for b in bad) if bad != "all" else index)
            if bad == "all" or index in bad:
                batch["weights"] = batch["weights"] * np.float32(np.nan)
            return batch

        return make

    monkeypatch.setattr(loop, "make_batch", poisoned({3, 7}))
    api.run_training(settings_for(train__steps=12), tmp_path / "poisoned")
    clean, spoiled = losses(uninterrupted), losses(tmp_path / "poisoned")
    assert [spoiled[step] for step in (4, 8)] == ["nan", "nan"]
    assert [loss for loss in spoiled.values() if loss != "nan"] == list(clean.values())[:10]
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "poisoned"), final_params(uninterrupted, step=10))
    monkeypatch.setattr(loop, "make_batch", poisoned("all"))
    with pytest.raises(TrainingDiverged, match="10 steps in a row were skipped, the last at batch 9.*embedding"):
        api.run_training(settings_for(train__log_every_steps=1), tmp_path / "all")


def test_nothing_is_read_from_the_device_between_log_steps(tmp_path, monkeypatch):
    """Every value that reaches the host between steps does so in `flush`, once per log window.

    On accelerators the loop's transfer guard sees to it; a CPU has none, so here every way to an array's values is counted.
    """
    seen, is_getting = [], False
    real_get, real_compile, array = jax.device_get, loop._compile, type(jax.numpy.zeros(()))
    real_value = array._value

    def get(x):
        nonlocal is_getting
        seen.append("get")
        is_getting = True
        try:
            return real_get(x)
        finally:
            is_getting = False

    def value(self):
        if not is_getting:
            seen.append("value")
        return real_value.fget(self)

    def compile_step(run):
        compiled = real_compile(run)
        return lambda *given: (seen.append("step"), compiled(*given))[1]

    monkeypatch.setattr(loop, "_compile", compile_step)
    monkeypatch.setattr(loop.jax, "device_get", get)
    monkeypatch.setattr(array, "_value", property(value))
    for name in ("block_until_ready", "effects_barrier"):
        monkeypatch.setattr(loop.jax, name, lambda *x, name=name: seen.append(name))
    api.run_training(settings_for(train__steps=20, train__log_every_steps=5, checkpoint__every_steps="none"), tmp_path / "run")
    stepping = seen[seen.index("step") : len(seen) - seen[::-1].index("step")]
    # Windows of 5, read one step late.
    assert stepping == (["step"] * 6 + ["get"] + (["step"] * 5 + ["get"]) * 2 + ["step"] * 4)
