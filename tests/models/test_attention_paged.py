"""The kernels that read pages where they lie, by Pallas's interpreters, against plain attention; compiled for a TPU (slow)."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.models import attention_paged
from llmos_jax.models.attention_paged import attend_pages, pages_refusal

PAGES = 40


def naive(query_BHK, pools, table_BP, length_B, softcap):
    """Returns attention row by row in float64."""
    repeats, rows = query_BHK.shape[1] // pools[0].shape[0], []
    for query_HK, table_P, length in zip(query_BHK, table_BP, length_B, strict=True):
        key, value = (np.asarray(pool, np.float64)[:, table_P] for pool in pools)
        key, value = (x.reshape(x.shape[0], -1, x.shape[-1])[:, :length].repeat(repeats, 0) for x in (key, value))
        scores = np.einsum("HK,HMK->HM", np.asarray(query_HK, np.float64), key) / query_HK.shape[-1] ** 0.5
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        rows.append(np.einsum("HM,HMK->HK", weights / weights.sum(-1, keepdims=True), value))
    return np.stack(rows)


def inputs(heads, groups, size, page_size, table):
    """Returns (query, pools, table, length): one row of one token, one that ends with a page, one that fills its table.

    All numbers are bfloat16's, in float32: so the kernels, which compute in float32, can be held to its precision.
    """
    keys, bfloat16 = jax.random.split(jax.random.key(0), 3), lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    query_BHK = bfloat16(3 * jax.random.normal(keys[0], (3, heads, size)))
    pools = tuple(bfloat16(jax.random.normal(key, (groups, PAGES, page_size, size))) for key in keys[1:])
    table_BP = np.random.default_rng(0).permutation(PAGES)[: 3 * table].reshape(3, table).astype(np.int32)
    return query_BHK, pools, table_BP, np.array([1, 2 * page_size, table * page_size], np.int32)


@pytest.fixture
def interpreted(monkeypatch):
    """Gives the CPU the kernel of another platform, interpreted; returns what chooses it."""

    def choose(platform):
        kernel = attention_paged.KERNELS[platform]
        run = functools.partial(attention_paged._gpu, interpret=True) if platform == "gpu" else interpreted_tpu
        monkeypatch.setitem(attention_paged.KERNELS, "cpu", types.SimpleNamespace(**vars(kernel) | {"run": run}))

    def interpreted_tpu(*arguments):
        with pltpu.force_tpu_interpret_mode():
            return attention_paged._tpu(*arguments)

    return choose


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("platform", "heads", "groups", "size", "page_size", "table"),
    [
        ("gpu", 8, 2, 64, 16, 9),  # two blocks of 128 tokens, the last of them not whole
        ("gpu", 4, 4, 32, 4, 3),  # less than one
        ("tpu", 8, 2, 128, 16, 9),
        ("tpu", 8, 1, 128, 256, 3),  # two blocks of 512, the last of them not whole
    ],
)
def test_kernels_equal_plain_attention(platform, heads, groups, size, page_size, table, softcap, interpreted):
    interpreted(platform)
    given = inputs(heads, groups, size, page_size, table)
    placement = make_placement(None, jax.devices()[:1])
    found = jax.jit(functools.partial(attend_pages, softcap=softcap, placement=placement))(*given)
    np.testing.assert_allclose(found, naive(*given, softcap), atol=1e-5)


def test_wider_tables_and_other_rows_change_no_bit(interpreted):
    interpreted("gpu")
    query_BHK, pools, table_BP, length_B = inputs(8, 2, 64, 16, 12)
    query_BHK, pools = query_BHK.astype(jnp.bfloat16), tuple(pool.astype(jnp.bfloat16) for pool in pools)
    run = jax.jit(functools.partial(attend_pages, placement=make_placement(None, jax.devices()[:1])))
    whole = run(query_BHK, pools, np.pad(table_BP, ((0, 0), (0, 20))), length_B)
    np.testing.assert_array_equal(whole[1:2], run(query_BHK[1:2], pools, table_BP[1:2, :2], length_B[1:2]))


def test_heads_over_devices_are_read_where_they_lie(interpreted):
    interpreted("gpu")
    placement = make_placement(MeshConfig(data=2, model=4), jax.devices()[:8])
    query_BHK, pools, table_BP, length_B = inputs(16, 4, 32, 16, 5)
    laid = [jax.device_put(pool, placement.sharding("heads", None, None, None)) for pool in pools]
    run = jax.jit(functools.partial(attend_pages, placement=placement)).lower(query_BHK, laid, table_BP, length_B).compile()
    assert "all-gather" not in run.as_text().split("ENTRY")[1].split("custom-call")[0]
    np.testing.assert_allclose(
        run(query_BHK, laid, table_BP, length_B), naive(query_BHK, pools, table_BP, length_B, None), atol=1e-5
    )


@pytest.mark.parametrize(
    ("platform", "given", "words"),
    [
        ("cpu", {}, "runs on gpu and tpu, and the devices are cpu"),
        ("gpu", {}, None),
        ("tpu", {"head_size": 128}, None),
        ("tpu", {"dtype": "float32", "head_size": 128}, "takes bfloat16 on tpu, not float32"),
        ("gpu", {"dtype": "float32"}, "takes bfloat16 on gpu, not float32"),
        ("gpu", {"head_size": 96}, "a power of two from 16 on, not 96"),
        ("tpu", {"head_size": 64}, "a power of two from 128 on, not 64"),
        ("gpu", {"page_size": 256}, "a power of two from 1 to 128, not 256"),
        ("tpu", {"page_size": 24, "head_size": 128}, "a power of two from 16 to 512, not 24"),
        ("tpu", {"head_size": 128, "table_entries": 2**18}, "tables of 131,072 pages, not 262,144: raise page_size"),
        ("gpu", {"windows": (20, None)}, "has no sliding window, and layers have one of 20"),
        ("gpu", {"pipeline": object()}, "stages of a pipeline"),
    ],
)
def test_what_no_kernel_can_read_is_said(platform, given, words):
    placement = types.SimpleNamespace(platform=platform, pipeline=given.pop("pipeline", None))
    refusal = pages_refusal(
        placement, **{"dtype": "bfloat16", "head_size": 64, "page_size": 16, "windows": (None,), "table_entries": 2**17} | given
    )
    assert refusal is None if words is None else words in refusal


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 64])
def test_compiles_for_a_tpu(page_size, four_tpu_chips):
    placement = make_placement(MeshConfig(data=1, model=4), four_tpu_chips)

    def shape(*axes, shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(*axes))

    pool = shape("heads", None, None, None, shape=(8, 1000, page_size, 128))
    query, table = shape(None, "heads", None, shape=(4, 32, 128)), shape(None, None, shape=(4, 40), dtype=jnp.int32)
    run = jax.jit(functools.partial(attend_pages, placement=placement))
    program = run.lower(query, (pool, pool), table, shape(None, shape=(4,), dtype=jnp.int32)).compile().as_text()
    assert "tpu_custom_call" in program and "all-gather" not in program
