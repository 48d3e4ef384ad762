"""Sharding as data: logical axis names to mesh axes. The only place that builds a `PartitionSpec`."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax.compute.mesh import AXES, MeshConfig, build_mesh
from llmos_jax.errors import ConfigError

_TENSOR_PARALLEL = {
    "batch": ("data",),  # activations: rows
    "length": (),  # activations: positions
    "layers": (),
    "vocab": ("model",),
    "embed": (),
    "heads": ("model",),
    "head_size": (),
    "mlp": ("model",),
    "positions": (),
    "norm": (),
}
RULES = {
    "replicated": _TENSOR_PARALLEL,
    # ZeRO-3: every large parameter names `embed` once, so this one rule shards them all over the data axis.
    "fsdp": _TENSOR_PARALLEL | {"embed": ("data",)},
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that lay logical axes over it: all that a model needs to know of the hardware."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    @functools.cached_property
    def _table(self):
        return dict(self.rules)

    @property
    def platform(self):
        """ "cpu", "gpu" or "tpu"."""
        platform = self.mesh.devices.flat[0].platform
        return "gpu" if platform in ("cuda", "rocm") else platform

    def mesh_axes(self, axis):
        """Returns the mesh axes of a logical axis; ConfigError on an unknown name, listing the known ones."""
        if axis is None:
            return ()
        if axis not in self._table:
            raise ConfigError(f"logical axis {axis!r} is not in the rules; known: {', '.join(sorted(self._table))}.")
        return self._table[axis]

    def axis_size(self, axis):
        """Returns over how many shards a logical axis is laid."""
        return int(np.prod([self.mesh.shape[name] for name in self.mesh_axes(axis)], dtype=int))

    def spec(self, *axes):
        """Returns the PartitionSpec of an array whose dimensions have these logical axes (None: not sharded)."""
        entries = [self.mesh_axes(axis) for axis in axes]
        used = [name for entry in entries for name in entry]
        if len(set(used)) != len(used):
            raise ConfigError(f"rules lay a mesh axis over two dimensions of {axes}: {entries}.")
        return PartitionSpec(*[entry if len(entry) > 1 else entry[0] if entry else None for entry in entries])

    def sharding(self, *axes):
        """Returns the NamedSharding of an array with these logical axes; none: replicated."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def constrain(self, x, *axes):
        """Returns `x` laid out by the rules, inside jit; `axes` names every dimension (None: left unsharded)."""
        return x if self.mesh.size == 1 else jax.lax.with_sharding_constraint(x, self.sharding(*axes))


def make_placement(config=None, devices=None):
    """Returns the Placement of a MeshConfig over `devices` (default: all attached).

    Raises ConfigError when the mesh does not fit the devices or a rule names an unknown mesh axis.
    """
    config = config or MeshConfig()
    rules = RULES[config.parameters] | config.rules
    for axis, names in rules.items():
        if axis not in RULES["fsdp"]:
            raise ConfigError(f"mesh.rules.{axis}: no such logical axis; known: {', '.join(sorted(RULES['fsdp']))}.")
        unknown = [name for name in names if name not in AXES]
        if unknown:
            raise ConfigError(f"mesh.rules.{axis} names the mesh axis {unknown[0]!r}; known: {', '.join(AXES)}.")
    return Placement(build_mesh(config, devices), tuple(sorted((axis, tuple(names)) for axis, names in rules.items())))


def shard_shapes_divide(placement, shape, axes, name):
    """Raises ConfigError when a dimension of parameter `name` is not a multiple of the shards laid over it."""
    for size, axis in zip(shape, axes, strict=True):
        shards = placement.axis_size(axis)
        if size % shards:
            raise ConfigError(
                f"{name}: its {axis} dimension of {size} is not divisible by the {shards} shards of mesh axis "
                f"{' x '.join(placement.mesh_axes(axis))}; change the model's size or the mesh."
            )


def global_array(rows, shape, dtype, sharding):
    """Returns a global array; `rows(start, stop)` is asked only for the rows that this process's devices hold."""

    @functools.cache
    def cached(start, stop):
        return rows(start, stop)

    def read(index):
        start, stop, _ = index[0].indices(shape[0])
        return cached(start, stop)[(slice(None), *index[1:])].astype(dtype, copy=False)

    return jax.make_array_from_callback(shape, sharding, read)
