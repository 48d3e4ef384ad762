"""Fields of a record: its text, and what else it says, made fit for JSON."""

import dataclasses
import json
import math

from llmos_jax.data.encodings import decode
from llmos_jax.errors import DataError

# Longer values are content, not metadata; deeper ones are a document of their own.
METADATA_CHARACTERS = 2000
_DEPTH = 16
# Longer names are not quoted in messages.
_LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True)
class PassedOver:
    """Something that is whole but no document, or that metadata can't hold: it is counted by its reason."""

    reason: str


def read_record(record, key, source, where, metadata=None):
    """Yields (key, text, metadata) of a record, or the DataError that it is, and a PassedOver for each value that is left out.

    record: what its source holds, a dict of fields. source: SourceConfig (text_key, repair). metadata: what is known already.
    """
    try:
        text, done = _text(record, source, where)
    except DataError as error:
        yield error
        return
    kept = {}
    for name, value in record.items():
        if name == source.text_key or value is None:
            continue
        if isinstance(value, str) and value.isascii() and len(value) <= METADATA_CHARACTERS:  # most are
            kept[_free(name, kept)] = value
            continue
        name = _free(name, kept)
        try:
            value = _plain(value, _DEPTH)
        except _TooLargeError:
            yield too_much(name)
            continue
        if value is not None:
            kept[name] = value
    yield key, text, kept | (metadata or {}) | done


def check_names(file, names):
    """Raises DataError for a file with two columns of one name: no record could hold both."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file} has {names.count(twice)} columns named {shown(twice)!r}: rename them, so that none is lost.")


def too_long(where, limit):
    """Returns the DataError for a record of more than `limit` bytes."""
    return DataError(f"{where} is longer than {limit} bytes (max_document_bytes).")


def shown(name):
    """Returns a name that a file holds as messages quote it: whole, or its length alone.

    Half of an address is none to the steps that take such out of messages.
    """
    return name if len(name) <= _LONGEST_NAME else f"({len(name)} characters)"


def too_much(name):
    """Returns the PassedOver for a value that is too long for metadata. name: its field's."""
    return PassedOver(f"metadata: {shown(name)!r} of more than {METADATA_CHARACTERS} characters")


class _TooLargeError(Exception):
    pass


def _text(record, source, where):
    """Returns (text, how it was repaired) of a record; DataError says what stands there instead."""
    if not isinstance(record, dict) or source.text_key not in record:
        known = ", ".join(shown(_unicode(name)) for name in record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where} has no {source.text_key!r} (text_key); it has {known}.")
    text = record[source.text_key]
    if isinstance(text, bytes):
        return decode(text, source.repair, f"{where}, {source.text_key!r},")
    if not isinstance(text, str):
        raise DataError(f"{where} has {type(text).__name__} in {source.text_key!r} (text_key), not text.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeError as error:
            raise DataError(f"{where} holds no valid Unicode in {source.text_key!r}: {error}.") from None
    return text, {}


def _plain(value, depth):
    """Returns a value as JSON has it: times as ISO text, what is not a number as none, other kinds as their text."""
    if isinstance(value, (bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if hasattr(value, "tolist"):  # numpy's
        if value.size > METADATA_CHARACTERS // 2:
            raise _TooLargeError
        value = value.tolist()
        if not isinstance(value, list):
            return _plain(value, depth)
    if isinstance(value, (dict, list, tuple)):
        # Each entry takes two characters at least.
        if not depth or len(value) > METADATA_CHARACTERS // 2:
            raise _TooLargeError
        if isinstance(value, dict):
            kept = {}
            for name, item in value.items():
                kept[_free(name, kept)] = _plain(item, depth - 1)
            value = kept
        else:
            value = [_plain(item, depth - 1) for item in value]
        size = len(json.dumps(value, ensure_ascii=False))
    else:
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        value = _unicode(value.isoformat() if hasattr(value, "isoformat") else str(value))
        size = len(value)
    if size > METADATA_CHARACTERS:
        raise _TooLargeError
    return value


def _free(name, kept):
    """Returns a field's name as files hold it; with a number where another one is written so, too, so that none is lost."""
    name = _unicode(str(name))
    if name not in kept:
        return name
    number = len(kept) + 1
    while f"{name}_{number}" in kept:
        number *= 2  # not one by one: the names may have been made to be in the way
    return f"{name}_{number}"


def _unicode(text):
    """Returns text whose halves of surrogate pairs, which no file can hold, are U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
