"""Device memory: what a compiled program needs, what a device has, and what to say when the first exceeds the second."""

import contextlib

import jax
import numpy as np

from llmos_jax.compute import host
from llmos_jax.errors import DeviceMemoryError

_ADVICE = (
    "raise train.microbatches or lower train.batch_size (activations), set model.remat=full (activations), lower data.length, "
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


def check_fit(need, parts, limit_bytes):
    """Raises DeviceMemoryError, before anything is allocated, when a compiled step can't fit `limit_bytes`.

    need: what `compiled_bytes` says of it. parts: {name: bytes per device} of its arguments, to say what takes the memory.
    """
    if limit_bytes is not None and need["total"] > limit_bytes:
        raise DeviceMemoryError(f"the training step needs {_account(need, parts, limit_bytes)}; {_ADVICE}.")


def explain_failure(error, doing, need, parts, limit_bytes):
    """Returns one sentence on a device that ran out: while doing what, how much the training step takes, what lowers it.

    need, parts: as in `check_fit`; need is None where the step could not even be compiled.
    """
    if need is None:
        taken = f"before what the step computes, there are {_listed(parts)}"
    else:
        taken = f"the training step needs {_account(need, parts, limit_bytes)}"
    return f"the device ran out of memory {doing} ({first_words(error)}): {taken}; {_ADVICE}."


@contextlib.contextmanager
def explained(doing, parts, advice):
    """Raises DeviceMemoryError for a device that runs out in the block: while doing what, what `parts()` take, what lowers it.

    parts: a function that returns {name: bytes}, per device where the name says nothing else.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(
            f"the device ran out of memory {doing} ({first_words(error)}): there are {_listed(parts())}; {advice}."
        ) from error


def first_words(error, most=300):
    """Returns the beginning of an error's message as one line: XLA's go on with tables."""
    return " ".join(str(error).split())[:most]


def is_out_of_memory(error):
    """Whether an exception of JAX says that a device ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _account(need, parts, limit_bytes):
    """Returns what a step needs per device, what there is, and what takes it, the largest first."""
    parts = parts | {"activations": need["temporaries"]}
    parts["batch and other"] = max(0, need["total"] - sum(parts.values()))
    there = "" if limit_bytes is None else f" and there are {_size(limit_bytes)}"
    return f"{_size(need['total'])} per device{there}: {_listed(parts)}"


def _listed(parts):
    return ", ".join(f"{name} {_size(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size > 2**13)


def _size(size):
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"
