"""XLA's settings per target: what hides communication behind computation there, each with its source and what it gave.

They are handed to the compiler with each program (`.compile(compiler_options=...)`), so that no environment variable has to
be set before JAX starts. `train.compiler_options` adds to them, changes them, or takes one out (`none`).
"""

import dataclasses
import re

import jax
from absl import logging

from llmos_jax.compute.devices import chip_named
from llmos_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting of the compiler: its value, where it is described, and what it gave when a program was compiled with it."""

    name: str
    value: bool | int
    source: str
    effect: str


_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py"
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_DUMP = "tpu_comp_env of a program dumped by libtpu 0.0.52 (`xla_dump_to`): every setting that it knows, with its default"
# Collective matmul has no row: the partitioner makes one (a loop of permutes and partial products) of a product whose operand
# it has to gather itself, from xla_jf_spmd_threshold_for_windowed_einsum_mib on. Our blocks say where they gather, and their
# gathers are asynchronous and hidden: with a threshold of 0 the program is the same (GPT 6.7B of 4 layers on v5p-16, data 2 x
# model 4, FSDP: 40 asynchronous collectives, 2.7 of 20.5 ms of traffic not hidden, 4.1 GB).
# Tried on v5p and without effect: xla_enable_async_all_gather (is on), xla_tpu_enable_3d_reduce_scatter_decomposer,
# xla_tpu_enable_reduce_scatter_legalizer. Refused there: xla_tpu_enable_async_collective_fusion_fuse_all_gather, which is
# v5e's own way and its default.
_SPARSE_CORES = (
    Option(_OFFLOAD + "all_gather", True, _MAXTEXT, "gathers of activations (one dimension of the torus): 0 to 100 %"),
    Option(_OFFLOAD + "2d_all_gather", True, _DUMP, "gathers of weights over two dimensions: 0 to 100 %"),
    Option(_OFFLOAD + "3d_all_gather", True, _DUMP, "gathers of weights over all three: 0 to 100 %, with the next"),
    Option("xla_tpu_prefer_async_allgather_to_allreduce", True, _DUMP, "gathers over all chips send half: no all-reduces"),
    Option(_OFFLOAD + "reduce_scatter", True, _MAXTEXT, "reductions of gradients and activations: 0 to 100 %"),
    Option(_OFFLOAD + "nd_reduce_scatter", True, _DUMP, "reductions over all chips send half: no all-reduces"),
    Option(_OFFLOAD + "all_reduce", True, _MAXTEXT, "sums of gradients of norms, of a replicated model"),
)
_NVIDIA = "https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance"
_NOT_MEASURED = "taken from its source, which trains language models by it; not measured here"
_COMBINED = "xla_gpu_{}_combine_threshold_bytes"
# The source's xla_gpu_enable_pipelined_* are left out: jaxlib 0.11 has them no more, and refuses programs that ask for them.
_GPU = (
    Option("xla_gpu_enable_latency_hiding_scheduler", True, _NVIDIA, _NOT_MEASURED),
    Option(_COMBINED.format("all_gather"), 2**27, _NVIDIA, _NOT_MEASURED),
    Option(_COMBINED.format("reduce_scatter"), 2**27, _NVIDIA, _NOT_MEASURED),
    Option(_COMBINED.format("all_reduce"), 2**27, _NVIDIA, _NOT_MEASURED),
    Option("xla_gpu_enable_while_loop_double_buffering", True, _NVIDIA, _NOT_MEASURED),
)
# By a chip's name in `devices.CHIPS`, or by platform. What they gave is the share of bytes sent by asynchronous collectives:
# v5p with GPT-3 175B on 512 chips (data 64 x model 8) and Llama 2 7B on 64 (data 64), v6e with GPT 6.7B on 256.
# v5e: nothing that was tried made its reduce-scatters asynchronous; the compiler's defaults stay.
OPTIONS = {"TPU v5p": _SPARSE_CORES, "TPU v6e": _SPARSE_CORES, "TPU v5e": (), "gpu": _GPU, "cpu": ()}


def compiler_options(device, overrides=()):
    """Returns {name: value} for programs compiled for `device`, with `overrides` ({name: text}; "none" takes one out)."""
    chip = chip_named(device.device_kind) if device.platform != "cpu" else None
    platform = "gpu" if device.platform in ("cuda", "rocm", "gpu") else device.platform
    keys = [key for key in (platform, chip and chip.name) if key in OPTIONS]
    if not keys:
        logging.info("compute/xla.py has no compiler settings for %s: the compiler's defaults hold.", device.device_kind)
    chosen = {option.name: option.value for key in keys for option in OPTIONS[key]}
    chosen |= {name: _value(text) for name, text in dict(overrides).items()}
    return {name: value for name, value in chosen.items() if value is not None}


def compile_lowered(lowered, options):
    """Returns `lowered` compiled with {name: value} options; ConfigError for one that this compiler doesn't have or take."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not re.search(r"No such compile option|While setting option|Failed to parse|[Uu]nknown flag", str(error)):
            raise
        named = [name for name in options if name in str(error)]
        raise ConfigError(
            f"the compiler of jaxlib {jax.lib.__version__} refuses an option ({str(error).splitlines()[0]}): change it in "
            f"train.compiler_options, or, where compute/xla.py asks for it, take it out: train.compiler_options."
            f"{named[0] if named else 'NAME'}=none."
        ) from None


def _value(text):
    """Returns what a setting's text means: the compiler takes bools and whole numbers as such, everything else as text."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    return int(text) if text.lstrip("-").isdigit() else text
