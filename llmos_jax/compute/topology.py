"""Accelerator machines that are not here, by the names under which they are rented: their devices, to compile for."""

import os
import re

from llmos_jax.errors import ConfigError

# Shapes of slices by number of chips, the vendor's defaults (https://cloud.google.com/tpu/docs/v5p#v5p-configurations and the
# same page of each generation): a torus in three dimensions for v4, v5p and 7x, in two for v5e and v6e.
_CUBES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
          1024: "8x8x16", 1536: "8x12x16", 2048: "8x16x16", 3072: "12x16x16", 4096: "16x16x16", 6144: "16x16x24"}  # fmt: skip
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
# name -> (the compiler's name, chips that one unit of the name's number stands for, shapes)
_GENERATIONS = {
    "v5p": ("v5p", 0.5, _CUBES),  # its number counts tensor cores, of which a chip has two
    "tpu7x": ("tpu7x", 0.5, _CUBES),
    "v5e": ("v5e", 1, _SQUARES),
    "v5litepod": ("v5e", 1, _SQUARES),
    "v6e": ("v6e", 1, _SQUARES),
}
_HOST = {"v5p": (2, 2, 1), "tpu7x": (2, 2, 1), "v5e": (2, 2, 1), "v6e": (2, 2, 1)}


def topology_devices(name):
    """Returns the devices of a machine by name, none of which has to be here, for `Mesh` and `.lower().compile()`.

    `name`: a slice type as it is rented (`v5p-1024`: 512 chips; `v5e-16`, `v6e-256`: chips), or a generation with the shape
    of the slice (`v5p:8x8x8`); `Nx` before it means N slices joined by the data centre's network (`2xv5p-128`). Needs
    libtpu (`pip install libtpu`), which is the compiler. Raises ConfigError on an unknown name, listing the known ones.
    """
    slices, generation, shape = _parse(name)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or the compiler waits for the metadata server of a TPU host
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling takes no TPU: it may run beside one that does
    from jax.experimental import topologies

    host = tuple(min(a, b) for a, b in zip(_HOST[generation], (*map(int, shape.split("x")), 1), strict=False))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{shape}", chips_per_host_bounds=host, num_slices=slices
        )
    except (RuntimeError, ValueError, ImportError) as error:
        line = (str(error).splitlines() or ["?"])[0][:200]
        raise ConfigError(f"--topology={name}: the TPU compiler refused it ({line}); is libtpu installed?") from None
    return found.devices


def _parse(name):
    """Returns (slices, the compiler's name of the generation, shape)."""
    parts = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+?)(?:-(\d+)|:(\d+(?:x\d+)*))", name)
    known = ", ".join(f"{key}-N" for key in _GENERATIONS)
    if parts is None or parts.group(2) not in _GENERATIONS:
        raise ConfigError(f"--topology={name!r} is no machine that is known: it is like v5p-1024 or v5p:8x8x8; kinds: {known}.")
    slices = int(parts.group(1) or 1)
    generation, chips_per_unit, shapes = _GENERATIONS[parts.group(2)]
    if parts.group(4):
        dimensions = len(next(iter(shapes.values())).split("x"))
        if len(parts.group(4).split("x")) != dimensions:
            raise ConfigError(f"--topology={name!r}: a slice of {parts.group(2)} has {dimensions} dimensions.")
        return slices, generation, parts.group(4)
    chips = int(parts.group(3)) * chips_per_unit
    if chips not in shapes:
        sizes = ", ".join(f"{parts.group(2)}-{round(size / chips_per_unit)}" for size in shapes)
        raise ConfigError(f"--topology={name!r}: there is no slice of that size; there are {sizes}.")
    return slices, generation, shapes[chips]
