"""The compiled training step: gradients over microbatches, clipping, guard, update, weight averaging."""

import jax
import jax.numpy as jnp
import optax

from llmos_jax.train import guard
from llmos_jax.train.optim import schedule
from llmos_jax.train.state import TrainState


def make_step(loss, handle, optimizer, config, *, seed, steps, microbatches=1):
    """Returns `step(state, batch, clock) -> (state, metrics)`, to be jitted with the state donated.

    Args:
      loss: `loss(model, batch, key) -> (sum, weight, {name: sum})`; only here are sums divided by weights, so that
        microbatches, padding and data parallelism give the number of one big batch.
      handle: `state.ModelHandle`.
      optimizer: optax transformation at learning rate one (`optim.make_optimizer`).
      config: OptimConfig.
      seed: of dropout; the key of a step depends on it and on the updates applied so far.
      steps: planned number of steps, or None when only the clock counts.
      microbatches: gradients are accumulated over this many slices of the batch.

    `clock` is the share of the planned wall time that is used up (0 without `max_seconds`). Metrics are scalars on the
    device, and the guard's counters under "guard". Nothing is read by the host.
    """

    def loss_of(params, batch, key):
        total, weight, sums = loss(handle.merge(params), batch, key)
        return total, (weight, sums)

    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def step(state, batch, clock):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        params = reduced_in(config.gradient_dtype, state.params, handle.infos)
        (total, (weight, sums)), gradients = accumulate(gradient, params, batch, key, microbatches)
        # ZeRO: gradients are scattered to the devices that update with them, still in the dtype of their reduction.
        gradients = jax.lax.with_sharding_constraint(gradients, handle.optimizer_shardings)
        scale = 1.0 / jnp.maximum(weight, 1.0)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients)
        squares = [jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients)]
        is_good, norm, guarded = guard.judge(config, state.guard, state.step, total, squares)
        if config.clip_norm is not None:
            clip = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))
            gradients = jax.tree.map(lambda g: g * clip, gradients)
        progress = clock if steps is None else jnp.maximum(clock, (state.step + 1) / steps)
        rate = schedule(config, progress)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: u * rate, updates))
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda old, new: old + (1 - config.ema) * (new - old), ema, params)
        proposed = TrainState(state.step + 1, params, moments, ema, guarded)
        kept = TrainState(state.step, state.params, state.optimizer, state.ema, guarded)
        state = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), proposed, kept)
        metrics = {f"train/{name}": value * scale for name, value in sums.items()}
        metrics |= {
            "train/loss": total * scale,
            "train/gradient_norm": norm,
            "train/learning_rate": rate,
            "train/skipped_steps": guarded["skipped"],
            "train/tokens": weight,
            "guard": guarded,
        }
        return state, metrics

    return step


def reduced_in(dtype, params, infos):
    """Returns `params` with matrices and embeddings in `dtype`: their gradients are then summed over devices in it.

    Sharded weights are gathered in it, too. Vectors (biases, norms) stay float32.
    """
    return jax.tree.map(lambda p, info: p if info.kind == "vector" else p.astype(dtype), params, infos)


def accumulate(gradient, params, batch, key, microbatches):
    """Returns `gradient(params, batch, key)` summed over `microbatches` slices of the batch, in constant memory.

    Slice m holds rows m, m + microbatches, ...: every data shard keeps its own rows.
    """
    if microbatches == 1:
        return gradient(params, batch, key)
    slices = jax.tree.map(lambda x: x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(sums, item):
        piece, index = item
        return jax.tree.map(jnp.add, sums, gradient(params, piece, jax.random.fold_in(key, index))), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], slices), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
    return jax.lax.scan(add, zeros, (slices, jnp.arange(microbatches)))[0]
