"""Products of few rows with a weight, as decoding makes them, in the forms that XLA:CPU runs fast.

Its matrix library packs the right operand anew in every call, which for few rows costs more than the product. One row at a time
the weight is only streamed; with some more, the weight as the left operand is not packed. (BUILD_NOTES.md has the
measurements: 1.2 to 2 times the speed from 2 to 48 rows; a single row needs no second one to be fast.)
"""

import jax.numpy as jnp
from jax import lax

# Up to here one row at a time is the fastest, and up to there the weight as the left operand.
_SINGLE_ROWS, MOST_ROWS = 4, 48
# Smaller weights stay in a core's cache: their form does not matter.
LEAST_SIZE = 2**16


def product(x_BI, weight_IO):
    """Returns x @ weight, [B, O], for B <= MOST_ROWS rows."""
    if x_BI.dtype != jnp.float32:
        # A single row would have the whole weight converted first; two are the library's.
        return (jnp.repeat(x_BI, 2, axis=0) @ weight_IO)[:1] if len(x_BI) == 1 else x_BI @ weight_IO
    if len(x_BI) <= _SINGLE_ROWS:
        return jnp.concatenate([lax.dot(x_BI[row : row + 1], weight_IO) for row in range(len(x_BI))])
    # Without the barrier the transposition is fused away, and the library misses its fast case.
    return lax.dot_general(weight_IO, lax.optimization_barrier(x_BI.T), (((0,), (0,)), ((), ()))).T
