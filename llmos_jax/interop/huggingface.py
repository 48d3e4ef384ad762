"""Checkpoints of Hugging Face's transformers: read tensor by tensor into their sharded places, and written again.

A source is `hf:FOLDER`, or `hf:OWNER/NAME[@REVISION]` where huggingface_hub is installed: what it has in its cache, or may
fetch, of a repository's JSON and safetensors files. No pickle is read, no code of a repository is run, and no file of it
names another place.

Memory of the host: one tensor as it lies in its file and once more as it is laid, whatever the model's size. Each tensor is
read once and goes at once to the devices whose part of the parameter it is.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmos_jax.config import differences, to_plain, unit
from llmos_jax.errors import ConfigError, DataError
from llmos_jax.interop import layout, safetensors
from llmos_jax.interop.architectures import Architecture
from llmos_jax.interop.model_config import essence, read_config, write_config

SCHEME = "hf:"
CONFIG_FILE = "config.json"
# What weights may be in a file.
FLOATS = ("float64", "float32", "float16", "bfloat16")
# What a repository may hold that is fetched: never pickles, never code.
_FETCHED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
# transformers' own default was this for years; files of this size fit everywhere.
SHARD_BYTES = 5 * 10**9
_LARGEST_CONFIG_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder holds: the config.json, the model settings that it means, and where its tensors lie.

    dtype: of most of the weights, what an export goes back to.
    """

    folder: pathlib.Path
    tree: dict
    architecture: Architecture
    config: Any
    tensors: dict[str, safetensors.Tensor]
    dtype: str


def is_source(name):
    """Whether a path names a checkpoint of transformers (`hf:...`)."""
    return str(name).startswith(SCHEME)


def find_folder(source):
    """Returns the folder of a source: a local one as it is, else the snapshot in huggingface_hub's cache, fetched if need be.

    Raises ConfigError when there is neither, saying what is missing.
    """
    name = str(source).removeprefix(SCHEME)
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return folder
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise ConfigError(f"{SCHEME}{name}: there is no folder {name}, and it is no OWNER/NAME of the hub.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"{SCHEME}{name}: there is no such folder; the hub needs: pip install huggingface_hub.") from None
    try:
        return pathlib.Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(_FETCHED)))
    except Exception as error:  # of the network, the hub, the cache: their classes differ from release to release
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{SCHEME}{name}: neither a folder nor to be had from the hub ({reason}).") from None


def read_checkpoint(source):
    """Returns the Checkpoint of a source; only headers are read.

    Raises ConfigError on a config that is unknown or can't be, DataError on files that are missing, damaged or hold other
    tensors than the config says: names and shapes are compared before anything is allocated.
    """
    folder = find_folder(source)
    file = folder / CONFIG_FILE
    tree = read_json(file)
    architecture, config = read_config(tree, file)
    tensors = safetensors.read_checkpoint(folder)
    _check_sizes(config, tensors, file)
    sizes = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    dtype = max((name for name in sizes if name in FLOATS), key=sizes.get, default="float32")
    return Checkpoint(folder, tree, architecture, config, tensors, dtype)


def read_json(file):
    """Returns the object in a JSON file; DataError names a file that is missing, too large or no JSON object."""
    try:
        if file.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise DataError(f"{file} has {file.stat().st_size} bytes, and {_LARGEST_CONFIG_BYTES} are the most.")
        tree = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{file} can't be read: {reason}.") from None
    if not isinstance(tree, dict):
        raise DataError(f"{file} holds no JSON object.")
    return tree


def check_model(checkpoint, config):
    """Raises ConfigError, with what differs, when a model's settings are not what the checkpoint's weights are for."""
    changed = differences(to_plain(essence(checkpoint.config)), to_plain(essence(config)), "model")
    if changed:
        raise ConfigError(
            f"the weights of {checkpoint.folder} are of another model ({'; '.join(changed[:5])}): leave these settings to them."
        )


def load_params(checkpoint, abstract):
    """Returns the parameters of a checkpoint as arrays laid as `abstract` (ShapeDtypeStructs with shardings) says.

    `abstract` is that of a model of `checkpoint.config`, in its natural order of layers; its dtype is what the weights
    become. Raises DataError when tensors are missing, superfluous or of other shapes.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {_path_name(path): leaf for path, leaf in leaves}
    pieces = _pieces(checkpoint, wanted)
    places = {name: _Place(leaf) for name, leaf in wanted.items()}
    by_tensor = {}
    for piece in pieces:
        by_tensor.setdefault(piece.tensor, []).append(piece)
    # In the order of the files: what is read next lies where the disk is.
    for name in sorted(by_tensor, key=lambda name: (checkpoint.tensors[name].file, checkpoint.tensors[name].start)):
        content = checkpoint.tensors[name].read()
        for piece in by_tensor[name]:
            places[piece.parameter].put(piece, piece.here(content))
    return jax.tree.unflatten(structure, [places[_path_name(path)].whole() for path, _ in leaves])


def check_target(folder, config, original=None):
    """Returns (Architecture, content of config.json) that a model would be written with, before anything is read for it.

    Raises ConfigError when `folder` has something in it, or when no architecture of transformers fits the settings.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: name a new folder.")
    return write_config(config, original)


def save_checkpoint(params, config, folder, *, dtype, original=None, tokens=None, files=None, shard_bytes=SHARD_BYTES):
    """Writes parameters as a folder that transformers' `from_pretrained` loads; returns its Architecture.

    config: the model's settings. dtype: of the files ("float32", "bfloat16", "float16"). original: the config.json that the
    model was read from, kept where it still says the same. tokens: keys that a new one gets beside (`eos_token_id` ...). files:
    {name: text} to lay beside (tokenizer and the like).
    Tensors are brought from the devices one at a time. The folder appears whole or not at all; ConfigError when there is
    one with something in it, or when no architecture of transformers fits the settings.
    """
    folder = pathlib.Path(folder)
    architecture, tree = check_target(folder, config, original)
    leaves = {_path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    by_tensor = {}
    for piece in layout.pieces(_table(architecture, config), leaves, _sizes(config)):
        by_tensor.setdefault(piece.tensor, []).append(piece)
    target = safetensors.DTYPES[safetensors.dtype_name(jnp.dtype(dtype))]
    if tree is not original:
        tree |= dict(tokens or {})
    if tree is not original or any(key in tree and tree[key] != dtype for key in ("dtype", "torch_dtype")):
        tree = {key: value for key, value in tree.items() if key not in ("dtype", "torch_dtype")} | {"torch_dtype": dtype}
    temporary = folder.with_name(f".{folder.name}.{os.urandom(6).hex()}")
    try:
        temporary.mkdir(parents=True)
        _write_shards(temporary, leaves, by_tensor, target, shard_bytes)
        texts = {CONFIG_FILE: json.dumps(tree, indent=2, sort_keys=True) + "\n"} | dict(files or {})
        for name, text in texts.items():
            (temporary / name).write_text(text, "utf-8")
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} can't be written ({error.strerror}): make room, or name another folder.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return architecture


# ---- Which tensors.


def _check_sizes(config, tensors, file):
    """Raises DataError when a config names sizes that the tensors can't have: nothing is made for it that is as large."""
    if config.layers * max(1, config.experts) > len(tensors):
        raise DataError(
            f"{file} says {config.layers} layers with {config.experts} experts, and there are {len(tensors)} tensors: they do "
            "not belong together."
        )
    largest = max(math.prod(tensor.shape) for tensor in tensors.values())
    for letter, size in _sizes(config).items():
        if letter != "P" and size > largest:  # positions may be without parameters
            raise DataError(f"{file} names a size of {size}, and the largest tensor has {largest} numbers.")


def _table(architecture, config):
    return unit("llmos_jax.models", config.name).HF_NAMES | architecture.names


def _sizes(config):
    """Returns {letter: size} of the dimensions that the tables name."""
    return {
        "V": config.vocab_size,
        "P": config.context,
        "D": config.width,
        "F": config.expert_hidden if config.experts else config.hidden,
        "H": config.heads,
        "G": getattr(config, "groups", config.heads),
        "K": config.head_size,
        "N": config.layers,
        "E": config.experts,
    }


def _pieces(checkpoint, parameters):
    """Returns the pieces of the parameters; DataError when the tensors in the files are not exactly those."""
    architecture, tensors = checkpoint.architecture, checkpoint.tensors
    pieces = layout.pieces(_table(architecture, checkpoint.config), parameters, _sizes(checkpoint.config))
    if not any(name.startswith(architecture.prefix) for name in tensors):  # a file of the bare model
        pieces = [dataclasses.replace(piece, tensor=piece.tensor.removeprefix(architecture.prefix)) for piece in pieces]
    expected = {piece.tensor: piece.shape for piece in pieces}
    lines = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            if not name.endswith(architecture.ignored) and not _is_tied_copy(checkpoint, name):
                lines.append(f"{name} {list(tensor.shape)} is not expected")
        elif tensor.shape != expected[name]:
            lines.append(f"{name} is {list(tensor.shape)}, expected {list(expected[name])}")
        elif tensor.dtype.name not in FLOATS:
            lines.append(f"{name} is {tensor.dtype.name}, expected one of {', '.join(FLOATS)}")
    if lines:
        more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise DataError(
            f"the tensors of {checkpoint.folder} are not those of its {CONFIG_FILE} ({architecture.name}): "
            f"{'; '.join(lines[:6])}{more}."
        )
    return pieces


def _is_tied_copy(checkpoint, name):
    """Whether a tensor is the head of a model whose head is its embedding, written once more; DataError when it differs."""
    table = _table(checkpoint.architecture, checkpoint.config)
    (embedding,), (head,) = table["embedding"], table["head"]
    if name != head or not checkpoint.config.is_tied or embedding not in checkpoint.tensors:
        return False
    one, other = checkpoint.tensors[embedding], checkpoint.tensors[head]
    if one.shape != other.shape or not np.array_equal(one.read(), other.read()):
        raise DataError(f"{checkpoint.folder}: tie_word_embeddings is true, and {head} differs from {embedding}.")
    return True


def _path_name(path):
    return "/".join(str(key.key) for key in path)


# ---- From a file to the devices.


class _Place:
    """One parameter on this process's devices, filled piece by piece."""

    def __init__(self, leaf):
        self.shape, self.dtype, self.sharding = leaf.shape, leaf.dtype, leaf.sharding
        self.indices = {
            device: [slice(*part.indices(size)[:2]) for part, size in zip(index, leaf.shape, strict=True)]
            for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
        }
        self.shards = {}

    def put(self, piece, content):
        """Lays what each device holds of `content`, which begins at `piece.start`; returns when it is there."""
        for device, index in self.indices.items():
            there = [
                slice(max(begin, part.start), min(begin + size, part.stop))
                for begin, size, part in zip(piece.start, content.shape, index, strict=True)
            ]
            if any(part.start >= part.stop for part in there):
                continue
            own = tuple(slice(p.start - begin, p.stop - begin) for p, begin in zip(there, piece.start, strict=True))
            # A new array: a device of the CPU may keep what it is given as it is.
            update = jax.device_put(np.array(content[own], order="C"), device)
            if update.shape == tuple(part.stop - part.start for part in index):
                self.shards[device] = jax.block_until_ready(update.astype(self.dtype))
                continue
            if device not in self.shards:
                shape = tuple(part.stop - part.start for part in index)
                self.shards[device] = jnp.zeros(shape, self.dtype, device=device)
            at = np.array([p.start - part.start for p, part in zip(there, index, strict=True)], np.int32)
            self.shards[device] = jax.block_until_ready(_write(self.shards[device], update, at))

    def whole(self):
        """Returns the array."""
        arrays = [self.shards[device] for device in self.indices]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard, update, at):
    return lax.dynamic_update_slice(shard, update.astype(shard.dtype), tuple(at))


# ---- From the devices to files.


def _write_shards(folder, leaves, by_tensor, dtype, shard_bytes):
    """Writes every tensor, in files of about `shard_bytes`, with an index if they are several."""
    specs = {name: (pieces[0].shape, dtype) for name, pieces in by_tensor.items()}
    groups, size = [[]], 0
    for name, (shape, _) in specs.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    count, weight_map = len(groups), {}
    for number, names in enumerate(groups, 1):
        file = safetensors.SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        writer = safetensors.Writer(folder / file, {name: specs[name] for name in names})
        for name in names:
            writer.write(name, _gather(leaves, by_tensor[name], dtype))
            weight_map[name] = file
        writer.close()
    if count > 1:
        total = sum(math.prod(shape) * dtype.itemsize for shape, _ in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / safetensors.INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _gather(leaves, pieces, dtype):
    """Returns one tensor as it is written, from the parameters that it holds parts of."""
    whole = np.empty(pieces[0].shape, dtype)
    for piece in pieces:
        leaf = leaves[piece.parameter]
        part = np.asarray(_read(leaf, np.array(piece.lead, np.int32), piece.fixed))
        whole[piece.window] = piece.there(part).astype(dtype, copy=False)
    return whole


def _read(leaf, lead, fixed):
    """Returns the part of a parameter at leading indices and fixed ones, whole on every device."""
    where = leaf.sharding
    if isinstance(where, jax.sharding.NamedSharding):
        where = jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec())
    return _reader(where)(leaf, lead, fixed)


@functools.cache
def _reader(where):
    return jax.jit(_take, static_argnums=2, out_shardings=where)


def _take(leaf, lead, fixed):
    for dimension in range(lead.shape[0]):
        leaf = lax.dynamic_index_in_dim(leaf, lead[dimension], 0, keepdims=False)
    for dimension, index in reversed(fixed):
        leaf = lax.index_in_dim(leaf, index, dimension, keepdims=False)
    return leaf
