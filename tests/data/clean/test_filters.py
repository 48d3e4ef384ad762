"""Filters and transforms other than the published rules: what each finds, and what it refuses."""

import json
import pathlib

import numpy as np
import pytest

from llmos_jax.data.clean import classifier as classifier_lib
from llmos_jax.data.clean.augment import AugmentConfig, augment
from llmos_jax.data.clean.boilerplate import Boilerplate
from llmos_jax.data.clean.c4 import C4Lines
from llmos_jax.data.clean.code import CodeQuality
from llmos_jax.data.clean.decontaminate import Decontaminate
from llmos_jax.data.clean.documents import Documents
from llmos_jax.data.clean.language import Language
from llmos_jax.data.clean.normalise import Normalise
from llmos_jax.data.clean.pii import Pii
from llmos_jax.data.clean.sample import Sample
from llmos_jax.data.clean.steps import Filter, apply_step, parse_steps, step_class, step_names
from llmos_jax.data.clean.url import Url, host_of
from llmos_jax.errors import ConfigError, DataError

PROSE = "The river ran past the mill, and the miller sat by the door with his hat in his hands. "


def reasons(step, texts, metadata=None):
    return apply_step(step, [Documents.of(texts, metadata=metadata)])[0][1].tolist()


def transformed(step, texts):
    return apply_step(step, [Documents.of(texts)])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text\nof lines", "plain text\nof lines"),
        ("a\r\nb\rc\x0bd\x0ce\u2028f", "a\nb\nc\nd\ne\nf"),
        ("trailing  \t\nblanks\t", "trailing\nblanks"),
        ("\x00a\x00b\x1b\x7fc \x1fd\x00\n\x00", "a\tb\tc d"),
        ("é\x00b\x1b\u200b\x7fc \x1fd", "é\tb\tc d"),
        ("so\xadft wo\u2060rd a\u200c\u200db f\u2061(x)", "soft word a\u200c\u200db f(x)"),
        ("1\u200b+2 a\u200bb \u200bc jane\u200b@\u200ba\u200b.b ไทย\u200bคำ 1\ufeff2", "1\t+2 a\tb c jane@a.b ไทยคำ 1\t2"),
        ("1\u200f\u200e2 a\u200e, \u202ab\u202c. 3\u2069+4", "1\t2 a, b. 3\t+4"),
        ("e\u0301\u200b\ufeff\xad\xa0x", "\xe9 x"),
        ("a\n\n\n\n\n\nb\n\n", "a\n\n\nb"),
        ("\ud800x", "\ufffdx"),
        ("", ""),
    ],
)
def test_normal_form(text, expected):
    step = Normalise()
    assert step.normalised(text) == expected
    assert step.normalised(expected) is expected


def test_what_parts_fields_parts_them_still():
    """Fused fields are no personal data to anybody who looks for it afterwards."""
    hidden = ["\x01", "\x1f", "\x00\x02", "\x7f", "\u200b", "\u200b\u200e", "\u200e", "\u200f\x01", "\ufeff"]
    for part in hidden:
        for sign in ("", "é "):
            data = ["Jane", "jane.roe@company.com", "4155552671", "+14155552671", "4111111111111111", "17"]
            new = Normalise().normalised(sign + part.join(data))
            assert new == sign + "\t".join(data)
            assert Pii().protect([new]) == [sign + "Jane\t[EMAIL]\t4155552671\t[PHONE]\t[CREDIT_CARD]\t17"]
    new = Normalise().normalised("4111 1111 1111 1111\xb3 415-555-2671\xb9")
    assert Pii().protect([new]) == ["[CREDIT_CARD]\xb3 [PHONE]\xb9"]


def test_normal_form_by_settings():
    assert Normalise(form="NFKC").normalised("ﬁne①") == "fine1"
    assert Normalise(form="none").normalised("e\u0301") == "e\u0301"
    assert Normalise(collapse_spaces=True).normalised("  a  \t b") == "  a b"
    assert Normalise(drop_invisible=False).normalised("a\x00b\u200b") == "a\x00b\u200b"
    texts, attributes, _ = transformed(Normalise(), ["same", "not \n"])
    assert texts == ["same", "not"] and attributes["changed"].tolist() == [False, True]


def test_lines_of_c4():
    text = f"{PROSE}\nMenu\nToo short.\n\nPlease enable Javascript to see it.\nIt was so [12].\nRead our privacy policy today."
    texts, attributes, removed = transformed(C4Lines(), [text, PROSE])
    assert texts == [f"{PROSE}\nIt was so .", PROSE]
    assert attributes["lines"].tolist() == [5, 0] and attributes["citations"].tolist() == [1, 0]
    assert removed == ["[12]\nMenu\nToo short.\n\nPlease enable Javascript to see it.\nRead our privacy policy today.", None]
    assert transformed(C4Lines(), ["It was so [edit], I think[3]."])[::2] == (["It was so , I think."], ["[edit] [3]"])
    assert transformed(C4Lines(needs_end_mark=False, min_words=1), ["Menu\n\nx"])[0] == ["Menu\nx"]
    assert transformed(C4Lines(max_word_length=5), ["one two threes.\nand so on."])[0] == ["and so on."]


def test_language():
    texts = [
        PROSE * 3,
        "Der Fluss floss an der Mühle vorbei, und der Müller saß vor der Tür und hielt seinen Hut. " * 2,
        "",
        "12 34",
    ]
    attributes, _ = apply_step(Language(), [Documents.of(texts)])[0]
    assert attributes["language"][:2].tolist() == ["en", "de"] and (attributes["score"][:2] > 0.9).all()
    assert reasons(Language(languages=("en",)), texts)[:2] == ["", "another language"]
    assert reasons(Language(min_score=1.0), ["ok"]) == ["language unclear"]
    long = "a" * 400 + "b" * 400
    assert Language(characters=100).sample(long) == "a" * 50 + " " + "b" * 50
    with pytest.raises(ConfigError, match="klingon"):
        Language(languages=("klingon", "en"))


def test_languages_are_those_that_py3langid_finds_text_by_text():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    documents = [json.loads(line)["text"] for line in (pathlib.Path(__file__).parent / "agreement.jsonl").open()]
    others = ["Der Müller saß vor der Tür.", "Le meunier était assis devant la porte.", "Мельник сидел у двери."]
    texts = [*documents, *others, "磨坊主坐在门口。", "", "?", "LOUD TEXT", "\ud800 half", "e\u0301", "\u4f60\u597d", "12 34"]
    samples = [Language().sample(text) for text in texts]
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    languages, scores = zip(*map(model.classify, samples), strict=True)
    attributes, _ = apply_step(Language(), [Documents.of(texts)])[0]
    assert attributes["language"].tolist() == list(languages) and len(set(languages)) > 5
    np.testing.assert_allclose(attributes["score"], scores, atol=1e-4)


def test_samples_hang_on_keys_alone():
    documents = Documents([f"{source}/{n}" for source in ("a", "b") for n in range(2000)], ["text"] * 4000, [{}] * 4000)

    def kept(chosen=documents, **choices):
        ((_, reasons),) = apply_step(Sample(**choices), [chosen])
        return {key for key, reason in zip(chosen.keys, reasons, strict=True) if not reason}

    small, large = kept(share=0.1), kept(share=0.3)
    assert small < large and abs(len(small) - 400) < 80 and abs(len(large) - 1200) < 120
    part = documents.select(np.arange(4000) % 3 == 0)
    assert kept(part, share=0.1) == small & set(part.keys)
    assert len(kept(share=0.1, seed=1) & small) < 100
    of_one = kept(share=0.1, sources=("b",))
    assert {key for key in of_one if key[0] == "a"} == set(documents.keys[:2000])
    assert {key for key in of_one if key[0] == "b"} == {key for key in small if key[0] == "b"}
    assert len(kept(share=1.0)) == 4000 and not kept(share=0.0)


def test_url(tmp_path):
    domains, words = tmp_path / "domains", tmp_path / "words"
    domains.write_text("# bad ones\nbad.example\n\nevil.org # too\n")
    words.write_text("Casino\nlottery\n")
    step = Url(domains=str(domains), words=str(words))
    urls = [
        "https://www.bad.example/x",
        "http://a.b.evil.org:80/",
        "https://notbad.example.com/",
        "https://ok.org/my-casino/",
        None,
    ]
    expected = ["blocked domain", "blocked domain", "", "blocked word in the address", ""]
    assert reasons(step, ["x"] * 5, [{"url": url} for url in urls]) == expected
    assert reasons(Url(needs_url=True), ["x"], [{}]) == ["no address"]
    before = step.fingerprint
    domains.write_text("other.example\n")
    assert step.fingerprint != before
    assert host_of("HTTP://User@WWW.A.org.:8/b".lower()) == "a.org" and host_of("http://[bad") == ""
    with pytest.raises(ConfigError, match="missing"):
        reasons(Url(words=str(tmp_path / "missing")), ["x"])
    words.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="no entry"):
        from llmos_jax.data.clean.lists import read_list

        read_list.cache_clear()
        read_list(str(words))


def test_code():
    good = "def area(width, height):\n    return width * height\n"
    texts = [
        good,
        good * 40 + "x = '" + "a" * 1500 + "'\n",
        "# @generated by a tool, do not edit\n" + good,
        "1, 2, 3\n" * 30,
        good + "\n".join("x = '" + "QUJD" * 60 + "'" for _ in range(3)),
        "",
        "a" * 200 + "\n" + "b c" * 30,
    ]
    expected = ["", "a very long line", "generated", "few letters", "long lines", "few letters", "long lines"]
    assert reasons(CodeQuality(), texts) == expected
    assert reasons(CodeQuality(max_line_length=2000), [texts[1]]) == ["a long stretch of encoded data"]
    assert reasons(CodeQuality(max_mean_line_length=1000), [texts[4]]) == ["much encoded data"]
    assert reasons(CodeQuality(max_lines=1, keep_generated=True), [texts[2]]) == ["too many lines"]


def test_boilerplate():
    kept = f"{PROSE}\n\nChapter one\nSIGN IN to the house that stood above the river in those days, they said"
    text = f"Home\nSign in!\n{kept}\n12 345\n3.2k likes\nREAD THIS NOW\n- Next »"
    texts, attributes, removed = transformed(Boilerplate(), [text, PROSE])
    assert texts == [kept, PROSE] and attributes["lines"].tolist() == [6, 0]
    assert removed[0] == "Home\nSign in!\n12 345\n3.2k likes\nREAD THIS NOW\n- Next »"


def test_decontamination(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    question = "Which of the following planets in our solar system is known to have the most moons of all?"
    short = "name the capital of the northern kingdom of fools"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in (question, short, "too short")))
    step = Decontaminate(paths=(str(path),), text_key="question")
    clean = "which of the following planets in our solar system is largest, and why is that so?"
    texts = [f"x {question.upper().replace('?', '!')} y", clean, f"Please, {short}.", "too short", ""]
    assert reasons(step, texts) == ["overlaps an evaluation text", "", "overlaps an evaluation text", "", ""]
    attributes, _ = apply_step(step, [Documents.of(texts)])[0]
    assert attributes["matches"].tolist() == [18 - 12, 0, 1, 0, 0]
    assert reasons(Decontaminate(paths=(str(path),), text_key="question", max_matches=2), texts)[2] == ""
    before = step.fingerprint
    path.write_text(json.dumps({"question": "short again"}) + "\n")
    assert step.fingerprint != before
    with pytest.raises(DataError, match="has 8 words"):
        reasons(step, texts)


def test_classifier(tmp_path):
    random = np.random.default_rng(0)
    vocabularies = [["river", "mill", "door", "miller", "hat", "house"], ["click", "buy", "cheap", "offer", "now", "best"]]
    good, bad = ([" ".join(random.choice(words + ["the", "and"], 30)) for _ in range(40)] for words in vocabularies)
    config = classifier_lib.ClassifierConfig(bits=12)
    model = classifier_lib.train(good[:30], bad[:30], config)
    assert model.scores(good[30:]).min() > 0.5 > model.scores(bad[30:]).max()
    again = classifier_lib.train(good[:30], bad[:30], config)
    np.testing.assert_array_equal(model.weights, again.weights)
    # A row of features is the direction of the logarithms of counts.
    row = classifier_lib.features(["mill mill door"], classifier_lib.ClassifierConfig(bits=12, ngrams=(1,)))
    np.testing.assert_allclose(sorted(row.data), np.log1p([1, 2]) / np.linalg.norm(np.log1p([1, 2])))
    path = tmp_path / "quality.json"
    model.save(path)
    step = parse_steps([{"step": "quality_classifier", "path": str(path), "min_score": 0.5}])[0]
    assert reasons(step, [good[31], bad[31], ""])[:2] == ["", "low quality"]
    np.testing.assert_array_equal(step.annotate(Documents.of(good))["score"], model.scores(good))
    path.write_text(path.read_text().replace('"bias": ', '"bias": 1'))
    with pytest.raises(DataError, match="quality.json"):
        classifier_lib.Classifier.load(path)
    with pytest.raises(DataError, match="0 good ones"):
        classifier_lib.train([], bad)
    with pytest.raises(ConfigError, match="no file"):
        classifier_lib.QualityClassifier(path=str(tmp_path / "missing"))


def test_gradient_of_the_classifier_ends_at_zero():
    texts = ["a b c", "a d e", "f g h", "f c e"]
    config = classifier_lib.ClassifierConfig(bits=8, ngrams=(1,), l2=0.01)
    model = classifier_lib.train(texts[:2], texts[2:], config)
    inputs, signs = classifier_lib.features(texts, config).toarray(), np.array([1, 1, -1, -1])
    slope = -signs * 0.25 / (1 + np.exp(signs * (inputs @ model.weights + model.bias)))
    np.testing.assert_allclose(inputs.T @ slope + config.l2 * model.weights, 0, atol=1e-5)


def test_augmentation():
    documents = Documents.of([PROSE * 5 + "\n\n    indented words here", "x", "second text of several words"])
    config = AugmentConfig(copies=2, drop=0.1, swap=0.1, typo=0.1)
    found = augment(documents, config)
    assert found.keys[:2] == ["memory:0#noise0", "memory:0#noise1"] and found.texts[0] != found.texts[1]
    assert all(text.count("\n") == documents.texts[0].count("\n") for text in found.texts[:2])
    assert found.metadata[0] == {"augmented": "noise0", "original": "memory:0"}
    shared = set(found.texts[0].split()) & set(PROSE.split())
    assert len(shared) > 10
    # What becomes of a document does not depend on its neighbours.
    alone = augment(documents.select(np.array([False, False, True])), config)
    assert alone.texts == found.texts[-len(alone.texts) :]
    assert len(augment(documents, AugmentConfig(drop=0, swap=0, typo=0))) == 0
    back = augment(
        documents, AugmentConfig(copies=0), translate=lambda texts: [text.replace("river", "stream") for text in texts]
    )
    assert back.keys == ["memory:0#translated"] and "stream" in back.texts[0]
    with pytest.raises(DataError, match="returned 0 texts for 3"):
        augment(documents, translate=lambda texts: [])


NEEDS_SETTINGS = {"decontaminate", "quality_classifier"}


@pytest.mark.parametrize("name", [name for name in step_names() if name not in NEEDS_SETTINGS and not name.startswith("pii")])
def test_every_step_takes_empty_shards_and_odd_texts_and_looks_at_each_document_alone(name):
    step = step_class(name)()
    odd = ["", " ", "\n\n", "…", "\ud800", "a" * 5000, "{" * 50, "漢字。" * 40, PROSE * 8, "\u0130\u0130 İ", "x\ty"]
    apply_step(step, [Documents.of([])])
    documents = Documents.of(odd)
    whole = apply_step(step, [documents])[0]
    if step.is_global:
        return
    for number in range(len(odd)):
        part = apply_step(step, [documents.select(np.arange(len(odd)) == number)])[0]
        if isinstance(step, Filter):
            assert part[1][0] == whole[1][number]
            assert {key: values[0] for key, values in part[0].items()} == {k: values[number] for k, values in whole[0].items()}
        else:
            assert part[0][0] == whole[0][number] and part[2][0] == whole[2][number]
