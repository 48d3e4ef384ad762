"""The fused head and cross-entropy against full logits."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.models import head

B, L, D, V = 4, 12, 16, 40


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, weight = jax.random.normal(keys[0], (B, L, D)), jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, L), 0, V)
    return hidden, weight, targets, jax.random.uniform(keys[3], (B, L)) * (targets % 3 > 0)


def reference(hidden, weight, targets, weights, z_loss, softcap=None):
    logits = jnp.einsum("BLD,VD->BLV", hidden, weight)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    correct = (logits.argmax(-1) == targets) * weights
    return ((nll + z_loss * lse**2) * weights).sum(), (nll * weights).sum(), correct.sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_value_and_gradients(chunk, z_loss):
    hidden, weight, targets, weights = inputs()

    def ours(h, w):
        return 0.5 * head.cross_entropy(h, w, targets, weights, z_loss=z_loss, chunk=chunk)[0]

    values = head.cross_entropy(hidden, weight, targets, weights, z_loss=z_loss, chunk=chunk)
    np.testing.assert_allclose(values, reference(hidden, weight, targets, weights, z_loss), rtol=1e-5)
    mine = jax.jit(jax.grad(ours, (0, 1)))(hidden, weight)
    theirs = jax.grad(lambda h, w: 0.5 * reference(h, w, targets, weights, z_loss)[0], (0, 1))(hidden, weight)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_capped_logits():
    hidden, weight, targets, weights = inputs()

    def ours(h, w):
        return head.cross_entropy(h, w, targets, weights, z_loss=0.1, softcap=2.0, chunk=3)[0]

    def theirs(h, w):
        return reference(h, w, targets, weights, 0.1, 2.0)[0]

    for mine, plain in zip(*(jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, weight) for f in (ours, theirs)), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, plain)


@pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (4, 2)])
def test_sharded_batch_and_vocabulary(mesh):
    hidden, weight, targets, weights = inputs()
    hidden, targets, weights = (jnp.tile(x, (2, 1, 1)[: x.ndim]) for x in (hidden, targets, weights))
    placement = make_placement(MeshConfig(data=mesh[0], model=mesh[1]))

    def ours(h, w, t, weights):
        return head.cross_entropy(h, w, t, weights, placement=placement, chunk=4 if mesh == (4, 2) else 3)[0]

    placed = [
        jax.device_put(x, placement.sharding(*axes))
        for x, axes in [(hidden, ("batch",)), (weight, ("vocab", None)), (targets, ("batch",)), (weights, ("batch",))]
    ]
    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(*placed)
    expected = reference(hidden, weight, targets, weights, 0.0)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    theirs = jax.grad(lambda h, w: reference(h, w, targets, weights, 0.0)[0], (0, 1))(hidden, weight)
    for a, b in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_chunk_is_cut_from_every_shard_of_the_length():
    hidden, weight, targets, weights = inputs()
    with pytest.raises(ValueError, match="chunk=3 positions can't be cut evenly from 2 shards"):
        head.cross_entropy(hidden, weight, targets, weights, placement=make_placement(MeshConfig(data=4, model=2)), chunk=3)


def test_pieces_are_larger_on_a_gpu():
    def chunk(platform):
        placement = types.SimpleNamespace(platform=platform, axis_size=lambda axis: 1)
        return head._default_chunk(32, 1024, 50304, placement)

    assert (chunk("cpu"), chunk("tpu"), chunk("gpu")) == (16, 16, 128)


def test_chunk_length_divides_and_fits():
    assert head.chunk_length(16, 256, 512) == 256  # small logits: one chunk
    chunk = head.chunk_length(4, 512, 50304)
    assert 512 % chunk == 0 and 4 * chunk * 50304 <= 2**25 < 4 * 2 * chunk * 50304
    assert head.chunk_length(4, 509, 50304) == 1  # a prime length has no other divisor
