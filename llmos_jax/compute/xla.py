"""XLA's settings per target: what hides communication behind computation there, each with its source and what it gave.

They are handed to the compiler with each program (`.compile(compiler_options=...)`), so that no environment variable has to
be set before JAX starts. `train.compiler_options` adds to them, changes them, or takes one out (`none`).
"""

import dataclasses

from llmos_jax.compute.devices import chip_named


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting of the compiler: its value, where it is described, and what it gave when a program was compiled with it."""

    name: str
    value: bool | int
    source: str
    effect: str


_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py"
_GPU_GUIDE = "https://docs.jax.dev/en/latest/gpu_performance_tips.html"
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
# By a chip's name in `devices.CHIPS`, or by platform. Effects on v5p: GPT-3 175B, 512 chips, data 64 x model 8.
OPTIONS = {
    "TPU v5p": (
        Option(_OFFLOAD + "all_gather", True, _MAXTEXT, "gathers of activations run beside products: 0 to 100 % asynchronous"),
        Option(_OFFLOAD + "2d_all_gather", True, _MAXTEXT, "the same for gathers of weights, over two dimensions of the torus"),
        Option(_OFFLOAD + "3d_all_gather", True, _MAXTEXT, "the same over three"),
        Option(_OFFLOAD + "reduce_scatter", True, _MAXTEXT, "reductions of gradients and activations: 0 to 100 % asynchronous"),
        Option(_OFFLOAD + "all_reduce", True, _MAXTEXT, "the larger of the remaining sums"),
    ),
}


def compiler_options(device, overrides=()):
    """Returns {name: value} for programs compiled for `device`, with `overrides` ({name: text}; "none" takes one out)."""
    chip = chip_named(device.device_kind) if device.platform != "cpu" else None
    platform = "gpu" if device.platform in ("cuda", "rocm", "gpu") else device.platform
    chosen = {option.name: option.value for key in (platform, chip and chip.name) for option in OPTIONS.get(key, ())}
    chosen |= {name: _value(text) for name, text in dict(overrides).items()}
    return {name: value for name, value in chosen.items() if value is not None}


def _value(text):
    """Returns what a setting's text means: the compiler takes bools and whole numbers as such, everything else as text."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    return int(text) if text.lstrip("-").isdigit() else text
