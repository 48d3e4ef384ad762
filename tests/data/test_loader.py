"""The loader as a pure function: permutations, mixtures, slices, identity."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data.loader import Loader, Prefetcher, shuffled
from llmos_jax.data.prepare import DataConfig, SourceConfig, prepare
from llmos_jax.errors import ConfigError, DataIdentityMismatch


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_is_a_permutation(count, seed, epoch):
    places = shuffled(np.arange(epoch * count, (epoch + 1) * count), count, seed=seed)
    assert np.array_equal(np.sort(places), np.arange(count))


def test_epochs_differ_and_look_random():
    """A shuffle that was none would leave neighbours together: on sorted data that is seen at once."""
    count = 20_000
    first, second = (shuffled(np.arange(epoch * count, (epoch + 1) * count), count, seed=1) for epoch in (0, 1))
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first, np.arange(count))[0, 1]) < 0.03
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.03
    assert np.mean(np.abs(np.diff(first)) < 10) < 0.005


def test_a_far_step_costs_no_more_than_a_near_one():
    start = time.perf_counter()
    shuffled(np.arange(10**15, 10**15 + 16), 10**9, seed=0)
    assert time.perf_counter() - start < 1.0  # constant work: anything that walks the epoch takes minutes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("".join(f"{name}{number} " for number in range(3000)))
    sources = tuple(SourceConfig(path=str(folder / f"{n}.txt"), weight=w) for n, w in (("a", 3.0), ("b", 1.0)))
    return prepare(DataConfig(sources=sources, tokenizer="byte", length=32, cache_dir=str(folder / "cache")))


def test_rows_are_a_pure_function(prepared):
    loader = Loader(prepared, "train", batch_size=8, seed=3)
    whole = loader.rows(5, 0, 8)
    other = Loader(prepared, "train", batch_size=8, seed=3)
    other.rows(900, 0, 8)
    for start, stop in ((0, 3), (3, 4), (4, 8)):  # any split over processes reads the same rows
        part = other.rows(5, start, stop)
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][start:stop])
    assert not np.array_equal(whole["tokens"], Loader(prepared, "train", batch_size=8, seed=4).rows(5, 0, 8)["tokens"])


def test_mixture_has_its_weights_and_every_record_of_an_epoch(prepared):
    loader = Loader(prepared, "train", batch_size=8, seed=0)
    owners, records = loader.locate(np.arange(4000))
    assert np.mean(owners == 0) == 0.75
    first = records[owners == 0][: loader.counts[0]]
    assert len(set(first.tolist())) == loader.counts[0]
    longest_run = max(len(run) for run in "".join(map(str, owners)).split("1"))
    assert longest_run < 60  # mixed, not one source after the other


def test_tiny_weights_are_kept_and_vanishing_ones_refused(prepared):
    (first, _), (second, _) = prepared.stores
    weights = dataclasses.replace(prepared, stores=((first, 1.0), (second, 1e-3)))
    owners, _ = Loader(weights, "train", batch_size=8, seed=0).locate(np.arange(400_000))
    assert 0.98 < np.mean(owners == 1) / (1e-3 / 1.001) < 1.02
    with pytest.raises(ConfigError, match="weight 1e-09 is 1e-09 of the mixture"):
        Loader(dataclasses.replace(prepared, stores=((first, 1.0), (second, 1e-9))), "train", batch_size=8, seed=0)


def test_fresh_buffers(prepared):
    loader = Loader(prepared, "train", batch_size=4, seed=0)
    first = loader.rows(0, 0, 4)
    kept = first["tokens"].copy()
    loader.rows(1, 0, 4)["tokens"][:] = -1
    np.testing.assert_array_equal(first["tokens"], kept)


def test_evaluation_sees_every_record_once(prepared):
    loader = Loader(prepared, "validation", batch_size=8, seed=0)
    batches = [loader.evaluation_rows(index, 0, 8) for index in range(loader.evaluation_batches(8))]
    assert sum(batch["target_bytes"].sum() for batch in batches) == prepared.validation_bytes
    assert sum((batch["weights"].sum(1) > 0).sum() for batch in batches) == sum(loader.counts)


def test_the_first_evaluation_batches_are_a_sample_of_every_source(prepared):
    """An evaluation that is cut short saw nothing but the first source."""
    tokens = Loader(prepared, "validation", batch_size=16, seed=0).evaluation_rows(0, 0, 16)["tokens"]
    counts = [(tokens == ord(letter)).sum() for letter in "ab"]
    assert 0.25 < counts[1] / sum(counts) < 0.75  # both texts are of one size


def test_another_identity_is_refused(prepared):
    loader = Loader(prepared, "train", batch_size=8, seed=0)
    loader.check_identity(loader.identity)
    for change in ({"seed": 1}, {"batch_size": 16}, {"weights": [1.0, 1.0]}, {"stores": []}):
        with pytest.raises(DataIdentityMismatch, match=next(iter(change))):
            loader.check_identity(loader.identity | change)


def test_prefetcher_keeps_order_raises_and_closes():
    def function(step):
        if step == 5:
            raise KeyError("five")
        return step

    source = Prefetcher(function, 2)
    assert [source.get(), source.get(), source.get()] == [2, 3, 4]
    with pytest.raises(KeyError, match="five"):
        source.get()
    source.close()
    endless = Prefetcher(lambda step: step, 0)
    assert endless.get() == 0
    endless.close()
    assert not endless._thread.is_alive()
