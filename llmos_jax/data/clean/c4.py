"""The rules of C4 (Raffel et al., 2020, arXiv 1910.10683): lines first, then what is left of documents."""

import dataclasses
import re

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.gopher import first_reason
from llmos_jax.data.clean.lines import Lines, LineWords
from llmos_jax.data.clean.steps import Filter, Transform, register, threshold
from llmos_jax.data.clean.views import view_of

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICY_PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def keep_lines(texts, lines, keep):
    """Returns (texts, dropped counts int32 [n], removed): each text without its lines where `keep` [lines] is false."""
    dropped = lines.totals(~keep).astype(np.int32)
    new, removed = list(texts), [None] * len(texts)
    for document in np.flatnonzero(dropped):
        flags = keep[lines.first[document] : lines.first[document + 1]].tolist()
        parts = texts[document].split("\n")
        new[document] = "\n".join([line for line, kept in zip(parts, flags, strict=True) if kept])
        removed[document] = "\n".join([line for line, kept in zip(parts, flags, strict=True) if not kept])
    return new, dropped, removed


def lines_with(texts, lines, phrases):
    """Returns a boolean array [lines]: which have one of `phrases` (lower case), in any case."""
    found = np.zeros(len(lines.lengths), bool)
    for document, text in enumerate(texts):
        lower = text.lower()
        if any(phrase in lower for phrase in phrases):
            # The lower case of a few characters is longer: lines are cut before, not after.
            rows = [any(phrase in line for phrase in phrases) for line in map(str.lower, text.split("\n"))]
            found[lines.first[document] : lines.first[document + 1]] = rows
    return found


@register
@dataclasses.dataclass(frozen=True)
class C4Lines(Transform):
    """Lines that are sentences: an end mark, some words, none absurdly long, nothing of scripts and policies."""

    version = 2

    step: str = setting("c4_lines", help="step", choices=("c4_lines",))
    needs_end_mark: bool = setting(True, help="drop lines that don't end with . ? ! or a quotation mark (FineWeb: false)")
    min_words: int = setting(3, help="fewest words of a line", at_least=0)
    max_word_length: int = setting(1000, help="most characters of a word", at_least=1)
    drop_citations: bool = setting(True, help="cut out marks of citations, [1] and [edit]")
    phrases: tuple[str, ...] = setting(("javascript", *POLICY_PHRASES), help="drop lines that have one, in lower case")

    def transform(self, documents, findings=None):
        """Returns (texts, counts of lines and citations that went, these: the citations in a line before the lines)."""
        texts, citations, marks = documents.texts, np.zeros(len(documents), np.int32), {}
        if self.drop_citations:
            texts = list(texts)
            for number, text in enumerate(texts):
                if "]" in text and (found := _CITATION.findall(text)):
                    texts[number], citations[number], marks[number] = _CITATION.sub("", text), len(found), " ".join(found)
        lines, words = view_of(texts, Lines, LineWords)
        keep = (lines.words >= self.min_words) & (words.longest <= self.max_word_length)
        if self.needs_end_mark:
            keep &= lines.ends_quoted
        keep &= ~lines_with(texts, lines, self.phrases)
        # Blank lines go only with the lines around them: where words are not asked for they part paragraphs.
        texts, dropped, removed = keep_lines(texts, lines, keep)
        for number, found in marks.items():
            removed[number] = found if removed[number] is None else f"{found}\n{removed[number]}"
        return texts, {"lines": dropped, "citations": citations}, removed


@register
@dataclasses.dataclass(frozen=True)
class C4Quality(Filter):
    """Documents of several sentences, without placeholders and code. `c4_lines` comes before it."""

    step: str = setting("c4_quality", help="step", choices=("c4_quality",))
    min_sentences: int = threshold(5, help="fewest sentences", at_least=0)
    allow_braces: bool = threshold(False, help="keep documents that have a '{'")
    allow_lorem_ipsum: bool = threshold(False, help="keep documents that have 'lorem ipsum'")

    def annotate(self, documents, findings=None):
        """Returns {"sentences": int32, "has_brace", "has_lorem_ipsum": bool}, each [n]."""
        [words] = view_of(documents.texts, LineWords)
        return {
            "sentences": words.totals(words.sentences).astype(np.int32),
            "has_brace": np.array(["{" in text for text in documents.texts], bool),
            "has_lorem_ipsum": np.array(["lorem ipsum" in text.lower() for text in documents.texts], bool),
        }

    def decide(self, attributes):
        """Returns the first rule that a document breaks."""
        rules = [
            ("lorem ipsum", attributes["has_lorem_ipsum"] & (not self.allow_lorem_ipsum)),
            ("has a brace", attributes["has_brace"] & (not self.allow_braces)),
            ("too few sentences", attributes["sentences"] < self.min_sentences),
        ]
        return first_reason(rules, len(attributes["sentences"]))
