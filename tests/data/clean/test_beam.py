"""Beam gives the records of the process pool. It needs an environment of its own (protobuf < 7): skipped elsewhere."""

import json
import pathlib

import pytest

from llmos_jax.config import parse, to_plain
from llmos_jax.data.clean import beam as beam_lib
from llmos_jax.data.clean.beam import BeamRunner
from llmos_jax.data.clean.objects import Objects
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.data.clean.reading import read_task
from llmos_jax.data.sources import list_files
from llmos_jax.errors import ConfigError, DataError


def quiet(line):
    pass


def settings(tmp_path, **choices):
    texts = [f"document {number % 70} with some words that stand in it, and {number % 7} more" for number in range(200)]
    (tmp_path / "in").mkdir(exist_ok=True)
    for part in range(4):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part::4]]
        (tmp_path / "in" / f"{part}.jsonl").write_text("".join(lines))
    steps = [{"step": "length", "at_least": 30}, {"step": "exact_duplicates"}, {"step": "minhash_duplicates"}]
    tree = {"sources": [{"path": str(tmp_path / "in")}], "shard_bytes": 3000, "workers": 2, "steps": steps}
    return parse(PrepareConfig, tree | choices)


def content(version):
    return {file.name: file.read_bytes() for file in sorted(version.directory.iterdir())}


def test_beam_and_the_pool_give_the_same_bytes(tmp_path):
    pytest.importorskip("apache_beam")
    pool = prepare_dataset(settings(tmp_path), tmp_path / "pool", log=quiet)
    beam = prepare_dataset(settings(tmp_path, runner="beam"), tmp_path / "beam", log=quiet)
    assert content(beam) == content(pool)
    assert 0 < beam.manifest["funnel"][-1]["documents"] < 200


def test_an_error_in_a_task_is_the_one_that_the_pool_gives(tmp_path):
    pytest.importorskip("apache_beam")
    chosen = settings(tmp_path, runner="beam", on_corrupt="error")
    (tmp_path / "in" / "bad.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="bad.jsonl is damaged near line 1"):
        prepare_dataset(chosen, tmp_path / "out", log=quiet)
    (tmp_path / "in" / "bad.jsonl").unlink()
    prepare_dataset(chosen, tmp_path / "out", log=quiet)


def test_beam_takes_the_options_of_the_readme():
    """Every one is known to Beam, and its own checks of an environment for workers pass."""
    options = pytest.importorskip("apache_beam.options.pipeline_options")
    validator = pytest.importorskip("apache_beam.options.pipeline_options_validator")
    readme = (pathlib.Path(__file__).parents[3] / "README.md").read_text()
    lines = [line.partition("beam_options=")[2] for line in readme.splitlines() if "beam_options=" in line]
    assert len(lines) == 3
    for line in lines:
        given = options.PipelineOptions(line.split(","))
        known = given.get_all_options(drop_default=True)
        assert set(known) == {part.partition("=")[0].removeprefix("--") for part in line.split(",")}
        assert not given.view_as(options.PortableOptions).validate(validator.PipelineOptionsValidator(given, None))


def test_an_error_of_any_class_comes_back(tmp_path):
    """What a worker does and the one who waits for it, without Beam between them."""
    chosen = settings(tmp_path, on_corrupt="error")
    (tmp_path / "in" / "bad.jsonl").write_text("{broken\n")
    files, objects = list_files(chosen.sources[0]), Objects(tmp_path / "out")
    task = read_task(chosen.sources[0], "in", files, [file.content_hash() for file in files], chosen)
    beam_lib._run_text(json.dumps(to_plain(task)), objects.root)
    with pytest.raises(DataError, match="bad.jsonl is damaged near line 1"):
        beam_lib._result(objects, task)
    with pytest.raises(DataError, match="was not written: do all workers see"):
        beam_lib._result(objects, task)


def test_without_beam_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"pip install 'llmos-jax\[beam\]'"):
        BeamRunner(tmp_path, (), 1)
