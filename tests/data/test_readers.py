"""Formats: what each reader yields, and what it says of bad files and records."""

import bz2
import csv
import gzip
import io
import json
import lzma

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from ftfy.badness import is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data.encodings import is_mojibake
from llmos_jax.data.fields import PassedOver
from llmos_jax.data.files import list_path
from llmos_jax.data.sources import SourceConfig, list_files, read_records
from llmos_jax.errors import ConfigError, DataError

PAGE = """<html><head><title>T</title><meta charset="{charset}"><script>var x = 1;</script></head>
<body><nav><a href="/">Home</a> <a href="/b">Blog</a></nav><main><h1>A heading</h1><p>Die Größe der Straße,
about which this paragraph says a lot.</p><p>A second paragraph.</p></main><footer>Imprint</footer></body></html>"""


def read(path, limit=None, passed_over=None, **choices):
    """Returns ([(key, text, metadata)], [messages]) of a source; reasons of what is passed over go into the list of them."""
    source = SourceConfig(path=str(path), **choices)
    documents, bad = [], []
    for file in list_files(source):
        try:
            for item in read_records(source, file, limit):
                if isinstance(item, DataError):
                    bad.append(str(item))
                elif isinstance(item, PassedOver):
                    (passed_over if passed_over is not None else []).append(item.reason)
                else:
                    documents.append((item.key, item.text, item.metadata))
        except DataError as error:
            bad.append(str(error))
    return documents, bad


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard.compress), ("", bytes)],
)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "html"])
def test_every_text_format_under_every_compression(kind, ending, compress, tmp_path):
    rows = [{"text": 'One, "two"\nthree ü', "url": "http://x/1"}, {"text": "next", "url": "http://x/2"}]
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["text", "url"])
    writer.writeheader()
    writer.writerows(rows)
    content = {
        "txt": "One ü\n", "jsonl": "".join(json.dumps(row) + "\n" for row in rows), "csv": stream.getvalue(),
        "html": PAGE.format(charset="utf-8"),
    }[kind].encode()  # fmt: skip
    (tmp_path / f"a.{kind}{ending}").write_bytes(compress(content))
    documents, bad = read(tmp_path / f"a.{kind}{ending}")
    assert not bad
    if kind in ("jsonl", "csv"):
        assert [text for _, text, _ in documents] == [row["text"] for row in rows]
        assert documents[1][0] == f"a.{kind}{ending}:2" and documents[1][2] == {"url": "http://x/2"}
    elif kind == "txt":
        assert documents == [(f"a.txt{ending}", "One ü\n", {})]
    else:
        ((key, text, _),) = documents
        assert "Die Größe der Straße" in text and "A heading" in text and "var x" not in text and "Imprint" not in text
    if ending:  # cut short, it is named; what stands before is used
        (tmp_path / f"a.{kind}{ending}").write_bytes(compress(content * 50)[:-9])
        documents, bad = read(tmp_path / f"a.{kind}{ending}")
        assert len(bad) == 1 and f"a.{kind}{ending}" in bad[0] and "damaged" in bad[0]


def test_columns_of_parquet_and_of_a_hugging_face_folder(tmp_path):
    table = pyarrow.table(
        {
            "id": [1, 2, 3],
            "text": ["a", None, "c"],
            "score": [0.5, None, 1.5],
            "tags": [["x"], [], []],
            "ok": [True, False, True],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    documents, bad = read(tmp_path / "a.parquet")
    assert documents == [
        ("a.parquet:0", "a", {"id": 1, "score": 0.5, "tags": ["x"], "ok": True}),
        ("a.parquet:2", "c", {"id": 3, "score": 1.5, "tags": [], "ok": True}),
    ]
    assert bad == [f"{tmp_path}/a.parquet, row 1 has NoneType in 'text' (text_key), not text."]
    folder = tmp_path / "saved" / "train"  # what datasets.DatasetDict.save_to_disk writes
    folder.mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")
    file = folder / "data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    documents, bad = read(tmp_path / "saved")
    assert [key for key, _, _ in documents] == [f"train/data-00000-of-00001.arrow:{row}" for row in (0, 2)] and len(bad) == 1
    file.write_bytes(b"no arrow at all")
    assert "is not an arrow file" in read(tmp_path / "saved")[1][0]
    assert "has no column 'body' (text_key); it has id, text, score" in read(tmp_path / "a.parquet", text_key="body")[1][0]


def test_a_damaged_row_group_costs_only_itself(tmp_path):
    texts = [f"document {number} " + "word " * 50 for number in range(30)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xa5" * column.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(content)
    documents, bad = read(tmp_path / "a.parquet")
    assert [key for key, _, _ in documents] == [f"a.parquet:{row}" for row in [*range(10), *range(20, 30)]]
    assert len(bad) == 1 and "a.parquet is damaged after row 10" in bad[0]


def warc(records):
    """A web archive, each record a gzip member of its own."""
    parts = []
    for kind, uri, headers, body in records:
        block = (f"HTTP/1.1 {headers}\r\n\r\n".encode() if kind == "response" else b"") + body
        content = "application/http; msgtype=response" if kind == "response" else "text/plain"
        head = (
            f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nWARC-Date: 2026-01-02T03:04:05Z\r\n"
            f"WARC-Record-ID: <urn:uuid:{len(parts)}>\r\nContent-Type: {content}\r\nContent-Length: {len(block)}\r\n\r\n"
        )
        parts.append(gzip.compress(head.encode() + block + b"\r\n\r\n"))
    return parts


def test_pages_of_a_web_archive(tmp_path):
    latin = PAGE.format(charset="iso-8859-1").encode("iso-8859-1")
    records = [
        ("response", "http://a/1", "200 OK\r\nContent-Type: text/html; charset=iso-8859-1", latin),
        ("response", "http://a/2", "404 Not Found\r\nContent-Type: text/html", b"<p>missing</p>"),
        ("response", "http://a/3", "200 OK\r\nContent-Type: image/png", b"\x89PNG"),
        ("response", "http://a/4", "200 OK\r\nContent-Type: text/plain", b"plain words"),
        ("conversion", "http://a/5", "", "extracted wörds".encode()),
    ]
    parts = warc(records)
    (tmp_path / "a.warc.gz").write_bytes(b"".join(parts))
    documents, bad = read(tmp_path / "a.warc.gz")
    assert not bad
    assert [m["url"] for _, _, m in documents] == ["http://a/1", "http://a/4", "http://a/5"]
    assert "Die Größe der Straße" in documents[0][1] and documents[2][1] == "extracted wörds"
    (tmp_path / "a.warc.gz").write_bytes(b"".join(parts)[: -len(parts[-1]) + 60])
    documents, bad = read(tmp_path / "a.warc.gz")
    assert len(documents) >= 2 and len(bad) == 1 and "a.warc.gz is damaged after record" in bad[0]
    (tmp_path / "a.warc.gz").write_bytes(b"nothing of an archive")
    assert "a.warc.gz" in read(tmp_path / "a.warc.gz")[1][0]


ENCODINGS = ("latin-1", "cp1252", "macroman", "cp1251", "iso8859-2", "cp437", "cp1253", "cp1257")
PROSE = (
    "L’été, « l’œuvre » 10 € … Größe ≥ 5 µm — Привет, Київ! ΑΒΓ ώρα 你好，世界。 “Zażółć” § 2² ½ × ° ± naïve Ångström ☃ "
    "a b c . Â ° ‚ Ä € в Ђ Г ў œ \x9d"
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PROSE.split(" ")), max_size=30), st.sampled_from(ENCODINGS), st.integers(0, 60))
def test_signs_of_a_wrong_encoding_are_those_that_ftfy_finds(words, encoding, place):
    text = " ".join(words)
    text = text[:place] + text[place:].encode().decode(encoding, "replace")
    for one in (text, f"{'plain text ' * 3}{text}{' more of it' * 3}{text[:9]}", "".join(words)):
        assert is_mojibake(one) == is_bad(one)


def test_encodings_are_repaired_only_when_asked(tmp_path):
    text = "Größe, Straße, Mädchen, schön und natürlich überall Umlaute. " * 20
    (tmp_path / "latin.txt").write_bytes(text.encode("latin-1"))
    (tmp_path / "utf16.txt").write_bytes(text.encode("utf-16"))
    (tmp_path / "mojibake.txt").write_text(text.encode().decode("cp1252"))
    (tmp_path / "line.jsonl").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode("latin-1") + b"\n")
    documents, bad = read(tmp_path, repair=True)
    assert not bad
    assert {key: done for key, done, _ in documents} == dict.fromkeys(
        ["latin.txt", "line.jsonl:1", "mojibake.txt", "utf16.txt"], text
    )
    assert all("repaired_from" in metadata for _, _, metadata in documents)
    documents, bad = read(tmp_path)
    assert [key for key, _, _ in documents] == ["mojibake.txt"] and len(bad) == 3


def test_urls_are_read_through_fsspec(tmp_path):
    system = fsspec.filesystem("memory")
    with system.open("/corpus/b/1.txt", "wb") as stream:
        stream.write(b"first")
    with system.open("/corpus/2.jsonl.gz", "wb") as stream:
        stream.write(gzip.compress(b'{"text": "second"}\n'))
    documents, bad = read("memory://corpus")
    assert not bad and [(key, text) for key, text, _ in documents] == [("2.jsonl.gz:1", "second"), ("b/1.txt", "first")]
    assert read("memory://corpus/b/1.txt")[0] == [("1.txt", "first", {})]
    before = list_path("memory://corpus")
    with system.open("/corpus/b/1.txt", "wb") as stream:
        stream.write(b"other")
    after = list_path("memory://corpus")
    assert before[0] == after[0] and before[1].stamp != after[1].stamp
    assert len(after[1].content_hash()) == 64
    with pytest.raises(ConfigError, match="memory://nowhere.*does not exist"):
        list_path("memory://nowhere")
    with pytest.raises(ConfigError, match="can't be reached"):
        list_path("nosuch://x")


def test_licence_and_format_are_those_of_the_source(tmp_path):
    (tmp_path / "data").write_text('{"text": "a", "long": "' + "x" * 3000 + '"}\n')
    documents, _ = read(tmp_path / "data", format="jsonl", licence="CC-BY-4.0")
    assert documents == [("data:1", "a", {"licence": "CC-BY-4.0"})]


@pytest.mark.parametrize("kind", ["a.txt", "a.html", "a.jsonl", "a.csv"])
def test_a_long_record_is_named_without_being_held(kind, tmp_path):
    long = "word " * 50_000
    content = {"a.txt": long, "a.html": f"<p>{long}</p>", "a.jsonl": json.dumps({"text": long}) + '\n{"text": "b"}\n',
               "a.csv": f'text\n"{long}"\nb\n'}[kind]  # fmt: skip
    (tmp_path / kind).write_text(content)
    documents, bad = read(tmp_path / kind, limit=10_000)
    assert len(bad) == 1 and kind in bad[0] and ("longer than 10000 bytes" in bad[0] or "field larger" in bad[0])
    if kind == "a.jsonl":
        assert [key for key, _, _ in documents] == ["a.jsonl:2"]
