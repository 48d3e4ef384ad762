"""The mixture of experts against a loop over tokens, and every way of computing it against the plainest one."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.errors import ConfigError
from llmos_jax.models import gpt, moe
from llmos_jax.models.grouped_matmul import Product, grouped_matmul
from llmos_jax.models.stack import unstack
from llmos_jax.serve.cache import read_step
from llmos_jax.serve.stages import Stages
from llmos_jax.train.state import describe_model

BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS = 3, 7, 8, 12, 6
SEGMENTS = np.ones((BATCH, LENGTH), np.int32)
SEGMENTS[1, 4:] = 0  # padding at a row's end
FORMS = {
    "dropless": dict(per_token=2),
    "three of six, gated, shared": dict(per_token=3, is_gated=True, shared=2),
    "one choice": dict(per_token=1),
    "capacity": dict(per_token=2, capacity=1.0),
    "small capacity, shared": dict(per_token=3, capacity=0.4, shared=1),
}


def make(mesh=None, **choices):
    """Returns (placement, graph, parameters) of a layer whose numbers are large enough to show a mistake."""
    placement = make_placement(mesh, None if mesh else jax.devices()[:1])
    layer = moe.MixtureOfExperts(
        WIDTH,
        HIDDEN,
        experts=EXPERTS,
        stddev=0.7,
        output_stddev=0.7,
        placement=placement,
        rngs=nnx.Rngs(params=0),
        **choices,
    )
    graph, params = nnx.split(layer)
    keys = iter(jax.random.split(jax.random.key(1), 20))
    return placement, graph, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)


def inputs(batch=BATCH):
    return jax.random.normal(jax.random.key(2), (batch, LENGTH, WIDTH))


def naive(params, x, segments, *, per_token, capacity=None, is_gated=False, shared=0):
    """One row, one token, one expert at a time, in float64; returns (y, statistics, number of copies dropped)."""

    def activate(up, gate):
        if gate is None:
            return 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        return gate / (1 + np.exp(-gate)) * up

    y, rows, all_dropped = np.zeros_like(x), [], 0
    for b in range(x.shape[0]):
        tokens = [t for t in range(x.shape[1]) if segments[b, t] > 0]
        logits = {t: x[b, t] @ params["router"] for t in tokens}
        probability = {t: np.exp(v - v.max()) / np.exp(v - v.max()).sum() for t, v in logits.items()}
        chosen = {t: np.argsort(-p, kind="stable")[:per_token] for t, p in probability.items()}
        free = np.full(EXPERTS, np.inf if capacity is None else math.ceil(capacity * x.shape[1] * per_token / EXPERTS))
        counts, dropped = np.zeros(EXPERTS), 0
        for j in range(per_token):
            for t in tokens:
                e = chosen[t][j]
                counts[e] += 1
                if free[e] == 0:
                    dropped += 1
                    continue
                free[e] -= 1
                gate = probability[t][e] / (probability[t][chosen[t]].sum() if per_token > 1 else 1)
                inner = x[b, t] @ params["gate"][e] if is_gated else None
                y[b, t] += gate * activate(x[b, t] @ params["up"][e], inner) @ params["down"][e]
        for t in range(x.shape[1]) if shared else ():
            p = params["shared"]
            inner = x[b, t] @ p["gate"]["weight"] + p["gate"]["bias"] if is_gated else None
            y[b, t] += activate(x[b, t] @ p["up"]["weight"] + p["up"]["bias"], inner) @ p["down"]["weight"] + p["down"]["bias"]
        copies = per_token * len(tokens)
        mean = np.mean(list(probability.values()), 0)
        z = np.mean([np.log(np.exp(v).sum()) ** 2 for v in logits.values()])
        rows.append([EXPERTS * (counts / copies * mean).sum(), z, counts.max() / copies, dropped / copies])
        all_dropped += dropped
    return y, np.array(rows), all_dropped


def loss(params, graph, x, segments):
    """A scalar in which every output and every statistic that has a gradient counts on its own."""
    y, router = nnx.merge(graph, params)(x, segments)
    return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum() + (router[:, :2] * jnp.array([3.0, 0.5])).sum()


@functools.partial(jax.jit, static_argnums=1)
def run(params, graph, x, segments):
    """Returns (outputs, gradients in parameters and x)."""
    outputs = nnx.merge(graph, params)(x, segments)
    return outputs, jax.grad(loss, (0, 2))(params, graph, x, segments)


@pytest.mark.parametrize("form", FORMS)
def test_layer_is_the_loop_over_tokens(form):
    _, graph, params = make(**FORMS[form])
    (y, router), (of_params, of_x) = run(params, graph, inputs(), SEGMENTS)
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(params))
    x = np.asarray(inputs(), np.float64)
    expected_y, expected_router, dropped = naive(wide, x, SEGMENTS, **FORMS[form])
    np.testing.assert_allclose(y, expected_y, atol=2e-6 * np.abs(expected_y).max())
    np.testing.assert_allclose(router, expected_router, rtol=2e-6)
    assert (dropped > 0) == ("capacity" in form)

    def value(params, x):
        y, router, _ = naive(params, x, SEGMENTS, **FORMS[form])
        return (y * np.cos(np.arange(y.size)).reshape(y.shape)).sum() + (router[:, :2] * [3.0, 0.5]).sum()

    # Slopes along one random direction per array, by central differences of the loop.
    rng, size = np.random.default_rng(0), 1e-6
    leaves, structure = jax.tree.flatten((wide, x))
    gradients = jax.tree.leaves((nnx.to_pure_dict(of_params), of_x))
    for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        along = rng.normal(size=leaf.shape)
        ends = [
            value(*jax.tree.unflatten(structure, [*leaves[:index], leaf + sign * size * along, *leaves[index + 1 :]]))
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * size)
        assert float(np.vdot(gradient, along)) == pytest.approx(slope, abs=1e-5 * np.linalg.norm(gradient).item())


@pytest.mark.parametrize(
    ("form", "mesh"),
    [
        ("three of six, gated, shared", dict(expert=2, data=2, model=2, parameters="fsdp")),
        ("small capacity, shared", dict(expert=2, model=4, is_sequence_sharded=False)),
    ],
    ids=str,
)
def test_rows_that_do_not_divide_over_the_mesh(form, mesh):
    """Sampling while training: three rows, seven positions and every mesh; all devices have all tokens then."""
    _, graph, params = make(**FORMS[form])
    expected = run(params, graph, inputs(), SEGMENTS)
    _, graph, params = make(MeshConfig(**mesh), **FORMS[form])
    for got, want in zip(jax.tree.leaves(run(params, graph, inputs(), SEGMENTS)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize("form", ["dropless", "capacity"])
def test_vmapped_layers_are_single_layers(form):
    """What pipeline stages do: several layers at once, each with its own parameters, tokens and sizes of groups."""
    _, graph, params = make(**FORMS[form])
    params = jax.tree.map(lambda p: jnp.stack([p, 1.3 * p, p[::-1]]), params)
    x, segments = inputs(9).reshape(3, BATCH, LENGTH, WIDTH), np.stack([SEGMENTS, SEGMENTS[::-1], SEGMENTS])
    together = jax.vmap(run, (0, None, 0, 0))(params, graph, x, segments)
    for index in range(3):
        alone = run(jax.tree.map(lambda p: p[index], params), graph, x[index], segments[index])  # noqa: B023  used at once
        for got, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[index], want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("product", "sizes"),
    [
        (Product("ragged", 1), [4, 0, 7, 1]),
        (Product("blocked", 4), [4, 0, 8, 4]),
        (Product("batched", 5), [5, 5, 5, 5]),
        (Product("blocked", 5), [5, 5, 5, 5]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_grouped_product(product, sizes, dtype):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(20, 8)), rng.normal(size=(4, 8, 12))
    along = rng.normal(size=(20, 12))
    x, along = (np.asarray(jnp.asarray(z, dtype), np.float64) for z in (x, along))
    owner = np.repeat(np.arange(4), sizes)
    used = len(owner)

    def multiply(x, weight):
        return grouped_matmul(x, weight, product.groups(jnp.array(sizes), 20), product, 1)

    y, pullback = jax.vjp(multiply, jnp.asarray(x, dtype), jnp.asarray(weight, jnp.float32))
    of_x, of_weight = pullback(jnp.asarray(along, dtype))
    assert y.dtype == of_x.dtype == dtype and of_weight.dtype == jnp.float32
    tolerance = 1e-5 if dtype == "float32" else 0.1
    rounded = np.asarray(jnp.asarray(weight, dtype), np.float64)
    np.testing.assert_allclose(y[:used], np.einsum("si,sio->so", x[:used], rounded[owner]), atol=tolerance)
    np.testing.assert_allclose(of_x[:used], np.einsum("so,sio->si", along[:used], rounded[owner]), atol=tolerance)
    expected = np.zeros(weight.shape)
    np.add.at(expected, owner, np.einsum("si,so->sio", x[:used], along[:used]))
    np.testing.assert_allclose(of_weight, expected, atol=1e-4)


def test_exchange_without_the_ragged_collective():
    """The example in the documentation of `jax.lax.ragged_all_to_all`, two slices per device, and its gradient's way back."""
    mesh = make_placement(MeshConfig(expert=2), jax.devices()[:2]).mesh
    here = jax.sharding.PartitionSpec("expert")
    operand = jnp.array([1, 2, 2, 3, 4, 0.0])[:, None]
    there = tuple(jnp.array(x) for x in ([0, 1, 0, 1], [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1]))
    back = tuple(jnp.array(x) for x in ([0, 1, 0, 2], [1, 1, 2, 1], [0, 0, 1, 1], [1, 2, 1, 1]))

    def send(operand, there, back):
        return moe.exchange(operand, there, back, 4, ("expert",), "cpu")

    sharded = jax.shard_map(send, mesh=mesh, in_specs=here, out_specs=here, check_vma=False)
    result, pullback = jax.vjp(lambda operand: sharded(operand, there, back), operand)
    assert result[:, 0].tolist() == [1, 3, 0, 0, 2, 2, 4, 0]
    (gradient,) = pullback(jnp.arange(1.0, 9)[:, None])
    assert gradient[:, 0].tolist() == [1, 5, 6, 2, 7, 0]


@pytest.mark.slow
def test_tokens_are_exchanged_by_the_ragged_collective_on_a_tpu(four_tpu_chips):
    """Compiled for chips that are not there: there and back, forward and backward, and no token is gathered."""
    placement = make_placement(MeshConfig(expert=2, data=2), four_tpu_chips)
    choices = dict(experts=4, per_token=2, stddev=0.02, output_stddev=0.02, placement=placement)
    layer = jax.eval_shape(lambda: moe.MixtureOfExperts(256, 512, rngs=nnx.Rngs(params=0), **choices))
    graph, params = nnx.split(layer)
    experts = placement.sharding("experts", None, None)
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=experts if len(p.shape) == 3 else placement.sharding()),
        params,
    )
    x = jax.ShapeDtypeStruct((8, 128, 256), jnp.bfloat16, sharding=placement.sharding("batch", None, None))
    segments = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=placement.sharding("batch", None))
    program = run.lower(params, graph, x, segments).compile().as_text()
    assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", program)) in (
        4,
        5,
    )  # the output itself may be computed on its own
    gathered = re.findall(r"= \(?(\w+)\[[^=]* all-gather(?:-start)?\(", program)
    assert set(gathered) <= {"s32"}  # how many copies each device sends


def test_padding_takes_no_place():
    """What stands in padding changes nothing, even where it would have filled an expert."""
    _, graph, params = make(**FORMS["capacity"])
    changed = inputs().at[1, 4:].set(5.0)
    (y, router), _ = run(params, graph, inputs(), SEGMENTS)
    (other_y, other_router), _ = run(params, graph, changed, SEGMENTS)
    np.testing.assert_array_equal(y, other_y)
    np.testing.assert_array_equal(router, other_router)
    assert not y[1, 4:].any() and y[1, :4].any()
    (counted, _), _ = run(params, graph, changed, np.ones_like(SEGMENTS))
    assert counted[1, 4:].any()


def test_balance_is_one_when_balanced_and_largest_when_not():
    logits = jnp.tile(10 * jnp.eye(4), (1, 2, 1))
    is_real = jnp.ones((1, 8), bool)

    def of(logits):
        chosen = moe.route(logits, 1, is_real)[1]
        return moe.statistics(logits, chosen, chosen, is_real)[0]

    assert of(logits)[0] == pytest.approx(1) and of(logits)[2] == pytest.approx(0.25)
    worst = of(jnp.tile(10 * jnp.eye(4)[:1], (1, 8, 1)))
    assert worst[0] == pytest.approx(4, rel=1e-3) and worst[2] == 1
    only_padding = jnp.zeros((1, 8), bool)
    chosen = moe.route(logits, 1, only_padding)[1]
    assert moe.statistics(logits, chosen, chosen, only_padding).tolist() == [[0, 0, 0, 0]]


SPARSE = gpt.Config(
    vocab_size=96, context=24, width=32, layers=2, heads=4, experts=4, expert_mlp=40, shared_experts=1, expert_capacity=0.5
)


@pytest.mark.parametrize("shared", [0, 2])
def test_counts_of_parameters_and_flops(shared):
    config = dataclasses.replace(SPARSE, shared_experts=shared, experts_per_token=3)
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(gpt.build, config, placement), placement)
    assert gpt.parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(handle.shapes))
    # A dense MLP as wide as the experts that see a token costs the same, but for the router.
    dense = dataclasses.replace(config, experts=0, shared_experts=0, expert_capacity=None, mlp=(3 + shared) * 40)
    router = 6 * config.layers * config.width * config.experts
    assert gpt.flops_per_token(config, 24) == gpt.flops_per_token(dense, 24) + router


def test_decoding_is_dropless_whatever_training_was():
    """Token by token with a cache equals the whole row at once without capacity, and not the row with it."""
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(gpt.build, SPARSE, placement), placement)
    params = jax.tree.map(lambda p: 5 * p, jax.jit(handle.init)(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 96)
    positions, model = jnp.tile(jnp.arange(12), (2, 1)), handle.merge(params)
    stages, layers = Stages(placement, SPARSE), unstack(params["stack"]["blocks"], SPARSE.layers)

    @jax.jit
    def step(tokens, cache, start):
        at = start + jnp.tile(jnp.arange(tokens.shape[1]), (2, 1))
        rows = jnp.arange(2)  # a block each
        read = read_step(rows, jnp.zeros(2, jnp.int32), rows, jnp.tile(start, 2))
        return model.decode(tokens, at, None, stages.run(model.stack, layers, cache, read, is_updated=True))

    room = (jnp.zeros((2, 4, 8, 12)), jnp.zeros((2, 4, 12, 8)))
    cache, hidden = [room] * SPARSE.layers, []
    for at in range(12):
        part, cache = step(tokens[:, at : at + 1], cache, at)
        hidden.append(part)

    def whole(capacity):
        config = dataclasses.replace(SPARSE, expert_capacity=capacity)
        model = describe_model(functools.partial(gpt.build, config, placement), placement).merge(params)
        return jax.jit(model.hidden)(tokens, positions)

    np.testing.assert_allclose(jnp.concatenate(hidden, 1), whole(None), atol=2e-5)
    assert np.abs(jnp.concatenate(hidden, 1) - whole(0.5)).max() > 0.1


def test_losses_of_the_router_are_added_by_their_weights():
    placement = make_placement(None, jax.devices()[:1])
    batch = {k: jnp.ones((2, 24), jnp.int32) for k in ("tokens", "targets", "positions", "segments")}
    batch["weights"] = jnp.ones((2, 24)).at[1, 3:].set(0)

    def handle_of(**weights):
        config = dataclasses.replace(SPARSE, execution="scan", **weights)
        return describe_model(functools.partial(gpt.build, config, placement), placement)

    params = jax.jit(handle_of().init)(jax.random.key(0))

    def loss_of(**weights):
        handle = handle_of(**weights)
        return jax.jit(lambda params: handle.merge(params).loss(batch))(params)

    total, sums = loss_of(router_balance=2.0, router_z_loss=3.0)
    plain, _ = loss_of(router_balance=0.0, router_z_loss=0.0)
    router = 2 * (2 * sums["router_balance"] + 3 * sums["router_z"])  # two layers: sums are means over them
    assert float(total - plain) == pytest.approx(float(router), rel=1e-4) and float(plain) == pytest.approx(float(sums["nll"]))
    assert float(sums["router_busiest_share"]) / 27 == pytest.approx(0.5)  # all tokens are alike: two experts take all


def test_wrong_settings_are_refused():
    for tree, words in [
        (dict(experts_per_token=5), "experts_per_token=5 is more than the model.experts=4"),
        (dict(experts=0), "shared_experts=1 with model.experts=0"),
    ]:
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(SPARSE, **tree)
