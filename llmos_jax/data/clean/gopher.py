"""The rules of Gopher for quality and repetition (Rae et al., 2021, arXiv 2112.11446, appendix A.1 and table A1)."""

import dataclasses

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.characters import hash_of, mixed
from llmos_jax.data.clean.lines import LineHashes, Lines
from llmos_jax.data.clean.repeats import repeated, repetition
from llmos_jax.data.clean.steps import Filter, register, threshold
from llmos_jax.data.clean.views import view_of
from llmos_jax.data.clean.words import WordHashes, Words
from llmos_jax.errors import ConfigError

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


def ratio(part, whole):
    """Returns part / whole, float64 [n]; 0 where the whole is 0."""
    whole = np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)


def first_reason(rules, count):
    """Returns [count] texts: for each document the reason of the first (reason, boolean array) that holds, or ""."""
    return np.select([holds for _, holds in rules], [reason for reason, _ in rules], default="") if count else np.zeros(0, "U1")


@register
@dataclasses.dataclass(frozen=True)
class GopherQuality(Filter):
    """Documents whose words look like prose: counts, lengths, signs, bullets, letters, stop words."""

    step: str = setting("gopher_quality", help="step", choices=("gopher_quality",))
    stop_words: tuple[str, ...] = setting(STOP_WORDS, help="words of which a text has some, in lower case")
    min_words: int = threshold(50, help="fewest words", at_least=0)
    max_words: int = threshold(100_000, help="most words", at_least=1)
    min_mean_word_length: float = threshold(3.0, help="smallest mean length of words, in characters", at_least=0)
    max_mean_word_length: float = threshold(10.0, help="largest mean length of words, in characters", at_least=0)
    max_hash_ratio: float = threshold(0.1, help="most '#' per word", at_least=0)
    max_ellipsis_ratio: float = threshold(0.1, help="most '...' per word", at_least=0)
    max_bullet_lines: float = threshold(0.9, help="largest share of lines that start with a bullet", at_least=0, at_most=1)
    max_ellipsis_lines: float = threshold(0.3, help="largest share of lines that end with '...'", at_least=0, at_most=1)
    min_letter_words: float = threshold(0.8, help="smallest share of words that have a letter", at_least=0, at_most=1)
    min_stop_words: int = threshold(2, help="fewest different stop words", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        known = len(set(self.stop_words))
        if self.min_stop_words > known:
            most = f"is more than the {known} stop_words"
            raise ConfigError(f"{self.name}.min_stop_words={self.min_stop_words} {most}: nothing would be kept.")

    def annotate(self, documents, findings=None):
        """Returns counts and ratios of each document; the names of attributes say which."""
        texts = documents.texts
        words, hashes, lines = view_of(texts, Words, WordHashes, Lines)
        counts, line_counts = np.diff(words.first), np.diff(lines.first)
        real = words.totals(~words.is_sign)
        found = np.zeros((len(self.stop_words), len(texts)), bool)
        short = np.flatnonzero(words.lengths <= max(map(len, self.stop_words), default=0))
        keys = hashes.values[short]
        for row, word in zip(found, self.stop_words, strict=True):
            places = short[keys == hash_of(word)]
            row[np.searchsorted(words.first, places, side="right") - 1] = True
        number_signs = np.array([text.count("#") for text in texts], np.int32)
        dots = np.array([text.count("...") + text.count("…") for text in texts], np.int32)
        return {
            "words": real.astype(np.int32),
            "mean_word_length": ratio(words.totals(np.where(words.is_sign, 0, words.lengths)), real),
            "hash_ratio": ratio(number_signs, counts),
            "ellipsis_ratio": ratio(dots, counts),
            "bullet_lines": ratio(lines.totals(lines.has_bullet), line_counts),
            "ellipsis_lines": ratio(lines.totals(lines.has_ellipsis), line_counts),
            "letter_words": ratio(words.totals(words.has_letter), counts),
            "stop_words": found.sum(axis=0, dtype=np.int32),
        }

    def decide(self, attributes):
        """Returns the first rule that a document breaks, in the order of the paper."""
        a = attributes
        rules = [
            ("too few words", a["words"] < self.min_words),
            ("too many words", a["words"] > self.max_words),
            ("short words", a["mean_word_length"] < self.min_mean_word_length),
            ("long words", a["mean_word_length"] > self.max_mean_word_length),
            ("too many hashes", a["hash_ratio"] > self.max_hash_ratio),
            ("too many ellipses", a["ellipsis_ratio"] > self.max_ellipsis_ratio),
            ("too many bullets", a["bullet_lines"] > self.max_bullet_lines),
            ("too many lines end with an ellipsis", a["ellipsis_lines"] > self.max_ellipsis_lines),
            ("too few words with letters", a["letter_words"] < self.min_letter_words),
            ("too few stop words", a["stop_words"] < self.min_stop_words),
        ]
        return first_reason(rules, len(a["words"]))


@register
@dataclasses.dataclass(frozen=True)
class GopherRepetition(Filter):
    """Documents that don't repeat themselves: lines, paragraphs, n-grams of words; shares are of the text's characters."""

    step: str = setting("gopher_repetition", help="step", choices=("gopher_repetition",))
    max_duplicate_lines: float = threshold(0.3, help="largest share of lines that were there before", at_least=0, at_most=1)
    max_duplicate_paragraphs: float = threshold(0.3, help="the same for paragraphs", at_least=0, at_most=1)
    max_duplicate_line_characters: float = threshold(0.2, help="most characters in such lines", at_least=0, at_most=1)
    max_duplicate_paragraph_characters: float = threshold(0.2, help="the same for paragraphs", at_least=0, at_most=1)
    max_top_ngrams: tuple[float, ...] = threshold(
        (0.20, 0.18, 0.16), help="most characters in the most frequent 2-, 3-, 4-gram", at_least=0
    )
    max_duplicate_ngrams: tuple[float, ...] = threshold(
        (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), help="most characters in 5- to 10-grams that were there before", at_least=0
    )

    def __post_init__(self):
        super().__post_init__()
        for name, most in (("max_top_ngrams", 3), ("max_duplicate_ngrams", 6)):
            given = len(getattr(self, name))
            if given > most:
                raise ConfigError(f"{self.name}.{name} has {given} numbers: {most} at most, one for each length.")

    def annotate(self, documents, findings=None):
        """Returns shares of repeated lines, paragraphs and n-grams."""
        texts = documents.texts
        characters = np.fromiter(map(len, texts), np.int64, len(texts))
        found = {}
        words, hashes, lines, line_hashes = view_of(texts, Words, WordHashes, Lines, LineHashes)
        for name, (document, keys, lengths) in (
            ("line", _lines(lines, line_hashes.values)),
            ("paragraph", _paragraphs(lines, line_hashes.values)),
        ):
            again = repeated(keys)
            total = np.bincount(document, minlength=len(texts))
            found[f"duplicate_{name}s"] = ratio(np.bincount(document[again], minlength=len(texts)), total)
            inside = np.bincount(document[again], weights=lengths[again], minlength=len(texts))
            found[f"duplicate_{name}_characters"] = ratio(inside, characters)
        top, duplicate = repetition(words, hashes.values, (2, 3, 4), range(5, 11))
        found |= {f"top_{n}_gram": ratio(count, characters) for n, count in top.items()}
        found |= {f"duplicate_{n}_grams": ratio(count, characters) for n, count in duplicate.items()}
        return found

    def decide(self, attributes):
        """Returns the first rule that a document breaks, in the order of the paper's table A1."""
        a = attributes
        rules = [
            ("repeats paragraphs", a["duplicate_paragraphs"] > self.max_duplicate_paragraphs),
            ("repeats characters in paragraphs", a["duplicate_paragraph_characters"] > self.max_duplicate_paragraph_characters),
            ("repeats lines", a["duplicate_lines"] > self.max_duplicate_lines),
            ("repeats characters in lines", a["duplicate_line_characters"] > self.max_duplicate_line_characters),
        ]
        for n, most in enumerate(self.max_top_ngrams, 2):
            rules.append((f"one {n}-gram is much of the text", a[f"top_{n}_gram"] > most))
        for n, most in enumerate(self.max_duplicate_ngrams, 5):
            rules.append((f"repeats {n}-grams", a[f"duplicate_{n}_grams"] > most))
        return first_reason(rules, len(a["duplicate_lines"]))


def _lines(lines, hashes):
    """Returns (document, key, characters) of lines that are not empty; keys are equal only within a document."""
    some = lines.lengths > 0
    document = lines.documents[some]
    return document, hashes[some] ^ mixed(document), lines.lengths[some]


def _paragraphs(lines, hashes):
    """Returns the same of paragraphs, which blank lines part."""
    document = lines.documents
    some = np.flatnonzero(lines.lengths > 0)
    if not len(some):
        return document[:0], hashes[:0], lines.lengths[:0]
    begins = np.flatnonzero(np.diff(some, prepend=-2) > 1)
    begins = np.union1d(begins, np.flatnonzero(np.diff(document[some], prepend=-1)))
    # A paragraph's key depends on the order of its lines: each counts by its place.
    place = np.arange(len(some)) - np.repeat(begins, np.diff(np.append(begins, len(some))))
    keys = np.add.reduceat(mixed(hashes[some] + mixed(place)), begins)
    sizes = np.add.reduceat(lines.lengths[some] + 1, begins) - 1
    document = document[some[begins]]
    return document, keys ^ mixed(document), sizes
