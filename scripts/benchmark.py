"""Benchmark workers: long-lived processes that run the project's own code when they are told to.

    python scripts/benchmark.py train --shape a

prints `{"ready": NAME}` when warm (compiled, two steps done), then for each line `go N` on standard input runs N
optimizer steps, waits for the device and prints tokens per second, milliseconds per step, the last loss and the peak
resident memory as one JSON line. `quit` or the end of input ends it. Ratios between workers that take turns hold where
absolute figures drift with the machine. Add `--steps N` to run once without the protocol.
"""

import argparse
import functools
import json
import sys
import time

# width, layers, heads, mlp, vocabulary, length, batch: a small model, and GPT-2 small.
SHAPES = {"a": (256, 4, 4, 1024, 512, 256, 16), "b": (768, 12, 12, 3072, 50304, 512, 4)}


def train_worker(shape, has_kept_heap):
    """Returns (run, tokens per step, notes): `run(n)` does n steps of the real model, optimizer and step."""
    from llmos_jax.compute import host

    notes = {"keep_heap": has_kept_heap and host.keep_heap()}
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_cpu_enable_async_dispatch", False)
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
        total, _, _ = model.loss(batch)
        return total, batch["weights"].sum(), {}

    compiled = jax.jit(step.make_step(loss, handle, optimizer, config, seed=0, steps=1000), donate_argnums=0)
    tokens = np.random.default_rng(0).integers(0, vocab, (8, rows, length + 1)).astype(np.int32)
    shared = {
        "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
        "weights": jnp.ones((rows, length), jnp.float32),
    }
    batches = [{"tokens": jnp.array(t[:, :-1]), "targets": jnp.array(t[:, 1:])} | shared for t in tokens]
    trained, done = state.init_state(handle, optimizer, placement, 0), 0

    def run(count):
        nonlocal trained, done
        for _ in range(count):
            trained, metrics = compiled(trained, batches[done % len(batches)], jnp.float32(0))
            done += 1
        return float(metrics["train/loss"])

    return run, rows * length, notes


def main():
    """Parses the command line and serves the protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train",))
    parser.add_argument("--shape", choices=SHAPES, default="a")
    parser.add_argument("--name", default="llmos")
    parser.add_argument("--no-keep-heap", action="store_true", help="let glibc return freed memory, as it does by default")
    parser.add_argument("--steps", type=int, help="run this many steps once and leave")
    args = parser.parse_args()
    from llmos_jax.compute import host

    run, tokens_per_step, notes = train_worker(args.shape, not args.no_keep_heap)
    run(2)
    print(json.dumps({"ready": args.name} | notes), flush=True)
    for line in [f"go {args.steps}"] if args.steps else sys.stdin:
        words = line.split()
        if not words or words[0] == "quit":
            break
        count = int(words[1])
        start = time.perf_counter()
        loss = run(count)
        seconds = time.perf_counter() - start
        reading = {
            "name": args.name,
            "tok_s": count * tokens_per_step / seconds,
            "ms": 1e3 * seconds / count,
            "loss": loss,
            "rss_gb": host.peak_memory_bytes() / 2**30,
        }
        print(json.dumps(reading), flush=True)


if __name__ == "__main__":
    main()
