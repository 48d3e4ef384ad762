"""Tokenizers: plain bytes, or byte-level BPE or Unigram trained on the corpus (the `tokenizers` library)."""

import itertools
import json
import operator
import pathlib
import re

import numpy as np

from llmos_jax.data import spm
from llmos_jax.data.decoding import BYTES, StreamDecoder, decode, digest, token_bytes
from llmos_jax.data.encoder import Encoder
from llmos_jax.data.pretrained import ENVELOPE, SETTINGS_FILE, PretrainedTokenizer, files_beside, read_model
from llmos_jax.errors import ConfigError, DataError

# Settings that begin so name a tokenizer that is trained, and its size.
TRAINED = ("bpe:", "unigram:")
END_TEXT = "<|endoftext|>"
# What the library is given at a time: its encodings take some 150 bytes a character.
_BATCH_CHARACTERS = 4_000_000
_PIECE_CHARACTERS = 200_000
_MOST_TOKENS = 2**24
_BORDER = re.compile(r"\S\n(?=\S)|\S(?= \S)")


class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255, end of text as 256."""

    name = "byte"
    vocab_size = 257
    end_id = 256
    end_ids = frozenset([256])

    @property
    def fingerprint(self):
        """16 hex digits that identify what the tokenizer does."""
        return digest(self.to_json())

    @property
    def token_byte_lengths(self):
        """Bytes of text that each token stands for, int32 [V]; the end token stands for none."""
        return np.array([1] * 256 + [0], np.int32)

    def encode(self, text):
        """Returns the tokens of `text`, int32; the end token never appears."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def prompt(self, text):
        """Returns the tokens that a model is given to continue `text`: documents begin with the end token in training."""
        return _behind_end(self, text)

    def encode_all(self, texts):
        """Yields `encode` of every text."""
        return map(self.encode, texts)

    def token_bytes(self, token):
        """Returns the bytes of text that one token stands for."""
        return bytes([token]) if token < 256 else b""

    def decode(self, tokens):
        """Returns the text of `tokens`; bytes that are not UTF-8 become U+FFFD, end tokens nothing."""
        return decode(self, tokens)

    def stream_decoder(self):
        """Returns a new StreamDecoder."""
        return StreamDecoder(self)

    def to_json(self):
        """Returns what `load_tokenizer` reads."""
        return {"llmos": "byte"}

    def to_files(self):
        """Returns {name: text} of the files that transformers reads."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        model = Tokenizer(models.BPE({character: byte for character, byte in BYTES.items()}, []))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = decoders.ByteLevel()
        model.add_special_tokens([END_TEXT])
        return _files(model)


class SubwordTokenizer:
    """Byte-level BPE (Radford et al. 2019) or Unigram (Kudo 2018): any text round-trips exactly, whatever it contains.

    `model`: a `tokenizers.Tokenizer` whose vocabulary holds the end token as a special one.
    """

    def __init__(self, model, path="this run"):
        self._model, self._encoder = model, Encoder(model, path)
        self.name = type(model.model).__name__.lower()
        self.vocab_size = model.get_vocab_size()
        self.end_id = model.token_to_id(END_TEXT)
        if self.end_id is None:
            raise DataError(f"the tokenizer has no {END_TEXT!r} token, which separates documents.")
        self.end_ids = frozenset([self.end_id])
        self._bytes = [token_bytes(model.id_to_token(token) or "") for token in range(self.vocab_size)]
        self._bytes[self.end_id] = b""
        self._can_be_cut = _is_cut_at_spaces(self.to_json())

    @property
    def fingerprint(self):
        """16 hex digits that identify what the tokenizer does."""
        return digest(self.to_json())

    @property
    def token_byte_lengths(self):
        """Bytes of text that each token stands for, int32 [V]; the end token stands for none."""
        return np.array([len(part) for part in self._bytes], np.int32)

    def encode(self, text):
        """Returns the tokens of `text`, int32; the end token never appears."""
        (ids,) = self._encoder.encode([text])
        return np.array(ids, np.int32)

    def prompt(self, text):
        """Returns the tokens that a model is given to continue `text`: documents begin with the end token in training."""
        return _behind_end(self, text)

    def encode_all(self, texts):
        """Yields `encode` of every text, on all cores; a long text goes in pieces, which bounds the library's memory."""
        parts = ((number, part) for number, text in enumerate(texts) for part in self._pieces(text))
        for _, group in itertools.groupby(self._encode_numbered(parts), key=operator.itemgetter(0)):
            yield np.concatenate([tokens for _, tokens in group])

    def _encode_numbered(self, parts):
        for batch in batched_by_length(parts, _BATCH_CHARACTERS, length=lambda part: len(part[1])):
            encoded = self._encoder.encode([text for _, text in batch])
            for (number, _), ids in zip(batch, encoded, strict=True):
                yield number, np.array(ids, np.int32)

    def _pieces(self, text):
        return pieces(text, _PIECE_CHARACTERS) if self._can_be_cut else (text,)

    def token_bytes(self, token):
        """Returns the bytes of text that one token stands for."""
        return self._bytes[token]

    def decode(self, tokens):
        """Returns the text of `tokens`; bytes that are not UTF-8 become U+FFFD, end tokens nothing."""
        return decode(self, tokens)

    def stream_decoder(self):
        """Returns a new StreamDecoder."""
        return StreamDecoder(self)

    def to_json(self):
        """Returns the library's own `tokenizer.json` content."""
        return json.loads(self._model.to_str())

    def to_files(self):
        """Returns {name: text} of the files that transformers reads."""
        from tokenizers import Tokenizer

        return _files(Tokenizer.from_str(self._model.to_str()))


def train_bpe(texts, vocab_size):
    """Returns a SubwordTokenizer of `vocab_size` tokens (256 bytes and the end token included) trained on `texts`."""
    return _train("BPE", "BpeTrainer", texts, vocab_size)


def train_unigram(texts, vocab_size):
    """Returns a SubwordTokenizer like `train_bpe`'s, whose tokens are the likeliest pieces of words."""
    return _train("Unigram", "UnigramTrainer", texts, vocab_size)


def _train(model, trainer, texts, vocab_size):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ConfigError(f"data.tokenizer={model.lower()}:{vocab_size} is too small: bytes and the end token need 257.")
    if vocab_size > _MOST_TOKENS:
        raise ConfigError(f"data.tokenizer={model.lower()}:{vocab_size} is too large: {_MOST_TOKENS} tokens at most.")
    tokenizer = Tokenizer(getattr(models, model)())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = dict(vocab_size=vocab_size, special_tokens=[END_TEXT], show_progress=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, getattr(trainers, trainer)(initial_alphabet=alphabet, **settings))
    return SubwordTokenizer(tokenizer)


def expected_vocab_size(spec):
    """Returns how many tokens the tokenizer of setting `data.tokenizer` will have, at most, without any text."""
    kind, _, size = spec.partition(":")
    return int(size) if f"{kind}:" in TRAINED and size.isdecimal() else make_tokenizer(spec, ()).vocab_size


def make_tokenizer(spec, texts):
    """Returns the tokenizer of setting `data.tokenizer`: "byte", "bpe:SIZE", "unigram:SIZE", a tokenizer.json or .model.

    `texts` is only iterated when a tokenizer is trained: by the second and third.
    """
    kind, _, size = spec.partition(":")
    if spec == "byte":
        return ByteTokenizer()
    if f"{kind}:" in TRAINED and size.isdecimal():
        return {"bpe": train_bpe, "unigram": train_unigram}[kind](texts, int(size))
    if pathlib.Path(spec).exists():
        return load_tokenizer(spec)
    raise ConfigError(
        f"data.tokenizer={spec!r} must be byte, bpe:SIZE (for example bpe:4096), unigram:SIZE or an existing tokenizer.json."
    )


def load_tokenizer(path):
    """Returns the tokenizer of a file; DataError names a file that is missing, damaged or of another kind."""
    path = pathlib.Path(path)
    if path.suffix == ".model":
        return PretrainedTokenizer(spm.to_files(path), path)
    try:
        content = path.read_text("utf-8")
        tree = json.loads(content)
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer file {path} can't be read: {error}.") from None
    if isinstance(tree, dict) and tree.get("llmos") == "byte":
        return ByteTokenizer()
    if isinstance(tree, dict) and tree.get("llmos") == ENVELOPE:
        return PretrainedTokenizer(tree.get("files"), path)
    beside = files_beside(path)
    if beside:
        return PretrainedTokenizer(beside | {"tokenizer.json": content}, path)
    return SubwordTokenizer(read_model(content, path), path)


def pieces(text, size):
    """Yields `text` in pieces of little more than `size` characters, cut where byte-level BPE cuts anyway.

    That is behind a newline or before a space that stands alone between two other characters.
    """
    start = 0
    while len(text) - start > size and (border := _BORDER.search(text, start + size)):
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]


def batched_by_length(items, total, length=len):
    """Yields lists of successive items whose lengths add up to `total` or a little more."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += length(item)
        if size >= total:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_cut_at_spaces(tree):
    """Whether a tokenizer.json is plain byte-level BPE, whose words never reach over a border of `pieces`."""
    split = tree.get("pre_tokenizer") or {}
    is_plain = split.get("type") == "ByteLevel" and not split.get("add_prefix_space") and split.get("use_regex", True)
    return is_plain and not tree.get("normalizer") and all(token["special"] for token in tree.get("added_tokens", ()))


def _files(model):
    """Returns transformers' files of a tokenizer of ours, with what `prompt` puts before a text."""
    from tokenizers import processors

    end = (END_TEXT, model.token_to_id(END_TEXT))
    model.post_processor = processors.TemplateProcessing(single=f"{END_TEXT} $A", special_tokens=[end])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_TEXT, "eos_token": END_TEXT}
    return {"tokenizer.json": model.to_str(pretty=True), SETTINGS_FILE: json.dumps(settings, indent=2) + "\n"}


def _behind_end(tokenizer, text):
    return np.concatenate([np.array([tokenizer.end_id], np.int32), tokenizer.encode(text)])
