"""Memory of a device against the number of microbatches or of context shards, on TPUs that need not be here.

    pip install libtpu
    python scripts/measure_memory.py pipeline --schedule=1f1b --microbatches 8 16 32 64
    python scripts/measure_memory.py context --shards 4 8 16 32 --width 512 --vocab 512

print one JSON line for each size: bytes per device of the training step as the TPU's compiler plans them (`llmos plan`), and
of a pipeline the share of its ticks in which a stage idles. `pipeline`: a GPT of 5 billion parameters on v5p 4x4x4
(pipeline 4 x data 4 x model 4), microbatches of 8 rows of 2,048 tokens. `context`: a Llama of 8 layers on one row of
131,072 tokens; the narrower it is, and the smaller its vocabulary, the less of its memory is weights that are gathered.
"""

import argparse
import json
import pathlib

from llmos_jax import api

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
# Shapes of TPU v5p slices by their number of chips.
SLICES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}


def of_pipeline(args):
    """Yields (experiment, topology, what varies, settings) for every number of microbatches."""
    for microbatches in args.microbatches:
        varied = {"schedule": args.schedule, "repeats": args.repeats, "microbatches": microbatches}
        yield (
            "gpt.py:size=6.7b",
            "v5p:4x4x4",
            varied,
            {
                "model.layers": 24,
                "model.remat": args.remat,
                "data.length": 2048,
                "optim.gradient_dtype": "bfloat16",
                "train.batch_size": 8 * microbatches,
                "mesh.pipeline": 4,
                "mesh.data": 4,
                "mesh.model": 4,
                "mesh.pipeline_schedule": args.schedule,
                "mesh.pipeline_repeats": args.repeats,
                "mesh.pipeline_microbatches": microbatches,
            },
        )


def of_context(args):
    """Yields (experiment, topology, what varies, settings) for every number of shards of the context axis."""
    for shards in args.shards:
        varied = {"form": args.form, "shards": shards, "width": args.width, "length": args.length, "vocab": args.vocab}
        yield (
            "llama.py:size=7b",
            f"v5p:{SLICES[shards]}",
            varied,
            {
                "model.layers": 8,
                "model.width": 2048,
                "model.heads": 16,
                "model.kv_heads": 16,
                "model.mlp": 5504,
                "model.remat": args.remat,
                "model.context": args.length,
                "model.vocab_size": args.vocab,
                "data.length": args.length,
                "data.tokenizer": "byte",
                "train.batch_size": 1,
                "mesh.data": 1,
                "mesh.context": shards,
                "mesh.context_attention": args.form,
            },
        )


def main():
    """Parses the command line, compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    pipeline = kinds.add_parser("pipeline")
    pipeline.set_defaults(points=of_pipeline)
    pipeline.add_argument("--schedule", choices=("1f1b", "gpipe", "circular"), default="1f1b")
    pipeline.add_argument("--repeats", type=int, default=1)
    pipeline.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 32, 64])
    context = kinds.add_parser("context")
    context.set_defaults(points=of_context)
    context.add_argument("--shards", type=int, nargs="+", default=[4, 8, 16, 32], choices=SLICES)
    context.add_argument("--form", choices=("ring", "all_gather"), default="ring")
    context.add_argument("--length", type=int, default=131072)
    context.add_argument("--width", type=int, default=2048)
    context.add_argument("--vocab", type=int, default=50304)
    for kind in (pipeline, context):
        kind.add_argument("--remat", default="full")
    args = parser.parse_args()
    for experiment, topology, varied, values in args.points(args):
        settings, _ = api.load_settings(f"{EXPERIMENTS / experiment}", [(name, str(value)) for name, value in values.items()])
        report = api.plan(settings, topology)
        sizes = {f"{name}_gb": round(size / 1e9, 3) for name, size in report.memory.items()}
        figures = {"bubble": round(report.bubble, 4), "compile_seconds": round(report.compile_seconds, 1)}
        print(json.dumps(varied | sizes | figures), flush=True)


if __name__ == "__main__":
    main()
