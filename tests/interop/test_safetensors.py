"""The safetensors format against its own library, and what is found in files that are not what they should be."""

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.errors import DataError
from llmos_jax.interop import safetensors as lib

ARRAYS = {
    "b": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a": np.array([1.5, -2.0], lib.DTYPES["BF16"]),
    "empty": np.zeros((0, 3), np.float16),
    "scalar": np.array(7, np.int64),
    "c": np.array([[True], [False]]),
}


def write(file, arrays=ARRAYS):
    writer = lib.Writer(file, {name: (array.shape, array.dtype) for name, array in arrays.items()})
    for name, array in arrays.items():
        writer.write(name, array)
    writer.close()
    return file


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_what_is_written_is_read(tmp_path):
    tensors = lib.read_header(write(tmp_path / "x.safetensors"))
    for name, array in ARRAYS.items():
        got = tensors[name].read()
        assert got.dtype == array.dtype and got.shape == array.shape and got.tobytes() == array.tobytes()
        assert got.flags.writeable and got.flags.owndata  # no map of the file


def test_the_formats_own_library_agrees(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    plain = {name: array for name, array in ARRAYS.items() if name != "a"}
    for name, array in numpy.load_file(write(tmp_path / "ours.safetensors", plain)).items():
        np.testing.assert_array_equal(array, plain[name])
    numpy.save_file(plain, tmp_path / "theirs.safetensors", metadata={"x": "y"})
    for name, tensor in lib.read_header(tmp_path / "theirs.safetensors").items():
        np.testing.assert_array_equal(tensor.read(), plain[name])


def test_the_order_of_tensors_is_kept_to(tmp_path):
    writer = lib.Writer(tmp_path / "x", {"a": ((2,), np.float32), "b": ((1,), np.float32)})
    with pytest.raises(ValueError, match="expected"):
        writer.write("b", np.zeros(1, np.float32))
    writer = lib.Writer(tmp_path / "x", {"a": ((2,), np.float32)})
    with pytest.raises(ValueError, match="1 tensors were not written"):
        writer.close()


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "was cut short"),
        (b"\x80\x02}q\x00.", "was cut short"),
        (struct.pack("<Q", 2**60) + b"{}", "was cut short"),
        (raw(b"{nonsense"), "not JSON"),
        (raw(b"\xff\xfe"), "not JSON"),
        (raw(b"[" * 50_000), "not JSON"),
        (raw([1]), "not a table"),
        (raw(b'{"a": {}, "a": {}}'), "a name appears twice"),
        (raw({"a": {"dtype": "F32"}}), "lacks its dtype, shape or offsets"),
        (raw({"a": 3}), "lacks its dtype, shape or offsets"),
        (raw({"a": F32 | {"dtype": "F4"}}, b"12345678"), "has dtype 'F4'; known: F64"),
        (raw({"a": F32 | {"shape": [-2]}}, b"12345678"), r"has shape \[-2\]"),
        (raw({"a": F32 | {"shape": [3]}}, b"12345678"), r"has 8 bytes, and F32\[3\] needs 12"),
        (raw({"a": F32 | {"shape": [2**40, 2**40]}}, b"12345678"), "has 8 bytes"),
        (raw({"a": F32}, b"1234567"), "it was cut short"),
        (raw({"a": F32}, b"123456789"), "there is more in it"),
        (raw({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, b"0" * 12), "begins at byte"),
        (raw({"a": F32, "b": F32 | {"data_offsets": [9, 17]}}, b"0" * 17), "begins at byte"),
    ],
)
def test_bad_files_are_named(tmp_path, content, words):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        lib.read_header(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path_factory, data):
    content = bytearray((write(tmp_path_factory.mktemp("m") / "x")).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    file = tmp_path_factory.mktemp("m") / "x"
    file.write_bytes(content)
    try:
        for tensor in lib.read_header(file).values():
            assert tensor.read().nbytes == tensor.nbytes
    except DataError:
        pass


def test_a_file_cut_after_it_was_opened_is_an_error(tmp_path):
    file = write(tmp_path / "x")
    tensors = lib.read_header(file)
    os.truncate(file, file.stat().st_size - 3)
    with pytest.raises(DataError, match="ends within tensor"):
        for tensor in tensors.values():
            tensor.read()


def sharded(folder):
    folder.mkdir()
    names = list(ARRAYS)
    for number, part in enumerate((names[:2], names[2:]), 1):
        write(folder / f"m-{number}.safetensors", {name: ARRAYS[name] for name in part})
    weight_map = {name: f"m-{1 if name in names[:2] else 2}.safetensors" for name in names}
    (folder / lib.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, weight_map


def test_several_files_are_one_checkpoint(tmp_path):
    tensors = lib.read_checkpoint(sharded(tmp_path / "s")[0])
    assert tensors.keys() == ARRAYS.keys()
    assert all(tensors[name].read().tobytes() == array.tobytes() for name, array in ARRAYS.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder, index: (folder / "m-2.safetensors").unlink(), "lacks m-2.safetensors, which"),
        (lambda folder, index: index.pop("b"), "holds 'b', which"),
        (lambda folder, index: index.update(more="m-1.safetensors"), "lacks 'more', which"),
        (lambda folder, index: index.update(b="../m-1.safetensors"), "must lie beside the index"),
        (lambda folder, index: index.update(b="/etc/passwd"), "must lie beside the index"),
        (lambda folder, index: index.update(b=3), "must give a file to each tensor"),
        (lambda folder, index: index.update(b="m-2.safetensors"), "says is in m-2.safetensors"),
    ],
)
def test_index_and_files_must_agree(tmp_path, change, words):
    folder, weight_map = sharded(tmp_path / "s")
    change(folder, weight_map)
    (folder / lib.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DataError, match=words):
        lib.read_checkpoint(folder)


def test_pickles_are_refused_with_how_to_convert(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(DataError, match=r"pytorch_model.bin.*never is.*save_pretrained"):
        lib.read_checkpoint(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        lib.read_checkpoint(tmp_path / "none")
