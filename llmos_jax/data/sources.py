"""Documents from where text lies: the standard library, files and folders of any format, URLs, TFDS datasets."""

import dataclasses
import hashlib
import os
import pathlib
import re
import sysconfig

from llmos_jax.config import setting
from llmos_jax.data.clean.dataset import is_dataset, open_dataset
from llmos_jax.data.fields import PassedOver
from llmos_jax.data.files import DATASET, TFDS, SourceFile, list_local, list_path, printable
from llmos_jax.data.readers import FORMATS, format_of, read_file
from llmos_jax.data.tfds_files import list_tfds
from llmos_jax.errors import ConfigError, DataError

# Lines on files that were left out that are kept; all are counted.
_MOST_LINES = 100_000


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of text."""

    path: str = setting(
        "stdlib",
        help="stdlib[:PACKAGE], a file, folder or fsspec URL (text, jsonl, JSON, csv, parquet, arrow, HTML, WARC), "
        "tfds:NAME[#SPLIT], a clean dataset (FOLDER, or FOLDER#SOURCE for one of its sources), or prepared records",
    )
    weight: float = setting(1.0, help="share of the records of a mixture, relative to the others", above=0.0)
    max_epochs: float | None = setting(None, help="how often training goes through it at most; none: no limit", above=0.0)
    text_key: str = setting("text", help="field that holds the text in jsonl, csv, parquet, arrow and TFDS")
    format: str = setting("auto", help="how files are read; auto: by their names", choices=FORMATS)
    repair: bool = setting(False, help="whether other encodings than UTF-8 are guessed and mojibake is put right")
    main_content: bool = setting(True, help="whether menus, footers and the like are left out of HTML pages")
    licence: str = setting("", help="licence of the source, kept with its documents")

    def __post_init__(self):
        if not self.path:
            raise ConfigError("the path of a source is empty: name a file, a folder or another source.")
        if printable(self.path) != self.path:  # settings go into files
            raise ConfigError(f"the path of a source, {printable(self.path)}, is not UTF-8: rename it, or name what holds it.")


def split_paths(text):
    """Returns the parts of `PATH+PATH`; a plus of a path has a backslash before it. ConfigError on a part that is empty."""
    parts = [part.replace("\\+", "+") for part in re.split(r"(?<!\\)\+", text)]
    if not all(parts):
        raise ConfigError(f"{text} has an empty part: a plus stands between paths. One that is part of a path is \\+.")
    return parts


def parse_sources(text):
    """Returns the settings of a mixture written as one word, `PATH[@WEIGHT]+PATH[@WEIGHT]`, a list of dicts.

    Raises ConfigError as `split_paths` does, and on a weight that is no number.
    """
    sources = []
    for item in split_paths(text):
        path, _, weight = item.rpartition("@")
        try:
            sources.append(dict(path=path, weight=float(weight)) if path else dict(path=item))
        except ValueError:
            raise ConfigError(f"data={item}: what follows the last @ is a weight, a number, not {weight!r}.") from None
    return sources


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: its text, a key that names it and decides its split, and what its source says of it."""

    key: str
    text: str
    metadata: dict = dataclasses.field(default_factory=dict)


class LeftOut:
    """The files of a source that were left out: how many, and for each of the first a line that names it and says why."""

    def __init__(self):
        self.count, self.lines = 0, []

    def add(self, line):
        self.count += 1
        if self.count <= _MOST_LINES:
            self.lines.append(line.replace("\n", "\\n"))  # which a file's name may hold

    def text(self):
        """Returns the content of the file that names them."""
        rest = self.count - len(self.lines)
        return "".join(f"{line}\n" for line in self.lines) + (f"... and {rest} more\n" if rest else "")


def list_files(source):
    """Returns the SourceFiles of a source in a fixed order; ConfigError names a path that does not exist."""
    if source.path.startswith(TFDS):
        return list_tfds(source.path)
    folder, _, part = source.path.partition("#")
    if is_dataset(folder):
        return _dataset_files(source, open_dataset(folder), part)
    if not (source.path == "stdlib" or source.path.startswith("stdlib:")):
        return list_path(source.path)
    root = pathlib.Path(sysconfig.get_path("stdlib"), source.path.partition(":")[2])
    skipped = ("site-packages", "__pycache__", "dist-packages")
    files = [f for f in sorted(root.rglob("*.py")) if not any(part in skipped for part in f.relative_to(root).parts)]
    if not files:
        raise ConfigError(f"data source {source.path!r}: Python's standard library has no package of that name.")
    return list_local(files, root)


def is_single_text(source, files):
    """Whether a source is one text file: it is then split by position, not by document."""
    return len(files) == 1 and format_of(files[0], source.format) == "text"


def read_records(source, file, limit=None):
    """Yields the Documents of one file; a DataError in place of each record that is bad, a PassedOver of one without text.

    limit: bytes of the longest record that is read. Raises DataError where the file can't be read any further.
    """
    licence = {"licence": source.licence} if source.licence else {}
    for item in read_file(file, source, limit):
        if not isinstance(item, tuple):
            yield item
        elif not item[1].strip():
            yield PassedOver("blank texts")
        else:
            key = item[0] if file.path.startswith(DATASET) else f"{file.key}{item[0]}"
            yield Document(key, item[1], licence | item[2])


def read_documents(source, files, log=print, left_out=None):
    """Yields the Documents of a source, in a fixed order and one file at a time.

    Documents without any text are passed over. In a folder, files that are empty, binary, unreadable or undecodable are
    counted, named and left out (from the place of the damage on); DataError when nothing is left, when the only file that
    was asked for is bad, or when a file of a clean dataset is. left_out: a LeftOut, which gets all of them.
    """
    left_out, total = left_out or LeftOut(), 0
    for file in files:
        count = 0
        try:
            for item in read_records(source, file):
                if isinstance(item, DataError):
                    raise item
                if isinstance(item, PassedOver):
                    continue
                count += 1
                yield item
        except DataError as error:
            if len(files) == 1 or file.path.startswith(DATASET):
                raise
            left_out.add(f"{error} Its {count} documents before that are used." if count else str(error))
        total += count
    if left_out.count:
        log(f"{source.path}: left out {left_out.count} of {len(files)} files:")
        for line in left_out.lines[:3]:
            log(f"  {line}")
        if left_out.count > 3:
            log(f"  ... and {left_out.count - 3} more")
    if not total:
        raise DataError(f"data source {source.path}: none of its {len(files)} files holds text.")


def content_hash(files):
    """Returns a hash of the bytes of a source's files and of their keys, 64 hex digits."""
    total = hashlib.sha256()
    for file in files:
        total.update(os.fsencode(file.key) + b"\0" + file.content_hash().encode())
    return total.hexdigest()


def _dataset_files(source, version, part):
    """Returns the files of a clean dataset; their documents bring their own keys. `part`: one of its sources, or "" for all."""
    names = [described["name"] for described in version.manifest["sources"]]
    if part and part not in names:
        raise ConfigError(f"data source {source.path!r}: the dataset has no source {part!r}; it has {', '.join(names)}.")
    entries = [entry for entry in version.manifest["files"]["documents"] if part in ("", entry["source"])]
    if not entries:
        raise DataError(f"{source.path} ({version.directory}) holds no document: every one was removed.")
    folder = version.directory
    return [SourceFile(f"{DATASET}{folder / e['name']}", e["name"], e["bytes"], e["sha256"]) for e in entries]
