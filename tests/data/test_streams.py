"""The bytes of files: every frame of a compressed one, damage in each of them, and streams of file systems far away."""

import bz2
import gzip
import hashlib
import json
import lzma
import random
import tracemalloc
import zipfile

import fsspec
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from llmos_jax.config import parse
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.data.files import list_path
from llmos_jax.errors import ConfigError
from tests.data.test_readers import read

COMPRESS = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}  # fmt: skip
PARTS = [b"".join(json.dumps({"text": f"document {p}-{n}"}).encode() + b"\n" for n in range(50)) for p in range(4)]
TEXTS = [json.loads(line)["text"] for part in PARTS for line in part.splitlines()]


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_frame_of_a_file_is_read_and_damage_in_any_is_named(ending, tmp_path):
    frames = [COMPRESS[ending](part) for part in PARTS]
    path, random_numbers = tmp_path / f"a.jsonl{ending}", random.Random(0)
    path.write_bytes(b"".join(frames))
    documents, bad = read(path)
    assert not bad and [text for _, text, _ in documents] == TEXTS
    for _ in range(60):
        damaged = bytearray(frames[1])
        damaged[random_numbers.randrange(len(damaged))] ^= 1 << random_numbers.randrange(8)
        path.write_bytes(frames[0] + damaged + frames[2] + frames[3])
        documents, bad = read(path)
        assert bad and all(str(path) in message for message in bad) or [text for _, text, _ in documents] == TEXTS
        assert [text for _, text, _ in documents[:50]] == TEXTS[:50]
    for between in (b"garbage", frames[1][:-5], frames[1][:3]):
        path.write_bytes(frames[0] + between + frames[2])
        documents, bad = read(path)
        assert len(bad) == 1 and f"{path} is damaged near line" in bad[0] and len(documents) >= 50
        path.write_bytes(frames[0] + between)
        assert len(read(path)[1]) == 1
    path.write_bytes(frames[0] + b"\0" * 8 + b"".join(frames[1:]) + b"\0" * 512)  # xz calls it padding
    documents, bad = read(path)
    assert not bad and [text for _, text, _ in documents] == TEXTS


def test_a_damaged_block_of_bzip2_gives_no_text(tmp_path):
    """A block's checksum is compared behind it; much of its text is right, the rest is of other words."""
    numbers = random.Random(1)
    words = [f"{word}{numbers.randrange(999)}" for word in ("alpha", "beta", "river", "stone") for _ in range(50)]
    texts = [" ".join(numbers.choices(words, k=40)) for _ in range(3000)]
    frames = [bz2.compress("".join(json.dumps({"text": text}) + "\n" for text in part).encode())
              for part in (texts[:1000], texts[1000:2000], texts[2000:])]  # fmt: skip
    path = tmp_path / "a.jsonl.bz2"
    for place in (9000, 30000):
        damaged = bytearray(frames[1])
        damaged[place] ^= 4
        path.write_bytes(frames[0] + damaged + frames[2])
        documents, bad = read(path)
        assert [text for _, text, _ in documents] == texts[:1000]
        assert len(bad) == 1 and f"{path} is damaged near line 1001" in bad[0]


@pytest.mark.parametrize("ending", [".bz2", ".xz", ".zst"])
def test_little_that_holds_much_is_not_held_at_once(ending, tmp_path, monkeypatch):
    monkeypatch.setattr("llmos_jax.data.files._MOST_AT_ONCE", 1 << 20)
    monkeypatch.setattr("llmos_jax.data.files._ZSTD_CHUNK", 1 << 5)  # eight blocks, a megabyte
    path, long = tmp_path / f"a.jsonl{ending}", b" " * (30 << 20)
    path.write_bytes(COMPRESS[ending](long + b'\n{"text": "a"}\n') + COMPRESS[ending](b'{"text": "b"}\n'))
    tracemalloc.start()
    documents, bad = read(path, limit=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [text for _, text, _ in documents] == ["a", "b"] and len(bad) == 1 and "line 1 is longer" in bad[0]
    assert peak < 20 << 20  # 8 MB of them the window of xz


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_without_content_are_named(ending, tmp_path):
    path = tmp_path / f"a.jsonl{ending}"
    for content, fault in (
        (b"", "is empty."),
        (COMPRESS[ending](b"") * 2 + b"\0" * 8, "is empty once it is decompressed."),
        (b"\0" * 100_000, "is damaged near line 1: the file holds zeros and no compressed frame."),
    ):
        path.write_bytes(content)
        assert read(path) == ([], [f"{path} {fault}"])


class Far(MemoryFileSystem):
    """Files whose streams are as those of s3, gcs and http: their readline takes no size; facts are kept until told not to be.

    facts: what is known of every file but its size.
    """

    protocol, store, pseudo_dirs, facts, listings = ("far",), {}, [""], {}, {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("far://"))

    def _open(self, path, mode="rb", **choices):
        if mode != "rb":
            return super()._open(path, mode, **choices)
        return FarStream(self, path, mode, size=super().info(path)["size"])

    def info(self, path, **choices):
        path = self._strip_protocol(path)
        if path not in self.listings:
            info = super().info(path, **choices)
            self.listings[path] = {name: info[name] for name in ("name", "size", "type")} | self.facts
        return self.listings[path]

    def invalidate_cache(self, path=None):
        self.listings.clear()


class FarStream(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return self.fs.store[self.path].getvalue()[start:end]


@pytest.mark.parametrize("ending", ["", *COMPRESS])
def test_every_format_is_read_from_far_away(ending, tmp_path):
    fsspec.register_implementation("far", Far, clobber=True)
    from tests.data.test_web import OK, page, record

    rows = [{"text": f"text {number} ü " + "word " * 2000, "id": number} for number in range(50)]
    head = record(OK, page(0))
    contents = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "b.json": json.dumps(rows, indent=1).encode(),
        "c.csv": ("id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in rows)).encode(),
        "d.txt": b"plain text " * 10_000,
        "e.html": page(1),
        "f.warc": head + record(OK, page(2)),
        "g.jsonl": json.dumps({"text": "Größe und Übermut, schön natürlich"}, ensure_ascii=False).encode("latin-1"),
    }
    system = fsspec.filesystem("far")
    for name, content in contents.items():
        content = COMPRESS[ending](content) if ending else content
        (tmp_path / f"{name}{ending}").write_bytes(content)
        system.pipe(f"/{tmp_path.name}{ending}/{name}{ending}", content)
    for limit in (None, 1 << 20):
        far, bad = read(f"far://{tmp_path.name}{ending}", limit, repair=True)
        near, _ = read(tmp_path, limit, repair=True)
        assert not bad and far == near and len(far) == 3 * 50 + 5


def test_tables_are_read_from_far_away(tmp_path):
    """They seek: to their ends first."""
    import pyarrow
    import pyarrow.parquet

    fsspec.register_implementation("far", Far, clobber=True)
    table = pyarrow.table({"text": [f"text {number} " + "word " * 200 for number in range(3000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    with pyarrow.ipc.new_stream(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    for file in tmp_path.iterdir():
        fsspec.filesystem("far").pipe(f"/tables-{tmp_path.name}/{file.name}", file.read_bytes())
    far, bad = read(f"far://tables-{tmp_path.name}")
    assert not bad and far == read(tmp_path)[0] and len(far) == 9000


@pytest.mark.parametrize(
    "name", ["ETag", "etag", "Last-Modified", "LastModified", "Content-MD5", "Digest", "version_id", "sha"]
)
def test_a_changed_file_far_away_is_read_again(name, tmp_path, monkeypatch):
    fsspec.register_implementation("far", Far, clobber=True)
    system, url = fsspec.filesystem("far"), f"far://changed-{tmp_path.name}/a.jsonl"
    config = parse(PrepareConfig, {"sources": [{"path": url}], "steps": [], "workers": 1})
    for number, text in enumerate(("one", "two")):
        monkeypatch.setattr(Far, "facts", {name: f"of {number}", "atime": str(random.random())})
        system.pipe_file(f"/changed-{tmp_path.name}/a.jsonl", b'{"text": "%s"}\n' % text.encode())
        assert [row["text"] for row in prepare_dataset(config, tmp_path, log=list).iterate()] == [text]
    before = list_path(url)[0]
    monkeypatch.setattr(Far, "facts", {name: "of 1", "atime": "later"})
    assert before.is_unchanged() and list_path(url) == [before]
    monkeypatch.setattr(Far, "facts", {name: "of 2"})
    assert not before.is_unchanged()


class Bucket(Far):
    """Tells other facts of a file in a listing than of it alone, as S3 does; a listing that is kept answers for its files."""

    protocol, store, pseudo_dirs, listings, opened = ("bucket",), {}, [""], {}, []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("bucket://"))

    def _facts(self, path):
        info = MemoryFileSystem.info(self, path)
        content = self.store[path].getvalue() if path in self.store else b""
        return {name: info[name] for name in ("name", "size", "type")} | {"ETag": hashlib.md5(content).hexdigest()}

    def info(self, path, **choices):
        path = self._strip_protocol(path)
        return self.listings.get(path) or self._facts(path) | {"VersionId": None, "version": "of its own"}

    def find(self, path, detail=False, **choices):
        paths = super().find(path)
        self.listings.update({path: self._facts(path) for path in paths})
        return {path: self.listings[path] for path in paths} if detail else paths

    def _open(self, path, mode="rb", **choices):
        if mode == "rb":
            self.opened.append(path)
        return super()._open(path, mode, **choices)


@pytest.mark.parametrize("has_threads", [False, True])
def test_files_whose_listing_tells_other_facts_are_read_once(has_threads, tmp_path, monkeypatch):
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "async_impl", has_threads)
    system, folder = fsspec.filesystem("bucket"), f"once-{tmp_path.name}"
    config = parse(PrepareConfig, {"sources": [{"path": f"bucket://{folder}"}], "steps": [], "workers": 1})
    paths = [f"/{folder}/{name}.jsonl" for name in "abc"]
    for path in paths:
        system.pipe_file(path, b'{"text": "one"}\n')

    def prepared():
        Bucket.opened.clear()
        texts = [row["text"] for row in prepare_dataset(config, tmp_path / "out", log=list).iterate()]
        return texts, sorted(Bucket.opened)

    texts, opened = prepared()
    assert texts == ["one"] * 3 and opened == sorted(2 * paths)  # once to be hashed, once to be read
    assert prepared() == (texts, [])
    system.pipe_file(paths[1], b'{"text": "two"}\n')
    texts, opened = prepared()
    assert texts == ["one", "two", "one"] and opened.count(paths[1]) == 2


@pytest.mark.parametrize("url", ["memory://told", "far://told"])
def test_listed_files_are_unchanged_until_they_change(url, tmp_path):
    fsspec.register_implementation("far", Far, clobber=True)
    system, url = fsspec.filesystem(url.partition(":")[0]), f"{url}-{tmp_path.name}"
    system.pipe({f"{url}/{name}.txt": b"one" for name in "ab"})
    files = list_path(url)
    assert [file.is_unchanged() for file in files] == [True, True] and list_path(url) == files
    system.pipe_file(f"{url}/a.txt", b"other")
    system.rm_file(system._strip_protocol(f"{url}/b.txt"))
    assert [file.is_unchanged() for file in files] == [False, False]


def test_a_file_that_went_while_its_folder_was_listed_is_named(tmp_path, monkeypatch):
    fsspec.register_implementation("far", Far, clobber=True)
    root = f"/gone-{tmp_path.name}"
    fsspec.filesystem("far").pipe(f"{root}/a.txt", b"text")
    monkeypatch.setattr(Far, "find", lambda system, path: [f"{root}/a.txt", f"{root}/b.txt"])
    gone = list_path(f"far:/{root}")[1]
    assert not gone.is_unchanged() and gone.content_hash().startswith("unreadable")
    documents, bad = read(f"far:/{root}")
    assert [text for _, text, _ in documents] == ["text"] and len(bad) == 1 and "b.txt" in bad[0]


def test_layers_that_keep_copies_are_passed_over(tmp_path):
    """What they hold of a file that has changed since would be read for it."""
    for text in ("one", "two"):
        (tmp_path / "a.txt").write_text(text)
        for url in (f"simplecache::file://{tmp_path}", f"filecache::simplecache::file://{tmp_path}/a.txt"):
            assert read(url) == ([("a.txt", text, {})], [])
    with pytest.raises(ConfigError, match="file:///nowhere' does not exist"):
        list_path("simplecache::file:///nowhere")


def test_files_of_a_page_of_links_have_their_sizes_asked_for(tmp_path, monkeypatch):
    fsspec.register_implementation("far", Far, clobber=True)
    fsspec.filesystem("far").pipe(f"/links-{tmp_path.name}/a.txt", b"text")
    monkeypatch.setattr(Far, "find", lambda system, path: [f"{path}/a.txt"])
    assert [file.size_bytes for file in list_path(f"far://links-{tmp_path.name}")] == [4]
    monkeypatch.setattr(Far, "facts", {"size": None})  # nor does the server tell
    assert read(f"far://links-{tmp_path.name}") == ([("a.txt", "text", {})], [])


def test_chained_urls_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"text": "a"}')
    with pytest.raises(ConfigError, match="chained URLs are not read; unpack"):
        list_path(f"zip://a.jsonl::{tmp_path}/z.zip")
