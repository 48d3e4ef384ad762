"""Every attention kernel against one naive reference; the reference against numpy; refusals; sharding; the cache."""

import functools
import re
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from llmos_jax.compute import host
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.errors import ConfigError
from llmos_jax.models import attention_cpu, few_rows
from llmos_jax.models.attention import attend, attend_blocks, attend_cached

MASKS = {
    "none": {"is_causal": False},
    "causal": {},
    "segments": {"is_causal": False, "segments": True},
    "window": {"window": 9},
    "causal+segments": {"segments": True},
    "window+segments": {"window": 70, "segments": True},
}
SOFTCAP = {"softcap": 1.5, "window": 9, "segments": True}
ON_TPU = types.SimpleNamespace(platform="tpu", mesh=None)
ON_GPU = types.SimpleNamespace(platform="gpu", mesh=None)


def inputs(length, repeats=1, *, batch=2, groups=2, size=16, seed=0, dtype=jnp.float32):
    """Returns random query, key, value and the output's gradient."""
    random = np.random.default_rng(seed)
    heads = (groups * repeats, groups, groups, groups * repeats)
    return [jnp.asarray(random.standard_normal((batch, length, h, size)), dtype) for h in heads]


def segments_of(length, batch=2):
    """Returns rows of a few documents followed by padding (0); lengths differ by row."""
    borders = [np.random.default_rng(row).integers(0, length + 1, 3) for row in range(batch)]
    rows = [np.searchsorted(np.sort(border), np.arange(length), side="right") + 1 for border in borders]
    return jnp.asarray(np.where(np.asarray(rows) == 4, 0, rows), jnp.int32)


def make_step(implementation, *, segments=None, placement=None, **masks):
    """Returns a function of query, key, value and the output's gradient to the output and the three gradients."""

    def step(query, key, value, gradient):
        kernel = functools.partial(attend, segments_BL=segments, implementation=implementation, placement=placement, **masks)
        output, backward = jax.vjp(kernel, query, key, value)
        return output, *backward(gradient)

    return step


def run(implementation, tensors, *, segments=False, **masks):
    """Returns the output and the three gradients, computed."""
    segments_BL = segments_of(tensors[0].shape[1], tensors[0].shape[0]) if segments else None
    step = make_step(implementation, segments=segments_BL, **masks)
    # Compiling takes most of these tests' time, and unoptimised machine code computes the same.
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})(*tensors)


def assert_equal(actual, expected, tolerance=1e-5):
    for name, a, e in zip(("output", "query", "key", "value"), actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        np.testing.assert_allclose(a, e, atol=tolerance * max(1.0, float(jnp.abs(e).max())), rtol=0, err_msg=name)


@pytest.mark.parametrize("mask", [*MASKS, "softcap"])
def test_reference_is_the_definition(mask):
    masks = dict(MASKS.get(mask, SOFTCAP))
    query, key, value, _ = (np.asarray(x, np.float64) for x in inputs(23, 2))
    segments = np.asarray(segments_of(23)) if masks.get("segments") else np.zeros((2, 23))
    expected, softcap = np.zeros_like(query), masks.get("softcap")
    for b, i, h in np.ndindex(2, 23, 4):
        seen = [
            j
            for j in range(23)
            if (j <= i or not masks.get("is_causal", True))
            and j > i - masks.get("window", 99)
            and segments[b, i] == segments[b, j]
        ]
        scores = key[b, seen, h // 2] @ query[b, i, h] / 4.0
        weights = np.exp(softcap * np.tanh(scores / softcap) if softcap else scores)
        expected[b, i, h] = weights @ value[b, seen, h // 2] / weights.sum()
    np.testing.assert_allclose(run("reference", inputs(23, 2), **masks)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "mask, repeats, length",
    [
        *((mask, repeats, 130) for mask in MASKS for repeats in (1, 2)),
        *((mask, 2, length) for mask in ("none", "causal", "window+segments") for length in (1, 7, 64)),
        ("window+segments", 1, 255),
    ],
)
def test_kernels_equal_the_reference(mask, repeats, length):
    tensors = inputs(length, repeats)
    expected = run("reference", tensors, **MASKS[mask])
    assert all(np.isfinite(x).all() for x in expected)
    for implementation in ("blocked", "xla"):
        assert_equal(run(implementation, tensors, **MASKS[mask]), expected)
    for implementation in ("cudnn", "splash"):
        with pytest.raises(ConfigError, match=f"{implementation}.*the devices are cpu"):
            run(implementation, tensors, **MASKS[mask])


def test_softcap_with_what_it_can_be_with(interpreted_splash):
    for length, implementation, placement in ((130, "blocked", None), (128, "splash", ON_TPU)):
        tensors = inputs(length, 2, groups=1)
        expected = run("reference", tensors, **SOFTCAP)
        assert_equal(run(implementation, tensors, placement=placement, **SOFTCAP), expected)
    query, key, value, _ = tensors
    with pytest.raises(ConfigError, match="'xla' has no softcap"):
        attend(query, key, value, softcap=1.5, implementation="xla")
    with pytest.raises(ConfigError, match="a softcap can't be cut over the context axis"):
        attend(query, key, value, softcap=1.5, placement=make_placement(MeshConfig(context=8)))
    automatic = attend(query, key, value, softcap=1.5, placement=ON_GPU)
    np.testing.assert_array_equal(automatic, attend(query, key, value, softcap=1.5, implementation="blocked"))
    early, late = (in_columns(key[:, rows], value[:, rows]) for rows in (slice(0, 40), slice(40, None)))
    capped = jax.jit(functools.partial(attend_cached, softcap=1.5, window=9))
    cached = jnp.concatenate(
        [
            capped(query[:, :40], [early], None, 0),
            capped(query[:, 40:], [early, late], jnp.zeros(len(query), jnp.int32), 40),
        ],
        1,
    )
    np.testing.assert_allclose(cached, run("reference", tensors, softcap=1.5, window=9)[0], atol=1e-5)


@pytest.fixture
def interpreted_splash(monkeypatch):
    """Makes splash attention's kernels run on CPU, by Pallas's interpreter."""
    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)


@pytest.mark.parametrize(
    "mask, repeats, length", [*((mask, 2, 128) for mask in MASKS), ("causal", 1, 128), ("window+segments", 1, 640)]
)
def test_splash_equals_the_reference(mask, repeats, length, interpreted_splash):
    tensors = inputs(length, repeats, groups=1)
    actual = run("splash", tensors, placement=ON_TPU, **MASKS[mask])
    assert_equal(actual, run("reference", tensors, **MASKS[mask]))


def test_blocked_keeps_dtype_and_takes_other_key_lengths_and_scale():
    tensors = inputs(96, 2, dtype=jnp.bfloat16)
    assert_equal(run("blocked", tensors, segments=True), run("reference", tensors, segments=True), tolerance=2e-2)
    query, key, value, gradient = inputs(70, 2)
    tensors = query, key[:, :33], value[:, :33], gradient
    masks = {"is_causal": False, "scale": 0.7}
    for implementation in ("blocked", "xla"):
        assert_equal(run(implementation, tensors, **masks), run("reference", tensors, **masks))


def test_blocked_skips_what_the_mask_hides():
    def flops(**masks):
        query, key, value, _ = inputs(1024, batch=1, groups=1)
        compiled = jax.jit(functools.partial(attend, implementation="blocked", **masks)).lower(query, key, value).compile()
        return compiled.cost_analysis()["flops"]

    everything = flops(is_causal=False)
    assert flops() < 0.6 * everything
    assert flops(window=64) < 0.2 * everything


@pytest.mark.parametrize("mask", ["causal", "window", "window+segments"])
def test_masks_that_the_program_computes_equal_constant_ones(mask, monkeypatch):
    tensors = inputs(200, 2)
    expected = run("blocked", tensors, **MASKS[mask])
    monkeypatch.setattr(attention_cpu, "_MOST_CONSTANT", 0)
    for a, e in zip(run("blocked", tensors, **MASKS[mask]), expected, strict=True):
        np.testing.assert_array_equal(a, e)


def test_tracing_long_rows_takes_little_memory():
    tensors = [jax.ShapeDtypeStruct((1, 60_000, 1, 8), jnp.float32)] * 4
    tracemalloc.start()
    try:
        jax.eval_shape(make_step("blocked"), *tensors)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("implementation", ["blocked", "xla", "reference"])
def test_large_scores_and_padding_stay_finite(implementation):
    query, key, value, gradient = inputs(66)
    for result in run(implementation, (100 * query, 100 * key, value, gradient), segments=True):
        assert np.isfinite(result).all()


@pytest.mark.parametrize("implementation", ["blocked", "splash"])
def test_sharded_over_rows_and_heads_equals_one_device(implementation, interpreted_splash):
    placement = make_placement(MeshConfig(data=4, model=2))
    length = {"blocked": 130, "splash": 128}[implementation]
    tensors, masks = inputs(length, 2, batch=4), {"window": 100}
    segments_BL = segments_of(length, 4)
    kernel_placement = placement
    if implementation == "splash":
        kernel_placement = types.SimpleNamespace(
            platform="tpu", mesh=placement.mesh, spec=placement.spec, axis_size=placement.axis_size
        )
    sharding = placement.sharding("batch", None, "heads", None)
    sharded = [jax.device_put(x, sharding) for x in tensors]
    step = make_step(implementation, segments=segments_BL, placement=kernel_placement, **masks)
    program = jax.jit(step).lower(*sharded).compile()
    # A shard_map's backward pass sums over the mesh axes that its specs do not name: here of size 1, in splash.
    collectives = set(re.findall("all-gather|all-to-all|collective-permute|all-reduce", program.as_text()))
    assert collectives <= {"blocked": set(), "splash": {"all-reduce"}}[implementation]
    actual = program(*sharded)
    for result in actual:
        assert result.sharding.is_equivalent_to(sharding, 4)
    assert_equal(actual, run("reference", tensors, segments=True, **masks))


def test_splash_copies_key_value_heads_that_are_fewer_than_shards(interpreted_splash):
    placement = make_placement(MeshConfig(data=4, model=2))
    on_tpu = types.SimpleNamespace(platform="tpu", mesh=placement.mesh, spec=placement.spec, axis_size=placement.axis_size)
    tensors = inputs(128, 2, batch=4, groups=1)
    assert_equal(jax.jit(make_step("splash", placement=on_tpu))(*tensors), run("reference", tensors))


def test_combinations_that_no_kernel_takes_are_refused():
    query, key, value, _ = inputs(8, 2)
    with pytest.raises(ConfigError, match="do not fit keys"):
        attend(query[:, :, :3], key, value)
    with pytest.raises(ConfigError, match="do not fit keys"):
        attend(query, key, value[:, :5])
    with pytest.raises(ConfigError, match=r"window=4 with is_causal=False"):
        attend(query, key, value, window=4, is_causal=False)
    with pytest.raises(ConfigError, match="a window is at least 1"):
        attend(query, key, value, window=0)
    with pytest.raises(ConfigError, match="8 queries and 5 keys"):
        attend(query, key[:, :5], value[:, :5])
    with pytest.raises(ConfigError, match="segments"):
        attend(query, key, value, segments_BL=jnp.zeros((2, 9), jnp.int32))
    with pytest.raises(ConfigError, match="'flash' is not one of auto, reference"):
        attend(query, key, value, implementation="flash")
    with pytest.raises(ConfigError, match="do not fit keys"):
        attend_cached(query, [in_columns(key, value[:, :5])], None, 0)


@pytest.mark.parametrize(
    "implementation, placement, kwargs, message",
    [
        ("cudnn", ON_GPU, {"length": 8}, "takes bfloat16 and float16, not float32"),
        ("cudnn", ON_GPU, {"length": 8, "size": 12, "dtype": jnp.bfloat16}, "multiple of 8 and at most 128, not 12"),
        ("cudnn", ON_GPU, {"length": 8, "size": 136, "dtype": jnp.bfloat16}, "multiple of 8 and at most 128, not 136"),
        ("splash", ON_TPU, {"length": 200}, "multiples of 128, not 200"),
        ("splash", ON_TPU, {"length": 128, "dtype": jnp.float16}, "float32 and bfloat16, not float16"),
        ("splash", ON_GPU, {"length": 128}, "runs on tpu, and the devices are gpu"),
    ],
)
def test_kernels_asked_for_by_name_refuse_and_auto_takes_another(implementation, placement, kwargs, message):
    query, key, value, _ = inputs(**kwargs)
    with pytest.raises(ConfigError, match=message):
        attend(query, key, value, implementation=implementation, placement=placement)
    if placement is ON_GPU and implementation == "splash":
        return
    expected = attend(query, key, value, implementation="xla")
    np.testing.assert_array_equal(attend(query, key, value, placement=placement), expected)


@pytest.mark.parametrize(
    "capability, reason",
    [("7.5", "8.0 or newer, not 7.5"), ("gfx942", "NVIDIA GPU"), ("8.6", "at most 128"), ("9.0", None)],
)
def test_cudnn_depends_on_the_gpu(capability, reason):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(compute_capability=capability)]))
    placement = types.SimpleNamespace(platform="gpu", mesh=mesh, axis_size=lambda axis: 1)
    query, key, value, _ = inputs(8, size=256, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: attend(query, key, value, placement=placement, implementation="xla"))
    assert shapes.shape == query.shape
    if reason is None:
        reason = "cuDNN is not detected"  # JAX's own words: the call got as far as the kernel
        with pytest.raises(RuntimeError, match=reason):
            attend(query, key, value, placement=placement, implementation="cudnn")
    else:
        with pytest.raises(ConfigError, match=reason):
            attend(query, key, value, placement=placement, implementation="cudnn")


@pytest.mark.parametrize("mask", MASKS)
def test_cudnn_lowers_for_a_gpu(mask, monkeypatch):
    # JAX asks the installed cuDNN for its version while it traces; where there is none, name one.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    masks = dict(MASKS[mask])
    segments_BL = segments_of(64) if masks.pop("segments", False) else None
    step = make_step("auto", segments=segments_BL, placement=ON_GPU, **masks)
    program = jax.jit(step).trace(*inputs(64, 2, dtype=jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
    name = "__cudnn$fmhaSoftmax" if segments_BL is None else "__cudnn$fmhaScaleBiasSoftmax"
    assert f"{name}(" in program and f"{name}Backward(" in program
    is_native_window = "window" in masks and segments_BL is None
    assert (f"sliding_window_length\\22: {masks.get('window')}" in program) == is_native_window
    assert ("CAUSAL" in program) == masks.get("is_causal", True)


def naive_row(query_LHK, key_MGK, value_MGK, start, window):
    """Returns attention of one row of new tokens to a cache, in numpy."""
    output = np.zeros(query_LHK.shape)
    for i, h in np.ndindex(query_LHK.shape[:2]):
        seen = slice(max(0, start + i - window + 1), start + i + 1)
        group = h // (query_LHK.shape[1] // key_MGK.shape[1])
        weights = np.exp(key_MGK[seen, group] @ query_LHK[i, h] / np.sqrt(query_LHK.shape[2]))
        output[i, h] = weights @ value_MGK[seen, group] / weights.sum()
    return output


def in_columns(key_BMGK, value_BMGK):
    """Returns what `attend_cached` takes of keys and values, their positions as columns."""
    key, value = (x.transpose(2, 0, 1, 3).reshape(-1, x.shape[1], x.shape[3]) for x in (key_BMGK, value_BMGK))
    return key.swapaxes(1, 2), value


@pytest.mark.parametrize("length, parts", [(1, 1), (5, 1), (5, 2)])
@pytest.mark.parametrize("repeats, window", [(1, None), (2, None), (2, 6)])
def test_cached_is_the_definition(repeats, window, length, parts):
    """Rows of several lengths that end in the same column, one of them with new tokens only; behind them is something else."""
    query, key, value, _ = (np.array(x) for x in inputs(40, repeats, batch=3))
    past_B, end = np.array([0, 11, 31]), 33
    for b, past in enumerate(past_B):
        for x in (key, value):
            x[b] = np.roll(x[b], end - past, axis=0)
    keys, values = in_columns(key, value)
    cached = [(keys, values)]
    if parts == 2:
        cached = [(keys[..., part], values[:, part]) for part in (slice(0, end), slice(end, None))]
    given = (query[:, :length], cached, end - past_B, end)
    actual = jax.jit(functools.partial(attend_cached, window=window))(*given)
    for b, past in enumerate(past_B):
        of_row = (query[b, :length], key[b, end - past :], value[b, end - past :])
        np.testing.assert_allclose(actual[b], naive_row(*of_row, past, window or 40), atol=1e-5)


@pytest.mark.parametrize("window", [None, 6])
def test_one_query_of_each_row_stands_where_its_row_says(window):
    """As many keys as there are, of which each row's single query sees those up to its own column."""
    query, key, value, _ = (np.array(x) for x in inputs(40, 2, batch=3))
    end_B = np.array([3, 39, 17])
    run = jax.jit(functools.partial(attend_cached, window=window))
    actual = run(query[np.arange(3), end_B][:, None], [in_columns(key, value)], None, end_B)
    for b, end in enumerate(end_B):
        expected = naive_row(query[b, end : end + 1], key[b], value[b], end, window or 40)
        np.testing.assert_allclose(actual[b], expected, atol=1e-5)


def in_blocks(tensors_BMGK, lengths, width, blocks):
    """Returns rows' tokens in `blocks` blocks of any order, [N, G, W, K] each, their rows and the positions of their tokens."""
    order = iter(np.random.default_rng(3).permutation(blocks))
    owner_N, position_NW = np.zeros(blocks, np.int32), np.full((blocks, width), 2**30)
    laid = [np.full((blocks, x.shape[2], width, x.shape[3]), 7.0, np.float32) for x in tensors_BMGK]  # others' leavings
    for row, length in enumerate(lengths):
        for first in range(0, length, width):
            block = next(order)
            owner_N[block], position_NW[block] = row, first + np.arange(width)
            for x_NGWK, x_BMGK in zip(laid, tensors_BMGK, strict=True):
                part = x_BMGK[row, first : min(first + width, length)]
                x_NGWK[block, :, : len(part)] = part.swapaxes(0, 1)
    return laid, owner_N, position_NW


@pytest.mark.parametrize("has_avx512", [False, True])
@pytest.mark.parametrize("lengths", [(40,), (1, 12, 40)])
@pytest.mark.parametrize("repeats, window, softcap", [(1, None, None), (2, None, None), (2, 6, None), (2, None, 1.5)])
def test_blocks_are_the_definition(repeats, window, softcap, lengths, has_avx512, monkeypatch):
    """Rows of several lengths, each with blocks of its own in no order, and some that are nobody's; a row alone, too."""
    monkeypatch.setattr(host, "has_avx512", lambda: has_avx512)
    monkeypatch.setattr(few_rows, "_RESULTS_OF_A_TASK", 0 if has_avx512 else 2**15)  # as with many blocks, too
    query, key, value, _ = (np.array(x) for x in inputs(40, repeats, batch=len(lengths)))
    (keys, values), owner_N, position_NW = in_blocks((key, value), lengths, 8, 11)
    latest_B = np.array(lengths) - 1
    seen_NW = (position_NW <= latest_B[owner_N][:, None]) & (position_NW > latest_B[owner_N][:, None] - (window or 99))
    run = jax.jit(functools.partial(attend_blocks, softcap=softcap))
    actual = run(query[:, 0], keys.swapaxes(2, 3), values, owner_N, seen_NW)
    for row, latest in enumerate(latest_B):
        given = query[row : row + 1, :1], [in_columns(key[row : row + 1], value[row : row + 1])], None, latest
        expected = attend_cached(*given, window=window, softcap=softcap)[0, 0]
        np.testing.assert_allclose(actual[row], expected, atol=1e-5)
        if softcap is None:
            of_row = query[row, :1], key[row], value[row], latest, window or 40
            np.testing.assert_allclose(actual[row], naive_row(*of_row)[0], atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("score", [-1e32, -np.inf])
def test_what_others_left_in_a_block_is_not_seen_even_by_the_lowest_scores(score, batch):
    query, keys = jnp.full((batch, 1, 4), 1.0), jnp.full((3, 1, 4, 8), score)
    given = np.array([0, 0, batch - 1]), np.arange(24).reshape(3, 8) < 5  # the others are nobody's
    found = [attend_blocks(query, keys, jnp.ones((3, 1, 8, 4)).at[1:].set(left), *given) for left in (1.0, 99.0)]
    np.testing.assert_array_equal(found[0][0], found[1][0])


@pytest.mark.parametrize("results_of_a_task", [2**15, 0])
def test_what_is_no_number_in_a_row_of_blocks_stays_there(results_of_a_task, monkeypatch):
    monkeypatch.setattr(few_rows, "_RESULTS_OF_A_TASK", results_of_a_task)
    run = jax.jit(lambda *given: attend_blocks(*given))  # one program, as in the engine
    query, key, value, _ = (np.array(x) for x in inputs(16, 2, batch=3))
    (keys, values), owner_N, position_NW = in_blocks((key, value), (16, 16, 16), 8, 6)
    given = keys.swapaxes(2, 3), values, owner_N, position_NW < 2**30
    expected = run(query[:, 0], *given)
    for bad in (np.nan, np.inf):
        query[1, 0, 0] = bad
        actual = np.asarray(run(query[:, 0], *given))
        assert not np.isfinite(actual[1, 0]).any() and np.array_equal(actual[[0, 2]], np.asarray(expected)[[0, 2]])
    query[1], values[owner_N == 1] = 0, 2e38  # the sum of a block's values is too large
    first, second = np.flatnonzero(owner_N == 1)
    for other in (2e38, -4e37):  # the second would bring the sum of both back
        values[second] = other
        actual = np.asarray(run(query[:, 0], *(keys.swapaxes(2, 3), values, owner_N, position_NW < 2**30)))
        assert np.isnan(actual[1]).all() and np.array_equal(actual[[0, 2]], np.asarray(expected)[[0, 2]])
    with pytest.raises(ConfigError, match=r"attention to blocks: queries .* do not fit keys"):
        attend_blocks(query[:, 0], keys, values, owner_N, position_NW < 16)


@pytest.mark.parametrize("repeats", [1, 8])
def test_blocks_whose_heads_are_sharded_stay_where_they_are(repeats, monkeypatch):
    """Each device attends with its own heads: nothing is gathered."""
    monkeypatch.setattr(host, "has_avx512", lambda: True)
    mesh = jax.make_mesh((2,), ("model",))

    def placed(axis, *shape):
        spec = jax.sharding.PartitionSpec(*("model" if at == axis else None for at in range(len(shape))))
        return jax.device_put(jax.random.normal(jax.random.key(0), shape), jax.sharding.NamedSharding(mesh, spec))

    given = placed(1, 3, 4 * repeats, 16), placed(1, 40, 4, 16, 64), placed(1, 40, 4, 64, 16)
    program = jax.jit(attend_blocks).lower(*given, np.arange(40) % 3, np.ones((40, 64), bool)).compile().as_text()
    assert "all-gather" not in program and "all-reduce" not in program


@pytest.mark.parametrize("batch", [1, 2])
def test_a_row_that_sees_nothing_is_finite_and_scores_may_be_infinitely_low(batch):
    query, keys, values = np.full((batch, 1, 4), 1e20, np.float32), np.zeros((2, 1, 4, 8), np.float32), np.ones((2, 1, 8, 4))
    keys[0, 0, :, 1] = -1e20
    given = query, keys, values.astype(np.float32), np.array([0, batch - 1])
    np.testing.assert_allclose(attend_blocks(*given, np.ones((2, 8), bool)), 1)
    everything = query, keys, values.astype(np.float32), np.zeros(2, int)
    assert np.isfinite(attend_blocks(*everything, np.zeros((2, 8), bool))).all()


def test_a_long_chunk_is_attended_to_in_pieces():
    query, key, value, _ = inputs(530, groups=1)
    expected = run("reference", (query, key, value, query))[0]
    actual = jax.jit(lambda q, c: attend_cached(q, [c], None, 0))(query, in_columns(key, value))
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    parts = [in_columns(key[:, rows], value[:, rows]) for rows in (slice(0, 10), slice(10, None))]
    actual = jax.jit(attend_cached)(query[:, 10:], parts, jnp.zeros(2, jnp.int32), 10)
    np.testing.assert_allclose(actual, expected[:, 10:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("groups, size", [(8, 128), (4, 64), (1, 96)])
def test_splash_compiles_for_a_tpu(groups, size, four_tpu_chips):
    placement = make_placement(MeshConfig(data=2, model=2), four_tpu_chips)
    assert placement.platform == "tpu"

    def shape(heads):
        sharding = placement.sharding("batch", None, "heads" if heads > 1 else None, None)
        return jax.ShapeDtypeStruct((4, 1024, heads, size), jnp.bfloat16, sharding=sharding)

    def step(segments_BL, *tensors):
        return make_step("auto", segments=segments_BL, window=300, placement=placement)(*tensors)

    segments = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=placement.sharding("batch", None))
    program = jax.jit(step).lower(segments, shape(8), shape(groups), shape(groups), shape(8)).compile().as_text()
    assert program.count("tpu_custom_call") >= 3  # forward, gradient of queries, gradient of keys and values
    assert "all-gather" not in program and "all-to-all" not in program
