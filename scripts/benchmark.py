"""Benchmark workers: long-lived processes that run the project's own code when they are told to.

    python scripts/benchmark.py train --shape a            # a, b: for CPUs; c: for a GPU
    python scripts/reference_training.py --shape a         # PyTorch's side, by the same protocol

prints `{"ready": NAME}` when warm (compiled, two steps done), then for each line `go N` on standard input runs N
optimizer steps, waits for the device and prints tokens per second, milliseconds per step, the last loss and the peak
resident memory (on an accelerator its memory, too) as one JSON line. `quit` or the end of input ends it. Ratios between
workers that take turns hold where absolute figures drift with the machine. Add `--steps N` to run once without the protocol.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

# width, layers, heads, mlp, vocabulary, length, batch: a small model, and GPT-2 small, twice.
SHAPES = {
    "a": (256, 4, 4, 1024, 512, 256, 16),
    "b": (768, 12, 12, 3072, 50304, 512, 4),
    "c": (768, 12, 12, 3072, 50304, 1024, 32),
}


def train_worker(shape, has_kept_heap, documents):
    """Returns (run, tokens per step, FLOPs per token, notes): `run(n)` does n steps of the real model, optimizer and step.

    documents: equal parts of a row whose tokens see only their own; 0: the step is not told of documents.
    """
    from llmos_jax.compute import host

    notes = {"keep_heap": has_kept_heap and host.keep_heap()}
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    from llmos_jax.compute import xla
    from llmos_jax.compute.mesh import MeshConfig
    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.models import gpt
    from llmos_jax.train import optim, state, step

    width, layers, heads, mlp, vocab, length, rows = SHAPES[shape]
    model = gpt.Config(vocab_size=vocab, context=length, width=width, layers=layers, heads=heads, mlp=mlp)
    placement = make_placement(MeshConfig(), jax.devices()[:1])
    handle = state.describe_model(functools.partial(gpt.build, model, placement), placement)
    config = optim.OptimConfig(learning_rate=3e-4, schedule="constant", warmup=0.0)
    optimizer = optim.make_optimizer(config, handle.infos)

    def loss(model, batch, key):
        total, _ = model.loss(batch)
        return total, batch["weights"].sum(), {}

    compiled = jax.jit(step.make_step(loss, handle, optimizer, config, seed=0, steps=1000), donate_argnums=0)
    tokens = np.random.default_rng(0).integers(0, vocab, (8, rows, length + 1)).astype(np.int32)
    shared = {
        "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
        "weights": jnp.ones((rows, length), jnp.float32),
    }
    if documents:
        shared["segments"] = jnp.tile(1 + jnp.arange(length, dtype=jnp.int32) * documents // length, (rows, 1))
    batches = [{"tokens": jnp.array(t[:, :-1]), "targets": jnp.array(t[:, 1:])} | shared for t in tokens]
    trained, done = state.init_state(handle, optimizer, placement, 0), 0
    lowered = compiled.lower(trained, batches[0], jnp.float32(0))
    compiled = xla.compile_lowered(lowered, xla.compiler_options(jax.devices()[0]))
    host.return_free_memory()

    def run(count):
        nonlocal trained, done
        for _ in range(count):
            trained, metrics = compiled(trained, batches[done % len(batches)], jnp.float32(0))
            done += 1
        return float(metrics["train/loss"])

    return run, rows * length, gpt.flops_per_token(model, length), notes


def shape_settings(shape, steps):
    """Returns the command-line flags that train `shape` on the standard library for some steps, without evaluations."""
    width, layers, heads, mlp, vocab, length, rows = SHAPES[shape]
    chosen = {
        "model.width": width, "model.layers": layers, "model.heads": heads, "model.mlp": mlp, "model.context": length,
        "data.tokenizer": f"bpe:{vocab}", "data.length": length, "optim.name": "adamw", "optim.learning_rate": 3e-4,
        "train.batch_size": rows, "train.steps": steps, "train.max_seconds": "none", "train.evaluate_every_steps": "none",
        "task.evaluation_batches": 1, "task.sample_tokens": 1, "checkpoint.every_steps": "none",
    }  # fmt: skip
    return ["--config=experiments/gpt.py", *[f"--config.{name}={value}" for name, value in chosen.items()]]


def run_llmos(flags, workdir, **environment):
    """Runs the command line in a process of its own; returns the summary and the seconds from launch to the first step."""
    command = [sys.executable, "-m", "llmos_jax.main", *flags, f"--workdir={workdir}"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    first = next(e["start/first_step_seconds"] for e in entries if "start/first_step_seconds" in e)
    return json.loads((workdir / "DONE.json").read_text()), first


def measure_start(shape):
    """Prints the seconds from launch to the first step, data prepared: without and with the compile cache."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        flags, cache = shape_settings(shape, 2), {"LLMOS_CACHE": str(folder / "cache")}
        run_llmos(flags, folder / "prepare", **cache)
        shutil.rmtree(folder / "cache" / "compile")
        _, cold = run_llmos(flags, folder / "cold", **cache)
        warm = [run_llmos(flags, folder / f"warm{number}", **cache)[1] for number in range(3)]
    print(json.dumps({"what": "start", "shape": shape, "cold_seconds": cold, "warm_seconds": statistics.median(warm)}))


def measure_overhead(shape, steps):
    """Prints the share of the loop's wall time that is not spent in the device's steps (evaluation and saves apart).

    On CPU dispatch is synchronous, so the time inside the compiled step is the device's.
    """
    with tempfile.TemporaryDirectory() as folder:
        summary, _ = run_llmos(shape_settings(shape, steps), pathlib.Path(folder) / "run")
    seconds = summary["seconds"]
    loop = summary["elapsed_seconds"] - seconds["evaluate"] - seconds["sample"] - seconds["save_block"]
    share = (loop - seconds["step"]) / loop
    print(
        json.dumps({"what": "overhead", "shape": shape, "steps": steps, "step_seconds": loop / steps, "overhead_share": share})
    )


def main():
    """Parses the command line and serves the protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "start", "overhead"))
    parser.add_argument("--shape", choices=SHAPES, default="a")
    parser.add_argument("--name", default="llmos")
    parser.add_argument("--no-keep-heap", action="store_true", help="let glibc return freed memory, as it does by default")
    parser.add_argument("--documents", type=int, default=0, help="documents that a row is packed from")
    parser.add_argument("--steps", type=int, help="run this many steps once and leave")
    args = parser.parse_args()
    if args.what == "start":
        return measure_start(args.shape)
    if args.what == "overhead":
        return measure_overhead(args.shape, args.steps or 60)
    run, tokens_per_step, flops_per_token, notes = train_worker(args.shape, not args.no_keep_heap, args.documents)
    serve(args.name, run, tokens_per_step, flops_per_token, device_peak_bytes, notes, args.steps)


def serve(name, run, tokens_per_step, flops_per_token, device_peak_bytes, notes, steps):
    """Warms up, then answers the protocol's lines; or takes `steps` steps once."""
    run(2)
    print(json.dumps({"ready": name} | notes), flush=True)
    for line in [f"go {steps}"] if steps else sys.stdin:
        words = line.split()
        if not words or words[0] == "quit":
            break
        count = int(words[1])
        start = time.perf_counter()
        loss = run(count)
        seconds = time.perf_counter() - start
        rate = count * tokens_per_step / seconds
        reading = {"name": name, "tok_s": rate, "tflop_s": rate * flops_per_token / 1e12, "ms": 1e3 * seconds / count}
        reading |= {"loss": loss, "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        print(json.dumps(reading | {"device_gb": device_peak_bytes() / 2**30}), flush=True)


def device_peak_bytes():
    """Returns the most memory that was in use on the accelerator; 0 on CPU."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


if __name__ == "__main__":
    main()
