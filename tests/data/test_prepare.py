"""Sources to records: what is read, split, cached, refused, and what damage is named."""

import errno
import gzip
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llmos_jax.compute.host import process_start
from llmos_jax.config import Override, parse, to_plain
from llmos_jax.data import prepare as prepare_lib
from llmos_jax.data import sources as sources_lib
from llmos_jax.data.loader import Loader
from llmos_jax.data.prepare import DataConfig, SourceConfig, prepare
from llmos_jax.data.store import MANIFEST_FILE, Store
from llmos_jax.errors import ConfigError, DataError, DataIdentityMismatch

WORDS = [f"Document number {number} speaks of {number * number}.\n" * 5 for number in range(60)]


def config(path, tmp_path, **choices):
    source = SourceConfig(path=str(path), text_key=choices.pop("text_key", "text"))
    return DataConfig(**(dict(sources=(source,), tokenizer="byte", length=64, cache_dir=str(tmp_path / "cache")) | choices))


def texts_of(prepared, split):
    """All text of a split, joined, as the records hold it."""
    store = prepared.stores[0][0]
    records = store.records(split, range(store.count(split)))
    first = records["tokens"][0, :1]
    stream = np.concatenate(
        [first, *[row[1:][seg[1:] > 0] for row, seg in zip(records["tokens"], records["segments"], strict=True)]]
    )
    return [prepared.tokenizer.decode(part) for part in np.split(stream, np.flatnonzero(stream == prepared.tokenizer.end_id))][
        1:-1
    ]


def write(kind, folder):
    folder.mkdir()
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in WORDS)
    if kind == "folder":
        for number, text in enumerate(WORDS):
            (folder / f"{number}.txt").write_text(text)
        return folder
    file = folder / {"jsonl": "d.jsonl", "gz": "d.jsonl.gz", "zst": "d.jsonl.zst", "parquet": "d.parquet"}[kind]
    if kind == "jsonl":
        file.write_text(lines)
    elif kind == "gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif kind == "zst":
        file.write_bytes(zstandard.compress(lines.encode()))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": WORDS}), file)
    return file


@pytest.mark.parametrize("kind", ["folder", "jsonl", "gz", "zst", "parquet"])
def test_every_kind_of_source_arrives_whole(kind, tmp_path):
    prepared = prepare(config(write(kind, tmp_path / "in"), tmp_path), log=lambda line: None)
    train, validation = texts_of(prepared, "train"), texts_of(prepared, "validation")
    assert sorted(train + validation) == sorted(WORDS)
    assert validation and len(validation) < len(train)
    assert prepared.validation_bytes == sum(len(text) for text in validation)
    assert prepared.validation_gzip_bytes == len(gzip.compress("".join(validation).encode(), 9))


def test_the_end_of_a_single_text_is_validation(tmp_path):
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "t.txt").write_text(text)
    prepared = prepare(config(tmp_path / "t.txt", tmp_path), log=lambda line: None)
    assert texts_of(prepared, "train")[0] + texts_of(prepared, "validation")[0] == text
    assert len(texts_of(prepared, "validation")[0]) == round(len(text) / 10)


def test_prepared_once_and_again_when_the_content_changes(tmp_path, monkeypatch):
    folder = write("folder", tmp_path / "in")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    first = prepare(config(folder, tmp_path), log=lambda line: None)
    lines = []
    second = prepare(config(folder, tmp_path), log=lines.append)
    assert first.stores[0][0].directory == second.stores[0][0].directory and not lines
    (folder / "3.txt").write_text("changed")
    third = prepare(config(folder, tmp_path), log=lambda line: None)
    assert third.stores[0][0].directory != first.stores[0][0].directory
    assert not list((tmp_path / "cache").glob("*.tmp*"))
    assert not list((tmp_path / "temporary").iterdir())


def test_tfds_source(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Sayings(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

        def _split_generators(self, _):
            return {"train": ((number, {"text": text}) for number, text in enumerate(WORDS))}

        def _generate_examples(self):
            raise AssertionError

    Sayings(file_format="array_record", data_dir=tmp_path / "tfds").download_and_prepare()
    real = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: real(name, data_dir=tmp_path / "tfds"))
    prepared = prepare(config("tfds:sayings", tmp_path), log=lambda line: None)
    assert sorted(texts_of(prepared, "train") + texts_of(prepared, "validation")) == sorted(WORDS)
    with pytest.raises(ConfigError, match="tfds:no_such_set"):
        prepare(config("tfds:no_such_set", tmp_path))


def test_bad_files_of_a_folder_are_named_and_counted(tmp_path):
    folder = write("folder", tmp_path / "in")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\0\1\2")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    lines = []
    prepare(config(folder, tmp_path), log=lines.append)
    text = "\n".join(lines)
    assert "left out 3 of 63 files" in text
    assert all(word in text for word in ("empty.txt is empty", "binary.txt is binary", "latin.txt is not UTF-8 (byte 3)"))


def test_all_files_that_were_left_out_are_named_beside_the_records_and_counted_each_time(tmp_path, monkeypatch):
    folder = write("folder", tmp_path / "in")
    for number in range(9):
        (folder / f"empty{number}.txt").write_text("")
    (folder / "two\nlines.txt").write_bytes(b"\0")
    first, second = [], []
    directory = prepare(config(folder, tmp_path), log=first.append).stores[0][0].directory
    named = (directory / "left-out.txt").read_text().splitlines()
    assert named == [*(f"{folder}/empty{number}.txt is empty." for number in range(9)),
                     rf"{folder}/two\nlines.txt is binary, not text."]  # fmt: skip
    told = f"{folder}: left out 10 of 70 files; {directory}/left-out.txt names each and says why."
    assert first[-1] == told and sum(line.startswith("  ") for line in first) == 4
    assert prepare(config(folder, tmp_path), log=second.append).stores[0][0].directory == directory
    assert second == [told]
    as_source = []
    prepare(config(directory, tmp_path), log=as_source.append)
    assert as_source == [f"{directory}{told.removeprefix(str(folder))}"]
    monkeypatch.setattr(sources_lib, "_MOST_LINES", 4)
    few = prepare(config(folder, tmp_path, length=32), log=lambda line: None).stores[0][0]
    assert (few.directory / "left-out.txt").read_text().splitlines() == [*named[:4], "... and 6 more"]
    assert few.manifest["left_out"] == {"count": 10, "files": 70}


def test_what_was_left_out_is_no_part_of_the_identity_and_unknown_of_older_records(tmp_path):
    folder = write("folder", tmp_path / "in")
    (folder / "empty.txt").write_text("")
    store = prepare(config(folder, tmp_path), log=lambda line: None).stores[0][0]
    assert set(store.identity) == {"content", "packing", "tokenizer", "vocab_size", "length", "validation_fraction"}
    older = {name: value for name, value in store.manifest.items() if name != "left_out"}
    (store.directory / MANIFEST_FILE).write_text(json.dumps(older))
    lines = []
    again = prepare(config(folder, tmp_path), log=lines.append).stores[0][0]
    assert again.directory == store.directory and again.identity == store.identity and not lines


def test_what_a_folder_holds_beside_good_documents(tmp_path):
    """Hidden files, blank documents, names that are not UTF-8, and a file whose second half is damaged."""
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("hidden")
    (folder / "good.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "first"}\n\n{"text": " "}\n{"text": "second"}\n')
    (folder / "HALF.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "kept"}\n{"text": \n{"text": "lost"}\n'))
    pathlib.Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).write_text("third")
    lines = []
    prepared = prepare(config(folder, tmp_path), log=lines.append)
    assert sorted(texts_of(prepared, "train") + texts_of(prepared, "validation")) == ["first", "kept", "second", "third"]
    assert "left out 1 of 3 files" in lines[0]
    assert "HALF.JSONL.GZ is damaged near line 2" in lines[1] and lines[1].endswith("Its 1 documents before that are used.")


@pytest.mark.parametrize("count", [2, 3])
def test_no_split_of_several_documents_is_empty(count, tmp_path):
    """Whatever the hashes say, which only the names decide."""
    for trial in range(40):
        (tmp_path / f"{trial}.jsonl").write_text('{"text": "abc"}\n' * count)
        prepared = prepare(config(tmp_path / f"{trial}.jsonl", tmp_path, validation_fraction=0.5), log=lambda line: None)
        assert texts_of(prepared, "train") and texts_of(prepared, "validation")


def test_zstandard_files_of_several_frames_and_cut_ones(tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in WORDS]
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    frames = [zstandard.compress(b"".join(lines[:20])), skippable, *map(zstandard.compress, lines[20:])]
    (tmp_path / "d.jsonl.zst").write_bytes(b"".join(frames))
    prepared = prepare(config(tmp_path / "d.jsonl.zst", tmp_path), log=lambda line: None)
    assert sorted(texts_of(prepared, "train") + texts_of(prepared, "validation")) == sorted(WORDS)
    for cut in (1, 10, len(frames[-1]) - 1):
        (tmp_path / "cut.jsonl.zst").write_bytes(b"".join(frames)[:-cut])
        with pytest.raises(DataError, match="cut.jsonl.zst is damaged .* ends inside a compressed frame"):
            prepare(config(tmp_path / "cut.jsonl.zst", tmp_path), log=lambda line: None)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    """A limit on file sizes stands for the full disk: the writer meets both as a failed write."""
    (tmp_path / "t.txt").write_text("many words\n" * 20_000)
    code = (
        "import resource, sys\n"
        "from llmos_jax.data.prepare import DataConfig, SourceConfig, prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "prepare(DataConfig(sources=(SourceConfig(path=sys.argv[1]),), tokenizer='byte', cache_dir=sys.argv[2]))\n"
    )
    cache = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "t.txt", cache], capture_output=True, text=True, check=False)
    assert "DataError" in done.stderr and "make room, or keep prepared records elsewhere" in done.stderr
    assert not list(cache.glob("records*"))


@pytest.mark.parametrize("what", ["hashes", "tokenizer"])
def test_a_full_disk_is_named_before_there_are_records(what, tmp_path, monkeypatch):
    real = prepare_lib.host.write_whole

    def write_whole(file, text):
        if what in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, text)

    monkeypatch.setattr(prepare_lib.host, "write_whole", write_whole)
    with pytest.raises(DataError, match=f"{what}.* could not be written .No space left on device.: make room"):
        prepare(config(write("folder", tmp_path / "in"), tmp_path, tokenizer="bpe:300"), log=lambda line: None)


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path):
    cache = tmp_path / "cache"
    host, pid, start = socket.gethostname(), os.getpid(), process_start(os.getpid())
    dead, alive, foreign = (
        cache / f"records-0.tmp-{name}" for name in (f"{host}-{pid}-{start + 1}", f"{host}-{pid}-{start}", "else-1-1")
    )
    for folder in (dead, alive, foreign):
        folder.mkdir(parents=True)
    prepare(config(write("folder", tmp_path / "in"), tmp_path), log=lambda line: None)
    assert not dead.exists() and alive.exists() and foreign.exists()


def test_the_tokenizer_learns_from_all_over_a_long_text(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "_TOKENIZER_SAMPLE_CHARACTERS", 20_000)
    monkeypatch.setattr(prepare_lib, "_TOKENIZER_PIECE_CHARACTERS", 500)
    (tmp_path / "t.txt").write_text("alpha beta\n" * 10_000 + "omega zeta\n" * 10_000)
    prepared = prepare(config(tmp_path / "t.txt", tmp_path, tokenizer="bpe:300"), log=lambda line: None)
    words = [prepared.tokenizer.token_bytes(token) for token in range(prepared.tokenizer.vocab_size)]
    assert b"alpha" in words and b"omega" in words


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nested.jsonl", b"[" * 100_000, "nested.jsonl is damaged near line 1"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}\n', "surrogate.jsonl, line 1 holds no valid Unicode"),
        ("number.jsonl", b'{"text": 3}\n', "number.jsonl, line 1 has int in 'text'"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.txt", b" \n\n", "blank.txt is empty"),
        ("binary.txt", b"ab\0cd", "binary.txt is binary"),
        ("latin.txt", "é".encode("latin-1"), "latin.txt is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{broken\n', "x.jsonl is damaged near line 2"),
        ("y.jsonl", b'{"body": "a"}\n', "y.jsonl, line 1 has no 'text'.*body"),
        ("z.jsonl.gz", b"no gzip", "z.jsonl.gz"),
        ("z.jsonl.zst", b"no zstd", "z.jsonl.zst"),
        ("w.parquet", b"PAR1 not", "w.parquet is not a parquet file"),
    ],
)
def test_a_bad_single_file_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepare(config(tmp_path / name, tmp_path), log=lambda line: None)


def test_a_damaged_parquet_page_is_named(tmp_path):
    file = write("parquet", tmp_path / "in")
    content = bytearray(file.read_bytes())
    content[40:400] = b"\xa5" * 360
    file.write_bytes(content)
    with pytest.raises(DataError, match="d.parquet is damaged after row 0"):
        prepare(config(file, tmp_path), log=lambda line: None)


def test_missing_and_unusable_sources(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(ConfigError, match="did you mean .*corpus.txt"):
        prepare(config(tmp_path / "corpsu.txt", tmp_path))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="empty folder"):
        prepare(config(tmp_path / "nothing", tmp_path))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.bin").write_bytes(b"\0")
    (tmp_path / "one" / "b.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match="none of its 2 files holds text"):
        prepare(config(tmp_path / "one", tmp_path), log=lambda line: None)
    with pytest.raises(ConfigError, match="no package"):
        prepare(config("stdlib:no_such_package", tmp_path))


def test_prepared_folder_as_source_and_its_mismatches(tmp_path):
    first = prepare(config(write("folder", tmp_path / "in"), tmp_path), log=lambda line: None)
    folder = first.stores[0][0].directory
    again = prepare(config(folder, tmp_path))
    assert again.stores[0][0].identity == first.stores[0][0].identity
    with pytest.raises(DataIdentityMismatch, match="data.length 64, and 32"):
        prepare(config(folder, tmp_path, length=32))
    bpe = prepare(config(tmp_path / "in", tmp_path, tokenizer="bpe:300"), log=lambda line: None).stores[0][0].directory
    for other in ("byte", "bpe:400"):
        with pytest.raises(DataIdentityMismatch, match=f"data.tokenizer={other}, but .* was prepared with bpe:300: set"):
            prepare(config(bpe, tmp_path, tokenizer=other))
    with pytest.raises(DataIdentityMismatch, match="tokenizer.json, but .* was prepared with byte: set data.tokenizer=byte"):
        prepare(config(folder, tmp_path, tokenizer=str(bpe / "tokenizer.json")))
    for same in ("bpe:300", str(bpe / "tokenizer.json")):
        assert prepare(config(bpe, tmp_path, tokenizer=same)).tokenizer.vocab_size == 300
    mixed = DataConfig(sources=tuple(SourceConfig(path=str(p)) for p in (folder, bpe)), tokenizer="byte", length=64)
    with pytest.raises(DataIdentityMismatch, match="tokenizer"):
        prepare(mixed)


def damaged_store(tmp_path):
    prepared = prepare(config(write("folder", tmp_path / "in"), tmp_path), log=lambda line: None)
    store = prepared.stores[0][0]
    return prepared, store, store.directory / store.manifest["files"]["train"][0]["name"]


def test_cut_empty_foreign_and_missing_records(tmp_path):
    """Row D1: refused when the store is opened, naming the file."""
    _, store, file = damaged_store(tmp_path)
    content = file.read_bytes()
    for bad in (content[:-10], b"", b"something else entirely"):
        file.write_bytes(bad)
        with pytest.raises(DataError, match=f"{file.name} has {len(bad)} bytes"):
            Store(store.directory)
    file.unlink()
    with pytest.raises(DataError, match=f"{file.name} is missing"):
        Store(store.directory)
    file.write_bytes(content)
    (store.directory / MANIFEST_FILE).write_text("{")
    with pytest.raises(DataError, match="manifest.json can't be read"):
        Store(store.directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: {"format": manifest["format"]}, "content is missing"),
        (lambda manifest: manifest | {"length": "64"}, "length is of type str, not int"),
        (lambda manifest: manifest | {"dtype": "nonsense"}, "dtype is 'nonsense', not one of uint16, int32"),
        (lambda manifest: manifest | {"files": []}, "files is of type list, not dict"),
        (lambda manifest: manifest | {"files": {"train": [[]]}}, r"files.train\[0\] is of type list, not dict"),
        (lambda manifest: manifest | {"files": {"train": []}}, "files.validation is missing"),
        (lambda manifest: manifest | {"files": {"train": [{"name": "a"}]}}, r"files.train\[0\].records is missing"),
        (lambda manifest: manifest | {"left_out": 3}, "left_out is of type int, not dict"),
        (lambda manifest: [manifest], "is not a manifest of format"),
    ],
)
def test_a_manifest_of_another_shape_is_damaged(change, words, tmp_path):
    _, store, _ = damaged_store(tmp_path)
    (store.directory / MANIFEST_FILE).write_text(json.dumps(change(store.manifest)))
    for opened in (lambda: Store(store.directory), lambda: prepare(config(tmp_path / "in", tmp_path), log=lambda line: None)):
        with pytest.raises(DataError, match=f"manifest.json .*{words}.*{store.directory}"):
            opened()


def test_corrupt_records_are_named_or_skipped(tmp_path, caplog):
    """Row D1: a flipped byte is found when its record is read; `skip` is counted and capped."""
    prepared, store, file = damaged_store(tmp_path)
    count = store.count("train")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"record \d+ of .*{file.name} is damaged"):
        Store(store.directory).records("train", range(count))
    skipping = Store(store.directory, on_corrupt="skip", max_corrupt=count)
    records = skipping.records("train", range(count))
    assert len(records["tokens"]) == count and 1 <= len(skipping.corrupt) <= count
    skipping.records("train", range(count))  # seen again in the next epoch, told once
    told = [record.getMessage() for record in caplog.records if "is damaged and left out" in record.getMessage()]
    assert len(told) == len(skipping.corrupt) and file.name in told[0]
    bad = [index for _, index in skipping.corrupt]
    assert not records["segments"][bad].any() and not records["target_bytes"][bad].any()
    with pytest.raises(DataError, match="more than data.max_corrupt"):
        Store(store.directory, on_corrupt="skip", max_corrupt=0).records("train", range(count))


def test_the_standard_library_is_a_corpus(tmp_path):
    prepared = prepare(config("stdlib:json", tmp_path, validation_fraction=0.3), log=lambda line: None)
    assert "def loads" in "".join(texts_of(prepared, "train") + texts_of(prepared, "validation"))
    loader = Loader(prepared, "train", batch_size=4, seed=0)
    assert loader.rows(0, 0, 4)["tokens"].shape == (4, 64)
    assert pathlib.Path(prepared.stores[0][0].directory).parent == tmp_path / "cache"


def test_a_curriculum_can_be_written_as_one_word():
    sources = [{"path": "a"}, {"path": "b"}]
    written = parse(DataConfig, {"sources": sources, "stages": Override("500:1:1, 700:0:2.5")})
    groups = [{"from_step": 500, "weights": [1, 1]}, {"from_step": 700, "weights": [0, 2.5]}]
    assert written == parse(DataConfig, {"sources": sources, "stages": groups}) == parse(DataConfig, to_plain(written))
    for stages, words in (
        (Override("500"), r"data.stages\[0\].weights=\[\] must have one number for each of 2"),
        (Override("x:1:1"), r"stages\[0\].from_step"),
        (3, "must be a list of groups"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(DataConfig, {"sources": sources, "stages": stages})
