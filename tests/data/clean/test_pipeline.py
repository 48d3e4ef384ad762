"""The pipeline: the same bytes for any workers, shards and kills; changed inputs and thresholds; bad input; versions."""

import collections
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llmos_jax.config import parse, setting, to_plain
from llmos_jax.data.clean import pipeline, runner
from llmos_jax.data.clean import steps as steps_lib
from llmos_jax.data.clean.dataset import collect_garbage, compare, is_dataset, list_versions, lookup, open_dataset, verify
from llmos_jax.data.clean.documents import Documents
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.data.clean.steps import Filter, Global, Transform, apply_step, parse_steps, register, threshold
from llmos_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Vowels(Filter):
    """Documents with too few vowels."""

    step: str = setting("vowels_of_test", help="step", choices=("vowels_of_test",))
    least: float = threshold(0.2, help="share of vowels")

    calls = []

    def annotate(self, documents, findings=None):
        self.calls.append(list(documents.keys))
        shares = [sum(c in "aeiou" for c in text) / len(text) for text in documents.texts]
        return {"vowels": np.array(shares, np.float32), "first": np.array([text[0] for text in documents.texts], str)}

    def decide(self, attributes):
        return np.where(attributes["vowels"] < self.least, "few vowels", "")


@dataclasses.dataclass(frozen=True)
class Cut(Transform):
    """Cuts lines that begin with a mark."""

    step: str = setting("cut_of_test", help="step", choices=("cut_of_test",))
    mark: str = setting("-", help="begin of lines that are cut")

    def transform(self, documents, findings=None):
        lines = [text.split("\n") for text in documents.texts]
        cuts = [[line for line in text if line.startswith(self.mark)] for text in lines]
        texts = ["\n".join(line for line in text if not line.startswith(self.mark)) for text in lines]
        return texts, {"cut": np.array([len(cut) for cut in cuts], np.int32)}, ["\n".join(cut) or None for cut in cuts]


@dataclasses.dataclass(frozen=True)
class Same(Global, Filter):
    """Keeps the first of equal texts."""

    step: str = setting("same_of_test", help="step", choices=("same_of_test",))

    def emit(self, documents):
        records = np.zeros(len(documents), [("hash", np.uint64), ("document", np.int64)])
        records["hash"] = [hash_of(text) for text in documents.texts]
        records["document"] = np.arange(len(documents))
        return records

    def reduce(self, records):
        is_start = np.append(True, records["hash"][1:] != records["hash"][:-1])[: len(records)]
        first = records["document"][is_start][np.cumsum(is_start) - 1] if len(records) else records["document"]
        found = np.zeros(len(records), [("document", np.int64), ("same_as", np.int64)])
        found["document"], found["same_as"] = records["document"], first
        return found[found["document"] != first]

    def finish(self, results, count):
        assert count > results["document"].max(initial=-1)
        return results

    def annotate(self, documents, findings):
        same_as = np.full(len(documents), -1, np.int64)
        same_as[findings["document"]] = findings["same_as"]
        return {"same_as": same_as}

    def decide(self, attributes):
        return np.where(attributes["same_as"] >= 0, "seen before", "")


def hash_of(text):
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@pytest.fixture(autouse=True)
def steps_of_this_file(monkeypatch):
    steps_lib.step_names()  # the modules of the package register once
    monkeypatch.setattr(steps_lib, "_STEPS", dict(steps_lib._STEPS))
    monkeypatch.setattr(Vowels, "calls", [])
    for cls in (Vowels, Cut, Same):
        register(cls)


STEPS = [
    {"step": "length", "at_least": 20},
    {"step": "vowels_of_test"},
    {"step": "cut_of_test"},
    {"step": "same_of_test"},
    {"step": "length", "label": "length again", "at_least": 25},
    {"step": "cut_of_test", "label": "cut again", "mark": "="},
]


def corpus(folder, count=60):
    """Two sources of documents: short, vowel-less, repeated within and across them, with lines to cut, cut to nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "xyzzy", "brrr", "one", "two"]
    for source in ("books", "web"):
        lines = []
        for number in range(count):
            kind = number % 8
            text = " ".join(random.choice(words, 4 if kind == 0 else 12))
            text = {1: f"same text {number // 24} in both sources", 2: "bcdfg " * 8, 3: f"{text}\n- menu\n-more\n= x",
                    4: "- all of it\n- is a menu line", 5: f"{text} ü é"}.get(kind, text)  # fmt: skip
            lines.append(json.dumps({"text": text, "url": f"https://{source}.example/{number}"}) + "\n")
        for part in range(4):
            (folder / f"{source}-{part}.jsonl").write_text("".join(lines[part::4]))
    return folder


def config(folder, **choices):
    sources = [{"path": str(folder / name), "licence": "CC0"} for name in ("books", "web")]
    for name in ("books", "web"):
        (folder / name).mkdir(exist_ok=True)
        for file in folder.glob(f"{name}-*.jsonl"):
            file.rename(folder / name / file.name)
    tree = {"sources": sources, "steps": STEPS, "workers": 1, "shard_bytes": 4000} | choices
    return parse(PrepareConfig, tree)


def quiet(line):
    pass


def rows(version, kind="documents"):
    return [{k: row[k] for k in ("key", "text", "metadata")} for row in version.iterate(kind)]


def content(version):
    """All bytes of the outputs, the manifest among them."""
    return {file.name: file.read_bytes() for file in sorted(version.directory.iterdir())}


def plain(settings):
    """The same pipeline by hand, all in memory: {key: (text, metadata)} kept, {key: (step, reason)} removed, cuts."""
    documents = Documents([], [], [])
    for source in settings.sources:
        for file in sorted(pathlib.Path(source.path).glob("*")):
            for number, line in enumerate(file.read_text().splitlines(), 1):
                record = json.loads(line)
                documents.keys.append(f"{pathlib.Path(source.path).name}/{file.name}:{number}")
                documents.texts.append(record["text"])
                documents.metadata.append({"licence": "CC0", "url": record["url"]})
    gone, cuts = {}, []
    for step in settings.steps:
        ((*found, last),) = apply_step(step, [documents])
        if isinstance(step, Filter):
            reasons = last
        else:
            cuts += [(key, step.name, cut) for key, cut in zip(documents.keys, last, strict=True) if cut]
            blank = np.array([not text.strip() for text in found[0]], bool)
            documents.texts = [old if b else new for old, new, b in zip(documents.texts, found[0], blank, strict=True)]
            reasons = np.where(blank, "emptied", "")
        gone |= {k: (step.name, str(r)) for k, r in zip(documents.keys, reasons, strict=True) if r}
        documents = documents.select(np.asarray(reasons) == "")
    return dict(zip(documents.keys, zip(documents.texts, documents.metadata, strict=True), strict=True)), gone, cuts


def test_what_comes_out_is_what_the_steps_mean(tmp_path):
    settings = config(corpus(tmp_path / "in"))
    version = prepare_dataset(settings, tmp_path / "out", log=quiet)
    kept, gone, cuts = plain(settings)
    assert {row["key"]: (row["text"], json.loads(row["metadata"])) for row in rows(version)} == kept
    assert {row["key"]: (row["step"], row["reason"]) for row in version.iterate("removed")} == gone
    found = [(row["key"], row["step"], row["removed"]) for row in version.iterate("cut")]
    assert sorted(found) == sorted(cuts) and len(cuts) > 10
    assert {step for step, _ in gone.values()} == {"length", "vowels_of_test", "cut_of_test", "same_of_test", "length again"}
    assert version.manifest["funnel"][0]["documents"] == len(kept) + len(gone) == 120
    assert version.manifest["funnel"][-1]["documents"] == len(kept)
    assert sum(n for e in version.manifest["funnel"] for n, _ in e["removed"].values()) == len(gone)
    assert version.manifest["funnel"][-1]["utf8_bytes"] == sum(len(text.encode()) for text, _ in kept.values())


def test_steps_that_read_no_texts_mean_the_same(tmp_path):
    """Duplicates decide by findings that an earlier stage emitted for all of them, also after other thresholds."""
    folder, random = corpus(tmp_path / "in"), np.random.default_rng(1)
    words = [f"word{number}" for number in range(400)]
    texts = [" ".join(random.choice(words, 60)) + "\n\n" + "a paragraph that stands in many documents, word for word " * 2
             for _ in range(12)]  # fmt: skip
    near = [text.replace("word", "Word", 1).replace(" word", "  word", 3) + " more" for text in texts[:8]]
    lines = [json.dumps({"text": text, "url": "u"}) + "\n" for text in [*texts, *near, *texts[:5]]]
    (folder / "web-more.jsonl").write_text("".join(lines))
    steps = [{"step": "length", "at_least": 300}, {"step": "exact_duplicates"}, {"step": "minhash_duplicates"},
             {"step": "repeated_paragraphs"}, {"step": "length", "label": "again", "at_least": 200}]  # fmt: skip
    loose = [steps[0] | {"at_least": 20}, *steps[1:]]
    for chosen in (steps, loose, steps):
        settings = config(folder, steps=chosen)
        version = prepare_dataset(settings, tmp_path / "out", log=quiet)
        kept, gone, _ = plain(settings)
        assert {row["key"]: row["text"] for row in version.iterate()} == {key: text for key, (text, _) in kept.items()}
        assert {row["key"]: (row["step"], row["reason"]) for row in version.iterate("removed")} == gone
        assert {step for step, _ in gone.values()} >= {"length", "exact_duplicates", "minhash_duplicates"}
    assert content(version) == content(prepare_dataset(settings, tmp_path / "fresh", log=quiet))


def test_shard_sizes_do_not_matter(tmp_path):
    folder = corpus(tmp_path / "in")
    first = prepare_dataset(config(folder), tmp_path / "a", log=quiet)
    assert len(first.files) > 4
    for number, size in enumerate((300, 1 << 20)):
        other = prepare_dataset(config(folder, shard_bytes=size), tmp_path / f"b{number}", log=quiet)
        for kind in ("documents", "removed"):
            assert rows(other, kind) == rows(first, kind)
        assert sorted(map(str, other.iterate("cut"))) == sorted(map(str, first.iterate("cut")))


def test_the_same_settings_make_no_new_version(tmp_path):
    settings = config(corpus(tmp_path / "in"))
    first = prepare_dataset(settings, tmp_path / "out", log=quiet)
    before = content(first)
    again = prepare_dataset(dataclasses.replace(settings, workers=3), tmp_path / "out", log=quiet)
    assert again.directory == first.directory and content(again) == before


def counting(monkeypatch):
    """Counts the tasks that are run, by kind."""
    ran = []
    real = runner.run_task
    monkeypatch.setattr(runner, "run_task", lambda root, task: ran.append(task.kind) or real(root, task))
    return ran


def test_other_thresholds_annotate_only_what_was_gone_before(tmp_path):
    """From either side a threshold ends in the bytes of a fresh run, and no document is annotated twice."""
    folder = corpus(tmp_path / "in")
    strict = [STEPS[0] | {"at_least": 40}, *STEPS[1:]]
    loose = config(folder)
    prepare_dataset(config(folder, steps=strict), tmp_path / "out", log=quiet)
    Vowels.calls.clear()
    version = prepare_dataset(loose, tmp_path / "out", log=quiet)
    again = {key for call in Vowels.calls for key in call}
    Vowels.calls.clear()
    fresh = prepare_dataset(loose, tmp_path / "fresh", log=quiet)
    every = {key for call in Vowels.calls for key in call}
    assert 0 < len(again) < len(every) / 2
    assert {n: c for n, c in content(version).items()} == content(fresh)
    Vowels.calls.clear()
    back = prepare_dataset(config(folder, steps=strict), tmp_path / "out", log=quiet)
    assert not any(Vowels.calls) and back.number == 3
    assert content(back) == content(prepare_dataset(config(folder, steps=strict), tmp_path / "fresh2", log=quiet))


def test_new_and_changed_files_only(tmp_path, monkeypatch):
    folder = corpus(tmp_path / "in", count=400)
    for file in [*folder.glob("*.jsonl")]:  # many small files, as folders have them
        lines = file.read_text().splitlines(True)
        for number in range(0, len(lines), 20):
            file.with_stem(f"{file.stem}-{number:03d}").write_text("".join(lines[number : number + 20]))
        file.unlink()
    settings = config(folder)
    prepare_dataset(settings, tmp_path / "out", log=quiet)
    (folder / "books" / "books-0-000.jsonl").write_text(json.dumps({"text": "a new document of words, one two"}) + "\n")
    ran = counting(monkeypatch)
    version = prepare_dataset(settings, tmp_path / "out", log=quiet)
    groups = len(ran) and sum(kind == "read" for kind in ran)
    assert 1 <= groups <= 3
    total = sum(1 for _ in (tmp_path / "out" / "cache" / "read").iterdir())
    assert total > 8
    assert content(version) == content(prepare_dataset(settings, tmp_path / "fresh", log=quiet))


KILLED = """
import pathlib, sys, os, signal
sys.path.insert(0, {tests!r})
import test_pipeline as t
from llmos_jax.data.clean import dataset, runner, steps
from llmos_jax.data.clean.objects import Objects
for cls in (t.Vowels, t.Cut, t.Same):
    steps.register(cls)
kind, after = sys.argv[1], int(sys.argv[2])
real, seen = Objects._writing, []
def writing(self, name):
    if name.startswith(kind):
        seen.append(name)
        if len(seen) > after:
            with real(self, name) as temporary:
                temporary.write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
    return real(self, name)
Objects._writing = writing
link = dataset._link
def linking(source, target):
    if kind == "version":
        seen.append(target)
        if len(seen) > after:
            os.kill(os.getpid(), signal.SIGKILL)
    link(source, target)
dataset._link = linking
t.prepare_dataset(t.config(pathlib.Path(sys.argv[3])), pathlib.Path(sys.argv[4]), log=t.quiet)
"""


SLOW = pytest.mark.slow
KINDS = [("shards", 2), ("attributes", 5), ("layers", 3), ("records", 3), ("findings", 0), ("output", 4), ("version", 7)]
MORE_KINDS = [("read", 1), ("states", 2), ("stages", 1), ("reduced", 0), ("inputs", 0), ("hash", 1), ("ranges", 0)]
MORE_KINDS += [("reduce/", 0), ("finish", 0)]


@pytest.mark.parametrize(("kind", "after"), [*KINDS, *(pytest.param(*k, marks=SLOW) for k in MORE_KINDS)])
def test_killed_in_the_middle_of_any_step(kind, after, tmp_path):
    """Row `exact`: SIGKILL while an object is half written; the next run ends in the same bytes, and nothing is left over."""
    folder = corpus(tmp_path / "in")
    settings = config(folder)
    code = KILLED.format(tests=str(pathlib.Path(__file__).parent))
    arguments = [kind, str(after), str(folder), str(tmp_path / "killed")]
    killed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list_versions(tmp_path / "killed")
    whole = prepare_dataset(settings, tmp_path / "whole", log=quiet)
    resumed = prepare_dataset(settings, tmp_path / "killed", log=quiet)
    assert content(resumed) == content(whole)
    assert not list((tmp_path / "killed").rglob("*.tmp*"))


def test_a_pool_of_processes_gives_the_same_and_survives_a_kill(tmp_path):
    """Three workers, of which one is killed: one clear error, and the next run goes on to the same bytes."""
    folder = corpus(tmp_path / "in", count=100)
    steps = [{"step": "length", "at_least": 20}]
    settings = config(folder, steps=steps, shard_bytes=1000)
    whole = prepare_dataset(settings, tmp_path / "whole", log=quiet)
    many = dataclasses.replace(settings, workers=3)
    assert content(prepare_dataset(many, tmp_path / "many", log=quiet)) == content(whole)
    script = tmp_path / "run.py"
    script.write_text(
        "import json, pathlib, sys\nfrom llmos_jax.config import parse\n"
        "from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset\n"
        "if __name__ == '__main__':\n"
        "    prepare_dataset(parse(PrepareConfig, json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]))\n"
    )
    command = [sys.executable, script, json.dumps(to_plain(many)), tmp_path / "killed"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    workers = []
    while not workers and process.poll() is None and time.monotonic() < deadline:
        shards = tmp_path / "killed" / "cache" / "shards"
        if shards.is_dir() and any(shards.iterdir()):
            listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
            workers = [int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line]
        time.sleep(0.005)
    if workers:
        os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0 or "a worker process was killed" in error
    assert content(prepare_dataset(many, tmp_path / "killed", log=quiet)) == content(whole)


def back_and_forth(texts):
    """Stands for a pair of translation models."""
    return [text.replace("one", "single") for text in texts]


def test_copies_stand_behind_their_originals_whatever_the_shards(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
    folder = corpus(tmp_path / "in")
    choices = {"copies": 2, "translate": "test_pipeline:back_and_forth", "sources": ["web"]}
    first = prepare_dataset(config(folder, steps=[], augment=choices), tmp_path / "a", log=quiet)
    other = prepare_dataset(config(folder, steps=[], augment=choices, shard_bytes=900), tmp_path / "b", log=quiet)
    assert rows(first) == rows(other)
    plain = {row["key"]: row["text"] for row in rows(prepare_dataset(config(folder, steps=[]), tmp_path / "c", log=quiet))}
    added, previous = collections.Counter(), None
    for row in rows(first):
        origin, _, how = row["key"].partition("#")
        if how:
            metadata = json.loads(row["metadata"])
            assert origin == previous and metadata["original"] == origin and metadata["augmented"] == how
            assert origin.startswith("web/") and row["text"] != plain[origin]
        else:
            assert row["text"] == plain[origin]
        added[how], previous = added[how] + 1, origin
    assert added[""] == len(plain) and added["noise0"] > 10 and added["noise1"] > 10 and added["translated"] > 10
    (found,) = lookup(first, key=next(row["key"] for row in rows(first) if "#" in row["key"]))
    assert "/web/" in found["file"]["path"]
    with pytest.raises(ConfigError, match="augment.translate=nowhere:f: no MODULE:FUNCTION"):
        prepare_dataset(config(folder, augment={"translate": "nowhere:f"}), tmp_path / "d", log=quiet)
    with pytest.raises(ConfigError, match="augment.sources has 'wib'; the sources are books, web"):
        config(folder, augment={"copies": 1, "sources": ["wib"]})


def test_versions_are_listed_compared_and_collected(tmp_path):
    folder = corpus(tmp_path / "in")
    prepare_dataset(config(folder), tmp_path / "out", log=quiet)
    (folder / "web" / "new.jsonl").write_text('{"text": "one more document with a few words", "url": "u"}\n')
    strict = [STEPS[0] | {"at_least": 40}, *STEPS[1:]]
    second = prepare_dataset(config(folder, steps=strict), tmp_path / "out", log=quiet)
    old, new = list_versions(tmp_path / "out")
    lines = compare(old, new)
    assert "steps.length.at_least: 20 -> 40" in lines
    assert "after read: 120 -> 121 documents" in lines and "source web: 4 -> 5 files, other content" in lines
    before = content(second)
    removed = collect_garbage(tmp_path / "out", keep=1)
    assert str(old.directory) in removed and list_versions(tmp_path / "out") == [new]
    assert content(open_dataset(tmp_path / "out")) == before and not verify(new)
    assert is_dataset(tmp_path / "out") and is_dataset(new.directory) and not is_dataset(folder)
    again = prepare_dataset(config(folder, steps=strict), tmp_path / "out", log=quiet)  # made anew, the same
    assert again.directory == new.directory
    with pytest.raises(ConfigError, match="has no version 1; it has 2"):
        open_dataset(tmp_path / "out", 1)
    with pytest.raises(ConfigError, match="holds no clean dataset"):
        open_dataset(folder)


def test_where_a_text_came_from(tmp_path):
    folder = corpus(tmp_path / "in")
    version = prepare_dataset(config(folder), tmp_path / "out", log=quiet)
    row = rows(version)[7]
    (found,) = lookup(version, key=row["key"])
    source, name = row["key"].split("/")
    path = folder / source / name.partition(":")[0]
    assert found["kept"] and found["text"] == row["text"] and found["file"]["path"] == str(path)
    assert found["metadata"]["licence"] == "CC0" and found["metadata"]["url"].startswith("https://")
    number = int(name.partition(":")[2])
    assert json.loads(path.read_text().splitlines()[number - 1])["text"].split("\n")[0] == row["text"].split("\n")[0]
    places = list(lookup(version, text="same text 0 in both sources"))
    assert [place["kept"] for place in places] == [True, *[False] * (len(places) - 1)] and len(places) > 2
    assert places[1]["reason"] == "seen before"
    assert not list(lookup(version, text="nowhere to be found"))


def test_a_key_is_found_without_reading_all_files(tmp_path, monkeypatch):
    version = prepare_dataset(config(corpus(tmp_path / "in")), tmp_path / "out", log=quiet)
    files = version.manifest["files"]
    assert len(files["index"]) == len(files["documents"]) > 4 and len(files["removed-index"]) == len(files["removed"])
    read, real = [], type(version).read
    monkeypatch.setattr(type(version), "read", lambda self, file, *more: read.append(file["name"]) or real(self, file, *more))
    for kind in ("documents", "removed"):
        for row in list(version.iterate(kind)):
            read.clear()
            (found,) = lookup(version, key=row["key"])
            assert found["kept"] == (kind == "documents") and found["text"] == row["text"]
            assert len([name for name in read if name != "inputs.parquet"]) == 1
    read.clear()
    assert not list(lookup(version, key="books/nothing:1")) and read == ["inputs.parquet"]
    index = version.directory / files["index"][0]["name"]
    content_of_index = bytearray(index.read_bytes())
    content_of_index[-3] ^= 1
    index.unlink()
    index.write_bytes(content_of_index)
    assert any("index-00000.npy" in line for line in verify(version))
    with pytest.raises(DataError, match="index-00000.npy is not what its manifest says"):
        list(lookup(version, key="books/nothing:1"))


def test_parse_round_trip():
    settings = parse(PrepareConfig, {"steps": STEPS})
    assert parse(PrepareConfig, json.loads(json.dumps(to_plain(settings)))) == settings
    assert settings.steps == parse_steps(STEPS)
    assert pipeline._stages(settings.steps) == [list(settings.steps[:3]), list(settings.steps[3:])]
