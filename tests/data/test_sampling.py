"""Poisson sampling: its law, its purity, and where drawn rows stand in a batch."""

import types

import numpy as np
import pytest

from llmos_jax.data.sampling import PoissonSampler, bernoulli_places


class Records:
    """Stands for a Loader: record r of source s is a row of s * 1000 + r."""

    def __init__(self, counts=(200,), weights=(1.0,)):
        self.counts, self.weights = list(counts), list(weights)

    def read(self, owners, records):
        tokens = np.repeat((owners * 1000 + records)[:, None], 4, axis=1).astype(np.int32)
        ones = np.ones((len(owners), 4), np.float32)
        return {
            "tokens": tokens,
            "weights": ones,
            "segments": ones.astype(np.int32),
            "target_bytes": np.full(len(owners), 9, np.int32),
        }


def sampler(records=None, *, expected=20, capacity=80, parts=8, key=b"k" * 16):
    return PoissonSampler(records or Records(), expected=expected, capacity=capacity, parts=parts, key=key)


def test_every_record_is_drawn_for_itself_with_one_probability():
    steps, made = 3000, sampler()
    drawn = np.zeros((steps, 200), bool)
    for step in range(steps):
        owners, records = made.draw(step)
        assert len(set(records)) == len(records) and not owners.any()
        drawn[step, records] = True
    deviation = np.sqrt(steps * 0.1 * 0.9)
    assert np.abs(drawn.sum(0) - steps * 0.1).max() < 5 * deviation
    # Independent: the size of a batch is binomial (variance 18), and neighbours meet as often as strangers.
    assert drawn.sum(1).mean() == pytest.approx(20, abs=5 * np.sqrt(18 / steps))
    assert drawn.sum(1).var() == pytest.approx(18, rel=0.15)
    meetings = [(drawn[:, a] & drawn[:, b]).sum() for a, b in zip(range(199), range(1, 200), strict=True)]
    assert np.abs(np.array(meetings) - steps * 0.01).max() < 6 * np.sqrt(steps * 0.01)
    # Independent of the step before.
    again = (drawn[:-1] & drawn[1:]).sum()
    assert again == pytest.approx(200 * (steps - 1) * 0.01, rel=0.1)


def test_a_batch_depends_on_key_and_step_alone():
    one, two = sampler(), sampler()
    for step in (7, 3, 7):
        np.testing.assert_array_equal(one.draw(step), two.draw(step))
    assert not np.array_equal(one.draw(3), one.draw(4))
    assert not np.array_equal(one.draw(3), sampler(key=b"K" * 16).draw(3))
    whole = one.rows(5, 0, 80)
    for start, stop in ((0, 10), (33, 80)):
        for name, values in two.rows(5, start, stop).items():
            np.testing.assert_array_equal(values, whole[name][start:stop])


def test_drawn_rows_fill_the_first_microbatches():
    made = sampler()
    _, records = made.draw(2)
    batch = made.rows(2, 0, 80)
    assert batch["is_drawn"].sum() == len(records) > 10
    # Microbatch m is rows m, m + 8, ... (compute.pipeline.cut).
    in_order = batch["tokens"][:, 0].reshape(10, 8).T.reshape(-1)
    np.testing.assert_array_equal(in_order[: len(records)], records)
    is_drawn = batch["is_drawn"].reshape(10, 8).T.reshape(-1)
    np.testing.assert_array_equal(is_drawn, np.arange(80) < len(records))
    for name in ("weights", "segments", "target_bytes"):
        values = batch[name].reshape(80, -1)
        assert not values[batch["is_drawn"] == 0].any() and values[batch["is_drawn"] == 1].all()


def test_noise_keys_differ_by_step_only():
    made = sampler()
    keys = [made.rows(step, 0, 4)["noise_key"] for step in range(50)]
    assert all((key == key[0]).all() and key.dtype == np.uint32 for key in keys)
    assert len({tuple(key[0]) for key in keys}) == 50


def test_an_empty_draw_is_a_batch_of_padding():
    made = sampler(Records(counts=(5,)), expected=1e-9)
    batch = made.rows(0, 0, 80)
    assert not batch["is_drawn"].any() and not batch["weights"].any() and len(batch["tokens"]) == 80


def test_sources_have_their_share():
    made = sampler(Records(counts=(100, 1000), weights=(1.0, 3.0)))
    assert made.probabilities == [0.05, 0.015]
    owners = np.concatenate([made.draw(step)[0] for step in range(2000)])
    assert np.bincount(owners) / 2000 == pytest.approx([5, 15], rel=0.05)


@pytest.mark.parametrize("probability", [0.001, 0.3, 0.999, 1.0])
def test_places_are_ascending_and_their_number_is_right(probability):
    generator = np.random.Generator(np.random.Philox(key=1))
    found = [bernoulli_places(generator, 1000, probability) for _ in range(300)]
    assert all((np.diff(f) > 0).all() and (not len(f) or (f[0] >= 0 and f[-1] < 1000)) for f in found)
    mean, deviation = 1000 * probability, np.sqrt(1000 * probability * (1 - probability) / 300)
    assert np.mean([len(f) for f in found]) == pytest.approx(mean, abs=5 * deviation + 1e-9)


def test_it_reads_like_the_loader(tmp_path):
    """The same arrays as `Loader.rows`, and two more."""
    from llmos_jax.data.loader import Loader
    from llmos_jax.data.prepare import DataConfig, prepare
    from llmos_jax.data.sources import SourceConfig

    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * (1 + number % 5))
    config = DataConfig(
        sources=(SourceConfig(path=str(tmp_path)),),
        tokenizer="byte",
        length=32,
        packing="document",
        cache_dir=str(tmp_path / "cache"),
    )
    loader = Loader(prepare(config, log=lambda line: None), "train", batch_size=4, seed=0)
    made = sampler(
        types.SimpleNamespace(counts=loader.counts, weights=loader.weights, read=loader.read), expected=6, capacity=16, parts=4
    )
    plain, drawn = loader.rows(0, 0, 4), made.rows(0, 0, 16)
    assert set(drawn) == set(plain) | {"is_drawn", "noise_key"}
    assert all(drawn[name].dtype == plain[name].dtype and drawn[name].shape[1:] == plain[name].shape[1:] for name in plain)
