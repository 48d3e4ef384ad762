"""Measures each step of cleaning on one core: megabytes of text per second of CPU time, what steps share counted once.

    python scripts/benchmark_steps.py corpus/manuals [--megabytes=20] [--steps=gopher_quality,minhash_duplicates]

`words and lines` are what several steps look at; it is found by the first of them and kept for the others, so the other
figures are without it. Of steps that depend on all documents, `emit` is what is done for each shard.
"""

import argparse
import time

import numpy as np

from llmos_jax.data.clean.documents import Documents
from llmos_jax.data.clean.lines import LineHashes, Lines, LineWords
from llmos_jax.data.clean.normalise import Normalise
from llmos_jax.data.clean.steps import Filter, apply_step, parse_steps, step_names
from llmos_jax.data.clean.views import view_of
from llmos_jax.data.clean.words import FoldedHashes, WordHashes, Words
from llmos_jax.data.sources import SourceConfig, list_files, read_documents

_SHARD_BYTES = 8_000_000
_VIEWS = (Words, WordHashes, FoldedHashes, Lines, LineWords, LineHashes)
_NEED_FILES = {"decontaminate", "quality_classifier"}


def main():
    """Prints a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--steps", default=",".join(name for name in step_names() if name not in _NEED_FILES))
    options = parser.parse_args()
    shards = list(read_shards(options.source, options.megabytes * 1_000_000))
    size = sum(int(shard.utf8_bytes.sum()) for shard in shards) / 1e6
    print(f"{size:.1f} MB, {sum(map(len, shards)):,} documents, {len(shards)} shards; MB per second of one core's time")
    view_of(["the first call builds tables"], *_VIEWS)
    print(f"{'words and lines':24s} {size / seconds(lambda: [view_of(shard.texts, *_VIEWS) for shard in shards]):8.1f}")
    for step in parse_steps([{"step": name} for name in options.steps.split(",")]):
        print(f"{step.name:24s} {size / sum(seconds_of(step, shard) for shard in shards):8.1f}")


def read_shards(source, most_bytes):
    """Yields Documents of some megabytes each, in normal form, of the first documents of a source."""
    config, normalise = SourceConfig(path=source), Normalise()
    texts, size, total = [], 0, 0
    for document in read_documents(config, list_files(config)):
        texts.append(normalise.normalised(document.text))
        size += len(document.text.encode("utf-8", "surrogatepass"))
        if size > _SHARD_BYTES or total + size > most_bytes:
            yield Documents.of(texts)
            texts, size, total = [], 0, total + size
        if total > most_bytes:
            return
    if texts:
        yield Documents.of(texts)


def seconds_of(step, shard):
    """Returns the CPU seconds of one step on a shard whose words and lines are known."""
    apply_step(step, [shard.select(np.arange(len(shard)) < 3)])  # loads models and tables
    view_of(shard.texts, *_VIEWS)
    if step.is_global:
        return seconds(lambda: step.emit(shard))
    return seconds(lambda: step.decide(step.annotate(shard)) if isinstance(step, Filter) else step.transform(shard))


def seconds(function):
    """Returns the CPU seconds of this process that a call takes, all threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
