"""Trains the same model on a clean dataset and on the text it was made from, and compares both on held-out clean text.

    llmos prepare --config=experiments/prepare.py:data=corpus --workdir=datasets/clean
    llmos prepare --config=experiments/prepare.py:data=corpus,chain=none --workdir=datasets/raw
    python scripts/compare_data.py datasets/clean datasets/raw runs/compare --config.train.steps=1000

Both runs take the same steps, batches, seed and tokenizer (the clean run's). The held-out documents are the clean dataset's
validation split. A document's split hangs on its key, which is the same in both, so none of them is in the raw training data
either, but for the copies and near copies of them that the raw text has: these favour the raw run.
"""

import argparse
import functools
import pathlib

from absl import logging

from llmos_jax import api, config
from llmos_jax.compute.sharding import make_placement
from llmos_jax.evaluate.evaluator import make_evaluator
from llmos_jax.train.checkpoint import CheckpointConfig, Checkpointer
from llmos_jax.train.directory import CHECKPOINTS
from llmos_jax.train.state import describe_model


def main():
    """Prints the bits per byte of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clean")
    parser.add_argument("raw")
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--experiment", default="experiments/gpt.py")
    options, rest = parser.parse_known_args()
    logging.set_verbosity(logging.INFO)
    overrides = [tuple(flag.removeprefix("--config.").split("=", 1)) for flag in rest]
    runs = {}
    for name, data in (("clean", options.clean), ("raw", options.raw)):
        tokenizer = [("data.tokenizer", str(options.directory / "clean" / "tokenizer.json"))] if name == "raw" else []
        settings, _ = api.load_settings(f"{options.experiment}:data={data}", [*overrides, *tokenizer])
        api.run_training(settings, options.directory / name)
        runs[name] = settings
    tokenizer = str(options.directory / "clean" / "tokenizer.json")
    held_out, _ = api.load_settings(f"{options.experiment}:data={options.clean}", [*overrides, ("data.tokenizer", tokenizer)])
    for name in runs:
        metrics = evaluate(held_out, options.directory / name)
        print(f"{name:>6}: {metrics['validation/bits_per_byte']:.4f} bits per byte of held-out clean text")


def evaluate(settings, directory):
    """Returns the metrics of a run's newest checkpoint on the validation split of `settings`."""
    placement = make_placement(settings.mesh)
    unit = config.unit("llmos_jax.tasks", settings.task.name)
    task = unit.build(
        settings.task, model=settings.model, data=settings.data, batch_size=settings.train.batch_size, seed=settings.seed
    )
    family = config.unit("llmos_jax.models", settings.model.name)
    handle = describe_model(functools.partial(family.build, task.model_config, placement), placement)
    checkpointer = Checkpointer(directory / CHECKPOINTS, CheckpointConfig())
    try:
        params = checkpointer.restore_part(handle.abstract, key="params")
    finally:
        checkpointer.close()
    return make_evaluator(task, handle, placement)(params)


if __name__ == "__main__":
    main()
