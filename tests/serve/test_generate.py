"""Text from the engine against the model run without a cache; streaming, stop texts, the context's end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.data.tokenizer import ByteTokenizer
from llmos_jax.errors import ConfigError
from llmos_jax.models import gpt
from llmos_jax.serve.generate import Generator, _held_back
from llmos_jax.serve.sample import SamplingConfig
from llmos_jax.train.state import describe_model

CONFIG = gpt.Config(vocab_size=384, context=96, width=64, layers=2, heads=4)
PROMPTS = ["def f(x):", "a", "import os\nimport sys\n", "\u00e9\u00e8"]


def make(config=CONFIG, mesh=None):
    placement = make_placement(mesh, None if mesh else jax.devices()[:1])
    handle = describe_model(functools.partial(gpt.build, config, placement), placement)
    params = jax.jit(handle.init, out_shardings=handle.shardings)(jax.random.key(0))
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, params)  # initial weights alone hardly tell tokens apart
    return Generator(handle, gpt, config, ByteTokenizer(), placement), params, handle


@pytest.fixture(scope="module")
def generator():
    return make()


def greedy_without_cache(handle, params, prompt, count, window=None):
    """Runs the whole sequence anew for every token."""
    tokens, tokenizer = [256, *ByteTokenizer().encode(prompt)], ByteTokenizer()
    model = handle.merge(params)

    @jax.jit
    def logits(padded, length):
        hidden = model.hidden(padded, jnp.arange(padded.shape[1])[None])
        return model.logits(hidden)[0, length - 1, : tokenizer.vocab_size]

    chosen = []
    for _ in range(count):
        padded = np.zeros((1, CONFIG.context), np.int32)
        padded[0, : len(tokens)] = tokens
        token = int(jnp.argmax(logits(padded, len(tokens))))
        chosen.append(token)
        tokens.append(token)
        if token == 256:
            break
    return tuple(token for token in chosen if token != 256)


def test_greedy_with_cache_equals_the_model_without(generator):
    generate, params, handle = generator
    sampling = SamplingConfig(max_tokens=24, temperature=0.0)
    together = generate.generate(params, PROMPTS, sampling)
    for prompt, done in zip(PROMPTS, together, strict=True):
        assert done.tokens == greedy_without_cache(handle, params, prompt, 24)
        assert generate.generate(params, [prompt], sampling)[0] == done


def test_sharded_heads_give_the_same_tokens(generator):
    generate, params, _ = generator
    sampling = SamplingConfig(max_tokens=12, temperature=0.0)
    expected = generate.generate(params, PROMPTS[:2], sampling)
    sharded, placed, _ = make(mesh=MeshConfig(data=2, model=4))
    assert sharded.generate(placed, PROMPTS[:2], sampling) == expected


def test_rows_draw_alone_and_seeds_repeat(generator):
    generate, params, _ = generator
    sampling = SamplingConfig(max_tokens=16, temperature=1.0, seed=5)
    first = generate.generate(params, PROMPTS[:3], sampling)
    assert generate.generate(params, PROMPTS[:3], sampling) == first
    assert generate.generate(params, PROMPTS[:1], sampling)[0] == first[0]
    assert generate.generate(params, PROMPTS[:1], SamplingConfig(max_tokens=16, temperature=1.0, seed=6))[0] != first[0]


def test_several_continuations_share_their_prompt(generator):
    generate, params, _ = generator
    sampling = SamplingConfig(max_tokens=12, temperature=1.0, seed=5, n=3)
    prompts, engine = ["x" * 70, "y" * 60], generate.engine(params)
    engine.pool.forget()
    before, pieces = dict(engine.counts), {}
    found = generate.generate(params, prompts, sampling, on_text=lambda r, t: pieces.setdefault(r, []).append(t))
    prefilled, reused = (engine.counts[name] - before.get(name, 0) for name in ("prefilled_tokens", "reused_tokens"))
    # Of 71 and 61 tokens the full pages of 16 are shared, but for a page of the last token.
    assert (reused, prefilled) == (2 * 64 + 2 * 48, 71 + 61 + 2 * 7 + 2 * 13)
    assert [len(choices) for choices in found] == [3, 3] and len({done.tokens for done in found[0]}) == 3
    flat = [done for choices in found for done in choices]
    assert ["".join(pieces.get(row, [])) for row in range(6)] == [done.text for done in flat]
    one = dataclasses.replace(sampling, n=1)
    assert flat == generate.generate(params, [prompt for prompt in prompts for _ in range(3)], one)
    with pytest.raises(ConfigError, match="n=2 with temperature=0"):
        SamplingConfig(n=2, temperature=0.0)


def test_streamed_text_is_the_text(generator):
    generate, params, _ = generator
    pieces = {}
    sampling = SamplingConfig(max_tokens=40, temperature=1.0, stop=("e", "\n\n", *"0123456789"))
    texts = generate.generate(params, PROMPTS, sampling, on_text=lambda r, t: pieces.setdefault(r, []).append(t))
    for row, done in enumerate(texts):
        assert "".join(pieces.get(row, [])) == done.text
        assert "e" not in done.text
        assert done.reason in ("stop", "length", "end")
    assert any(done.reason == "stop" for done in texts)
    streamed = list(generate.stream(params, PROMPTS, sampling))
    assert ["".join(text for row, text in streamed if row == index) for index in range(4)] == [done.text for done in texts]
    assert len(streamed) > 4


def test_context_is_the_end(generator):
    generate, params, _ = generator
    (done,) = generate.generate(params, ["x" * 80], SamplingConfig(max_tokens=200, temperature=1.0))
    assert done.reason in ("context", "end") and len(done.tokens) <= 96 - 80
    endless = SamplingConfig(max_tokens=10**9, temperature=1.0)  # takes the cache of a whole context, not of so many tokens
    assert generate.generate(params, ["x" * 80], endless) == [done]
    with pytest.raises(ConfigError, match="prompt 1 has 97 tokens; the model's context is 96"):
        generate.generate(params, ["a", "x" * 96], SamplingConfig())
    with pytest.raises(ConfigError, match="no prompt"):
        generate.generate(params, [], SamplingConfig())


def test_held_back_is_the_longest_beginning_of_a_stop():
    assert _held_back("abc", ("cde", "bcq")) == 2
    assert _held_back("abc", ("x",)) == 0
    assert _held_back("aaa", ("aaaa",)) == 3
