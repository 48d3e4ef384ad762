"""jsonl, JSON and CSV: what each gives, and what is said of each record that is bad, long or cut."""

import bz2
import gzip
import io
import json
import lzma
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from llmos_jax.data.encodings import decode
from tests.data.test_readers import read

GOOD = b'{"text": "good text"}\n'


def test_metadata_are_kept_or_counted(tmp_path):
    record = {
        "text": "good", "meta": {"url": "http://x/1", "half \ud83d": "\ud83d"}, "tags": ["a", "b"], "title": "bad \ud83d title",
        "nan": float("nan"), "far": float("inf"), "long": "x" * 2001, "many": list(range(3000)), "none": None,
    }  # fmt: skip
    deep = "[" * 30 + "]" * 30
    (tmp_path / "a.jsonl").write_text(json.dumps(record)[:-1] + f', "deep": {deep}}}\n')
    passed_over = []
    documents, bad = read(tmp_path / "a.jsonl", passed_over=passed_over)
    kept = {
        "meta": {"url": "http://x/1", "half \ufffd": "\ufffd"}, "tags": ["a", "b"], "title": "bad \ufffd title", "far": "inf",
    }  # fmt: skip
    assert not bad and documents == [("a.jsonl:1", "good", kept)]
    json.dumps(documents[0][2], allow_nan=False, ensure_ascii=False).encode()
    assert passed_over == [f"metadata: '{name}' of more than 2000 characters" for name in ("long", "many", "deep")]


def test_blank_texts_and_files_without_records_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n{"text": "x"}\n')
    (tmp_path / "b.csv").write_text("id,text\n")
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "e.json").write_text("[\n]\n")
    passed_over = []
    documents, bad = read(tmp_path, passed_over=passed_over)
    assert [key for key, _, _ in documents] == ["a.jsonl:3"] and bad == [
        f"{tmp_path}/c.csv.gz is empty once it is decompressed."
    ]
    assert sorted(passed_over) == ["blank texts"] * 2 + ["files without any record"] * 3


@pytest.mark.parametrize(
    ("ending", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_json_files_are_lines_or_an_object_or_an_array(ending, compress, tmp_path):
    texts = [f"ö {number} " + f"{number * 7919} " * 5_000 for number in range(40)]  # more than a piece that is read at once
    records = [{"text": text, "n": number} for number, text in enumerate(texts)]
    for name, content in {
        "array": json.dumps(records), "pretty": json.dumps(records, indent=1, ensure_ascii=False),
        "lines": "".join(json.dumps(record) + "\n" for record in records),
        "objects": "\n".join(json.dumps(record, indent=2) for record in records),
        "one": json.dumps(records[0], indent=4),
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.json{ending}"
        path.write_bytes(compress(content.encode()))
        documents, bad = read(path)
        expected = 1 if name == "one" else len(texts)
        assert not bad and [text for _, text, _ in documents] == texts[:expected], name
        assert documents[-1][0] == f"{name}.json{ending}:{expected}" and documents[-1][2] == {"n": expected - 1}
        path.write_bytes(compress(content.encode()[:-200]))
        documents, bad = read(path)
        assert len(bad) == 1 and str(path) in bad[0] and "damaged" in bad[0] and len(documents) == expected - 1


def test_a_bad_record_of_a_json_array_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"body": "b"}, 3,\n {"text": "d"}, {"text": "e" "f"}, {"text": "g"}]')
    documents, bad = read(tmp_path / "a.json")
    assert [text for _, text, _ in documents] == ["a", "d"]
    assert [
        words in message for words, message in zip(("record 2 has no 'text'", "record 3", "after record 4"), bad, strict=True)
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "long " * 900_000}, {"text": "b"}]))
    documents, bad = read(tmp_path / "a.json", limit=10_000)
    assert [text for _, text, _ in documents] == ["a"]
    assert bad == [f"{tmp_path}/a.json, record 2 is longer than 10000 bytes (max_document_bytes). What follows is not read."]


def test_csv_in_another_encoding(tmp_path):
    rows = 'id,text\n1,"Café déjà vu,\nnaïve garçon"\n2,plain\n'
    (tmp_path / "a.csv").write_bytes(rows.encode("latin-1"))
    documents, bad = read(tmp_path / "a.csv", repair=True)
    assert not bad and [text for _, text, _ in documents] == ["Café déjà vu,\nnaïve garçon", "plain"]
    assert documents[0][2] == {"id": "1", "repaired_from": "cp1252"} and documents[1][2] == {"id": "2"}
    documents, bad = read(tmp_path / "a.csv")
    assert [text for _, text, _ in documents] == ["plain"]
    assert bad == [f"{tmp_path}/a.csv, line 2 is not UTF-8 (byte 6): convert it, or set repair of its source."]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,id\rone,1\rtwo,2\r")  # as old Macs wrote it
    assert [text for _, text, _ in read(tmp_path / "a.csv")[0]] == ["one", "two"]


SHORT = {
    "cp1251": ["Дом стоит на горе", "Новый год", "Кошка спит на диване", "Лес"],
    "koi8-r": ["Дом стоит на горе", "Новый год", "Кошка спит на диване", "Лес"],
    "cp1250": ["Příliš žluťoučký kůň", "Dobrý den, jak se máte", "Řeka teče pomalu", "Čtyři děti si hrály", "ťuk"],
    "iso8859-2": ["Včera jsme navštívili muzeum", "Děti běhají po trávě", "Žáci píšou úkoly ve škole", "Každý večer čtu"],
    "iso8859-7": ["Καλημέρα σας", "Η Αθήνα είναι πόλη", "Το σπίτι είναι μεγάλο"],
    "cp1252": ["Größe", "Äpfel und Birnen", "Müller geht über die Straße", "Öl"],
    "cp932": ["これは本です", "東京は大きい都市です", "猫が好き"],
    "euc_jp": ["これは本です", "東京は大きい都市です", "猫が好き"],
    "gb18030": ["你好世界", "今天天气很好，我们去公园散步吧。", "我喜欢读书"],
    "big5": ["你好世界", "今天天氣很好", "我喜歡讀書"],
}


@pytest.mark.parametrize("encoding", SHORT)
def test_short_lines_are_of_the_encoding_that_their_file_looks_like(encoding, tmp_path):
    texts = ["ASCII", *SHORT[encoding]]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    in_utf8 = json.dumps({"text": "日本語の文章 ü"}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes("".join(lines).encode(encoding) + in_utf8)
    (tmp_path / "b.csv").write_bytes(("id,text\n" + "".join(f'1,"{text}"\n' for text in texts)).encode(encoding))
    documents, bad = read(tmp_path, repair=True)
    assert not bad and [text for _, text, _ in documents] == [*texts, "日本語の文章 ü", *texts]
    assert (
        "repaired_from" not in documents[0][2]
        and len({done["repaired_from"] for _, _, done in documents[1 : -len(texts) - 1]}) == 1
    )


def test_a_line_that_is_not_of_its_files_encoding_is_named(tmp_path):
    rows = [json.dumps({"text": text}, ensure_ascii=False).encode("gb18030") for text in SHORT["gb18030"]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rows, b'{"text": "\xff\xff\xff"}', rows[0]]))
    documents, bad = read(tmp_path / "a.jsonl", repair=True)
    assert [text for _, text, _ in documents] == [*SHORT["gb18030"], SHORT["gb18030"][0]]
    assert len(bad) == 1 and "a.jsonl, line 4 looks like gb18030, but 3 of" in bad[0]


def test_utf8_that_is_cut_at_the_end_of_a_sample_is_no_other_encoding(tmp_path):
    long = "x" + "字" * 100_000
    rows = [long, long, *SHORT["cp1251"]]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode("utf-8" if text == long else "cp1251") for text in rows]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents, bad = read(tmp_path / "a.jsonl", repair=True)
    assert not bad and [text for _, text, _ in documents] == rows


def test_a_csv_file_with_two_columns_of_one_name_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("id,text,text\n1,a,b\n")
    documents, bad = read(tmp_path / "a.csv")
    assert not documents and bad == [f"{tmp_path}/a.csv has 2 columns named 'text': rename them, so that none is lost."]


def test_columns_without_a_name_are_no_two_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("text,,id, \na,,1,\nb,,2,\nc,x,3,y\n")  # as spreadsheets write what was emptied
    passed_over = []
    documents, bad = read(tmp_path / "a.csv", passed_over=passed_over)
    assert not bad and documents == [(f"a.csv:{n}", text, {"id": str(n)}) for n, text in enumerate("abc", 1)]
    assert passed_over == ["metadata: a value in a column without a name"] * 2


def test_an_object_that_names_a_field_twice_is_bad(tmp_path):
    lines = [
        '{"text": "a", "meta": {"a": 1}}', '{"text": "lost", "id": 1, "text": "kept"}',
        '{"text": "b", "meta": [{"a": 1, "a" : 1}]}', '{"text": "c"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text("[" + ",\n ".join(lines) + "]")
    documents, bad = read(tmp_path)
    assert [(key, text) for key, text, _ in documents] == [
        (f"{name}:{n}", text) for name in ("a.jsonl", "b.json") for n, text in ((1, "a"), (4, "c"))
    ]
    assert bad == [
        f"{tmp_path}/{name} {number} names '{field}' twice: rename one, so that none is lost."
        for name in ("a.jsonl, line", "b.json, record") for number, field in ((2, "text"), (3, "a"))
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes('{"text": "é", "text": "è"}'.encode("latin-1"))
    documents, bad = read(tmp_path / "a.jsonl", repair=True)
    assert not documents and len(bad) == 1 and "line 1 names 'text' twice" in bad[0]


def test_names_are_quoted_whole_or_not_at_all(tmp_path):
    """A step that takes addresses out of messages must see all of one."""
    address = "the page of maximilian.mustermann@example-company.org"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "a", address: "x" * 2500, "y" * 200: "x" * 2500}) + "\n" + json.dumps({address: 1, "z" * 200: 2})
    )
    (tmp_path / "b.csv").write_text(f"text,{address},{address}\n")
    (tmp_path / "c.csv").write_text(f"text,{'y' * 200},{'y' * 200}\n")
    table = pyarrow.table({"text": ["a"], address: [b""], "s": [{address: b""}]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    passed_over = []
    _, bad = read(tmp_path, passed_over=passed_over)
    assert passed_over == [
        f"metadata: '{address}' of more than 2000 characters", "metadata: '(200 characters)' of more than 2000 characters",
        f"metadata: '{address}' is binary", "metadata: 's' is struct",
    ]  # fmt: skip
    assert f"it has {address}, (200 characters)." in bad[0]
    assert f"2 columns named '{address}'" in bad[1] and "2 columns named '(200 characters)'" in bad[2]


def test_rows_of_another_width_than_the_first_are_bad(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,Hello, world, this is the rest\n2,plain\n3\n\n4,last\n")
    documents, bad = read(tmp_path / "a.csv")
    assert [(key, text) for key, text, _ in documents] == [("a.csv:2", "plain"), ("a.csv:4", "last")]
    assert len(bad) == 2
    assert "a.csv, record 1 (line 2) has 4 fields, its first line 2" in bad[0] and "record 3 (line 4) has 1 fields" in bad[1]
    (tmp_path / "a.csv").write_text("1,john@site.org\n2,eve@site.org\n")
    documents, bad = read(tmp_path / "a.csv")
    assert not documents and len(bad) == 1 and "has no column 'text'" in bad[0] and "site.org" not in bad[0]


def test_what_follows_a_wrong_quote_is_never_taken_for_records(tmp_path):
    many = "".join(f"{number},text {number}\n" for number in range(20))
    for content, kept, words in (
        ('id,text\n1,"first"\n2,"second is cut he', ["first"], "record 2 is bad in line 3 (unexpected end"),
        ('id,text\n1,"a ""quote"", and\nmore"\n2,"b "quote", and\nmore, of it"\n3,c\n', ['a "quote", and\nmore'], "not read"),
        ('id,text\n1,a\n2,"open\n3,b\n4,"c"\n', ["a"], "record 2 is bad in line 3"),
    ):
        (tmp_path / "a.csv").write_text(content)
        documents, bad = read(tmp_path / "a.csv")
        assert [text for _, text, _ in documents] == kept and len(bad) == 1 and words in bad[0] and "not read" in bad[0]
    # Where every record took one line before, a bad one takes one line, too.
    (tmp_path / "a.csv").write_text(f'id,text\n{many}20,"open\n21,next\n22,"last"\n23,"a" b\n24,end\n25,"cut')
    documents, bad = read(tmp_path / "a.csv")
    assert [text for _, text, _ in documents][20:] == ["next", "last", "end"]
    assert [message.partition(" (")[0].partition(":")[0][-7:] for message in bad] == ["line 22", "line 25", "line 27"]


def test_a_csv_record_over_the_limit_ends_where_it_ends(tmp_path):
    inside = "\n".join(f'line {number}, of a ""long"" text' for number in range(2000))
    for content in (
        f'text,id\n"{inside}",1\ngood,2\n',
        f"text,id\n{'word ' * 20_000},1\ngood,2\n",
        f"text,id\n{',' * 50_000}\ngood,2\n",
    ):
        (tmp_path / "a.csv").write_text(content)
        documents, bad = read(tmp_path / "a.csv", limit=10_000)
        assert documents == [("a.csv:2", "good", {"id": "2"})]
        assert bad == [f"{tmp_path}/a.csv, record 1 (line 2) is longer than 10000 bytes (max_document_bytes)."]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz", "a.json.gz"])
def test_a_record_beyond_the_limit_is_not_held(name, tmp_path):
    before, after = {"a.csv": (b'text\n"', b'"\n'), "a.jsonl": (b'{"text": "', b'"}\n'), "a.json": (b'[{"text": "', b'"}]')}[
        name[:-3]
    ]
    sink = io.BytesIO()
    with gzip.GzipFile(fileobj=sink, mode="wb", compresslevel=1) as stream:
        stream.write(before)
        for _ in range(60):
            stream.write(b'word ""' * (1 << 17) if "csv" in name else b"word wo" * (1 << 17))
        stream.write(after)
    (tmp_path / name).write_bytes(sink.getvalue())
    tracemalloc.start()
    documents, bad = read(tmp_path / name, limit=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not documents and len(bad) == 1 and "longer than 1048576 bytes" in bad[0]
    assert peak < 16 << 20  # of 55 MB


@pytest.mark.parametrize("repair", [False, True])
def test_only_at_the_start_of_a_file_of_lines_is_there_a_mark(repair, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeff"text",note\n"one\n\ufefftwo",ä\n\ufeffthree,b\n'.encode())
    documents, bad = read(path, repair=repair)
    assert not bad and [text for _, text, _ in documents] == ["one\n\ufefftwo", "\ufeffthree"]
    western = "Größe und Länge für alle Räume".encode("cp1252")
    data = b"\n".join(["\ufeffÄpfel sind süß für Käufer".encode(), western, "\ufeffdritte Zeile für Wähler".encode()])
    text, metadata = decode(data, True, "x")
    assert text.split("\n") == ["Äpfel sind süß für Käufer", western.decode("cp1252"), "\ufeffdritte Zeile für Wähler"]
    assert metadata == {"repaired_from": "utf-8 and cp1252"}


def test_damaged_lines_of_files_put_together_are_read_behind_their_marks(tmp_path):
    path = tmp_path / "a.jsonl"
    line = '\ufeff{"text": "héé éàü ça va bien"}\n'.encode()
    path.write_bytes(line + line.replace(b"bien", b"\xff"))
    documents, bad = read(path, repair=True)
    assert not bad and [text for _, text, _ in documents] == ["héé éàü ça va bien", "héé éàü ça va \ufffd"]


def test_names_that_are_written_alike_keep_their_values(tmp_path):
    """Half a surrogate pair can't be written: what stands for it is the same for all of them."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "a", "k\\ud800": 1, "k\\ud801": "x", "k\\ud802": 3, "k\ufffd_2": 4, "in": {"\\ud800": 5, "\\ud801": 6}}\n'
    )
    ((_, _, metadata),), bad = read(path)
    assert not bad and metadata == {
        "k\ufffd": 1, "k\ufffd_2": "x", "k\ufffd_3": 3, "k\ufffd_2_4": 4, "in": {"\ufffd": 5, "\ufffd_2": 6},
    }  # fmt: skip
