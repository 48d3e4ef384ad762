"""The language task: its evaluation over all validation text against one record at a time, and its contract."""

import functools
import math

import jax
import numpy as np
import pytest

from llmos_jax import config as config_lib
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.data.prepare import DataConfig, SourceConfig
from llmos_jax.errors import ConfigError
from llmos_jax.evaluate.evaluator import make_evaluator
from llmos_jax.models import gpt
from llmos_jax.tasks import language
from llmos_jax.tasks.base import make_batch
from llmos_jax.train.state import describe_model

MODEL = gpt.Config(context=32, width=32, layers=1, heads=4)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    (folder / "in").mkdir()
    for number in range(40):
        (folder / "in" / f"{number}.txt").write_text(f"text number {number}, " * (number % 7 + 1))
    data = DataConfig(
        sources=(SourceConfig(path=str(folder / "in")),), tokenizer="byte", length=32, cache_dir=str(folder / "cache")
    )
    return language.build(language.Config(), model=MODEL, data=data, batch_size=8, seed=0, log=lambda line: None)


@pytest.mark.parametrize("mesh", [dict(data=4, model=2), dict(data=2, context=4)], ids=str)
def test_evaluation_is_the_sum_over_single_records(task, mesh):
    """Padding of the last batch, sharding and batching change nothing: every byte of validation text counts once."""
    placement, single = make_placement(MeshConfig(**mesh)), make_placement(devices=jax.devices()[:1])
    handle, plain = (describe_model(functools.partial(gpt.build, task.model_config, p), p) for p in (placement, single))
    params = jax.jit(handle.init, out_shardings=handle.shardings)(jax.random.key(0))
    polls = []
    metrics = make_evaluator(task, handle, placement)(params, lambda: polls.append(1))
    (spec,) = task.evaluations
    nll = tokens = text_bytes = 0.0
    model = plain.merge(jax.tree.map(np.asarray, params))
    for index in range(spec.batches):
        batch = spec.rows(index, 0, 8)
        hidden = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        logits = np.asarray(model.logits(hidden), np.float64)
        chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        lse = np.log(np.exp(logits).sum(-1))
        nll += ((lse - chosen) * batch["weights"]).sum()
        tokens += batch["weights"].sum()
        text_bytes += batch["target_bytes"].sum()
    assert len(polls) == spec.batches > 1
    assert metrics["validation/loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert metrics["validation/bits_per_byte"] == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-5)
    assert metrics["validation/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert 0 <= metrics["validation/accuracy"] <= 1


def test_batches_have_the_fields_that_are_promised(task):
    placement = make_placement(MeshConfig(data=8))
    batch = make_batch(task, placement, task.rows, 0)
    assert set(batch) == set(task.fields)
    for name, field in task.fields.items():
        assert batch[name].shape == (8, *field.shape) and batch[name].dtype == field.dtype
        assert batch[name].sharding == placement.sharding(*field.axes)
    expected = task.rows(0, 0, 8)
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values)


def test_a_sharded_length_lies_in_chunks_from_both_ends(task):
    placement = make_placement(MeshConfig(data=4, context=2))
    batch, expected = make_batch(task, placement, task.rows, 0), task.rows(0, 0, 8)
    order = [*range(8), *range(24, 32), *range(8, 16), *range(16, 24)]
    assert {name for name, field in task.fields.items() if "length" in field.axes} >= {"tokens", "segments", "positions"}
    for name, field in task.fields.items():
        in_order = expected[name][:, order] if "length" in field.axes else expected[name]
        np.testing.assert_array_equal(batch[name], in_order)
        assert batch[name].sharding == placement.sharding(*field.axes)


def test_the_vocabulary_is_fitted_and_the_yardstick_is_there(task):
    assert task.model_config.vocab_size == 384  # 257 rounded up to a multiple of 128
    assert 0 < task.baselines["gzip -9 bits per byte"] < 8


def test_a_partial_evaluation_has_no_yardstick(task, tmp_path):
    (tmp_path / "t.txt").write_text("some text " * 300)
    data = DataConfig(
        sources=(SourceConfig(path=str(tmp_path / "t.txt")),), tokenizer="byte", length=32, cache_dir=str(tmp_path / "c")
    )
    some = language.build(
        language.Config(evaluation_batches=1), model=MODEL, data=data, batch_size=2, seed=0, log=lambda line: None
    )
    assert some.evaluations[0].batches == 1 and not some.baselines


def test_prompts_that_would_fail_at_the_end_are_refused_before_training(tmp_path):
    (tmp_path / "t.txt").write_text("some text " * 300)
    data = DataConfig(
        sources=(SourceConfig(path=str(tmp_path / "t.txt")),), tokenizer="byte", length=32, cache_dir=str(tmp_path / "c")
    )
    build = functools.partial(language.build, model=MODEL, data=data, batch_size=2, seed=0, log=lambda line: None)
    assert build(language.Config(prompts=("x" * 30,))).prompts == ("x" * 30,)
    with pytest.raises(ConfigError, match="'x+' has 32 tokens, and model.context=32"):
        build(language.Config(prompts=("x" * 31,)))
    with pytest.raises(ConfigError, match="task.prompts is empty"):
        language.Config(prompts=())


@pytest.mark.parametrize("name", config_lib.unit_names("llmos_jax.tasks"))
def test_every_task_is_a_file_with_a_config_and_a_build(name):
    unit = config_lib.unit("llmos_jax.tasks", name)
    assert unit.Config().name == name and callable(unit.build) and callable(unit.loss)
