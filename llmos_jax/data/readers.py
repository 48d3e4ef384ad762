"""Records from one file: text, jsonl, JSON, csv, parquet, arrow, HTML and WARC.

Readers yield (key behind the file's, text, metadata). In place of a record they yield a `DataError` when it is bad while the
rest of its file is not, and a `PassedOver` when it is whole but no document. They raise DataError where a file can't be read
any further.
"""

import json

from llmos_jax.data.clean.dataset import read_verified
from llmos_jax.data.columns import read_arrow, read_parquet
from llmos_jax.data.encodings import decode, has_mark, repair_mojibake
from llmos_jax.data.fields import too_long
from llmos_jax.data.files import DAMAGE, DATASET, TFDS, empty, is_remote
from llmos_jax.data.lines import read_csv, read_json, read_jsonl
from llmos_jax.data.tfds_files import read_tfds
from llmos_jax.data.web import html_text, read_warc
from llmos_jax.errors import DataError

_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
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


def format_of(file, asked="auto"):
    """Returns how a SourceFile is read: as asked, or by its name; what no ending tells is text."""
    for prefix, kind in ((TFDS, "tfds"), (DATASET, "dataset")):
        if file.path.startswith(prefix):
            return kind
    if asked != "auto":
        return asked
    return next((kind for ending, kind in _ENDINGS.items() if file.stem.endswith(ending)), "text")


def read_file(file, source, limit=None):
    """Yields (key, text, metadata) of every record of a SourceFile, a DataError that names a bad one, or a PassedOver.

    source: SourceConfig (format, text_key, repair). limit: bytes of the longest record that is read.
    Raises DataError where the file can't be read any further.
    """
    reader = _READERS[format_of(file, source.format)]
    try:
        if file.size_bytes == 0 and not is_remote(file.path):  # there it may be unknown
            raise empty(file)
        for item in reader(file, source, limit):
            if not isinstance(item, tuple):
                yield item
                continue
            key, text, metadata = item
            if source.repair and not text.isascii():
                text, metadata = repair_mojibake(text, metadata)
            # A character takes four bytes at most.
            if limit is not None and len(text) > limit // 4 and len(text.encode()) > limit:
                yield too_long(f"{file}{key}", limit)
                continue
            yield key, text, metadata
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror or error}.") from None


def _read_whole(file, limit):
    """Returns the bytes of a file that is one document; DataError when it is damaged or longer than `limit` bytes."""
    try:
        with file.open() as stream:
            data = stream.read() if limit is None else stream.read(limit + 1)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except DAMAGE as error:
        raise DataError(f"{file} is damaged: {error}.") from None
    if limit is not None and len(data) > limit:
        raise too_long(file, limit)
    return data


def _read_text(file, source, limit):
    data = _read_whole(file, limit)
    if b"\0" in data[:65536] and not (source.repair and has_mark(data)):
        raise DataError(f"{file} is binary, not text.")
    text, metadata = decode(data, source.repair, file)
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise empty(file)
    yield "", text, metadata


def _read_html(file, source, limit):
    text, metadata = html_text(_read_whole(file, limit), source, file)
    if not text.strip():
        raise empty(file)
    yield "", text, metadata


def _read_dataset(file, source, limit):
    """Documents of a clean dataset, with the keys that they have there; the file's bytes are verified first."""
    table = read_verified(file.path.removeprefix(DATASET), file.stamp, ["key", "text", "metadata"])
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            yield row["key"], row["text"], json.loads(row["metadata"])


_READERS = {
    "text": _read_text,
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "html": _read_html,
    "warc": read_warc,
    "tfds": read_tfds,
    "dataset": _read_dataset,
}
