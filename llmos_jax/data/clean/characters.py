"""Texts as arrays of code points, one after the other, and hashes of any stretch of them.

Hashes are those of strings: polynomial over the 64-bit integers, from sums of a prefix, so that any stretch of text has its
hash in constant time; mixed at the end. Equal hashes are taken for equal text: a pair of different ones collides with
a probability of 2^-60 or so.
"""

import functools

import numpy as np

BATCH_CHARACTERS = 1 << 19
_ROW_BITS = 12
_ROW = 1 << _ROW_BITS
_BASE = 0x9E3779B97F4A7C15
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)


class Batch:
    """Texts one after the other with a newline before, after and between them, and what was found in them so far.

    codes: [N] code points. starts: int64 [n], places where the texts start.
    """

    def __init__(self, texts):
        self.texts, self._found = texts, {}

    @functools.cached_property
    def codes(self):
        joined = "\n".join(["", *self.texts, ""])
        # Tables are looked up by numbers of the machine's own size twice as fast.
        return np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.intp)

    @functools.cached_property
    def starts(self):
        lengths = np.fromiter(map(len, self.texts), np.int64, len(self.texts))
        return np.cumsum(lengths + 1) - lengths

    def once(self, find):
        """Returns find(batch), found at the first call and kept: several views look at the same."""
        if find not in self._found:
            self._found[find] = find(self)
        return self._found[find]

    def hashes(self, starts, stops):
        """Returns the uint64 hashes of the stretches starts .. stops of `codes`."""
        return stretch_hashes(self.once(_sums_of), starts, stops)


def batches(texts):
    """Yields slices of a list of texts of about half a million characters, so that arrays stay in the processor's cache."""
    start = size = 0
    for stop, text in enumerate(texts, 1):
        size += len(text)
        if size >= BATCH_CHARACTERS or stop == len(texts):
            yield slice(start, stop)
            start, size = stop, 0


def characters_that(test):
    """Returns a boolean array by code point: for which characters one of numpy's tests of text holds."""
    found = np.zeros(0x110000, bool)
    # No letter, digit or blank is beyond the third plane's ideographs: a fifth of the work.
    found[:0x33000] = test(np.arange(0x33000, dtype=np.uint32).view("U1"))
    return found


def mixed(values):
    """Returns uint64 values with all bits depending on all bits (murmur3's finaliser), a one-to-one map."""
    values = np.array(values, np.uint64)
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    return values ^ (values >> np.uint64(33))


@functools.cache
def _hash_table():
    """Returns a random-looking uint64 by code point."""
    return mixed(np.arange(1, 0x110001, dtype=np.uint64))


@functools.lru_cache(maxsize=16)
def _powers(base, rows):
    """Returns base ** i for i < _ROW and base ** (_ROW * i) for i < rows, modulo 2 ** 64: the product of two is any power."""
    both = []
    for factor, size in ((base, _ROW), (pow(base, _ROW, 1 << 64), rows)):
        factors = np.full(size, factor, np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors, dtype=np.uint64))
    return both


def _rows(size):
    return 1 << (size >> _ROW_BITS).bit_length()


def prefix_sums(codes):
    """Returns sums [N + 1] from which `stretch_hashes` takes the hash of any stretch of the code points `codes` [N]."""
    low, high = _powers(_BASE, _rows(len(codes)))
    sums = np.empty(len(codes) + 1, np.uint64)
    sums[0], terms = 0, sums[1:]
    # "clip" spares a copy; no code point is beyond the table.
    np.take(_hash_table(), codes, out=terms, mode="clip")
    for row, start in enumerate(range(0, len(codes), _ROW)):
        part = terms[start : start + _ROW]
        part *= low[: len(part)]
        part *= high[row]
    return np.cumsum(sums, out=sums)


def _sums_of(batch):
    return prefix_sums(batch.codes)


def stretch_hashes(sums, starts, stops):
    """Returns the uint64 hashes of the stretches starts .. stops of the text that `prefix_sums` gave `sums` for."""
    low, high = _powers(_BASE_INVERSE, _rows(len(sums)))
    return mixed((sums[stops] - sums[starts]) * low[starts & (_ROW - 1)] * high[starts >> _ROW_BITS])


@functools.cache
def hash_of(text):
    """Returns the hash of a text, a uint64, that `Batch.hashes` gives the same characters wherever they stand."""
    batch = Batch([text])
    return batch.hashes(batch.starts, batch.starts + len(text))[0]
