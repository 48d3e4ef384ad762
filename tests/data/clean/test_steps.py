"""The contract of steps: registry, settings, fingerprints, and the plain meaning of each kind."""

import dataclasses

import numpy as np
import pytest

from llmos_jax.config import setting, to_plain
from llmos_jax.data.clean import steps as steps_lib
from llmos_jax.data.clean.documents import Documents, check_attributes
from llmos_jax.data.clean.steps import Filter, Global, Transform, apply_step, parse_steps, register, threshold
from llmos_jax.errors import ConfigError


@pytest.fixture(autouse=True)
def steps_of_this_file(monkeypatch):
    steps_lib.step_names()  # the modules of the package register once
    monkeypatch.setattr(steps_lib, "_STEPS", dict(steps_lib._STEPS))
    for cls in (Length, Upper, SameText):
        register(cls)


@dataclasses.dataclass(frozen=True)
class Length(Filter):
    step: str = setting("length_of_test", help="of a test", choices=("length_of_test",))
    unit: str = setting("characters", help="of a test", choices=("characters", "bytes"))
    at_least: int = threshold(3, help="of a test", at_least=0)

    def annotate(self, documents):
        sizes = documents.utf8_bytes if self.unit == "bytes" else [len(text) for text in documents.texts]
        return {"size": np.array(sizes, np.int32)}

    def decide(self, attributes):
        return np.where(attributes["size"] < self.at_least, "too short", "")


@dataclasses.dataclass(frozen=True)
class Upper(Transform):
    step: str = setting("upper_of_test", help="of a test", choices=("upper_of_test",))

    def transform(self, documents):
        texts = [text.upper() for text in documents.texts]
        return texts, {"changed": np.array([a != b for a, b in zip(texts, documents.texts, strict=True)])}, [None] * len(texts)


@dataclasses.dataclass(frozen=True)
class SameText(Global, Filter):
    step: str = setting("same_text_of_test", help="of a test", choices=("same_text_of_test",))

    def emit(self, documents):
        records = np.zeros(len(documents), [("hash", np.uint64), ("document", np.int64)])
        records["hash"] = [int.from_bytes(text.encode()[:8].ljust(8), "big") for text in documents.texts]
        records["document"] = np.arange(len(documents))
        return records

    def reduce(self, records):
        is_again = np.append(False, records["hash"][1:] == records["hash"][:-1])
        found = np.zeros(is_again.sum(), [("document", np.int64)])
        found["document"] = records["document"][is_again]
        return found

    def finish(self, results, count):
        return np.sort(results, order="document")

    def annotate(self, documents, findings):
        is_again = np.zeros(len(documents), bool)
        is_again[findings["document"]] = True
        return {"is_again": is_again}

    def decide(self, attributes):
        return np.where(attributes["is_again"], "again", "")


def test_settings_are_parsed_and_written_back():
    trees = [{"step": "length_of_test", "at_least": 5}, {"step": "upper_of_test"}]
    steps = parse_steps(trees)
    assert steps[0] == Length(at_least=5) and [step.name for step in steps] == ["length_of_test", "upper_of_test"]
    assert parse_steps(to_plain(steps)) == steps


@pytest.mark.parametrize(
    ("trees", "words"),
    [
        ([{"step": "lenght_of_test"}], "did you mean 'length_of_test'"),
        ([{"at_least": 3}], r'steps\[0\] must be .*"step"'),
        ([{"step": "length_of_test", "atleast": 3}], r"'steps\[0\].atleast'; did you mean 'at_least'"),
        ([{"step": "length_of_test", "at_least": -1}], r"steps\[0\].at_least=-1 must be at least 0"),
        ([{"step": "upper_of_test"}, {"step": "upper_of_test"}], r"steps\[1\] has the name 'upper_of_test' of steps\[0\]"),
        ({"step": "upper_of_test"}, "list of steps"),
    ],
)
def test_bad_steps_are_named(trees, words):
    with pytest.raises(ConfigError, match=words):
        parse_steps(trees)


def test_a_label_tells_two_uses_apart():
    trees = [{"step": "length_of_test"}, {"step": "length_of_test", "label": "again", "at_least": 9}]
    assert [step.name for step in parse_steps(trees)] == ["length_of_test", "again"]


def test_thresholds_and_labels_do_not_change_what_is_found():
    plain = Length()
    assert plain.fingerprint == Length(at_least=7, label="other").fingerprint
    assert plain.fingerprint != Length(unit="bytes").fingerprint
    newer = dataclasses.make_dataclass("Length", [], bases=(Length,), frozen=True, namespace={"version": 2})
    assert plain.fingerprint != newer().fingerprint


def test_register_refuses_what_is_no_step():
    with pytest.raises(TypeError, match="frozen dataclass"):
        register(type("Loose", (Filter,), {"step": "loose"}))
    other = dataclasses.make_dataclass(
        "Other", [("step", str, dataclasses.field(default="length_of_test"))], bases=(Filter,), frozen=True
    )
    with pytest.raises(TypeError, match="two steps named"):
        register(other)


def test_every_step_of_the_package_keeps_the_contract():
    for name in steps_lib.step_names():
        cls = steps_lib.step_class(name)
        assert cls.__doc__ and cls.step == name
        if issubclass(cls, Filter):
            assert cls.annotate is not Filter.annotate and cls.decide is not Filter.decide
        else:
            assert cls.transform is not Transform.transform
        if issubclass(cls, Global):
            assert all(getattr(cls, part) is not getattr(Global, part) for part in ("emit", "reduce", "finish"))
        for field in dataclasses.fields(cls):
            assert field.metadata["help"], f"{name}.{field.name} says not what it does"


def test_apply_step_of_each_kind():
    shards = [Documents.of(["ab", "abcd"], source="a"), Documents.of(["äb", "abcd", "ab"], source="b")]
    assert [reasons.tolist() for _, reasons in apply_step(Length(), shards)] == [
        ["too short", ""], ["too short", "", "too short"]
    ]  # fmt: skip
    assert [reasons.tolist() for _, reasons in apply_step(Length(unit="bytes"), shards)][1] == ["", "", "too short"]
    assert apply_step(Upper(), shards)[1][0] == ["ÄB", "ABCD", "AB"]
    assert [reasons.tolist() for _, reasons in apply_step(SameText(), shards)] == [["", ""], ["", "again", "again"]]
    whole = [Documents.of([text for shard in shards for text in shard.texts])]
    assert apply_step(SameText(), whole)[0][1].tolist() == ["", "", "", "again", "again"]


def test_documents_are_columns_of_one_length():
    documents = Documents.of(["a", "é", ""])
    documents.attributes["x"] = np.array([1, 2, 3])
    kept = documents.select(np.array([False, True, True]))
    assert kept.keys == ["memory:1", "memory:2"] and kept.attributes["x"].tolist() == [2, 3]
    assert documents.utf8_bytes.tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="texts has 1 entries for 2"):
        Documents(["a", "b"], ["x"], [{}, {}])
    with pytest.raises(ConfigError, match="'x' gave attribute 'y' of shape"):
        check_attributes({"y": np.zeros((2, 2))}, 2, "x")
