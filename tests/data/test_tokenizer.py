"""Tokenizers: exact round trips, streaming, refusals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data import tokenizer as lib
from llmos_jax.errors import ConfigError, DataError

TEXTS = ["def f(x):\n    return x + 1\n", "naïve café ☕ 你好", "import os, sys\n"] * 20
BPE = lib.train_bpe(TEXTS, 300)
UNIGRAM = lib.train_unigram(TEXTS, 300)
BOTH = pytest.mark.parametrize("tokenizer", [lib.ByteTokenizer(), BPE, UNIGRAM], ids=["byte", "bpe", "unigram"])


@BOTH
@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_round_trip(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_byte_lengths[tokens].sum() == len(text.encode())
    assert tokenizer.end_id not in tokens


@BOTH
def test_streaming_never_splits_a_character(tokenizer):
    text = "a☕b你好c\U0001f600"
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = tokenizer.stream_decoder()
    cut.push(tokenizer.encode("☕")[0])
    assert cut.flush() in ("\ufffd", "")


def test_the_end_token_cannot_be_spelled():
    assert BPE.end_id not in BPE.encode(f"a{lib.END_TEXT}b")
    assert BPE.decode(BPE.encode(f"a{lib.END_TEXT}b")) == f"a{lib.END_TEXT}b"


@BOTH
def test_saved_and_loaded(tokenizer, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(tokenizer.to_json()))
    loaded = lib.load_tokenizer(tmp_path / "t.json")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(loaded.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


@BOTH
def test_encode_all_is_encode_of_each(tokenizer, monkeypatch):
    monkeypatch.setattr(lib, "_BATCH_CHARACTERS", 50)
    monkeypatch.setattr(lib, "_PIECE_CHARACTERS", 10)
    texts = ["", *TEXTS, "x" * 100, "a b\nc  d\n\n e\tf\u00a0g it's\n'll " * 20, ""]
    encoded = list(tokenizer.encode_all(iter(texts)))
    assert len(encoded) == len(texts)
    for text, tokens in zip(texts, encoded, strict=True):
        np.testing.assert_array_equal(tokens, tokenizer.encode(text))


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab \n\t\u00a01'.", max_size=60), size=st.integers(1, 8))
def test_pieces_are_encoded_as_the_whole(text, size):
    parts = list(lib.pieces(text, size))
    assert "".join(parts) == text
    np.testing.assert_array_equal(np.concatenate([BPE.encode(part) for part in parts]), BPE.encode(text))


def test_only_plain_byte_level_bpe_is_encoded_in_pieces(tmp_path, monkeypatch):
    """Other tokenizers see over the border of a piece: here a prefix space would come in at each."""
    monkeypatch.setattr(lib, "_PIECE_CHARACTERS", 10)
    tree = BPE.to_json()
    tree["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "t.json").write_text(json.dumps(tree))
    other = lib.load_tokenizer(tmp_path / "t.json")
    np.testing.assert_array_equal(next(other.encode_all([TEXTS[0] * 5])), other.encode(TEXTS[0] * 5))


def test_vocabulary_size_is_what_was_asked_for():
    assert BPE.vocab_size == 300
    assert lib.ByteTokenizer.vocab_size == 257


def test_refusals(tmp_path):
    for content in ["", "{}", "[1]", '{"model": 3}', "\0"]:
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match="bad.json"):
            lib.load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="must be byte, bpe:SIZE"):
        lib.make_tokenizer("sentencepiece", [])
    for size, words in ((100, "is too small"), (10**22, "is too large"), ("\u00b2", "must be byte, bpe:SIZE")):
        with pytest.raises(ConfigError, match=words):
            lib.make_tokenizer(f"bpe:{size}", TEXTS)
