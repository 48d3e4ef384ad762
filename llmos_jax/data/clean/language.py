"""The language of documents, by py3langid (97 languages, the model is in its wheel)."""

import dataclasses
import functools

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.gopher import first_reason
from llmos_jax.data.clean.steps import Filter, register, threshold
from llmos_jax.errors import ConfigError


@register
@dataclasses.dataclass(frozen=True)
class Language(Filter):
    """Finds the language of each document and keeps the languages asked for; none asked for: all. Needs py3langid."""

    step: str = setting("language", help="step", choices=("language",))
    characters: int = setting(500, help="how much of a text is looked at, from its start and its middle", at_least=1)
    languages: tuple[str, ...] = threshold((), help="ISO 639-1 codes of the languages that stay; empty: all")
    min_score: float = threshold(0.0, help="smallest probability of the language found", at_least=0, at_most=1)

    libraries = ("py3langid",)

    def __post_init__(self):
        unknown = sorted(set(self.languages) - known_languages()) if self.languages else []
        if unknown:
            known = ", ".join(sorted(known_languages()))
            raise ConfigError(f"language.languages has {', '.join(unknown)}, which py3langid doesn't know; known: {known}.")

    def annotate(self, documents, findings=None):
        """Returns {"language": ISO 639-1 code, "score": its probability, float32}, each [n]."""
        identifier = _identifier()
        found = [identifier.classify(self.sample(text)) for text in documents.texts]
        return {
            "language": np.array([language for language, _ in found], "U8"),
            "score": np.array([score for _, score in found], np.float32),
        }

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


@functools.cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError("step 'language' needs py3langid: pip install 'llmos-jax[data]'.") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@functools.cache
def known_languages():
    """Returns the codes of the languages that can be found, a frozenset."""
    return frozenset(_identifier().labels)
