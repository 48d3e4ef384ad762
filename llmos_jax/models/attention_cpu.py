"""Blocked attention: query blocks skip the keys that their mask hides; the backward pass needs no stored probabilities.

Plain JAX operations in an order that suits XLA:CPU; it runs, shards and differentiates (once) anywhere. Per block of
queries one product gives the scores of the keys that the block may see at all. Only the log-sum-exp of each row is
kept; the backward pass computes the probabilities again from it (FlashAttention-2, Dao 2023, without its tiling over
keys). Batch and key-value heads stay dimensions of their own, so that GSPMD can shard both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Added to hidden scores. Finite, so that no row can become NaN; far below any score, so that its exponential is 0.
HIDDEN = -1e30
# Blocks are at least this many queries, and at most about this many in number: smaller blocks skip more of the hidden
# scores but run slower per product. Measured on XLA:CPU at lengths 64 to 1024, head size 64.
_BLOCK_ROWS = 64
_MOST_BLOCKS = 8
_MOST_WINDOW_BLOCKS = 32
# Masks of at most this many scores are constants: short rows run 3 to 8 % faster than with masks that the program computes.
# Beyond (causal rows of more than 4096 tokens) both are equally fast, and constants would take the host's memory.
_MOST_CONSTANT = 1 << 21


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def blocked_attention(query_BLHK, key_BMGK, value_BMGK, segments_BL, is_causal, window, scale, softcap=None):
    """Returns attention [B, L, H, K] in the query's dtype; arithmetic is float32. Cost in memory: one block's scores.

    H is a multiple of G. `segments_BL` is int32 or None, `window` a number of keys or None (then `is_causal` is true);
    L and M differ only without either. `softcap` c: scores s are c tanh(s / c). Differentiable once, in reverse.
    """
    return _forward(query_BLHK, key_BMGK, value_BMGK, segments_BL, is_causal, window, scale, softcap)[0]


def _forward(query_BLHK, key_BMGK, value_BMGK, segments_BL, is_causal, window, scale, softcap):
    query_BGRLK = _split(query_BLHK, key_BMGK, scale)
    key_BGMK, value_BGMK = _heads_first(key_BMGK), _heads_first(value_BMGK)
    outputs, logsumexps = [], []
    for rows, keys in _blocks(query_BLHK.shape[1], key_BMGK.shape[1], is_causal, window):
        scores = _scores(query_BGRLK[:, :, :, rows], key_BGMK[:, :, keys], softcap)
        scores = _masked(scores, segments_BL, rows, keys, is_causal, window)
        peak = scores.max(-1, keepdims=True)
        exponentials = jnp.exp(scores - peak)
        total = exponentials.sum(-1, keepdims=True)
        outputs.append(_dot(exponentials, value_BGMK[:, :, keys], 2) / total)
        logsumexps.append(peak + jnp.log(total))
    output_BLHK = _merge(jnp.concatenate(outputs, 3), query_BLHK.dtype)
    return output_BLHK, jnp.concatenate(logsumexps, 3)


def _forward_keeping(query_BLHK, key_BMGK, value_BMGK, segments_BL, is_causal, window, scale, softcap):
    output_BLHK, logsumexp = _forward(query_BLHK, key_BMGK, value_BMGK, segments_BL, is_causal, window, scale, softcap)
    return output_BLHK, (query_BLHK, key_BMGK, value_BMGK, segments_BL, output_BLHK, logsumexp)


def _backward(is_causal, window, scale, softcap, kept, gradient_BLHK):
    query_BLHK, key_BMGK, value_BMGK, segments_BL, output_BLHK, logsumexp = kept
    query, key, value = _split(query_BLHK, key_BMGK, scale), _heads_first(key_BMGK), _heads_first(value_BMGK)
    gradient = _split(gradient_BLHK, key_BMGK, 1.0)
    # The row sums of probability x its gradient, from what is small (FlashAttention-2, section 3.1).
    products_BLHK = gradient_BLHK.astype(jnp.float32) * output_BLHK.astype(jnp.float32)
    row_sums = _split(products_BLHK.sum(-1, keepdims=True), key_BMGK, 1.0)
    blocks = _blocks(query_BLHK.shape[1], key_BMGK.shape[1], is_causal, window)
    query_gradients, key_gradients, value_gradients = [], _Pieces(blocks), _Pieces(blocks)
    for rows, keys in blocks:
        row_query, row_gradient = query[:, :, :, rows], gradient[:, :, :, rows]
        scores = _scores(row_query, key[:, :, keys], softcap)
        masked = _masked(scores, segments_BL, rows, keys, is_causal, window)
        probabilities = jnp.exp(masked - logsumexp[:, :, :, rows])
        score_gradients = probabilities * (_dot(row_gradient, value[:, :, keys], 3) - row_sums[:, :, :, rows])
        if softcap is not None:
            score_gradients *= 1 - jnp.square(scores / softcap)  # the slope of c tanh(s / c)
        query_gradients.append(_dot(score_gradients, key[:, :, keys], 2) * scale)
        # Small dimension first: [B, G, K, keys] is what XLA:CPU multiplies fastest here.
        value_gradients.add(keys, _dot_rows(row_gradient, probabilities))
        key_gradients.add(keys, _dot_rows(row_query, score_gradients))
    return (
        _merge(jnp.concatenate(query_gradients, 3), query_BLHK.dtype),
        key_gradients.total().transpose(0, 3, 1, 2).astype(key_BMGK.dtype),
        value_gradients.total().transpose(0, 3, 1, 2).astype(value_BMGK.dtype),
        None,
    )


blocked_attention.defvjp(_forward_keeping, _backward)


def _blocks(query_length, key_length, is_causal, window):
    """Returns the blocks as pairs of slices: queries, and the keys that at least one of them sees."""
    rows = max(_BLOCK_ROWS, _round_up(-(-query_length // _MOST_BLOCKS)))
    if window is not None:
        rows = max(min(rows, _round_up(window)), _round_up(-(-query_length // _MOST_WINDOW_BLOCKS)))
    blocks = []
    for start in range(0, query_length, rows):
        stop = min(start + rows, query_length)
        # Rounded down to a whole block, so that gradients of keys are sums over whole blocks.
        first_key = 0 if window is None else max(0, start - window + 1) // rows * rows
        blocks.append((slice(start, stop), slice(first_key, stop if is_causal else key_length)))
    return blocks


def _round_up(length):
    return -(-length // _BLOCK_ROWS) * _BLOCK_ROWS


def _scores(query_BGRLK, key_BGMK, softcap):
    """Returns scores [B, G, R, rows, keys]."""
    scores = _dot(query_BGRLK, key_BGMK, 3)
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _sees_all(rows, keys, window):
    """Whether each query of a causal block sees every key of it."""
    return keys.stop <= rows.start + 1 and (window is None or rows.stop <= keys.start + window)


def _masked(scores, segments_BL, rows, keys, is_causal, window):
    """Returns scores with what the mask hides at `HIDDEN`; no mask is made where all is seen."""
    if is_causal and not _sees_all(rows, keys, window):
        make = np if (rows.stop - rows.start) * (keys.stop - keys.start) <= _MOST_CONSTANT else jnp
        query_position, key_position = make.arange(rows.start, rows.stop)[:, None], make.arange(keys.start, keys.stop)
        seen = key_position <= query_position
        if window is not None:
            seen &= key_position > query_position - window
        scores = scores + make.where(seen, np.float32(0), np.float32(HIDDEN))
    if segments_BL is not None:
        same = segments_BL[:, rows, None] == segments_BL[:, None, keys]
        scores = jnp.where(same[:, None, None], scores, HIDDEN)
    return scores


def _split(x_BLHK, key_BMGK, scale):
    """Returns scale * x as [B, G, R, L, K], R query heads to each key-value head, float32."""
    batch, length, _, size = x_BLHK.shape
    x = x_BLHK.astype(jnp.float32)
    x = x if scale == 1.0 else x * scale
    return x.reshape(batch, length, key_BMGK.shape[2], -1, size).transpose(0, 2, 3, 1, 4)


def _merge(x_BGRLK, dtype):
    batch, _, _, length, size = x_BGRLK.shape
    return x_BGRLK.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, size).astype(dtype)


def _heads_first(x_BMGK):
    return x_BMGK.astype(jnp.float32).swapaxes(1, 2)


def _dot(x_BGRLX, y_BGMK, y_axis):
    """Returns x times y over x's last dimension and y's `y_axis`: [B, G, R, L, the other dimension of y]."""
    batch, groups, repeats, length, size = x_BGRLX.shape
    x = x_BGRLX.reshape(batch, groups, repeats * length, size)
    product = lax.dot_general(x, y_BGMK, (((3,), (y_axis,)), ((0, 1), (0, 1))))
    return product.reshape(batch, groups, repeats, length, -1)


def _dot_rows(x_BGRLK, y_BGRLM):
    """Returns [B, G, K, M], summed over the queries of every head that shares the key-value head."""
    x, y = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (x_BGRLK, y_BGRLM))
    return lax.dot_general(x, y, (((2,), (2,)), ((0, 1), (0, 1))))


class _Pieces:
    """Sums over ranges of keys, kept per block of keys so that each addition touches only what it changes."""

    def __init__(self, blocks):
        borders = sorted({0, *(border for _, keys in blocks for border in (keys.start, keys.stop))})
        self.borders = list(zip(borders[:-1], borders[1:], strict=True))
        self.sums = [None] * len(self.borders)

    def add(self, keys, value_BGKM):
        for index, (start, stop) in enumerate(self.borders):
            if keys.start <= start and stop <= keys.stop:
                piece = value_BGKM[..., start - keys.start : stop - keys.start]
                self.sums[index] = piece if self.sums[index] is None else self.sums[index] + piece

    def total(self):
        return jnp.concatenate(self.sums, 3)
