"""Attention over a sharded length against the naive reference, in every form, mask and mesh that it serves."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compute.mesh import AXES, MeshConfig
from llmos_jax.compute.sharding import chunks_of_shard, make_placement
from llmos_jax.config import parse
from llmos_jax.errors import ConfigError
from llmos_jax.models import attention_context
from llmos_jax.models.attention import attend
from tests.models.test_attention import MASKS, assert_equal, inputs, segments_of

LENGTH = 64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Makes tiny chunks several tiles."""
    monkeypatch.setattr(attention_context, "_LARGEST_TILE", 2)
    monkeypatch.setattr(attention_context, "_SMALLEST_TILE", 1)


def placement_of(form="ring", **mesh):
    return make_placement(MeshConfig(context_attention=form, **mesh), jax.devices()[: np.prod(list(mesh.values()))])


def gradients_of(function, segments_BL):
    """Returns a function of query, key, value and the output's gradient to the output and the three gradients."""

    def step(query, key, value, gradient):
        output, backward = jax.vjp(functools.partial(function, segments_BL=segments_BL), query, key, value)
        return output, *backward(gradient)

    # Compiling takes most of these tests' time, and unoptimised machine code computes the same.
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


def segments_or_none(tensors, segments):
    return np.asarray(segments_of(tensors[0].shape[1], tensors[0].shape[0])) if segments else None


def ordered(placement, x):
    return None if x is None else np.asarray(x)[:, placement.length_order(x.shape[1])]


def run(placement, tensors, *, segments=False, **masks):
    """Returns output and gradients computed on the placement's mesh, positions in their natural order."""
    segments_BL = ordered(placement, segments_or_none(tensors, segments))
    step = gradients_of(functools.partial(attend, placement=placement, **masks), segments_BL)
    results = step(*(ordered(placement, x) for x in tensors))
    return [np.asarray(x)[:, np.argsort(placement.length_order(x.shape[1]))] for x in results]


def reference(tensors, *, segments=False, **masks):
    kernel = functools.partial(attend, implementation="reference", **masks)
    return gradients_of(kernel, segments_or_none(tensors, segments))(*tensors)


@pytest.mark.parametrize("form", ["ring", "all_gather"])
@pytest.mark.parametrize(
    "mask, shards, repeats",
    [*((mask, 4, 2) for mask in MASKS), ("causal+segments", 2, 1), ("causal+segments", 8, 1), ("window", 8, 1)],
)
def test_equals_the_reference(form, mask, shards, repeats):
    tensors = inputs(LENGTH, repeats)
    assert_equal(run(placement_of(form, data=1, context=shards), tensors, **MASKS[mask]), reference(tensors, **MASKS[mask]))


@pytest.mark.parametrize("form", ["ring", "all_gather"])
def test_composes_with_rows_and_with_heads_fewer_than_shards(form):
    """One key-value head for two model shards; three query heads share each of two for two shards."""
    placement = placement_of(form, data=2, context=2, model=2)
    for groups, repeats in ((1, 2), (2, 3)):
        tensors = inputs(LENGTH, repeats, groups=groups, batch=4)
        assert_equal(run(placement, tensors, segments=True), reference(tensors, segments=True))
    odd_rows = inputs(LENGTH, batch=3)
    assert_equal(run(placement, odd_rows), reference(odd_rows))


def test_keys_of_another_length_and_scale():
    query, key, value, gradient = inputs(LENGTH, 2)
    tensors, masks = (query, key[:, :24], value[:, :24], gradient), {"is_causal": False, "scale": 0.7}
    for form in ("ring", "all_gather"):
        assert_equal(run(placement_of(form, data=1, context=4), tensors, **masks), reference(tensors, **masks))


def test_keeps_dtype_and_stays_finite():
    tensors = inputs(LENGTH, 2, dtype=jnp.bfloat16)
    placement = placement_of(data=1, context=4)
    assert_equal(run(placement, tensors, segments=True), reference(tensors, segments=True), tolerance=3e-2)
    query, key, value, gradient = inputs(LENGTH)
    tensors = 300 * query, 300 * key, value, gradient
    actual = run(placement, tensors, segments=True)
    assert all(np.isfinite(x).all() for x in actual)
    np.testing.assert_allclose(actual[0], reference(tensors, segments=True)[0], atol=1e-4)


@pytest.mark.parametrize("form", ["ring", "all_gather"])
def test_under_vmap_over_pipeline_stages(form):
    """Stages are a vmapped leading dimension laid over the pipeline axis: each computes its own, and exchanges with none."""
    mesh = jax.make_mesh((2, 1, 1, 2, 1, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 6)
    placement = dataclasses.replace(placement_of(form, data=2, context=2, model=2), mesh=mesh)
    stages = [inputs(LENGTH, 2, seed=seed) for seed in (0, 1)]
    spec = jax.sharding.PartitionSpec("pipeline", *placement.spec(None, "length", "heads", None))
    sharding = jax.sharding.NamedSharding(mesh, spec)
    stacked = [
        jax.device_put(np.stack([ordered(placement, x) for x in stage]), sharding) for stage in zip(*stages, strict=True)
    ]
    segments_BL = ordered(placement, segments_or_none(stages[0], True))

    def stage(query, key, value, gradient):
        kernel = functools.partial(attend, segments_BL=segments_BL, placement=placement)
        output, backward = jax.vjp(jax.checkpoint(kernel), query, key, value)
        return output, *backward(gradient)

    program = jax.jit(jax.vmap(stage, spmd_axis_name="pipeline")).lower(*stacked).compile()
    for _, groups in re.findall(r"(all-gather|all-reduce|all-to-all)[^\n]*replica_groups=({{.*?}})", program.as_text()):
        assert all({int(i) // 4 for i in group.split(",")} in ({0}, {1}) for group in re.findall(r"{([\d,]+)}", groups))
    results = program(*stacked)
    for result in results:
        assert result.sharding.is_equivalent_to(sharding, 5)
    for number, tensors in enumerate(stages):
        inverse = np.argsort(placement.length_order(LENGTH))
        assert_equal([np.asarray(x)[number][:, inverse] for x in results], reference(tensors, segments=True))


def tiles_computed(shards, count, **masks):
    """Returns how many tiles of scores each shard computes for all of a row, `count` tiles to a chunk."""
    computed = []
    for shard in range(shards):
        starts = [chunk * count + tile for chunk in chunks_of_shard(shard, shards) for tile in range(count)]
        bounds = [
            attention_context.seen_tiles(start, 1, chunk * count, 1, count, masks.get("is_causal", True), masks.get("window"))
            for start in starts
            for chunk in range(2 * shards)
        ]
        computed.append(sum(int(stop) - int(first) for first, stop in bounds))
    return computed


def test_every_device_has_the_same_work_and_hidden_tiles_are_skipped():
    assert tiles_computed(4, 2) == [16 * 17 // 2 // 4] * 4
    assert tiles_computed(4, 2, is_causal=False) == [16 * 16 // 4] * 4
    assert tiles_computed(4, 2, window=3) == [9, 12, 12, 12]


@pytest.mark.parametrize(
    "shards, chunk, window, routes",
    [
        (8, 4, None, ((1, 7),)),
        (8, 4, 1, ((1, 0), (-1, 0))),
        (8, 4, 5, ((1, 1), (-1, 1))),
        (8, 4, 6, ((1, 2), (-1, 2))),
        (8, 4, 17, ((1, 7),)),
        (2, 4, 5, ((1, 1),)),
    ],
)
def test_blocks_travel_no_farther_than_a_window_reaches(shards, chunk, window, routes):
    assert attention_context.routes(shards, chunk, window) == routes


def test_no_policy_keeps_scores():
    """Kept for the backward pass, under a policy that keeps every product: inputs, output, one number a query and head."""
    placement = placement_of(data=1, context=4)
    query, key, value, _ = inputs(LENGTH, 2)

    def kept(function):
        return jax.eval_shape(lambda *tensors: jax.vjp(function, *tensors)[1], query, key, value)

    for is_causal in (True, False):
        kernel = functools.partial(attend, placement=placement, is_causal=is_causal)
        policy = jax.checkpoint_policies.dots_saveable
        largest = max(
            x.size for function in (kernel, jax.checkpoint(kernel, policy=policy)) for x in jax.tree.leaves(kept(function))
        )
        assert largest == query.size


def test_what_does_not_fit_is_refused(monkeypatch):
    placement = placement_of(data=1, context=4)
    query, key, value, _ = inputs(LENGTH)
    for name in ("reference", "blocked", "xla"):
        with pytest.raises(ConfigError, match=f"'{name}' reads whole rows.*4 shards of the context axis"):
            attend(query, key, value, placement=placement, implementation=name)
    for length in (60, 7):
        with pytest.raises(
            ConfigError, match=f"length of {length} can't be cut into 2 chunks.*the next.*: {-(-length // 8) * 8}"
        ):
            attend(*(x[:, :length] for x in (query, key, value)), placement=placement)
    with pytest.raises(ConfigError, match="length of 60 can't be cut"):
        placement.length_order(60)
    monkeypatch.setattr(attention_context, "_SMALLEST_TILE", 2)
    with pytest.raises(ConfigError, match="chunks of 7, which no tile of 2 to 2 positions divides; take a multiple of 16"):
        attend(*(x[:, :56] for x in (query, key, value)), placement=placement)
    with pytest.raises(ConfigError, match="mesh.context_attention"):
        parse(MeshConfig, {"context_attention": "star"}, "mesh")
