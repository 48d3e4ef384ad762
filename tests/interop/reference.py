"""Folders as transformers writes them, made again from what `scripts/reference_models.py` recorded."""

import base64
import functools
import json
import pathlib

import jax
import numpy as np

from llmos_jax import config as settings
from llmos_jax.compute.sharding import make_placement
from llmos_jax.interop import safetensors
from llmos_jax.interop.huggingface import load_params, read_checkpoint
from llmos_jax.train.state import describe_model
from scripts import reference_models as reference

NAMES = sorted(reference.MODELS)


def record(name):
    """Returns what was recorded of a model."""
    return json.loads((reference.FOLDER / f"{name}.json").read_text())


def expected_logits(name):
    """Returns the recorded logits of each row."""
    flat = np.frombuffer(base64.b64decode(record(name)["logits"]), "<f4").reshape(sum(reference.LENGTHS), -1)
    return np.split(flat, np.cumsum(reference.LENGTHS)[:-1])


def write_folder(folder, name, **changes):
    """Writes the checkpoint of a recorded model; `changes` are keys of its config.json."""
    folder, known = pathlib.Path(folder), record(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(known["config"] | changes))
    dtype = np.dtype({"bfloat16": safetensors.DTYPES["BF16"]}.get(known["dtype"], known["dtype"]))
    for file, shapes in known["files"].items():
        writer = safetensors.Writer(folder / file, {key: (tuple(shape), dtype) for key, shape in shapes.items()})
        for key, shape in shapes.items():
            writer.write(key, reference.weights(key, shape).astype(dtype))
        writer.close()
    if known["index"]:
        (folder / safetensors.INDEX_FILE).write_text(json.dumps(known["index"]))
    return folder


def load(folder, mesh=None, dtype=None):
    """Returns (checkpoint, model handle, parameters) of a folder, on one device or a mesh."""
    checkpoint = read_checkpoint(f"hf:{folder}")
    placement = make_placement(mesh, None if mesh else jax.devices()[:1])
    family = settings.unit("llmos_jax.models", checkpoint.config.name)
    handle = describe_model(functools.partial(family.build, checkpoint.config, placement), placement)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=leaf.sharding), handle.abstract
    )
    return checkpoint, handle, load_params(checkpoint, abstract)


def tensors(folder):
    """Returns {name: content} of a folder's tensors."""
    return {name: tensor.read() for name, tensor in safetensors.read_checkpoint(folder).items()}


class Numbers:
    """A tokenizer whose texts are numbers with spaces between."""

    vocab_size, end_id, end_ids = 96, 0, frozenset()

    def prompt(self, text):
        return np.array([int(word) for word in text.split()], np.int32)

    def stream_decoder(self):
        return self

    def push(self, token):
        return f"{token} "

    def flush(self):
        return ""
