"""From the files of sources to shards of documents: which files go together, and what is bad in them."""

import contextlib
import dataclasses
import errno
import hashlib
import os

import numpy as np

from llmos_jax.config import fingerprint, library_versions, parse, to_plain
from llmos_jax.data import sources as sources_lib
from llmos_jax.data.clean.augment import AugmentConfig, with_copies
from llmos_jax.data.clean.documents import Documents
from llmos_jax.data.clean.objects import Task
from llmos_jax.data.fields import PassedOver
from llmos_jax.data.files import SourceFile
from llmos_jax.data.sources import SourceConfig
from llmos_jax.errors import DataError

# Raised when readers give other documents for the same files.
_VERSION = 5
# Messages that are kept of bad records; all are counted.
_KEPT_MESSAGES = 1000
_UNREADABLE = "unreadable"
# Errors of the system that say something of the file; after any other one the next run looks again.
_LASTING = (
    None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EINVAL,
)  # fmt: skip
# Reasons of what is passed over that are told apart: names in them are those of the files.
_MOST_REASONS, _OTHER = 100, "other reasons"


def source_names(sources):
    """Returns a short name for each source, unique and the same from run to run: the last part of its path."""
    names = []
    for source in sources:
        name = source.path.rstrip("/").rpartition("/")[2] or "root"
        numbered = (f"{name}#{number}" for number in range(2, len(names) + 3))
        names.append(name if name not in names else next(other for other in numbered if other not in names))
    return names


def hash_task(files):
    """Returns the Task that hashes the bytes of some SourceFiles."""
    key = fingerprint([[file.path, file.size_bytes, file.stamp] for file in files])
    size = sum(file.size_bytes for file in files)
    return Task("hash", f"hash/{key}.json", {"files": [to_plain(file) for file in files]}, size)


def hash_files(objects, files):
    """Returns {"hashes": SHA-256 of the bytes of each file}; `is_passing` where one changed meanwhile, or can't be read."""
    files = [SourceFile(**file) for file in files]
    hashes = [file.content_hash() for file in files]
    is_known = all(file.is_unchanged() and not one.startswith(_UNREADABLE) for file, one in zip(files, hashes, strict=True))
    return {"hashes": hashes, "is_passing": not is_known}


def group_files(files, size_bytes):
    """Returns lists of successive SourceFiles that are read together, of about `size_bytes`.

    Where a group ends depends on the files' names, so a new file changes the groups around it and no others.
    """
    groups, group, size = [], [], 0
    for file in files:
        group.append(file)
        size += file.size_bytes
        chance = int.from_bytes(hashlib.sha256(file.key.encode()).digest()[:8], "big") / 2**64
        is_border = size >= size_bytes / 4 and chance < 2 * file.size_bytes / size_bytes
        if is_border or size >= size_bytes:
            groups.append(group)
            group, size = [], 0
    return [*groups, group] if group else groups


def read_task(source, name, files, hashes, config):
    """Returns the Task that reads a group of files of a source into shards."""
    reading = [to_plain(source) | {"path": "", "weight": 1.0}, name, config.shard_bytes, config.max_document_bytes, _VERSION]
    key = fingerprint([reading, [[file.key, content] for file, content in zip(files, hashes, strict=True)]])
    is_augmented = config.augment.is_active and name in (config.augment.sources or (name,))
    if is_augmented:
        key = fingerprint([key, to_plain(config.augment), library_versions(("numpy",))])
    arguments = {
        "key": key,
        "source": to_plain(source),
        "name": name,
        "files": [to_plain(file) for file in files],
        "hashes": hashes,
        "shard_bytes": config.shard_bytes,
        "limit": config.max_document_bytes,
        "most_bad": None if config.on_corrupt == "error" else config.max_corrupt,
        "augment": to_plain(config.augment) if is_augmented else None,
    }
    return Task("read", f"read/{key}.json", arguments, sum(file.size_bytes for file in files))


def read_files(objects, key, source, name, files, hashes, shard_bytes, limit, most_bad, augment):
    """Reads a group of files; returns {"shards": [{name, documents, utf8_bytes}], "bad": messages, "bad_count": n, ...}.

    hashes: what the content of each file must be. most_bad: how many files or records may be bad, none: the first stops the
    run, a DataError. "passed_over" counts what is whole but no document, by reason. augment: settings of copies of documents,
    or None. Raises DataError, too, when a file is no longer what was hashed.
    """
    source = parse(SourceConfig, source)
    augment = parse(AugmentConfig, augment or {"copies": 0})
    texts_each = 1 + augment.copies + (augment.translate is not None)
    shards, bad, documents, origins, size = [], _Bad(most_bad), Documents([], [], []), [], 0
    for file, content in zip([SourceFile(**file) for file in files], hashes, strict=True):
        for item in _read_one(source, file, limit, bad):
            documents.keys.append(f"{name}/{item.key}")
            documents.texts.append(item.text)
            documents.metadata.append(item.metadata)
            origins.append(file.key)
            size += len(item.text) * texts_each
            if size >= shard_bytes:
                _check_unchanged(file, content)
                shards.append(_write_shard(objects, key, len(shards), documents, origins, augment, bad.is_passing))
                documents, origins, size = Documents([], [], []), [], 0
        _check_unchanged(file, content)
    if len(documents):
        shards.append(_write_shard(objects, key, len(shards), documents, origins, augment, bad.is_passing))
    names = [shard["name"] for shard in shards]
    return {
        "shards": shards,
        "bad": bad.messages,
        "bad_count": bad.count,
        "passed_over": bad.passed_over,
        "is_passing": bad.is_passing,
        "objects": names,
    }


def _write_shard(objects, key, number, documents, origins, augment, is_passing):
    """Writes a shard with its copies and returns {name, documents, utf8_bytes}; one that a killed run has written stays.

    origins: key of the file of each document. is_passing: the shard may be another one in the next run, so its name is new.
    """
    name = f"{key}-{number}-{os.urandom(8).hex()}" if is_passing else f"{key}-{number}"
    noted = f"progress/{name}.json"
    if objects.has(noted):
        with contextlib.suppress(DataError):  # a damaged note: written again
            note = objects.read_json(noted)
            if objects.is_whole(note["shard"]["name"], note["facts"]):
                return note["shard"]
    if augment.is_active:
        of_key = dict(zip(documents.keys, origins, strict=True))
        documents = with_copies(documents, augment)
        origins = [
            of_key[one] if one in of_key else of_key[metadata["original"]]
            for one, metadata in zip(documents.keys, documents.metadata, strict=True)
        ]
    shard = {
        "name": f"shards/{name}.parquet",
        "documents": len(documents),
        "utf8_bytes": int(np.sum(documents.utf8_bytes)),
    }
    objects.write_documents(shard["name"], documents, origins)
    objects.write_json(noted, {"shard": shard, "facts": objects.facts(shard["name"])})
    return shard


def _check_unchanged(file, content):
    """Raises DataError when a file that was read is not, or may not have been, the one that was hashed before."""
    if not file.is_unchanged() and file.content_hash() != content:
        raise DataError(f"{file} changed while it was read: prepare again when nothing writes to it.")


def check_bad(results, config):
    """Returns (count, messages) of what is bad in all sources; DataError when it is more than the settings allow."""
    count = sum(result["bad_count"] for result in results)
    messages = [message for result in results for message in result["bad"]][:_KEPT_MESSAGES]
    if count and config.on_corrupt == "error":
        raise _strict(messages[0])
    if count > config.max_corrupt:
        raise _too_many(count, config.max_corrupt, messages[0])
    return count, messages


def count_passed_over(results):
    """Returns {reason: count} of what all sources held that is whole but no document, or that metadata can't hold."""
    total = {}
    for result in results:
        for reason, count in result["passed_over"].items():
            _count(total, reason, count)
    return dict(sorted(total.items()))


def _count(total, reason, count):
    reason = reason if reason in total or len(total) < _MOST_REASONS else _OTHER
    total[reason] = total.get(reason, 0) + count


class _Bad:
    """Files and records that can't be read: named and counted, at most so many; and what is passed over, by reason."""

    def __init__(self, most):
        self.most, self.count, self.messages, self.passed_over = most, 0, [], {}
        self.is_passing = False

    def add(self, message):
        self.count += 1
        if self.count <= _KEPT_MESSAGES:
            self.messages.append(message)
        if self.most is None:
            raise _strict(message)
        if self.count > self.most:
            raise _too_many(self.count, self.most, self.messages[0])

    def pass_over(self, reason):
        _count(self.passed_over, reason, 1)


def _strict(message):
    return DataError(f"{message} To go on without such records, set on_corrupt=skip.")


def _too_many(count, most, first):
    are = "file or record is" if count == 1 else "files or records are"
    return DataError(f"{count} {are} bad, more than max_corrupt={most}; the first: {first}")


def _read_one(source, file, limit, bad):
    items, count = sources_lib.read_records(source, file, limit), 0
    while True:
        try:
            item = next(items, None)
        except DataError as error:
            bad.is_passing |= _is_passing(error)
            bad.add(f"{error} Its {count} documents before that are used." if count else str(error))
            return
        if item is None:
            return
        if isinstance(item, DataError):
            bad.is_passing |= _is_passing(item)
            bad.add(str(item))
        elif isinstance(item, PassedOver):
            bad.pass_over(item.reason)
        else:
            count += 1
            yield item


def _is_passing(error):
    """Whether an error comes from a disk or network that may give the file next time, not from what the file is."""
    while error is not None:
        is_word = isinstance(error, (ConnectionError, TimeoutError))
        if is_word or (isinstance(error, OSError) and error.errno not in _LASTING):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a source: where its documents lie, and the number of its first among all documents."""

    name: str
    source: int
    documents: int
    utf8_bytes: int
    start: int


def shards_of(results, sources):
    """Returns the Shards of all read tasks in the order of sources and files; `sources`: the source of each result."""
    shards, start = [], 0
    for result, source in zip(results, sources, strict=True):
        for shard in result["shards"]:
            shards.append(Shard(shard["name"], source, shard["documents"], shard["utf8_bytes"], start))
            start += shard["documents"]
    return shards
