"""From the files of sources to shards of documents: which files go together, and what is bad in them."""

import dataclasses
import hashlib

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
_VERSION = 2
# Messages that are kept of bad records; all are counted.
_KEPT_MESSAGES = 1000
# Reasons of what is passed over that are told apart: names in them are those of the files.
_MOST_REASONS, _OTHER = 100, "other reasons"


def source_names(sources):
    """Returns a short name for each source, unique and the same from run to run: the last part of its path."""
    names = []
    for source in sources:
        name = source.path.rstrip("/").rpartition("/")[2] or "root"
        same = sum(other.split("#")[0] == name for other in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return names


def hash_task(files):
    """Returns the Task that hashes the bytes of some SourceFiles."""
    key = fingerprint([[file.path, file.size_bytes, file.stamp] for file in files])
    size = sum(file.size_bytes for file in files)
    return Task("hash", f"hash/{key}.json", {"files": [to_plain(file) for file in files]}, size)


def hash_files(objects, files):
    """Returns {"hashes": SHA-256 of the bytes of each file}."""
    files = [SourceFile(**file) for file in files]
    return {"hashes": [file.content_hash() for file in files]}


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
        "shard_bytes": config.shard_bytes,
        "limit": config.max_document_bytes,
        "most_bad": None if config.on_corrupt == "error" else config.max_corrupt,
        "augment": to_plain(config.augment) if is_augmented else None,
    }
    return Task("read", f"read/{key}.json", arguments, sum(file.size_bytes for file in files))


def read_files(objects, key, source, name, files, shard_bytes, limit, most_bad, augment):
    """Reads a group of files; returns {"shards": [{name, documents, utf8_bytes}], "bad": messages, "bad_count": n, ...}.

    most_bad: how many files or records may be bad, none: the first stops the run, a DataError. "passed_over" counts what is
    whole but no document, by reason. augment: settings of copies of documents, or None.
    """
    source = parse(SourceConfig, source)
    augment = parse(AugmentConfig, augment or {"copies": 0})
    texts_each = 1 + augment.copies + (augment.translate is not None)
    shards, bad, documents, size = [], _Bad(most_bad), Documents([], [], []), 0

    def write(documents):
        documents = with_copies(documents, augment) if augment.is_active else documents
        shard = f"shards/{key}-{len(shards)}.parquet"
        objects.write_documents(shard, documents)
        shards.append({"name": shard, "documents": len(documents), "utf8_bytes": int(np.sum(documents.utf8_bytes))})

    for file in files:
        for item in _read_one(source, SourceFile(**file), limit, bad):
            documents.keys.append(f"{name}/{item.key}")
            documents.texts.append(item.text)
            documents.metadata.append(item.metadata)
            size += len(item.text) * texts_each
            if size >= shard_bytes:
                write(documents)
                documents, size = Documents([], [], []), 0
    if len(documents):
        write(documents)
    names = [shard["name"] for shard in shards]
    return {
        "shards": shards,
        "bad": bad.messages,
        "bad_count": bad.count,
        "passed_over": bad.passed_over,
        "objects": names,
    }


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


class _TooManyBad(DataError):
    """More is bad than the settings allow."""


class _Bad:
    """Files and records that can't be read: named and counted, at most so many; and what is passed over, by reason."""

    def __init__(self, most):
        self.most, self.count, self.messages, self.passed_over = most, 0, [], {}

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
    return _TooManyBad(f"{message} To go on without such records, set on_corrupt=skip.")


def _too_many(count, most, first):
    are = "file or record is" if count == 1 else "files or records are"
    return _TooManyBad(f"{count} {are} bad, more than max_corrupt={most}; the first: {first}")


def _read_one(source, file, limit, bad):
    count = 0
    try:
        for item in sources_lib.read_records(source, file, limit):
            if isinstance(item, DataError):
                bad.add(str(item))
            elif isinstance(item, PassedOver):
                bad.pass_over(item.reason)
            else:
                count += 1
                yield item
    except _TooManyBad:
        raise
    except DataError as error:
        bad.add(f"{error} Its {count} documents before that are used." if count else str(error))


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
