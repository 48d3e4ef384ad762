"""SentencePiece's models give the tokens of SentencePiece itself; special pieces are text; damaged files are named."""

import io
import json
import pathlib

import pytest

from llmos_jax.data import spm
from llmos_jax.data.tokenizer import load_tokenizer, make_tokenizer
from llmos_jax.errors import ConfigError, DataError

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = [line for line in pathlib.Path(__file__).read_text("utf-8").splitlines() if line.strip()]
TEXTS += ["na\u00efve caf\u00e9, \ufb01ne", "\u4f60\u597d", "  two  spaces  ", "tabs\tand \u2581 marks"]


def train(folder, kind="bpe", **settings):
    buffer = io.BytesIO()
    given = dict(model_type=kind, vocab_size=360, byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 3), model_writer=buffer, **given | settings)
    path = folder / "tokenizer.model"
    path.write_bytes(buffer.getvalue())
    return path, sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


LLAMA = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bpe", LLAMA),
        ("bpe", {}),
        ("bpe", LLAMA | dict(user_defined_symbols=["<mask>", "  "], add_dummy_prefix=False)),
        ("bpe", dict(byte_fallback=False, split_digits=True)),
        ("unigram", {}),
        ("unigram", LLAMA),
        ("unigram", dict(byte_fallback=False, user_defined_symbols=["<mask>"])),
    ],
)
def test_tokens_are_those_of_the_library(tmp_path, kind, settings):
    path, library = train(tmp_path, kind, **settings)
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == library.get_piece_size()
    for text in [*TEXTS, "a <mask> b", "\U0001f600"]:
        assert tokenizer.encode(text).tolist() == library.encode(text), text
    assert (tokenizer.begin_id, tokenizer.end_id) == (library.bos_id(), library.eos_id())
    assert tokenizer.prompt("text").tolist() == [library.bos_id(), *library.encode("text")]
    if settings == LLAMA:  # lossless: what is encoded comes back, behind the dummy space
        assert all(tokenizer.decode(tokenizer.encode(text)) == " " + text.replace("\u2581", " ") for text in TEXTS)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_special_pieces_in_a_text_are_text(tmp_path, kind):
    path, library = train(tmp_path, kind, **LLAMA)
    tokenizer = load_tokenizer(path)
    for text in ("<s>", "a</s>b", "<unk> <0x0A>"):
        ids = tokenizer.encode(text).tolist()
        assert not {library.bos_id(), library.eos_id(), library.unk_id()} & set(ids)
        assert tokenizer.decode(ids) == f" {text}"


def test_files_beside_it_count(tmp_path):
    path, library = train(tmp_path)
    size, added = library.get_piece_size(), {"content": "<|im_end|>", "special": True}
    settings = {"add_bos_token": False, "added_tokens_decoder": {str(size): added}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "x"}))
    tokenizer = make_tokenizer(str(path), ())
    assert tokenizer.end_id == size and tokenizer.vocab_size == size + 1 and tokenizer.chat_template == "x"
    assert tokenizer.prompt("a").tolist() == library.encode("a")
    (tmp_path / "copy.json").write_text(json.dumps(tokenizer.to_json()))
    again = load_tokenizer(tmp_path / "copy.json")
    assert again.fingerprint == tokenizer.fingerprint and again.encode("def f").tolist() == library.encode("def f")
    for wrong, words in (
        ({str(size + 1): added}, "is not the one after"),
        ({"x": added}, "no table of tokens"),
        ([1], "no table of tokens"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": wrong}))
        with pytest.raises(DataError, match=words):
            load_tokenizer(path)


def test_what_cannot_be_taken_over_is_refused(tmp_path):
    path, _ = train(tmp_path, user_defined_symbols=["  "])  # two blanks that normalisation removes, unless they are a piece
    with pytest.raises(DataError, match="it makes other tokens .* Save it as a fast tokenizer"):
        load_tokenizer(path)
    path, _ = train(tmp_path, "word", byte_fallback=False)
    with pytest.raises(DataError, match="no BPE or Unigram model"):
        load_tokenizer(path)


def test_damaged_files_are_named(tmp_path, monkeypatch):
    path, _ = train(tmp_path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff" * 50, content[:100] + b"\x00" * 200 + content[300:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="tokenizer.model"):
            load_tokenizer(path)
    with pytest.raises(DataError, match="can't be read"):
        spm.to_files(tmp_path / "none.model")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"pip install 'llmos-jax\[sentencepiece\]'"):
        load_tokenizer(path)
