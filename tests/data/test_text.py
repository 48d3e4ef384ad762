"""Packing against a naive reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data.text import Packer, expand

END, BYTES = 9, np.array([1, 2, 3, 1, 1, 1, 1, 1, 1, 0])


def reference(documents, length):
    """(inputs, targets, segments, positions, weights) token by token."""
    stream = [(token, number) for number, doc in enumerate(documents, 1) for token in (END, *doc)]
    stream.append((END, len(documents) + 1))
    records = []
    for start in range(0, len(stream) - 1, length):
        piece = stream[start : start + length + 1]
        rows = []
        for place in range(length):
            if place + 1 < len(piece):
                (token, segment), (target, _) = piece[place], piece[place + 1]
                first = next(i for i, (_, s) in enumerate(piece) if s == segment)
                rows.append((token, target, segment - piece[0][1] + 1, place - first, 1.0))
            else:
                rows.append((None, None, None, None, 0.0))
        records.append(rows)
    return records


def pack(documents, length):
    packer = Packer(length, END, BYTES, np.uint16)
    records = [record for doc in documents for record in packer.add(np.array(doc, np.int64))]
    records += list(packer.finish())
    return {
        "tokens": np.stack([r["tokens"] for r in records]),
        "segments": np.stack([r["segments"] for r in records]),
        "target_bytes": np.array([r["target_bytes"] for r in records]),
    }


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=8), st.integers(2, 7))
def test_against_the_reference(documents, length):
    batch = expand(pack(documents, length))
    expected = reference(documents, length)
    assert batch["tokens"].shape == (len(expected), length)
    for row, rows in enumerate(expected):
        for place, (token, target, segment, position, weight) in enumerate(rows):
            assert batch["weights"][row, place] == weight
            if weight:
                found = [batch[name][row, place] for name in ("tokens", "targets", "segments", "positions")]
                assert found == [token, target, segment, position]
    # Every byte of every document is a target exactly once.
    assert batch["target_bytes"].sum() == sum(BYTES[token] for doc in documents for token in doc)
    assert batch["weights"].sum() == sum(len(doc) + 1 for doc in documents)


def test_padding_is_segment_zero():
    packed = pack([[1, 2]], 8)
    assert packed["segments"].tolist() == [[1, 1, 1, 2, 0, 0, 0, 0, 0]]
    assert expand(packed)["weights"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_dtypes(dtype):
    packer = Packer(4, END, BYTES, dtype)
    (record,) = list(packer.add(np.array([1, 2, 3, 4])))
    assert record["tokens"].dtype == dtype and record["tokens"].tolist() == [END, 1, 2, 3, 4]
