"""parquet and Arrow: values of every type, rows that are bad or long, and how much of them is held."""

import datetime
import decimal
import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_readers import read


def write(path, table, **options):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, **options)
        return
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def invalid(values):
    """Strings of which some are no UTF-8, as faulty writers leave them."""
    return pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())


@pytest.fixture(params=["a.parquet", "a.arrow"])
def path(request, tmp_path):
    return tmp_path / request.param


def test_a_row_that_is_no_utf8_costs_only_itself(path):
    rows = [f"row {number}".encode() for number in range(5000)]
    rows[1500] = b"bad \xff\xfe bytes"
    titles = [b"t"] * 5000
    titles[7] = b"half \xff"
    write(path, pyarrow.table({"text": invalid(rows), "title": invalid(titles)}))
    documents, bad = read(path)
    assert [key for key, _, _ in documents] == [f"{path.name}:{number}" for number in range(5000) if number != 1500]
    assert documents[7][2] == {"title": "half \ufffd"} and documents[8][2] == {"title": "t"}
    assert len(bad) == 1 and f"{path}, row 1500, 'text', is not UTF-8 (byte 4)" in bad[0]


def test_values_of_every_type_that_json_can_hold(path):
    table = pyarrow.table(
        {
            "text": pyarrow.array(["a text", "b text"]).dictionary_encode(),
            "lang": pyarrow.array(["en", "de"]).dictionary_encode(),
            "meta": [{"url": "http://x", "n": [1, 2]}, {"url": None, "n": []}],
            "when": pyarrow.array([1, 2], pyarrow.timestamp("s")),
            "day": [datetime.date(2026, 1, 2), None],
            "span": pyarrow.array([5, None], pyarrow.duration("s")),
            "price": pyarrow.array([decimal.Decimal("1.50"), None], pyarrow.decimal128(5, 2)),
            "score": [float("nan"), float("-inf")],
            "image": [b"\x89PNG", None],
            "pictures": [[{"bytes": b"x"}], []],
            "long": ["x" * 2001, "y" * 9000],
            "vector": [[0.5] * 3000, [0.5]],
        }
    )
    write(path, table)
    passed_over = []
    documents, bad = read(path, passed_over=passed_over)
    assert not bad and [text for _, text, _ in documents] == ["a text", "b text"]
    assert documents[0][2] == {
        "lang": "en", "meta": {"url": "http://x", "n": [1, 2]}, "when": "1970-01-01T00:00:01", "day": "2026-01-02",
        "span": "0:00:05", "price": "1.50",
    }  # fmt: skip
    assert documents[1][2] == {
        "lang": "de", "meta": {"url": None, "n": []}, "when": "1970-01-01T00:00:02", "score": "-inf", "vector": [0.5],
    }  # fmt: skip
    json.dumps([metadata for _, _, metadata in documents], allow_nan=False)
    assert sorted(passed_over) == [
        "metadata: 'image' is binary", "metadata: 'long' of more than 2000 characters",
        "metadata: 'long' of more than 2000 characters",
        f"metadata: 'pictures' is list<{'element' if path.suffix == '.parquet' else 'item'}: struct<bytes: binary>>",
        "metadata: 'vector' of more than 2000 characters",
    ]  # fmt: skip


def test_times_that_python_cannot_hold_are_text(tmp_path):
    """Nanoseconds, years after 9999 and unknown zones; of what is left, a span of more days than Python counts is named."""
    kind, far = pyarrow.timestamp, 2**31 - 1
    columns = {
        "ns": ([1234567890123456789, 1_500_000_000], kind("ns")),
        "zone": ([90, 0], kind("s", "Mars/Base")),
        "known": ([1_500, 0], kind("ms", "Europe/Berlin")),
        "year": ([10**12, 0], kind("s")),
        "day": ([far, 10**7], pyarrow.date32()),
        "clock": ([1, 3_600_000_000_000], pyarrow.time64("ns")),
        "span": ([5, 7], pyarrow.duration("ns")),
        "list": ([[1], [2]], pyarrow.list_(kind("ns"))),
        "inside": ([{"a": [{"b": 3}]}, None], pyarrow.struct([("a", pyarrow.list_(pyarrow.struct([("b", kind("ns", "X"))])))])),
        "coded": ([1, 1], kind("ns")),
        "seconds": ([5, 2**62], pyarrow.duration("s")),
    }
    table = pyarrow.table({"text": ["a", "b"]} | {name: pyarrow.array(*values) for name, values in columns.items()})
    place = table.schema.get_field_index("coded")
    table = table.set_column(place, "coded", table["coded"].dictionary_encode())
    write(tmp_path / "a.arrow", pyarrow.concat_tables([table, table.slice(0, 1)]))
    documents, bad = read(tmp_path / "a.arrow")
    assert [key for key, _, _ in documents] == ["a.arrow:0", "a.arrow:2"] and documents[0][2] == documents[1][2]
    assert documents[0][2] == {
        "ns": "2009-02-13T23:31:30.123456789", "zone": "1970-01-01T00:01:30Z", "known": "1970-01-01T00:00:01.5Z",
        "year": "<value out of range: 1000000000000>", "day": f"<value out of range: {far}>", "clock": "00:00:00.000000001",
        "span": "5", "list": ["1970-01-01 00:00:00.000000001"],
        "inside": {"a": [{"b": "1970-01-01 00:00:00.000000003Z"}]}, "coded": "1970-01-01T00:00:00.000000001",
        "seconds": "0:00:05",
    }  # fmt: skip
    assert len(bad) == 1 and f"{tmp_path}/a.arrow, row 1 holds a value that Python can't: " in bad[0]


@pytest.mark.parametrize("name", ["text", "title"])
def test_a_file_with_two_columns_of_one_name_is_named(path, name):
    write(path, pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["text", "title", name]))
    documents, bad = read(path)
    assert not documents and bad == [f"{path} has 2 columns named {name!r}: rename them, so that none is lost."]


def test_long_rows_are_named_and_no_others_are_lost(path):
    texts = [f"text {number}" for number in range(3000)]
    texts[5] = texts[2100] = "long " * 3000
    texts[6] = "ü" * 6000  # fewer characters than bytes
    write(path, pyarrow.table({"text": texts, "url": [f"http://x/{number}" for number in range(3000)]}))
    documents, bad = read(path, limit=10_000)
    assert [key for key, _, _ in documents] == [f"{path.name}:{n}" for n in range(3000) if n not in (5, 6, 2100)]
    assert documents[-1][2] == {"url": "http://x/2999"}
    assert bad == [f"{path}, row {row} is longer than 10000 bytes (max_document_bytes)." for row in (5, 6, 2100)]
    write(path, pyarrow.table({"text": pyarrow.array(["short", "long " * 3000]).dictionary_encode()}))
    documents, bad = read(path, limit=10_000)
    assert len(documents) == len(bad) == 1 and "longer than 10000 bytes" in bad[0]


def test_few_long_rows_are_taken_at_once(path, monkeypatch):
    from llmos_jax.data import columns

    seen, real = [], columns._records
    monkeypatch.setattr(columns, "_records", lambda batch: seen.append(len(batch)) or real(batch))
    write(path, pyarrow.table({"text": [f"{number} " + "word " * 200_000 for number in range(40)]}))  # 1 MB each
    documents, bad = read(path)
    assert len(documents) == 40 and not bad and max(seen) <= 17
    assert [key for key, _, _ in documents] == [f"{path.name}:{number}" for number in range(40)]


def test_a_file_without_rows_is_counted(path):
    write(path, pyarrow.table({"text": pyarrow.array([], pyarrow.string())}))
    passed_over = []
    assert read(path, passed_over=passed_over) == ([], []) and passed_over == ["files without any record"]
