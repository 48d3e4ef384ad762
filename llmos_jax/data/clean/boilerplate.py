"""Lines that are no part of a text: menus, counters, shouting, calls to click (RefinedWeb, Penedo et al., 2023, table 10)."""

import dataclasses
import re

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.c4 import keep_lines
from llmos_jax.data.clean.lines import Lines
from llmos_jax.data.clean.steps import Transform, register
from llmos_jax.data.clean.views import view_of

_COUNTER = re.compile(
    r"\s*[\d.,]+[km]?\s*(?:likes?|shares?|comments?|retweets?|reposts?|views?|followers?|replies|reply|votes?)\W*", re.I
)
NAVIGATION = (
    "sign in", "sign up", "log in", "subscribe", "read more", "continue reading", "share this", "click here", "skip to content",
    "back to top", "next", "previous", "home", "share", "menu", "search", "items in cart", "add to cart", "advertisement",
)  # fmt: skip


@register
@dataclasses.dataclass(frozen=True)
class Boilerplate(Transform):
    """Cuts out short lines that are navigation, counters, numbers only, or mostly capitals."""

    step: str = setting("boilerplate", help="step", choices=("boilerplate",))
    max_words: int = setting(10, help="lines of more words are left alone", at_least=1)
    phrases: tuple[str, ...] = setting(NAVIGATION, help="lines that are just this go, in lower case, end marks aside")
    max_capitals: float = setting(0.5, help="largest share of capitals among a line's letters", at_least=0, at_most=1)
    min_letters: int = setting(1, help="fewest letters of a line", at_least=0)

    def transform(self, documents, findings=None):
        """Returns (texts, {"lines": how many went, int32 [n]}, the lines)."""
        texts, phrases = documents.texts, frozenset(self.phrases)
        [lines] = view_of(texts, Lines)
        is_short = (lines.words > 0) & (lines.words <= self.max_words)
        keep = np.ones(len(is_short), bool)
        # Lines are looked at one by one, but each distinct one only once.
        verdicts = {}
        for document, text in enumerate(texts):
            first = lines.first[document]
            parts = text.split("\n")
            for place in np.flatnonzero(is_short[first : lines.first[document + 1]]).tolist():
                line = parts[place]
                if line not in verdicts:
                    verdicts[line] = self.is_text(line, phrases)
                keep[first + place] = verdicts[line]
        texts, dropped, removed = keep_lines(texts, lines, keep)
        return texts, {"lines": dropped}, removed

    def is_text(self, line, phrases):
        """Whether a short line may stay."""
        letters = sum(map(str.isalpha, line))
        if letters < self.min_letters or _COUNTER.fullmatch(line):
            return False
        if sum(map(str.isupper, line)) > self.max_capitals * letters:
            return False
        return line.lower().strip(" \t.!:»›>…|•-") not in phrases
