"""Measures what importing a checkpoint of transformers takes of the host's memory, beside the model itself.

    python scripts/measure_import.py --devices=1          # writes a Llama of 2 GB (float32), imports it in a process of its own
    python scripts/measure_import.py --devices=8 --size_gb=0.5

On CPU the devices' memory is the host's: what counts is the peak of the process over the bytes of the parameters. Prints one
JSON line: file_bytes, largest_tensor_bytes, parameter_bytes, peak_bytes (of the process), beside_bytes (peak without the
parameters), device_bytes (the most that a device holds), shard_bytes (what its shards are).
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile


def write_checkpoint(folder, size_gb):
    """Writes a Llama of about `size_gb` in float32, in files of a quarter of it."""
    import functools

    import jax
    import numpy as np

    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.interop import huggingface, layout, safetensors
    from llmos_jax.models import llama
    from llmos_jax.train.state import describe_model, leaf_name

    width, mlp, vocab = 1024, 4096, 32_000
    layers = max(1, round((size_gb * 1e9 / 4 - 2 * vocab * width) / (4 * width**2 + 3 * width * mlp)))
    config = llama.Config(vocab_size=vocab, context=2048, width=width, layers=layers, heads=8, kv_heads=8, mlp=mlp)
    _, tree = huggingface.check_target(folder, config)
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(llama.build, config, placement), placement)
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(handle.shapes)]
    sizes = {"V": vocab, "D": width, "F": mlp, "H": 8, "G": 8, "K": width // 8, "N": layers, "E": 0}
    shapes = {piece.tensor: piece.shape for piece in layout.pieces(llama.HF_NAMES, names, sizes)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree))
    parts, weight_map = [dict(list(shapes.items())[start::4]) for start in range(4)], {}
    for number, part in enumerate(parts):
        file = f"model-{number}.safetensors"
        writer = safetensors.Writer(folder / file, {name: (shape, np.float32) for name, shape in part.items()})
        for name, shape in part.items():
            writer.write(name, np.full(shape, 0.01, np.float32))
            weight_map[name] = file
        writer.close()
    (folder / safetensors.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def measure(folder, devices):
    """Returns the figures of importing `folder` on this process's devices."""
    import functools

    import jax

    from llmos_jax.compute import host
    from llmos_jax.compute.mesh import MeshConfig
    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.interop import huggingface
    from llmos_jax.models import llama
    from llmos_jax.train.state import describe_model

    checkpoint = huggingface.read_checkpoint(f"hf:{folder}")
    placement = make_placement(MeshConfig(parameters="fsdp", data=1, model=devices), jax.devices()[:devices])
    handle = describe_model(functools.partial(llama.build, checkpoint.config, placement), placement)
    params = jax.block_until_ready(huggingface.load_params(checkpoint, handle.abstract))
    held = {}
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    wanted = jax.tree.leaves(handle.abstract)
    peak, everything = host.peak_memory_bytes(), sum(held.values())
    return {
        "file_bytes": sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        "largest_tensor_bytes": max(tensor.nbytes for tensor in checkpoint.tensors.values()),
        "parameter_bytes": everything,
        "peak_bytes": peak,
        "beside_bytes": peak - everything,
        "device_bytes": max(held.values()),
        "shard_bytes": sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in wanted),
    }


def main():
    """Writes a checkpoint, or (called by itself) measures one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--size_gb", type=float, default=2.0)
    parser.add_argument("--folder", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(measure(arguments.folder, arguments.devices)))
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder) / "model"
        write_checkpoint(folder, arguments.size_gb)
        flags = f"--xla_force_host_platform_device_count={arguments.devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, __file__, f"--devices={arguments.devices}", f"--folder={folder}"]
        sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
