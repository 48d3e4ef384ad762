"""Measures the preparation of text: throughput, CPU time and memory of a chain of steps, at one size and at ten times that.

    python scripts/benchmark_prepare.py corpus/manuals --megabytes=50 --chain=bar
    python scripts/benchmark_prepare.py corpus/manuals --megabytes=50 --times=1,10 --chain=default

Chains: `bar` (read, Gopher quality, MinHash 14 x 8, write), `default` (that of experiments/prepare.py), or names of steps with
commas. The text is that of the source, as often as it takes, with words exchanged, so that documents are not all duplicates.
Memory that grows with the corpus shows in the line of the larger one.
Wall time counts everything but the interpreter's start; on a shared machine CPU time is what can be compared.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import tempfile
import threading
import time

from llmos_jax import api
from llmos_jax.config import parse
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.data.sources import SourceConfig, list_files, read_documents

BAR = [{"step": "gopher_quality"}, {"step": "minhash_duplicates"}]


def main():
    """Prints a line of figures for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--times", default="1")
    parser.add_argument("--chain", default="bar")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for times in map(int, options.times.split(",")):
            corpus = pathlib.Path(folder) / f"corpus-{times}"
            size, documents = write_corpus(options.source, corpus, options.megabytes * times * 1_000_000)
            settings = dataclasses.replace(parse(PrepareConfig, chain(options.chain, corpus)), workers=options.workers)
            print(f"{size / 1e6:.0f} MB, {documents:,} documents, {options.chain}: {measure(settings, pathlib.Path(folder))}")
            shutil.rmtree(corpus)


def chain(name, corpus):
    """Returns the settings of a chain by name."""
    if name == "default":
        settings, _ = api.load_prepare_settings(f"experiments/prepare.py:data={corpus}")
        steps = settings.steps
    else:
        steps = BAR if name == "bar" else [{"step": step} for step in name.split(",")]
    return {"sources": [{"path": str(corpus)}], "steps": steps}


def write_corpus(source, folder, size_bytes):
    """Writes jsonl files of together `size_bytes` of text; returns (bytes, documents)."""
    config = SourceConfig(path=source, repair=True)
    texts = [document.text for document in read_documents(config, list_files(config), log=lambda line: None)]
    shuffled, size, count = random.Random(0), 0, 0
    folder.mkdir()
    stream = None
    while size < size_bytes:
        text = texts[count % len(texts)]
        if count >= len(texts):  # another round: a tenth of the words are other ones
            words = text.split(" ")
            for _ in range(len(words) // 10):
                words[shuffled.randrange(len(words))] = f"w{shuffled.randrange(10**6)}"
            text = " ".join(words)
        if stream is None or stream.tell() > 10_000_000:
            stream = open(folder / f"{count:08d}.jsonl", "w")  # noqa: SIM115  closed when it is dropped
        stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        size, count = size + len(text.encode()), count + 1
    stream.close()
    return size, count


def measure(settings, folder):
    """Returns the figures of one preparation, as text."""
    before, start = cpu_seconds(), time.perf_counter()
    with Peak() as peak:
        version = prepare_dataset(settings, folder / "dataset", log=lambda line: None)
    wall = time.perf_counter() - start
    cpu = cpu_seconds() - before
    text = version.manifest["funnel"][0]["utf8_bytes"] / 1e6
    kept = version.manifest["funnel"][-1]["documents"] / version.manifest["funnel"][0]["documents"]
    shutil.rmtree(folder / "dataset")
    return (
        f"{text / wall:.1f} MB/s ({wall:.1f} s), {2 * text / cpu:.1f} MB/s of two whole cores ({cpu:.1f} CPU s), "
        f"all processes together {peak.bytes / 1e9:.2f} GB at most, {kept:.0%} kept"
    )


class Peak:
    """Watches how much memory this process and its children have together while a block runs; pages shared count twice."""

    def __enter__(self):
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.25):
            listed = subprocess.run(["ps", "-eo", "pid=,ppid=,rss="], capture_output=True, text=True).stdout
            rows = [tuple(map(int, line.split())) for line in listed.splitlines()]
            own = {os.getpid()}
            own |= {pid for pid, parent, _ in rows if parent in own}
            self.bytes = max(self.bytes, sum(kilobytes for pid, _, kilobytes in rows if pid in own) * 1024)


def cpu_seconds():
    """Returns the CPU time of this process and of its children that have ended."""
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


if __name__ == "__main__":
    main()
