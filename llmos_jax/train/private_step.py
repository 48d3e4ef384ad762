"""Gradients for differential privacy: clipped document by document, summed, and noised.

Rows of a batch are taken a few at a time, one or more on each data shard; a batch has room for any draw, and rows that no
document was drawn for cost nothing, since the loop ends with the last drawn one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llmos_jax.errors import ConfigError
from llmos_jax.train.privacy import batch_rows
from llmos_jax.train.state import describe_model


@dataclasses.dataclass(frozen=True)
class Privatizer:
    """What the step needs to be private.

    clip_norm, noise_multiplier: of the privacy settings. expected: documents of a batch on average, by which the noised sum
    is divided: their true number is private. parts: microbatches (`pipeline.cut`). rows: `state.ModelHandle` of the model
    as it is inside the map over rows. axes: mesh axes that rows are mapped over.
    """

    clip_norm: float
    noise_multiplier: float
    expected: int
    parts: int
    rows: Any
    axes: tuple[str, ...]

    def gradient(self, loss, handle):
        """Returns `gradient(params, batch, key) -> ((total, (weight, sums)), sum of the documents' clipped gradients)`."""
        rows, is_sharded = self.rows, handle.placement.mesh.size > 1

        def of_row(params, row, key):
            """Returns the values of one document and its clipped gradient."""

            def mean_loss(params):
                total, weight, sums = loss(rows.merge(params), jax.tree.map(lambda x: x[None], row), key)
                return total / jnp.maximum(weight, 1.0), (total, (weight, sums))

            (_, values), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
            return values, clipped(gradients, self.clip_norm * row["is_drawn"])

        over_rows = jax.vmap(of_row, in_axes=(None, 0, 0), spmd_axis_name=self.axes if is_sharded else None)

        def gradient(params, batch, key):
            params = jax.lax.with_sharding_constraint(params, rows.shardings) if is_sharded else params
            count = batch["is_drawn"].shape[0]
            at_once = count // self.parts
            pieces = jax.tree.map(lambda x: x.reshape(at_once, self.parts, *x.shape[1:]), batch)
            numbers = jnp.arange(count).reshape(self.parts, at_once)

            def add(part, sums):
                piece = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, part, 1, keepdims=False), pieces)
                keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers[part])
                of_rows = over_rows(params, piece, keys)
                values, gradients = jax.tree.map(lambda total, x: total + x.sum(0), sums, of_rows)
                return values, jax.lax.with_sharding_constraint(gradients, handle.optimizer_shardings)

            piece = jax.tree.map(lambda x: x[:, 0], pieces)
            shapes = jax.eval_shape(over_rows, params, piece, jax.random.split(key, at_once))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape[1:], jnp.float32), shapes)
            drawn_parts = jnp.ceil(batch["is_drawn"].sum() / at_once).astype(jnp.int32)
            return jax.lax.fori_loop(0, drawn_parts, add, zeros)

        return gradient

    def average(self, gradients, batch, handle):
        """Returns the sum of clipped gradients with noise, over the expected number of documents."""
        key = jax.random.wrap_key_data(batch["noise_key"][0], impl="threefry2x32")
        leaves, structure = jax.tree.flatten(gradients)
        deviation = self.noise_multiplier * self.clip_norm
        noise = [
            deviation * jax.random.normal(leaf_key, leaf.shape, jnp.float32)
            for leaf_key, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ]
        noise = jax.lax.with_sharding_constraint(jax.tree.unflatten(structure, noise), handle.optimizer_shardings)
        return jax.tree.map(lambda g, n: (g + n) / self.expected, gradients, noise)


def make_privatizer(settings, model, placement):
    """Returns the Privatizer of Settings, None when they ask for no privacy; `model`: of the Task (`tasks.base.Task`)."""
    config = settings.train.privacy
    if config is None:
        return None
    if config.noise_multiplier is None:
        raise ConfigError("train.privacy.noise_multiplier must be named where no data is read: it follows from their number.")
    _, parts = batch_rows(settings, placement)
    row_placement, axes = _for_rows(placement)
    rows = describe_model(lambda *, rngs: model(row_placement, rngs=rngs), row_placement)
    return Privatizer(config.clip_norm, config.noise_multiplier, settings.train.batch_size, parts, rows, axes)


def clipped(gradients, limit):
    """Returns `gradients` scaled to a global norm of at most `limit`, float32; all zero when they are not finite.

    One damaged document then adds nothing, instead of ending the run: what is released never depends on it otherwise.
    """
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients)))
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(norm), g * scale, 0.0), gradients)


def _for_rows(placement):
    """Returns (the placement inside the map over rows, the mesh axes that rows are mapped over).

    Weights are whole on every data shard there: each has a gradient of its own. What the model axis shards stays sharded.
    """
    axes = tuple(placement.mesh_axes("batch"))
    rules = tuple((axis, tuple(name for name in names if name not in axes)) for axis, names in placement.rules)
    return dataclasses.replace(placement, rules=rules, optimizer_rules=rules), axes
