"""Documents from where text lies: the standard library, text, jsonl, parquet, folders of these, TFDS datasets."""

import dataclasses
import difflib
import gzip
import hashlib
import io
import json
import os
import pathlib
import sysconfig
import zlib

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError, DataError

_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".ndjson")
_PARQUET = (".parquet",)
_CHUNK = 1 << 18


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of text."""

    path: str = setting(
        "stdlib", help="stdlib[:PACKAGE], a file or folder (text, jsonl, parquet), tfds:NAME, or prepared records"
    )
    weight: float = setting(1.0, help="share of the records of a mixture, relative to the others", above=0.0)
    text_key: str = setting("text", help="field that holds the text in jsonl, parquet and TFDS")


def parse_sources(text):
    """Returns the settings of a mixture written as one word, `PATH[@WEIGHT]+PATH[@WEIGHT]`, a list of dicts.

    Raises ConfigError on a weight that is no number.
    """
    sources = []
    for item in text.split("+"):
        path, _, weight = item.rpartition("@")
        try:
            sources.append(dict(path=path, weight=float(weight)) if path else dict(path=item))
        except ValueError:
            raise ConfigError(f"data={item}: what follows the last @ is a weight, a number, not {weight!r}.") from None
    return sources


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: its text, and a key that names it and decides its split."""

    key: str
    text: str


def list_files(source):
    """Returns the files of a source in a fixed order; ConfigError names a path that does not exist."""
    if _is_stdlib(source):
        root = root_of(source)
        skipped = ("site-packages", "__pycache__", "dist-packages")
        files = [f for f in sorted(root.rglob("*.py")) if not any(part in skipped for part in f.relative_to(root).parts)]
        if not files:
            raise ConfigError(f"data source {source.path!r}: Python's standard library has no package of that name.")
        return files
    path = pathlib.Path(source.path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]
        if not files:
            raise DataError(f"data source {source.path} is an empty folder.")
        return files
    parent = path.parent if path.parent.is_dir() else pathlib.Path(".")
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    hint = f"; did you mean {parent / near[0]}?" if near else ""
    raise ConfigError(f"data source {source.path!r} does not exist{hint}")


def root_of(source):
    """Returns the folder that document keys are relative to."""
    if _is_stdlib(source):
        return pathlib.Path(sysconfig.get_path("stdlib"), source.path.partition(":")[2])
    path = pathlib.Path(source.path).expanduser()
    return path if path.is_dir() else path.parent


def is_single_text(source, files):
    """Whether a source is one text file: it is then split by position, not by document."""
    return len(files) == 1 and _kind(files[0]) == "text" and not source.path.startswith("tfds:")


def read_documents(source, files, log=print):
    """Yields the Documents of a source, in a fixed order and one file at a time.

    Documents without any text are passed over. In a folder, files that are empty, binary, unreadable or undecodable are
    counted, named and left out (from the place of the damage on); DataError when nothing is left, or when the only file
    that was asked for is bad.
    """
    if source.path.startswith("tfds:"):
        yield from _read_tfds(source)
        return
    root, left_out, total = root_of(source), [], 0
    for file in files:
        count = 0
        try:
            for key, text in _read_file(file, source.text_key):
                if text.strip():
                    count += 1
                    yield Document(f"{file.relative_to(root)}{key}", text)
        except DataError as error:
            if len(files) == 1:
                raise
            left_out.append(f"{error} Its {count} documents before that are used." if count else str(error))
        total += count
    if left_out:
        log(f"{source.path}: left out {len(left_out)} of {len(files)} files:")
        for line in left_out[:3]:
            log(f"  {line}")
        if len(left_out) > 3:
            log(f"  ... and {len(left_out) - 3} more")
    if not total:
        raise DataError(f"data source {source.path}: none of its {len(files)} files holds text.")


def content_hash(source, files):
    """Returns a hash of the bytes of a source's files and their names below its root, 64 hex digits."""
    total, root = hashlib.sha256(), root_of(source)
    for file in files:
        total.update(os.fsencode(file.relative_to(root)) + b"\0")
        try:
            with open(file, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            total.update(f"unreadable {error.errno}".encode())
    return total.hexdigest()


def _is_hidden(path):
    return any(part.startswith(".") for part in path.parts)


def _is_stdlib(source):
    return source.path == "stdlib" or source.path.startswith("stdlib:")


def _kind(file):
    name = file.name.lower()
    return "jsonl" if name.endswith(_JSONL) else "parquet" if name.endswith(_PARQUET) else "text"


def _read_file(file, text_key):
    reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}[_kind(file)]
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty.")
        yield from reader(file, text_key)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror or error}.") from None


def _read_text(file, text_key):
    data = file.read_bytes()
    if b"\0" in data[:65536]:
        raise DataError(f"{file} is binary, not text.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}): convert it.") from None
    if not text.strip():
        raise DataError(f"{file} is empty.")
    yield "", text


def _read_jsonl(file, text_key):
    number, found = 0, False
    with _open(file) as stream:
        lines = iter(stream)
        while True:
            try:
                line = next(lines, None)
                number += 1
                if line is None:
                    break
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError, EOFError, zlib.error, OSError) as error:
                raise DataError(f"{file} is damaged near line {max(number, 1)}: {error}.") from None
            if record is not None:
                yield f":{number}", _field(record, text_key, f"{file}, line {number}")
                found = True
    if not found:
        raise DataError(f"{file} is empty.")


def _open(file):
    name = file.name.lower()
    if name.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig")
    if name.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise _missing_extra("zstandard", file) from None
        return io.TextIOWrapper(io.BufferedReader(_ZstdFile(zstandard, file), _CHUNK), encoding="utf-8-sig")
    return open(file, encoding="utf-8-sig")


class _ZstdFile(io.RawIOBase):
    """A zstandard file of any number of frames, whose damage and early end are errors (the library's reader ends quietly)."""

    def __init__(self, zstandard, file):
        self._library, self._raw = zstandard, open(file, "rb")  # noqa: SIM115  closed by close()
        self._frame, self._rest, self._ready = None, b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._ready:
            data = self._rest or self._raw.read(_CHUNK)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._library.ZstdError as error:
                raise OSError(str(error)) from None
            self._rest = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self):
        self._raw.close()
        super().close()


def _read_parquet(file, text_key):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing_extra("pyarrow", file) from None

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is not a parquet file: {error}.") from None
    if text_key not in table.schema_arrow.names:
        raise DataError(f"{file} has no column {text_key!r} (text_key); it has {', '.join(table.schema_arrow.names)}.")
    batches, row = table.iter_batches(columns=[text_key]), 0
    while True:
        try:
            texts = next(batches, None)
            texts = None if texts is None else texts.column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is damaged after row {row}: {str(error).splitlines()[0]}.") from None
        if texts is None:
            return
        for text in texts:
            yield f":{row}", _field({text_key: text}, text_key, f"{file}, row {row}")
            row += 1


def _field(record, text_key, where):
    """Returns the text of a record; DataError says what stands there instead."""
    if not isinstance(record, dict) or text_key not in record:
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where} has no {text_key!r} (text_key); it has {known}.")
    text = record[text_key]
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if isinstance(text, str):
            text.encode("utf-8")
            return text
    except UnicodeError as error:
        raise DataError(f"{where} holds no valid Unicode in {text_key!r}: {error}.") from None
    raise DataError(f"{where} has {type(text).__name__} in {text_key!r} (text_key), not text.")


def _missing_extra(module, file):
    return ConfigError(f"{file} needs {module}: pip install 'llmos-jax[data]'.")


def _read_tfds(source):
    import tensorflow_datasets as tfds

    name = source.path.removeprefix("tfds:")
    try:
        data = tfds.builder(name).as_data_source(split="train")
    except (
        tfds.core.DatasetNotFoundError,
        FileNotFoundError,
        AssertionError,
        ValueError,
        NotImplementedError,
    ) as error:
        where = tfds.core.constants.DATA_DIR
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{source.path} is not prepared in {where} ({reason}): prepare it there as array_record.") from None
    for index in range(len(data)):
        record = data[index]
        text = _field(record, source.text_key, f"{source.path}, record {index}")
        if text.strip():
            yield Document(f"{name}:{index}", text)
