"""Tokenizers that come with a model: end tokens, prompts, chats, and bytes of tokens for both kinds of decoder."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from llmos_jax.data import tokenizer as lib
from llmos_jax.errors import ConfigError, DataError

TEMPLATE = "{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|turn|>{% endif %}"


def byte_level(folder, **settings):
    """Writes a tokenizer of bytes with two special tokens, and the files beside it."""
    folder.mkdir(exist_ok=True)
    model = Tokenizer.from_str(lib.ByteTokenizer().to_files()["tokenizer.json"])
    model.add_special_tokens(["<|turn|>", "<|end|>"])
    (folder / "tokenizer.json").write_text(model.to_str())
    settings = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|endoftext|>", "chat_template": TEMPLATE} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256], "temperature": 0.5}))
    return folder


def sentence_piece(folder):
    """Writes a tokenizer as those of Llama 2: marks for spaces, bytes for what is unknown."""
    folder.mkdir(exist_ok=True)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    merges = [("\u2581", "a"), ("a", "b")]
    model = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (folder / "tokenizer.json").write_text(model.to_str())
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


def test_special_tokens_are_those_that_the_files_name(tmp_path):
    tokenizer = lib.load_tokenizer(byte_level(tmp_path / "t") / "tokenizer.json")
    assert (tokenizer.end_id, tokenizer.end_ids, tokenizer.vocab_size) == (258, {256, 258}, 259)
    assert tokenizer.encode("a<|end|>").tolist() == list(b"a<|end|>")  # a spelling is text
    assert tokenizer.prompt("a").tolist() == [256, 97]  # as its post-processor says
    assert tokenizer.decode([104, 258, 105]) == "hi"
    assert tokenizer.token_byte_lengths[[97, 256, 257]].tolist() == [1, 0, 0]
    assert [t.tolist() for t in tokenizer.encode_all(["a", "", "bc"])] == [[97], [], [98, 99]]
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(byte) for byte in "é!".encode()] == ["", "é", "!"]


def test_one_file_holds_all(tmp_path):
    first = lib.load_tokenizer(byte_level(tmp_path / "t") / "tokenizer.json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps(first.to_json()))
    second = lib.load_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert second.fingerprint == first.fingerprint and second.end_ids == first.end_ids
    assert second.chat_template == TEMPLATE
    for name, text in second.to_files().items():
        assert (tmp_path / "t" / name).read_text() == text


def test_sentence_piece(tmp_path):
    tokenizer = lib.load_tokenizer(sentence_piece(tmp_path / "t") / "tokenizer.json")
    assert (tokenizer.end_id, tokenizer.begin_id) == (2, None)
    text = "ab a\u00e9\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == " " + text  # the mark that it puts before a text
    assert tokenizer.prompt("a").tolist() == [1, 262]
    assert tokenizer.token_byte_lengths.sum() == 256 + 1 + 1 + 1 + 2 + 2
    decoder = tokenizer.stream_decoder()
    assert "".join(decoder.push(token) for token in ids) + decoder.flush() == " " + text
    again = tmp_path / "run.json"
    again.write_text(json.dumps(tokenizer.to_json()))
    assert lib.load_tokenizer(again).end_ids == {2}


def test_chats_are_made_by_the_models_template(tmp_path):
    pytest.importorskip("jinja2")
    tokenizer = lib.load_tokenizer(byte_level(tmp_path / "t") / "tokenizer.json")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat_prompt(messages).tolist() == [257, 104, 105, 258, 257]
    with pytest.raises(ConfigError, match=r"a message contains '<\|end\|>'"):
        tokenizer.chat_prompt([{"role": "user", "content": "hi<|end|>"}])
    assert tokenizer.encode("<|end|>").tolist() == list(b"<|end|>")
    bare = lib.load_tokenizer(byte_level(tmp_path / "u", chat_template=None) / "tokenizer.json")
    with pytest.raises(ConfigError, match="has no chat template"):
        bare.chat_prompt(messages)


def test_templates_by_name_and_in_their_own_file(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    folder = byte_level(tmp_path / "t", chat_template=named)
    assert lib.load_tokenizer(folder / "tokenizer.json").chat_template == "y"
    (folder / "chat_template.jinja").write_text("z")
    assert lib.load_tokenizer(folder / "tokenizer.json").chat_template == "z"


def test_our_own_tokenizers_are_read_back_as_what_they_are(tmp_path):
    for tokenizer in (lib.ByteTokenizer(), lib.train_bpe(["some text some text", "more of it"] * 3, 270)):
        folder = tmp_path / tokenizer.name
        folder.mkdir()
        for name, text in tokenizer.to_files().items():
            (folder / name).write_text(text)
        read = lib.load_tokenizer(folder / "tokenizer.json")
        text = "some more \u00e9\n text"
        np.testing.assert_array_equal(read.encode(text), tokenizer.encode(text))
        np.testing.assert_array_equal(read.prompt(text), tokenizer.prompt(text))
        assert read.end_ids == tokenizer.end_ids and read.vocab_size == tokenizer.vocab_size
        np.testing.assert_array_equal(read.token_byte_lengths, tokenizer.token_byte_lengths)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer_config.json", "[]", "holds no JSON object"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("generation_config.json", "[" * 10**5, "is not JSON"),
        ("tokenizer.json", '{"model": {"type": "None"}}', "not one that the tokenizers library reads"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, words):
    folder = byte_level(tmp_path / "t")
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=words):
        lib.load_tokenizer(folder / "tokenizer.json")


def test_a_hostile_pattern_ends_in_an_error(tmp_path):
    folder = byte_level(tmp_path / "t")
    tree = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(tree | {"pre_tokenizer": split}))
    tokenizer = lib.load_tokenizer(folder / "tokenizer.json")
    for encode in (tokenizer.encode, tokenizer.prompt, lambda text: list(tokenizer.encode_all([text]))):
        with pytest.raises(DataError, match="fails on a text .*retry-limit"):
            encode("a" * 40 + "!")


@pytest.mark.parametrize("files", [None, {}, {"tokenizer.json": 3}, [1]])
def test_a_damaged_envelope_is_named(tmp_path, files):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"llmos": "pretrained", "files": files}))
    with pytest.raises(DataError, match="is damaged: it should hold"):
        lib.load_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = byte_level(tmp_path / "t", eos_token=None)
    (folder / "generation_config.json").unlink()
    with pytest.raises(DataError, match="no end token is named"):
        lib.load_tokenizer(folder / "tokenizer.json")
