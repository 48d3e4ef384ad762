"""The compiled training step: gradients over microbatches, clipping, guard, update, weight averaging."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from llmos_jax.compute import pipeline
from llmos_jax.errors import ConfigError
from llmos_jax.train import guard
from llmos_jax.train.optim import schedule
from llmos_jax.train.state import TrainState


def make_step(loss, handle, optimizer, config, *, seed, steps, microbatches=1, privatizer=None):
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
      privatizer: `private_step.Privatizer`; gradients are then clipped by document, noised, and divided by what a batch holds
        on average.

    `clock` is the share of the planned wall time that is used up (0 without `max_seconds`). Metrics are scalars on the
    device, and the guard's counters under "guard". Nothing is read by the host.
    """

    def loss_of(params, batch, key):
        total, weight, sums = loss(handle.merge(params), batch, key)
        return total, (weight, sums)

    plan = handle.placement.pipeline
    if privatizer is not None:
        gradient, microbatches = privatizer.gradient(loss, handle), 1
    elif plan is not None and plan.schedule == "1f1b":
        gradient, microbatches = pipelined_gradient(loss, handle, microbatches), 1
    else:
        gradient = jax.value_and_grad(loss_of, has_aux=True)

    def step(state, batch, clock):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        params = reduced_in(config.gradient_dtype, state.params, handle.infos)
        (total, (weight, sums)), gradients = accumulate(gradient, params, batch, key, microbatches, handle)
        # ZeRO: gradients are scattered to the devices that update with them, still in the dtype of their reduction.
        gradients = jax.lax.with_sharding_constraint(gradients, handle.optimizer_shardings)
        scale = 1.0 / jnp.maximum(weight, 1.0)
        if privatizer is None:
            gradients, judged = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients), total
        else:  # whether a step is skipped must follow from what is released: the loss is not
            gradients, judged = privatizer.average(gradients, batch, handle), jnp.float32(0)
        squares = [jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients)]
        is_good, norm, guarded = guard.judge(config, state.guard, state.step, judged, squares)
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


def accumulate(gradient, params, batch, key, microbatches, handle):
    """Returns `gradient(params, batch, key)` summed over `microbatches` slices of the batch, in constant memory.

    Sums are float32; those of gradients lie where the update needs them (with ZeRO: scattered in every slice).
    """
    if microbatches == 1:
        return gradient(params, batch, key)
    slices = pipeline.cut(batch, microbatches)

    def add(sums, item):
        piece, index = item
        values, gradients = jax.tree.map(jnp.add, sums, gradient(params, piece, jax.random.fold_in(key, index)))
        return (values, jax.lax.with_sharding_constraint(gradients, handle.optimizer_shardings)), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], slices), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
    return jax.lax.scan(add, zeros, (slices, jnp.arange(microbatches)))[0]


def pipelined_gradient(loss, handle, microbatches):
    """Returns what `jax.value_and_grad(loss)` would be, by the 1F1B schedule.

    `loss` and the model know nothing of it: the program is cut at the model's stack of blocks, which is made to hand out
    what it was given (the part before), and to hand in what the pipeline made (the part after). Every one of `microbatches`
    slices of the batch is cut again by the schedule; their memory is that of one.
    """
    placement, plan = handle.placement, handle.placement.pipeline
    plan = dataclasses.replace(plan, microbatches=plan.microbatches * microbatches)
    path, stack = handle.stack
    if stack is None:
        raise ConfigError(
            "mesh.pipeline_schedule=1f1b needs a model with exactly one stack of blocks: set mesh.pipeline=1, or take gpipe."
        )

    def call(shared, replacement, piece, key):
        model = handle.merge(_replaced(shared, path, _get(handle.shapes, path)))
        found = functools.reduce(getattr, path, model)
        found.replacement = replacement
        return loss(model, piece, key)

    def start(shared, piece, key):
        given = []
        call(shared, lambda x, context, key: given.append((x, context, key)) or x, piece, key)
        ((x, context, key),) = given
        return x, (context, key)

    def run(block, x, context, first):
        return stack.run(block, x, *context, first)

    def finish(shared, x, piece, key):
        total, weight, sums = call(shared, lambda *_: x, piece, key)
        return total, (weight, sums)

    def constrain(of_shared, of_blocks):
        def place(infos, gradients, lead):
            lay = placement.for_optimizer.constrain
            return jax.tree.map(lambda info, g: lay(g, *lead(info.axes)), infos, gradients)

        shared_infos, stack_infos = _without(handle.infos, path), _get(handle.infos, path)
        of_shared = place(shared_infos, of_shared, lambda axes: axes)
        return of_shared, place(stack_infos, of_blocks, lambda axes: (axes[0], None, None, *axes[1:]))

    schedule = pipeline.one_forward_one_backward(start, run, finish, plan, placement, constrain)

    def gradient(params, batch, key):
        pieces = pipeline.cut(batch, plan.microbatches)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(plan.microbatches))
        values, (of_shared, of_stack) = schedule(_without(params, path), _get(params, path), pieces, keys)
        return values, _replaced(of_shared, path, of_stack)

    return gradient


def _get(tree, path):
    return functools.reduce(lambda node, name: node[name], path, tree)


def _without(tree, path):
    """Returns nested dicts without the branch at `path`."""
    name, *rest = path
    inner = {name: _without(tree[name], rest)} if rest else {}
    return {key: value for key, value in tree.items() if key != name} | inner


def _replaced(tree, path, branch):
    """Returns nested dicts with `branch` at `path`."""
    name, *rest = path
    return tree | {name: _replaced(tree.get(name, {}), rest, branch) if rest else branch}
