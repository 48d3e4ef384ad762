"""Sharding as data: logical axis names to mesh axes. The only place that builds a `PartitionSpec`."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax.compute.mesh import AXES, MeshConfig, build_mesh
from llmos_jax.compute.pipeline import Plan, make_plan
from llmos_jax.errors import ConfigError

_REPLICATED = {
    # Activations. The expert axis shards rows wherever no experts are asked.
    "batch": ("replica", "data", "expert"),
    "length": ("context",),
    "residual_length": ("context", "model"),  # between the blocks: norms and residuals
    # Parameters and activations.
    "layers": ("pipeline",),
    "vocab": ("pipeline", "model"),  # over the stages too: none idles while embedding and head are computed
    "embed": (),
    "heads": ("model",),
    "head_size": (),
    "mlp": ("model",),
    "experts": ("expert",),
    "expert_embed": (),
    "positions": (),
    "norm": (),
}
# ZeRO-3: every large parameter names `embed` (or `expert_embed`) once, so that two rules shard them all over the axes whose
# devices see different tokens. The replica axis is left out: gathering weights never crosses the network between slices.
_SHARDED = {"embed": ("data", "context", "expert"), "expert_embed": ("data", "context")}
RULES = {  # mesh.parameters -> rules of parameters and activations
    "replicated": _REPLICATED,
    "zero1": _REPLICATED,
    "fsdp": _REPLICATED | _SHARDED,
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that lay logical axes over it: all that a model needs to know of the hardware.

    optimizer_rules: the rules of what only the update reads (moments, averaged weights); ZeRO-1 shards these alone.
    pipeline: the schedule, where the mesh has stages.
    context_attention: how attention reads rows whose length is sharded, "ring" or "all_gather".
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    optimizer_rules: tuple[tuple[str, tuple[str, ...]], ...]
    pipeline: Plan | None = None
    context_attention: str = "ring"

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
        """Returns `x` laid out by the rules, inside jit; `axes` names every dimension (None: left unsharded).

        A dimension that its shards don't divide (one position of a decoding step) is left whole.
        """
        if self.mesh.size == 1:
            return x
        whole = [axis if size % self.axis_size(axis) == 0 else None for size, axis in zip(x.shape, axes, strict=True)]
        return jax.lax.with_sharding_constraint(x, self.sharding(*whole))

    def length_order(self, length):
        """Returns which position of a row lies at each index of a sharded length, int [length]; None: in their order.

        Whatever a model is fed with by position (`tasks.base.make_batch` lays it out) has this order: attention masks by it.
        """
        shards = self.axis_size("length")
        if shards == 1:
            return None
        if length % (2 * shards):
            raise ConfigError(f"a length of {length} can't be cut into 2 chunks for each of {shards} shards.")
        chunks = [chunk for shard in range(shards) for chunk in chunks_of_shard(shard, shards)]
        return np.arange(length).reshape(2 * shards, -1)[chunks].reshape(-1)

    @functools.cached_property
    def for_optimizer(self):
        """The placement of what only the update reads: this one, but for ZeRO-1."""
        return dataclasses.replace(self, rules=self.optimizer_rules)


def platform_of(placement):
    """Returns the platform of a Placement, or of JAX's default devices where it is None."""
    return jax.default_backend() if placement is None else placement.platform


def chunks_of_shard(shard, shards):
    """Returns which two of the 2 x `shards` chunks of a row a shard of its length holds: an early one, a late one.

    A causal mask shows little to the early one and much to its partner: every shard has the same work.
    """
    return shard, 2 * shards - 1 - shard


def make_placement(config=None, devices=None):
    """Returns the Placement of a MeshConfig over `devices` (default: all attached).

    Raises ConfigError when the mesh does not fit the devices or a rule names an unknown mesh axis.
    """
    config = config or MeshConfig()
    rules = RULES[config.parameters] | ({} if config.is_sequence_sharded else {"residual_length": ("context",)})
    optimizer_rules = rules | (_SHARDED if config.parameters == "zero1" else {}) | config.rules
    rules = rules | config.rules
    for axis, names in rules.items():
        if axis not in _REPLICATED:
            raise ConfigError(f"mesh.rules.{axis}: no such logical axis; known: {', '.join(sorted(_REPLICATED))}.")
        unknown = [name for name in names if name not in AXES]
        if unknown:
            raise ConfigError(f"mesh.rules.{axis} names the mesh axis {unknown[0]!r}; known: {', '.join(AXES)}.")
    mesh = build_mesh(config, devices)
    plan = None
    if mesh.shape["pipeline"] > 1:
        plan = make_plan(
            config.pipeline_schedule, mesh.shape["pipeline"], config.pipeline_repeats, config.pipeline_microbatches
        )
    return Placement(mesh, _frozen(rules), _frozen(optimizer_rules), plan, config.context_attention)


def _frozen(rules):
    return tuple(sorted((axis, tuple(names)) for axis, names in rules.items()))


def shard_shapes_divide(placement, shape, axes, name):
    """Raises ConfigError when a dimension of parameter `name` is not a multiple of the shards laid over it."""
    for size, axis in zip(shape, axes, strict=True):
        shards = placement.axis_size(axis)
        if size % shards:
            raise ConfigError(
                f"{name}: its {axis} dimension of {size} is not divisible by the {shards} shards of mesh axis "
                f"{' x '.join(placement.mesh_axes(axis))}; change the model's size or the mesh, or leave it whole: "
                f'mesh.rules={{"{axis}": []}}.'
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
