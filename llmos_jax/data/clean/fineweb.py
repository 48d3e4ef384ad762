"""The rules that FineWeb adds to Gopher's and C4's (Penedo et al., 2024, arXiv 2406.17557)."""

import dataclasses

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.characters import mixed
from llmos_jax.data.clean.gopher import first_reason, ratio
from llmos_jax.data.clean.lines import LineHashes, Lines
from llmos_jax.data.clean.repeats import repeated
from llmos_jax.data.clean.steps import Filter, register, threshold
from llmos_jax.data.clean.views import view_of
from llmos_jax.data.clean.words import Words


@register
@dataclasses.dataclass(frozen=True)
class FinewebQuality(Filter):
    """Documents whose lines look like prose: they end in punctuation, are long, different, and hold several words."""

    step: str = setting("fineweb_quality", help="step", choices=("fineweb_quality",))
    short_line: int = setting(30, help="characters up to which a line is short", at_least=0)
    min_punctuated_lines: float = threshold(0.12, help="smallest share of lines that end a sentence", at_least=0, at_most=1)
    max_short_lines: float = threshold(0.67, help="largest share of short lines", at_least=0, at_most=1)
    max_duplicate_characters: float = threshold(0.01, help="most characters in repeated lines", at_least=0, at_most=1)
    max_newline_ratio: float = threshold(0.3, help="most newlines per word", at_least=0)

    def annotate(self, documents, findings=None):
        """Returns shares of lines and characters; blank lines count only as newlines."""
        texts = documents.texts
        lines, hashes, words = view_of(texts, Lines, LineHashes, Words)
        some = lines.words > 0
        count = lines.totals(some)
        document = lines.documents
        again = np.zeros(len(some), bool)
        again[some] = repeated(hashes.values[some] ^ mixed(document[some]))
        return {
            "punctuated_lines": ratio(lines.totals(lines.ends_sentence & some), count),
            "short_lines": ratio(lines.totals((lines.lengths <= self.short_line) & some), count),
            "duplicate_characters": ratio(lines.totals(np.where(again, lines.lengths, 0)), lines.totals(lines.lengths)),
            "newline_ratio": ratio(np.diff(lines.first) - 1, np.diff(words.first)),
        }

    def decide(self, attributes):
        """Returns the first rule that a document breaks."""
        rules = [
            ("few lines end a sentence", attributes["punctuated_lines"] < self.min_punctuated_lines),
            ("many short lines", attributes["short_lines"] > self.max_short_lines),
            ("repeats lines", attributes["duplicate_characters"] > self.max_duplicate_characters),
            ("few words a line", attributes["newline_ratio"] > self.max_newline_ratio),
        ]
        return first_reason(rules, len(attributes["newline_ratio"]))
