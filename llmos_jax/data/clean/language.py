"""The language of documents, by py3langid's model (its wheel holds it), for many documents at a time.

The model is an automaton over bytes whose states count features, and a table of their weights (Lui and Baldwin, 2012).
py3langid walks each text in Python; here all texts take a step together, 6 times faster. The languages are the same, the scores
within 1e-4.
"""

import dataclasses
import functools
import unicodedata

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.gopher import first_reason
from llmos_jax.data.clean.steps import Filter, register, threshold
from llmos_jax.errors import ConfigError

# Documents that take a step together.
_BATCH = 2048


@register
@dataclasses.dataclass(frozen=True)
class Language(Filter):
    """Finds the language of each document and keeps the languages asked for; none asked for: all. Needs py3langid."""

    step: str = setting("language", help="step", choices=("language",))
    characters: int = setting(500, help="how much of a text is looked at, from its start and its middle", at_least=1)
    languages: tuple[str, ...] = threshold((), help="ISO 639-1 codes of the languages that stay; empty: all")
    min_score: float = threshold(0.0, help="smallest probability of the language found", at_least=0, at_most=1)

    libraries = ("py3langid",)
    version = 2

    def __post_init__(self):
        super().__post_init__()
        unknown = sorted(set(self.languages) - known_languages()) if self.languages else []
        if unknown:
            known = ", ".join(sorted(known_languages()))
            raise ConfigError(f"language.languages has {', '.join(unknown)}, which py3langid doesn't know; known: {known}.")

    def annotate(self, documents, findings=None):
        """Returns {"language": ISO 639-1 code, "score": its probability, float32}, each [n]."""
        languages, scores = _identifier().classify([self.sample(text) for text in documents.texts])
        return {"language": np.array(languages, "U8"), "score": scores}

    def sample(self, text):
        """Returns the part of a text that is looked at."""
        half = self.characters // 2
        middle = len(text) // 2
        return text if len(text) <= self.characters else f"{text[: self.characters - half]} {text[middle : middle + half]}"

    def decide(self, attributes):
        """Returns why a document goes."""
        is_other = ~np.isin(attributes["language"], self.languages) if self.languages else attributes["score"] < 0
        return first_reason(
            [("another language", is_other), ("language unclear", attributes["score"] < np.float32(self.min_score))],
            len(attributes["score"]),
        )


class Identifier:
    """py3langid's model, asked about many texts at a time."""

    def __init__(self, model):
        self._next = np.frombuffer(model.tk_nextmove, model.tk_nextmove.typecode)
        self._rows = np.array(model.tk_row, np.int64) << 8
        self._features = np.array(model.tk_output, np.int64)  # of each state; -1: none
        self._weights, self._prior = model.nb_ptc, model.nb_pc
        self.labels = list(model.nb_classes)  # a language may have more than one column
        firsts = [self.labels.index(label) for label in self.labels]
        self._again = [(first, column) for column, first in enumerate(firsts) if first != column]

    def classify(self, texts):
        """Returns (languages, their probabilities float32 [n]) of a list of texts."""
        scores = [self._scores(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
        scores = np.concatenate([np.zeros((0, len(self.labels)), np.float32), *scores])
        best = scores.argmax(axis=1)
        return [self.labels[column] for column in best], scores[np.arange(len(best)), best]

    def _scores(self, texts):
        """Returns the probability of each column, float32 [n, columns]."""
        coded = [_coded(text) for text in texts]
        sizes = np.array([len(text) for text in coded], np.int64)
        documents, features, counts = self._count(coded, sizes)
        scores = self._summed(documents, features, np.log1p(counts, dtype=np.float32), len(texts))
        scores[np.bincount(documents, minlength=len(texts)) > 0] += self._prior
        scores /= np.sqrt(np.maximum(sizes, 1))[:, None]  # keeps the probabilities of short and long texts comparable
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        for first, again in self._again:
            scores[:, first] += scores[:, again]
            scores[:, again] = 0
        return scores

    def _count(self, coded, sizes):
        """Returns (documents, features, counts) of the features that the automaton meets, sorted by document and feature."""
        order = np.argsort(-sizes, kind="stable")  # those that have a byte left stay in front
        letters = np.frombuffer(b"".join(coded), np.uint8)
        starts = (np.cumsum(sizes) - sizes)[order]
        left = np.searchsorted(-sizes[order], -np.arange(sizes.max(initial=0)), side="left")
        state, met = np.zeros(len(coded), np.int64), []
        for place, many in enumerate(left.tolist()):
            state = self._next[self._rows[state[:many]] + letters[starts[:many] + place]]
            feature = self._features[state]
            some = np.flatnonzero(feature >= 0)
            met.append(order[some] * len(self._weights) + feature[some])
        found, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *met]), return_counts=True)
        return *np.divmod(found, len(self._weights)), counts

    def _summed(self, documents, features, values, count):
        from scipy.sparse import csr_array

        used, columns = np.unique(features, return_inverse=True)
        borders = np.searchsorted(documents, np.arange(count + 1))
        return csr_array((values, columns, borders), shape=(count, len(used))) @ self._weights[used].astype(np.float32)


def _coded(text):
    text = text.lower() if text.isupper() else text
    return unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")


@functools.cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError("step 'language' needs py3langid: pip install 'llmos-jax[data]'.") from None
    return Identifier(LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True))


@functools.cache
def known_languages():
    """Returns the codes of the languages that can be found, a frozenset."""
    return frozenset(_identifier().labels)
