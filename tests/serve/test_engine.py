"""The engine against a plain reference that runs every request alone, without cache, pages, drafts or neighbours."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.errors import ConfigError
from llmos_jax.models import gpt, llama
from llmos_jax.serve import cache
from llmos_jax.serve.engine import Engine, EngineConfig
from llmos_jax.serve.sample import SamplingConfig
from llmos_jax.train.state import describe_model

VOCAB, END = 60, 7
LLAMA = llama.Config(vocab_size=64, context=96, width=32, layers=3, heads=8, kv_heads=8, mlp=48, window=20, global_layers=(1,))
GPT = gpt.Config(vocab_size=64, context=96, width=32, layers=2, heads=4)
SMALL = EngineConfig(rows=4, page_size=4, cache_bytes=1, prefill_tokens=16, decode_steps=3, draft_tokens=3)


def make(family=llama, config=LLAMA, mesh=None, settings=SMALL):
    placement = make_placement(mesh, None if mesh else jax.devices()[:1])
    handle = describe_model(functools.partial(family.build, config, placement), placement)
    params = jax.jit(handle.init)(jax.random.key(0))
    # Initial weights are too small and too regular to show a mistake: scale matrices, jitter vectors.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: 6 * x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    params = jax.device_put(params, handle.shardings)
    return Engine(handle, family, config, params, vocab_size=VOCAB, end_ids={END}, settings=settings), params


@functools.cache
def logits_program(family, config):
    placement = make_placement(None, jax.devices()[:1])
    handle = describe_model(functools.partial(family.build, config, placement), placement)

    @jax.jit
    def run(params, tokens_BL, last):
        model = handle.merge(params)
        return model.logits(model.hidden(tokens_BL, jnp.arange(tokens_BL.shape[1])[None]))[0, last, :VOCAB]

    return run


def naive_choice(logits, sampling, stream, prompt, drawn):
    """Draws a token as the settings' definitions say, in numpy but for the random numbers."""
    logits = np.array(logits, np.float64)
    for token in set(prompt + drawn):
        logits[token] *= 1 / sampling.repetition_penalty if logits[token] > 0 else sampling.repetition_penalty
    for token in drawn:
        logits[token] -= sampling.frequency_penalty
    for token in set(drawn):
        logits[token] -= sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        logits[int(token)] += bias
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits /= sampling.temperature
    order = np.argsort(-logits)
    kept = list(order[: sampling.top_k])
    shares = np.exp(logits[kept] - logits.max()) / np.exp(logits[kept] - logits.max()).sum()
    kept = [t for t, before in zip(kept, np.cumsum(shares) - shares, strict=True) if before < (sampling.top_p or 2.0)]
    kept = [t for t in kept if np.exp(logits[t] - logits.max()) >= (sampling.min_p or 0)]
    hidden = np.full(logits.shape, -np.inf)
    hidden[kept] = logits[kept]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), stream), len(drawn))
    gumbel = jax.random.gumbel(key, (64,))[:VOCAB]
    return int(np.argmax(hidden + np.asarray(gumbel, np.float64)))


def reference(params, prompt, sampling, stream=0, family=llama, config=LLAMA):
    """Returns (tokens, reason) of a request that is alone in the world."""
    run, drawn, padded = logits_program(family, config), [], np.zeros((1, config.context), np.int32)
    while True:
        known = prompt + drawn
        padded[0, : len(known)] = known
        drawn.append(naive_choice(run(params, padded.copy(), len(known) - 1), sampling, stream, prompt, drawn))
        if drawn[-1] == END:
            return tuple(drawn[:-1]), "end"
        if len(drawn) == sampling.max_tokens:
            return tuple(drawn), "length"
        if len(prompt) + len(drawn) > config.context:
            return tuple(drawn), "context"


GREEDY = SamplingConfig(max_tokens=20, temperature=0.0)
SAMPLINGS = [
    GREEDY,
    SamplingConfig(max_tokens=12, temperature=1.0, seed=3),
    SamplingConfig(max_tokens=30, temperature=0.7, top_k=9, seed=2**32 - 1),
    SamplingConfig(max_tokens=15, temperature=1.3, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
    SamplingConfig(
        max_tokens=25, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.7, logit_bias={"5": 2.5, "9": -9.0}
    ),
    SamplingConfig(max_tokens=1, temperature=0.0),
]


def prompts(count, seed=0):
    """Prompts of all lengths, some with a beginning in common, some that repeat themselves."""
    random = np.random.default_rng(seed)
    common = random.integers(8, VOCAB, 30).tolist()
    found = []
    for index in range(count):
        own = random.integers(8, VOCAB, random.integers(1, 30)).tolist()
        found.append([own, common[: random.integers(4, 30)] + own, (own[:4] * 12)[:40]][index % 3])
    return found


@pytest.fixture(scope="module")
def made():
    return make()


def assert_empty(engine):
    counts = engine.pool.counts()
    assert counts["held"] == 0 and sum(counts.values()) == engine.pool.pages and not len(engine.scheduler)


def test_every_request_is_as_if_it_were_alone(made):
    engine, params = made
    asked = [(prompt, SAMPLINGS[index % len(SAMPLINGS)]) for index, prompt in enumerate(prompts(14))]
    found = engine.generate(*zip(*asked, strict=True))
    for index, (prompt, sampling) in enumerate(asked):
        assert found[index][:2] == reference(params, prompt, sampling, index), (index, sampling)
    assert_empty(engine)
    # All of it happened: shared prefixes, drafts that were right and wrong, pages that ran out.
    counts = engine.counts
    assert counts["reused_tokens"] and counts["preemptions"] and 0 < counts["accepted_tokens"] < counts["drafted_tokens"]
