"""Trains the classifier that the step `quality_classifier` scores documents with: good texts against a pool of any texts.

    python scripts/train_classifier.py quality.json --good=books --pool=corpus [--documents=20000]
    llmos prepare --config=experiments/prepare.py:data=corpus ...  with {"step": "quality_classifier", "path": "quality.json"}

Sources are those of `prepare`. Of each, the documents with the smallest hashes of their keys are taken, so the choice is the
same from run to run; every tenth of these is held out, to say how well the classifier tells good texts from the pool.
"""

import argparse
import hashlib
import heapq

import numpy as np

from llmos_jax.config import parse
from llmos_jax.data.clean.classifier import ClassifierConfig, train
from llmos_jax.data.clean.normalise import Normalise
from llmos_jax.data.sources import SourceConfig, list_files, parse_sources, read_documents


def sample(data, most):
    """Returns up to `most` texts of sources written as in `prepare`, in normal form, by the hash of their keys."""
    chosen, normalise = [], Normalise()
    for tree in parse_sources(data):
        source = parse(SourceConfig, tree)
        for document in read_documents(source, list_files(source)):
            rank = -int.from_bytes(hashlib.sha256(f"{source.path}/{document.key}".encode()).digest()[:8], "big")
            if len(chosen) < most or rank > chosen[0][0]:
                item = (rank, document.key, normalise.normalised(document.text))
                (heapq.heappush if len(chosen) < most else heapq.heapreplace)(chosen, item)
    return [text for _, _, text in sorted(chosen)]


def area_under_curve(good, pool):
    """Returns the probability that a good text scores higher than one of the pool, ties counted half."""
    ranked = np.sort(pool)
    below = np.searchsorted(ranked, good, side="left") + np.searchsorted(ranked, good, side="right")
    return float(np.mean(below) / (2 * len(ranked)))


def main(arguments=None):
    """Trains, prints how well it works on what was held out, and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--good", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--bits", type=int, default=18)
    options = parser.parse_args(arguments)
    good, pool = sample(options.good, options.documents), sample(options.pool, options.documents)
    held_good, held_pool = good[::10], pool[::10]
    kept_good, kept_pool = ([text for place, text in enumerate(texts) if place % 10] for texts in (good, pool))
    model = train(kept_good, kept_pool, parse(ClassifierConfig, {"bits": options.bits}))
    model.save(options.output)
    scores = model.scores(held_good), model.scores(held_pool)
    accuracy = (np.mean(scores[0] > 0.5) + np.mean(scores[1] <= 0.5)) / 2
    print(
        f"{options.output}: trained on {len(kept_good)} good texts and {len(kept_pool)} of the pool; of those held out "
        f"{accuracy:.1%} are told apart (area under the curve {area_under_curve(*scores):.3f})"
    )


if __name__ == "__main__":
    main()
