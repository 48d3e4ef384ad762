"""The verbs of clean datasets, from the command line: raw text to records and back to its file."""

import json
import pathlib

import pytest

from llmos_jax import main as main_lib
from llmos_jax.data.prepare import DataConfig, SourceConfig, prepare
from llmos_jax.errors import EXIT_CONFIG, EXIT_CORRUPT


def run(capsys, *words):
    code = main_lib.main(["llmos", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def folder(tmp_path):
    texts = ["\n".join(f"line {line * number} of {number} lines" for line in range(1 + number % 20)) for number in range(60)]
    lines = [{"text": text, "url": f"http://x/{number}"} for number, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_from_raw_text_to_a_record_and_back(folder, capsys):
    flags = (f"--config=experiments/prepare.py:data={folder / 'in.jsonl'},chain=code", f"--workdir={folder / 'set'}")
    code, _, _ = run(capsys, "prepare", *flags, "--config.workers=1")
    assert code == 0
    code, _, _ = run(capsys, "prepare", *flags, "--config.workers=1", "--config.steps.length.at_least=100")
    workdir = f"--workdir={folder / 'set'}"
    code, out, _ = run(capsys, "dataset", "ls", workdir)
    assert code == 0 and "0001" in out and "0002" in out and "minhash_duplicates" in out
    code, out, _ = run(capsys, "dataset", "compare", workdir)
    assert code == 0 and "steps.length.at_least: 50 -> 100" in out
    code, out, _ = run(capsys, "dataset", "lookup", workdir, "--key=in.jsonl/in.jsonl:8")
    assert code == 0 and str(folder / "in.jsonl") in out and "http://x/7" in out
    source = SourceConfig(path=str(folder / "set"))
    prepared = prepare(
        DataConfig(sources=(source,), tokenizer="byte", length=64, cache_dir=str(folder / "cache"), validation_fraction=0.3),
        log=lambda line: None,
    )
    records = f"--records={prepared.stores[0][0].directory}"
    code, out, _ = run(capsys, "dataset", "lookup", workdir, records, "--record=0")
    assert code == 0 and "kept" in out and str(folder / "in.jsonl") in out
    code, _, err = run(capsys, "dataset", "lookup", workdir, records, "--record=99999")
    assert code == EXIT_CONFIG and "training records" in err
    code, out, _ = run(capsys, "dataset", "gc", workdir)
    assert code == 0 and "removed" in out
    code, out, _ = run(capsys, "dataset", "verify", workdir)
    assert code == 0 and "is whole" in out
    file = next(pathlib.Path(folder / "set" / "versions" / "0002").glob("documents-*.parquet"))
    file.write_bytes(b"other")
    code, _, err = run(capsys, "dataset", "verify", workdir)
    assert code == EXIT_CORRUPT and "damaged" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare"], "--config is missing"),
        (["prepare", "--config=experiments/prepare.py:chain=wbe"], "chain='wbe' is unknown; known: none, text, web, code"),
        (["dataset", "ls"], "--workdir is missing"),
        (["dataset", "ls", "--workdir=/nowhere"], "holds no clean dataset"),
    ],
)
def test_what_is_missing_is_named(words, message, capsys):
    code, _, err = run(capsys, *words)
    assert code == EXIT_CONFIG and message in err
