"""Planted personal data: none of it may be in any file of a prepared dataset, wherever its document went."""

import json
import pathlib

import numpy as np
import pyarrow.parquet
import pytest

from llmos_jax.config import parse
from llmos_jax.data.clean import pii_audit
from llmos_jax.data.clean.dataset import collect_garbage, open_dataset
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.errors import ConfigError
from llmos_jax.evaluate.dataset_report import write_dataset_report
from tests.data.clean import pii_corpus

URL_HOST = "77.12.9.200"
FILLER = "The quick brown fox jumps over the lazy dog and runs home again. " * 10


def content_of(folder):
    """All that is written in the files of a folder, decompressed."""
    parts = []
    for file in sorted(pathlib.Path(folder).rglob("*")):
        if file.suffix == ".parquet":
            parts.append(json.dumps(pyarrow.parquet.read_table(file).to_pylist(), ensure_ascii=False, default=str))
        elif file.suffix == ".npz":
            with np.load(file) as arrays:
                parts += [str(arrays[name].tolist()) for name in arrays]
        elif file.is_file():
            parts.append(file.read_bytes().decode("utf-8", "replace"))
    return "\n".join(parts)


def survivors(folder, planted):
    content = content_of(folder)
    # Parquet's rows are shown as JSON: a line end is two characters there.
    return [datum for datum in planted if datum in content or json.dumps(datum, ensure_ascii=False)[1:-1] in content]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Documents with data in short texts (removed), in long ones (kept), in equal ones and in metadata."""
    items = pii_corpus.personal(seed=21, count=25)
    file = tmp_path_factory.mktemp("planted") / "documents.jsonl"
    with file.open("w") as stream:
        for number, (_, _, text) in enumerate(items):
            for body in (text, f"{FILLER}\n{text}\n{FILLER}"):
                metadata = {"number": number, "author": f"By X. {text}", "url": f"http://{URL_HOST}/{number}"}
                stream.write(json.dumps({"text": body} | metadata) + "\n")
    return file, [*(datum for _, datum, _ in items), URL_HOST]


@pytest.mark.parametrize("is_first", [True, False])
def test_no_planted_datum_survives(planted, tmp_path, is_first):
    file, data = planted
    filters = [{"step": "url"}, {"step": "length", "at_least": 1000}]
    steps = [{"step": "pii"}, *filters] if is_first else [*filters, {"step": "pii"}]
    config = parse(PrepareConfig, {"sources": [{"path": str(file)}], "steps": steps, "workers": 1, "shard_bytes": 20_000})
    prepare_dataset(config, tmp_path, log=lambda line: None)
    version = open_dataset(tmp_path)
    kept, removed = list(version.iterate()), list(version.iterate("removed"))
    assert len(kept) == len(removed) == len(data) - 1
    assert {row["url/host"] for row in kept} == {"[IP]"}
    assert not survivors(version.directory, data)
    write_dataset_report(tmp_path / "report.html", version)
    page = (tmp_path / "report.html").read_text()
    counts = sum(sum(value for name, value in row.items() if name.startswith("pii/")) for row in kept)
    assert counts >= len(data) - 1 and len(list(version.iterate("cut"))) >= len(kept)
    report = pii_audit.audit(version)
    assert report["documents"] == (len(data) - 1) * (1 + is_first)
    for kind, entry in report["kinds"].items():  # the page counts what later steps removed, too
        assert f"<td class='left'>{kind}</td><td class='right'>{entry['count']:,}</td>" in page
    assert sum(entry["count"] for entry in report["kinds"].values()) >= len(data) - 1
    assert not any(datum in pii_audit.format_audit(report) for datum in data)
    # The raw shards are work, not result; they go with the rest of the cache.
    collect_garbage(tmp_path, keep=1)
    assert survivors(tmp_path, data)
    collect_garbage(tmp_path, keep=1, drop_cache=True)
    assert not survivors(tmp_path, data)


def test_no_planted_datum_survives_where_records_are_bad_or_name_fields(tmp_path):
    """A table without a header: its first record names the fields, and messages say which there are."""
    data = ["bob@corp-mail.org", "eve@corp-mail.org", "77.12.9.200", "+41 44 668 18 00", "4111 1111 1111 1111"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.csv").write_text(f"{data[0]},{data[2]},{data[3]}\n{data[1]},{data[2]},{data[4]}\n")
    (source / "b.jsonl").write_text(
        json.dumps({data[0]: 1, data[1]: [2], "text": FILLER, "long": "x" * 5000})
        + "\n"
        + json.dumps({data[0]: 1, data[3]: "no text"})
        + "\n"
        + f'{{"text": "{data[4]}"'
        + "\n"
        + json.dumps({"text": FILLER[::-1], data[4]: data[0], data[1]: "x" * 5000})
    )
    config = {"sources": [{"path": str(source)}], "workers": 1}
    for steps, expected in ([{"step": "length"}], {*data[:2], data[3]}), ([{"step": "length"}, {"step": "pii"}], set()):
        folder = tmp_path / str(len(steps))
        prepare_dataset(parse(PrepareConfig, config | {"steps": steps}), folder, log=lambda line: None)
        version = open_dataset(folder)
        assert version.manifest["bad"]["count"] == 3 and version.manifest["passed_over"]
        write_dataset_report(version.directory / "report.html", version)
        found = set(survivors(version.directory, data))
        assert found >= expected if expected else not found
    names = sorted(sorted(json.loads(row["metadata"])) for row in version.iterate())
    assert names == [["[CREDIT_CARD]"], ["[EMAIL]", "[EMAIL]_"]]


def test_without_the_step_they_are_all_there(planted, tmp_path):
    """The reader above finds what is there to be found."""
    file, data = planted
    config = parse(
        PrepareConfig, {"sources": [{"path": str(file)}], "steps": [{"step": "length", "at_least": 1000}], "workers": 1}
    )
    prepare_dataset(config, tmp_path, log=lambda line: None)
    assert survivors(open_dataset(tmp_path).directory, data) == data
    with pytest.raises(ConfigError, match="without the step pii"):
        pii_audit.audit(open_dataset(tmp_path))
