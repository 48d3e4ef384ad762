"""Products of few rows with a weight, as decoding makes them, in the forms that XLA:CPU runs fast.

Without vectors of 512 bits its matrix library packs the right operand anew in every call, which for few rows costs more than
the product. One row at a time the weight is only streamed; with some more, the weight as the left operand is not packed. With
such vectors the plain product is the fastest. A single row is as fast as weights come from memory, if all cores ask for them.
(BUILD_NOTES.md has the measurements: on AVX2 1.2 to 2 times the speed from 2 to 48 rows; on AVX-512 the same forms are up to 5
times slower.)
"""

import math

import jax.numpy as jnp
from jax import lax

from llmos_jax.compute import host

# Up to here one row at a time is the fastest, and up to there the weight as the left operand.
_SINGLE_ROWS, MOST_ROWS = 4, 48
# Smaller weights stay in a core's cache: their form does not matter.
LEAST_SIZE = 2**16
# Parts of the contraction of a single row, and the side of a tile that is turned round.
_ROW_PARTS, _TILE = 4, 256
# Results that the library gives to one thread, if it knows to cut at all.
_RESULTS_OF_A_TASK = 2**15


def product(x_BI, weight_IO):
    """Returns x @ weight, [B, O], for B <= MOST_ROWS rows."""
    if x_BI.dtype != jnp.float32:
        # A single row would have the whole weight converted first; two are the library's.
        return (jnp.repeat(x_BI, 2, axis=0) @ weight_IO)[:1] if len(x_BI) == 1 else x_BI @ weight_IO
    if len(x_BI) == 1 and len(weight_IO) % _ROW_PARTS == 0:
        # The library runs a batch on all threads, but one product of a single row on one.
        weight_PIO = weight_IO.reshape(_ROW_PARTS, -1, weight_IO.shape[1])
        y_PBO = lax.dot_general(x_BI.reshape(_ROW_PARTS, 1, -1), weight_PIO, (((2,), (1,)), ((0,), (0,))))
        return y_PBO.sum(0)
    if host.has_avx512():
        return x_BI @ weight_IO
    if len(x_BI) <= _SINGLE_ROWS:
        return jnp.concatenate([lax.dot(x_BI[row : row + 1], weight_IO) for row in range(len(x_BI))])
    # Without the barrier the transposition is fused away, and the library misses its fast case.
    return lax.dot_general(weight_IO, lax.optimization_barrier(x_BI.T), (((0,), (0,)), ((), ()))).T


def products(x_NBI, y_NIO):
    """Returns x @ y in float32 for every pair of a batch (any number of dimensions), [..., B, O].

    What is no number stays so, and may change others in the same row of results.
    """
    z_NBO = jnp.matmul(x_NBI, y_NIO, preferred_element_type=jnp.float32)
    if z_NBO.size <= _RESULTS_OF_A_TASK:
        return z_NBO
    # Changes no number, but the library (jaxlib 0.10) finds a reduction behind the products: it cuts these by the batch, and
    # runs them on all threads, where products alone, each too small to be cut, run on one. What is no number stays in this
    # order: the library's minimum is the second of what it can't compare (its maximum forgets what was before such a one).
    return lax.platform_dependent(z_NBO, cpu=lambda z: jnp.minimum(z.max(-1, keepdims=True), z), default=lambda z: z)


def product_with_table(x_BI, table_VI):
    """Returns x @ table.T in float32, [B, V], for B <= MOST_ROWS rows.

    The table is the left operand, which is not packed. The product is turned round in two steps, tile by tile: in one, XLA
    would read it with a stride, or exchange the operands again.
    """
    y_VB = lax.dot_general(table_VI, x_BI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    tile = math.gcd(len(table_VI), _TILE)
    y_NBT = lax.optimization_barrier(y_VB.reshape(-1, tile, len(x_BI)).swapaxes(1, 2))
    return y_NBT.swapaxes(0, 1).reshape(len(x_BI), -1)
