"""Which record of which source each example of an endless training stream is: weights, stages and caps as pure arithmetic."""

import dataclasses

import numpy as np

from llmos_jax.data.shuffle import shuffled
from llmos_jax.errors import ConfigError, DataError

# A mixture repeats a shuffled pattern of records, in which every source has its share to within one record. It is as long
# as it takes for the smallest share to be exact to a percent, within these limits.
_SHORTEST_PATTERN, _LONGEST_PATTERN = 1000, 1_000_000


class Mixture:
    """Deals examples 0, 1, 2, ... to sources.

    stages: [(first example, weight of each source)], the first from 0; a weight may be 0. counts: records of each source.
    max_epochs: how often each source may be gone through at most, or None; what it no longer takes goes to the others, in
    proportion to their weights. All records have one length, so shares of records are shares of tokens.

    The stream is cut into segments in which the weights stay the same: at the start of a stage, and where a source ends.
    """

    def __init__(self, stages, counts, max_epochs, *, seed):
        limits = [None if epochs is None else int(epochs * count) for epochs, count in zip(max_epochs, counts, strict=True)]
        self.end, self._segments = None, []
        used = np.zeros(len(counts), np.int64)
        for number, (start, weights) in enumerate(stages):
            stop = stages[number + 1][0] if number + 1 < len(stages) else None
            while stop is None or start < stop:
                left = [None if limit is None else limit - int(done) for limit, done in zip(limits, used, strict=True)]
                active = [w if rest is None or rest > 0 else 0.0 for w, rest in zip(weights, left, strict=True)]
                if not any(active):
                    self.end = start
                    break
                segment = _make_segment(active, start, used.copy(), f"{seed}/mixture", len(self._segments))
                self._segments.append(segment)
                ends = [segment.until(n, rest) for n, rest in enumerate(left) if rest is not None and active[n]]
                length = min(ends, default=None)
                if stop is not None:
                    length = stop - start if length is None else min(length, stop - start)
                if length is None:
                    break
                used += segment.dealt(length)
                start += length
            if self.end is not None:
                break
        self._starts = np.array([segment.start for segment in self._segments])

    def deal(self, examples):
        """Returns (source, how many records of it came before) of each example, int64 arrays; DataError past the last one."""
        if self.end is not None and len(examples) and examples.max() >= self.end:
            raise DataError(
                f"training asks for example {int(examples.max()):,}, and the sources' max_epochs allow {self.end:,}: lower "
                "train.steps, or raise max_epochs of a source."
            )
        owners, index = np.zeros(len(examples), np.int64), np.zeros(len(examples), np.int64)
        places = np.searchsorted(self._starts, examples, side="right") - 1
        for number in np.unique(places):
            mine = places == number
            owners[mine], index[mine] = self._segments[number].deal(examples[mine])
        return owners, index


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Examples from `start` on: a pattern that is repeated; `used` records of each source came before."""

    start: int
    used: np.ndarray
    owner: np.ndarray  # source of each slot of the pattern
    rank: np.ndarray  # how many slots before it have the same source
    shares: np.ndarray  # slots of each source

    def deal(self, examples):
        turn, slot = np.divmod(examples - self.start, len(self.owner))
        owners = self.owner[slot]
        return owners, self.used[owners] + turn * self.shares[owners] + self.rank[slot]

    def until(self, source, records):
        """How many examples there are before the one that would take one record too many."""
        turns, rank = divmod(records, int(self.shares[source]))
        return turns * len(self.owner) + int(np.flatnonzero(self.owner == source)[rank])

    def dealt(self, length):
        turns, rest = divmod(length, len(self.owner))
        return turns * self.shares + np.bincount(self.owner[:rest], minlength=len(self.shares))


def _make_segment(weights, start, used, seed, number):
    active = np.flatnonzero(weights)
    owner, rank, shares = _pattern([weights[source] for source in active], f"{seed}/{number}" if number else seed)
    every = np.zeros(len(weights), np.int64)
    every[active] = shares
    return _Segment(start, used, active[owner], rank, every)


def _pattern(weights, seed):
    """Returns (owner of each slot, its rank among its owner's slots, slots of each source) of a pattern."""
    if len(weights) == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64), [1]
    share = np.array(weights) / sum(weights)
    if share.min() < 1 / _LONGEST_PATTERN:
        raise ConfigError(
            f"data.sources: weight {min(weights):g} is {share.min():.1g} of the mixture; the least is 1e-6: raise it or drop "
            "the source."
        )
    period = int(np.clip(np.ceil(100 / share.min()), _SHORTEST_PATTERN, _LONGEST_PATTERN))
    exact = share * period
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: period - shares.sum()]] += 1
    owners = np.repeat(np.arange(len(weights)), shares)
    owners = owners[shuffled(np.arange(len(owners)), len(owners), seed=seed)]
    rank = np.zeros(len(owners), np.int64)
    for number in range(len(weights)):
        mine = owners == number
        rank[mine] = np.arange(mine.sum())
    return owners, rank, [int(share) for share in shares]
