"""Removal of documents that hold text of evaluation sets: n-grams of words in common (Brown et al., 2020, appendix C)."""

import collections
import dataclasses
import functools

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.gopher import first_reason, ratio
from llmos_jax.data.clean.repeats import ngram_hashes, ngram_places
from llmos_jax.data.clean.steps import Filter, register, threshold
from llmos_jax.data.clean.views import view_of
from llmos_jax.data.clean.words import FoldedHashes, Words
from llmos_jax.data.fields import PassedOver
from llmos_jax.data.sources import SourceConfig, content_hash, list_files, read_records
from llmos_jax.errors import ConfigError, DataError


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decontaminate(Filter):
    """Removes documents that share an n-gram of words, in lower case and without punctuation, with an evaluation text.

    A text shorter than n words is one n-gram of its own length, down to `min_words`; still shorter ones can't be told from
    chance and are not looked for: the manifest counts them. A bad file or record among the evaluation texts is an error.
    """

    step: str = setting("decontaminate", help="step", choices=("decontaminate",))
    paths: tuple[str, ...] = setting(help="files or folders of evaluation texts, whatever format sources may have")
    text_key: str = setting("text", help="field that holds the text in jsonl, csv and parquet")
    ngram: int = setting(13, help="words of an n-gram", at_least=1)
    min_words: int = setting(8, help="shortest evaluation text that is looked for", at_least=1)
    max_matches: int = threshold(0, help="how many places of a document may match", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.min_words > self.ngram:
            raise ConfigError(
                f"{self.name}.min_words={self.min_words} is more than ngram={self.ngram}: no text would be looked for."
            )

    def inputs(self):
        """Returns hashes of the evaluation files."""
        return {path: content_hash(list_files(SourceConfig(path=path))) for path in self.paths}

    def notes(self):
        """Returns {"texts": evaluation texts that are looked for, "too_short": those not, "passed_over": by reason}."""
        return self._evaluation()[1]

    def _evaluation(self):
        return _evaluation(self.paths, self.text_key, self.ngram, self.min_words, str(self.inputs()))

    def annotate(self, documents, findings=None):
        """Returns {"matches": places that match, int32; "share": of a document's n-grams, float64}, each [n]."""
        words, folded = view_of(documents.texts, Words, FoldedHashes)
        real = np.flatnonzero(~words.is_sign)
        first = np.searchsorted(real, words.first)
        folded = folded.values[real]
        matches = np.zeros(len(documents), np.int64)
        for length, known in self._evaluation()[0].items():
            places, owners = ngram_places(first, length)
            hits = known.contains(ngram_hashes(folded, length)[places])
            matches += np.bincount(owners[hits], minlength=len(documents))
        return {"matches": matches.astype(np.int32), "share": ratio(matches, np.diff(first))}

    def decide(self, attributes):
        """Returns why documents go."""
        rules = [("overlaps an evaluation text", attributes["matches"] > self.max_matches)]
        return first_reason(rules, len(attributes["matches"]))


class HashSet:
    """A set of uint64 hashes that many are looked up in at once: a table of bits lets most misses end early."""

    def __init__(self, hashes):
        self._sorted = np.unique(hashes)
        self._mask = np.uint64((1 << max(12, len(self._sorted).bit_length() + 4)) - 1)
        self._seen = np.zeros(int(self._mask) + 1, bool)
        self._seen[self._sorted & self._mask] = True

    def __len__(self):
        return len(self._sorted)

    def contains(self, hashes):
        """Returns a boolean array: which of `hashes` are members."""
        found = self._seen[hashes & self._mask]
        places = np.flatnonzero(found)
        slots = np.minimum(np.searchsorted(self._sorted, hashes[places]), max(len(self._sorted) - 1, 0))
        found[places] = self._sorted[slots] == hashes[places]
        return found


@functools.lru_cache(maxsize=2)
def _evaluation(paths, text_key, n, min_words, content):
    """Returns ({length: HashSet} of the n-grams of evaluation texts, what the manifest says of these).

    content: tells one state of the files from another. Raises DataError at anything that can't be read: what is not looked for
    would be trained on.
    """
    texts, passed_over = [], collections.Counter()
    for path in paths:
        source = SourceConfig(path=path, text_key=text_key)
        for item in (item for file in list_files(source) for item in read_records(source, file)):
            if isinstance(item, DataError):
                raise item
            if isinstance(item, PassedOver):
                passed_over[item.reason] += 1
            else:
                texts.append(item.text)
    words, folded = view_of(texts, Words, FoldedHashes)
    real = np.flatnonzero(~words.is_sign)
    first = np.searchsorted(real, words.first)
    counts = np.diff(first)
    found = {}
    for length in range(min_words, n + 1):
        # Texts of at least n words by their n-grams, a shorter one as a whole.
        chosen = counts >= n if length == n else counts == length
        places, owners = ngram_places(first, length)
        hashes = ngram_hashes(folded.values[real], length)[places[chosen[owners]]]
        if len(hashes):
            found[length] = HashSet(hashes)
    if not found:
        raise DataError(f"decontaminate: none of the {len(texts)} texts of {', '.join(paths)} has {min_words} words.")
    is_short = counts < min_words
    notes = {
        "texts": int((~is_short).sum()),
        "too_short": int(is_short.sum()),
        "passed_over": dict(sorted(passed_over.items())),
    }
    return found, notes
