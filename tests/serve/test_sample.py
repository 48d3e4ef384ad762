"""The sampler against its definitions, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.serve.sample import Sampler, SamplingConfig, sampling_arrays, threshold


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, None), (5, None), (None, 0.3), (None, 0.9), (7, 0.5), (None, 1.0), (50, 0.999)]
)
def test_top_k_and_top_p_by_their_definition(top_k, top_p):
    logits = np.random.default_rng(0).standard_normal((6, 50)).astype(np.float32) * 2
    logits[:, 40:] = -np.inf
    logits[0] = np.round(logits[0])  # many are equal
    found = np.asarray(threshold(jnp.asarray(logits), jnp.full(6, top_k or 0), jnp.full(6, top_p or 1.0)))
    for row in range(6):
        order = np.argsort(-logits[row], kind="stable")
        kept = list(order[:top_k])
        if top_p is not None and top_p < 1:
            among = kept if top_k is None else np.flatnonzero(logits[row] >= logits[row][kept].min())
            kept = order[: len(among)]
            probabilities = np.exp(logits[row][kept]) / np.exp(logits[row][kept]).sum()
            before = np.cumsum(probabilities) - probabilities
            kept = [token for token, share in zip(kept, before, strict=True) if share < top_p]
        lowest = logits[row][kept].min()  # equals of the last one stay, too
        assert set(np.flatnonzero(logits[row] >= found[row])) == set(np.flatnonzero(logits[row] >= lowest))


def in_rows(history_BM):
    """Returns a history as `Sampler` takes it."""
    rows, length = history_BM.shape
    return history_BM, np.arange(rows)[:, None], np.arange(length)[None]


def draw(logits, rows, index=0, history=None, prompt=None, length=None):
    size = logits.shape[0]
    history = np.zeros((size, 4), np.int32) if history is None else history
    prompt, length = (np.zeros(size, np.int32) if x is None else x for x in (prompt, length))

    @jax.jit
    def run(arrays, logits):
        sampler = Sampler(arrays, in_rows(history), prompt, length, logits.shape[1], logits.shape[1])
        return sampler.draw(logits, jnp.full(size, index), sampler.counts)

    return run(sampling_arrays(rows, size), logits)


def test_draws_follow_the_distribution():
    logits = jnp.tile(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), (20_000, 1))
    rows = [(SamplingConfig(temperature=1.0, top_k=3), stream) for stream in range(20_000)]
    shares = np.bincount(np.asarray(draw(logits, rows)[0]), minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.012)


def test_rows_keep_their_own_settings_whoever_is_beside_them():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((5, 64)), jnp.float32)
    rows = [
        (SamplingConfig(temperature=0.0), 0),
        (SamplingConfig(temperature=1.0, seed=4), 1),
        (SamplingConfig(temperature=2.0, min_p=0.9), 2),
        (SamplingConfig(temperature=0.9, top_p=0.5, logprobs=2), 3),
        (SamplingConfig(temperature=0.0, logit_bias={"17": 50.0}), 4),
    ]
    together = np.asarray(draw(logits, rows, index=9)[0])
    alone = [int(draw(logits[i : i + 1], [row], index=9)[0][0]) for i, row in enumerate(rows)]
    assert together.tolist() == alone
    assert together[0] == logits[0].argmax() and together[2] == logits[2].argmax() and together[4] == 17


def test_penalties_count_what_was_seen():
    history = np.array([[1, 2, 2, 3]], np.int32)
    logits = jnp.array([[1.0, 1.0, 1.0, -1.0, 1.0]])
    sampling = SamplingConfig(temperature=0.0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.125)

    def penalised(logits, arrays, prompt, length):
        from llmos_jax.serve.sample import _penalise

        sampler = Sampler(arrays, in_rows(history), np.array([prompt]), np.array([length]), 5, 5)
        return _penalise(logits, sampler.counts, arrays)[0]

    found = jax.jit(penalised, static_argnums=(2, 3))(logits, sampling_arrays([(sampling, 0)], 1), 1, 4)
    np.testing.assert_allclose(found, [1, 0.5, 0.5 - 0.25 - 0.25, -2 - 0.25 - 0.125, 1])
    found = jax.jit(penalised, static_argnums=(2, 3))(logits, sampling_arrays([(sampling, 0)], 1), 4, 2)
    np.testing.assert_allclose(found, [1, 0.5, 0.5, -1, 1])  # all prompt, the last two not there
