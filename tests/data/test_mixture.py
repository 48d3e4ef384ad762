"""Mixtures: shares, caps and stages against a record-by-record count; the same whatever is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data.mixture import Mixture
from llmos_jax.errors import DataError


def walk(mixture, count, parts=1):
    """Deals examples 0..count in some parts; returns (owners, index)."""
    dealt = [mixture.deal(part) for part in np.array_split(np.arange(count), parts)]
    return tuple(np.concatenate(columns) for columns in zip(*dealt, strict=True))


def check_running(owners, index):
    """Every source is read in order, without a gap."""
    for source in np.unique(owners):
        assert index[owners == source].tolist() == list(range((owners == source).sum()))


def test_shares_are_those_of_the_weights():
    owners, index = walk(Mixture([(0, [3.0, 1.0])], [100, 100], [None, None], seed=1), 4000)
    check_running(owners, index)
    assert (owners == 0).sum() == 3000
    assert abs((owners[:400] == 0).sum() - 300) < 40


def test_a_source_ends_at_its_epochs_and_the_others_take_over():
    mixture = Mixture([(0, [1.0, 1.0, 2.0])], [10, 40, 1000], [2.0, 1.5, None], seed=3)
    owners, index = walk(mixture, 5000)
    check_running(owners, index)
    assert [(owners == source).sum() for source in range(3)] == [20, 60, 4920]
    last = np.flatnonzero(owners == 0)[-1]
    after = owners[last + 1 : np.flatnonzero(owners == 1)[-1]]
    assert 0.5 < (after == 2).mean() < 0.85  # weights 1 to 2 from there


def test_stages_change_the_weights_where_they_begin():
    mixture = Mixture([(0, [1.0, 0.0]), (300, [0.0, 1.0]), (700, [1.0, 1.0])], [50, 50], [None, None], seed=0)
    owners, index = walk(mixture, 2700)
    check_running(owners, index)
    assert not owners[:300].any() and owners[300:700].all()
    assert (owners[700:] == 0).sum() == 1000


def test_past_the_last_record_is_an_error_that_says_where():
    mixture = Mixture([(0, [1.0, 1.0])], [10, 20], [1.0, 0.5], seed=0)
    owners, _ = walk(mixture, 20)
    assert sorted(owners) == [0] * 10 + [1] * 10
    with pytest.raises(DataError, match="example 20, and the sources' max_epochs allow 20"):
        mixture.deal(np.array([3, 20]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mixture_keeps_its_promises(data):
    count = data.draw(st.integers(1, 4))
    weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=count, max_size=count).filter(any)
    starts = data.draw(st.lists(st.integers(1, 2000), max_size=2, unique=True).map(sorted))
    stages = [(start, data.draw(weights)) for start in [0, *starts]]
    counts = data.draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    epochs = data.draw(st.lists(st.sampled_from([None, 0.5, 1.0, 4.0]), min_size=count, max_size=count))
    mixture = Mixture(stages, counts, epochs, seed=5)
    total = 4000 if mixture.end is None else min(4000, mixture.end)
    if not total:
        return
    owners, index = walk(mixture, total)
    again = walk(mixture, total, parts=7)
    assert (owners == again[0]).all() and (index == again[1]).all()
    check_running(owners, index)
    for source in range(count):
        if epochs[source] is not None:
            assert (owners == source).sum() <= int(epochs[source] * counts[source])
    borders = [*(start for start, _ in stages), total]
    for (_, chosen), start, stop in zip(stages, borders, borders[1:], strict=False):
        assert all(chosen[source] > 0 for source in np.unique(owners[start:stop]))
