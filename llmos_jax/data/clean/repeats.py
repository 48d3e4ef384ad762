"""Repeated n-grams of words within documents, exact, by sorting hashes of many documents at once."""

import numpy as np

from llmos_jax.data.clean.words import mixed

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


def repetition(words, top_sizes, duplicate_sizes):
    """Returns ({n: int64 [documents]}, the same): characters in the most frequent n-gram, and in n-grams seen before.

    Blanks between words count in the former. Of n-grams equally frequent the earliest is taken; of those that were seen before,
    none is counted that overlaps one that is counted already. `duplicate_sizes` rise.
    """
    count = len(words.first) - 1
    top = {n: np.zeros(count, np.int64) for n in top_sizes}
    duplicate = {n: np.zeros(count, np.int64) for n in duplicate_sizes}
    start = 0
    while start < count:
        limit = words.first[start] + _BATCH_WORDS
        stop = max(start + 1, int(np.searchsorted(words.first, limit, side="right")) - 1)
        first = words.first[start : stop + 1] - words.first[start]
        part = slice(words.first[start], words.first[stop])
        ends = np.concatenate([[0], np.cumsum(words.lengths[part], dtype=np.int64)])
        for n in top_sizes:
            top[n][start:stop] = _top(words.hashes[part], first, ends, n)
        for n, found in _duplicates(words.hashes[part], first, ends, duplicate_sizes):
            duplicate[n][start:stop] = found
        start = stop
    return top, duplicate


def _top(hashes, first, ends, n):
    places, documents = ngram_places(first, n)
    found = np.zeros(len(first) - 1, np.int64)
    if not len(places):
        return found
    order, same = group(ngram_hashes(hashes, n)[places] ^ mixed(documents))
    borders = np.flatnonzero(np.concatenate([[True], ~same]))
    count_at = np.zeros(len(places), np.int64)
    count_at[order[borders]] = np.diff(np.append(borders, len(places)))
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    # The count, then how early it is: one maximum finds the most frequent and of these the first.
    most = np.maximum.reduceat(count_at * len(places) + np.arange(len(places))[::-1], starts)
    place = places[len(places) - 1 - most % len(places)]
    found[documents[starts]] = (ends[place + n] - ends[place] + n - 1) * (most // len(places))
    return found


def _duplicates(hashes, first, ends, sizes):
    """Yields (n, characters [documents]). What does not repeat as an n-gram is not looked at as a longer one."""
    documents = np.repeat(np.arange(len(first) - 1), np.diff(first))
    last, salt = first[1:][documents], mixed(documents)
    places = np.arange(len(documents))
    for n in sizes:
        places = places[places + n <= last[places]]
        keys = ngram_hashes(hashes, n)[places] ^ salt[places]
        order, same = group(keys)
        # Numbers of groups, and whether a group has more than one member.
        number = np.cumsum(np.concatenate([[0], ~same]))[: len(keys)]
        is_common = np.bincount(number)[number] > 1
        chosen = np.sort(order[is_common])
        group_of = np.empty(len(keys), np.int64)
        group_of[order] = number
        places, keys = places[chosen], group_of[chosen]
        counted = _greedy(places, keys, n)
        weights = ends[counted + n] - ends[counted]
        yield n, np.bincount(documents[counted], weights=weights, minlength=len(first) - 1).astype(np.int64)


def _greedy(places, keys, n):
    """Returns the places of n-grams that were seen before, where one that counts hides those that overlap it."""
    seen, counted, at = set(), [], 0
    after = np.searchsorted(places, places + n).tolist()
    places, keys = places.tolist(), keys.tolist()
    while at < len(keys):
        if keys[at] in seen:
            counted.append(places[at])
            at = after[at]
        else:
            seen.add(keys[at])
            at += 1
    return np.array(counted, np.int64)
