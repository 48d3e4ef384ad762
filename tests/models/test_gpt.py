"""The GPT against a naive float64 GPT-2 in numpy, and the contract that every model family keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import config as config_lib
from llmos_jax.api import load_settings
from llmos_jax.compute.sharding import make_placement
from llmos_jax.models import gpt
from llmos_jax.train.state import describe_model

SMALL = gpt.Config(vocab_size=96, context=24, width=32, layers=3, heads=4, mlp=80)


def make(config=SMALL):
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(gpt.build, config, placement), placement)
    params = jax.jit(handle.init)(jax.random.key(0))
    # Initial weights are too small and too regular to show a mistake: scale matrices, jitter vectors.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: 5 * x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    return handle, params


def naive_logits(params, tokens, segments, config):
    """GPT-2 as its paper says it, one row and one head at a time, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    length = len(tokens)
    positions = np.array([i - np.flatnonzero(segments == segments[i])[0] for i in range(length)])
    x = p["embedding"][tokens] + p["positions"][positions]
    seen = np.tril(np.ones((length, length), bool)) & (segments[:, None] == segments[None])
    for n in range(config.layers):
        b = jax.tree.map(lambda w: w[n], p["stack"]["blocks"])  # noqa: B023  used at once
        h, mixed = norm(x, b["attention_norm"]), 0.0
        for head in range(config.heads):
            q, k, v = (
                h @ b["attention"]["qkv"]["weight"][:, head, part] + b["attention"]["qkv"]["bias"][head, part]
                for part in range(3)
            )
            scores = np.where(seen, q @ k.T / np.sqrt(config.head_size), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = mixed + weights / weights.sum(-1, keepdims=True) @ v @ b["attention"]["output"]["weight"][head]
        x = x + mixed + b["attention"]["output"]["bias"]
        h = gelu(norm(x, b["mlp_norm"]) @ b["up"]["weight"] + b["up"]["bias"])
        x = x + h @ b["down"]["weight"] + b["down"]["bias"]
    return norm(x, p["norm"]) @ p["embedding"].T, positions


@pytest.mark.parametrize("execution", ["unroll", "scan"])
def test_logits_of_packed_documents(execution):
    config = gpt.Config(**(SMALL.__dict__ | {"execution": execution}))
    handle, params = make(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 96, 21)
    segments = np.repeat([1, 2, 3], [5, 9, 7])
    expected, positions = naive_logits(params, tokens, segments, config)

    @jax.jit
    def logits(tokens, positions, segments):
        model = handle.merge(params)
        return model.logits(model.hidden(tokens[None], positions[None], segments[None]))[0]

    got = np.asarray(logits(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)))
    assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


def test_documents_do_not_see_each_other():
    handle, params = make()
    model = handle.merge(params)
    tokens, segments = jnp.arange(20)[None], jnp.repeat(jnp.array([1, 2]), 10)[None]
    positions = jnp.tile(jnp.arange(10), 2)[None]
    whole = model.hidden(tokens, positions, segments)
    alone = model.hidden(tokens[:, 10:], positions[:, 10:], segments[:, 10:])
    np.testing.assert_allclose(whole[:, 10:], alone, atol=1e-4)
    changed = model.hidden(tokens.at[0, 3].set(50), positions, segments)
    np.testing.assert_array_equal(whole[:, 10:], changed[:, 10:])
    assert float(jnp.abs(whole[:, 3:10] - changed[:, 3:10]).max()) > 0.1


def test_window_limits_what_is_seen():
    handle, params = make(gpt.Config(**(SMALL.__dict__ | {"window": 2, "layers": 1})))
    model = handle.merge(params)
    tokens, positions = jnp.arange(12)[None], jnp.arange(12)[None]
    changed = model.hidden(tokens.at[0, 3].set(50), positions)
    differs = np.flatnonzero(np.abs(np.asarray(changed - model.hidden(tokens, positions)))[0].max(-1) > 1e-6)
    assert differs.tolist() == [3, 4]


def test_bfloat16_stays_close():
    handle, params = make()
    low, _ = make(gpt.Config(**(SMALL.__dict__ | {"dtype": "bfloat16"})))
    tokens, positions = jnp.arange(20)[None], jnp.arange(20)[None]
    exact, rounded = (h.merge(params).hidden(tokens, positions).astype(jnp.float32) for h in (handle, low))
    assert 0 < float(jnp.abs(exact - rounded).mean()) < 0.05 * float(jnp.abs(exact).mean())


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("124m", 124e6), ("355m", 355e6), ("774m", 774e6), ("1.5b", 1558e6), ("6.7b", 6.7e9), ("13b", 13e9), ("175b", 175e9)],
)
def test_sizes_are_what_their_papers_say(size, parameters):
    settings, _ = load_settings(f"experiments/gpt.py:size={size}")
    model = gpt.Config(**(settings.model.__dict__ | {"vocab_size": 50257}))
    assert abs(gpt.parameter_count(model) / parameters - 1) < 0.025


@pytest.mark.parametrize("name", config_lib.unit_names("llmos_jax.models"))
def test_every_family_keeps_the_contract(name):
    """A family is found by its file: Config, build, parameter_count, flops_per_token, cache_shapes, loss."""
    family = config_lib.unit("llmos_jax.models", name)
    config = family.Config(name=name, vocab_size=128, context=16, width=32, layers=2, heads=4)
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(family.build, config, placement), placement)
    leaves = jax.tree.leaves(handle.shapes)
    assert family.parameter_count(config) == sum(leaf.size for leaf in leaves)
    for info, leaf in zip(jax.tree.leaves(handle.infos), leaves, strict=True):
        assert len(info.axes) == leaf.ndim and info.kind in ("matrix", "embedding", "vector")
    assert family.flops_per_token(config, 16) > 6 * config.layers * 4 * config.width**2
    shape, layers = family.cache_shapes(config, 3, 64)
    assert shape[0] == 3 and shape[2] == 64 and layers == 2
    params = jax.jit(handle.init)(jax.random.key(0))
    ones = jnp.ones((2, 16), jnp.int32)
    batch = {"tokens": ones, "targets": ones, "positions": ones, "segments": ones, "weights": ones.astype(jnp.float32)}
    total, sums = handle.merge(params).loss(batch)
    assert np.isfinite(total) and float(sums["nll"]) == pytest.approx(32 * np.log(128), rel=0.2)
    assert 0 <= float(sums["accuracy"]) <= 32


def test_flops_agree_with_the_compiler():
    """XLA's count of a forward pass, times three, against the formula (which counts attention without its mask)."""
    config = gpt.Config(**(SMALL.__dict__ | {"width": 128, "mlp": 512, "attention": "reference", "execution": "unroll"}))
    handle, _ = make(config)
    tokens = jax.ShapeDtypeStruct((4, 24), jnp.int32)

    def forward(params, tokens):
        model = handle.merge(params)
        return model.logits(model.hidden(tokens, tokens))

    counted = jax.jit(forward).lower(handle.shapes, tokens).compile().cost_analysis()["flops"]
    assert counted * 3 / (4 * 24) == pytest.approx(gpt.flops_per_token(config, 24), rel=0.1)


def test_wrong_settings_are_refused():
    for tree, words in [
        ({"width": 30}, "model.width=30 is not divisible by model.heads=4"),
        ({"remat": "full", "execution": "unroll"}, "model.execution=unroll with model.remat"),
    ]:
        with pytest.raises(config_lib.ConfigError, match=words):
            gpt.Config(**(SMALL.__dict__ | tree))
