"""The output head fused with its cross-entropy: logits exist one chunk at a time, forward and backward."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from llmos_jax.compute.sharding import platform_of
from llmos_jax.models.layers import matmul

# Logits elements alive at once: 128 MiB in float32. On a CPU larger chunks gain nothing, smaller ones lose matmul efficiency;
# on a GPU every chunk reads and writes the weight's gradient once more (H200, GPT-2 small: 1.14 times the speed by 1 GiB).
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_GPU = 2**25, 2**28


def chunk_length(rows, length, vocab_size, shards=1, length_shards=1, elements=_CHUNK_ELEMENTS):
    """Returns into pieces of how many positions rows of `length` are cut: the largest divisor that fits the budget.

    `shards`: over how many devices rows, vocabulary and length of the logits are laid; the budget of `elements` is per device.
    `length_shards`: over how many the length of the hidden states is; every piece holds an equal part of each.
    """
    fits = max(1, elements * shards // (rows * vocab_size * length_shards))
    local = length // length_shards
    return length_shards * next(size for size in range(min(fits, local), 0, -1) if local % size == 0)


def cross_entropy(hidden_BLD, weight_VD, targets_BL, weights_BL, *, z_loss=0.0, softcap=None, placement=None, chunk=None):
    """Returns (loss_sum, nll_sum, correct_sum), float32 scalars, of the logits `hidden @ weight.T`, capped (`capped`).

    nll_sum is the weighted sum of negative log-likelihoods in nats; loss_sum adds `z_loss` x logsumexp^2 (Chowdhery et
    al. 2022, section 5); correct_sum is the weight of positions whose target has the largest logit. Only loss_sum has a
    gradient. Gradients are computed in the forward pass, chunk by chunk along the length, so that logits are never
    computed twice nor kept; memory is one chunk of logits plus one float32 copy of the weight's gradient.
    """
    rows, length, _ = hidden_BLD.shape
    if chunk is not None and chunk % _length_shards(length, placement):
        raise ValueError(f"chunk={chunk} positions can't be cut evenly from {_length_shards(length, placement)} shards.")
    chunk = chunk or _default_chunk(rows, length, weight_VD.shape[0], placement)
    return _cross_entropy(hidden_BLD, weight_VD, targets_BL, weights_BL, z_loss, softcap, placement, chunk)


def target_logprobs(hidden_BLD, weight_VD, targets_BL, *, vocab_size, softcap=None, placement=None):
    """Returns (log-probabilities of the targets, float32, the likeliest tokens), [B, L] each, of the logits as above.

    vocab_size: tokens from here on (padding of the embedding) have no probability. Memory is one chunk of logits.
    """
    rows, length, _ = hidden_BLD.shape
    weight_VD = _laid(placement, weight_VD, "vocab", None)

    def read(_, piece):
        piece = hidden_BCD, targets_BC = _gathered(piece, placement)
        _, logits, _, _, lse = _softmax_parts((hidden_BCD,), weight_VD, softcap, placement, vocab_size)
        chosen = _chosen(logits, targets_BC, placement)
        return None, ((chosen - lse)[..., 0], jnp.argmax(logits, -1).astype(jnp.int32))

    chunk = _default_chunk(rows, length, weight_VD.shape[0], placement)
    return _over_chunks(read, None, (hidden_BLD, targets_BL), chunk, placement)[1]


def capped(logits, softcap):
    """Returns softcap x tanh(logits / softcap) (Gemma Team 2024, Gemma 2, section 2); the logits themselves without."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _cross_entropy(hidden_BLD, weight_VD, targets_BL, weights_BL, z_loss, softcap, placement, chunk):
    weight_VD = _laid(placement, weight_VD, "vocab", None)

    def add(sums, piece):
        piece = _gathered(piece, placement)
        _, logits, exponentials, total, lse = _softmax_parts(piece, weight_VD, softcap, placement)
        return jax.tree.map(jnp.add, sums, _sums(logits, lse, piece, z_loss, placement)), None

    return _over_chunks(add, (jnp.float32(0),) * 3, (hidden_BLD, targets_BL, weights_BL), chunk, placement)[0]


def _forward(hidden_BLD, weight_VD, targets_BL, weights_BL, z_loss, softcap, placement, chunk):
    gathered_VD = _laid(placement, weight_VD, "vocab", None)  # what FSDP shards: once, not for every chunk

    def add(carry, piece):
        sums, dweight_VD = carry
        hidden_BCD, targets_BC, weights_BC = piece = _gathered(piece, placement)
        columns, logits, exponentials, total, lse = _softmax_parts(piece, gathered_VD, softcap, placement)
        sums = jax.tree.map(jnp.add, sums, _sums(logits, lse, piece, z_loss, placement))
        scale = weights_BC[..., None] * (1 + 2 * z_loss * lse) / total
        dlogits = exponentials * scale - jnp.where(columns == targets_BC[..., None], weights_BC[..., None], 0)
        if softcap is not None:
            dlogits *= 1 - jnp.square(logits / softcap)  # the slope of c tanh(z / c)
        dlogits = dlogits.astype(hidden_BCD.dtype)
        # The head is `hidden @ weight.T`; its gradient in the weight takes the same platform-aware form as a Linear's.
        _, pullback = jax.vjp(lambda h, w: matmul(h, w.T), hidden_BCD, gathered_VD)
        dhidden_BCD, piece_dweight_VD = pullback(dlogits)
        return (sums, dweight_VD + piece_dweight_VD), _laid(placement, dhidden_BCD, "batch", "residual_length", None)

    start = ((jnp.float32(0),) * 3, jnp.zeros_like(weight_VD, jnp.float32))
    arrays = (hidden_BLD, targets_BL, weights_BL)
    (sums, dweight_VD), dhidden_BLD = _over_chunks(add, start, arrays, chunk, placement)
    return sums, (dhidden_BLD, dweight_VD.astype(weight_VD.dtype))


def _backward(z_loss, softcap, placement, chunk, residuals, cotangents):
    dhidden_BLD, dweight_VD = residuals
    scale = cotangents[0]
    return dhidden_BLD * scale.astype(dhidden_BLD.dtype), dweight_VD * scale.astype(dweight_VD.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def _default_chunk(rows, length, vocab_size, placement):
    shards = math.prod(placement.axis_size(axis) for axis in ("batch", "length", "vocab")) if placement else 1
    elements = _CHUNK_ELEMENTS_GPU if platform_of(placement) == "gpu" else _CHUNK_ELEMENTS
    return chunk_length(rows, length, vocab_size, shards, _length_shards(length, placement), elements)


def _laid(placement, x, *axes):
    return x if placement is None else placement.constrain(x, *axes)


def _gathered(piece, placement):
    """Returns a piece with all of its positions' hidden states on every device that holds a part of the vocabulary."""
    hidden_BCD, *rest = piece
    return _laid(placement, hidden_BCD, "batch", "length", None), *rest


def _softmax_parts(piece, weight_VD, softcap, placement, vocab_size=None):
    hidden_BCD = piece[0]
    logits = jnp.einsum("BCD,VD->BCV", hidden_BCD, weight_VD.astype(hidden_BCD.dtype), preferred_element_type=jnp.float32)
    logits = capped(logits, softcap)
    logits = _laid(placement, logits, "batch", "length", "vocab")
    columns = lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    if vocab_size is not None:
        logits = jnp.where(columns < vocab_size, logits, -jnp.inf)
    largest = logits.max(-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(-1, keepdims=True)
    return columns, logits, exponentials, total, largest + jnp.log(total)


def _length_shards(length, placement):
    """Returns over how many shards hidden states of this length are laid (see `Placement.constrain`)."""
    if placement is None:
        return 1
    shards = placement.axis_size("residual_length")
    return shards if length % shards == 0 else placement.axis_size("length")


def _sums(logits, lse, piece, z_loss, placement):
    _, targets_BC, weights_BC = piece
    chosen = _chosen(logits, targets_BC, placement)
    nll = (lse - chosen)[..., 0]
    is_correct = chosen >= logits.max(-1, keepdims=True)
    nll_sum = (nll * weights_BC).sum()
    penalty = z_loss * (jnp.square(lse[..., 0]) * weights_BC).sum()
    return nll_sum + penalty, nll_sum, (is_correct[..., 0] * weights_BC).sum()


def _chosen(logits, targets_BC, placement):
    """Returns the targets' logits, [B, C, 1]."""
    if placement is None or placement.axis_size("vocab") == 1:
        return jnp.take_along_axis(logits, targets_BC[..., None], -1)
    # A gather along a sharded dimension would collect all logits on every device.
    columns = lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return jnp.where(columns == targets_BC[..., None], logits, 0).sum(-1, keepdims=True)


def _over_chunks(function, carry, arrays, chunk, placement):
    """Scans `function(carry, piece)` over pieces of `chunk` positions; outputs are joined along the length again.

    Where the length is sharded, every piece takes an equal part of each shard: no device waits for the others' pieces.
    """
    rows, length = arrays[0].shape[:2]
    count, shards = length // chunk, _length_shards(length, placement)
    if count == 1:
        return function(carry, arrays)

    def cut(x):
        parts = x.reshape(rows, shards, count, chunk // shards, *x.shape[2:])
        return jnp.moveaxis(parts, 2, 0).reshape(count, rows, chunk, *x.shape[2:])

    def join(y):
        parts = y.reshape(count, rows, shards, chunk // shards, *y.shape[3:])
        return jnp.moveaxis(parts, 0, 2).reshape(rows, length, *y.shape[3:])

    carry, outputs = lax.scan(function, carry, jax.tree.map(cut, arrays))
    return carry, jax.tree.map(join, outputs)
