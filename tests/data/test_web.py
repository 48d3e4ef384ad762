"""Web archives: damage is found wherever it is, every record that gives no page is counted, labels are not believed."""

import bz2
import gzip
import io
import lzma
import zlib

import pytest
import zstandard
from fastwarc.stream_io import BrotliWriter
from resiliparse.extract.html2text import extract_plain_text

from tests.data.test_readers import read

OK = "200 OK\r\nContent-Type: text/html; charset=utf-8"
CRLF = "\r\n"


def page(number):
    body = f"Page {number} holds a paragraph of wörds, and more words. " * 40
    return f"<html><body><main><p>{body}</p></main></body></html>".encode()


def record(headers, body, kind="response", extra=""):
    """One record of an archive."""
    block = (f"HTTP/1.1 {headers}\r\n\r\n".encode("latin-1") if kind == "response" else b"") + body
    content = "application/http; msgtype=response" if kind == "response" else "text/plain"
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://a/\r\nWARC-Date: 2026-01-02T03:04:05Z\r\n{extra}"
        f"Content-Type: {content}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


RECORDS = [record(OK, page(number)) for number in range(20)]
PACKED = [gzip.compress(one) for one in RECORDS]


def archive(path, data, passed_over=None, **choices):
    """Returns (numbers of the records that gave documents, messages)."""
    path.write_bytes(data)
    documents, bad = read(path, passed_over=passed_over, **choices)
    return [int(key.rpartition(":")[2]) for key, _, _ in documents], bad


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.warc", bytes), ("a.warc.gz", gzip.compress), ("a.warc.bz2", bz2.compress), ("a.warc.xz", lzma.compress),
        ("a.warc.zst", zstandard.compress),
    ],
)  # fmt: skip
def test_an_archive_that_is_cut_is_named(name, compress, tmp_path):
    whole = compress(b"".join(RECORDS))
    assert archive(tmp_path / name, whole) == ([*range(1, 21)], [])
    _, bad = archive(tmp_path / name, whole[: len(whole) // 2])
    assert len(bad) == 1 and f"{name} is damaged after record" in bad[0]


def test_an_archive_of_packed_records_that_is_cut_is_named(tmp_path):
    path, whole = tmp_path / "a.warc.gz", b"".join(PACKED)
    assert archive(path, whole) == ([*range(1, 21)], [])
    size = len(PACKED[10])
    # In the headers, in the text, and behind it: in the checksum. No record that is whole is lost.
    for cut, whole_ones in ((15, 10), (size // 2, 10), (size - 4, 11)):
        found, bad = archive(path, b"".join(PACKED[:10]) + PACKED[10][:cut])
        assert found == [*range(1, whole_ones + 1)]
        assert len(bad) == 1 and f"a.warc.gz is damaged after record {whole_ones}: " in bad[0]
    flipped = bytearray(whole)
    flipped[sum(map(len, PACKED[:10])) + len(PACKED[10]) - 6] ^= 1
    found, bad = archive(path, flipped)
    assert found == [*range(1, 11)] and len(bad) == 1 and "after record 10: " in bad[0] and "incorrect data check" in bad[0]
    found, bad = archive(path, whole + b"no archive")
    assert len(found) == 20 and len(bad) == 1 and "damaged after record 20" in bad[0]


def test_a_plain_archive_is_read_behind_what_is_bad(tmp_path):
    path, text = tmp_path / "a.warc", b"".join(RECORDS)
    head = RECORDS[10].replace(b"Content-Length: ", b"Content-Length: 1")  # its end lies in a later record
    found, bad = archive(path, b"".join(RECORDS[:10]) + head + b"".join(RECORDS[11:]))
    assert found[:10] == [*range(1, 11)] and 11 not in found and len(found) > 10
    assert len(bad) == 1 and "record 11 does not end where it says" in bad[0]
    for wrong in (b"Content-Length: x", b"Content-Longth: "):
        head = RECORDS[10].replace(b"Content-Length: ", wrong)
        found, bad = archive(path, b"".join(RECORDS[:10]) + head + b"".join(RECORDS[11:]))
        assert len(found) == 19 and len(bad) == 1 and "record 11 has Content-Length" in bad[0]
    found, bad = archive(path, b"".join(RECORDS[:10]) + b"junk\r\n\r\n" + b"".join(RECORDS[10:]))
    assert len(found) == 20 and len(bad) == 1 and "record 11 does not begin where" in bad[0]
    for cut in (100, len(RECORDS[19]) - 20):
        found, bad = archive(path, text[: len(text) - len(RECORDS[19]) + cut])
        assert len(found) == 19 and len(bad) == 1 and "damaged after record 19" in bad[0]
    found, bad = archive(path, b"nothing of an archive\n" * 9)
    assert not found and bad == [f"{path} holds no record of a web archive."]


@pytest.mark.timeout(60)
def test_a_record_that_is_cut_in_its_headers_is_named_and_costs_only_itself(tmp_path):
    """At every place: what is left of it stands before the next one, and may be taken for a part of that."""
    path = tmp_path / "a.warc"
    whole = RECORDS[1].index(b"\r\n\r\n") + 4
    for cut in range(1, whole):
        found, bad = archive(path, RECORDS[0] + RECORDS[1][:cut] + RECORDS[2] + RECORDS[3])
        assert found == [1, 3, 4] and len(bad) == 1 and "a.warc, record 2 " in bad[0], (RECORDS[1][:cut], found, bad)
    odd = record(OK, page(1)).replace(b"http://a/", b"http://a/WARC/1.0")
    assert archive(path, odd + RECORDS[0]) == ([1, 2], [])


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
@pytest.mark.parametrize(
    "headers",
    [
        "WARC-Concurrent-To: a\nX: http://x/WARC/1.0\nWARC-Concurrent-To: b", "X: http://x/\n WARC/1.0",
        "X: a\n b\nY: WARC/1.0\n b",
        f"X: http://x/{'x' * 70_000}WARC/1.0", f"X: {'x' * (65536 - 3)}WARC/1.0 and more", f"X: {'x' * 65536}WARC/1.0",
    ],
)  # fmt: skip
def test_a_version_within_headers_is_not_always_a_cut(headers, end, tmp_path):
    odd = record(OK, page(1), extra=headers.replace("\n", "\r\n") + "\r\n")
    head, _, body = odd.partition(b"\r\n\r\n")
    odd = head.replace(b"\r\n", end) + end + end + body
    assert archive(tmp_path / "a.warc", odd + RECORDS[0]) == ([1, 2], [])


def test_a_length_that_no_file_has_is_named(tmp_path):
    long = RECORDS[0].replace(b"Content-Length: ", b"Content-Length: " + b"9" * 5000)
    found, bad = archive(tmp_path / "a.warc", RECORDS[0] + long + RECORDS[1])
    assert found == [1, 3] and len(bad) == 1 and "record 2 has Content-Length '(5004 characters)'" in bad[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("main_content", [False, True])
@pytest.mark.parametrize("lists", ["<ul><li>" * 5000 + "<p>x" * 5000, "<OL>" * 50_000 + "<li>x" * 50_000])
def test_the_text_of_deep_lists_is_no_longer_than_the_page(lists, main_content, tmp_path):
    """Indented by their depth they were hundreds of megabytes, or the end of the process."""
    (tmp_path / "a.html").write_text(f"<html><body>{lists}")
    ((_, text, metadata),), bad = read(tmp_path / "a.html", main_content=main_content)
    assert not bad and text.count("x") == lists.count("x") and len(text) < len(lists)
    assert metadata == ({"main_content": False} if main_content else {})


def test_what_holds_no_page_is_counted_by_reason(tmp_path):
    records = [
        record("404 Not Found\r\nContent-Type: text/html", page(0)),
        record("200 OK\r\nContent-Type: Image/PNG", b"\x89PNG\0"),
        record("200 OK\r\nServer: x", b"\x89PNG\0"),
        record(OK, b"<html><body><script>var x = 1</script></body></html>"),
        record(OK, b"", kind="request"), record("", b"GET", kind="revisit"), record("", b"  ", kind="conversion"),
        record("", b"dns:", kind="response").replace(b"HTTP/1.1", b"20260102"),
    ]  # fmt: skip
    passed_over = []
    found, bad = archive(tmp_path / "a.warc", b"".join(records) + RECORDS[0], passed_over)
    assert found == [len(records) + 1] and not bad
    assert passed_over == [
        "web archive: status 404", "web archive: content of type image/png", "web archive: content of type unknown",
        "web archive: page without text", "web archive: record of type request", "web archive: record of type revisit",
        "web archive: page without text", "web archive: response of another protocol than HTTP",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "headers",
    [
        "200 OK\r\nServer: x", "200 OK\r\nContent-Type: Text/HTML", "200 OK\r\ncontent-type:text/html;charset=UTF-8",
        "200 OK\r\nContent-Type: application/xhtml+xml", f"{OK}\r\nContent-Encoding: gzip", f"{OK}\r\nContent-Encoding: br",
        f"{OK}\r\nContent-Encoding: deflate", f"{OK}\r\nTransfer-Encoding: chunked",
        *(f"200 OK\r\nContent-Type: text/html; charset={label}" for label in (
            "utf8mb4", "foo", "hex", "undefined", "idna", "rot13", "utf-16", '"utf-8"', "", "unicode_escape", "ascii",
        )),
    ],
)  # fmt: skip
def test_false_and_missing_headers_cost_no_page(headers, tmp_path):
    documents, bad = read_one(tmp_path, record(headers, page(1)) + RECORDS[0])
    assert not bad and len(documents) == 2
    starts = tuple(f"Page {number} holds a paragraph of wörds" for number in (1, 0))
    assert [text.startswith(start) for start, (_, text, _) in zip(starts, documents, strict=True)] == [True, True]


def read_one(folder, data, **choices):
    (folder / "a.warc").write_bytes(data)
    return read(folder / "a.warc", **choices)


def deflate(data):
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def brotli(data):
    sink = io.BytesIO()
    stream = BrotliWriter(sink)
    stream.write(data)
    stream.close()
    return sink.getvalue()


def chunked(data):
    parts = [data[start : start + 100] for start in range(0, len(data), 100)]
    return b"".join(f"{len(part):x};x=y\r\n".encode() + part + b"\r\n" for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("header", "encode"),
    [
        ("Content-Encoding: gzip", gzip.compress), ("Content-Encoding: deflate", zlib.compress),
        ("Content-Encoding: deflate", deflate), ("Content-Encoding: br", brotli), ("Transfer-Encoding: chunked", chunked),
        ("Content-Encoding: gzip", lambda data: gzip.compress(data[:300]) + gzip.compress(data[300:])),
        ("Content-Encoding: GZIP\r\nTransfer-Encoding: Chunked", lambda data: chunked(gzip.compress(data))),
    ],
)  # fmt: skip
def test_content_as_servers_encode_it(header, encode, tmp_path):
    whole = encode(page(1))
    documents, bad = read_one(tmp_path, record(f"{OK}\r\n{header}", whole) + RECORDS[0])
    plain, _ = read_one(tmp_path, RECORDS[1] + RECORDS[0])
    assert not bad and [text for _, text, _ in documents] == [text for _, text, _ in plain] and len(plain) == 2
    documents, bad = read_one(tmp_path, record(f"{OK}\r\n{header}", whole[: len(whole) // 2]) + RECORDS[0])
    assert [text[:6] for _, text, _ in documents] == ["Page 0"], "no part of a text that is cut is taken"
    assert len(bad) == 1 and "record 1 is damaged in its content" in bad[0]


def test_metadata_and_bytes_of_no_encoding(tmp_path):
    wet = record("", "wörds ".encode() * 40 + b"\xff", kind="conversion", extra="WARC-Truncated: length\r\n")
    documents, bad = read_one(tmp_path, wet)
    assert not bad and documents[0][1].count("wörds") == 40
    assert documents[0][2]["truncated"] == "length" and documents[0][2]["url"] == "http://a/"
    assert "repaired_from" in documents[0][2]


def test_long_pages_are_named_packed_or_not(tmp_path):
    long = b"<p>" + b"word " * 400_000 + b"</p>"
    records = [
        record(OK, long),
        record(f"{OK}\r\nContent-Encoding: gzip", gzip.compress(long)),
        record("", long, kind="conversion"),
    ]
    documents, bad = read_one(tmp_path, b"".join(records) + RECORDS[0], limit=100_000)
    assert [key for key, _, _ in documents] == ["a.warc:4"]
    assert bad == [
        f"{tmp_path}/a.warc, record {number} is longer than 100000 bytes (max_document_bytes)." for number in (1, 2, 3)
    ]


def nested(depth, tags):
    """A page with a menu."""
    return f"<html><body><nav>the menu</nav>{'<div>' * depth}words<br>{'<br>' * tags}{'</div>' * depth}</body></html>".encode()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("depth", "tags", "is_whole"),
    [(5, 40_000, False), (60, 40_000, False), (1000, 60, False), (300, 5_000, False), (300, 20_000, True), (1900, 80_000, True),
     (100_000, 10, True)],
)  # fmt: skip
def test_pages_nested_too_deep_for_their_size_are_read_with_their_menus(depth, tags, is_whole, tmp_path):
    """Without a bound the page of 1,900 levels took more than a minute."""
    (tmp_path / "a.html").write_bytes(nested(depth, tags))
    ((_, text, metadata),), bad = read(tmp_path / "a.html")
    main = extract_plain_text(nested(depth, tags).decode(), main_content=not is_whole, preserve_formatting=True)
    assert not bad and text == main and metadata == ({"main_content": False} if is_whole else {})
    ((_, text, metadata),), bad = read(tmp_path / "a.html", main_content=False)
    assert not bad and "the menu" in text and not metadata
    documents, bad = read_one(tmp_path, record(OK, nested(depth, tags)))
    assert not bad and ("main_content" in documents[0][2]) == is_whole


@pytest.mark.timeout(60)
def test_tags_that_make_many_elements_count_as_many(tmp_path):
    """Tags that are never closed are repeated in every paragraph: 1,400 tags make half a million elements."""
    many = "".join(f"<b id=a{number}>" for number in range(700))
    (tmp_path / "a.html").write_text(f"<html><body><nav>the menu</nav><p>{many}words</p>{'<p>x' * 700}")
    ((_, text, metadata),), bad = read(tmp_path / "a.html")
    assert not bad and "words" in text and "the menu" in text and metadata == {"main_content": False}


def test_paragraphs_that_are_never_closed_are_read(tmp_path):
    (tmp_path / "a.html").write_bytes(b"<html><body>" + b"<p>paragraph<br>of lines" * 5000)  # no end tag in all of it
    documents, bad = read(tmp_path / "a.html")
    assert not bad and documents[0][1].count("paragraph") == 5000


@pytest.mark.parametrize("tags", ["<ul><li>", "<table><tr><td>", "<font size=1><p>"])
def test_tags_that_are_never_closed_are_read(tags, tmp_path):
    (tmp_path / "a.html").write_text("<html><body>" + "".join(f"{tags}word{number}" for number in range(400)))
    ((_, text, _),), bad = read(tmp_path / "a.html", main_content=False)
    assert not bad and [word for word in text.split() if word.startswith("word")] == [f"word{number}" for number in range(400)]
