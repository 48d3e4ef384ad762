"""Training records on disk: a TFDS dataset in ArrayRecord files with a manifest of what they were made from."""

import contextlib
import errno
import io
import json
import os
import pathlib
import shutil
import socket
import threading

import numpy as np
from absl import logging

from llmos_jax.compute import host
from llmos_jax.data.text import segment_dtype
from llmos_jax.errors import DataError

MANIFEST_FILE = "manifest.json"
FORMAT = 3
SPLITS = ("train", "validation")
# What a manifest of this format says at the least: types, tuples of choices, and dicts and lists of these.
_SHAPE = {
    "content": str, "packing": str, "tokenizer": str, "dtype": ("uint16", "int32"), "length": int, "vocab_size": int,
    "validation_fraction": float, "validation_bytes": int, "validation_gzip_bytes": int,
    "files": {split: [{"name": str, "records": int, "bytes": int}] for split in SPLITS},
}  # fmt: skip
# What the manifests of earlier releases do not say.
_LATER = {"left_out": {"count": int, "files": int}}
_TEMPORARY = ".tmp-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_store(directory, splits, *, length, dtype, finish):
    """Writes `splits` ({name: iterator of records}) as a TFDS dataset with its manifest, all or nothing.

    Records are dicts of tokens [length + 1], segments [length + 1] and target_bytes (see `text.Packer`). When they are
    written, `finish()` returns (manifest, files): the manifest gains the files of each split with their sizes and record
    counts; `files` ({name: bytes}) are laid beside it.
    A process that dies leaves only a temporary folder, which the next writer on this host removes. DataError when the
    disk is full.
    """
    import tensorflow_datasets as tfds

    class LocalInfo(tfds.core.DatasetInfo):
        """Knows that nobody published these records: TFDS, asking its bucket, leaves an empty folder in /tmp each time."""

        def initialize_from_bucket(self):
            pass

    class TokenRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Packed token records of fixed length."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            shape = (length + 1,)
            features = tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes"),
                    "segments": tfds.features.Tensor(shape=shape, dtype=segment_dtype(length), encoding="bytes"),
                    "target_bytes": tfds.features.Scalar(dtype=np.int32),
                }
            )
            return LocalInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {name: enumerate(records) for name, records in splits.items()}

        def _generate_examples(self):
            raise AssertionError("splits are given as iterators")

    directory = pathlib.Path(directory)
    _remove_leftovers(directory.parent)
    owner = f"{socket.gethostname()}-{os.getpid()}-{host.process_start(os.getpid())}"
    temporary = directory.with_name(f"{directory.name}{_TEMPORARY}{owner}")
    try:
        # TFDS draws progress bars and announcements of its own; ours say what matters.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder = TokenRecords(file_format="array_record", data_dir=temporary)
            builder.download_and_prepare()
        built = pathlib.Path(builder.data_dir)
        shards = {}
        for name, split in builder.info.splits.items():
            counts = zip(split.filenames, split.shard_lengths, strict=True)
            shards[name] = [
                {"name": file, "records": records, "bytes": (built / file).stat().st_size} for file, records in sorted(counts)
            ]
        manifest, files = finish()
        content = manifest | {"format": FORMAT, "length": length, "dtype": np.dtype(dtype).name, "files": shards}
        (built / MANIFEST_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        for name, file in files.items():
            (built / name).write_bytes(file)
        try:
            built.rename(directory)
        except OSError:
            if not is_store(directory):  # else another process was faster; the content is the same by name
                raise
    except (OSError, RuntimeError) as error:  # array_record's errors carry the system's words only
        reason = next((os.strerror(code) for code in _NO_ROOM if os.strerror(code) in str(error)), None)
        if reason is None:
            raise
        raise DataError(
            f"{directory} could not be written ({reason}): make room, or keep prepared records elsewhere (data.cache_dir, or "
            "$LLMOS_CACHE)."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(cache):
    """Removes the temporary folders of this host's processes that died while they wrote."""
    for folder in cache.glob(f"*{_TEMPORARY}{socket.gethostname()}-*"):
        pid, start = folder.name.rsplit("-", 2)[1:]
        if str(host.process_start(int(pid))) != start:
            shutil.rmtree(folder, ignore_errors=True)


class Store:
    """Prepared records, open for random access.

    `on_corrupt`: "error", or "skip" (the record becomes padding of weight zero, named, counted, at most `max_corrupt`).
    """

    def __init__(self, directory, *, on_corrupt="error", max_corrupt=100):
        # Here, not where it is used, which is on a thread: while it is imported, modules that other threads import become
        # lazy stand-ins (etils.epy.lazy_imports replaces the interpreter's import for all of them).
        import tensorflow_datasets as tfds

        self._tfds = tfds
        self.directory = pathlib.Path(directory)
        self.manifest = _read_manifest(self.directory)
        self.length, self.dtype = self.manifest["length"], np.dtype(self.manifest["dtype"])
        self.on_corrupt, self.max_corrupt = on_corrupt, max_corrupt
        self.corrupt = set()
        self._sources, self._lock = {}, threading.Lock()
        for split in SPLITS:
            for file in self.manifest["files"][split]:
                self._check_file(file)

    @property
    def identity(self):
        """What decides the content: a dict that two equal stores share."""
        return {
            key: self.manifest[key]
            for key in ("content", "packing", "tokenizer", "vocab_size", "length", "validation_fraction")
        }

    def count(self, split):
        """Returns the number of records of a split."""
        return sum(file["records"] for file in self.manifest["files"][split])

    def records(self, split, indices):
        """Returns the records at `indices` stacked: tokens and segments [n, L+1], target_bytes [n], in fresh arrays.

        DataError names the file and the record when one is damaged, unless they are skipped.
        """
        indices = [int(index) for index in indices]
        source = self._source(split)
        try:
            records = source.__getitems__(indices)
        except Exception:  # array_record raises several kinds, and names neither file nor record
            records = [self._record(source, split, index) for index in indices]
        return {
            "tokens": np.stack([record["tokens"] for record in records]),
            "segments": np.stack([record["segments"] for record in records]),
            "target_bytes": np.array([record["target_bytes"] for record in records], np.int32),
        }

    def _source(self, split):
        with self._lock:
            if split not in self._sources:
                try:
                    builder = self._tfds.builder_from_directory(self.directory)
                    self._sources[split] = builder.as_data_source(split=split)
                except Exception as error:
                    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                    raise DataError(f"{self.directory} can't be opened as a TFDS dataset: {reason}.") from error
            return self._sources[split]

    def _record(self, source, split, index):
        try:
            return source.__getitems__([index])[0]
        except Exception as error:
            where = self._where(split, index)
            if self.on_corrupt == "error":
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise DataError(
                    f"{where} is damaged ({reason}): delete {self.directory} to have it prepared again, or set "
                    "data.on_corrupt=skip."
                ) from error
            if (split, index) not in self.corrupt:
                self.corrupt.add((split, index))
                logging.warning("%s is damaged and left out: %d so far.", where, len(self.corrupt))
            if len(self.corrupt) > self.max_corrupt:
                raise DataError(
                    f"{where} is the damaged record number {len(self.corrupt)}: more than data.max_corrupt."
                ) from error
            shape = (self.length + 1,)
            segments = np.zeros(shape, segment_dtype(self.length))
            return {"tokens": np.zeros(shape, self.dtype), "segments": segments, "target_bytes": 0}

    def _where(self, split, index):
        for file in self.manifest["files"][split]:
            if index < file["records"]:
                return f"record {index} of {self.directory / file['name']}"
            index -= file["records"]
        return f"record {index} past the end of {self.directory}"

    def _check_file(self, file):
        path = self.directory / file["name"]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{path} is missing: delete {self.directory} to have it prepared again.") from None
        if size != file["bytes"]:
            raise DataError(
                f"{path} has {size} bytes and its manifest says {file['bytes']}: it was cut or replaced; delete "
                f"{self.directory} to have it prepared again."
            )


def is_store(directory):
    """Whether a folder holds prepared records."""
    return (pathlib.Path(directory) / MANIFEST_FILE).is_file()


def _read_manifest(directory):
    file = directory / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} can't be read ({error}): delete {directory} to have it prepared again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{file} is not a manifest of format {FORMAT}: prepare {directory} again.")
    fault = _fault(manifest, _SHAPE | {name: shape for name, shape in _LATER.items() if name in manifest})
    if fault:
        raise DataError(f"{file} is damaged ({fault}): delete {directory} to have it prepared again.")
    return manifest


def _fault(value, shape, name=""):
    """Returns the first thing in a JSON value that is not of a shape such as `_SHAPE`, none if all is."""
    if value is None:
        return f"{name} is missing"
    if isinstance(shape, tuple):
        return None if value in shape else f"{name} is {value!r}, not one of {', '.join(shape)}"
    kind = shape if isinstance(shape, type) else type(shape)
    if type(value) is not kind:
        return f"{name} is of type {type(value).__name__}, not {kind.__name__}"
    parts = []
    if isinstance(shape, dict):
        parts = [(value.get(key), part, f"{name}.{key}".lstrip(".")) for key, part in shape.items()]
    elif isinstance(shape, list):
        parts = [(item, shape[0], f"{name}[{number}]") for number, item in enumerate(value)]
    return next(filter(None, (_fault(*part) for part in parts)), None)
