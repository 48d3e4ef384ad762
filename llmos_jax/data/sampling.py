"""Batches for differential privacy: every record is drawn for itself, as a pure function of (key, step)."""

import functools
import hashlib
import hmac

import numpy as np

_KEPT_DRAWS = 4


class PoissonSampler:
    """Rows of batches of which every record is a member with the same probability, independently of all others.

    Accounting assumes exactly this (Poisson sampling). The number of rows varies from step to step; batches have
    `capacity` rows all the same, the rest of them padding of weight zero, of which `is_drawn` is 0.

    Args:
      loader: `data.loader.Loader`. expected: rows that a batch has on average; each source gives its share.
      capacity: rows of a batch. parts: microbatches of `pipeline.cut`; drawn rows fill the first of them.
      key: secret bytes: who knows them knows which records a batch had, and its noise.
    """

    def __init__(self, loader, *, expected, capacity, parts, key):
        self._loader, self._capacity, self._parts, self._key = loader, capacity, parts, key
        self.probabilities = probabilities(loader, expected)
        self._draw = functools.lru_cache(maxsize=_KEPT_DRAWS)(self.draw)

    def draw(self, step):
        """Returns (source number, record number) of the records of batch `step`, int64 [n] each, n at most the capacity."""
        owners, records = [], []
        for number, (count, probability) in enumerate(zip(self._loader.counts, self.probabilities, strict=True)):
            digest = self._digest(f"draw/{step}/{number}")
            generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
            chosen = bernoulli_places(generator, count, probability)
            owners.append(np.full(len(chosen), number, np.int64))
            records.append(chosen)
        return np.concatenate(owners)[: self._capacity], np.concatenate(records)[: self._capacity]

    def rows(self, step, start, stop):
        """Returns rows start..stop of batch `step`: as `Loader.rows`, with is_drawn float32 [n], noise_key uint32 [n, 2].

        noise_key is the same in all rows of a batch, and another for every step.
        """
        owners, records = self._draw(step)
        places = np.arange(start, stop)
        # Row j * parts + m of a batch is row j of microbatch m.
        order = (places % self._parts) * (self._capacity // self._parts) + places // self._parts
        is_drawn = order < len(records)
        if not len(records):
            owners, records = np.zeros(1, np.int64), np.zeros(1, np.int64)
        order = np.where(is_drawn, order, 0)
        batch = self._loader.read(owners[order], records[order])
        batch["weights"] *= is_drawn[:, None]
        batch["segments"] *= is_drawn[:, None]
        batch["target_bytes"] *= is_drawn
        words = np.frombuffer(self._digest(f"noise/{step}")[:8], np.uint32)
        return batch | {"is_drawn": is_drawn.astype(np.float32), "noise_key": np.tile(words, (len(places), 1))}

    def _digest(self, purpose):
        return hmac.new(self._key, purpose.encode(), hashlib.sha256).digest()


def probabilities(loader, expected):
    """Returns the probability of each source's records to be in a batch of `expected` rows on average; above 1: too few."""
    total = sum(loader.weights)
    return [expected * weight / total / count for weight, count in zip(loader.weights, loader.counts, strict=True)]


def bernoulli_places(generator, count, probability):
    """Returns which of `count` places are drawn, each with `probability` for itself, ascending int64.

    The gaps between them are geometric, so the cost is that of the drawn ones (Devroye 1986, chapter X.3).
    """
    if probability >= 1:
        return np.arange(count)
    places, last = [], -1
    while last < count:
        # Enough for the rest nearly always; else another round.
        size = int((count - last) * probability + 6 * np.sqrt((count - last) * probability) + 16)
        gaps = np.floor(np.log1p(-generator.random(size)) / np.log1p(-probability)) + 1
        reached = last + np.cumsum(np.minimum(gaps, count + 1)).astype(np.int64)
        places.append(reached)
        last = int(reached[-1])
    found = np.concatenate(places)
    return found[found < count]
