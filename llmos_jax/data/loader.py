"""Batches as a pure function of (seed, step): any process can read any rows of any batch, and resuming is one integer."""

import functools
import hashlib
import queue
import threading

import numpy as np

from llmos_jax.data.text import expand
from llmos_jax.errors import ConfigError, DataError, DataIdentityMismatch

_ROUNDS = 6
# A mixture repeats a shuffled pattern of records, in which every source has its share to within one record. It is as long
# as it takes for the smallest share to be exact to a percent, within these limits.
_SHORTEST_PATTERN, _LONGEST_PATTERN = 1000, 1_000_000


class Loader:
    """Rows of global batches from prepared data.

    Training: every epoch is a true permutation of a store's records, different for every epoch and store. Validation:
    every record once, in one fixed permutation over all stores, so that the first batches are a fair sample of the whole.
    """

    def __init__(self, prepared, split, *, batch_size, seed):
        self.stores = [store for store, _ in prepared.stores]
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.counts = [store.count(split) for store in self.stores]
        for store, count in zip(self.stores, self.counts, strict=True):
            if count == 0:
                raise DataError(f"{store.directory} has no {split} records.")
        self.weights = [weight for _, weight in prepared.stores]
        self._owner, self._rank, self._shares = _pattern(self.weights, seed)

    def rows(self, step, start, stop):
        """Returns rows start..stop of the global batch of `step`: a dict of fresh numpy arrays [stop - start, ...].

        tokens, targets, segments, positions int32 [n, L]; weights float32 [n, L]; target_bytes int32 [n].
        """
        return self.read(*self.locate(np.arange(step * self.batch_size + start, step * self.batch_size + stop)))

    def locate(self, examples):
        """Returns (store number, record number) of examples 0, 1, 2, ... of the endless training stream."""
        period = len(self._owner)
        turn, slot = examples // period, examples % period
        owners = self._owner[slot]
        records = np.zeros(len(examples), np.int64)
        for number, count in enumerate(self.counts):
            mine = owners == number
            index = turn[mine] * self._shares[number] + self._rank[slot[mine]]
            records[mine] = shuffled(index, count, seed=f"{self.seed}/{number}")
        return owners, records

    def evaluation_batches(self, batch_size):
        """Returns how many batches hold every record once."""
        return -(-sum(self.counts) // batch_size)

    def evaluation_rows(self, index, start, stop):
        """Returns rows start..stop of evaluation batch `index`; rows past the end are padding of weight zero."""
        examples = np.arange(index * self.batch_size + start, index * self.batch_size + stop)
        borders = np.cumsum(self.counts)
        is_real = examples < borders[-1]
        clipped = shuffled(np.minimum(examples, borders[-1] - 1), int(borders[-1]), seed="evaluation")
        owners = np.searchsorted(borders, clipped, side="right")
        records = clipped - (borders - self.counts)[owners]
        batch = self.read(owners, records)
        batch["weights"] *= is_real[:, None]
        batch["segments"] *= is_real[:, None]
        batch["target_bytes"] *= is_real
        return batch

    @property
    def identity(self):
        """What decides which batch follows which: saved with every checkpoint."""
        return {
            "stores": [store.identity for store in self.stores],
            "weights": list(self.weights),
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def check_identity(self, saved):
        """Raises DataIdentityMismatch when a position saved with `saved` means other batches here."""
        changed = [
            f"{name}: saved {saved.get(name)!r}, now {value!r}"
            for name, value in self.identity.items()
            if saved.get(name) != value
        ]
        if changed:
            raise DataIdentityMismatch(
                f"the checkpoint's data position does not belong to this data ({'; '.join(changed)}): restore the data and "
                "settings, or start another run directory (train.init_from keeps the weights)."
            )

    def read(self, owners, records):
        """Returns the batch of these (store number, record number), arrays as `rows` returns them."""
        parts = {}
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            read = self.stores[number].records(self.split, records[mine])
            for name, values in read.items():
                if name not in parts:
                    parts[name] = np.zeros((len(owners), *values.shape[1:]), np.int32)
                parts[name][mine] = values
        return expand(parts)


def shuffled(index, count, *, seed):
    """Returns the record that stands at each place `index` of an endless shuffled stream over `count` records.

    Every epoch of `count` places is a true permutation, computed in constant memory: a keyed Feistel network over the
    next even power of two, walked until it lands inside (Black & Rogaway 2002, "cycle walking").
    """
    index = np.asarray(index, np.int64)
    place = np.empty_like(index)
    for epoch in np.unique(index // count):
        mine = index // count == epoch
        place[mine] = _permute(index[mine] % count, count, _round_keys(seed, int(epoch)))
    return place


class Prefetcher:
    """Calls `function(step)` for steps start, start + 1, ... on a thread, at most `depth` ahead of `get`."""

    def __init__(self, function, start, depth=2):
        self._queue, self._stop = queue.Queue(depth), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(function, start), daemon=True, name="prefetch")
        self._thread.start()

    def get(self):
        """Returns the next item; what `function` raised is raised here."""
        item, error = self._queue.get()
        if error is not None:
            raise error
        return item

    def close(self):
        """Stops the thread and waits for it."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _work(self, function, step):
        while not self._stop.is_set():
            try:
                item = (function(step), None)
            except BaseException as error:  # handed to the consumer, whatever it is
                item = (None, error)
            self._queue.put(item)
            if item[1] is not None:
                return
            step += 1


@functools.lru_cache(maxsize=64)
def _round_keys(seed, epoch):
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return np.frombuffer(digest, np.uint32)[:_ROUNDS].astype(np.uint64)


def _permute(index, count, keys):
    half = max(1, -(-max(count - 1, 1).bit_length() // 2))
    mask = np.uint64(2**half - 1)
    values = index.astype(np.uint64)
    pending = np.arange(len(values))
    while len(pending):
        left, right = values[pending] >> np.uint64(half), values[pending] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        values[pending] = (left << np.uint64(half)) | right
        pending = pending[values[pending] >= count]
    return values.astype(np.int64)


def _mix(value, key):
    """Murmur3's 32-bit finaliser of value and key."""
    low = np.uint64(0xFFFFFFFF)
    value = (value * np.uint64(0x9E3779B1) + key) & low
    value = ((value ^ (value >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & low
    value = ((value ^ (value >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & low
    return value ^ (value >> np.uint64(16))


def _pattern(weights, seed):
    """Returns (owner of each slot, its rank among its owner's slots, slots of each source) of the mixture's pattern."""
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
    owners = owners[shuffled(np.arange(len(owners)), len(owners), seed=f"{seed}/mixture")]
    rank = np.zeros(len(owners), np.int64)
    for number in range(len(weights)):
        mine = owners == number
        rank[mine] = np.arange(mine.sum())
    return owners, rank, [int(share) for share in shares]
