"""Bad input: each file and record is named, counted and capped; settings that can't work, a full disk, damage."""

import gzip
import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llmos_jax.config import parse, to_plain
from llmos_jax.data.clean.dataset import list_versions, verify
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.errors import ConfigError, DataError
from llmos_jax.evaluate.dataset_report import write_dataset_report
from tests.data.clean.test_pipeline import config, corpus, quiet, steps_of_this_file  # noqa: F401  the steps of `config`


def bad_inputs(folder):
    folder.mkdir()
    good = b'{"text": "a good document of some words"}\n'
    (folder / "a.jsonl").write_bytes(good + b'{"text": 3}\n{"body": "x"}\n{broken\n' + good)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(good * 5000)[:-20])
    (folder / "c.txt").write_bytes("café".encode("latin-1"))
    (folder / "d.txt").write_bytes(b"")
    (folder / "e.jsonl").write_bytes(good + b'{"text": "' + b"long " * 30_000 + b'"}\n' + good)
    (folder / "f.csv").write_bytes(b'text,url\n"a row",http://x\n')
    table = pyarrow.table({"text": ["one row of text"] * 10})
    pyarrow.parquet.write_table(table, folder / "g.parquet")
    (folder / "g.parquet").write_bytes((folder / "g.parquet").read_bytes()[:-30])
    (folder / "h.jsonl").write_bytes(b'{"text": "\xff\xfe bad bytes"}\n' + good)
    (folder / "i.txt").symlink_to(folder / "gone.txt")
    return folder


def test_bad_input_is_named_counted_and_capped(tmp_path):
    folder = bad_inputs(tmp_path / "in")
    tree = {"sources": [{"path": str(folder)}], "workers": 1, "max_document_bytes": 100_000}
    lines = []
    version = prepare_dataset(parse(PrepareConfig, tree), tmp_path / "out", log=lines.append)
    messages = version.manifest["bad"]["messages"]
    for words in (
        "a.jsonl, line 2 has int in 'text'", "a.jsonl, line 3 has no 'text'", "a.jsonl is damaged near line 4",
        "b.jsonl.gz is damaged near line", "c.txt is not UTF-8 (byte 3)", "d.txt is empty",
        "e.jsonl, line 2 is longer than 100000 bytes", "g.parquet is not a parquet file", "h.jsonl is damaged near line 1",
        "i.txt can't be read: No such file",
    ):  # fmt: skip
        assert any(words in message for message in messages), words
    assert version.manifest["bad"]["count"] == len(messages) == 10
    assert any("10 files or records were bad" in line for line in lines)
    keys = {row["key"] for row in version.iterate()}
    assert {"in/a.jsonl:1", "in/a.jsonl:5", "in/e.jsonl:1", "in/e.jsonl:3", "in/f.csv:1", "in/h.jsonl:2"} <= keys
    assert sum(key.startswith("in/b.jsonl.gz:") for key in keys) > 1000 and any("documents before that" in m for m in messages)
    with pytest.raises(DataError, match=r"a.jsonl, line 2 has int .* set on_corrupt=skip"):
        prepare_dataset(parse(PrepareConfig, tree | {"on_corrupt": "error"}), tmp_path / "strict", log=quiet)
    with pytest.raises(DataError, match=r"max_corrupt=3; the first: .*a.jsonl, line 2"):
        prepare_dataset(parse(PrepareConfig, tree | {"max_corrupt": 3}), tmp_path / "capped", log=quiet)
    with pytest.raises(DataError, match=r"10 files or records are bad, more than max_corrupt=3"):  # all of it is in the cache
        prepare_dataset(parse(PrepareConfig, tree | {"max_corrupt": 3}), tmp_path / "out", log=quiet)
    with pytest.raises(DataError, match="on_corrupt=skip"):
        prepare_dataset(parse(PrepareConfig, tree | {"on_corrupt": "error"}), tmp_path / "out", log=quiet)


def test_what_is_said_of_the_policy_is_what_helps(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    good = b'{"text": "a good document of some words"}\n'
    (folder / "max_corrupt=9.jsonl").write_bytes(good + b"{broken\n" + good)
    tree = {"sources": [{"path": str(folder)}], "workers": 1}
    version = prepare_dataset(parse(PrepareConfig, tree), tmp_path / "out", log=quiet)
    assert len(list(version.iterate())) == 2 and version.manifest["bad"]["count"] == 1
    for settings, helpful, useless in (
        ({"max_corrupt": 0}, "1 file or record is bad, more than max_corrupt=0", "on_corrupt=skip"),
        ({"on_corrupt": "error"}, "set on_corrupt=skip", "more than max_corrupt"),
    ):
        for out in ("out", "new"):  # of the cache, and read
            with pytest.raises(DataError) as caught:
                prepare_dataset(parse(PrepareConfig, tree | settings), tmp_path / out, log=quiet)
            assert helpful in str(caught.value) and useless not in str(caught.value)
            assert type(caught.value) is DataError  # the name is shown


def test_what_is_passed_over_is_in_the_manifest_and_the_report(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a good document of some words"}\n{"text": " "}\n')
    (tmp_path / "b.csv").write_text("text,url\n")
    tree = {"sources": [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.csv")], "workers": 1}
    lines = []
    version = prepare_dataset(parse(PrepareConfig, tree), tmp_path / "out", log=lines.append)
    assert version.manifest["passed_over"] == {"blank texts": 1, "files without any record": 1}
    assert version.manifest["bad"]["count"] == 0 and "passed over: 1 blank texts" in lines
    write_dataset_report(tmp_path / "report.html", version)
    assert "passed over: blank texts" in (tmp_path / "report.html").read_text()


def test_settings_that_cannot_work_are_named(tmp_path):
    for tree, words in (
        ({"sources": []}, "sources is empty"),
        ({"steps": [{"step": "lenght"}]}, "did you mean 'length'"),
        ({"steps": [{"step": "length", "at_least": 9, "at_most": 3}]}, "at_least=9 is more than at_most=3"),
        ({"steps": [{"step": "gopher_quality", "min_words": 90, "max_words": 50}]}, "min_words=90 is more than max_words=50"),
        (
            {"steps": [{"step": "gopher_quality", "label": "q", "min_mean_word_length": 11}]},
            "q.min_mean_word_length=11 is more",
        ),
        ({"steps": [{"step": "gopher_quality", "stop_words": ["the"]}]}, "min_stop_words=2 is more than the 1 stop_words"),
        ({"steps": [{"step": "gopher_repetition", "max_top_ngrams": [0.2] * 4}]}, "has 4 numbers: 3 at most"),
        ({"steps": [{"step": "decontaminate", "paths": ["x"], "ngram": 5}]}, "min_words=8 is more than ngram=5"),
        ({"stepz": []}, "did you mean 'steps'"),
        ({"runner": "spark"}, "runner='spark'"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(PrepareConfig, tree)
    with pytest.raises(ConfigError, match="does not exist"):
        prepare_dataset(parse(PrepareConfig, {"sources": [{"path": str(tmp_path / "no")}]}), tmp_path / "out")


def test_a_dataset_inside_its_source_is_refused(tmp_path):
    settings = config(corpus(tmp_path / "in"))
    folder = pathlib.Path(next(source.path for source in settings.sources if pathlib.Path(source.path).is_dir()))
    with pytest.raises(ConfigError, match="lies in the source .*name a folder beside it"):
        prepare_dataset(settings, folder / "deep" / "out", log=quiet)
    assert not (folder / "deep").exists()


def test_no_room_is_named_and_nothing_is_lost(tmp_path):
    """A limit on file sizes stands for the full disk."""
    settings = config(corpus(tmp_path / "in"))
    script = (
        "import resource, sys, json, pathlib\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from llmos_jax.config import parse\nfrom llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset\n"
        "prepare_dataset(parse(PrepareConfig, json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]))\n"
    )
    tree = json.dumps(to_plain(settings) | {"steps": [], "shard_bytes": 1 << 20})
    done = subprocess.run([sys.executable, "-c", script, tree, tmp_path / "small"], capture_output=True, text=True, timeout=120)
    assert "could not be written" in done.stderr and "make room" in done.stderr
    assert not list_versions(tmp_path / "small")


def test_damage_is_found_when_it_is_read(tmp_path):
    version = prepare_dataset(config(corpus(tmp_path / "in")), tmp_path / "out", log=quiet)
    assert not verify(version)
    file = version.files[1]
    good = file.read_bytes()
    for place in np.random.default_rng(1).integers(0, len(good), 20):
        bad = bytearray(good)
        bad[place] ^= 0x10
        file.unlink()
        file.write_bytes(bad)
        assert verify(version) == [f"{file} is not what the manifest says: it was cut, changed or damaged"]
        with pytest.raises(DataError, match=f"{file.name} is not what its manifest says"):
            list(version.iterate())
    file.write_bytes(good[:-5])
    with pytest.raises(DataError, match="it was cut"):
        list(version.iterate())
    file.unlink()
    with pytest.raises(DataError, match="can't be read .No such file"):
        list(version.iterate())
