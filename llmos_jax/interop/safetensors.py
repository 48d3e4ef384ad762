"""The safetensors format: a checked header, and tensors read and written one at a time by plain file reads.

A file is 8 bytes of the header's length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes. Reads
go through `pread` into fresh arrays, never through a memory map: what was read is all that is resident, and a file that is
cut short meanwhile is an error, not a signal. Several files with an index are one checkpoint. Nothing in a file is executed.
"""

import dataclasses
import json
import math
import os
import pathlib

import ml_dtypes
import numpy as np

from llmos_jax.errors import DataError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What the format's own library accepts at most.
_LARGEST_HEADER_BYTES = 100_000_000
_MOST_DIMENSIONS = 16
# The reads of one tensor: bounded, so that no single system call is asked for more than the system gives.
_READ_BYTES = 2**28
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its file, dtype, shape, and first byte."""

    file: pathlib.Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self):
        """Bytes of its content."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self):
        """Returns the content as a new array; DataError when the file no longer holds it."""
        array = np.empty(self.shape, self.dtype)
        view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
        try:
            descriptor = os.open(self.file, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.file} can't be read: {error.strerror}.") from None
        try:
            while done < self.nbytes:
                count = os.preadv(descriptor, [view[done : done + _READ_BYTES]], self.start + done)
                if count == 0:
                    raise DataError(f"{self.file} ends within tensor {self.name!r}: it was cut short; fetch it again.")
                done += count
        except OSError as error:
            raise DataError(f"{self.file} can't be read at tensor {self.name!r}: {error.strerror}.") from None
        finally:
            os.close(descriptor)
        return array


def read_header(file):
    """Returns {name: Tensor} of one file; DataError names what is wrong with a header that can't be trusted.

    Every byte after the header must belong to exactly one tensor, so that truncated, padded and overlapping files are found
    before anything is allocated for their content.
    """
    file = pathlib.Path(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER_BYTES):
                raise DataError(
                    f"{file} is no safetensors file, or was cut short: its header should have {length} bytes, the file {size}."
                )
            header = json.loads(stream.read(length), object_pairs_hook=_without_doubles)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no safetensors file: its header is not JSON ({error}).") from None
    if not isinstance(header, dict):
        raise DataError(f"{file} is no safetensors file: its header is not a table of tensors.")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _tensor(file, name, entry, data) for name, entry in header.items()}
    end = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise DataError(
                f"{file} is damaged: tensor {tensor.name!r} begins at byte {tensor.start}, the one before ends at {end}."
            )
        end += tensor.nbytes
    if end != size:
        words = "it was cut short" if end > size else "there is more in it"
        raise DataError(f"{file} is damaged: its tensors end at byte {end}, the file has {size}: {words}; fetch it again.")
    return tensors


def read_checkpoint(folder):
    """Returns {name: Tensor} of a folder's `model.safetensors`, or of the files that its index names.

    Raises DataError when there is neither, when a file is missing or damaged, and when index and files disagree.
    """
    folder = pathlib.Path(folder)
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        if (folder / SINGLE_FILE).is_file():
            return read_header(folder / SINGLE_FILE)
        raise DataError(_what_is_there(folder))
    files_of = _weight_map(index_file)
    for name in sorted(set(files_of.values())):
        if pathlib.PurePath(name).name != name or name in ("", ".", ".."):
            raise DataError(f"{index_file} names the file {name!r}: it must lie beside the index.")
        if not (folder / name).is_file():
            raise DataError(f"{folder} lacks {name}, which {INDEX_FILE} names: fetch the missing files.")
    tensors = {}
    for file in sorted(set(files_of.values())):
        for name, tensor in read_header(folder / file).items():
            if files_of.get(name) != file:
                raise DataError(f"{folder / file} holds {name!r}, which {INDEX_FILE} says is in {files_of.get(name)}.")
            tensors[name] = tensor
    missing = sorted(set(files_of) - set(tensors))
    if missing:
        raise DataError(f"{folder / files_of[missing[0]]} lacks {missing[0]!r}, which {INDEX_FILE} says is in it.")
    return tensors


def dtype_name(dtype):
    """Returns the format's name of a NumPy dtype."""
    return _NAMES[np.dtype(dtype)]


class Writer:
    """Writes one file: its header at once, then the tensors' bytes in the order in which they were declared."""

    def __init__(self, file, specs):
        """`specs`: {name: (shape, dtype)}."""
        self._file, self._left, offset, header = pathlib.Path(file), [], 0, {"__metadata__": {"format": "pt"}}
        for name, (shape, dtype) in specs.items():
            size = math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": dtype_name(dtype),
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            self._left.append((name, tuple(shape), np.dtype(dtype)))
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors are aligned, as the format asks
        self._left.reverse()
        self._stream = self._file.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name, array):
        """Writes the next tensor."""
        expected = self._left.pop()
        array = np.asarray(array, order="C")
        if expected != (name, array.shape, array.dtype):
            raise ValueError(f"expected {expected}, not {(name, array.shape, array.dtype)}.")
        self._stream.write(memoryview(array.reshape(-1).view(np.uint8)))

    def close(self):
        """Ends the file; it is on the disk when this returns."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were not written.")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def _weight_map(index_file):
    try:
        files_of = json.loads(index_file.read_text("utf-8"), object_pairs_hook=_without_doubles)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{index_file} is no index of safetensors files ({error}).") from None
    if not isinstance(files_of, dict) or not all(isinstance(name, str) for name in files_of.values()):
        raise DataError(f"{index_file} is no index of safetensors files: weight_map must give a file to each tensor.")
    return files_of


def _tensor(file, name, entry, data):
    where = f"{file} is damaged: tensor {name!r}"
    try:
        dtype_text, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where} lacks its dtype, shape or offsets.") from None
    if dtype_text not in DTYPES:
        raise DataError(f"{file}: tensor {name!r} has dtype {dtype_text!r}; known: {', '.join(DTYPES)}.")
    is_shape = isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS and all(_is_count(size) for size in shape)
    if not is_shape or not _is_count(start) or not _is_count(stop):
        raise DataError(f"{where} has shape {shape} and offsets {start}, {stop}.")
    dtype = DTYPES[dtype_text]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{where} has {stop - start} bytes, and {dtype_text}{shape} needs {math.prod(shape) * dtype.itemsize}.")
    return Tensor(file, name, dtype, tuple(shape), data + start)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _without_doubles(pairs):
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _what_is_there(folder):
    if not folder.is_dir():
        return f"{folder} is no folder with a checkpoint."
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        return (
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run any code when it is read, so it never is. "
            "Convert it where you trust it: transformers' `model.save_pretrained(FOLDER, safe_serialization=True)`."
        )
    return f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}."
