"""What many texts looked at together show of each, against patterns asked everywhere in each text."""

import random
import re

import pytest

from llmos_jax.data.clean import pii_patterns, pii_view
from llmos_jax.data.clean.pii import Pii, scanner
from tests.data.clean import pii_corpus

_PIECES = [
    "12", "3", "4567890", "\u0664\u0661", "\uff11", " ", "\u00a0", "\u2013", "-", ".", "\n", "(", "[at]", "( at )", " AT ",
    "%40", "&#64;", "ABCDE", "f", "é", "😀", "\ud800", "İ", "straße 12", "Lange Gracht 3/4", "12 Old Mill Road",
    "5 bis, rue de la Paix", "Via Roma, 7", "C/ Mayor 12", "Piazza San Marco n. 3", "x" * 25, "a\x1fb" * 12, "?" * 21, "",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(3)
    made = ["".join(rng.choices(_PIECES, k=rng.randrange(40))) for _ in range(600)]
    return made + [text for _, _, text in pii_corpus.personal(seed=3, count=20)]


def _starts(pattern, text, flags=0):
    return {match.start() for match in re.finditer(f"(?={pattern.pattern})", text, pattern.flags | flags)}


def test_views_show_all_places_where_something_begins(texts, monkeypatch):
    monkeypatch.setattr(pii_view, "_PIECE", 500)
    views = list(pii_view.views(texts))
    assert len(views) == len(texts)
    for text, view in zip(texts, views, strict=True):
        assert view.text == pii_view.plain(text)
        assert view.lowered == re.sub(r"[^\x00-\x7f]", "?", view.text).lower()
        assert view.runs == [match.span() for match in pii_view._RUN.finditer(view.text)]
        assert view.behind_capitals == [match.start() for match in re.finditer(r"[0-9](?<=[A-Z]{5}.)", view.text)]
        assert set(view.numbers) >= _starts(pii_patterns._NUMBERED, view.text)
        assert set(view.romance) >= _starts(pii_patterns._ROMANCE, view.text)
        assert set(view.brackets) >= _starts(pii_patterns._SPELT_AT, view.lowered)
        ends = {start for start in _starts(pii_patterns._HOUSE_NUMBER, view.text)
                if view.text[:start].endswith(pii_patterns._GERMANIC_ENDS)}  # fmt: skip
        assert {place - 1 for place in view.street_numbers} >= ends
        assert all(word in view.long_words for word in re.findall(r"[!-~]{20,}", view.text))
        assert len(view.long_words) <= len(text)


def test_few_places_are_shown_where_nothing_begins():
    (view,) = pii_view.views(["The quick brown fox (a fox) jumps (3 times) across lazy dogs: 1,000 times more. " * 100])
    assert not (view.runs or view.behind_capitals or view.long_words or view.brackets or view.street_numbers or view.romance)


def test_neighbours_change_nothing(texts):
    scan = scanner(Pii())
    assert list(scan.find_all(texts)) == [scan.find(text) for text in texts]
    assert list(scan.find_all([])) == [] and list(scan.find_all(["", "bob@site.org", ""]))[::2] == [[], []]
