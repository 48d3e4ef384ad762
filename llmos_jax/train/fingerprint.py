"""Fingerprints of arrays: one 32-bit number a leaf, the same for every sharding, different after any flipped bit.

Each element's bits are mixed with its index by Murmur3's finaliser and summed modulo 2^32, inside jit. Orbax has no
checksum on array data (200 of 200 single-bit flips were restored silently), so this is what a checkpoint is held against.
Taken of each device's own copy, it tells which of several devices holds another value than its peers.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.compute.distributed import device_rows
from llmos_jax.errors import ReplicaMismatch
from llmos_jax.train.state import leaf_name


def fingerprints(tree):
    """Returns {leaf name: number} of a tree of arrays, read from the device (waits for it)."""
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    values = jax.device_get(_all(jax.tree.leaves(tree)))
    return {name: int(value) for name, value in zip(names, values, strict=True)}


class ReplicaCheck:
    """Compares the copies that devices hold of the same part of an array: nothing else would ever notice that one differs.

    `like`: a tree of arrays or ShapeDtypeStructs with NamedShardings over `mesh`. Compiled once; a call reads every
    device's own copy once and brings one number per device and leaf to the host (waits for them).
    """

    def __init__(self, like, mesh):
        leaves = jax.tree_util.tree_leaves_with_path(like)
        self._names = [leaf_name(path) for path, _ in leaves]
        self._devices = list(mesh.devices.flat)
        self._parts = [_parts(leaf, self._devices) for _, leaf in leaves]
        rows = device_rows(mesh)
        local = jax.shard_map(
            lambda *copies: jnp.stack([_fingerprint(copy) for copy in copies])[None],
            mesh=mesh,
            in_specs=tuple(leaf.sharding.spec for _, leaf in leaves),
            out_specs=rows.spec,
            check_vma=False,  # that copies are equal is what is asked, not what may be assumed
        )
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._run = jax.jit(local, out_shardings=everywhere)

    def __call__(self, tree):
        """Raises ReplicaMismatch naming leaf and device when a copy differs from its peers; on all processes alike."""
        found = np.asarray(jax.device_get(self._run(*jax.tree.leaves(tree))))  # [devices, leaves]
        problems = []
        for leaf, (name, parts) in enumerate(zip(self._names, self._parts, strict=True)):
            for members in parts:
                votes = collections.Counter(found[members, leaf].tolist())
                (value, count), *others = votes.most_common()
                if not others:
                    continue
                if count == others[0][1]:
                    named = " and ".join(self._named(row) for row in members)
                    problems.append(f"{name} differs between {named}, and no majority tells which is right")
                odd = [self._named(row) for row in members if found[row, leaf] != value]
                if count > others[0][1]:
                    problems.append(f"{name} on {', '.join(odd)} differs from its {count} other copies")
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ReplicaMismatch(
                f"copies that must be equal are not: {'; '.join(problems[:3])}{more}. A device or its link is faulty: "
                "if a start from the last checkpoint does not help, replace it."
            )

    def _named(self, row):
        device = self._devices[row]
        return f"device {device.id} ({device.device_kind}, process {device.process_index})"


def _parts(leaf, devices):
    """Returns, for each part of an array that several devices hold, the rows of those devices."""
    held, rows = leaf.sharding.devices_indices_map(leaf.shape), collections.defaultdict(list)
    for row, device in enumerate(devices):
        rows[tuple((part.start, part.stop) for part in held[device])].append(row)
    return [members for members in rows.values() if len(members) > 1]


@jax.jit
def _all(leaves):
    return [_fingerprint(leaf) for leaf in leaves]


@jax.jit  # traced once for all leaves of a shape: weights, their moments and their average
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
