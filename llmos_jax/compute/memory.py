"""Device memory: what a compiled program needs, what a device has, and what to say when the first exceeds the second."""

import jax
import numpy as np

from llmos_jax.compute import host
from llmos_jax.errors import DeviceMemoryError

_ADVICE = (
    "lower train.batch_size or raise train.microbatches (activations), set model.remat=full (activations), lower data.length, "
    "raise mesh.context (activations of long rows), set mesh.parameters=fsdp or raise mesh.model (parameters and optimizer), "
    "or take a smaller model"
)


def bytes_per_device(tree):
    """Returns the bytes that one device holds of a tree of arrays or ShapeDtypeStructs with shardings."""

    def size(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return int(np.prod(shape, dtype=np.int64)) * itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def device_limit_bytes(device):
    """Returns the memory that JAX may use on `device`; on CPU the host's memory, shared by all virtual devices."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if device.platform != "cpu":
        return None
    return host.memory_bytes() // sum(1 for other in jax.local_devices() if other.platform == "cpu")


def compiled_bytes(compiled):
    """Returns {"arguments", "temporaries", "total"} in bytes per device of a compiled program."""
    analysis = compiled.memory_analysis()
    aliased = analysis.alias_size_in_bytes
    total = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - aliased + analysis.temp_size_in_bytes
    return {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "total": total,
    }


def check_fit(compiled, parts, limit_bytes):
    """Raises DeviceMemoryError, before anything is allocated, when a compiled step can't fit `limit_bytes`.

    `parts`: {name: bytes per device} of the step's arguments, to say what takes the memory.
    """
    need = compiled_bytes(compiled)
    if limit_bytes is not None and need["total"] > limit_bytes:
        raise DeviceMemoryError(explain(need["total"], parts | {"activations": need["temporaries"]}, limit_bytes))


def explain(total_bytes, parts, limit_bytes):
    """Returns one sentence: what the step needs, what the device has, what takes it, what lowers it."""
    taken = ", ".join(f"{name} {_gib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size)
    return f"the training step needs {_gib(total_bytes)} per device and there are {_gib(limit_bytes)}: {taken}; {_ADVICE}."


def is_out_of_memory(error):
    """Whether an exception of JAX says that a device ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _gib(size):
    return f"{size / 2**30:.2f} GiB"
