"""Which files a folder gives: behind links, in the folders of other libraries, and in those that can't be listed."""

import json
import os
import pathlib
import socket

import fsspec
import pyarrow
import pytest

from llmos_jax.config import parse
from llmos_jax.data.clean.pipeline import PrepareConfig, prepare_dataset
from llmos_jax.data.files import list_path
from llmos_jax.data.sources import SourceConfig, parse_sources, split_paths
from llmos_jax.errors import ConfigError, DataError
from tests.data.test_readers import read


def test_links_to_folders_are_followed_once(tmp_path):
    root, far = tmp_path / "in", tmp_path / "far"
    (root / "real" / "deep").mkdir(parents=True)
    (far / "inner").mkdir(parents=True)
    for file in (
        root / "a.txt",
        root / "real" / "b.txt",
        root / "real" / "deep" / "c.txt",
        far / "d.txt",
        far / "inner" / "e.txt",
    ):
        file.write_text(file.name)
    (root / "0").symlink_to(root / "real")  # what is here already
    (root / "books").symlink_to(far)
    (far / "loop").symlink_to(root)
    (far / "inner" / "self").symlink_to(far)
    (root / "one.txt").symlink_to(far / "d.txt")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "f.txt").write_text("hidden")
    keys = [file.key for file in list_path(str(root))]
    assert keys == ["a.txt", "books/d.txt", "books/inner/e.txt", "gone", "one.txt", "real/b.txt", "real/deep/c.txt"]
    documents, bad = read(root)
    assert len(documents) == 6 and len(bad) == 1 and "gone can't be read: No such file" in bad[0]


def test_names_that_are_no_utf8_are_escaped_and_no_two_are_one(tmp_path):
    """Linux allows any bytes; one of the names is what another one's escapes spell."""
    folder = tmp_path / "in"
    folder.mkdir()
    arrow_file = os.fsdecode(b"d\xff.arrow")
    (folder / arrow_file).write_bytes(arrow(["from arrow"]))
    for name, text in (
        (b"caf\xe9.txt", "raw"),
        (b"caf\\xe9.txt", "spelled"),
        ("café.txt".encode(), "utf-8"),
        (b"\xe9.txt", ""),
    ):
        (folder / os.fsdecode(name)).write_text(text)
    documents, bad = read(folder)
    assert {key: text for key, text, _ in documents} == {
        "caf\\xe9.txt": "spelled", "caf\\xe9.txt~": "raw", "café.txt": "utf-8", "d\\xff.arrow:0": "from arrow",
    }  # fmt: skip
    assert bad == [f"{folder}/\\xe9.txt is empty."]
    version = prepare_dataset(parse(PrepareConfig, {"sources": [{"path": str(folder)}], "steps": []}), tmp_path / "out")
    assert sorted(row["text"] for row in version.iterate()) == ["from arrow", "raw", "spelled", "utf-8"]
    assert version.manifest["bad"]["messages"] == bad
    with pytest.raises(ConfigError, match=r"b\\xe9, is not UTF-8: rename it"):
        SourceConfig(path="b\udce9")


def test_a_plus_stands_between_paths_or_is_escaped(tmp_path, monkeypatch):
    assert parse_sources("a@2+b/c@0.5+d@e/f@1") == [
        {"path": "a", "weight": 2.0}, {"path": "b/c", "weight": 0.5}, {"path": "d@e/f", "weight": 1.0},
    ]  # fmt: skip
    assert split_paths(r"c\+\+-docs+books") == ["c++-docs", "books"]
    (tmp_path / "c++-docs").mkdir()
    (tmp_path / "c++-docs" / "a.txt").write_text("text")
    (tmp_path / "secret.txt").write_text("not asked for")
    monkeypatch.chdir(tmp_path)
    assert [file.key for file in list_path(parse_sources(r"c\+\+-docs")[0]["path"])] == ["a.txt"]
    for text in ("c++-docs", "books+", "+books", "a++b"):
        with pytest.raises(ConfigError, match="has an empty part"):
            parse_sources(text)
    with pytest.raises(ConfigError, match="the path of a source is empty"):
        SourceConfig(path="")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "in" / "locked").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("text")
    real = pathlib.Path.iterdir

    def iterdir(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", iterdir)  # root may list everything
    documents, bad = read(tmp_path / "in")
    assert len(documents) == 1 and len(bad) == 1 and "locked can't be read" in bad[0]


def test_what_is_neither_file_nor_folder_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "to-link").symlink_to("link.txt")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to-pipe").symlink_to("pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    for name, words in (
        ("pipe", "is a pipe"),
        ("link.txt", rf"is a symbolic link to {tmp_path}/gone.txt, which can't be followed \(No such file"),
        ("to-link", r"is a symbolic link to link.txt, which can't be followed \(No such file"),
        ("loop", r"is a symbolic link to loop, which can't be followed \(Too many levels"),
        ("to-pipe", "is a pipe"),
        ("socket", "is a socket"),
    ):
        with pytest.raises(ConfigError, match=f"^data source '{tmp_path}/{name}' {words}.*: name a file or a folder"):
            list_path(str(tmp_path / name))
    with pytest.raises(ConfigError, match="'/dev/null' is a device"):
        list_path("/dev/null")
    (tmp_path / "a.txt").write_text("text")  # in a folder, links to nothing are told of and what may never end is not read
    assert [file.key for file in list_path(str(tmp_path))] == ["a.txt", "link.txt", "loop", "to-link"]


def arrow(rows):
    table, sink = pyarrow.table({"text": rows}), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("is_remote", [False, True])
def test_caches_of_a_hugging_face_folder_are_no_data(is_remote, tmp_path):
    """`Dataset.map` leaves its results beside the files that `save_to_disk` wrote; state.json lists those."""
    root = f"memory://saved-{tmp_path.name}" if is_remote else str(tmp_path)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    files = {
        "train/data-00000-of-00001.arrow": arrow(["a", "b"]),
        "train/cache-0123456789abcdef.arrow": arrow(["A", "B"]),
        "train/tmp1234.arrow": arrow(["half"]),
        "train/state.json": json.dumps(state).encode(),
        "train/dataset_info.json": b"{}",
        "plain/cache-0123456789abcdef.arrow": arrow(["A"]),
        "plain/c.arrow": arrow(["c"]),
        "dataset_dict.json": b'{"splits": ["train"]}',
    }
    for name, content in files.items():
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as stream:
            stream.write(content)
    documents, bad = read(root)
    assert not bad and [text for _, text, _ in documents] == ["c", "a", "b"]
    for content, words in (
        (json.dumps({"_data_files": [{"filename": "data-9.arrow"}]}), "lists data-9.arrow, which is not there"),
        ("{", "state.json is damaged"),
        ("[]", "state.json is damaged"),
    ):
        with fsspec.open(f"{root}/train/state.json", "w") as stream:
            stream.write(content)
        with pytest.raises(DataError, match=words):
            list_path(root)
