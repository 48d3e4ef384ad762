"""The chip table: what each accelerator can do at best, and what is attached. CPUs are measured, never assumed."""

import contextlib
import dataclasses
import json
import os
import time

from llmos_jax.compute import host
from llmos_jax.errors import ConfigError

_GB, _GIB, _T = 10**9, 2**30, 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device as JAX sees it.

    peak_flops: dense FLOP/s by dtype name (no sparsity). hbm_bytes, hbm_bandwidth (bytes/s). link_bandwidth: bytes/s that
    the device can send to its neighbours over the chip-to-chip network, all links together, one direction (half of what
    is published as bidirectional).
    source: where the figures are published.
    """

    name: str
    peak_flops: dict[str, float]
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    source: str


def _flops(bfloat16, int8=None, float8=None, float32=None):
    given = {"bfloat16": bfloat16, "int8": int8, "float8_e4m3fn": float8, "float32": float32}
    return {dtype: value * _T for dtype, value in given.items() if value is not None}


_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("TPU v4", _flops(275, int8=275), 32 * _GIB, 1228 * _GB, 300 * _GB, _TPU + "v4"),
        Chip("TPU v5e", _flops(197, int8=393), 16 * _GIB, 819 * _GB, 200 * _GB, _TPU + "v5e"),
        Chip("TPU v5p", _flops(459, int8=918), 95 * _GIB, 2765 * _GB, 600 * _GB, _TPU + "v5p"),
        Chip("TPU v6e", _flops(918, int8=1836), 32 * _GIB, 1638 * _GB, 400 * _GB, _TPU + "v6e"),
        # JAX sees each of a v7 chip's two chiplets as a device; the published figures are per chip.
        Chip("TPU v7", _flops(2307 / 2, float8=4614 / 2), 96 * _GIB, 7380 / 2 * _GB, 600 / 2 * _GB, _TPU + "tpu7x"),
        Chip("A100-40GB", _flops(312, int8=624, float32=19.5), 40 * _GB, 1555 * _GB, 300 * _GB, _NVIDIA + "a100/"),
        Chip("A100-80GB", _flops(312, int8=624, float32=19.5), 80 * _GB, 2039 * _GB, 300 * _GB, _NVIDIA + "a100/"),
        Chip("H100", _flops(989.4, 1978.9, 1978.9, 66.9), 80 * _GB, 3350 * _GB, 450 * _GB, _NVIDIA + "h100/"),
        Chip("H100-PCIe", _flops(756, 1513, 1513, 51), 80 * _GB, 2000 * _GB, 300 * _GB, _NVIDIA + "h100/"),
        Chip("H200", _flops(989.4, 1978.9, 1978.9, 66.9), 141 * _GB, 4800 * _GB, 450 * _GB, _NVIDIA + "h200/"),
        Chip("B200", _flops(2250, 4500, 4500, 75), 180 * _GB, 7700 * _GB, 900 * _GB, _NVIDIA + "dgx-b200/"),
    )
}
# How devices call themselves (`device.device_kind`), most special first.
_KINDS = (
    ("TPU7x", "TPU v7"),
    ("TPU v7", "TPU v7"),
    ("TPU v6", "TPU v6e"),
    ("TPU v5 lite", "TPU v5e"),
    ("TPU v5e", "TPU v5e"),
    ("TPU v5", "TPU v5p"),
    ("TPU v4", "TPU v4"),
    ("A100-SXM4-80GB", "A100-80GB"),
    ("A100 80GB", "A100-80GB"),
    ("A100", "A100-40GB"),
    ("H100 PCIe", "H100-PCIe"),
    ("H100", "H100"),
    ("H200", "H200"),
    ("B200", "B200"),
)


def chip_named(kind):
    """Returns the Chip of a `device_kind`, or None for one that is not in the table (its MFU is then left out)."""
    return next((CHIPS[name] for part, name in _KINDS if part.lower() in kind.lower()), None)


def peak_flops(devices, dtype):
    """Returns the peak FLOP/s of all `devices` together in `dtype`, or None when the chip or dtype is not in the table.

    Virtual CPU devices share the cores that are there: they count as one.
    """
    devices = list(devices)
    if devices[0].platform == "cpu":
        return measure_cpu_flops()
    chip = chip_named(devices[0].device_kind)
    return chip.peak_flops[dtype] * len(devices) if chip and dtype in chip.peak_flops else None


def refuse_idle_accelerator():
    """Raises ConfigError when a GPU or TPU is attached, but JAX has come up on the CPU, unless JAX_PLATFORMS asks for it."""
    import jax

    if "cpu" in (jax.config.jax_platforms or "").split(","):
        return
    gpus = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else host.visible_gpus({})
    for is_attached, name, extra in ((gpus, f"{gpus} x NVIDIA GPU", "gpu"), (host.has_tpu(), "TPU", "tpu")):
        if is_attached:
            raise ConfigError(
                f"{name} attached, but this JAX can't use it and would train on the CPU: pip install 'llmos-jax[{extra}]' (see "
                "JAX's warning above), or ask for the CPU: JAX_PLATFORMS=cpu."
            )


def measure_cpu_flops():
    """Returns the best float32 FLOP/s seen of a matrix product on this process's cores; each call measures 0.1 s.

    The best is kept on disk, so that a moment at which the machine was busy does not count for long.
    """
    import jax
    import jax.numpy as jnp

    key = f"{host.cpu_model()}, {host.cores()} cores, jax {jax.__version__}"
    file = host.cache_directory("measured") / "cpu_flops.json"
    known = _remembered(file)
    size, best = 1024, known.get(key, 0.0)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.ones((size, size), jnp.float32)
        product = jax.jit(lambda x: x @ x)
        product(x).block_until_ready()
        for _ in range(6):
            start = time.perf_counter()
            product(x).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    with contextlib.suppress(OSError):  # a full disk: measured again next time
        host.write_whole(file, json.dumps(known | {key: best}, indent=2))
    return best


def _remembered(file):
    """Returns what was measured before: nothing where the file is missing or damaged."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, float)} if isinstance(known, dict) else {}


def describe_devices(devices):
    """Returns one phrase on the devices: `8 x NVIDIA H200 (141 GB each)`, `1 x CPU (AMD EPYC, 2 cores, 23 GiB)`."""
    devices = list(devices)
    if devices[0].platform == "cpu":
        return f"{len(devices)} x CPU ({host.cpu_model()}, {host.cores()} cores, {host.memory_bytes() / _GIB:.0f} GiB)"
    chip = chip_named(devices[0].device_kind)
    size = f" ({chip.hbm_bytes / _GB:.0f} GB each)" if chip else ""
    return f"{len(devices)} x {devices[0].device_kind}{size}"
