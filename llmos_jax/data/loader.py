"""Batches as a pure function of (seed, step): any process can read any rows of any batch, and resuming is one integer."""

import queue
import threading

import numpy as np

from llmos_jax.data.mixture import Mixture
from llmos_jax.data.shuffle import shuffled
from llmos_jax.data.text import expand
from llmos_jax.errors import DataError, DataIdentityMismatch


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
        self.max_epochs = list(prepared.max_epochs)
        self.stages = [[step, list(weights)] for step, weights in prepared.stages]
        stages = [(step * batch_size, weights) for step, weights in self.stages]
        self._mixture = Mixture([(0, self.weights), *stages], self.counts, self.max_epochs, seed=seed)

    def rows(self, step, start, stop):
        """Returns rows start..stop of the global batch of `step`: a dict of fresh numpy arrays [stop - start, ...].

        tokens, targets, segments, positions int32 [n, L]; weights float32 [n, L]; target_bytes int32 [n].
        """
        return self.read(*self.locate(np.arange(step * self.batch_size + start, step * self.batch_size + stop)))

    def locate(self, examples):
        """Returns (store number, record number) of examples 0, 1, 2, ... of the endless training stream."""
        owners, index = self._mixture.deal(examples)
        records = np.zeros(len(examples), np.int64)
        for number, count in enumerate(self.counts):
            mine = owners == number
            records[mine] = shuffled(index[mine], count, seed=f"{self.seed}/{number}")
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
        identity = {
            "stores": [store.identity for store in self.stores],
            "weights": list(self.weights),
            "seed": self.seed,
            "batch_size": self.batch_size,
        }
        limits = {"stages": self.stages, "max_epochs": self.max_epochs}
        return identity | {name: values for name, values in limits.items() if any(values)}

    def check_identity(self, saved):
        """Raises DataIdentityMismatch when a position saved with `saved` means other batches here."""
        changed = [
            f"{name}: saved {saved.get(name)!r}, now {value!r}"
            for name, value in (dict.fromkeys(saved) | self.identity).items()
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
