"""Tokenizers that came with a model: `tokenizer.json` with the files beside it, their special tokens, prompts and chats.

One file of ours holds them all (`to_json`), so that a run directory needs nothing else. A chat template comes from the model's
files only; it runs in a sandbox, with bounds on its time and memory.
"""

import functools
import json
import pathlib

import numpy as np

from llmos_jax.data.decoding import StreamDecoder, digest, token_bytes
from llmos_jax.data.encoder import Encoder
from llmos_jax.errors import ConfigError, DataError

ENVELOPE = "pretrained"
TOKENIZER_FILE, SETTINGS_FILE, GENERATION_FILE = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
MAP_FILE, TEMPLATE_FILE, MODEL_FILE = "special_tokens_map.json", "chat_template.jinja", "config.json"
# What is kept beside the tokenizer; config.json is read for its end tokens alone.
_KEPT = (SETTINGS_FILE, GENERATION_FILE, MAP_FILE, TEMPLATE_FILE)
_LARGEST_SIDE_FILE_BYTES = 16 * 2**20
_BATCH_TEXTS = 256
_SPACE = "\u2581"  # SentencePiece's mark of a space


class PretrainedTokenizer:
    """The tokenizer of a model of transformers.

    `files`: {name: text}, of which `tokenizer.json` and, as far as they are there, those beside it. end_id: the token that
    ends a document; end_ids: all that end a continuation.
    """

    name = ENVELOPE

    def __init__(self, files, path):
        if not isinstance(files, dict) or TOKENIZER_FILE not in files or not all(isinstance(t, str) for t in files.values()):
            raise DataError(
                f"tokenizer file {path} is damaged: it should hold the text of {TOKENIZER_FILE} and those beside it."
            )
        self.files, self._path = {name: files[name] for name in sorted(files) if name != MODEL_FILE}, path
        self._model = read_model(files[TOKENIZER_FILE], path)
        self._encoder = Encoder(self._model, path)
        ids = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.specials = {t.content: i for i, t in self._model.get_added_tokens_decoder().items() if t.special}
        trees = {name: _read(text, path, name) for name, text in files.items() if name.endswith(".json")}
        self.settings = trees.get(SETTINGS_FILE, {})
        self.end_ids = self._end_ids(trees)
        self.end_id = self._end_id()
        self.begin_id = self._token_id("bos_token")
        self._bytes = self._token_bytes(ids, trees[TOKENIZER_FILE].get("decoder") or {})
        if GENERATION_FILE not in files and self.end_ids - {self._token_id("eos_token")}:
            # Named by config.json alone, which is not kept.
            self.files[GENERATION_FILE] = json.dumps({"eos_token_id": sorted(self.end_ids)})

    @property
    def fingerprint(self):
        """16 hex digits that identify what the tokenizer does."""
        return digest(self.to_json())

    @property
    def token_byte_lengths(self):
        """Bytes of text that each token stands for, int32 [V]; special tokens stand for none."""
        return np.array([len(part) for part in self._bytes], np.int32)

    @property
    def chat_template(self):
        """The chat template's text, or None."""
        template = self.files.get(TEMPLATE_FILE) or self.settings.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def encode(self, text):
        """Returns the tokens of `text`, int32; special tokens never appear."""
        return np.array(self._ids(text), np.int32)

    def encode_all(self, texts):
        """Yields `encode` of every text, on all cores."""
        batch = []
        for text in texts:
            batch.append(text)
            if len(batch) == _BATCH_TEXTS:
                yield from self._encode_batch(batch)
                batch = []
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch):
        for ids in self._encoder.encode(batch) if batch else ():
            yield np.array(ids, np.int32)

    def prompt(self, text):
        """Returns the tokens that the model is given to continue `text`: those that it begins with, and the text's."""
        ids = self._ids(text, add_special_tokens=True)
        while len(ids) > 1 and ids[-1] in self.end_ids:  # some end what they encode
            ids = ids[:-1]
        begin = self.end_id if self.begin_id is None else self.begin_id
        return np.array(ids or [begin], np.int32)

    def chat_prompt(self, messages, **variables):
        """Returns the tokens of a chat's messages ({"role", "content"}) by the model's template, up to the reply's start.

        Raises ConfigError when there is no template, when it fails, or when a message spells a special token: that would
        speak in the template's name.
        """
        from llmos_jax.data.chat import render

        for message in messages:
            found = next((token for token in self.specials if token and token in str(message.get("content"))), None)
            if found is not None:
                raise ConfigError(f"a message contains {found!r}, which has a meaning of its own to this model: leave it out.")
        if self.chat_template is None:
            raise ConfigError(f"the model of {self._path} has no chat template: give it text to continue.")
        named = {name: self._token(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        named = {name: token for name, token in named.items() if token is not None}
        text = render(self.chat_template, messages=messages, add_generation_prompt=True, **named, **variables)
        return np.array(self._ids(text, reads_special_tokens=True), np.int32)

    def token_bytes(self, token):
        """Returns the bytes of text that one token stands for."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def decode(self, tokens):
        """Returns the text of `tokens`; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode("utf-8", errors="replace")

    def stream_decoder(self):
        """Returns a new StreamDecoder."""
        return StreamDecoder(self)

    def to_json(self):
        """Returns what `load_tokenizer` reads: all files in one."""
        return {"llmos": ENVELOPE, "files": self.files}

    def to_files(self):
        """Returns {name: text} of the files that transformers reads: those that it came with."""
        return dict(self.files)

    def _ids(self, text, **form):
        (ids,) = self._encoder.encode([text], **form)
        return ids

    def _token(self, name):
        """Returns the spelling of a named special token, or None."""
        token = self.settings.get(name)
        if token is None and MAP_FILE in self.files:
            token = _read(self.files[MAP_FILE], self._path, MAP_FILE).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def _token_id(self, name):
        token = self._token(name)
        return None if token is None else self._model.token_to_id(token)

    def _end_ids(self, trees):
        found = [self._token_id("eos_token")]
        for name in (GENERATION_FILE, MODEL_FILE):
            value = trees.get(name, {}).get("eos_token_id")
            found += value if isinstance(value, list) else [value]
        return frozenset(token for token in found if isinstance(token, int) and 0 <= token < self.vocab_size)

    def _end_id(self):
        if not self.end_ids:
            raise DataError(f"{self._path}: no end token is named by {SETTINGS_FILE}, {GENERATION_FILE} or {MODEL_FILE}.")
        named = self._token_id("eos_token")
        return min(self.end_ids) if named is None else named

    def _token_bytes(self, ids, decoder):
        """Returns the bytes of every token, by the kind of decoder: of bytes, or SentencePiece's with a mark for spaces."""
        kinds = {step.get("type") for step in decoder.get("decoders", [decoder])}
        added = self._model.get_added_tokens_decoder()
        spell = token_bytes if "ByteLevel" in kinds else functools.partial(_spaced, has_bytes="ByteFallback" in kinds)
        found = [b""] * self.vocab_size
        for token, number in ids.items():
            if number not in added:
                found[number] = spell(token)
            elif not added[number].special:
                found[number] = token.encode()
        return found


def files_beside(path):
    """Returns {name: text} of the files beside a tokenizer.json that say what its tokens mean; {} when there is none."""
    folder, found = pathlib.Path(path).parent, {}
    for name in (*_KEPT, MODEL_FILE):
        file = folder / name
        if not file.is_file():
            continue
        if file.stat().st_size > _LARGEST_SIDE_FILE_BYTES:
            raise DataError(f"{file} has {file.stat().st_size} bytes, and {_LARGEST_SIDE_FILE_BYTES} are the most.")
        try:
            found[name] = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} can't be read: {error}.") from None
    return found


def read_model(content, path):
    """Returns the `tokenizers.Tokenizer` of a tokenizer.json's text; DataError when the library can't read it."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content)
    except BaseException as error:  # the library's PanicException is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise DataError(f"tokenizer file {path} is not one that the tokenizers library reads: {error}.") from None


def _read(text, path, name):
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} beside tokenizer file {path} is not JSON: {error}.") from None
    if not isinstance(tree, dict):
        raise DataError(f"{name} beside tokenizer file {path} holds no JSON object.")
    return tree


def _spaced(token, has_bytes):
    """Returns the bytes of a SentencePiece token: a mark is a space, `<0x0A>` a byte."""
    if has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass  # text that looks like a byte
    return token.replace(_SPACE, " ").encode()
