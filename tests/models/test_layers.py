"""Layers against what jax differentiates by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compute import host
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.models import few_rows, layers


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def compare_gradients(function, reference, arguments, tolerance=2e-5):
    ours, theirs = function(*arguments), reference(*arguments)
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    cotangent = jax.random.normal(jax.random.key(9), ours.shape)
    every = tuple(range(len(arguments)))
    ours = jax.jit(jax.grad(lambda *a: (function(*a) * cotangent).sum(), every))(*arguments)
    theirs = jax.grad(lambda *a: (reference(*a) * cotangent).sum(), every)(*arguments)
    for mine, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, their, rtol=tolerance, atol=tolerance * float(jnp.abs(their).max()))


@pytest.mark.parametrize(
    ("x", "weight", "contracted", "formula"),
    [
        ((3, 5, 8), (8, 12), 1, "BLI,IO->BLO"),
        ((3, 5, 12), (12, 4), 1, "BLI,IO->BLO"),
        ((3, 5, 8), (8, 2, 3, 4), 1, "BLI,IHTK->BLHTK"),
        ((3, 5, 2, 4), (2, 4, 6), 2, "BLHK,HKO->BLO"),
    ],
)
def test_matmul(x, weight, contracted, formula):
    compare_gradients(lambda x, w: layers.matmul(x, w, contracted), lambda x, w: jnp.einsum(formula, x, w), arrays(x, weight))


@pytest.mark.parametrize("has_avx512", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 17, 48, 49])
def test_matmul_of_few_rows(rows, dtype, has_avx512, monkeypatch):
    """Both processors' forms, whichever this one is."""
    monkeypatch.setattr(host, "has_avx512", lambda: has_avx512)
    x, weight = arrays((rows, 1, 4, 64), (4, 64, 2, 160))
    actual = jax.jit(lambda x, w: layers.matmul(x, w, 2))(x.astype(dtype), weight)
    expected = np.einsum("BLHK,HKTO->BLTO", *(np.float64(jnp.asarray(a, dtype)) for a in (x, weight)))
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        np.float64(actual), expected, rtol=0, atol=(1e-6 if dtype == "float32" else 1e-2) * abs(expected).max()
    )


@pytest.mark.parametrize("vocab", [768, 65])  # turned round in tiles, and at once
@pytest.mark.parametrize("rows", [1, 3, 49])
def test_unembed(rows, vocab):
    x, table = arrays((rows, 1, 16), (vocab, 16))
    actual = jax.jit(lambda x, w: layers.unembed(x, w, make_placement(None, jax.devices()[:1])))(x, table)
    expected = np.einsum("BLD,VD->BLV", np.float64(x), np.float64(table))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * abs(expected).max())


def test_matmul_keeps_weight_gradients_in_float32():
    x, weight = arrays((4, 8), (8, 16))
    gradient = jax.grad(lambda w: layers.matmul(x.astype(jnp.bfloat16), w).astype(jnp.float32).sum())(weight)
    assert gradient.dtype == jnp.float32


def test_layer_norm():
    def reference(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * scale + bias

    compare_gradients(lambda *a: layers.layer_norm(*a, 1e-5), reference, arrays((2, 7, 16), (16,), (16,)))


def test_layer_norm_of_a_constant_row_is_finite():
    out = layers.layer_norm(jnp.full((2, 8), 1e4), jnp.ones(8), jnp.zeros(8), 1e-5)
    np.testing.assert_allclose(out, 0, atol=0.1)


def test_gelu():
    compare_gradients(layers.gelu, lambda x: jax.nn.gelu(x, approximate=True), [jnp.linspace(-6, 6, 101)])


def test_dropout():
    (x,) = arrays((200, 50))
    out = layers.dropout(x, 0.25, jax.random.key(1))
    kept = np.asarray(out != 0)
    assert 0.73 < kept.mean() < 0.77
    np.testing.assert_allclose(np.asarray(out)[kept], (np.asarray(x) / 0.75)[kept], rtol=1e-6)
    assert layers.dropout(x, 0.25, None) is x


def test_parameter_refuses_unmatched_axes():
    with pytest.raises(ValueError, match="2 axes"):
        layers.parameter(None, (3,), ("embed", "mlp"), None)


@pytest.mark.parametrize(
    ("sizes", "vocab", "length"),
    [
        ({"model": 8}, 64, 24),  # 96 tokens: no other array may have the table's shape
        ({"pipeline": 2, "data": 2, "model": 2}, 64, 6),
        ({"data": 2, "model": 4}, 64, 7),
        ({"model": 8}, 60, 16),
    ],
)
def test_lookup_in_a_sharded_table(sizes, vocab, length):
    """Rows and their gradients are those of a plain take; the table is never gathered where it can be looked up in parts."""
    placement = make_placement(MeshConfig(**({"data": 1} | sizes)))
    table = jax.random.normal(jax.random.key(0), (vocab, 8))
    tokens = jax.random.randint(jax.random.key(1), (4, length), 0, vocab)
    weights = jax.random.normal(jax.random.key(2), (4, length, 8))

    def loss(table, find):
        return (find(table) * weights).sum()

    def ours(table):
        return layers.lookup(table, tokens, placement, jnp.float32)

    divides = vocab % placement.axis_size("vocab") == 0
    placed = jax.device_put(table, placement.sharding("vocab" if divides else None, None))
    step = jax.jit(jax.value_and_grad(lambda table: loss(table, ours))).lower(placed).compile()
    (value, gradient), plain = step(placed), jax.value_and_grad(lambda t: loss(t, lambda t: jnp.take(t, tokens, axis=0)))(table)
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, plain[1], atol=1e-5)
    np.testing.assert_array_equal(jax.jit(ours)(placed), jnp.take(table, tokens, axis=0))
    if divides:
        assert f"f32[{vocab},8]" not in step.as_text()


@pytest.mark.parametrize("batch", [8, 40])  # 40 * 4 * 3 * 96 results are cut into tasks, 8 are too few
def test_products_of_a_batch(batch):
    """What is no number, or infinite, is so in its own place; finite rows are what they are alone."""
    x, y = (np.array(z) for z in arrays((batch, 4, 3, 16), (batch, 4, 16, 96)))
    x[1, 2, 0, 3], x[2, 1, 1], y[3, 0, :, 5], y[4, 0, 2, 9] = np.nan, 1e36, np.inf, np.nan
    assert (batch * 4 * 3 * 96 > few_rows._RESULTS_OF_A_TASK) == (batch == 40)
    expected = np.einsum("NGBI,NGIO->NGBO", x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(jax.jit(few_rows.products)(x, y), expected, rtol=1e-5, atol=2e-5)
