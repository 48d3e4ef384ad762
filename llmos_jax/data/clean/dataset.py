"""A clean dataset on disk: versions, each a folder of parquet files with a manifest that says what is in it and why.

    DIR/versions/0001/dataset.json     settings, funnel, files with their hashes, sources and licences
                      documents-*.parquet   key, source, file, text, metadata, and an attribute a column
                      removed-*.parquet     the same for removed documents, with step and reason
                      cut-*.parquet         what transforms cut out of texts
                      inputs.parquet        every file that was read, with its hash
                      *index-*.npy          where the keys of documents stand
    DIR/cache/                          results of tasks, shared by the versions

A version's files are hard links into the cache where the file system has them. Versions are numbered; the last one counts.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import numpy as np

from llmos_jax.config import differences, fingerprint, library_versions, to_plain
from llmos_jax.data.clean.objects import Objects, file_facts
from llmos_jax.data.clean.output import INDEXES, KINDS, rows_of_key
from llmos_jax.data.files import DATASET, missing_extra
from llmos_jax.errors import ConfigError, DataError

VERSIONS = "versions"
MANIFEST_FILE = "dataset.json"
KIND = "clean dataset"
FORMAT = 3
# What the versions need of the cache, a list of names for each.
_NEEDS = "needs"
# Settings that change no byte of the result.
_WORKINGS = ("workers", "runner", "beam_options")


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of a clean dataset."""

    directory: pathlib.Path
    manifest: dict

    @property
    def number(self):
        """Its number, from 1."""
        return int(self.directory.name)

    @property
    def files(self):
        """Paths of the clean documents, in order."""
        return [self.directory / file["name"] for file in self.manifest["files"]["documents"]]

    def read(self, file, columns=None):
        """Returns the pyarrow Table of a file's entry in the manifest; DataError when it is not the file that was written."""
        return read_verified(self.directory / file["name"], file["sha256"], columns)

    def iterate(self, kind="documents", columns=None):
        """Yields the rows of one kind of file as dicts, in order and verified; DataError names a file that is damaged."""
        for file in self.manifest["files"][kind]:
            for batch in self.read(file, columns).to_batches(max_chunksize=4096):
                yield from batch.to_pylist()


def read_verified(path, sha256, columns=None):
    """Returns the pyarrow Table of a parquet file whose bytes have that hash; DataError when they have not."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", path) from None
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}): prepare the dataset again.") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path} is not what its manifest says: it was cut, changed or damaged; prepare the dataset again.")
    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(content), columns=columns)
    except (pyarrow.ArrowException, OSError) as error:  # what was written was damaged already
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is damaged, though its manifest knows it ({reason}): prepare the dataset anew.") from None


def write_version(directory, config, inputs, funnel, outputs, notes):
    """Makes a version of what came out of all shards, or returns the newest one when it is the same, and mends that.

    inputs, funnel, outputs: of `pipeline`, inputs with messages that may be written, outputs with the hashes that were taken
    when they were written. notes: {step: what it says of its inputs}.
    """
    objects = Objects(directory / "cache")
    files = {kind: [] for kind in (*KINDS, *INDEXES.values())}
    for output in outputs:
        for kind in files:
            if output[kind]:
                entry = {k: v for k, v in output[kind].items() if k != "name"}
                ending = "parquet" if kind in KINDS else "npy"
                entry |= {"name": f"{kind}-{len(files[kind]):05d}.{ending}", "source": output["source"]}
                files[kind].append((output[kind]["name"], entry | output["objects"][output[kind]["name"]]))
    settings = {key: value for key, value in to_plain(config).items() if key not in _WORKINGS}
    rows = list(zip(*inputs["files"], strict=True))
    names = ("source", "key", "path", "bytes", "sha256")
    inputs_name = f"inputs/{fingerprint(inputs['files'])}.parquet"
    objects.write_table(inputs_name, {name: list(map(str, row)) for name, row in zip(names, rows, strict=True)})
    files["inputs"] = [(inputs_name, {"name": "inputs.parquet"} | objects.facts(inputs_name))]
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "name": config.name,
        "settings": settings,
        "steps": [{"name": step.name, "version": step.version, "fingerprint": step.fingerprint} for step in config.steps],
        "libraries": library_versions(sorted({name for step in config.steps for name in step.libraries} | {"pyarrow"})),
        "sources": _sources(config, inputs),
        "funnel": funnel,
        "notes": notes,
        "files": {kind: [entry for _, entry in entries] for kind, entries in files.items()},
        "bad": {"count": inputs["bad_count"], "messages": inputs["bad"]},
        "passed_over": inputs["passed_over"],
        "content": fingerprint([[entry["sha256"] for _, entry in files[kind]] for kind in KINDS]),
    }
    known = list_versions(directory)
    if known and known[-1].manifest == manifest:
        _mend(known[-1], objects, files)
        return known[-1]
    number = known[-1].number + 1 if known else 1
    return _write(directory, objects, number, manifest, files)


def list_versions(directory):
    """Returns the Versions of a dataset folder, oldest first."""
    root = pathlib.Path(directory) / VERSIONS
    folders = sorted(path for path in root.glob("[0-9]*") if path.name.isdigit() and (path / MANIFEST_FILE).is_file())
    return [Version(folder, _read_manifest(folder / MANIFEST_FILE)) for folder in folders]


def open_dataset(directory, number=None):
    """Returns the newest Version of a dataset folder, or that of a number, or the one that the folder itself is.

    Raises ConfigError when there is none.
    """
    directory = pathlib.Path(directory)
    if number is None and (directory / MANIFEST_FILE).is_file():
        return Version(directory, _read_manifest(directory / MANIFEST_FILE))
    versions = list_versions(directory)
    if not versions:
        raise ConfigError(f"{directory} holds no clean dataset: prepare it first.")
    chosen = [version for version in versions if number in (None, version.number)]
    if not chosen:
        raise ConfigError(f"{directory} has no version {number}; it has {', '.join(str(v.number) for v in versions)}.")
    return chosen[-1]


def is_dataset(directory):
    """Whether a folder is a clean dataset, or a version of one."""
    directory = pathlib.Path(directory)
    manifests = [directory / MANIFEST_FILE, *directory.glob(f"{VERSIONS}/[0-9]*/{MANIFEST_FILE}")]
    return any(file.is_file() and _is_manifest(file) for file in manifests)


def verify(version):
    """Returns a line for every file of a version that is missing, cut or changed: all bytes are read."""
    lines = []
    for entries in version.manifest["files"].values():
        for entry in entries:
            path = version.directory / entry["name"]
            if not path.is_file():
                lines.append(f"{path} is missing")
            elif file_facts(path) != {key: entry[key] for key in ("sha256", "bytes")}:
                lines.append(f"{path} is not what the manifest says: it was cut, changed or damaged")
    return lines


def compare(old, new):
    """Returns lines on what differs between two Versions: settings, steps, and what each step left."""
    lines = differences(_by_name(old.manifest["settings"]), _by_name(new.manifest["settings"]))
    before = {entry["step"]: entry for entry in old.manifest["funnel"]}
    after = {entry["step"]: entry for entry in new.manifest["funnel"]}
    for step in dict.fromkeys([*before, *after]):
        a, b = (tree.get(step, {}).get("documents") for tree in (before, after))
        if a != b:
            lines.append(f"after {step}: {_number(a)} -> {_number(b)} documents")
    a, b = ({source["name"]: source for source in version.manifest["sources"]} for version in (old, new))
    for name in dict.fromkeys([*a, *b]):
        counts = [tree.get(name, {}).get("files") for tree in (a, b)]
        if a.get(name, {}).get("content") != b.get(name, {}).get("content"):
            lines.append(f"source {name}: {_number(counts[0])} -> {_number(counts[1])} files, other content")
    return lines


def note_needs(objects, version, names):
    """Notes what of the cache a version was made from: `collect_garbage` keeps it for the next preparation."""
    objects.write_json(f"{_NEEDS}/{version.directory.name}.json", sorted(names))


def collect_garbage(directory, keep, *, drop_cache=False):
    """Removes all versions but the newest `keep`, and results of tasks that none of these was made from; returns what went.

    drop_cache: remove the results that the kept ones were made from, too, and with them all text as it was read; the next
    preparation then starts over. Nobody may be preparing the dataset meanwhile.
    """
    directory, removed = pathlib.Path(directory), []
    versions = list_versions(directory)
    for version in versions[:-keep]:
        shutil.rmtree(version.directory)
        removed.append(str(version.directory))
    linked = {(s.st_dev, s.st_ino) for v in versions[-keep:] for f in v.directory.iterdir() for s in [f.stat()]}
    objects = Objects(directory / "cache")
    needs = [] if drop_cache else [f"{_NEEDS}/{version.directory.name}.json" for version in versions[-keep:]]
    needed = {*needs, *(name for file in needs if objects.has(file) for name in objects.read_json(file))}
    for file in sorted(objects.root.rglob("*")):
        if file.is_file():
            status = file.stat()
            if (status.st_dev, status.st_ino) not in linked and file.relative_to(objects.root).as_posix() not in needed:
                file.unlink()
                removed.append(str(file))
    return removed


def format_versions(versions):
    """Returns a table of Versions: number, documents, text, removed, steps."""
    lines = [f"{'version':>7} {'documents':>12} {'text, MB':>10} {'removed':>12}  steps"]
    for version in versions:
        first, last = version.manifest["funnel"][0], version.manifest["funnel"][-1]
        steps = " ".join(step["name"] for step in version.manifest["steps"])
        removed = first["documents"] - last["documents"]
        lines.append(
            f"{version.directory.name:>7} {last['documents']:>12,} {last['utf8_bytes'] / 1e6:>10,.1f} {removed:>12,}  {steps}"
        )
    return "\n".join(lines)


def format_place(found):
    """Returns what `lookup` found of one document, for people."""
    fate = "kept" if found["kept"] else f"removed by {found['step']}: {found['reason']}"
    lines = [
        found["key"],
        f"  {fate}; {found['in']}",
        f"  read from {found['file']['path']} (sha256 {found['file']['sha256']})",
    ]
    if found["metadata"]:
        lines.append(f"  {json.dumps(found['metadata'], ensure_ascii=False, sort_keys=True)}")
    if found["origin"]:
        lines += [f"  {line}" for line in format_place(found["origin"]).splitlines()]
    elif found["file"]["path"].startswith(DATASET):
        lines.append("  that dataset is no longer there, or no longer knows the document")
    return "\n".join(lines)


def lookup(version, *, key=None, text=None, most=10):
    """Yields dicts that say where a document, or a piece of text, came from: key, source, file with its hash, fate, origin.

    key: a document's key, which the version's index knows. text: any piece of text; all documents that hold it, kept or
    removed, and those that it was cut out of, are found by reading them. origin: for a document of another clean dataset the
    same of it there, if that is still there, else None.
    """
    rows = version.iterate("inputs")
    files = {(row["source"], row["key"]): {"path": row["path"], "sha256": row["sha256"]} for row in rows}
    found = 0
    for kind in KINDS if key is None else INDEXES:
        for file in _files_with(version, kind, key):
            for record in _matches(version, kind, file, key, text):
                place = f"{version.directory / file['name']}, row {record.pop('row')}"
                origin = files[record["source"], record.pop("file")]
                yield record | {"in": place, "file": origin, "origin": _origin(record, origin)}
                found += 1
                if found == most:
                    return


def _by_name(settings):
    """Returns settings whose lists of groups are told apart by name, not by place."""
    steps = {step["label"] or step["step"]: step for step in settings["steps"]}
    return settings | {"steps": steps, "sources": {source["path"]: source for source in settings["sources"]}}


def _files_with(version, kind, key):
    """Returns the files of a kind that may hold a key; all of them when none is asked for."""
    files = version.manifest["files"][kind]
    if key is None:
        return files
    found = []
    for file, index in zip(files, version.manifest["files"][INDEXES[kind]], strict=True):
        path = version.directory / index["name"]
        if not path.is_file() or file_facts(path)["sha256"] != index["sha256"]:
            raise DataError(f"{path} is not what its manifest says: it was cut, changed or damaged; prepare the dataset again.")
        if rows_of_key(path, key):
            found.append(file)
    return found


def _matches(version, kind, file, key, text):
    """Yields what one file says of a key, or of documents with a piece of text: a cut is a text of its own."""
    import pyarrow.compute as compute

    more = {"documents": ("source", "text", "metadata"), "removed": ("source", "text", "metadata", "step", "reason")}
    table = version.read(file, ["key", "file", *more.get(kind, ("step", "removed"))])
    if kind == "cut":
        table = table.rename_columns(["key", "file", "step", "text"])
    mask = compute.equal(table["key"], key) if key is not None else compute.match_substring(table["text"], text)
    rows = np.flatnonzero(mask.to_numpy(zero_copy_only=False))
    cut = {"source": file["source"], "reason": "cut out of the text"} if kind == "cut" else {}
    for row, record in zip(rows, table.take(rows).to_pylist() if len(rows) else (), strict=True):
        metadata = json.loads(record.get("metadata", "{}"))
        yield record | cut | {"row": int(row), "metadata": metadata, "kept": kind == "documents"}


def _origin(record, file):
    """Returns the place of a document in the clean dataset that it was read from; None where there is none, or no longer."""
    if not file["path"].startswith(DATASET):
        return None
    path = pathlib.Path(file["path"].removeprefix(DATASET))
    if not (path.parent / MANIFEST_FILE).is_file():
        return None
    version = open_dataset(path.parent)
    if file["sha256"] not in (entry["sha256"] for entry in version.manifest["files"]["documents"]):
        return None
    there = record["key"].removeprefix(f"{record['source']}/")
    # A copy that was made while it was read has its original there, by the key before the last #.
    keys = [there, there.rpartition("#")[0]]
    return next((place for key in keys for place in lookup(version, key=key, most=1) if key), None)


def _mend(version, objects, files):
    """Puts the files of the cache, which are whole, in the place of those of a version that are not."""
    for entries in files.values():
        for name, entry in entries:
            source, target = objects.path(name), version.directory / entry["name"]
            if target.is_file():
                if target.samefile(source) or file_facts(target) == objects.facts(name):
                    continue
                target.unlink()
            _link(source, target)


def _write(directory, objects, number, manifest, files):
    folder = directory / VERSIONS / f"{number:04d}"
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for entries in files.values():
            for name, entry in entries:
                _link(objects.path(name), temporary / entry["name"])
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", "utf-8")
        temporary.rename(folder)
    except OSError as error:
        raise DataError(f"{folder} could not be written ({error.strerror}): make room, or name another --workdir.") from error
    return Version(folder, manifest)


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _sources(config, inputs):
    described = []
    for name, source in zip(inputs["names"], config.sources, strict=True):
        rows = [row for row in inputs["files"] if row[0] == name]
        facts = {"files": len(rows), "bytes": sum(row[3] for row in rows), "content": fingerprint([row[1::3] for row in rows])}
        described.append({"name": name, "path": source.path, "licence": source.licence} | facts)
    return described


def _is_manifest(file):
    try:
        return json.loads(file.read_text("utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def _read_manifest(file):
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} can't be read ({error}): remove {file.parent} and prepare the dataset again.") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise DataError(f"{file} is no manifest of a clean dataset: remove {file.parent} and prepare it again.")
    if manifest.get("format") != FORMAT:
        found = f"format {manifest.get('format')!r}, not {FORMAT} of this release"
        raise DataError(f"{file} is of {found}: remove {file.parent} and prepare the dataset again.")
    return manifest


def _number(value):
    return "none" if value is None else f"{value:,}"
