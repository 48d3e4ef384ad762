"""Duplicates: the LSH curve on planted pairs, the same groups for any order and any cut into shards, paragraphs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data.clean.dedup import ExactDuplicates, MinhashDuplicates, components, curve
from llmos_jax.data.clean.documents import Documents
from llmos_jax.data.clean.paragraphs import RepeatedParagraphs, split
from llmos_jax.data.clean.steps import apply_step, sort_records
from llmos_jax.data.clean.views import view_of
from llmos_jax.data.clean.words import Words


def decide(step, shards):
    """Returns [number of the document that each is a duplicate of, -1: kept] over all shards."""
    distance = np.concatenate([attributes["distance"] for attributes, _ in apply_step(step, shards)])
    return np.where(distance > 0, np.arange(len(distance)) - distance, -1).tolist()


def groups_of(texts, duplicate_of):
    """Returns the groups as sets of texts."""
    found = {}
    for number, first in enumerate(duplicate_of):
        found.setdefault(first if first >= 0 else number, set()).add(texts[number])
    return {frozenset(group) for group in found.values() if len(group) > 1}


def jaccard(one, two, n=5):
    grams = [{tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (one.split(), two.split())]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def planted(similarity, random, pairs=1200, length=160):
    """Returns (texts: each with its copy next to it, mean Jaccard similarity of the pairs): copies have one end replaced."""
    texts, found = [], []
    for pair in range(pairs):
        words = [f"w{pair}x{word}" for word in random.integers(10**9, size=2 * length)]
        shared = length - 4 - round((length - 4) * (1 - similarity) / (1 + similarity))
        one, two = words[:length], words[: shared + 4] + words[length + shared + 4 :]
        texts += [" ".join(one), " ".join(two)]
        found.append(jaccard(*texts[-2:]))
    return texts, float(np.mean(found))


@pytest.mark.parametrize("similarity", [0.6, 0.7, 0.8, 0.9, 1.0])
def test_recall_of_planted_duplicates_follows_the_curve(similarity):
    texts, exact = planted(similarity, np.random.default_rng(int(similarity * 10)))
    assert abs(exact - similarity) < 0.01
    step = MinhashDuplicates()
    found = np.array(decide(step, [Documents.of(texts)]))
    recall = np.mean(found[1::2] == np.arange(0, len(texts), 2))
    assert abs(recall - curve(exact, step.bands, step.rows)) <= 0.03
    assert (found[::2] == -1).all()


def test_similar_text_is_words_in_any_case_without_punctuation():
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    others = [
        text.upper(),
        text.replace(",", ";"),
        f"{text}!",
        "one two three four five six",
        "one two",
        "One, two!",
        "",
        "...",
    ]
    assert decide(MinhashDuplicates(), [Documents.of([text, *others])]) == [-1, 0, 0, 0, -1, -1, 5, -1, -1]


WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=14, unique=True), st.randoms(use_true_random=False), st.integers(1, 5))
def test_groups_depend_on_the_set_of_documents_only(texts, random, shards):
    # Few rows, so that much meets by chance and groups are chains.
    step = MinhashDuplicates(bands=4, rows=2, ngram=2)
    found = decide(step, [Documents.of(texts)])
    cuts = sorted(random.randrange(len(texts) + 1) for _ in range(shards - 1))
    parts = [texts[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(texts)], strict=True)]
    assert decide(step, [Documents.of(part) for part in parts]) == found
    shuffled = random.sample(texts, len(texts))
    assert groups_of(shuffled, decide(step, [Documents.of(shuffled)])) == groups_of(texts, found)
    # Ranges of hashes are reduced one by one, whatever their number.
    records = sort_records(step.emit(Documents.of(texts)))
    ranges = [records[records["hash"] % np.uint64(shards) == number] for number in range(shards)]
    findings = step.finish(np.concatenate([step.reduce(part) for part in ranges]), len(texts))
    whole = step.finish(step.reduce(records), len(texts))
    assert findings.tolist() == whole.tolist()
    later = whole[whole["distance"] > 0]
    assert dict(zip(later["document"].tolist(), (later["document"] - later["distance"]).tolist(), strict=True)) == {
        number: first for number, first in enumerate(found) if first >= 0
    }
    kept = whole["document"][whole["distance"] == 0]
    assert {int(number) for number in kept} == {first for first in found if first >= 0}


def test_components_are_those_of_a_naive_search():
    random = np.random.default_rng(0)
    edges = np.zeros(60, [("document", np.int64), ("kept", np.int64)])
    edges["document"], edges["kept"] = random.integers(100, size=(2, 60)) * 10**12
    label = {node: node for node in {*edges["document"].tolist(), *edges["kept"].tolist()}}
    for _ in range(100):
        for one, two in edges.tolist():
            label[one] = label[two] = min(label[one], label[two])
    sizes = {first: list(label.values()).count(first) for first in label.values()}
    expected = sorted((node, node - first, sizes[first]) for node, first in label.items())
    assert components(edges).tolist() == expected


def test_exact_duplicates_across_and_within_sources():
    one = Documents(["a/1", "a/2", "a/3"], ["Same  text", "other", "same text"], [{}] * 3)
    two = Documents(["b/1", "b/2"], ["SAME text ", "Other"], [{}] * 2)
    assert decide(ExactDuplicates(), [one, two]) == [-1, -1, 0, 0, 1]
    assert decide(ExactDuplicates(scope="source"), [one, two]) == [-1, -1, 0, -1, -1]
    assert decide(ExactDuplicates(ignore_case_and_blanks=False), [one, two]) == [-1] * 5
    assert decide(MinhashDuplicates(scope="source"), [one, two]) == [-1, -1, 0, -1, -1]
    reasons = [reason for _, found in apply_step(ExactDuplicates(), [one, two]) for reason in found.tolist()]
    assert reasons == ["", "", "duplicate", "duplicate", "duplicate"]


def test_shingles_are_the_ngrams_of_words():
    hashes, offsets, chosen = MinhashDuplicates().shingles(["a b c d e fig.", "", "a b", "B, C d e fig"])
    assert chosen.tolist() == [0, 2, 3] and offsets.tolist() == [0, 2, 3, 4]
    assert hashes[1] == hashes[3] and len(set(hashes.tolist())) == 3
    assert len(view_of(["a b"], Words)[0].lengths) == 2


PARAGRAPH = "All rights are reserved by the people who wrote this, whoever they may be."


def paragraphs(step, texts, cut):
    shards = [Documents.of(texts[:cut]), Documents.of(texts[cut:])]
    results = apply_step(step, shards)
    return [text for result in results for text in result[0]], [item for result in results for item in result[2]]


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_repeated_paragraphs_are_cut_out_but_for_the_first(cut):
    texts = [
        f"One.\n\n{PARAGRAPH}\n\nTwo.",
        f"{PARAGRAPH.upper()}\n\nThree.",
        f"Four.\n \n{PARAGRAPH}\n\n{PARAGRAPH}",
        "One.\n\nx",
    ]
    step = RepeatedParagraphs(min_characters=20)
    found, removed = paragraphs(step, texts, cut)
    assert found == [texts[0], "Three.", "Four.", texts[3]]
    assert removed == [None, PARAGRAPH.upper(), f"{PARAGRAPH}\n{PARAGRAPH}", None]
    twice, _ = paragraphs(RepeatedParagraphs(min_characters=20, copies=2), texts, cut)
    assert twice == [texts[0], texts[1], "Four.", texts[3]]
    assert paragraphs(RepeatedParagraphs(min_characters=200), texts, cut)[0] == texts


def test_repeated_lines_and_sentences():
    texts = [
        "a long enough line\nmine\na long enough line\nyours",
        "A sentence that repeats. Mine. A sentence that repeats. End",
    ]
    lines, _ = paragraphs(RepeatedParagraphs(unit="line", min_characters=10), texts, 1)
    assert lines == ["a long enough line\nmine\nyours", texts[1]]
    sentences, removed = paragraphs(RepeatedParagraphs(unit="sentence", min_characters=20), texts, 1)
    assert sentences == [texts[0], "A sentence that repeats. Mine. End"]
    assert removed == [None, "A sentence that repeats."]


def test_repeated_passages_are_cut_out_wherever_they_stand():
    random = np.random.default_rng(0)
    passage, *others = (" ".join(f"word{word}" for word in random.integers(10**6, size=600)) for _ in range(5))
    texts = [f"{others[0]} {passage}\n\n{others[1]}", f"{others[2]}\n{passage} {others[3]}"]
    assert all("".join(split(text, "passage")) == text for text in texts)
    found, removed = paragraphs(RepeatedParagraphs(unit="passage"), texts, 1)
    assert found[0] == texts[0]
    # Both ends of what was copied lie in passages with their surroundings.
    assert 0.6 < len(removed[1]) / len(passage) <= 1 and removed[1].split()[0] in passage
    assert all(word in found[1].split() for text in others[2:] for word in text.split())
