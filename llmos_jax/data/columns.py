"""Records from files of columns: parquet, and the Arrow streams of Hugging Face dataset folders."""

import contextlib
import os

from llmos_jax.data.fields import METADATA_CHARACTERS, PassedOver, check_names, read_record, shown, too_long, too_much
from llmos_jax.data.files import is_remote, missing_extra
from llmos_jax.errors import DataError

# Rows that are made into Python's values at once: so many, or so many bytes of them.
_BATCH_ROWS, _BATCH_BYTES = 1024, 16 << 20
_BUFFER = 1 << 20
# A character takes four bytes at most.
_METADATA_BYTES = 4 * METADATA_CHARACTERS
# What Arrow raises for a value that none of Python's types holds (its own errors of values are ValueErrors): text that is no
# UTF-8, spans of more than 999,999,999 days.
_UNHELD = (ValueError, OverflowError)


def read_parquet(file, source, limit):
    """Yields the rows of a parquet file; one row group that is damaged costs only itself."""
    pyarrow = _pyarrow(file)
    damage = (pyarrow.ArrowException, OSError)
    try:
        table = pyarrow.parquet.ParquetFile(file.open_raw(), buffer_size=_BUFFER)
    except damage as error:
        raise DataError(f"{file} is not a parquet file: {error}.") from None
    columns, passed_over = _columns(file, table.schema_arrow, source.text_key)
    yield from passed_over
    row = 0
    for group in range(table.num_row_groups):
        facts = table.metadata.row_group(group)
        end = row + facts.num_rows
        size = _batch_rows(facts.num_rows, facts.total_byte_size)
        batches = table.iter_batches(batch_size=size, row_groups=[group], columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except damage as error:
                reason = str(error).splitlines()[0]
                yield DataError(f"{file} is damaged after row {row}: {reason}. Its rows up to {end - 1} are lost.")
                break
            if batch is None:
                break
            yield from _rows(file, source, batch, row, limit)
            row += len(batch)
        row = end
    if not row:
        yield PassedOver("files without any record")


def read_arrow(file, source, limit):
    """Yields the rows of an Arrow stream, as `datasets.save_to_disk` writes it, or of an Arrow file."""
    pyarrow = _pyarrow(file)
    damage, row = (pyarrow.ArrowException, OSError), 0
    with contextlib.closing(file.open_raw() if is_remote(file.path) else pyarrow.memory_map(os.fsencode(file.path))) as stream:
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
        columns, passed_over = _columns(file, schema, source.text_key)
        yield from passed_over
        batches = iter(batches)
        while True:
            try:
                batch = next(batches, None)
            except damage as error:
                raise DataError(f"{file} is damaged after row {row}: {str(error).splitlines()[0]}.") from None
            if batch is None:
                break
            batch = batch.select(columns)
            size = _batch_rows(len(batch), batch.nbytes)
            for start in range(0, len(batch), size):
                yield from _rows(file, source, batch.slice(start, size), row + start, limit)
            row += len(batch)
    if not row:
        yield PassedOver("files without any record")


def _pyarrow(file):
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", file) from None
    return pyarrow


def _batch_rows(rows, size_bytes):
    """Returns how many of some rows are taken at once."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size_bytes, 1)))


def _columns(file, schema, text_key):
    """Returns the names of the columns that are read, and a PassedOver for each that metadata can't hold.

    DataError names a file without the column of texts, or with two columns of one name.
    """
    if text_key not in schema.names:
        raise DataError(f"{file} has no column {text_key!r} (text_key); it has {', '.join(map(shown, schema.names))}.")
    check_names(file, schema.names)
    kept = [field.name for field in schema if field.name == text_key or _is_plain(field.type)]
    passed_over = [PassedOver(f"metadata: {shown(f.name)!r} is {_kind(f.type)}") for f in schema if f.name not in kept]
    return kept, passed_over


def _kind(kind):
    """Returns a type as messages name it; of a long one, which holds names of fields, what it is alone."""
    return str(kind) if len(str(kind)) <= 40 else str(kind).partition("<")[0]


def _is_plain(kind):
    """Whether JSON can hold the values of a type: not so bytes, as of pictures."""
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return len({field.name for field in fields}) == len(fields) and all(_is_plain(field.type) for field in fields)
    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind) or kinds.is_dictionary(kind):
        return _is_plain(kind.value_type)
    checks = (
        kinds.is_string, kinds.is_large_string, kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_temporal,
        kinds.is_decimal, kinds.is_null,
    )  # fmt: skip
    return any(check(kind) for check in checks)


def _rows(file, source, batch, row, limit):
    """Yields the records of a batch whose first row has the number `row`; long values are never made Python's."""
    batch, long_rows, passed_over = _without_long(batch, source.text_key, limit)
    batch = _with_times_as_text(batch, source.text_key)
    yield from passed_over
    for place, record in enumerate(_records(batch)):
        where = f"{file}, row {row + place}"
        if place in long_rows:
            yield too_long(where, limit)
        elif isinstance(record, UnicodeDecodeError):
            yield DataError(f"{where} holds no valid Unicode: {record}.")
        elif isinstance(record, Exception):
            yield DataError(f"{where} holds a value that Python can't: {str(record).splitlines()[0]}.")
        else:
            yield from read_record(record, f":{row + place}", source, where)


def _without_long(batch, text_key, limit):
    """Returns a batch whose long values are none, the places of those that were texts, and a PassedOver for each other one."""
    import pyarrow.compute as compute
    import pyarrow.types as kinds

    long_rows, passed_over = set(), []
    for number, field in enumerate(batch.schema):
        most = limit if field.name == text_key else _METADATA_BYTES
        is_text = any(is_kind(field.type) for is_kind in (kinds.is_string, kinds.is_large_string, kinds.is_binary))
        if most is None or not is_text or batch.column(number).nbytes <= most:
            continue
        is_long = compute.fill_null(compute.greater(compute.binary_length(batch.column(number)), most), False)
        places = compute.indices_nonzero(is_long).to_pylist()
        if not places:
            continue
        batch = batch.set_column(number, field.name, compute.if_else(is_long, None, batch.column(number)))
        if field.name == text_key:
            long_rows.update(places)
        else:
            passed_over += [too_much(field.name)] * len(places)
    return batch, long_rows, passed_over


def _with_times_as_text(batch, text_key):
    """Returns a batch whose dates and times are text, in UTC where they have a zone.

    Python's types hold neither nanoseconds nor years after 9999 nor zones unknown here; Arrow writes out all of them.
    """
    import pyarrow
    import pyarrow.compute as compute
    import pyarrow.types as kinds

    for number, field in enumerate(batch.schema):
        in_utc, in_text = _retimed(field.type, "UTC"), _retimed(field.type, None)
        if field.name == text_key or in_text == field.type:
            continue
        try:
            column = compute.cast(compute.cast(batch.column(number), in_utc), in_text)
        except pyarrow.ArrowException:  # a rare nesting: what of it Python can't hold is named for its row
            continue
        if kinds.is_string(in_text) and not kinds.is_duration(field.type):  # as Python's isoformat has it
            column = compute.replace_substring_regex(column, r"(\d) (\d)", r"\1T\2")
            column = compute.replace_substring_regex(column, r"\.(\d*[1-9])?0+(Z?)$", r".\1\2")
            column = compute.replace_substring_regex(column, r"\.(Z?)$", r"\1")
        batch = batch.set_column(number, field.name, column)
    return batch


def _retimed(kind, zone):
    """Returns a type with all times inside it in a zone, or, for no zone, with strings in their place."""
    import pyarrow
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return pyarrow.struct([field.with_type(_retimed(field.type, zone)) for field in fields])
    if kinds.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_retimed(kind.value_type, zone)))
    if kinds.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_retimed(kind.value_type, zone)))
    if kinds.is_fixed_size_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_retimed(kind.value_type, zone)), kind.list_size)
    if kinds.is_dictionary(kind):
        inner = _retimed(kind.value_type, zone)
        return kind if inner == kind.value_type and not kinds.is_temporal(inner) else inner
    if zone:
        return pyarrow.timestamp(kind.unit, zone) if kinds.is_timestamp(kind) and kind.tz else kind
    is_held = kinds.is_duration(kind) and kind.unit != "ns"  # by Python's type for spans
    return pyarrow.string() if kinds.is_temporal(kind) and not kinds.is_interval(kind) and not is_held else kind


def _records(batch):
    """Returns the rows of a batch as dicts; text that is no UTF-8 as bytes, a row with what Python can't hold as the error."""
    try:
        return batch.to_pylist()
    except _UNHELD:
        return [_record(batch, place) for place in range(len(batch))]


def _record(batch, place):
    record = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        value = column[place]
        try:
            record[name] = value.as_py()
        except _UNHELD as error:
            value = value.value if hasattr(value, "dictionary") else value
            if not (isinstance(error, UnicodeDecodeError) and hasattr(value, "as_buffer")):
                return error
            record[name] = value.as_buffer().to_pybytes()
    return record
