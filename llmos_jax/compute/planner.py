"""What a compiled program takes of a machine, before the machine is there: memory, arithmetic, traffic, and what is hidden."""

import dataclasses
import json
import math
import pathlib
import tempfile
import time

import jax

from llmos_jax.compute import hlo, memory, xla
from llmos_jax.compute.devices import chip_named
from llmos_jax.errors import ConfigError, DeviceMemoryError

# An array is listed from this share of a device's memory on.
LISTED_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of one compiled step; bytes, FLOPs and seconds are per device.

    memory: {"arguments", "temporaries", "peak", "total"}; hbm_bytes: what the device has (None: not in the chip table).
    matmul_flops: of all products, those that rematerialisation repeats included; model_flops: without those. arrays: every
    one over 1 % of memory. whole: names of those arrays that are a whole parameter, or all logits, though the rules shard
    them; unchecked: parameters that have the dimensions of activations, so that this can't be told of them.
    compute_seconds: matmul_flops at the chip's peak; link_seconds: all that is sent at the peak of its links;
    exposed_seconds: the part of it that no computation hides in the schedule. bubble: share of the pipeline's ticks in
    which a stage idles (0 without stages).
    """

    machine: str
    devices: int
    mesh: dict[str, int]
    memory: dict[str, int]
    hbm_bytes: int | None
    matmul_flops: float
    model_flops: float
    compute_seconds: float | None
    link_seconds: float | None
    exposed_seconds: float | None
    bubble: float
    compile_seconds: float
    collectives: list[hlo.Collective]
    arrays: list[hlo.Array]
    whole: list[str]
    unchecked: list[str]


def compile_and_read(lowered, compiler_options=None):
    """Returns (compiled, schedule, buffer assignment): the program and the compiler's own texts about it.

    The texts come from XLA's dump: `compiled.as_text()` fails on programs with offloaded collectives. Raises
    DeviceMemoryError when the compiler finds that the program can't fit.
    """
    is_cached = jax.config.jax_enable_compilation_cache
    with tempfile.TemporaryDirectory(prefix="llmos-plan-") as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            jax.config.update("jax_enable_compilation_cache", False)  # a program out of the cache leaves no texts
            compiled = xla.compile_lowered(lowered, dict(compiler_options or {}) | dump)
        except jax.errors.JaxRuntimeError as error:
            if memory.is_out_of_memory(error):
                raise DeviceMemoryError(f"the step does not fit: {memory.first_words(error)}") from None
            raise
        finally:
            jax.config.update("jax_enable_compilation_cache", is_cached)
        files = list(pathlib.Path(folder).glob("*"))

        def read(ending):
            found = [file for file in files if file.name.endswith(ending)]
            if len(found) != 1:
                raise ConfigError(f"the compiler left {len(found)} dumps {ending!r} where one was expected: {files[:5]}.")
            return found[0].read_text()

        return compiled, read("after_optimizations.txt"), read("after_optimizations-buffer-assignment.txt")


def make_report(traced, mesh, *, model_flops, wholes, unchecked=(), bubble=0.0, compiler_options=None):
    """Returns the Report of a traced step (`jax.stages.Traced`) on the devices of `mesh`, which it compiles.

    `model_flops`: of a step, over all devices. `wholes`: {name: dimensions} of arrays that no device should hold (see
    `find_whole`). `unchecked`, `bubble`: see Report. Raises DeviceMemoryError when the compiler finds that the step can't fit.
    """
    start = time.perf_counter()
    compiled, schedule, assignment = compile_and_read(traced.lower(), compiler_options)
    seconds = time.perf_counter() - start
    device, count = mesh.devices.flat[0], mesh.size
    chip = chip_named(device.device_kind)
    found = hlo.collectives(schedule)
    listed_from = LISTED_SHARE * (chip.hbm_bytes if chip else memory.compiled_bytes(compiled)["total"])
    arrays = hlo.arrays(assignment, schedule, listed_from)
    flops = matmul_flops(traced.jaxpr.jaxpr) / count
    sent = {is_hidden: 0 for is_hidden in (True, False)}
    for collective in found:
        sent[collective.hidden_by > 0] += collective.count * collective.sent_bytes
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return Report(
        machine=f"{count} x {device.device_kind}",
        devices=count,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        memory=memory.compiled_bytes(compiled) | {"peak": peak},
        hbm_bytes=chip.hbm_bytes if chip else None,
        matmul_flops=flops,
        model_flops=model_flops / count,
        compute_seconds=flops / chip.peak_flops["bfloat16"] if chip else None,
        link_seconds=sum(sent.values()) / chip.link_bandwidth if chip else None,
        exposed_seconds=sent[False] / chip.link_bandwidth if chip else None,
        bubble=bubble,
        compile_seconds=seconds,
        collectives=found,
        arrays=arrays,
        whole=find_whole(arrays, wholes),
        unchecked=list(unchecked),
    )


def find_whole(arrays, wholes):
    """Returns a sentence for every array that has the dimensions of a whole one, in any order, ones left out."""
    by_dimensions = {tuple(sorted(size for size in dims if size > 1)): name for name, dims in wholes.items()}
    found = []
    for array in arrays:
        name = by_dimensions.get(tuple(sorted(size for size in array.shape if size > 1)))
        if name is not None:
            found.append(f"{array.type} is all of {name} ({array.source or array.name})")
    return found


def matmul_flops(jaxpr):
    """Returns the FLOPs of all matrix products of a traced program, over all devices: 2 x output elements x contracted ones.

    Loops multiply; of branches the largest counts; a kernel counts every step of its grid, the skipped ones too.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[dim] for dim in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        elif name == "ragged_dot_general":
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * eqn.invars[0].aval.shape[-1]
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(matmul_flops(_open(inner)) for inner in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)
                        if _is_jaxpr(inner))  # fmt: skip
            total += inner * _repeats(name, params)
    return total


def format_report(report):
    """Returns the report as text for people."""
    used = report.memory
    lines = [
        f"{report.machine}, mesh {' x '.join(f'{axis} {size}' for axis, size in report.mesh.items()) or 'of one device'};"
        f" compiled in {report.compile_seconds:.0f} s; figures per device",
        "",
        _row("memory", " ".join(f"{name} {size / 1e9:.2f} GB" for name, size in used.items())),
    ]
    if report.hbm_bytes:
        share = used["total"] / report.hbm_bytes
        verdict = "fits" if share <= 1 else "TOO MUCH"
        lines.append(_row("of the device's", f"{report.hbm_bytes / 1e9:.1f} GB: {share:.0%}, {verdict}"))
    again, model = report.matmul_flops / 1e12, report.model_flops / 1e12
    lines.append(_row("products", f"{again:.1f} TFLOP a step; {model:.1f} by the model's formula, which repeats none"))
    if report.compute_seconds:
        seconds = f"{report.compute_seconds:.2f} s of products, {report.link_seconds:.2f} s on the links"
        lines.append(_row("at the chip's peak", f"{seconds}, {report.exposed_seconds:.2f} s of these not hidden"))
    if report.bubble:
        lines.append(_row("pipeline", f"a stage idles in {report.bubble:.1%} of the ticks"))
    lines += ["", f"{'collective':20s} {'devices':>7s} {'a step':>7s} {'sent GB':>9s} {'async':>6s} {'hidden':>7s}"]
    for (kind, devices), group in _grouped(report.collectives).items():
        sent = sum(c.count * c.sent_bytes for c in group)
        parts = [sum(c.count * c.sent_bytes for c in group if holds(c)) / max(sent, 1) for holds in (_is_async, _is_hidden)]
        count = sum(c.count for c in group)
        lines.append(f"{kind:20s} {devices:7d} {count:7d} {sent / 1e9:9.3f} {parts[0]:6.0%} {parts[1]:7.0%}")
    lines += ["", f"arrays over {LISTED_SHARE:.0%} of memory" + ("" if report.arrays else ": none")]
    for array in report.arrays:
        what = "argument" if array.is_argument else array.source or array.name
        lines.append(f"{array.size_bytes / 1e9:8.2f} GB  {array.type:32s} {what}")
    lines += ["", "whole though sharded by the rules: " + ("; ".join(report.whole) or "none")]
    if report.unchecked:
        names = "; ".join(report.unchecked)
        lines.append(f"not known of, for having a dimension like the batch (plan with another train.batch_size): {names}")
    return "\n".join(lines)


def to_json(report):
    """Returns the report as indented JSON text, every collective and array in it."""
    return json.dumps(dataclasses.asdict(report), indent=2) + "\n"


def _grouped(collectives):
    groups = {}
    for collective in collectives:
        groups.setdefault((collective.kind, collective.devices), []).append(collective)
    return dict(sorted(groups.items(), key=lambda item: -sum(c.count * c.sent_bytes for c in item[1])))


def _is_async(collective):
    return collective.is_async


def _is_hidden(collective):
    return collective.hidden_by > 0


def _row(name, text):
    return f"{name:20s} {text}"


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _open(value):
    return value if hasattr(value, "eqns") and not hasattr(value, "jaxpr") else value.jaxpr


def _repeats(name, params):
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return params["mesh"].size  # its inside is the work of one device
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1
