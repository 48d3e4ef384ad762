"""Every family against what transformers computed: logits, greedy continuations, and its own file written back."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import config as settings
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.interop.huggingface import save_checkpoint
from llmos_jax.interop.model_config import essence
from llmos_jax.serve.generate import Generator
from llmos_jax.serve.sample import SamplingConfig
from scripts import reference_models as reference
from tests.interop.reference import NAMES, Numbers, expected_logits, load, record, tensors, write_folder

# Where this is set, exported folders stay there for `scripts/reference_models.py check`.
KEPT = os.environ.get("LLMOS_KEEP_EXPORTS")


def batch():
    """Returns (tokens, positions, segments) of the rows, padded on the right."""
    width = max(reference.LENGTHS)
    tokens, segments = np.zeros((2, 3, width), np.int32)
    for index, row in enumerate(reference.tokens()):
        tokens[index, : len(row)], segments[index, : len(row)] = row, 1
    # A row's own positions, so that padding changes nothing where a row's length decides.
    positions = np.arange(width) * segments
    return tokens, positions, segments


def logits(handle, params):
    @jax.jit
    def run(params, tokens, positions, segments):
        model = handle.merge(params)
        return model.logits(model.hidden(tokens, positions, segments))

    found = np.asarray(run(params, *map(jnp.asarray, batch())))
    return [row[:length] for row, length in zip(found, reference.LENGTHS, strict=True)]


def assert_close(found, name):
    for ours, theirs in zip(found, expected_logits(name), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", NAMES)
def test_family(name, tmp_path):
    folder = write_folder(tmp_path / name, name)
    checkpoint, handle, params = load(folder)
    assert_close(logits(handle, params), name)

    # 20 greedy tokens with a cache, rows of three lengths padded on the left.
    family = settings.unit("llmos_jax.models", checkpoint.config.name)
    generator = Generator(handle, family, checkpoint.config, Numbers(), handle.placement)
    prompts = [" ".join(map(str, row)) for row in reference.tokens()]
    sampling = SamplingConfig(max_tokens=reference.NEW_TOKENS, temperature=0.0)
    if checkpoint.config.context >= max(reference.LENGTHS) + reference.NEW_TOKENS:
        done = generator.generate(params, prompts, sampling)
        assert [list(row.tokens) for row in done] == record(name)["tokens"]

    # Written back: the same bytes of every tensor, the same config.
    exported = pathlib.Path(KEPT or tmp_path / "exported") / name
    save_checkpoint(params, checkpoint.config, exported, dtype=checkpoint.dtype, original=checkpoint.tree, shard_bytes=30_000)
    before, after = tensors(folder), tensors(exported)
    assert before.keys() == after.keys()
    for key, content in before.items():
        assert content.dtype == after[key].dtype and content.tobytes() == after[key].tobytes(), key
    assert json.loads((exported / "config.json").read_text()) == record(name)["config"]
    # Without the original at hand the settings alone give a config that means the same.
    save_checkpoint(params, checkpoint.config, tmp_path / "anew", dtype=checkpoint.dtype)
    again, _, same = load(tmp_path / "anew")
    assert essence(again.config) == essence(checkpoint.config)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), params, same)


@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize("name", ["gemma3-scaled", "qwen3-moe", "qwen2-window"])
def test_layers_that_differ_run_scanned_and_unrolled(name, execution, tmp_path):
    folder = write_folder(tmp_path / name, name)
    import dataclasses
    import functools

    from llmos_jax.train.state import describe_model

    checkpoint, handle, params = load(folder)
    config = dataclasses.replace(checkpoint.config, execution=execution)
    family = settings.unit("llmos_jax.models", config.name)
    handle = describe_model(functools.partial(family.build, config, handle.placement), handle.placement)
    assert_close(logits(handle, params), name)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("gemma3-scaled", MeshConfig(data=4, model=2, parameters="fsdp")), ("qwen3-moe", MeshConfig(data=2, expert=2, model=2))],
)
def test_sharded_import_gives_the_same(name, mesh, tmp_path):
    folder = write_folder(tmp_path / name, name)
    _, _, alone = load(folder)
    checkpoint, handle, params = load(folder, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), alone, params)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(handle.abstract), strict=True):
        assert leaf.sharding == wanted.sharding
        assert all(shard.data.shape == wanted.sharding.shard_shape(wanted.shape) for shard in leaf.addressable_shards)
    save_checkpoint(params, checkpoint.config, tmp_path / "exported", dtype=checkpoint.dtype)
    for key, content in tensors(folder).items():
        assert content.tobytes() == tensors(tmp_path / "exported")[key].tobytes()
