"""Repeated n-grams of words within documents, exact, by sorting hashes of many documents at once."""

import numpy as np

from llmos_jax.data.clean.characters import mixed

_FACTOR = np.uint64(0xD1342543DE82EF95)
# Words that are sorted at once: what is sorted stays in the processor's cache.
_BATCH_WORDS = 1 << 16


def group(keys):
    """Returns (order, same): `keys[order]` is sorted by value, then place; `same` [N - 1]: which of it equals the one before.

    The place of a key takes the low bits of what is sorted, so of N keys only the upper 64 - log2(N) bits count.
    """
    mask = np.uint64((1 << len(keys).bit_length()) - 1)
    packed = (keys & ~mask) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    return (packed & mask).astype(np.int64), (packed[1:] ^ packed[:-1]) <= mask


def repeated(keys):
    """Returns a boolean array [N]: which of the uint64 `keys` equal one at a smaller place."""
    order, same = group(keys)
    again = np.zeros(len(keys), bool)
    again[order[1:]] = same
    return again


def ngram_places(first, n):
    """Returns (places, documents): where n-grams start that lie within one document; `first` [documents + 1] are borders."""
    counts = np.maximum(np.diff(first) - n + 1, 0)
    documents = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return first[documents] + within, documents


def ngram_hashes(hashes, n):
    """Returns the hashes of all runs of n of the uint64 `hashes` [N], [max(0, N - n + 1)], borders of documents ignored."""
    size = max(0, len(hashes) - n + 1)
    total = np.zeros(size, np.uint64)
    for place in range(n):
        total *= _FACTOR
        total += hashes[place : place + size]
    return mixed(total)


def repetition(words, hashes, top_sizes, duplicate_sizes):
    """Returns ({n: int64 [documents]}, the same): characters in the most frequent n-gram, and in n-grams seen before.

    words: Words. hashes: uint64 [W], of each.

    Blanks between words count in the former. Of n-grams equally frequent the earliest is taken; of those that were seen before,
    none is counted that overlaps one that is counted already.
    """
    count, sizes = len(words.first) - 1, range(min(*top_sizes, *duplicate_sizes), max(*top_sizes, *duplicate_sizes) + 1)
    top = {n: np.zeros(count, np.int64) for n in top_sizes}
    duplicate = {n: np.zeros(count, np.int64) for n in duplicate_sizes}
    start = 0
    while start < count:
        limit = words.first[start] + _BATCH_WORDS
        stop = max(start + 1, int(np.searchsorted(words.first, limit, side="right")) - 1)
        first = words.first[start : stop + 1] - words.first[start]
        part = slice(words.first[start], words.first[stop])
        ends = np.concatenate([[0], np.cumsum(words.lengths[part], dtype=np.int64)])
        for n, places, documents, groups in _repeating(hashes[part], first, sizes):
            if n in top:
                top[n][start:stop] = _top(places, documents, groups, first, ends, n)
            if n in duplicate:
                counted = _greedy(places, groups, n)
                owners = np.searchsorted(first, counted, side="right") - 1
                weights = ends[counted + n] - ends[counted]
                duplicate[n][start:stop] = np.bincount(owners, weights=weights, minlength=stop - start)
        start = stop
    return top, duplicate


def _repeating(hashes, first, sizes):
    """Yields (n, places, documents, groups) for the range `sizes`: the n-grams that stand more than once in their document.

    places: where they start, rising. documents: of each. groups: small numbers, the same for the same n-gram. What does not
    repeat as an n-gram is not looked at as a longer one.
    """
    documents = np.repeat(np.arange(len(first) - 1), np.diff(first))
    last, places = first[1:][documents], np.arange(len(documents))
    totals = hashes ^ mixed(documents)
    for n in range(1, sizes.stop):
        if n > 1:
            fits = places + n <= last[places]
            places = places[fits]
            totals = totals[fits] * _FACTOR + hashes[places + n - 1]
        if n < sizes.start:
            continue
        order, same = group(totals)
        number = np.cumsum(np.concatenate([[0], ~same]))[: len(places)]
        is_common = np.bincount(number)[number] > 1 if len(number) else np.zeros(0, bool)
        groups = np.empty(len(places), np.int64)
        groups[order] = number
        chosen = np.zeros(len(places), bool)
        chosen[order[is_common]] = True
        places, totals = places[chosen], totals[chosen]
        yield n, places, documents[places], groups[chosen]


def _top(places, documents, groups, first, ends, n):
    found = np.zeros(len(first) - 1, np.int64)
    # Where nothing repeats, the first n-gram is as frequent as any.
    some = np.flatnonzero(np.diff(first) >= n)
    found[some] = ends[first[some] + n] - ends[first[some]] + n - 1
    if len(places):
        counts = np.bincount(groups)[groups]
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        # The count, then how early it is: one maximum finds the most frequent and of these the first.
        most = np.maximum.reduceat(counts * len(places) + np.arange(len(places))[::-1], starts)
        place = places[len(places) - 1 - most % len(places)]
        found[documents[starts]] = (ends[place + n] - ends[place] + n - 1) * (most // len(places))
    return found


def _greedy(places, groups, n):
    """Returns the places of n-grams that were seen before, where one that counts hides those that overlap it."""
    seen, counted, at = bytearray(int(groups.max(initial=0)) + 1), [], 0
    after = np.searchsorted(places, places + n).tolist()
    places, groups = places.tolist(), groups.tolist()
    while at < len(groups):
        if seen[groups[at]]:
            counted.append(places[at])
            at = after[at]
        else:
            seen[groups[at]] = 1
            at += 1
    return np.array(counted, np.int64)
