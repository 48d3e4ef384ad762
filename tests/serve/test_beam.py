"""Beam search against a plain one that runs every row anew, against all continuations, and against transformers'."""

import dataclasses
import functools
import itertools
import json
import pathlib

import numpy as np
import pytest

from llmos_jax.errors import ConfigError
from llmos_jax.models import llama
from llmos_jax.models.rope import RopeConfig
from llmos_jax.serve import beam
from llmos_jax.serve.engine import Engine, EngineConfig
from tests.interop.reference import load, write_folder
from tests.serve.test_engine import SMALL, logits_program, make

CONFIG = llama.Config(vocab_size=64, context=24, width=32, layers=2, heads=4, kv_heads=2, mlp=48)
EXPECTED = pathlib.Path(__file__).with_name("beams.json")


@functools.cache
def made(vocab_size, end):
    engine, params = make(llama, CONFIG)
    given = dict(vocab_size=vocab_size, end_ids={end}, settings=SMALL)
    return Engine(engine.handle, llama, CONFIG, params, **given), params


def logprobs(params, tokens, vocab_size):
    padded = np.zeros((1, CONFIG.context), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(logits_program(llama, CONFIG)(params, padded, len(tokens) - 1), np.float64)[:vocab_size]
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def text(tokens):
    return " ".join(map(str, tokens))


def naive_search(table, beams, limit, penalty, end):
    """Returns [(score, tokens with the end)], with the whole distribution of every beam; no bound stops it early."""
    running, found = [(0.0, ())], []
    for step in range(1, limit + 1):
        grown = [(total + value, (*tokens, t)) for total, tokens in running for t, value in enumerate(table(tokens))]
        grown.sort(key=lambda pair: -pair[0])
        ended = [pair for pair in grown[:beams] if pair[1][-1] == end or step == limit]
        found += [(total / step**penalty, tokens) for total, tokens in ended]
        running = [pair for pair in grown if pair[1][-1] != end][:beams]
    return sorted(found, key=lambda pair: -pair[0])[:beams]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
def test_beams_are_those_of_the_plain_search(penalty):
    vocab_size, end = 40, 7
    engine, params = made(vocab_size, end)
    prompts = [[9, 8, 30, 11], [25], [12, 13] * 9]
    found = beam.search(engine, prompts, text, beams=3, max_tokens=8, length_penalty=penalty)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        limit = min(8, CONFIG.context + 1 - len(prompt))
        table = functools.cache(lambda tokens, prompt=prompt: logprobs(params, [*prompt, *tokens], vocab_size))
        expected = naive_search(table, 3, limit, penalty, end)
        for hypothesis, (score, tokens) in zip(hypotheses, expected, strict=True):
            is_end = tokens[-1] == end
            assert hypothesis.tokens == (tokens[:-1] if is_end else tokens) and hypothesis.text == text(hypothesis.tokens)
            assert hypothesis.score == pytest.approx(score, rel=1e-4)
            assert hypothesis.loglikelihood == pytest.approx(score * len(tokens) ** penalty, rel=1e-4)
            assert hypothesis.reason == ("end" if is_end else "length" if limit == 8 else "context")
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
    assert engine.pool.counts()["held"] == 0
    reasons = {hypothesis.reason for hypotheses in found for hypothesis in hypotheses}
    assert len(reasons) > 1


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all(penalty):
    """Of three letters and an end, nine beams hold every row of two letters."""
    vocab_size, end = 4, 3
    engine, params = made(vocab_size, end)
    prompt = [2, 0, 1, 1, 2]
    ((best, *_),) = beam.search(engine, [prompt], text, beams=19, max_tokens=3, length_penalty=penalty)
    scores = {}
    for length in (1, 2, 3):
        for tokens in itertools.product(range(vocab_size), repeat=length):
            if end in tokens[:-1] or (length < 3 and tokens[-1] != end):
                continue
            steps = (logprobs(params, [*prompt, *tokens[:i]], vocab_size)[tokens[i]] for i in range(length))
            scores[tokens] = sum(steps) / length**penalty
    expected = max(scores, key=scores.get)
    assert best.tokens == tuple(token for token in expected if token != end)
    assert best.score == pytest.approx(scores[expected], rel=1e-5)


def test_a_step_computes_a_page_a_beam():
    engine, _ = made(40, 7)
    engine.pool.forget()
    before = engine.counts["prefilled_tokens"]
    ((*_, last),) = beam.search(engine, [[9] * 13], text, beams=4, max_tokens=8, length_penalty=0.0)
    steps = engine.counts["prefilled_tokens"] - before - 13
    assert last.tokens and steps <= 7 * 4 * SMALL.page_size


def test_beams_are_those_of_transformers(tmp_path):
    """What `scripts/reference_models.py beams` recorded of generate(num_beams=4, early_stopping="never") on this checkpoint."""
    expected = json.loads(EXPECTED.read_text())
    _, handle, params = load(write_folder(tmp_path / "model", expected["model"]))
    config = handle.merge(params).config
    given = dict(vocab_size=config.vocab_size, end_ids={expected["end"]}, settings=EngineConfig(page_size=4, rows=8))
    engine = Engine(handle, llama, config, params, **given)
    for case in expected["cases"]:
        given = dict(beams=expected["beams"], max_tokens=expected["max_tokens"], length_penalty=case["length_penalty"])
        (found,) = beam.search(engine, [case["prompt"]], text, **given)
        assert [list(h.tokens) for h in found] == case["tokens"]
        assert [h.score for h in found] == pytest.approx(case["scores"], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(beams=0), "beams=0 must be at least 1 and at most 19"),
        (dict(beams=20), "beams=20"),
        (dict(max_tokens=0), "max_tokens=0 must be at least 1"),
    ],
)
def test_wrong_settings_are_named(given, words):
    with pytest.raises(ConfigError, match=words):
        beam.search(made(40, 7)[0], [[9]], text, **dict(beams=2, max_tokens=4, length_penalty=0.0) | given)


def test_angles_that_depend_on_the_length_are_refused():
    """A beam goes to the engine as a longer prompt, whose positions would be turned otherwise than when it was shorter."""
    rope = RopeConfig(scaling="dynamic", original_context=12, factor=2.0)
    engine, _ = make(llama, dataclasses.replace(CONFIG, rope=rope))
    with pytest.raises(ConfigError, match="rows of up to 13 tokens: beyond 12 this model's rotary positions depend on"):
        beam.search(engine, [[9], [9] * 9], text, beams=2, max_tokens=5, length_penalty=0.0)


def test_texts_go_in_and_out():
    from tests.serve.test_generate import make as make_generator

    generator, params, _ = make_generator()
    found = generator.beam_search(params, ["def f", "a"], beams=3, max_tokens=5, length_penalty=0.0)
    assert [len(hypotheses) for hypotheses in found] == [3, 3]
    assert all(h.text == generator.tokenizer.decode(h.tokens) for hypotheses in found for h in hypotheses)
    with pytest.raises(ConfigError, match="prompt 0 has 97 tokens"):
        generator.beam_search(params, ["x" * 96], beams=3, max_tokens=5, length_penalty=0.0)
