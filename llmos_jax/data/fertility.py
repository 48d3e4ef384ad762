"""How well a tokenizer fits a text that it was not trained on."""

import numpy as np


class Fertility:
    """Counts what tokens make of words and bytes (Rust et al. 2021, "fertility": tokens per word)."""

    def __init__(self, tokenizer):
        self._lengths = tokenizer.token_byte_lengths
        self._used = np.zeros(tokenizer.vocab_size, np.int64)
        self._words = self._bytes = 0

    def add_text(self, text):
        """Counts the words between white space, and the bytes of UTF-8, of a text."""
        self._words += len(text.split())
        self._bytes += len(text.encode())

    def add_tokens(self, tokens):
        """Counts the tokens of a text."""
        self._used += np.bincount(tokens, minlength=len(self._used))

    def report(self):
        """Returns bytes_per_token, tokens_per_word, vocabulary_used (share of tokens that occur) and single_byte_share.

        single_byte_share: of the bytes of text, those that no longer token covers.
        """
        tokens = int(self._used.sum())
        singles = int(self._used[self._lengths == 1].sum())
        return {
            "tokens": tokens,
            "bytes_per_token": self._bytes / max(tokens, 1),
            "tokens_per_word": tokens / max(self._words, 1),
            "vocabulary_used": float(np.mean(self._used > 0)),
            "single_byte_share": singles / max(self._bytes, 1),
        }


def format_fertility(report):
    """Returns a `Fertility.report` in one line."""
    return (
        f"{report['bytes_per_token']:.2f} bytes a token, {report['tokens_per_word']:.2f} tokens a word, "
        f"{report['vocabulary_used']:.0%} of the vocabulary used, {report['single_byte_share']:.1%} of the bytes by themselves"
    )
