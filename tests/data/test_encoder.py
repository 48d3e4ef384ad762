"""Encoding apart: what is known to be fast is done here, all else in a process that ends at its limits."""

import os
import pickle

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from llmos_jax.data import apart
from llmos_jax.data import encoder as lib
from llmos_jax.data import tokenizer as tokenizers_lib
from llmos_jax.errors import DataError

CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def model(pattern=None, normalizer=None):
    """Returns a tokenizer of bytes, which splits by a pattern first."""
    made = Tokenizer.from_str(tokenizers_lib.ByteTokenizer().to_files()["tokenizer.json"])
    if pattern is not None:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def replacing(*pairs):
    return normalizers.Sequence([normalizers.Replace(*pair) for pair in pairs])


def test_what_is_known_to_be_fast_is_done_here():
    known = (model(), model(GPT2), model(CL100K), model(normalizer=normalizers.NFC()), model(normalizer=replacing((" ", "_"))))
    assert not any(lib.Encoder(made, "t").is_apart for made in known)
    unknown = (model("(a|a)*$"), model(normalizer=replacing(("a", "aa"))), model(normalizer=replacing((Regex("a*b"), ""))))
    assert all(lib.Encoder(made, "t").is_apart for made in unknown)


def test_models_and_processors_that_can_take_long_are_known():
    words = {"a": 0, "##a": 1, "[UNK]": 2}
    made = models.WordPiece(words, unk_token="[UNK]", max_input_chars_per_word=100)
    assert not lib.Encoder(Tokenizer(made), "t").is_apart
    made = models.WordPiece(words, unk_token="[UNK]", max_input_chars_per_word=10**9)
    assert lib.Encoder(Tokenizer(made), "t").is_apart
    assert not lib.Encoder(Tokenizer(models.Unigram([("<unk>", 0.0), ("aa", -1.0)], 0)), "t").is_apart
    assert lib.Encoder(Tokenizer(models.Unigram([("<unk>", 0.0), ("a" * 65, -1.0)], 0)), "t").is_apart
    assert lib.Encoder(Tokenizer(models.BPE({"a": 0}, [], continuing_subword_prefix="#" * 9)), "t").is_apart
    assert lib.Encoder(model(normalizer=normalizers.Sequence([normalizers.Lowercase()] * 17)), "t").is_apart
    long = model()
    long.post_processor = processors.TemplateProcessing("<x> " * 2000 + "$A", special_tokens=[("<x>", 1)])
    assert lib.Encoder(long, "t").is_apart


def test_half_a_surrogate_pair_is_named():
    for made in (model(), model("b+c")):
        with pytest.raises(DataError, match="half a surrogate pair"):
            lib.Encoder(made, "t").encode(["a\ud800"])


def test_a_process_that_was_killed_meanwhile_is_started_anew():
    encoder = lib.Encoder(model("b+c"), "t")
    encoder.encode(["a"])
    encoder._process._process.kill()
    encoder._process._process.wait()
    assert encoder.encode(["a"]) == [[97]]


def test_apart_it_gives_the_same_tokens():
    texts = ["", "a b\n", "é \ud7ff\U0001f600", "<|endoftext|> x" * 50]
    here, apart = lib.Encoder(model(GPT2), "t"), lib.Encoder(model(GPT2 + "|zzz"), "t")
    assert apart.is_apart
    for form in ({}, {"add_special_tokens": True}, {"reads_special_tokens": True}):
        assert apart.encode(texts, **form) == here.encode(texts, **form)
        assert apart.encode(texts[-1:], **form) == here.encode(texts[-1:], **form)
    assert pickle.loads(pickle.dumps(apart)).encode(texts) == here.encode(texts)


def test_a_slow_pattern_ends_at_its_limit_and_the_next_text_is_encoded(monkeypatch):
    monkeypatch.setattr(lib, "_SECONDS", 1.0)
    encoder = lib.Encoder(model(r"a*a*(?=\d)(?=\D)"), "some/file")  # grows by the cube of the length; no start takes long
    with pytest.raises(DataError, match="some/file fails on a text .*more than 1 seconds, for 20000 characters"):
        encoder.encode(["a" * 20_000])
    assert encoder.encode(["ab"]) == [list(b"ab")]


def test_replacements_that_double_a_text_end_at_their_limit(monkeypatch):
    monkeypatch.setattr(lib, "_BYTES", 2**29)
    encoder = lib.Encoder(model(normalizer=replacing(*[("a", "aa")] * 40)), "some/file")
    with pytest.raises(DataError, match="some/file fails on a text .*ended with -?[0-9]+, .*out of 0.5 GiB"):
        encoder.encode(["a"])
    assert encoder.encode(["b"]) == [list(b"b")]


def test_a_fork_that_drops_it_leaves_its_parents_process_alone():
    encoder = lib.Encoder(model("b+c"), "t")
    encoder.encode(["a"])
    process = encoder._process._process
    child = os.fork()
    if not child:
        del encoder
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert process.poll() is None and encoder.encode(["a"]) == [[97]] and encoder._process._process is process


def test_its_process_ends_with_it_and_after_an_interrupt(monkeypatch):
    encoder = lib.Encoder(model("b+c"), "t")
    encoder.encode(["a"])
    process = encoder._process._process
    del encoder
    assert process.wait(10) is not None
    encoder = lib.Encoder(model("b+c"), "t")
    encoder.encode(["a"])
    process = encoder._process._process
    with monkeypatch.context() as patch:
        patch.setattr(apart.Process, "_send", lambda self, value: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encoder.encode(["a"])
    assert process.wait(10) is not None
    assert encoder.encode(["a"]) == [[97]]
