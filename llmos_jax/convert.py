"""Checkpoints of transformers as runs and models of ours, and back: what joins `interop` with run directories."""

import dataclasses
import functools
import json
import pathlib

from absl import logging

from llmos_jax.config import parse, unit
from llmos_jax.errors import CheckpointError, ConfigError, RunDirectoryError
from llmos_jax.interop import huggingface, tokens
from llmos_jax.interop.model_config import EXECUTION

# In a run directory: the config.json that its model came with, and the dtype of the files.
ORIGIN_FILE = "huggingface.json"
TOKENIZER_FILE = "tokenizer.json"


def adopt(settings):
    """Returns the settings of a run that begins with a checkpoint of transformers (`train.init_from=hf:...`); else as they are.

    Architecture, vocabulary and tokenizer are the checkpoint's; how the model is computed and trained stays the experiment's.
    """
    source = settings.train.init_from
    if source is None or not huggingface.is_source(source):
        return settings
    checkpoint = huggingface.read_checkpoint(source)
    kept = {name: getattr(settings.model, name) for name in EXECUTION if hasattr(settings.model, name)}
    tokenizer = tokens.tokenizer_file(checkpoint)
    data = settings.data if tokenizer is None else dataclasses.replace(settings.data, tokenizer=str(tokenizer))
    return dataclasses.replace(settings, model=dataclasses.replace(checkpoint.config, **kept), data=data)


def warm_start(settings, artifacts, abstract):
    """Returns the parameters of the checkpoint that `train.init_from` names, placed as the run's.

    Raises DataIdentityMismatch when the run's tokenizer is not the checkpoint's, ConfigError when the model isn't.
    """
    checkpoint = huggingface.read_checkpoint(settings.train.init_from)
    if tokens.tokenizer_file(checkpoint) is not None:
        tokens.check_tokenizer(checkpoint, artifacts.get(TOKENIZER_FILE))
    huggingface.check_model(checkpoint, settings.model)
    logging.info("start from %s (%s)", checkpoint.folder, checkpoint.architecture.name)
    return huggingface.load_params(checkpoint, abstract)


def load_model(source, mesh, dtype):
    """Returns (settings, model handle, parameters, tokenizer) of a checkpoint of transformers (see `api.load`)."""
    import jax

    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.train.settings import Settings

    checkpoint = huggingface.read_checkpoint(source)
    tokenizer = tokens.read_tokenizer(checkpoint)
    placement = make_placement(mesh)
    handle = _describe(checkpoint.config, placement)
    dtype = dtype or ("float32" if placement.platform == "cpu" else checkpoint.dtype)
    if dtype not in huggingface.FLOATS:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(huggingface.FLOATS)}.")
    abstract = jax.tree.map(lambda leaf: leaf.update(dtype=dtype), handle.abstract)
    params = huggingface.load_params(checkpoint, abstract)
    return Settings(name=checkpoint.folder.name, model=checkpoint.config), handle, params, tokenizer


def import_checkpoint(source, directory):
    """Writes a checkpoint of transformers as run directory `directory`: float32 parameters, step 0, and its tokenizer.

    It is a run only when all of it is there: the settings come last. Raises RunDirectoryError when there is one already, and
    CheckpointError when the parameters can't be saved.
    """
    from llmos_jax.data.prepare import DataConfig
    from llmos_jax.train import directory as run_directory
    from llmos_jax.train.checkpoint import CheckpointConfig, Checkpointer
    from llmos_jax.train.directory import CHECKPOINTS
    from llmos_jax.train.settings import Settings

    directory = pathlib.Path(directory)
    if run_directory.read_settings(directory) is not None:
        raise RunDirectoryError(f"--workdir={directory} holds a run already: name a new directory.")
    checkpoint = huggingface.read_checkpoint(source)
    tokenizer = tokens.read_tokenizer(checkpoint)
    handle = _describe_spread(checkpoint.config)
    params = huggingface.load_params(checkpoint, handle.abstract)
    checkpointer = Checkpointer(directory / CHECKPOINTS, CheckpointConfig(is_async=False))
    try:
        if not checkpointer.save(0, {"params": params}, {"source": str(source)}) or checkpointer.failures:
            raise CheckpointError(f"{directory} could not be written (the reason is above): mend it, and try again.")
    finally:
        checkpointer.close()
    origin = {"config": checkpoint.tree, "dtype": checkpoint.dtype}
    files = {TOKENIZER_FILE: json.dumps(tokenizer.to_json()), ORIGIN_FILE: json.dumps(origin, indent=2) + "\n"}
    data = DataConfig(tokenizer=str(directory / TOKENIZER_FILE))
    settings = Settings(name=checkpoint.folder.name, model=checkpoint.config, data=data)
    run_directory.record(directory, settings, files)
    logging.info("%s (%s, %s) is %s, step 0", source, checkpoint.architecture.name, checkpoint.dtype, directory)


def export_checkpoint(directory, folder, restore, *, dtype=None):
    """Writes the model of a run directory as a folder that transformers' `from_pretrained` loads; returns its Architecture.

    restore: `restore(settings, abstract) -> parameters` of the step that is wanted. dtype: of the files; none: of those that
    the model came from, else float32.
    """
    from llmos_jax.data.tokenizer import load_tokenizer
    from llmos_jax.train import directory as run_directory
    from llmos_jax.train.settings import Settings

    directory = pathlib.Path(directory)
    saved = run_directory.read_settings(directory)
    if saved is None:
        raise RunDirectoryError(f"--workdir={directory} holds no run: there is no {run_directory.SETTINGS_FILE}.")
    settings = parse(Settings, saved)
    origin = run_directory.read_json(directory / ORIGIN_FILE) or {}
    tokenizer = load_tokenizer(directory / TOKENIZER_FILE)
    dtype = dtype or origin.get("dtype", "float32")
    if dtype not in huggingface.FLOATS:
        raise ConfigError(f"--dtype={dtype} is not one of {', '.join(huggingface.FLOATS)}.")
    huggingface.check_target(folder, settings.model, origin.get("config"))
    handle = _describe_spread(settings.model)
    params = restore(settings, handle.abstract)
    architecture = huggingface.save_checkpoint(
        params,
        settings.model,
        folder,
        dtype=dtype,
        original=origin.get("config"),
        tokens={"bos_token_id": tokenizer.end_id, "eos_token_id": tokenizer.end_id},
        files=tokenizer.to_files(),
    )
    logging.info("%s is %s (%s, %s)", directory, folder, architecture.name, dtype)
    return architecture


def _describe(model, placement):
    from llmos_jax.train.state import describe_model

    family = unit("llmos_jax.models", model.name)
    return describe_model(functools.partial(family.build, model, placement), placement)


def _describe_spread(model):
    """Returns a model's handle with the parameters laid over as many devices as their sizes divide by."""
    import jax

    from llmos_jax.compute.mesh import MeshConfig
    from llmos_jax.compute.sharding import make_placement

    devices = jax.devices()
    for count in range(len(devices), 1, -1):
        placement = make_placement(MeshConfig(parameters="fsdp"), devices[:count])
        try:
            return _describe(model, placement)
        except ConfigError:  # a size that so many devices don't divide
            continue
    return _describe(model, make_placement(None, devices[:1]))
