"""Records from one file: text, jsonl, csv, parquet, arrow, HTML and WARC.

Readers yield (key behind the file's, text, metadata), and a `DataError` in place of a record that is bad while the rest of
its file is not. They raise DataError where a file can't be read any further.
"""

import csv
import functools
import io
import json
import re
import sys

from llmos_jax.data.clean.dataset import read_verified
from llmos_jax.data.files import DAMAGE, DATASET, TFDS, missing_extra
from llmos_jax.errors import DataError

_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json.gz": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".warc": "warc",
    ".wet": "warc",
}
FORMATS = ("auto", "text", *dict.fromkeys(_ENDINGS.values()))
# Longer fields of a record are content, not metadata.
_METADATA_CHARACTERS = 2000
_CHUNK = 1 << 20
# Characters on either side of one that may be a sign of a wrong encoding: signs are shorter.
_NEAR = 10


def format_of(file, asked="auto"):
    """Returns how a SourceFile is read: as asked, or by its name; what no ending tells is text."""
    for prefix, kind in ((TFDS, "tfds"), (DATASET, "dataset")):
        if file.path.startswith(prefix):
            return kind
    if asked != "auto":
        return asked
    name = file.path.lower()
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending) or file.stem.endswith(ending)), "text")


def read_file(file, source, limit=None):
    """Yields (key, text, metadata) of every record of a SourceFile, or a DataError that names a record that is bad.

    source: SourceConfig (format, text_key, repair). limit: bytes of the longest record that is read.
    Raises DataError where the file can't be read any further.
    """
    reader = _READERS[format_of(file, source.format)]
    try:
        if file.size_bytes == 0:
            raise DataError(f"{file} is empty.")
        for item in reader(file, source, limit):
            if isinstance(item, DataError):
                yield item
                continue
            key, text, metadata = item
            if source.repair and not text.isascii():
                text, metadata = _repaired(text, metadata)
            yield key, text, metadata
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror or error}.") from None


def _read_whole(file, limit):
    """Returns the bytes of a file that is one document; DataError when it is damaged or longer than `limit` bytes."""
    try:
        with file.open() as stream:
            data = stream.read() if limit is None else stream.read(limit + 1)
    except (FileNotFoundError, PermissionError):
        raise
    except DAMAGE as error:
        raise DataError(f"{file} is damaged: {error}.") from None
    if limit is not None and len(data) > limit:
        raise DataError(f"{file} is longer than {limit} bytes (max_document_bytes).")
    return data


def _read_text(file, source, limit):
    data = _read_whole(file, limit)
    if b"\0" in data[:65536] and not (source.repair and data[:2] in (b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file} is binary, not text.")
    text, metadata = _decoded(data, source.repair, file)
    if not text.strip():
        raise DataError(f"{file} is empty.")
    yield "", text, metadata


def _read_jsonl(file, source, limit):
    number, found = 0, False
    with file.open() as stream:
        while True:
            number += 1
            try:
                line = stream.readline() if limit is None else stream.readline(limit + 1)
                if not line:
                    break
                if limit is not None and len(line) > limit and not line.endswith(b"\n"):
                    _skip_line(stream)
                    yield DataError(f"{file}, line {number} is longer than {limit} bytes (max_document_bytes).")
                    continue
            except DAMAGE as error:
                raise DataError(f"{file} is damaged near line {number}: {error}.") from None
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            found = True
            yield _json_record(line, source, f"{file}, line {number}", f"{file} is damaged near line {number}", f":{number}")
    if not found:
        raise DataError(f"{file} is empty.")


def _json_record(line, source, where, damaged, key):
    metadata = {}
    try:
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            if not source.repair:
                raise
            text, metadata = _decoded(line, True, where)
            record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError(f"{damaged}: {error}.")
    try:
        return key, _field(record, source.text_key, where), _metadata(record, source.text_key) | metadata
    except DataError as error:
        return error


def _skip_line(stream):
    while (part := stream.readline(_CHUNK)) and not part.endswith(b"\n"):
        pass


def _read_csv(file, source, limit):
    csv.field_size_limit(min(limit or sys.maxsize, sys.maxsize))
    delimiter = "\t" if file.stem.endswith(".tsv") else ","
    errors = "replace" if source.repair else "surrogateescape"
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors=errors, newline="") as stream:
        rows, number = csv.DictReader(stream, delimiter=delimiter), 0
        while True:
            number += 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield DataError(f"{file}, record {number} is bad near line {rows.line_num}: {error}.")
                continue
            except DAMAGE as error:
                raise DataError(f"{file} is damaged near line {rows.line_num}: {error}.") from None
            if row is None:
                return
            row.pop(None, None)
            try:
                yield f":{number}", _field(row, source.text_key, f"{file}, record {number}"), _metadata(row, source.text_key)
            except DataError as error:
                yield error


def _read_parquet(file, source, limit):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", file) from None

    damage = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    try:
        table = pyarrow.parquet.ParquetFile(file.open_raw())
    except damage as error:
        raise DataError(f"{file} is not a parquet file: {error}.") from None
    columns = _columns(file, table.schema_arrow, source.text_key)
    row = 0
    for group in range(table.num_row_groups):
        end = row + table.metadata.row_group(group).num_rows
        batches = table.iter_batches(batch_size=1024, row_groups=[group], columns=columns)
        while True:
            try:
                batch = next(batches, None)
                records = [] if batch is None else batch.to_pylist()
            except damage as error:
                yield DataError(f"{file} is damaged after row {row}: {str(error).splitlines()[0]}.")
                break
            if batch is None:
                break
            yield from _rows(file, source, records, row)
            row += len(records)
        row = end


def _read_arrow(file, source, limit):
    """A Hugging Face dataset folder holds Arrow streams (`save_to_disk`)."""
    try:
        import pyarrow
    except ImportError:
        raise missing_extra("pyarrow", file) from None

    damage, row = (pyarrow.ArrowException, OSError, UnicodeDecodeError), 0
    with file.open_raw() as stream:
        try:
            batches = pyarrow.ipc.open_stream(stream)
        except damage:
            try:
                stream.seek(0)
                random = pyarrow.ipc.open_file(stream)
                batches = (random.get_batch(number) for number in range(random.num_record_batches))
                schema = random.schema
            except damage as error:
                raise DataError(f"{file} is not an arrow file: {error}.") from None
        else:
            schema = batches.schema
        columns, batches = _columns(file, schema, source.text_key), iter(batches)
        while True:
            try:
                batch = next(batches, None)
                records = [] if batch is None else batch.select(columns).to_pylist()
            except damage as error:
                raise DataError(f"{file} is damaged after row {row}: {str(error).splitlines()[0]}.") from None
            if batch is None:
                return
            yield from _rows(file, source, records, row)
            row += len(records)


def _columns(file, schema, text_key):
    """Returns the names of the text column and of those that hold plain values."""
    import pyarrow.types as kinds

    if text_key not in schema.names:
        raise DataError(f"{file} has no column {text_key!r} (text_key); it has {', '.join(schema.names)}.")
    checks = (kinds.is_string, kinds.is_large_string, kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_temporal)
    return [f.name for f in schema if f.name == text_key or any(check(f.type) for check in checks)]


def _rows(file, source, records, row):
    for number, record in enumerate(records, row):
        try:
            text = _field(record, source.text_key, f"{file}, row {number}")
        except DataError as error:
            yield error
        else:
            yield f":{number}", text, _metadata(record, source.text_key)


def _read_html(file, source, limit):
    data = _read_whole(file, limit)
    text = _html_text(data, source, file)
    if not text.strip():
        raise DataError(f"{file} is empty.")
    yield "", text, {}


def _html_text(data, source, where, charset=None):
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError:
        raise missing_extra("resiliparse", where) from None

    page = bytes_to_str(data, charset or detect_encoding(data, from_html_meta=True))
    return extract_plain_text(page, main_content=source.main_content, preserve_formatting=True)


def _read_warc(file, source, limit):
    """Pages of a web archive: HTML responses of status 200, and the text of conversion records (WET files)."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise missing_extra("resiliparse", file) from None

    number, kinds = 0, WarcRecordType.response | WarcRecordType.conversion
    with file.open_raw() as stream:
        records = iter(ArchiveIterator(stream, record_types=kinds, parse_http=True, auto_decode="all"))
        while True:
            number += 1
            try:
                record = next(records, None)
                data = None if record is None else record.reader.read()
            except DAMAGE as error:
                raise DataError(f"{file} is damaged after record {number - 1}: {error}.") from None
            if record is None:
                break
            if limit is not None and len(data) > limit:
                yield DataError(f"{file}, record {number} is longer than {limit} bytes (max_document_bytes).")
                continue
            text = _page_text(record, data, source, f"{file}, record {number}", WarcRecordType.response)
            if text:
                yield (
                    f":{number}",
                    text,
                    {"url": record.headers.get("WARC-Target-URI"), "date": record.headers.get("WARC-Date")},
                )
    if number == 1:
        raise DataError(f"{file} holds no record of a web archive, or is cut in its first.")


def _page_text(record, data, source, where, response):
    """Returns the text of a record, "" of one that is no page."""
    if record.record_type != response:
        return data.decode("utf-8", "replace")
    status = record.http_headers.status_code if record.http_headers else None
    kind = record.http_content_type or ""
    if status != 200 or not kind.startswith(("text/", "application/xhtml")):
        return ""
    if kind.startswith("text/plain"):
        return _decoded(data, True, where)[0]
    return _html_text(data, source, where, record.http_charset)


def _field(record, text_key, where):
    """Returns the text of a record; DataError says what stands there instead."""
    if not isinstance(record, dict) or text_key not in record:
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where} has no {text_key!r} (text_key); it has {known}.")
    text = record[text_key]
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if isinstance(text, str):
            if not text.isascii():
                text.encode("utf-8")
            return text
    except UnicodeError as error:
        raise DataError(f"{where} holds no valid Unicode in {text_key!r}: {error}.") from None
    raise DataError(f"{where} has {type(text).__name__} in {text_key!r} (text_key), not text.")


def _metadata(record, text_key):
    """Returns the plain values of a record beside its text; times as ISO text."""
    kept = {}
    for name, value in record.items():
        if name == text_key or value is None:
            continue
        value = value.isoformat() if hasattr(value, "isoformat") else value
        if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= _METADATA_CHARACTERS):
            kept[str(name)] = value
    return kept


def _decoded(data, repair, where):
    """Returns (text, metadata) of bytes: UTF-8, or what their statistics look like, if that may be repaired."""
    try:
        return data.decode("utf-8-sig"), {}
    except UnicodeDecodeError as error:
        if not repair:
            raise DataError(f"{where} is not UTF-8 (byte {error.start}): convert it, or set repair of its source.") from None
    try:
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError:
        raise missing_extra("resiliparse", f"{where}, which is not UTF-8,") from None
    encoding = detect_encoding(data)
    return bytes_to_str(data, encoding).removeprefix("\ufeff"), {"repaired_from": encoding}


def _repaired(text, metadata):
    """Returns text whose UTF-8 was once read as another encoding with its characters put right, and what was done."""
    if not is_mojibake(text):
        return text, metadata
    from ftfy import fix_encoding

    fixed = fix_encoding(text)
    return fixed, metadata | ({"repaired_from": "mojibake"} if fixed != text else {})


def is_mojibake(text):
    """Whether ftfy's heuristic finds signs of a wrong encoding; it is asked about the places alone where any may be."""
    is_bad, marks = _mojibake()
    start = stop = None
    for mark in marks.finditer(text):
        place = mark.start()
        if start is not None and place > stop:
            if is_bad(text[start:stop]):
                return True
            start = None
        start = max(0, place - _NEAR) if start is None else start
        stop = place + _NEAR
    return start is not None and is_bad(text[start:stop])


@functools.cache
def _mojibake():
    """Returns (ftfy's function, a pattern of the characters of which every sign has one)."""
    try:
        from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
    except ImportError:
        raise missing_extra("ftfy", "repair of a source") from None
    rare = [characters for name, characters in MOJIBAKE_CATEGORIES.items() if "common" not in name]
    return is_bad, re.compile(f"[{''.join(rare)}\u0402]")


def _read_tfds(file, source, limit):
    import tensorflow_datasets as tfds

    data = tfds.builder(file.key).as_data_source(split="train")
    for index in range(len(data)):
        record, where = data[index], f"{file}, record {index}"
        try:
            yield f":{index}", _field(record, source.text_key, where), {}
        except DataError as error:
            yield error


def _read_dataset(file, source, limit):
    """Documents of a clean dataset, with the keys that they have there; the file's bytes are verified first."""
    table = read_verified(file.path.removeprefix(DATASET), file.stamp, ["key", "text", "metadata"])
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            yield row["key"], row["text"], json.loads(row["metadata"])


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "html": _read_html,
    "warc": _read_warc,
    "tfds": _read_tfds,
    "dataset": _read_dataset,
}
