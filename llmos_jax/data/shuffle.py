"""Permutations of any number of records in constant memory."""

import functools
import hashlib

import numpy as np

_ROUNDS = 6


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
