"""Results on disk by name: each is written once, whole or not at all, and read by any process."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib

import numpy as np

from llmos_jax.data.clean.documents import Documents
from llmos_jax.data.files import missing_extra
from llmos_jax.errors import DataError

_TEMPORARY = ".tmp-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Results of tasks are read back soon: they are compressed fast. What is kept is compressed well, by half as much again.
FAST, SMALL = ("lz4", None), ("zstd", 3)
_ROW_GROUP = 8192
_BESIDE = "beside"


@dataclasses.dataclass(frozen=True)
class Task:
    """A pure function of its arguments: `kind` names it, `result` the object that its JSON result is written to.

    The result names under "objects" what else was written, with hashes; `size_bytes` weighs it in the progress.
    """

    kind: str
    result: str
    arguments: dict
    size_bytes: int = 0


def file_facts(path):
    """Returns {"sha256", "bytes"} of a file, all of which is read."""
    with open(path, "rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": os.fstat(stream.fileno()).st_size}


class Objects:
    """A folder of named results. A name tells all that decides the content, so what is there and whole is never made again."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self._facts = {}

    def path(self, name):
        """Returns where an object lies, or would."""
        return self.root / name

    def has(self, name):
        """Whether an object is there."""
        return self.path(name).is_file()

    def facts(self, name):
        """Returns {"sha256", "bytes"} of an object: noted when this instance wrote it, else read from the disk, once."""
        if name not in self._facts:
            with self._reading(name) as path:
                self._facts[name] = file_facts(path)
        return self._facts[name]

    def is_whole(self, name, facts):
        """Whether an object is there and is what `facts` says of it."""
        if self.has(name) and self.facts(name) == facts:
            return True
        self._facts.pop(name, None)  # whoever makes it again may be another process
        return False

    def write_json(self, name, tree):
        """Writes a JSON-able tree with a checksum."""
        content = json.dumps(tree, sort_keys=True)
        with self._writing(name) as temporary:
            temporary.write_text(f"{_digest(content)}\n{content}\n", "utf-8")

    def read_json(self, name):
        """Returns the tree of `write_json`; damage is found."""
        with self._reading(name) as path:
            digest, _, content = path.read_text("utf-8").partition("\n")
            if digest != _digest(content.removesuffix("\n")):
                raise ValueError("its checksum is another")
            return json.loads(content)

    def write_arrays(self, name, arrays, beside=None):
        """Writes {name: array}, each of them with a checksum, and the hash of the object `beside` that belongs to it."""
        own = {} if beside is None else {_BESIDE: np.array(self.facts(beside)["sha256"])}
        with self._writing(name) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays, **own)

    def read_arrays(self, name):
        """Returns the arrays of `write_arrays`; damage is found."""
        return {key: array for key, array in self._load(name).items() if key != _BESIDE}

    def held_arrays(self, name, beside=None):
        """Returns the arrays of an object to go on from; None where it, or the one beside it, is not there or not whole."""
        try:
            arrays = self._load(name)
            is_whole = beside is None or str(arrays.pop(_BESIDE, "")) == self.facts(beside)["sha256"]
        except DataError:
            return None
        return arrays if is_whole else None

    def write_records(self, name, records):
        """Writes a structured array that `map_records` reads in parts."""
        with self._writing(name) as temporary, open(temporary, "wb") as stream:
            np.save(stream, records)

    def map_records(self, name):
        """Returns a structured array that is read from the disk where it is looked at."""
        with self._reading(name) as path:
            return np.load(path, mmap_mode="r")

    def write_table(self, name, columns, compression=FAST):
        """Writes columns {name: list or array} as a parquet file with checksums; the bytes depend on the columns alone."""
        pyarrow, parquet = _pyarrow(self.root)
        # Lists are text columns here; arrays keep their types.
        arrays = {
            key: pyarrow.array(values, pyarrow.string()) if isinstance(values, list) else pyarrow.array(values)
            for key, values in columns.items()
        }
        with self._writing(name) as temporary:
            parquet.write_table(
                pyarrow.table(arrays), temporary, compression=compression[0], compression_level=compression[1],
                row_group_size=_ROW_GROUP, use_dictionary=False, write_statistics=False, write_page_checksum=True,
            )  # fmt: skip

    def read_table(self, name, columns=None):
        """Returns {column: list} of a parquet file; its checksums are verified."""
        _, parquet = _pyarrow(self.root)
        with self._reading(name) as path:
            table = parquet.read_table(path, columns=columns, page_checksum_verification=True, use_threads=False)
            return {key: table.column(key).to_pylist() for key in table.column_names}

    def write_documents(self, name, documents, files):
        """Writes Documents without their attributes, and the size of each text. files: key of the file of each."""
        columns = {
            "key": documents.keys,
            "file": files,
            "text": documents.texts,
            "metadata": [json.dumps(item, sort_keys=True, ensure_ascii=False) if item else "{}" for item in documents.metadata],
            "utf8_bytes": documents.utf8_bytes,
        }
        self.write_table(name, columns)

    def read_documents(self, name):
        """Returns the Documents of `write_documents`."""
        columns = self.read_table(name, ["key", "text", "metadata"])
        return Documents(columns["key"], columns["text"], [json.loads(item) for item in columns["metadata"]])

    def remove_leftovers(self):
        """Removes what a process that died left half written; nobody else may be writing."""
        for file in self.root.rglob(f"{_TEMPORARY}*"):
            file.unlink(missing_ok=True)

    def _load(self, name):
        with self._reading(name) as path, np.load(path) as arrays:
            return {key: arrays[key] for key in arrays.files}

    @contextlib.contextmanager
    def _writing(self, name):
        path = self.path(name)
        temporary = path.with_name(f"{_TEMPORARY}{os.urandom(8).hex()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            self._facts[name] = file_facts(temporary)
            temporary.replace(path)
        except OSError as error:
            reason = "No space left on device" if error.errno in _NO_ROOM else error.strerror or str(error)
            raise DataError(f"{path} could not be written ({reason}): make room, or name another --workdir.") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _reading(self, name):
        path = self.path(name)
        try:
            yield path
        except FileNotFoundError:
            raise DataError(f"{path} is missing: prepare the dataset again.") from None
        except Exception as error:  # zipfile, numpy, json and pyarrow raise many kinds, and few name the file
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{path} is damaged ({reason}): delete it, and prepare the dataset again.") from error


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _pyarrow(root):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", root) from None
    return pyarrow, pyarrow.parquet
