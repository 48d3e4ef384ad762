"""Measures how a device's memory falls with the context axis, by compiling for TPUs that need not be there.

    pip install libtpu
    python scripts/measure_context.py --length 131072 --context 4 8 16 32 [--form all_gather]

prints one JSON line for each size of the context axis: bytes per device of the training step of a GPT on one row per
data shard, as the TPU compiler plans them.
"""

import argparse
import functools
import json
import os
import time

# Compiling touches no chip: several processes may load the TPU's library.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from llmos_jax.compute import memory
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.models import gpt
from llmos_jax.tasks import language
from llmos_jax.train import optim, state, step

# Chips of a TPU v5p slice -> its shape.
TOPOLOGIES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}


def measure(shards, *, length, form, vocab, width, layers, remat, window):
    """Returns the bytes per device of the compiled training step with the length cut over `shards` devices."""
    chips = topologies.get_topology_desc(
        platform="tpu", topology_name=f"v5p:{TOPOLOGIES[shards]}", chips_per_host_bounds=(2, 2, 1), num_slices=1
    )
    mesh = MeshConfig(data=1, context=shards, parameters="fsdp", context_attention=form)
    placement = make_placement(mesh, chips.devices)
    sizes = dict(vocab_size=vocab, context=length, width=width, layers=layers, heads=width // 128)
    model = gpt.Config(**sizes, remat=remat, window=window)
    handle = state.describe_model(functools.partial(gpt.build, model, placement), placement)
    config = optim.OptimConfig()
    optimizer = optim.make_optimizer(config, handle.infos)
    abstract = state.abstract_state(handle, optimizer, placement)
    where = placement.sharding("batch", "length")
    batch = {
        name: jax.ShapeDtypeStruct((1, length), jnp.float32 if name == "weights" else jnp.int32, sharding=where)
        for name in ("tokens", "targets", "segments", "positions", "weights")
    }
    clock = jax.ShapeDtypeStruct((), jnp.float32, sharding=placement.sharding())
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, abstract), placement.sharding())
    function = step.make_step(language.loss, handle, optimizer, config, seed=0, steps=1000)
    began = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=0, out_shardings=shardings).lower(abstract, batch, clock).compile()
    return {
        "context": shards,
        "length": length,
        "form": form,
        "vocab": vocab,
        "remat": remat,
        **{f"{name}_bytes": size for name, size in memory.compiled_bytes(compiled).items()},
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--context", type=int, nargs="+", default=[4, 8, 16, 32], choices=TOPOLOGIES)
    parser.add_argument("--form", default="ring", choices=("ring", "all_gather"))
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--window", type=int, default=None)
    args = vars(parser.parse_args())
    for shards in args.pop("context"):
        print(json.dumps(measure(shards, **args)), flush=True)


if __name__ == "__main__":
    main()
