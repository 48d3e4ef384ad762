"""Records from files of lines: jsonl, JSON and CSV. No more than one record is held, however long the lines are."""

import codecs
import collections
import csv
import io
import itertools
import json
import re
import sys

from llmos_jax.data.encodings import LineDecoder
from llmos_jax.data.fields import PassedOver, check_names, read_record, shown, too_long
from llmos_jax.data.files import DAMAGE, empty
from llmos_jax.errors import DataError

_CHUNK = 1 << 20
_PIECE = 1 << 16
# Records of one line each that a CSV file must begin with, for the line after a damaged one to be taken for a record.
_SURE = 10


class _TwiceError(ValueError):
    """An object names a field twice: one of the values would be lost."""


def _object(pairs):
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in record if names.count(name) > 1)
        raise _TwiceError(f"names {shown(twice)!r} twice: rename one, so that none is lost")
    return record


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def read_jsonl(file, source, limit):
    """Yields the records of a file with a JSON object in each line."""
    number, found, decoder = 0, False, LineDecoder(file, source.repair)
    with file.open() as stream:
        while True:
            number += 1
            try:
                line = stream.readline() if limit is None else stream.readline(limit + 1)
                if not line:
                    break
                if limit is not None and len(line) > limit and not line.endswith(b"\n"):
                    _skip_line(stream)
                    found = True
                    yield too_long(f"{file}, line {number}", limit)
                    continue
            except DAMAGE as error:
                raise DataError(f"{file} is damaged near line {number}: {error}.") from None
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            found = True
            yield from _json_record(line, source, file, number, decoder)
    if not found:
        raise empty(file)


def _json_record(line, source, file, number, decoder):
    where, metadata = f"{file}, line {number}", None
    try:
        try:
            record = _JSON.decode(line.decode(json.detect_encoding(line), "surrogatepass"))
        except UnicodeDecodeError:
            if not source.repair:
                raise
            text, metadata = decoder.decode(line, where)
            record = _JSON.decode(text.removeprefix("\ufeff"))  # of files put together, each with its mark
    except DataError as error:
        return (error,)
    except _TwiceError as error:
        return (DataError(f"{where} {error}."),)
    except (ValueError, RecursionError) as error:
        return (DataError(f"{file} is damaged near line {number}: {error}."),)
    return read_record(record, f":{number}", source, where, metadata)


def _skip_line(stream):
    while (part := stream.readline(_CHUNK)) and not part.endswith(b"\n"):
        pass


def read_json(file, source, limit):
    """Yields the records of a `.json` file: an object in each line, objects over many lines, or an array of them."""
    try:
        with file.open() as stream:
            first = stream.readline(_CHUNK).removeprefix(codecs.BOM_UTF8).strip()
    except DAMAGE:
        first = b"{}"  # the reader of lines names it
    if first.startswith(b"{") and (first.endswith(b"}") or len(first) > _CHUNK // 2):
        yield from read_jsonl(file, source, limit)
        return
    number = 0
    with file.open() as stream:
        for number, value in enumerate(_values(file, stream, limit), 1):
            where = f"{file}, record {number}"
            if isinstance(value, _TwiceError):
                yield DataError(f"{where} {value}.")
            else:
                yield from read_record(value, f":{number}", source, where)
    if not number:
        yield PassedOver("files without any record")


def _values(file, stream, limit):
    """Yields the JSON values that stand one after another in a stream, or in the array that it is; or a _TwiceError for one."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    between, text, place, number, is_end = re.compile(r"[\s,]*"), "", 0, 0, False
    is_array = None
    while True:
        place = between.match(text, place).end()
        if is_array is None and place < len(text):
            is_array = text[place] == "["
            place += is_array
            continue
        if is_array and text[place : place + 1] == "]":
            is_array, place = None, place + 1
            continue
        try:
            if place == len(text):
                raise ValueError("an array is not closed" if is_array else "nothing follows")
            value, place = _next_value(text, place)
        except (ValueError, RecursionError) as error:
            if is_end:
                if place == len(text) and not is_array:
                    return
                raise DataError(f"{file} is damaged after record {number}: {error}.") from None
            if limit is not None and len(text) - place > limit:
                raise DataError(f"{too_long(f'{file}, record {number + 1}', limit)} What follows is not read.") from None
            try:
                data = stream.read(max(_CHUNK, len(text) - place))
                text, place, is_end = text[place:] + decoder.decode(data, not data), 0, not data
            except (*DAMAGE, UnicodeDecodeError) as damage:
                raise DataError(f"{file} is damaged after record {number}: {damage}.") from None
            continue
        number += 1
        yield value


def _next_value(text, place):
    """Returns the value that begins at a place, or the _TwiceError that it is, and where it ends."""
    try:
        return _JSON.raw_decode(text, place)
    except _TwiceError as error:
        return error, json.JSONDecoder().raw_decode(text, place)[1]


def read_csv(file, source, limit):
    """Yields the records of a CSV file, or of a TSV file: its first line names the fields.

    A record with more or fewer of them is bad; a value without a name is passed over. Where a quote is wrong, later records are
    read only if no record before it went over several lines, for then it can't be told where the next one begins: DataError
    names what is not read.
    """
    csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
    delimiter = "\t" if file.stem.endswith(".tsv") else ","
    names, number = None, 0
    with io.TextIOWrapper(file.open(), encoding="latin-1", newline="") as stream:
        lines = _Lines(file, stream, source.repair, limit, delimiter)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            lines.begin()
            try:
                row = next(rows, None)
            except csv.Error as error:
                number += 1
                yield _damaged_row(file, number, lines, error)
                continue
            except DAMAGE as error:
                raise DataError(f"{file} is damaged near line {lines.number}: {error}.") from None
            if row is None:
                break
            lines.note_record()
            if names is None and row:
                names = [name.strip("\ufeff") if name.strip() else "" for name in row]
                if lines.is_long or source.text_key not in names:
                    count = f"its first line has {len(names)} fields, none of that name"
                    raise DataError(f"{file} has no column {source.text_key!r} (text_key): {count}.")
                check_names(file, [name for name in names if name])
            elif row:
                number += 1
                yield from _row(file, number, row, names, lines, source, limit)
    if not number:
        if names is None:
            raise empty(file)
        yield PassedOver("files without any record")


def _row(file, number, row, names, lines, source, limit):
    where = f"{file}, record {number} (line {lines.first})"
    if lines.is_long:
        return (too_long(where, limit),)
    if lines.errors:
        return lines.errors[:1]
    if len(row) != len(names):
        return (DataError(f"{where} has {len(row)} fields, its first line {len(names)}: one is cut, or lacks its quotes."),)
    record = dict(zip(names, row, strict=True))
    unnamed = [value for name, value in zip(names, row, strict=True) if value and not name] if "" in record else ()
    record.pop("", None)
    left_out = [PassedOver("metadata: a value in a column without a name")] * len(unnamed)
    return itertools.chain(left_out, read_record(record, f":{number}", source, where, lines.metadata))


def _damaged_row(file, number, lines, error):
    """Returns the DataError for a record with a wrong quote; raises it where none that follows can be told."""
    where = f"{file}, record {number} is bad in line {lines.first}"
    if lines.try_again():
        return DataError(f"{where}: {error}.")
    raise DataError(f"{where} ({error}): where the next record begins can't be told, what follows is not read.")


class _Lines:
    """The lines of a CSV file as csv.reader wants them, and what is known of the record that they belong to.

    Of a record beyond the limit only the quotes and delimiters are passed on: where it ends is found, and nothing is held.
    """

    def __init__(self, file, stream, repair, limit, delimiter):
        self._file, self._stream, self._limit = file, stream, limit
        self._decoder = LineDecoder(file, repair)
        # Two quotes behind content change nothing of what follows them, inside quotes or not.
        self._content = re.compile(f'[^"{delimiter}\r\n]+(?:""|[^"{delimiter}\r\n]+)*')
        self._runs = re.compile(f"{delimiter}{delimiter}+")
        self._delimiter = delimiter
        self._again = collections.deque()
        self.number, self._single, self._spans_lines = 0, 0, False
        self.begin()

    def begin(self):
        """Starts a record."""
        self.first, self._held, self._size = self.number + 1, [], 0
        self.is_long, self.metadata, self.errors = False, {}, []

    def note_record(self):
        """Notes that a record is complete."""
        self._single += self.number == self.first
        self._spans_lines |= self.number > self.first

    def try_again(self):
        """Takes back all lines of a record but its first, if that one is likely to be all of it; returns whether it did."""
        if self._spans_lines or self._single <= _SURE or self.is_long:
            return False
        self._again.extendleft(reversed(self._held[1:]))
        self.number = self.first
        return True

    def __iter__(self):
        return self

    def __next__(self):
        line = self._again.popleft() if self._again else self._read()
        if not line:
            raise StopIteration
        self.number += 1
        self._size += len(line)
        if self._limit is not None and self._size > self._limit:
            self.is_long, self._held = True, []
            return self._skeleton(line)
        self._held.append(line)
        if line.isascii():
            return line
        try:
            text, metadata = self._decoder.decode(line.encode("latin-1"), f"{self._file}, line {self.number}")
        except DataError as error:
            self.errors.append(error)
            return line
        self.metadata |= metadata
        return text.removeprefix("\ufeff") if self.number == 1 else text

    def _read(self):
        return self._stream.readline() if self._limit is None else self._stream.readline(self._limit + 1)

    def _skeleton(self, line):
        """Returns the quotes and delimiters of a line that is read to its end, in pieces."""
        text = ""
        while True:
            for start in range(0, len(line), _PIECE):
                text = self._content.sub("x", text + line[start : start + _PIECE])
                text = self._runs.sub(self._delimiter, text)
                if len(text) > self._limit + _PIECE:
                    raise csv.Error("a record of very many fields")
            if not line or line[-1] in "\r\n":
                return text
            line = self._stream.readline(_PIECE)
