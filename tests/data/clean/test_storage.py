"""What lies on disk can be trusted: damage is found and mended, every record leads to its file, nothing is redone in vain."""

import errno
import hashlib
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from llmos_jax.config import parse
from llmos_jax.data import files
from llmos_jax.data.clean import objects, reading, runner, tasks
from llmos_jax.data.clean.dataset import collect_garbage, format_place, list_versions, lookup, read_verified, verify
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.data.clean.reading import source_names
from llmos_jax.data.clean.steps import parse_steps
from llmos_jax.data.sources import SourceConfig
from llmos_jax.errors import ConfigError, DataError
from tests.data.clean.test_pipeline import (  # noqa: F401  the steps of `config`
    STEPS,
    config,
    content,
    corpus,
    counting,
    quiet,
    steps_of_this_file,
)

GLOBAL = [{"step": "length", "at_least": 20}, {"step": "exact_duplicates"}, {"step": "minhash_duplicates"}]


def settings(paths, **choices):
    return parse(PrepareConfig, {"sources": [{"path": str(path)} for path in paths], "workers": 1} | choices)


def texts(folder, many, name="text"):
    """A folder of many text files, each of its own words."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(many):
        words = np.random.default_rng([many, number]).integers(10**6, size=30)
        (folder / f"{name}{number:03d}.txt").write_text(f"document {number} of words: " + " ".join(map(str, words)))
    return folder


def flip(path, place):
    """Damages a byte where it lies, as a failing disk does: hard links see it, too."""
    with open(path, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 4]))


def test_damage_of_a_version_is_not_taken_for_the_result(tmp_path):
    chosen = config(corpus(tmp_path / "in"))
    version = prepare_dataset(chosen, tmp_path / "out", log=quiet)
    before = content(version)
    for file in version.directory.iterdir():
        if file.name not in ("dataset.json", "report.html"):
            flip(file, file.stat().st_size // 2)
    assert len(verify(version)) == len(before) - 1
    again = prepare_dataset(chosen, tmp_path / "out", log=quiet)
    assert again.directory == version.directory and content(again) == before and not verify(again)
    version.files[1].unlink()
    assert content(prepare_dataset(chosen, tmp_path / "out", log=quiet)) == before


def kinds(cache):
    """Returns {(folder, ending): files} of all results of tasks."""
    found = {}
    for file in sorted(cache.rglob("*")):
        if file.is_file():
            found.setdefault((file.parent.name, file.suffix), []).append(file)
    return found


@pytest.mark.parametrize("where", [0.2, 0.5, 0.9])
def test_damage_of_any_result_is_mended(where, tmp_path):
    chosen = config(corpus(tmp_path / "in"))
    whole = content(prepare_dataset(chosen, tmp_path / "out", log=quiet))
    cache = tmp_path / "out" / "cache"
    for (folder, _), found in kinds(cache).items():
        if folder not in ("needs", "ranges", "progress"):
            file = max(found, key=lambda file: file.stat().st_size)
            flip(file, int(file.stat().st_size * where))
    assert content(prepare_dataset(chosen, tmp_path / "out", log=quiet)) == whole
    assert len(list_versions(tmp_path / "out")) == 1


def test_damaged_results_are_not_gone_on_from(tmp_path):
    """Attributes, layers and records that other thresholds add to are made anew when a byte of them is another."""
    folder = corpus(tmp_path / "in")
    strict, loose = config(folder, steps=[STEPS[0] | {"at_least": 40}, *STEPS[1:]]), config(folder)
    expected = content(prepare_dataset(loose, tmp_path / "fresh", log=quiet))
    prepare_dataset(strict, tmp_path / "first", log=quiet)
    for kind in [("attributes", ".npz"), ("layers", ".parquet"), ("layers", ".npz"), ("records", ".npy"), ("records", ".npz")]:
        shutil.copytree(tmp_path / "first", tmp_path / "out")
        for file in kinds(tmp_path / "out" / "cache")[kind]:
            flip(file, file.stat().st_size - 1 if kind[1] == ".npy" else file.stat().st_size // 3)
        found = content(prepare_dataset(loose, tmp_path / "out", log=quiet))
        assert {name: data for name, data in found.items() if name != "dataset.json"} == {
            name: data for name, data in expected.items() if name != "dataset.json"
        }
        shutil.rmtree(tmp_path / "out")


def test_a_file_that_was_written_damaged_is_one_clear_error(tmp_path):
    version = prepare_dataset(config(corpus(tmp_path / "in")), tmp_path / "out", log=quiet)
    path = tmp_path / "damaged.parquet"
    data = bytearray(version.files[0].read_bytes())
    data[-20:-10] = b"0123456789"
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged.parquet is damaged, though its manifest knows it"):
        read_verified(path, hashlib.sha256(data).hexdigest())


def test_a_dataset_of_another_format_is_refused_before_any_work(tmp_path, monkeypatch):
    chosen = config(corpus(tmp_path / "in"))
    version = prepare_dataset(chosen, tmp_path / "out", log=quiet)
    manifest = version.directory / "dataset.json"
    manifest.write_text(json.dumps(version.manifest | {"format": 2}))
    shutil.rmtree(tmp_path / "out" / "cache")
    ran = counting(monkeypatch)
    for use in (
        lambda: prepare_dataset(chosen, tmp_path / "out", log=quiet),
        lambda: prepare_dataset(settings([tmp_path / "out"]), tmp_path / "other", log=quiet),
    ):
        with pytest.raises(DataError, match=f"{manifest} is of format 2, not 3 of this release: remove {version.directory}"):
            use()
    assert not ran


def test_lookup_follows_datasets_to_the_source_document(tmp_path):
    """Text files in a dataset, its augmented copy, and a copy of that: every key leads to the file it began in."""
    folder = texts(tmp_path / "in", 6)
    prepare_dataset(settings([folder]), tmp_path / "mine", log=quiet)
    more = prepare_dataset(settings([tmp_path / "mine"], augment={"copies": 1, "drop": 0.3}), tmp_path / "more", log=quiet)
    last = prepare_dataset(settings([tmp_path / "more"]), tmp_path / "last", log=quiet)
    for version, depth in ((more, 1), (last, 2)):
        keys = [row["key"] for row in version.iterate()]
        assert len(keys) == 12 and sum("#noise0" in key for key in keys) == 6
        for key in keys:
            (place,) = lookup(version, key=key)
            for _ in range(depth):
                place = place["origin"]
            name = key.split("/")[-1].partition("#")[0]
            assert place["file"]["path"] == str(folder / name) and place["origin"] is None
            assert place["file"]["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert str(folder) in format_place(next(lookup(last, key=keys[0])))
    shutil.rmtree(tmp_path / "mine")
    place = next(lookup(more, key="mine/in/text000.txt"))
    assert place["origin"] is None and "no longer there" in format_place(place)


def test_parts_of_one_name_are_told_apart(tmp_path):
    for name, many in (("x", 3), ("y", 4)):
        prepare_dataset(settings([texts(tmp_path / name / "in", many)]), tmp_path / name / "mine", log=quiet)
    version = prepare_dataset(settings([tmp_path / n / "mine#in" for n in ("x", "y")]), tmp_path / "out", log=quiet)
    keys = [row["key"] for row in version.iterate()]
    assert len(keys) == len(set(keys)) == 7
    facts = {source["name"]: source["files"] for source in version.manifest["sources"]}
    assert facts == {"mine#in": 1, "mine#in#2": 1}
    paths = ["a/b", "c/b", "d/b#2", "e/b", "f/b#2"]
    names = source_names([SourceConfig(path=path) for path in paths])
    assert names[:2] == ["b", "b#2"] and len(set(names)) == 5


def test_text_that_was_cut_out_is_found(tmp_path):
    version = prepare_dataset(config(corpus(tmp_path / "in")), tmp_path / "out", log=quiet)
    places = [place for place in lookup(version, text="- menu", most=100) if place["reason"] == "cut out of the text"]
    cuts = [row for row in version.iterate("cut") if "- menu" in row["removed"]]
    assert len(cuts) > 3 and sorted(place["key"] for place in places) == sorted(row["key"] for row in cuts)
    for place in places:
        assert not place["kept"] and place["step"] == "cut_of_test"
        assert pathlib.Path(place["file"]["path"]).name == place["key"].split("/")[1].partition(":")[0]


@pytest.mark.parametrize("kind", ["hash", "read"])
def test_a_file_that_changes_meanwhile_is_not_taken_for_the_old_one(kind, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "a.txt"
    file.write_text("version one of the text")
    real = tasks.FUNCTIONS[kind]

    def change(*arguments, **words):
        result = real(*arguments, **words) if kind == "hash" else None
        file.write_text("version two of the text, longer")
        return result or real(*arguments, **words)

    monkeypatch.setitem(tasks.FUNCTIONS, kind, change)
    with pytest.raises(DataError, match="a.txt changed while it was read"):
        prepare_dataset(settings([tmp_path / "in"]), tmp_path / "out", log=quiet)
    monkeypatch.setitem(tasks.FUNCTIONS, kind, real)
    for text in ("version two of the text, longer", "version one of the text"):
        file.write_text(text)
        version = prepare_dataset(settings([tmp_path / "in"]), tmp_path / "out", log=quiet)
        (row,), (listed,) = version.iterate(), version.iterate("inputs")
        assert row["text"] == text and listed["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_new_content_under_the_old_time_and_size_is_noticed(tmp_path):
    folder = texts(tmp_path / "in", 2)
    prepare_dataset(settings([folder]), tmp_path / "out", log=quiet)
    file = folder / "text000.txt"
    status, text = file.stat(), file.read_text()
    file.write_text(text.replace("document", "DOCUMENT"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    version = prepare_dataset(settings([folder]), tmp_path / "out", log=quiet)
    assert next(version.iterate())["text"] == file.read_text() != text


@pytest.mark.parametrize("first", [0, 1])
def test_errors_of_the_moment_are_not_kept(first, tmp_path, monkeypatch):
    """A disk or network that fails while files are hashed, or read: named, counted, and tried again by the next run."""
    folder = texts(tmp_path / "in", 5)
    real, calls = files.SourceFile.open_raw, []

    def fail(file):
        if file.path.endswith("text002.txt"):
            calls.append(file)
            if len(calls) > first:
                raise OSError(errno.EIO, "Input/output error")
        return real(file)

    whole = prepare_dataset(settings([folder], steps=GLOBAL), tmp_path / "whole", log=quiet)
    monkeypatch.setattr(files.SourceFile, "open_raw", fail)
    bad = prepare_dataset(settings([folder], steps=GLOBAL), tmp_path / "out", log=quiet)
    assert bad.manifest["bad"]["count"] == 1 and "text002.txt" in bad.manifest["bad"]["messages"][0]
    assert len(list(bad.iterate())) == 4
    monkeypatch.setattr(files.SourceFile, "open_raw", real)
    assert content(prepare_dataset(settings([folder], steps=GLOBAL), tmp_path / "out", log=quiet)) == content(whole)


def test_evaluation_texts_are_all_looked_for_or_counted(tmp_path):
    folder = texts(tmp_path / "in", 3)
    sets = tmp_path / "evaluation"
    sets.mkdir()
    sentence = "eight words or more of a question that no document may hold"
    (sets / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (sentence, "too short", " ", sentence + "?"))
    )
    (sets / "b.txt").write_text(sentence)
    chosen = settings([folder], steps=[{"step": "decontaminate", "paths": [str(sets)]}])
    version = prepare_dataset(chosen, tmp_path / "out", log=quiet)
    assert version.manifest["notes"] == {"decontaminate": {"texts": 3, "too_short": 1, "passed_over": {"blank texts": 1}}}
    (sets / "a.jsonl").write_text((sets / "a.jsonl").read_text().replace('{"text": "too', '{"text" "too'))
    with pytest.raises(DataError, match="a.jsonl is damaged near line 2"):
        prepare_dataset(chosen, tmp_path / "out", log=quiet)


def test_a_label_can_stand_before_a_reason():
    for label in ("a: b", "a/b", " a", "a\nb"):
        with pytest.raises(ConfigError, match="label=.* must be letters, digits"):
            parse_steps([{"step": "length", "label": label}])
    assert parse_steps([{"step": "length", "label": "länge 2.b-c"}])[0].name == "länge 2.b-c"


def test_shards_of_a_file_that_was_half_read_are_not_made_again(tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"document {number} " + "word " * 50}) + "\n" for number in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    chosen = settings([tmp_path / "a.jsonl"], shard_bytes=8000, augment={"copies": 1})
    real, written = objects.Objects.write_documents, []

    def write(self, name, *more):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(name)
        return real(self, name, *more)

    monkeypatch.setattr(objects.Objects, "write_documents", write)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(chosen, tmp_path / "out", log=quiet)
    flip(tmp_path / "out" / "cache" / written[2], 300)
    again, augmented, copies = [], [], reading.with_copies
    monkeypatch.setattr(objects.Objects, "write_documents", lambda *all: again.append(all[1]) or real(*all))
    monkeypatch.setattr(reading, "with_copies", lambda *all: augmented.append(1) or copies(*all))
    version = prepare_dataset(chosen, tmp_path / "out", log=quiet)
    assert set(again) & set(written) == {written[2]} and len(again) == len(augmented) > 7
    assert content(version) == content(prepare_dataset(chosen, tmp_path / "whole", log=quiet))


def test_a_new_file_is_all_that_is_new_behind_global_steps(tmp_path, monkeypatch):
    folder = texts(tmp_path / "in", 40)
    for name in ("text010.txt", "text030.txt"):
        (folder / name).write_text((folder / "text005.txt").read_text())
    chosen = settings([folder], steps=[*GLOBAL, {"step": "length", "label": "again", "at_least": 10}], shard_bytes=800)
    prepare_dataset(chosen, tmp_path / "out", log=quiet)
    (folder / "text000a.txt").write_text("a new document of words that no other one holds, " * 4)
    ran = counting(monkeypatch)
    version = prepare_dataset(chosen, tmp_path / "out", log=quiet)
    shards = len(list((version.directory).glob("documents-*.parquet")))
    assert shards > 8 and 1 <= ran.count("read") <= 2 and ran.count("write") <= 3 and ran.count("stage") <= 9
    assert content(version) == content(prepare_dataset(chosen, tmp_path / "fresh", log=quiet))


def test_gc_keeps_what_the_kept_versions_were_made_from(tmp_path, monkeypatch):
    folder = corpus(tmp_path / "in")
    first = prepare_dataset(config(folder), tmp_path / "out", log=quiet)
    notes = {pathlib.Path(path).parent.name for path in collect_garbage(tmp_path / "out", keep=9)}
    assert notes == {"progress", "ranges"}  # which serve the run that writes them only
    ran = counting(monkeypatch)
    assert prepare_dataset(config(folder), tmp_path / "out", log=quiet).directory == first.directory and not ran
    strict = config(folder, steps=[STEPS[0] | {"at_least": 40}, *STEPS[1:]])
    second = prepare_dataset(strict, tmp_path / "out", log=quiet)
    ran.clear()
    removed = collect_garbage(tmp_path / "out", keep=1)
    assert str(first.directory) in removed
    assert prepare_dataset(strict, tmp_path / "out", log=quiet).directory == second.directory and not ran
    assert prepare_dataset(config(folder), tmp_path / "out", log=quiet).number == 3 and "read" not in ran
    collect_garbage(tmp_path / "out", keep=1, drop_cache=True)
    assert {kind for kind, _ in kinds(tmp_path / "out" / "cache")} <= {"output", "inputs"}


def test_runners_look_at_results_once(tmp_path, monkeypatch):
    """A second run reads each result once to verify it, and runs nothing."""
    chosen = config(corpus(tmp_path / "in"))
    prepare_dataset(chosen, tmp_path / "out", log=quiet)
    looked, real = [], objects.file_facts
    monkeypatch.setattr(objects, "file_facts", lambda path: looked.append(path) or real(path))
    monkeypatch.setattr(runner, "run_task", None)
    prepare_dataset(chosen, tmp_path / "out", log=quiet)
    read = [path for path in looked if not path.name.startswith(".tmp-")]
    assert len(read) == len(set(read)) > 20
