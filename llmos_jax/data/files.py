"""Files of a source, here or behind a URL that fsspec knows, compressed or not; damage and early ends are errors."""

import bz2
import concurrent.futures
import dataclasses
import difflib
import hashlib
import io
import json
import lzma
import os
import pathlib
import stat
import zlib

from llmos_jax.config import fingerprint
from llmos_jax.errors import ConfigError, DataError

TFDS, DATASET = "tfds:", "dataset:"  # what stands before a path that is more than a file
# Bytes of compressed content that are taken at once, all of which give nothing where they are damaged; and of content.
_CHUNK, _BUFFER = 1 << 14, 1 << 16
# Of zstandard's, whose decoder gives all at once: four bytes can stand for a block of 128 kB, these for 64 MiB.
_ZSTD_CHUNK = 1 << 11
# Bytes of content that a decoder of bzip2 or xz gives at once. A block of bzip2 has 46 MB at most, its checksum behind it.
_MOST_AT_ONCE = 1 << 26
# What file systems far away call that which changes with a file's content, without marks between words.
_STAMPS = {
    "blobid", "checksum", "contenthash", "contentmd5", "crc", "crc32c", "created", "digest", "etag", "generation",
    "lastmodified", "md5hash", "modificationtime", "modified", "modify", "mtime", "oid", "sha", "sha256", "updated", "version",
    "versionid",
}  # fmt: skip
_NO_MARKS = str.maketrans("", "", "-_ ")
# Layers of an fsspec URL that keep copies of what lies behind them, without asking whether that has changed.
_CACHES = ("simplecache", "filecache", "blockcache", "cached")
# Questions for the facts of one file that are asked at once.
_QUESTIONS = 32
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What a path can be beside a file, a folder and a link to nothing.
_ODDITIES = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
# What Hugging Face's `save_to_disk` lays beside its .arrow files.
_BESIDE_ARROW = ("dataset_info.json", "state.json", "dataset_dict.json")
# All that decompression and reading raise on damage.
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    path: local path or URL. key: path below the source's root, with which the keys of its documents begin.
    size_bytes: as it lies there. stamp: changes whenever the content may have changed.
    """

    path: str
    key: str
    size_bytes: int
    stamp: str

    def __str__(self):
        return printable(self.path)

    @property
    def stem(self):
        """The lower-case name without the ending of its compression."""
        name = self.path.rsplit("/", 1)[-1].lower()
        return next((name.removesuffix(ending) for ending in _COMPRESSED if name.endswith(ending)), name)

    @property
    def location(self):
        """Path or URL of the bytes; those of a clean dataset are looked after by that."""
        return self.path.removeprefix(TFDS)

    def open_raw(self):
        """Returns a buffered binary stream of the bytes as they lie there."""
        if not is_remote(self.location):
            return open(self.location, "rb")
        # The streams of most of fsspec's file systems can't read at most so much of a line.
        return io.BufferedReader(_file_system(self.location)[0].open(self.location), _BUFFER)

    def open(self):
        """Returns a binary stream of the decompressed content; damage shows as one of `DAMAGE` while it is read."""
        decoder = _decoder(self.path)
        return io.BufferedReader(_Frames(self.open_raw(), *decoder), _BUFFER) if decoder else self.open_raw()

    def is_unchanged(self):
        """Whether the file still is what it was when it was listed, as far as its size and its stamp tell."""
        if self.path.startswith(DATASET):
            return True
        try:
            now = self._facts_now()
        except (OSError, ConfigError):
            return False
        return now == (self.size_bytes, self.stamp)

    def _facts_now(self):
        if not is_remote(self.location):
            return _local_facts(self.location)
        system, path = _file_system(self.location)
        system.invalidate_cache()
        return _remote_facts(system, path)

    def content_hash(self):
        """Returns the SHA-256 of the bytes as they lie there, 64 hex digits, or a word on why they can't be read.

        Clean datasets have it in their own records already.
        """
        if self.path.startswith(DATASET):
            return self.stamp
        try:
            with self.open_raw() as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return f"unreadable {error.errno}"


class _Frames(io.RawIOBase):
    """A compressed file of any number of frames (members, streams), whose damage and early end are errors.

    Bytes come out of one frame at a time, and of a short one after its checksum was compared, as they do of a block of bzip2:
    what is wrong with a frame shows when it is read, not later. (The libraries' own readers end quietly, or read on before they
    compare.)
    """

    def __init__(self, raw, new_decoder, error, chunk):
        self._raw, self._new_decoder, self._error, self._chunk = raw, new_decoder, error, chunk
        self._decoder, self._rest, self._ready = None, b"", memoryview(b"")
        self._has_zeros = self._has_frames = False

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._ready:
            if getattr(self._decoder, "needs_input", True):
                data = self._rest or self._raw.read(self._chunk)
                if not data:
                    if self._decoder is not None:
                        raise EOFError("the file ends inside a compressed frame")
                    if self._has_zeros and not self._has_frames:
                        raise EOFError("the file holds zeros and no compressed frame")
                    return 0
            else:
                data = b""  # it has more than it gives at once
            if self._decoder is None and not (data := data.lstrip(b"\0")):  # what tapes are filled up with
                self._rest, self._has_zeros = b"", True
                continue
            self._has_frames = True
            self._decoder = self._decoder or self._new_decoder()
            try:
                self._ready = memoryview(self._decoder.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from None
            self._rest = self._decoder.unused_data if self._decoder.eof else b""
            if self._decoder.eof:
                self._decoder = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self):
        self._raw.close()
        super().close()


class _AtMost:
    """A decoder of bzip2 or xz that gives so much at once: their frames may hold a million times their size."""

    def __init__(self, decoder):
        self._decoder = decoder

    def decompress(self, data):
        return self._decoder.decompress(data, _MOST_AT_ONCE)

    def __getattr__(self, name):
        return getattr(self._decoder, name)


def _decoder(path):
    """Returns (maker of a decoder of a frame, what that raises on damage, bytes it is given at once), none for plain files."""
    ending = next((ending for ending in _COMPRESSED if path.lower().endswith(ending)), None)
    if ending == ".gz":
        return lambda: zlib.decompressobj(16 + zlib.MAX_WBITS), zlib.error, _CHUNK
    if ending == ".bz2":
        return lambda: _AtMost(bz2.BZ2Decompressor()), OSError, _CHUNK
    if ending == ".xz":
        return lambda: _AtMost(lzma.LZMADecompressor(lzma.FORMAT_XZ)), lzma.LZMAError, _CHUNK
    if ending is None:
        return None
    try:
        import zstandard
    except ImportError:
        raise missing_extra("zstandard", path) from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError, _ZSTD_CHUNK


def empty(file):
    """Returns the DataError for a SourceFile without content."""
    return DataError(f"{file} is empty{' once it is decompressed' if file.size_bytes and _decoder(file.path) else ''}.")


def is_remote(path):
    """Whether a path is a URL (`gs://...`, `s3://...`, `memory://...`), read through fsspec."""
    return "://" in path


def list_path(path):
    """Returns the SourceFiles of a file, of all files below a folder, or of a URL of either, in a fixed order.

    Links to folders are followed; no folder is listed twice. Hidden files are passed over, and so are those of a Hugging Face
    dataset folder that are none of the dataset's. ConfigError names what does not exist, DataError a folder without files.
    """
    files = _list_remote(path) if is_remote(path) else _list_local(path)
    if not files:
        raise DataError(f"data source {path} is an empty folder.")
    return _without_beside_arrow(files)


def _without_beside_arrow(files):
    """Returns SourceFiles without what Hugging Face's `datasets` lays beside its .arrow files: its facts, and its caches."""
    arrow = {_parent(file.key) for file in files if file.path.endswith(".arrow")}
    if not arrow:
        return files
    states = {_parent(file.key): file for file in files if _name(file.key) == "state.json" and _parent(file.key) in arrow}
    listed = {folder: _listed_in(state) for folder, state in states.items()}
    missing = {(folder, name) for folder, names in listed.items() for name in names or ()}
    kept = []
    for file in files:
        folder, name = _parent(file.key), _name(file.key)
        names = listed.get(folder)
        missing.discard((folder, name))
        is_foreign = name.endswith(".arrow") and (name.startswith("cache-") if names is None else name not in names)
        is_fact = (folder in arrow and name in _BESIDE_ARROW) or file.key == "dataset_dict.json"
        if not (is_foreign or is_fact):
            kept.append(file)
    for folder, name in sorted(missing):
        raise DataError(f"{states[folder]} lists {name}, which is not there: the dataset is not whole.")
    return kept


def _listed_in(state):
    """Returns the names of the data files that a dataset's state.json lists, none when it lists nothing."""
    try:
        with state.open_raw() as stream:
            entries = json.loads(stream.read()).get("_data_files")
        return {entry["filename"] for entry in entries} if entries else None
    except OSError as error:
        raise DataError(f"{state} can't be read: {error.strerror or error}.") from None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{state} is damaged: {error}.") from None


def printable(name):
    """Returns a path or name as UTF-8 has it: bytes of it that are none, as Linux allows, become escapes such as \\xe9."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def list_local(files, root):
    """Returns the SourceFiles of paths below `root`."""
    listed = []
    for file, key in zip(files, _keys([file.relative_to(root).as_posix() for file in files]), strict=True):
        listed.append(SourceFile(str(file), key, *_local_facts(file)))
    return listed


def _local_facts(path):
    """Returns (size in bytes, stamp) of a file here."""
    status = os.stat(path) if os.path.exists(path) else os.lstat(path)  # of a link to nothing: reading names it
    # The time of the last change of the inode tells of new content under an old time of modification.
    return status.st_size, f"{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_mode:o}"


def _keys(names):
    """Returns the printable form of each name, as keys go into files; what is another one's already gets a tilde."""
    shown = [printable(name) for name in names]
    taken = {key for key, name in zip(shown, names, strict=True) if key == name}
    keys = []
    for key, name in zip(shown, names, strict=True):
        if key != name:
            while key in taken:
                key += "~"
            taken.add(key)
        keys.append(key)
    return keys


def missing_extra(module, what):
    """Returns the ConfigError for a library that `what` needs and that is not installed."""
    return ConfigError(f"{what} needs {module}: pip install 'llmos-jax[data]'.")


def _list_local(text):
    path = pathlib.Path(text).expanduser()
    if path.is_file():
        return list_local([path], path.parent)
    if path.is_dir():
        return list_local(sorted(_walk(path)), path)
    if os.path.lexists(path):
        raise ConfigError(f"data source {text!r} is {_oddity(path)}: name a file or a folder.")
    parent = path.parent if path.parent.is_dir() else pathlib.Path(".")
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    hint = f"; did you mean {parent / near[0]}?" if near else ""
    raise ConfigError(f"data source {text!r} does not exist{hint}")


def _oddity(path):
    """Returns what a path is that is there and neither a file nor a folder."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"a symbolic link to {printable(os.readlink(path))}, which can't be followed ({error.strerror})"
    return next((name for is_kind, name in _ODDITIES if is_kind(mode)), "neither a file nor a folder")


def _walk(root):
    """Yields all files below a folder, and links to nothing and folders that can't be listed, which reading names.

    Folders behind links come after all others: a link to one of those, or to what holds it, adds nothing. Pipes, sockets and
    devices, and links to them, are passed over: reading them may never end.
    """
    folders, links, seen = [root], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(folder.iterdir())
        except OSError:
            yield folder
            continue
        for entry in entries:
            if _is_hidden([entry.name]):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry)
            elif entry.is_file() or (entry.is_symlink() and not entry.exists()):
                yield entry


def _list_remote(url):
    while url.partition("::")[0] in _CACHES:
        url = url.partition("::")[2]  # a copy of what has changed since is not what is asked for
    if "::" in url:
        raise ConfigError(f"data source {url!r}: chained URLs are not read; unpack what lies inside, and name that.")
    system, root = _file_system(url)
    system.invalidate_cache()  # of listings: what changed since then has to be seen
    if not system.exists(root):
        raise ConfigError(f"data source {url!r} does not exist.")
    is_file = system.isfile(root)
    base = _parent(root) if is_file else root.rstrip("/")
    keys = {path: printable(path.removeprefix(base).lstrip("/")) for path in ([root] if is_file else sorted(system.find(root)))}
    keys = {path: key for path, key in keys.items() if not _is_hidden(key.split("/"))}
    system.invalidate_cache()  # else the listing answers for its files
    if system.async_impl:  # others need not bear threads
        with concurrent.futures.ThreadPoolExecutor(_QUESTIONS) as threads:
            facts = list(threads.map(lambda path: _remote_facts(system, path, True), keys))
    else:
        facts = [_remote_facts(system, path, True) for path in keys]
    return [SourceFile(system.unstrip_protocol(path), keys[path], *of) for path, of in zip(keys, facts, strict=True)]


def _remote_facts(system, path, is_listed=False):
    """Returns (size in bytes, stamp) of a file far away; of a listed one that can't be asked for, what no file has.

    Each file is asked for by itself, whoever asks: listings tell other facts of it (of S3: no version; on a page: no size).
    """
    try:
        info = system.info(path)
    except OSError:
        if not is_listed:
            raise
        return 0, ""  # reading names it
    told = {name: str(value) for name, value in info.items() if value is not None}
    stamp = fingerprint({name: value for name, value in told.items() if name.lower().translate(_NO_MARKS) in _STAMPS})
    return int(info.get("size") or 0), stamp


def _file_system(url):
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"data source {url!r} can't be reached: {error}") from None


def _parent(path):
    return path.rpartition("/")[0]


def _name(path):
    return path.rpartition("/")[2]


def _is_hidden(parts):
    return any(part.startswith(".") for part in map(os.fsdecode, parts))
