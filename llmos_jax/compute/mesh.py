"""The device mesh: which devices work together, along which named axes."""

import dataclasses
import math

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError

AXES = ("pipeline", "data", "model")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes (one may be -1: what is left) and the rules that lay logical axes over them."""

    pipeline: int = setting(1, help="stages of layers", at_least=-1)
    data: int = setting(-1, help="shards of the batch", at_least=-1)
    model: int = setting(1, help="shards of heads, MLP and vocabulary (tensor parallelism)", at_least=-1)
    parameters: str = setting(
        "replicated",
        help="parameters over the data axis: replicated, or fsdp (sharded)",
        choices=("replicated", "fsdp"),
    )
    rules: dict[str, tuple[str, ...]] = setting({}, help="logical axis -> mesh axes, over the rules of `parameters`")

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if 0 in sizes or sizes.count(-1) > 1:
            given = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
            raise ConfigError(f"{given}: sizes are positive, and one of them may be -1 (what is left).")
        if self.pipeline != 1:
            raise ConfigError(f"mesh.pipeline={self.pipeline}: pipeline parallelism is not there yet; set it to 1.")


def mesh_sizes(config, device_count):
    """Returns {axis: size} for `device_count` devices; ConfigError when the sizes don't multiply to it."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    free = [axis for axis, size in sizes.items() if size < 0]
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if free and device_count % fixed == 0:
        sizes[free[0]] = device_count // fixed
    elif free or fixed != device_count:
        divisors = [d for d in range(1, device_count + 1) if device_count % d == 0]
        raise ConfigError(
            f"mesh {shown} does not fit {device_count} device(s): the sizes must multiply to {device_count}; "
            f"an axis can be one of {divisors}."
        )
    return sizes


def build_mesh(config, devices=None):
    """Returns a `jax.sharding.Mesh` with axes `AXES` over `devices` (default: all), laid out for the interconnect."""
    import jax

    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
        devices=devices,
    )
