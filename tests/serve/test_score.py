"""Scores and embeddings against the plain forward pass of each row alone; windows, meshes, shapes, wrong input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.sharding import make_placement
from llmos_jax.data.tokenizer import ByteTokenizer
from llmos_jax.errors import ConfigError, DeviceMemoryError
from llmos_jax.models import gpt, llama
from llmos_jax.models.rope import RopeConfig
from llmos_jax.serve.generate import Generator
from llmos_jax.serve.model import LanguageModel
from llmos_jax.serve.score import Scorer, _windows
from llmos_jax.train.state import describe_model

VOCAB, CONTEXT = 257, 80
CLOSE = dict(rtol=1e-5, atol=3e-5)
GPT = gpt.Config(vocab_size=384, context=CONTEXT, width=32, layers=2, heads=4)
LLAMA = llama.Config(
    vocab_size=384, context=CONTEXT, width=32, layers=4, heads=8, kv_heads=4, mlp=48, window=20, global_layers=(1,),
    logits_softcap=5.0, rope=RopeConfig(scaling="dynamic", factor=2.0, original_context=32),
)  # fmt: skip
SPARSE = dataclasses.replace(GPT, experts=4)
PAIRS = [
    ("def f(x):", " return x"),
    ("", "a"),
    ("x" * 90, "yz"),  # a prompt beyond the context
    ("", "0123456789" * 17),  # windows
    ("abc", ""),
]


def make(family=gpt, config=GPT, mesh=None, devices=1):
    placement = make_placement(mesh, jax.devices()[:devices])
    handle = describe_model(functools.partial(family.build, config, placement), placement)

    @jax.jit
    def draw(key):  # initial weights are too small and too regular to show a mistake
        keys = iter(jax.random.split(key, 100))
        return jax.tree.map(lambda x: 3 * x + 0.1 * jax.random.normal(next(keys), x.shape), handle.init(key))

    params = jax.device_put(draw(jax.random.key(0)), handle.shardings)
    return LanguageModel(None, params, Generator(handle, family, config, ByteTokenizer(), placement))


@pytest.fixture(scope="module")
def model():
    return make()


@functools.cache
def plain_program(generator):
    @jax.jit
    def run(params, tokens):
        module = generator.handle.merge(params)
        hidden = module.hidden(tokens, jnp.arange(tokens.shape[1])[None])
        return hidden[0], module.logits(hidden)[0, :, :VOCAB]

    return run


def plain(model, tokens):
    """Returns (hidden states [L, D], log-probabilities [L, V] in float64) of one row, unpadded, logits whole."""
    hidden, logits = (np.asarray(x, np.float64) for x in plain_program(model.generator)(model.params, jnp.array([tokens])))
    largest = logits.max(-1, keepdims=True)
    return hidden, logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))


def naive_score(model, prompt, continuation, stride):
    """Returns the log-probability and the likeliest token for each token of the continuation, by the rule of the docstring."""
    prompt, rest = [256, *prompt.encode()], list(continuation.encode())
    tokens, first = prompt + rest, len(prompt)
    logprobs, best, scored = [], [], first
    while scored < len(tokens):
        end = min(len(tokens), max(scored + stride, CONTEXT + 1))
        start = max(0, end - 1 - CONTEXT)
        _, table = plain(model, tokens[start : end - 1])
        for index in range(scored, end):
            logprobs.append(table[index - 1 - start, tokens[index]])
            best.append(int(table[index - 1 - start].argmax()))
        scored = end
    return logprobs, best


@pytest.mark.parametrize(("family", "config"), [(gpt, GPT), (llama, LLAMA), (gpt, SPARSE)], ids=["gpt", "llama", "experts"])
def test_scores_are_those_of_each_row_alone(family, config):
    model = make(family, config)
    together = model.score(*zip(*PAIRS, strict=True), stride=30)
    for (prompt, continuation), score in zip(PAIRS, together, strict=True):
        logprobs, best = naive_score(model, prompt, continuation, 30)
        assert score.tokens == tuple(continuation.encode())
        np.testing.assert_allclose(score.token_logprobs, logprobs, **CLOSE)
        assert score.loglikelihood == pytest.approx(sum(logprobs), abs=1e-3)
        assert score.is_greedy == (best == list(score.tokens))


def test_a_device_that_runs_out_says_what_takes_its_memory(monkeypatch):
    def run_out(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")

    model = make(gpt, GPT)
    monkeypatch.setitem(model._scorer._programs, "score", run_out)
    with pytest.raises(DeviceMemoryError, match=r"while it read .*5 bytes.*weights \d.* MiB; give shorter texts"):
        model.score(["a"], ["b"])


def test_greedy_continuations_are_found(model):
    (done,) = model.generate(["def f"], max_tokens=9, temperature=0.0)
    assert done.reason == "length"
    start = [256, *b"def f"]
    greedy, other, shorter = model.score(
        ["def f", start, start], [done.tokens, [*done.tokens[:-1], done.tokens[-1] ^ 1], done.tokens[:4]]
    )
    assert greedy.is_greedy and shorter.is_greedy and not other.is_greedy
    assert greedy.token_logprobs[:4] == pytest.approx(shorter.token_logprobs, abs=1e-5)
    assert greedy.token_logprobs[:8] == pytest.approx(other.token_logprobs[:8], abs=1e-5)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=2, model=4), MeshConfig(context=2, data=4), MeshConfig(pipeline=2, data=2, model=2)],
    ids=["data-model", "context", "pipeline"],
)
def test_meshes_give_the_same(mesh, model):
    expected, sharded = model, make(gpt, GPT, mesh, 8)
    pairs = list(zip(*PAIRS, strict=True))
    for one, other in zip(expected.score(*pairs), sharded.score(*pairs), strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, **CLOSE)
        assert one.is_greedy == other.is_greedy
    texts = [prompt + continuation for prompt, continuation in PAIRS[:2]]
    pooling = "last" if mesh.context > 1 else "mean"
    np.testing.assert_allclose(expected.embed(texts, pooling), sharded.embed(texts, pooling), **CLOSE)


@pytest.mark.parametrize("stride", [1, 7, 40, 80])
def test_windows_score_each_token_once_with_what_fits(stride):
    for targets in (1, 79, 80, 81, 200, 333):
        for first in (0, 5, 78, 90, 199):
            scored = []
            for start, stop, from_ in _windows(targets, first, 80, stride):
                assert 0 <= start <= from_ < stop <= targets and stop - start <= 80
                scored += range(from_, stop)
                assert start == 0 or from_ - start >= 80 - stride
            assert scored == list(range(first, targets))


def test_embeddings_are_padding_independent():
    model = make(llama, LLAMA)
    texts = ["a", "def f(x):", "import os\n" * 7, ""]
    for pooling, pool in (("mean", lambda h: h.mean(0)), ("last", lambda h: h[-1])):
        found = model.embed(texts, pooling)
        assert found.shape == (4, 32) and found.dtype == np.float32
        for text, vector in zip(texts, found, strict=True):
            np.testing.assert_allclose(vector, pool(plain(model, [256, *text.encode()])[0]), **CLOSE)
            np.testing.assert_allclose(vector, model.embed([text], pooling)[0], atol=1e-5)
    assert model.embed([]).shape == (0, 32)


def test_the_shapes_are_few(model):
    scorer = Scorer(model.generator.handle, GPT, ByteTokenizer())
    random = np.random.default_rng(0)
    for count in (1, 5, 90):
        rows = [random.integers(0, 256, random.integers(1, 200)).tolist() for _ in range(count)]
        assert len(scorer.score(model.params, [""] * count, rows)) == count
    assert {length for _, _, length in scorer.shapes} <= {32, 64, 80}
    assert {rows for _, rows, _ in scorer.shapes} <= {1, 4, 16, 64, 256}
    assert all(rows * length <= 2**13 for _, rows, length in scorer.shapes)
    assert scorer._programs["score"]._cache_size() == len(scorer.shapes)


class Merging(ByteTokenizer):
    """Bytes, but for "ab", which is one token."""

    def prompt(self, text):
        return np.array([256, *text.encode().replace(b"ab", b"\xff")], np.int32)


def test_a_token_that_spans_prompt_and_continuation_counts_to_the_latter(model):
    scorer = Scorer(model.generator.handle, GPT, Merging())
    merged, plainly = scorer.score(model.params, ["xa", "xa"], ["bc", "c"])
    assert merged.tokens == (0xFF, ord("c")) and plainly.tokens == (ord("c"),)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.score(["a"], ["b", "c"]), "1 prompts and 2 continuations"),
        (lambda model: model.score([[]], ["b"]), "prompt 0 has no tokens"),
        (lambda model: model.score(["a", [300]], ["b", "c"]), "prompt 1 has the token 300; the vocabulary has 257"),
        (lambda model: model.score(["a"], [[1, -1]]), "continuation 0 has the token -1"),
        (lambda model: model.score(["a"], ["b"], stride=0), "stride=0 must be at least 1"),
        (lambda model: model.score(["a"], ["b"], stride=81), "at most the model's context of 80"),
        (lambda model: model.embed(["a"], pooling="max"), "pooling='max' is not one of mean, last"),
        (lambda model: model.embed(["a", "x" * 80]), "text 1 has 81 tokens; the model's context is 80"),
    ],
)
def test_wrong_input_is_named(call, words, model):
    with pytest.raises(ConfigError, match=words):
        call(model)
