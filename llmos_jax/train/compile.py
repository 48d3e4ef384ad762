"""The training step as a compiled program: for the attached devices, or ahead of time for a machine that is not here."""

import jax

from llmos_jax.compute.memory import bytes_per_device
from llmos_jax.train import state as states
from llmos_jax.train.clock import abstract_reading, with_reading
from llmos_jax.train.privacy import batch_rows, private_fields
from llmos_jax.train.private_step import make_privatizer
from llmos_jax.train.step import make_step


def trace_step(settings, task, handle, optimizer, placement):
    """Returns (traced step, its abstract state); `.lower().compile()` makes the program
    `(state, batch, reading of the clock) -> (state, metrics)`.

    Nothing is allocated: the state, donated, and the batch are known by shape and sharding alone.

    Args:
      settings: Settings. task: `tasks.base.Task` or `Outline`. handle: `state.ModelHandle`.
      optimizer: optax transformation (`optim.make_optimizer`). placement: `compute.sharding.Placement`, of devices that
        may be a topology's.
    """
    rows, microbatches = batch_rows(settings, placement)
    step = make_step(
        task.loss,
        handle,
        optimizer,
        settings.optim,
        seed=settings.seed,
        steps=settings.train.steps,
        microbatches=microbatches,
        privatizer=make_privatizer(settings, task.model, placement),
    )
    state = states.abstract_state(handle, optimizer, placement, with_ema=settings.optim.ema is not None)
    fields = task.fields if settings.train.privacy is None else private_fields(task.fields)
    batch = abstract_batch(fields, rows, placement)
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), placement.sharding())
    step = jax.jit(with_reading(step, placement.mesh), donate_argnums=0, out_shardings=shardings)
    return step.trace(state, batch, abstract_reading(placement.mesh)), state


def abstract_batch(fields, batch_size, placement):
    """Returns {name: ShapeDtypeStruct} of a global batch of `batch_size` rows with these `tasks.base.Field`s."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *field.shape), field.dtype, sharding=placement.sharding(*field.axes))
        for name, field in fields.items()
    }


def state_parts(state):
    """Returns {what: bytes per device} of an abstract TrainState."""
    groups = {"parameters": state.params, "optimizer": state.optimizer, "averaged weights": state.ema}
    return {name: bytes_per_device(tree) for name, tree in groups.items() if tree is not None}


def whole_arrays(handle, placement, rows, length):
    """Returns ({name: dimensions} of arrays that no device should hold whole while the rules shard them, names left out).

    These are every sharded parameter with all of its layers; one layer of those that are sharded by more than what FSDP
    gathers again; and all logits of those of `rows`, which are computed at a time, that one device has. Left out are those
    that can't be told from activations by their dimensions, because one is the number of tokens that a device has.
    """
    found = {}
    gathered = set(placement.mesh_axes("batch")) | set(placement.mesh_axes("length"))
    tokens = rows // placement.axis_size("batch") * length

    def shards(axis):
        return {name for name in placement.mesh_axes(axis) if placement.mesh.shape[name] > 1}

    leaves = zip(jax.tree_util.tree_leaves_with_path(handle.shapes), jax.tree.leaves(handle.infos), strict=True)
    for (path, leaf), info in leaves:
        name, is_stacked = states.leaf_name(path), info.axes[0] == "layers"
        over = set().union(*map(shards, info.axes))
        if over and (is_stacked or over - gathered):
            found[name] = leaf.shape
        if is_stacked and over - gathered - shards("layers"):
            found[f"one layer of {name}"] = leaf.shape[1:]
        if info.kind == "embedding" and info.axes[0] == "vocab":
            found["logits"] = (rows // placement.axis_size("batch"), length, leaf.shape[0])
            found["logits of a shard of the vocabulary"] = (*found["logits"][:2], leaf.shape[0] // placement.axis_size("vocab"))
    return {name: dims for name, dims in found.items() if tokens not in dims}, [n for n in found if tokens in found[n]]
