"""Figures from log-likelihoods: against their definitions on a stand-in model, and bad files by line."""

import json
import math

import pytest

from llmos_jax.errors import ConfigError, DataError
from llmos_jax.evaluate import likelihood
from llmos_jax.serve.score import Score


class Letters:
    """A model whose tokens are characters; each costs a bit, and a capital three."""

    def score(self, prompts, continuations, stride=None):
        costs = [[(3 if c.isupper() else 1) * math.log(2) for c in text] for text in continuations]
        return [
            Score(-math.fsum(c), tuple(-x for x in c), tuple(map(ord, t)), False)
            for c, t in zip(costs, continuations, strict=True)
        ]


def write(path, *records):
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records), "utf-8")
    return path


def test_text(tmp_path):
    text = write(tmp_path / "text", "abcD\u00fc")
    (figures,) = likelihood.evaluate_model(Letters(), [text]).values()
    assert figures == {
        "documents": 1, "tokens": 5, "bytes": 6, "nats": pytest.approx(7 * math.log(2)),
        "perplexity": pytest.approx(2 ** (7 / 5)), "bits_per_byte": pytest.approx(7 / 6),
    }  # fmt: skip


def test_many_documents_are_one_sum():
    figures = likelihood.measure_text(Letters(), ["ab"] * 300 + ["", "C"])
    assert (figures.documents, figures.tokens, figures.bytes) == (302, 601, 601)
    assert figures.nats == pytest.approx(603 * math.log(2))
    with pytest.raises(DataError, match="no token"):
        likelihood.measure_text(Letters(), [""])


def test_choices(tmp_path):
    """By sum the shortest wins, by byte the one with the fewest capitals; a space before a choice is no byte of it."""
    records = [
        {"prompt": "x", "choices": ["B", "abcdef"], "answer": "abcdef"},  # sum: 4 with the space against 7; by byte 4, 7/6
        {"question": "x ", "choices": ["AB", "abc"], "answer": 1, "id": 7},  # 6 against 3
        {"prompt": "", "choices": ["a", "ab", "abc"], "answer": 0},  # 1; by byte all 1: the first
    ]
    path = write(tmp_path / "choices.jsonl", *records, "", "  ")
    (figures,) = likelihood.evaluate_model(Letters(), choices=[path]).values()
    error = math.sqrt(2 / 9 / 2)
    assert figures == {
        "questions": 3, "acc": pytest.approx(2 / 3), "acc_norm": 1.0,
        "acc_stderr": pytest.approx(error), "acc_norm_stderr": 0.0,
    }  # fmt: skip
    table = likelihood.format_figures({str(path): figures})
    assert "acc                 0.6667 +- 0.3333" in table and "questions                3" in table
    one = likelihood.measure_choices(Letters(), likelihood.read_questions(path)[:1])
    assert one.acc == 0 and one.acc_norm == 1 and one.acc_stderr is None


GOOD = {"prompt": "x", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ({"choices": ["a", "b"], "answer": 0}, r"line 2: prompt \(or question\) must be a text, not None"),
        (GOOD | {"choices": ["a"]}, "line 2: choices must be a list of two or more"),
        (GOOD | {"choices": ["a", "a"]}, "line 2: choices"),
        (GOOD | {"choices": ["a", ""]}, "line 2: choices"),
        (GOOD | {"answer": 2}, "answer must be one of the choices or its number from 0 to 1, not 2"),
        (GOOD | {"answer": "c"}, "not 'c'"),
        (GOOD | {"answer": True}, "not True"),
        (GOOD | {"answer": None}, "not None"),
    ],
)
def test_bad_questions_are_named_by_line(tmp_path, record, words):
    with pytest.raises(DataError, match=f"questions.jsonl.*{words}"):
        likelihood.read_files([], [write(tmp_path / "questions.jsonl", GOOD, record)])


def test_bad_files_are_named(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "blank").write_bytes(b"\n")
    for name, words in (("bytes", "can't be read as UTF-8"), ("empty", "is empty"), ("none", "can't be read")):
        with pytest.raises(DataError, match=f"{name} {words}"):
            likelihood.read_files([tmp_path / name], [])
    with pytest.raises(DataError, match="holds no question"):
        likelihood.read_files([], [tmp_path / "blank"])
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        likelihood.read_files([], [])
