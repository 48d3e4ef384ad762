"""Splits of TFDS datasets: which is read, what of each record is kept, and what is said of damage."""

import hashlib
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llmos_jax.config import parse
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.data.sources import SourceConfig, list_files
from llmos_jax.errors import ConfigError
from tests.data.test_readers import read

FEATURES = {
    "text": tfds.features.Text(),
    "title": tfds.features.Text(),
    "label": tfds.features.ClassLabel(names=["bad", "good"]),
    "score": np.float32,
    "tags": tfds.features.Sequence(tfds.features.Text()),
    "origin": {"url": tfds.features.Text(), "year": np.int64},
    "picture": tfds.features.Tensor(shape=(20, 20), dtype=np.uint8),
    "many": tfds.features.Sequence(np.int64),
}


class Sayings(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(FEATURES))

    def _split_generators(self, _):
        return {"train": examples("train", 20), "test": examples("test", 3)}

    def _generate_examples(self):
        raise AssertionError


def examples(split, count):
    return ((number, record(split, number)) for number in range(count))


def record(split, number):
    return {
        "text": f"saying ü {number} of {split}", "title": "T", "label": number % 2, "score": 0.5, "tags": ["a", "b"],
        "origin": {"url": "http://x", "year": 2026}, "picture": np.zeros((20, 20), np.uint8), "many": np.arange(1001),
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    Sayings(file_format="array_record", data_dir=tmp_path / "tfds").download_and_prepare()
    real = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: real(name, data_dir=tmp_path / "tfds"))
    return tmp_path / "tfds" / "sayings" / "1.0.0"


def test_the_split_that_is_asked_for_is_read_with_what_its_records_say(folder):
    for path, split, count in (("tfds:sayings", "train", 20), ("tfds:sayings#test", "test", 3)):
        passed_over = []
        documents, bad = read(path, passed_over=passed_over)
        assert not bad and sorted(text for _, text, _ in documents) == sorted(record(split, n)["text"] for n in range(count))
        files = {file.key for file in list_files(SourceConfig(path=path))}
        assert {key.partition(":")[0] for key, _, _ in documents} == files and all(f"-{split}." in name for name in files)
        assert len({key for key, _, _ in documents}) == count
        metadata = documents[1][2]
        assert metadata.pop("label") in (0, 1)
        assert metadata == {"title": "T", "score": 0.5, "tags": ["a", "b"], "origin": {"url": "http://x", "year": 2026}}
        assert passed_over.count("metadata: 'picture' is Tensor") == len(files)
        assert passed_over.count("metadata: 'many' of more than 2000 characters") == count


def test_what_is_not_there_is_named(folder):
    for path, words in (
        ("tfds:sayings#validation", "has no split 'validation'; it has .*t"),
        ("tfds:no_such_set", "tfds:no_such_set is not prepared in"),
    ):
        with pytest.raises(ConfigError, match=words):
            list_files(SourceConfig(path=path))
    assert "has no feature 'body' (text_key); it has" in read("tfds:sayings", text_key="body")[1][0]


def test_damage_is_named_and_changes_are_noticed(folder, tmp_path):
    config = parse(PrepareConfig, {"sources": [{"path": "tfds:sayings#test"}], "workers": 1})
    version = prepare_dataset(config, tmp_path / "out", log=lambda line: None)
    (file,) = list_files(config.sources[0])
    place = pathlib.Path(file.location)
    (row,) = version.iterate("inputs")
    assert row["sha256"] == hashlib.sha256(place.read_bytes()).hexdigest() and len(list(version.iterate())) == 3
    whole = place.read_bytes()
    for start in (*range(0, 1600, 80), len(whole) // 2, len(whole) - 64):
        place.write_bytes(whole[:start] + bytes(byte ^ 0xFF for byte in whole[start : start + 8]) + whole[start + 8 :])
        documents, bad = read("tfds:sayings#test")
        texts = {text for _, text, _ in documents}
        assert texts <= {record("test", number)["text"] for number in range(3)} and (len(texts) == 3 or bad), start
    place.write_bytes(whole[: len(whole) // 2])
    documents, bad = read("tfds:sayings#test")
    assert bad and place.name in bad[0]
    assert list_files(config.sources[0])[0].content_hash() != row["sha256"]
