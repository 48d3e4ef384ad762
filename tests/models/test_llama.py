"""Llama against a naive float64 Llama in numpy; rotary positions against their formulas; sharded against one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.api import load_settings
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.planner import matmul_flops
from llmos_jax.compute.sharding import make_placement
from llmos_jax.errors import ConfigError
from llmos_jax.models import llama
from llmos_jax.models.layers import rms_norm, swiglu
from llmos_jax.models.rope import RopeConfig, rope_frequencies, rotate
from llmos_jax.train.state import describe_model

SMALL = llama.Config(vocab_size=96, context=24, width=32, layers=3, heads=4, kv_heads=2, mlp=80)
SCALINGS = [
    RopeConfig(),
    RopeConfig(base=500.0, scaling="linear", factor=4.0),
    RopeConfig(scaling="llama3", factor=8.0, original_context=64),
]


def make(config=SMALL, mesh=None):
    placement = make_placement(mesh, None if mesh else jax.devices()[:1])
    handle = describe_model(functools.partial(llama.build, config, placement), placement)
    params = jax.jit(handle.init)(jax.random.key(0))
    # Initial weights are too small and too regular to show a mistake: scale matrices, jitter vectors.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: 5 * x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    return handle, jax.device_put(params, handle.shardings)


def naive_frequencies(config, size):
    """Rotary frequencies pair by pair, as the Llama 3.1 reference code decides for each."""
    found = []
    for pair in range(size // 2):
        frequency = config.base ** (-2 * pair / size)
        wave = 2 * np.pi / frequency
        is_long = config.scaling == "llama3" and wave > config.original_context / config.low_factor
        if config.scaling == "linear" or is_long:
            frequency /= config.factor
        elif config.scaling == "llama3" and wave >= config.original_context / config.high_factor:
            share = (config.original_context / wave - config.low_factor) / (config.high_factor - config.low_factor)
            frequency = (1 - share) * frequency / config.factor + share * frequency
        found.append(frequency)
    return np.array(found)


def naive_logits(params, tokens, segments, config):
    """Llama as its papers say it, one row and one head at a time, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    length, size = len(tokens), config.head_size
    positions = np.array([i - np.flatnonzero(segments == segments[i])[0] for i in range(length)])
    angles = positions[:, None] * naive_frequencies(config.rope, size)

    def norm(x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * w["scale"]

    def turn(x):
        pairs = x[:, : size // 2] + 1j * x[:, size // 2 :]
        turned = pairs * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], -1)

    x = p["embedding"][tokens]
    seen = np.tril(np.ones((length, length), bool)) & (segments[:, None] == segments[None])
    for n in range(config.layers):
        b = jax.tree.map(lambda w: w[n], p["stack"]["blocks"])  # noqa: B023  used at once
        h, mixed = norm(x, b["attention_norm"]), 0.0
        for head in range(config.heads):
            group = head // (config.heads // config.groups)
            q = turn(h @ b["attention"]["query"]["weight"][:, head])
            k = turn(h @ b["attention"]["key_value"]["weight"][:, group, 0])
            v = h @ b["attention"]["key_value"]["weight"][:, group, 1]
            scores = np.where(seen, q @ k.T / np.sqrt(size), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = mixed + weights / weights.sum(-1, keepdims=True) @ v @ b["attention"]["output"]["weight"][head]
        x = x + mixed
        gate, up = np.einsum("ld,dpf->plf", norm(x, b["mlp_norm"]), b["gate_up"]["weight"])
        x = x + gate / (1 + np.exp(-gate)) * up @ b["down"]["weight"]
    head = p["embedding"] if config.is_tied else p["head"]
    return norm(x, p["norm"]) @ head.T, positions


@pytest.mark.parametrize(
    "choices",
    [{}, {"execution": "scan", "is_tied": True}, {"rope": SCALINGS[1], "kv_heads": 1}, {"rope": SCALINGS[2], "head_width": 12}],
)
def test_logits_of_packed_documents(choices):
    config = dataclasses.replace(SMALL, **choices)
    handle, params = make(config)
    tokens, segments = np.random.default_rng(0).integers(0, 96, 21), np.repeat([1, 2, 3], [5, 9, 7])
    expected, positions = naive_logits(params, tokens, segments, config)

    @jax.jit
    def logits(tokens, positions, segments):
        model = handle.merge(params)
        return model.logits(model.hidden(tokens[None], positions[None], segments[None]))[0]

    got = np.asarray(logits(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)))
    assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("config", SCALINGS, ids=lambda config: config.scaling)
def test_frequencies(config):
    np.testing.assert_allclose(rope_frequencies(config, 32), naive_frequencies(config, 32), rtol=1e-12)


def test_scores_depend_on_distance_alone():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 16))
    frequencies = jnp.asarray(rope_frequencies(RopeConfig(), 16), jnp.float32)

    def at(position):
        angles = jnp.full((1, 1, 1), float(position)) * frequencies
        return rotate(x, (jnp.cos(angles), jnp.sin(angles)))

    scores = [float((at(start) * at(start + 7)).sum()) for start in (0, 3, 100)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-4)
    assert abs(scores[0] - float((at(0) * at(8)).sum())) > 1e-3


def test_gradients_written_by_hand():
    x, scale = jax.random.normal(jax.random.key(0), (3, 2, 16)), 1 + 0.1 * jax.random.normal(jax.random.key(1), (16,))

    def plain_norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    def plain_swiglu(x):
        return x[:, 0] * jax.nn.sigmoid(x[:, 0]) * x[:, 1]

    for ours, plain, arguments in ((lambda x, s: rms_norm(x, s, 1e-5), plain_norm, (x, scale)), (swiglu, plain_swiglu, (x,))):
        argnums = tuple(range(len(arguments)))
        got, expected = (jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), argnums)(*arguments) for f in (ours, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, expected)


# Layers that differ: three with a window and rotary positions of their own, one without.
MIXED = dataclasses.replace(SMALL, layers=4, window=6, global_layers=(2,), window_rope=RopeConfig(base=50.0), is_qk_normed=True)


@pytest.mark.parametrize(
    ("mesh", "config"),
    [
        (MeshConfig(data=2, model=2, context=2), SMALL),
        (MeshConfig(data=4, model=2, parameters="fsdp"), SMALL),
        (MeshConfig(data=2, pipeline=2, model=2, pipeline_microbatches=2), MIXED),
        (MeshConfig(data=4, context=2), dataclasses.replace(MIXED, execution="scan")),
    ],
)
def test_sharded_equals_one_device(mesh, config):
    ones = jnp.tile(jnp.arange(24, dtype=jnp.int32), (8, 1))
    batch = {"tokens": ones, "targets": ones + 1, "positions": ones, "segments": jnp.ones_like(ones)}
    batch["weights"] = jnp.ones(ones.shape, jnp.float32)
    found = []
    for where in (None, mesh):
        handle, params = make(config, mesh=where)
        order = handle.placement.length_order(24)
        laid = {name: value if order is None else value[:, order] for name, value in batch.items()}
        loss = jax.jit(jax.value_and_grad(lambda p, b, handle=handle: handle.merge(p).loss(b)[0]))
        found.append(jax.tree.map(np.asarray, loss(params, laid)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    # In norm: weights this large make logits of thousands, and single elements round up to three times worse.
    for path, expected in jax.tree_util.tree_leaves_with_path(found[0][1]):
        actual = functools.reduce(lambda tree, key: tree[key.key], path, found[1][1])
        assert np.linalg.norm(actual - expected) <= 5e-5 * np.linalg.norm(expected), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("size", "parameters"),  # as counted from the published weights
    [("7b", 6_738_415_616), ("70b-2", 68_976_648_192), ("8b", 8_030_261_248), ("70b", 70_553_706_496)],
)
def test_sizes_are_what_was_published(size, parameters):
    settings, _ = load_settings(f"experiments/llama.py:size={size}")
    vocab = int(settings.data.tokenizer.removeprefix("bpe:"))
    assert llama.parameter_count(dataclasses.replace(settings.model, vocab_size=vocab)) == parameters


def test_layers_that_differ_are_what_their_settings_say():
    """A model with mixed layers is the plain one where all layers have the window, or none has."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 20)))
    found = {}
    for name, changes in {
        "mixed, scanned": dict(execution="scan"),
        "mixed, unrolled": dict(execution="unroll"),
        "none": dict(window=None, global_layers=(), window_rope=None),
        "mixed, one rope, wide": dict(window=20, window_rope=None),
        "all": dict(global_layers=()),
        "one layer all": dict(global_layers=(0, 1, 2, 3)),
    }.items():
        handle, params = make(dataclasses.replace(MIXED, **changes))
        logits = jax.jit(lambda p, t, h=handle: h.merge(p).logits(h.merge(p).hidden(t, jnp.arange(20)[None].repeat(2, 0))))
        found[name] = np.asarray(logits(params, tokens))
    largest = np.abs(found["none"]).max()

    def distance(one, other):
        return np.abs(found[one] - found[other]).max() / largest

    assert distance("mixed, scanned", "mixed, unrolled") < 1e-5
    assert distance("none", "mixed, one rope, wide") < 1e-5
    assert distance("none", "one layer all") < 1e-5
    assert min(distance("mixed, scanned", other) for other in ("none", "all")) > 1e-2


def test_wrong_settings_are_refused():
    for tree, words in [
        ({"global_layers": (1,)}, "exceptions to a window"),
        ({"window": 4, "global_layers": (3,)}, "exceptions to a window"),
        ({"window_rope": RopeConfig()}, "model.window_rope without model.window"),
        ({"experts": 2, "activation": "gelu"}, "model.experts have silu"),
        ({"rope": RopeConfig(scaling="longrope", short_factors=(1.0,))}, "rope.short_factors has 1 numbers"),
        ({"width": 30}, "model.width=30 is not divisible by model.heads=4"),
        ({"kv_heads": 3}, "model.heads=4 is not divisible by model.kv_heads=3"),
        ({"head_width": 7}, "heads are 7 wide"),
        ({"rope": RopeConfig(share=0.1)}, "of which rope.share=0.1 is 0"),
        ({"remat": "full", "execution": "unroll"}, "model.execution=unroll with model.remat"),
    ]:
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(SMALL, **tree)
    with pytest.raises(ConfigError, match="rope.low_factor=4.0 must be below"):
        RopeConfig(low_factor=4.0)
    with pytest.raises(ConfigError, match="model.kv_heads=2 is not divisible by mesh.model=4"):
        make(mesh=MeshConfig(data=2, model=4))


def test_every_remat_policy_recomputes_what_it_says():
    """Products in the gradient: none repeats none, full all that it needs, projections fewer; attention's are not kept."""
    found = {}
    for remat in ("none", "projections", "matmuls", "full"):
        config = dataclasses.replace(SMALL, remat=remat, execution="scan", attention="reference")
        handle, _ = make(config)
        ones = jax.ShapeDtypeStruct((2, 24), jnp.int32)
        batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), ones)
        batch["weights"] = jax.ShapeDtypeStruct((2, 24), jnp.float32)
        gradient = jax.grad(lambda params, batch, handle=handle: handle.merge(params).loss(batch)[0])
        found[remat] = matmul_flops(jax.make_jaxpr(gradient)(handle.shapes, batch).jaxpr)
    assert found["none"] == found["matmuls"] < found["projections"] < found["full"], found
    # One layer's attention is 2 products of [2, 4, 24, 24] x 8; both are repeated.
    assert found["projections"] - found["none"] == 3 * 2 * 2 * (2 * 4 * 24 * 24) * 8
