"""The key-value cache of a decoder: one (key, value) pair a layer, donated and updated in place."""

import jax
import jax.numpy as jnp

# Cache and prompt lengths are rounded up to this, so that few programs are compiled.
LENGTH_MULTIPLE = 64


def round_up(length, multiple=LENGTH_MULTIPLE):
    """Returns `length` rounded up to a multiple."""
    return -(-length // multiple) * multiple


def init_cache(shape, layers, dtype, placement):
    """Returns a zeroed cache: `layers` pairs of arrays [B, G, M, K], heads laid over the model axis."""
    sharding = placement.sharding("batch" if shape[0] % placement.axis_size("batch") == 0 else None, "heads", None, None)
    make = jax.jit(lambda: [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)], out_shardings=sharding)
    return make()
