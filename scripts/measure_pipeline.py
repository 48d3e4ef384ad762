"""Memory of the pipeline schedules, from programs compiled for TPUs that are not there (needs `pip install libtpu`).

    python scripts/measure_pipeline.py --schedule=1f1b --microbatches=8,16,32,64

compiles the training step of a GPT of 5 billion parameters for TPU v5p 4x4x4 (pipeline 4 x data 4 x model 4), with
microbatches of 8 rows, and prints one JSON line each: temporary and argument bytes per device, the schedule's bubble.
"""

import argparse
import functools
import json
import os
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # before jax is imported: only its compiler is asked


def compile_step(schedule, repeats, microbatches, args):
    """Returns (compiled step, plan) of the 5 B GPT."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from llmos_jax.compute.mesh import MeshConfig
    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.models import gpt
    from llmos_jax.tasks import language
    from llmos_jax.train import optim, state
    from llmos_jax.train.step import make_step

    topology = topologies.get_topology_desc(
        platform="tpu", topology_name="v5p:4x4x4", chips_per_host_bounds=(2, 2, 1), num_slices=1
    )
    mesh = MeshConfig(
        pipeline=4, data=4, model=4, parameters="fsdp", pipeline_schedule=schedule, pipeline_repeats=repeats,
        pipeline_microbatches=microbatches,
    )  # fmt: skip
    placement = make_placement(mesh, topology.devices)
    model = gpt.Config(
        vocab_size=50304, context=args.length, width=4096, layers=24, heads=32, dtype="bfloat16", remat=args.remat
    )
    handle = state.describe_model(functools.partial(gpt.build, model, placement), placement)
    config = optim.OptimConfig(gradient_dtype="bfloat16")
    optimizer = optim.make_optimizer(config, handle.infos)
    step = make_step(language.loss, handle, optimizer, config, seed=0, steps=1000)
    abstract = state.abstract_state(handle, optimizer, placement)
    rows = 8 * microbatches
    sharding = placement.sharding("batch", "length")
    batch = {
        name: jax.ShapeDtypeStruct((rows, args.length), dtype, sharding=sharding)
        for name, dtype in dict.fromkeys(("tokens", "targets", "segments", "positions"), np.int32).items()
    } | {"weights": jax.ShapeDtypeStruct((rows, args.length), np.float32, sharding=sharding)}
    clock = jax.ShapeDtypeStruct((), np.float32, sharding=placement.sharding())
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, abstract), placement.sharding())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return jitted.lower(abstract, batch, clock).compile(), placement.pipeline


def main():
    """Parses the command line, compiles and prints."""
    from llmos_jax.compute.memory import compiled_bytes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", choices=("1f1b", "gpipe", "circular"), default="1f1b")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--microbatches", default="8,16,32,64")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--remat", default="full")
    args = parser.parse_args()
    for microbatches in map(int, args.microbatches.split(",")):
        start = time.perf_counter()
        compiled, plan = compile_step(args.schedule, args.repeats, microbatches, args)
        print(
            json.dumps(
                {
                    "schedule": args.schedule,
                    "repeats": args.repeats,
                    "microbatches": microbatches,
                    "temporary_gib": round(compiled_bytes(compiled)["temporaries"] / 2**30, 3),
                    "argument_gib": round(compiled_bytes(compiled)["arguments"] / 2**30, 3),
                    "bubble": round(plan.bubble, 4),
                    "compile_seconds": round(time.perf_counter() - start, 1),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
