"""Words, lines and repeats in arrays, against plain Python on strings."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data.clean import characters
from llmos_jax.data.clean import words as words_lib
from llmos_jax.data.clean.characters import hash_of
from llmos_jax.data.clean.lines import LineHashes, Lines, LineWords, terminals
from llmos_jax.data.clean.repeats import ngram_hashes, repeated, repetition
from llmos_jax.data.clean.views import Views, view_of
from llmos_jax.data.clean.words import FoldedHashes, WordHashes, Words

TEXTS = st.text(alphabet="aAbZé漢 \n\t.,-'\"#…•!?(1", max_size=60)


def split(text):
    """The words of a text as strings, from the lengths that `words_of` found."""
    rest, found = "".join(text.split()), []
    for length in view_of([text], Words)[0].lengths.tolist():
        found.append(rest[:length])
        rest = rest[length:]
    assert not rest
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \n ", ""),
        ('Say "hello,world" (now)!', 'Say|"|hello|,|world|"|(|now|)|!'),
        ("don't it's we'll I'd can't o'clock", "do|n't|it|'s|we|'ll|I|'d|ca|n't|o'clock"),
        ("state-of-the-art x86-64 -c --all 1-2", "state|-|of|-|the|-|art|x86|-|64|-c|--all|1|-|2"),
        ("end. J. Smith, e.g. wait...what 3.14 fin.Start", "end|.|J.|Smith|,|e.g.|wait|...|what|3.14|fin|.|Start"),
        ("see http://a.org/b-c.html. and a/b", "see|http://a.org/b-c.html|.|and|a|/|b"),
        ("f(x) foo_bar __init__ '**'", "f(x|)|foo_bar|_|_|init|_|_|'|*|*|'"),
        ("5m of 10MB, 12x", "5|m|of|10|MB|,|12x"),
        ("=== --- ***", "=|=|=|---|*|*|*"),
        ("naïve—dash 漢字。", "naïve|—|dash|漢字|。"),
    ],
)
def test_words_are_those_of_spacys_rules(text, expected):
    assert split(text) == [word for word in expected.split("|") if word]


def test_kinds_of_words():
    [words] = view_of(["Ab1 , 42 §a"], Words)
    assert words.lengths.tolist() == [3, 1, 2, 1, 1]
    assert words.has_letter.tolist() == [True, False, False, False, True]
    assert words.is_sign.tolist() == [False, True, False, False, False]


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, max_size=6))
def test_equal_words_and_only_these_have_equal_hashes(texts):
    strings = [word for text in texts for word in split(text)]
    words, hashes, folded = view_of(texts, Words, WordHashes, FoldedHashes)
    assert words.first.tolist() == np.cumsum([0, *(len(split(text)) for text in texts)]).tolist()
    for found, known in ((hashes, strings), (folded, [word.lower() for word in strings])):
        assert len(set(zip(found.values.tolist(), known, strict=True))) == len(set(known)) == len(set(found.values.tolist()))
    assert [hash_of(word) for word in strings] == hashes.values.tolist()


KINDS = (Words, WordHashes, FoldedHashes, Lines, LineWords, LineHashes)


def assert_same(left, right):
    for field in dataclasses.fields(left):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name), field.name)


def test_batches_and_chosen_texts_change_nothing(monkeypatch):
    texts = [f"Word number {number}: the cat's {number}-fold.\n\n" * (number % 5) for number in range(40)]
    whole = Views()(texts, *KINDS)
    monkeypatch.setattr(characters, "BATCH_CHARACTERS", 100)
    held = Views()
    for found, expected in zip(held(texts, *KINDS), whole, strict=True):
        assert_same(found, expected)
    # Some of them, in another order, are taken from what is held; the same text twice is no confusion.
    for some in ([texts[7], texts[3], texts[12]], [texts[4]] * 3, []):
        for found, expected in zip(held(some, *KINDS), Views()(some, *KINDS), strict=True):
            assert_same(found, expected)
    [thrice], [once] = held([texts[4]] * 3, WordHashes), held([texts[4]], WordHashes)
    assert len(thrice.values) == 3 * len(once.values) > 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.lists(st.sampled_from(["a b", "A\n", "", "c, d"])), st.lists(st.sampled_from(KINDS))), max_size=6))
def test_what_was_asked_before_changes_nothing(asked):
    held = Views()
    for texts, kinds in asked:
        for found, expected in zip(held(texts, *kinds), Views()(texts, *kinds), strict=True):
            assert_same(found, expected)


def test_texts_are_looked_at_once_and_only_for_what_is_asked(monkeypatch):
    seen = []
    for kind in (Words, Lines):
        find = kind.find.__func__
        monkeypatch.setattr(kind, "find", classmethod(lambda cls, batch, find=find: seen.append(cls) or find(cls, batch)))
    held, texts = Views(), ["a b", "c\nd"]
    held(texts, Words)
    held(texts[:1], Words, Lines)
    assert seen == [Words, Lines]
    held(texts, Lines)  # of the other text they are not known
    held(texts, Lines)
    assert seen == [Words, Lines, Lines]


def test_threads_do_not_see_each_others_views():
    held = Views()

    def look(number):
        texts = [f"{number} " * (number + 1), f"word{number}\nline"] * 2
        for _ in range(20):
            for found, expected in zip(held(texts, *KINDS), Views()(texts, *KINDS), strict=True):
                assert_same(found, expected)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(look, range(16)))


def test_long_texts_are_looked_at_in_pieces(monkeypatch):
    texts = ["short", "Don't cut words: not 'these' ones.\n" * 40, "x" * 250 + " end", ""]
    whole, whole_hashes = Views()(texts, Words, WordHashes)
    for module in (characters, words_lib):
        monkeypatch.setattr(module, "BATCH_CHARACTERS", 50)
    found, hashes, folded = Views()(texts, Words, WordHashes, FoldedHashes)
    # Only the word that is longer than a piece is cut.
    assert np.diff(found.first).tolist() == (np.diff(whole.first) + [0, 0, 4, 0]).tolist()
    assert found.first.tolist() == hashes.first.tolist() == folded.first.tolist()
    np.testing.assert_array_equal(hashes.values[: found.first[2]], whole_hashes.values[: whole.first[2]])
    assert found.lengths.sum() == whole.lengths.sum() and hashes.values[-1] == whole_hashes.values[-1]


def test_hashes_do_not_depend_on_where_a_word_stands():
    [far] = view_of([" " * 9000 + "word " + "y" * 5000 + " word"], WordHashes)
    assert len(set(far.values[[0, 2]].tolist() + [hash_of("word")])) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=6))
def test_lines_are_those_of_split(texts):
    lines, words, hashes = view_of(texts, Lines, LineWords, LineHashes)
    plain = [line for text in texts for line in text.split("\n")]
    assert lines.first.tolist() == np.cumsum([0, *(text.count("\n") + 1 for text in texts)]).tolist()
    assert lines.lengths.tolist() == [len(line) for line in plain]
    assert lines.words.tolist() == [len(line.split()) for line in plain]
    assert words.longest.tolist() == [max(map(len, line.split()), default=0) for line in plain]
    assert lines.has_bullet.tolist() == [line.strip().startswith(("•", "-")) for line in plain]
    assert lines.has_ellipsis.tolist() == [line.strip().endswith(("...", "…")) for line in plain]
    assert lines.ends_sentence.tolist() == [line.endswith(tuple(terminals())) for line in plain]
    is_end = [line.strip().endswith((".", "?", "!", '"', "'")) and not line.strip().endswith("...") for line in plain]
    assert lines.ends_quoted.tolist() == is_end
    assert len(set(hashes.values.tolist())) == len(set(plain))


def test_sentences_end_within_lines():
    text = 'One. Two! (Three?) "Four." five... six.\n\nSeven e.g. eight'
    assert view_of([text], LineWords)[0].sentences.tolist() == [5, 0, 2]


def naive_top(words, n):
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0
    best = max(grams, key=lambda gram: (grams.count(gram), -grams.index(gram)))
    return len(best) * grams.count(best)


def naive_duplicates(words, n):
    seen, total, place = set(), 0, 0
    while place + n <= len(words):
        gram = tuple(words[place : place + n])
        if gram in seen:
            total += sum(map(len, gram))
            place += n
        else:
            seen.add(gram)
            place += 1
    return total


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=40), max_size=6))
def test_repetition_equals_the_naive_count(documents):
    words, hashes = view_of([" ".join(document) for document in documents], Words, WordHashes)
    top, duplicate = repetition(words, hashes.values, (1, 2, 3), (2, 3, 5))
    for n, found in top.items():
        assert found.tolist() == [naive_top(document, n) for document in documents]
    for n, found in duplicate.items():
        assert found.tolist() == [naive_duplicates(document, n) for document in documents]


def test_repeated_and_ngram_hashes():
    keys = np.array([5, 7, 5, 5, 1, 7], np.uint64) << np.uint64(40)
    assert repeated(keys).tolist() == [False, False, True, True, False, True]
    assert repeated(keys[:0]).tolist() == []
    hashes = view_of(["a b c a b d"], WordHashes)[0].values
    pairs = ngram_hashes(hashes, 2)
    assert pairs[0] == pairs[3] and len(set(pairs.tolist())) == 4
    assert ngram_hashes(view_of(["b a"], WordHashes)[0].values, 2)[0] != pairs[0]
    assert len(ngram_hashes(hashes, 7)) == 0
