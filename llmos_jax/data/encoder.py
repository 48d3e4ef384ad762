"""Encoding by the tokenizers library, with bounds where a tokenizer's rules could take any time or memory.

A regular expression of someone else's can take years, and a few replacements can make any length; neither can be interrupted in
this process. So a tokenizer whose rules are not among those that are known to be fast encodes in a process of its own, which
ends when it takes too long or too much. This file is that process's program, too: it imports nothing of the package.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref

# For a request, and for each of its characters: 50 thousand a second are a twentieth of what plain rules do.
_SECONDS, _SECONDS_A_CHARACTER = 10.0, 1 / 50_000
_BYTES, _BYTES_A_CHARACTER = 4 * 2**30, 512
# Steps of normalizers and pre-tokenizers whose time and output are in proportion to the text, whatever their settings.
_KNOWN_STEPS = (
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "Precompiled", "Strip", "StripAccents", "BertNormalizer", "ByteLevel"),
    *("BertPreTokenizer", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "UnicodeScripts", "Whitespace"),
    "WhitespaceSplit",
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


class Encoder:
    """Encodes by a `tokenizers.Tokenizer`; `path` is what errors call it. `is_apart`: in a process of its own."""

    def __init__(self, model, path):
        self._model, self._path = model, path
        model.no_padding()
        model.no_truncation()
        tree = json.loads(model.to_str())
        self.is_apart = not all(_is_known(tree.get(name)) for name in ("normalizer", "pre_tokenizer"))
        self._start_anew()

    def encode(self, texts, *, add_special_tokens=False, reads_special_tokens=False):
        """Returns the tokens of every text, a list of ints each, on all cores.

        reads_special_tokens: the spelling of one inside a text is that token; else just text. Raises DataError when the library
        fails, or takes more time or memory than the texts' length allows.
        """
        request = {"texts": texts, "add": add_special_tokens, "read": reads_special_tokens}
        if self.is_apart:
            return self._ask(request)
        answer = _answer(self._model, request)
        return answer["tokens"] if "tokens" in answer else self._fail(answer["error"])

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_process")}

    def __setstate__(self, state):
        self.__dict__ |= state
        self._start_anew()

    def _start_anew(self):
        self._lock, self._process, self._owner = threading.Lock(), None, os.getpid()

    def _ask(self, request):
        if self._owner != os.getpid():
            self._start_anew()  # a fork's pipes are its parent's
        characters = sum(map(len, request["texts"]))
        seconds = _SECONDS + characters * _SECONDS_A_CHARACTER
        limits = {"seconds": seconds, "bytes": _BYTES + characters * _BYTES_A_CHARACTER}
        with self._lock:
            try:
                if self._process is None:
                    self._process = subprocess.Popen(
                        [sys.executable, "-P", __file__],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                    )
                    weakref.finalize(self, _end, self._process)
                    self._send(self._model.to_str())
                self._send(request | limits)
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:  # what it answers to this would be taken for an answer to the next
                self._forget()
                raise
            if not line:
                code = self._forget()
                many = f"{characters} characters"
                if code == -signal.SIGALRM:
                    self._fail(f"its rules take more than {seconds:.0f} seconds for {many}")
                self._fail(
                    f"its process ended with {code} on {many}: out of memory, of which it may take {limits['bytes']} bytes?"
                )
        answer = json.loads(line)
        return answer["tokens"] if "tokens" in answer else self._fail(answer["error"])

    def _send(self, value):
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def _forget(self):
        process, self._process = self._process, None
        return None if process is None else _end(process)

    def _fail(self, words):
        _fail(self._path, words)


def run(path, function, *args, **kwargs):
    """Returns what a function of the tokenizers library returns; DataError when it panics, as on a hostile file."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        _fail(path, _words_of_panic(error))


def _fail(path, words):
    from llmos_jax.errors import DataError  # not for the program below

    raise DataError(f"the tokenizer of {path} fails on a text ({words}): take another one.") from None


def _words_of_panic(error):
    """Returns the first line of a panic of the library, which is no Exception; raises what is none."""
    if type(error).__name__ != "PanicException":
        raise error
    return str(error).splitlines()[0]


def _is_known(step):
    """Returns whether a normalizer or pre-tokenizer, as in tokenizer.json, is fast on any text and makes none much longer."""
    if not isinstance(step, dict):
        return step is None
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "Sequence":
        return all(map(_is_known, step.get("normalizers", []) + step.get("pretokenizers", [])))
    if kind == "Prepend":
        return len(step.get("prepend", "")) <= 1
    if kind not in ("Split", "Replace"):
        return kind in _KNOWN_STEPS
    is_known = isinstance(pattern, dict) and (pattern.get("String") or pattern.get("Regex") in _KNOWN_PATTERNS)
    return bool(is_known) and (kind == "Split" or len(step.get("content", "")) <= 1)


def _answer(model, request):
    """Returns {"tokens"} or {"error"} for a request."""
    model.encode_special_tokens = not request["read"]
    given = {"add_special_tokens": request["add"]}
    try:
        if len(request["texts"]) == 1:
            return {"tokens": [model.encode(*request["texts"], **given).ids]}
        return {"tokens": [item.ids for item in model.encode_batch_fast(request["texts"], **given)]}
    except BaseException as error:
        return {"error": _words_of_panic(error)}
    finally:
        model.encode_special_tokens = True


def _end(process):
    process.kill()
    code = process.wait()
    process.stdin.close()
    process.stdout.close()
    return code


def main():
    """Answers requests, a line of JSON each, until there are no more; the system ends it at a limit."""
    import resource

    from tokenizers import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    model = Tokenizer.from_str(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        request = json.loads(line)
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = request["bytes"] if most == resource.RLIM_INFINITY else min(request["bytes"], most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        answer = _answer(model, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
