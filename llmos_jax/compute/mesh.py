"""The device mesh: which devices work together, along which named axes."""

import dataclasses
import math

from absl import logging

from llmos_jax.compute.pipeline import SCHEDULES
from llmos_jax.config import setting
from llmos_jax.errors import ConfigError

# Outermost first: neighbours on the last axes talk most. `replica` is the axis whose network may be slow.
AXES = ("pipeline", "replica", "data", "context", "expert", "model")
# Which axis runs over the slower network between slices, in order of preference.
_SLOW_AXES = ("replica", "pipeline", "data")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes (one may be -1: what is left) and the rules that lay logical axes over them."""

    pipeline: int = setting(1, help="stages of layers", at_least=-1)
    replica: int = setting(1, help="copies of the sharded state, for slices joined by a slower network", at_least=-1)
    data: int = setting(-1, help="shards of the batch, and of the state with zero1 and fsdp", at_least=-1)
    context: int = setting(1, help="shards of the sequence", at_least=-1)
    expert: int = setting(1, help="shards of the experts; elsewhere they shard the batch", at_least=-1)
    model: int = setting(1, help="shards of heads, MLP and vocabulary (tensor parallelism)", at_least=-1)
    parameters: str = setting(
        "replicated",
        help="over the data axis: all replicated, optimizer sharded (zero1), or parameters too (fsdp)",
        choices=("replicated", "zero1", "fsdp"),
    )
    is_sequence_sharded: bool = setting(True, help="norms and residuals sharded by position over the model axis")
    pipeline_schedule: str = setting(
        "1f1b",
        help="1f1b: memory of activations independent of the microbatches (every stage is computed twice forward, so "
        "model.remat=none costs least and keeps one microbatch's); gpipe; circular: gpipe with several blocks a stage",
        choices=SCHEDULES,
    )
    pipeline_microbatches: int = setting(0, help="slices of a batch that follow each other; 0: twice the stages", at_least=0)
    pipeline_repeats: int = setting(1, help="blocks of layers per stage (circular; 1f1b: interleaved)", at_least=1)
    context_attention: str = setting(
        "ring",
        help="over the context axis: keys and values travel from device to device (ring), or are gathered by all",
        choices=("ring", "all_gather"),
    )
    rules: dict[str, tuple[str, ...]] = setting({}, help="logical axis -> mesh axes, over the rules of `parameters`")

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if 0 in sizes or sizes.count(-1) > 1:
            given = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
            raise ConfigError(f"{given}: sizes are positive, and one of them may be -1 (what is left).")
        if self.pipeline == 1:
            for name, idle in (("schedule", "1f1b"), ("microbatches", 0), ("repeats", 1)):
                if getattr(self, f"pipeline_{name}") != idle:
                    raise ConfigError(f"mesh.pipeline_{name} has no effect without stages: set mesh.pipeline above 1 too.")


def mesh_sizes(config, device_count):
    """Returns {axis: size} for `device_count` devices.

    Raises ConfigError when the sizes don't multiply to it; it names the factor that fails and the nearest mesh that fits.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    free = next((axis for axis, size in sizes.items() if size < 0), None)
    if free and device_count % fixed == 0:
        return sizes | {free: device_count // fixed}
    if not free and fixed == device_count:
        return sizes
    named = {axis: size if size > 0 else "(what is left)" for axis, size in sizes.items()}
    shown = " x ".join(f"{axis} {size}" for axis, size in named.items() if size != 1) or "of one device"
    raise ConfigError(
        f"mesh {shown} does not fit {device_count} device(s): {_failing_factor(sizes, device_count)}; "
        f"the nearest that fits: {' '.join(f'mesh.{axis}={size}' for axis, size in _nearest(sizes, device_count).items())}."
    )


def _failing_factor(sizes, device_count):
    left = device_count
    for axis, size in sizes.items():
        if size > 0 and left % size:
            return f"mesh.{axis}={size} does not divide the {left} that the axes before it leave"
        left = left // size if size > 0 else left
    return f"the sizes multiply to {math.prod(sizes.values())}"


def _nearest(sizes, device_count):
    """Returns the axes to set: every size but the data axis's lowered to what divides what is left, data takes the rest."""
    nearest, left = {}, device_count
    for axis, size in sizes.items():
        if axis != "data" and size != 1:
            nearest[axis] = next(fits for fits in range(min(abs(size), left), 0, -1) if left % fits == 0)
            left //= nearest[axis]
    return nearest | {"data": left}


def build_mesh(config, devices=None):
    """Returns a `jax.sharding.Mesh` with axes `AXES` over `devices` (default: all), laid out for the interconnect.

    Where devices belong to several slices, the slices are joined by the replica axis, or by pipeline or data when that
    has no size of its own: the other axes never cross the slower network.
    """
    import jax
    from jax.experimental import mesh_utils

    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # An axis need not be a whole dimension of the torus: a model axis of 4 is half of one that is 8 long.
    split = dict(allow_split_physical_axes=True)
    if slices == 1:
        laid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, **split)
        return jax.sharding.Mesh(laid, tuple(sizes), axis_types=types)
    slow = next((axis for axis in _SLOW_AXES if sizes[axis] % slices == 0), None)
    if slow is None:
        raise ConfigError(f"{slices} slices are attached: set mesh.replica={slices}, so that one axis runs between them.")
    if slow == "data" and config.parameters == "fsdp":
        logging.warning(
            "mesh.parameters=fsdp gathers weights over mesh.data, which runs over the slower network between %d slices: "
            "set mesh.replica=%d.", slices, slices,
        )  # fmt: skip
    inside = [size // slices if axis == slow else size for axis, size in sizes.items()]
    between = [slices if axis == slow else 1 for axis in sizes]
    laid = mesh_utils.create_hybrid_device_mesh(inside, between, devices, **split)
    return jax.sharding.Mesh(laid, tuple(sizes), axis_types=types)
