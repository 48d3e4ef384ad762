"""Planted personal data: none of it may be in any file of a prepared dataset, wherever its document went."""

import contextlib
import json
import pathlib
import random
import string

import numpy as np
import pyarrow.parquet
import pytest

from llmos_jax import api
from llmos_jax.api import load_prepare_settings
from llmos_jax.config import parse
from llmos_jax.data.clean import pii_audit
from llmos_jax.data.clean.dataset import collect_garbage, open_dataset
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.errors import ConfigError, DataError
from llmos_jax.evaluate.dataset_report import write_dataset_report
from tests.data.clean import pii_corpus

URL_HOST = "77.12.9.200"
FILLER = "The quick brown fox jumps over the lazy dog and runs home again. " * 10
KEY_BLOCK = "-----BEGIN PRIVATE KEY-----\n" + "\n".join(
    "".join(random.Random(n).choices(string.ascii_letters, k=64)) for n in range(4)
)
KEY_BLOCK += "\n-----END PRIVATE KEY-----"
LABEL = "If you would like to speak with somebody of our company about this matter, please call the phone number:"


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


def prepared(tmp_path, metadata, **settings):
    """The metadata of a document after preparation, and the folder of its version."""
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"text": FILLER} | metadata) + "\n")
    config = parse(PrepareConfig, {"sources": [{"path": str(file)}], "steps": [{"step": "pii"}], "workers": 1} | settings)
    prepare_dataset(config, tmp_path / "prepared", log=lambda line: None)
    version = open_dataset(tmp_path / "prepared")
    (row,) = version.iterate()
    return json.loads(row["metadata"]), version.directory


def test_metadata_are_read_with_the_names_of_their_fields_and_numbers_as_digits(tmp_path):
    data = {
        "card": (4111111111111111, "[CREDIT_CARD]"),
        "card_of_float": (4111111111111111.0, "[CREDIT_CARD]"),
        "tel": (14155552671, "[PHONE]"),
        "phone": ("4155552671", "[PHONE]"),
        "ssn": ("123456789", "[NATIONAL_ID]"),
        "password": ("hR7$kk29!pQx", "[SECRET]"),
        "api_key": ("9f8a7b6c5d4e3f2a1b0c9d8e", "[SECRET]"),
        "user": ({"homePhone2": 4155552671, "phones": [["4155552672"]]}, {"homePhone2": "[PHONE]", "phones": [["[PHONE]"]]}),
        "phones": ({"4155552673": True}, {"[PHONE]": True}),
        "mobile": ({"4155552674": {"of": "me"}}, {"[PHONE]": {"of": "me"}}),
        "id12": ("DE89370400440532013000", "[IBAN]"),
        "bob@corp-mail.org": ("eve@corp-mail.org", "[EMAIL]"),
    }
    others = {
        "number": 4155552671,
        "is_new": True,
        "score": 0.9876543210123,
        "size": 1e300,
        "year": 2024,
        "n": -7,
    }
    cleaned, folder = prepared(tmp_path, {name: value for name, (value, _) in data.items()} | others)
    expected = {name: value for name, (_, value) in data.items()} | others
    expected["[EMAIL]"] = expected.pop("bob@corp-mail.org")
    assert cleaned == expected
    assert not survivors(folder, ["4111111111111111", "14155552671", "123456789", "hR7$kk29!pQx", "corp-mail", "DE89"])


@pytest.mark.parametrize("on_corrupt", ["skip", "error"])
def test_the_log_holds_no_planted_datum(tmp_path, on_corrupt, caplog):
    """Messages about bad records quote names of fields; so does the error that ends the run, with its trace."""
    data = ["bob@corp-mail.org", "+41 44 668 18 00"]
    caplog.set_level("INFO", logger="absl")
    file = tmp_path / "bad.jsonl"
    records = [{"text": FILLER, data[0]: "x" * 5000}, {data[0]: "no text", data[1]: 2}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {"sources": [{"path": str(file)}], "workers": 1, "on_corrupt": on_corrupt}
    for steps, expected in ([], data), ([{"step": "pii"}], []):
        folder = tmp_path / f"prepared-{len(steps)}"
        ends = pytest.raises(DataError) if on_corrupt == "error" else contextlib.nullcontext()
        with ends as error:
            api.run_preparation(parse(PrepareConfig, config | {"steps": steps}), folder)
        log = (folder / "log.txt").read_text()
        assert "bad.jsonl" in log and [datum for datum in data if datum in log] == expected
        if error:
            assert [datum for datum in data if datum in str(error.value)] == expected


@pytest.mark.parametrize(
    "cutting",
    [
        [{"step": "c4_lines", "needs_end_mark": False}],
        [{"step": "boilerplate"}],
        [{"step": "repeated_paragraphs"}, {"step": "length"}],
        [{"step": "repeated_paragraphs", "unit": "line"}, {"step": "c4_lines"}, {"step": "length", "at_least": 10_000}],
    ],
    ids=str,
)
def test_what_is_cut_takes_no_context_from_a_datum(tmp_path, cutting):
    """The mark before a key, the words before a number: gone in the text that is kept, or in the file of what was cut."""
    rng = random.Random(7)
    words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(500)]
    filler = [" ".join(rng.choices(words, k=60)) for _ in range(4)]
    numbers = ["4155552671", "4155552672"]
    texts = [f"{filler[n]}.\n\n{LABEL}\n\n{number}" for n, number in enumerate(numbers)]
    texts += [
        f"{filler[2]}.\n{KEY_BLOCK}\n{filler[3]}. My social security number is\n219099998\nand my password is\nTr0ub4dor&3x"
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = {"sources": [{"path": str(file)}], "workers": 1, "steps": [{"step": "normalise"}, {"step": "pii"}, *cutting]}
    prepare_dataset(parse(PrepareConfig, config), tmp_path / "out", log=lambda line: None)
    version = open_dataset(tmp_path / "out")
    write_dataset_report(version.directory / "report.html", version)
    assert {row["step"] for row in version.iterate("cut")} >= {"pii", cutting[0]["step"]}
    assert not survivors(version.directory, [*numbers, "219099998", "Tr0ub4dor", *KEY_BLOCK.split("\n")[1:-1]])


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_cut_joins_is_looked_at_again(tmp_path, workers):
    """A number three lines behind its word is none until the lines between them go; sizes are those of what is kept."""
    text = "You can reach us by telephone:\n{}\n4155552671 is what to dial.\n"
    between = "We have read the privacy policy and the terms of use with all that is in them."
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} of them. " + text.format(between)}) + "\n" for n in range(20)))
    config = {"sources": [{"path": str(file)}], "workers": workers, "shard_bytes": 500}
    steps = [{"step": "pii"}, {"step": "c4_lines", "needs_end_mark": False}]
    only = prepare_dataset(parse(PrepareConfig, config | {"steps": steps[:1]}), tmp_path / "out", log=lambda line: None)
    assert all("4155552671" in row["text"] for row in only.iterate())
    version = prepare_dataset(parse(PrepareConfig, config | {"steps": steps}), tmp_path / "out", log=lambda line: None)
    kept = list(version.iterate())
    assert [row["text"].split("\n")[1] for row in kept] == ["[PHONE] is what to dial."] * 20
    assert version.manifest["funnel"][-1]["utf8_bytes"] == sum(len(row["text"]) for row in kept)
    # The same steps without the first one are not served from what was found with it.
    plain = prepare_dataset(parse(PrepareConfig, config | {"steps": steps[1:]}), tmp_path / "out", log=lambda line: None)
    assert all("4155552671" in row["text"] for row in plain.iterate())


def test_a_step_that_cuts_is_refused_before_one_that_protects():
    steps = [{"step": "normalise"}, {"step": "boilerplate"}, {"step": "length"}, {"step": "pii"}]
    with pytest.raises(ConfigError, match="'boilerplate' cuts or joins texts before 'pii'.*put 'pii' before it"):
        parse(PrepareConfig, {"steps": steps})
    with pytest.raises(ConfigError, match="'normalise' cuts or joins texts before 'pii'"):
        parse(PrepareConfig, {"steps": [{"step": "normalise", "form": "NFKC"}, {"step": "pii"}]})
    parse(PrepareConfig, {"steps": [{"step": "pii"}, {"step": "normalise", "form": "NFKC"}]})
    with pytest.raises(ConfigError, match="augment changes copies .* before 'pii'"):
        parse(PrepareConfig, {"steps": [{"step": "pii"}], "augment": {"copies": 1}})
    for chain in ("text", "web", "code", "none"):
        settings, _ = load_prepare_settings(f"experiments/prepare.py:data=a,chain={chain},pii=label,evaluations=b")
        names = [step.step for step in settings.steps]
        assert names.index("decontaminate") + 1 == names.index("pii")


def test_a_dataset_that_was_cut_before_it_is_searched_is_named(tmp_path):
    """Two runs do what one run is refused: nobody can undo the first, so that log, manifest and audit say so."""
    file, lines = tmp_path / "a.jsonl", []
    file.write_text(json.dumps({"text": "Call us by telephone:\n4155552671 is what to dial.\n"}) + "\n")

    def prepared(source, out, *names):
        lines.clear()
        steps = [{"step": name} for name in names]
        config = parse(PrepareConfig, {"sources": [{"path": str(source)}], "steps": steps, "workers": 1})
        return prepare_dataset(config, tmp_path / out, log=lines.append)

    prepared(file, "cut", "normalise", "boilerplate")
    assert not any("WARNING" in line for line in lines)
    version = prepared(tmp_path / "cut", "searched", "pii")
    (warning,) = [line for line in lines if "WARNING" in line]
    assert all(word in warning for word in ("'boilerplate'", "'pii'", str(tmp_path / "cut")))
    assert warning in pii_audit.format_audit(pii_audit.audit(version)).splitlines()
    prepared(tmp_path / "cut", "not searched", "normalise")
    assert not any("WARNING" in line for line in lines)
    prepared(file, "whole", "pii", "boilerplate")
    version = prepared(tmp_path / "whole", "searched twice", "pii")
    assert not any("WARNING" in line for line in lines) and not pii_audit.audit(version)["warnings"]


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
