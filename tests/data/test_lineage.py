"""From a record back to its documents, and what tokenizers make of held-out text."""

import json

import numpy as np
import pytest

from llmos_jax.config import parse
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.data.fertility import Fertility
from llmos_jax.data.lineage import documents_of
from llmos_jax.data.prepare import DataConfig, SourceConfig, prepare
from llmos_jax.data.tokenizer import ByteTokenizer
from llmos_jax.errors import ConfigError, DataError

TEXTS = [f"Document {number}: " + "word " * (number % 7 * 9) for number in range(80)]


def quiet(line):
    pass


@pytest.fixture
def dataset(tmp_path):
    """A clean dataset of two sources; short documents are removed."""
    for name, part in (("books", TEXTS[:50]), ("web", TEXTS[50:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    tree = {
        "sources": [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("books", "web")],
        "steps": [{"step": "length", "at_least": 30}], "workers": 1, "shard_bytes": 2000,
    }  # fmt: skip
    return prepare_dataset(parse(PrepareConfig, tree), tmp_path / "dataset", log=quiet)


def open_records(path, tmp_path, **choices):
    options = dict(sources=(SourceConfig(path=str(path)),), tokenizer="byte", length=64, cache_dir=str(tmp_path / "cache"))
    return prepare(DataConfig(**(options | choices)), log=quiet)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_every_record_leads_to_its_documents(tokenizer, dataset, tmp_path):
    prepared = open_records(tmp_path / "dataset", tmp_path, tokenizer=tokenizer)
    store = prepared.stores[0][0]
    texts = {row["key"]: row["text"] for row in dataset.iterate()}
    seen = set()
    for split in ("train", "validation"):
        records = store.records(split, range(store.count(split)))
        for number, tokens in enumerate(records["tokens"]):
            keys = documents_of(store.directory, split, number, store.length)
            seen.update(keys)
            real = tokens[: np.count_nonzero(records["segments"][number])]
            parts = np.split(real, np.flatnonzero(real == prepared.tokenizer.end_id))
            parts = [prepared.tokenizer.decode(part) for part in parts]
            parts = [part for part in parts if part]
            assert len(parts) == len(keys)
            assert all(part.strip("\ufffd") in texts[key] for part, key in zip(parts, keys, strict=True))
    assert seen == set(texts)
    assert len(texts) == sum(len(text) >= 30 for text in TEXTS)


def test_a_clean_dataset_keeps_its_splits_and_can_be_taken_in_parts(dataset, tmp_path):
    """The split of a document hangs on its key: other shards, or another version, leave it where it is."""
    whole = open_records(dataset.directory, tmp_path).stores[0][0].manifest
    parts = [open_records(f"{tmp_path / 'dataset'}#{name}.jsonl", tmp_path).stores[0][0].manifest for name in ("books", "web")]
    for split in ("train", "validation"):
        assert sum(part["documents"][split] for part in parts) == whole["documents"][split]
    with pytest.raises(ConfigError, match="has no source 'news'; it has books.jsonl, web.jsonl"):
        open_records(f"{tmp_path / 'dataset'}#news", tmp_path)


def test_damage_of_a_clean_dataset_is_not_trained_on(dataset, tmp_path):
    file = dataset.files[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file.name} is not what its manifest says"):
        open_records(dataset.files[0].parent, tmp_path, sources=(SourceConfig(path=f"{tmp_path / 'dataset'}#books.jsonl"),))


def test_fertility_is_counted(tmp_path):
    counts = Fertility(ByteTokenizer())
    counts.add_text("one two é")
    counts.add_tokens(ByteTokenizer().encode("one two é"))
    report = counts.report()
    assert report["tokens"] == 10 and report["bytes_per_token"] == 1 and report["single_byte_share"] == 1
    assert report["tokens_per_word"] == pytest.approx(10 / 3) and report["vocabulary_used"] == pytest.approx(8 / 257)
