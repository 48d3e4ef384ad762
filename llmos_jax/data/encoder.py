"""Encoding by the tokenizers library, apart (`data/apart.py`) where a tokenizer's rules could take any time or memory."""

import functools
import json
import threading

from llmos_jax.data import apart
from llmos_jax.errors import DataError

# For a request, and for each of its characters: 50 thousand a second are a hundredth of what plain rules do.
_SECONDS, _SECONDS_A_CHARACTER = 10.0, 1 / 50_000
_BYTES, _BYTES_A_CHARACTER = 4 * 2**30, 512
# Steps of normalizers and pre-tokenizers whose time and output are in proportion to the text, whatever their settings.
_KNOWN_STEPS = (
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "Strip", "StripAccents", "BertNormalizer", "BertPreTokenizer"),
    *(
        "ByteLevel",
        "CharDelimiterSplit",
        "Digits",
        "Metaspace",
        "Punctuation",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    ),
)
# The patterns of GPT-2; cl100k and Llama 3; Qwen 2; runs of spaces of SentencePiece.
_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
_KNOWN_PATTERNS = (
    _ENDINGS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    *(
        rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
    " {2,}",
)
# Most characters of a piece of Unigram, of WordPiece's words, of prefixes and suffixes, of a post-processor's JSON; most steps.
_LONGEST_PIECE, _LONGEST_WORD, _LONGEST_AFFIX, _LONGEST_PROCESSOR, _MOST_STEPS = 64, 200, 8, 10_000, 16


class Encoder:
    """Encodes by a `tokenizers.Tokenizer`; `path` is what errors call it. `is_apart`: in a process of its own."""

    def __init__(self, model, path):
        model.no_padding()
        model.no_truncation()
        content = model.to_str()
        self._model, self._path, self.is_apart = model, path, not _is_known(json.loads(content))
        self._process, self._lock = apart.Process(__name__, content) if self.is_apart else None, threading.Lock()

    def encode(self, texts, *, add_special_tokens=False, reads_special_tokens=False):
        """Returns the tokens of every text, a list of ints each, on all cores.

        reads_special_tokens: the spelling of one inside a text is that token; else just text. Raises DataError when the library
        fails, or takes more time or memory than the texts' length allows.
        """
        request = {"texts": texts, "add": add_special_tokens, "read": reads_special_tokens}
        if self.is_apart:
            characters = sum(map(len, texts))
            limits = _SECONDS + characters * _SECONDS_A_CHARACTER, _BYTES + characters * _BYTES_A_CHARACTER
            try:
                answer = self._process.ask(request, *limits)
            except apart.EndedError as error:
                _fail(self._path, f"{error}, for {characters} characters")
        else:
            with self._lock:  # how special tokens are read is the model's setting, not the call's
                answer = _answer(self._model, request)
        if "error" in answer:
            _fail(self._path, answer["error"])
        return answer["tokens"]

    def __getstate__(self):
        return self.__dict__ | {"_lock": None}

    def __setstate__(self, state):
        self.__dict__ |= state | {"_lock": threading.Lock()}


def run(path, function, *args, **kwargs):
    """Returns what a function of the tokenizers library returns; DataError when it panics, as on a hostile file."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        _fail(path, _words(error))


def main():
    """Answers an Encoder's requests."""
    from tokenizers import Tokenizer

    apart.serve(lambda content: functools.partial(_answer, Tokenizer.from_str(content)))


def _answer(model, request):
    """Returns {"tokens"} or {"error"} for a request."""
    model.encode_special_tokens = not request["read"]
    given = {"add_special_tokens": request["add"]}
    try:
        if len(request["texts"]) == 1:
            return {"tokens": [model.encode(*request["texts"], **given).ids]}
        return {"tokens": [item.ids for item in model.encode_batch_fast(request["texts"], **given)]}
    except TypeError:  # texts are texts, else
        return {"error": "it holds half a surrogate pair, which is no character"}
    except BaseException as error:
        return {"error": _words(error)}
    finally:
        model.encode_special_tokens = True


def _words(error):
    """Returns the first line of what the library says of a text; raises what is not about it."""
    if type(error).__name__ != "PanicException":  # which is no Exception
        raise error
    return str(error).splitlines()[0]


def _fail(path, words):
    raise DataError(f"the tokenizer of {path} fails on a text ({words}): change the text, or take another one.") from None


def _is_known(tree):
    """Returns whether a tokenizer.json's rules are fast on any text, and make none much longer."""
    model, steps = tree["model"], [*_steps(tree.get("normalizer")), *_steps(tree.get("pre_tokenizer"))]
    affixes = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    is_known = len(json.dumps(tree.get("post_processor"))) <= _LONGEST_PROCESSOR and len(steps) <= _MOST_STEPS
    is_known &= all(len(affix) <= _LONGEST_AFFIX for affix in affixes) and all(map(_is_known_step, steps))
    if model["type"] == "Unigram":
        return is_known and max(len(piece) for piece, _ in model["vocab"]) <= _LONGEST_PIECE
    if model["type"] == "WordPiece":
        return is_known and model["max_input_chars_per_word"] <= _LONGEST_WORD
    return is_known and model["type"] in ("BPE", "WordLevel")


def _steps(step):
    """Yields the steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        for inner in step.get("normalizers", []) + step.get("pretokenizers", []):
            yield from _steps(inner)
    elif step is not None:
        yield step


def _is_known_step(step):
    kind, pattern = step["type"], step.get("pattern")
    if kind == "Prepend":
        return len(step["prepend"]) <= 1
    if kind not in ("Split", "Replace"):
        return kind in _KNOWN_STEPS
    is_known = pattern.get("String") or pattern.get("Regex") in _KNOWN_PATTERNS
    return bool(is_known) and (kind == "Split" or len(step["content"]) <= 1)
