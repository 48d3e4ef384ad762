"""Splits of TFDS datasets: the files of ArrayRecord that they lie in, and the records of one."""

import dataclasses
import functools

from llmos_jax.data.fields import PassedOver, read_record, shown
from llmos_jax.data.files import TFDS, list_path
from llmos_jax.errors import ConfigError, DataError

_FORMAT = "array_record"
_BATCH = 256


def list_tfds(path):
    """Returns the SourceFiles of `tfds:NAME[#SPLIT]`, one for each of its files; the split is train when none is named.

    ConfigError says what is there when the dataset is not, or has no such split.
    """
    import tensorflow_datasets as tfds

    name, _, split = path.removeprefix(TFDS).partition("#")
    split = split or "train"
    try:
        info = tfds.builder(name).info
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, AssertionError, ValueError, NotImplementedError) as error:
        raise _not_prepared(path, _reason(error)) from None
    if not info.splits:
        raise _not_prepared(path, "it has no split")
    if split not in info.splits:
        raise ConfigError(f"data source {path}: the dataset has no split {split!r}; it has {', '.join(info.splits)}.")
    if info.file_format.value != _FORMAT:
        raise _not_prepared(path, f"its files are {info.file_format.value}")
    files = [file for part in info.splits[split].filepaths for file in list_path(str(part))]
    return [dataclasses.replace(file, path=f"{TFDS}{file.path}") for file in files]


def read_tfds(file, source, limit):
    """Yields the records of one file of a split; a record that is damaged costs only itself."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    folder, _, name = file.location.rpartition("/")
    features, passed_over = _features(folder, source.text_key)
    if features is None:
        raise DataError(f"{file} has no feature {source.text_key!r} (text_key); it has {', '.join(passed_over)}.")
    yield from passed_over
    try:
        records = ArrayRecordDataSource([file.location])
        count = len(records)
    except Exception as error:  # array_record raises several kinds
        raise DataError(f"{file} is damaged: {_reason(error)}.") from None
    if count != _lengths(folder)[name]:
        raise DataError(f"{file} is damaged: {count} records, not the {_lengths(folder)[name]} of dataset_info.json.")
    for start in range(0, count, _BATCH):
        for index, data in enumerate(_records(records, range(start, min(start + _BATCH, count))), start):
            where = f"{file}, record {index}"
            try:
                if isinstance(data, Exception):
                    raise data
                record = features.deserialize_example_np(data)
            except Exception as error:
                yield DataError(f"{where} is damaged: {_reason(error)}.")
                continue
            yield from read_record(record, f":{index}", source, where)
    if not count:
        yield PassedOver("files without any record")


def _records(records, indices):
    """Returns the bytes of records, or the error in the place of each that can't be read."""
    try:
        return records.__getitems__(list(indices))
    except Exception:
        return [_record(records, index) for index in indices]


def _record(records, index):
    try:
        return records[index]
    except Exception as error:
        return error


@functools.lru_cache(maxsize=8)
def _features(folder, text_key):
    """Returns (features of a dataset that text and metadata can hold, a PassedOver for each other one).

    (None, the names of all of them) when there is no `text_key`.
    """
    import tensorflow_datasets as tfds

    features = tfds.builder_from_directory(folder).info.features
    if text_key not in features:
        return None, tuple(features)
    kept = {name: feature for name, feature in features.items() if name == text_key or _is_plain(feature)}
    left = [
        PassedOver(f"metadata: {shown(name)!r} is {type(features[name]).__name__}") for name in features if name not in kept
    ]
    return tfds.features.FeaturesDict(kept), left


@functools.lru_cache(maxsize=8)
def _lengths(folder):
    """Returns {name of a file: how many records it must have} of a dataset."""
    import tensorflow_datasets as tfds

    splits = tfds.builder_from_directory(folder).info.splits.values()
    return {path.name: length for one in splits for path, length in zip(one.filepaths, one.shard_lengths, strict=True)}


def _is_plain(feature):
    """Whether values of a feature are fit for metadata: text, numbers, and lists and groups of them."""
    from tensorflow_datasets import features

    if isinstance(feature, features.FeaturesDict):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, features.Sequence):
        return _is_plain(feature.feature)
    kinds = (features.Text, features.ClassLabel, features.Scalar, features.Tensor)
    return type(feature) in kinds and len(feature.shape) <= 1


def _reason(error):
    """Returns the first line that an error says; some say nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _not_prepared(path, reason):
    import tensorflow_datasets as tfds

    where = tfds.core.constants.DATA_DIR
    return ConfigError(f"data source {path} is not prepared in {where} ({reason}): prepare it there as {_FORMAT}.")
