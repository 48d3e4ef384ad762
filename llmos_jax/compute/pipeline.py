"""Pipeline parallelism inside one compiled program: GPipe, circular and 1F1B schedules over the mesh's pipeline axis.

The layers are cut into `stages x repeats` blocks; block k = c x stages + i is chunk c of stage i. All stages run in the
same tick, each on another microbatch, as a vmapped axis that is laid over the mesh axis; between ticks the activations
roll one stage on. Forward of microbatch m = g x stages + r, chunk c, stage i happens in tick
g x stages x repeats + c x stages + r + i.

`forward` is differentiable (GPipe: Huang et al. 2019; circular: with repeats). `one_forward_one_backward` (Narayanan et al.
2019 and, with repeats, 2021) differentiates nothing but single stages: backward of (m, c, i) happens in tick
g x stages x repeats + (repeats - 1 - c) x stages + r + (stages - 1 - i) + stages x repeats - 1, so the last block's backward
shares the tick of its forward and the live activations are a ring of 2 x stages x repeats - 1 stage inputs, whatever the
number of microbatches. Activations are trees of arrays whose first dimension is rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax

from llmos_jax.errors import ConfigError

SCHEDULES = ("1f1b", "gpipe", "circular")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A schedule with its numbers: stages of the mesh, repeats (blocks per stage), microbatches of a batch."""

    schedule: str
    stages: int
    repeats: int
    microbatches: int

    @property
    def ticks(self):
        """Ticks in which a forward happens: every stage is busy in `repeats x microbatches` of them."""
        return self.repeats * self.microbatches + self.stages - 1

    @property
    def bubble(self):
        """Share of a stage's time in which it has no microbatch; the same for all schedules of these numbers."""
        return (self.stages - 1) / self.ticks


def make_plan(schedule, stages, repeats, microbatches):
    """Returns the Plan; `microbatches` 0 means twice the stages. Logs a warning when stages wait for most of the time.

    Raises ConfigError on numbers that don't fit each other.
    """
    microbatches = microbatches or 2 * stages
    if (schedule == "gpipe") != (repeats == 1) and schedule != "1f1b":
        raise ConfigError(
            f"mesh.pipeline_schedule={schedule} with mesh.pipeline_repeats={repeats}: gpipe has one block per stage, circular "
            "at least two."
        )
    if repeats > 1 and microbatches % stages:
        raise ConfigError(
            f"mesh.pipeline_microbatches={microbatches} is not divisible by mesh.pipeline={stages}: with "
            f"mesh.pipeline_repeats={repeats} microbatches go round in groups of the stages."
        )
    plan = Plan(schedule, stages, repeats, microbatches)
    if microbatches < stages:
        logging.warning(
            "mesh.pipeline_microbatches=%d is less than the %d stages: a stage waits %.0f %% of the time; raise it.",
            microbatches, stages, 100 * plan.bubble,
        )  # fmt: skip
    return plan


def layer_order(plan, layers):
    """Returns the layer stored at each position of the stack: blocks of one stage lie side by side.

    Raises ConfigError when the layers can't be dealt out evenly.
    """
    blocks = plan.stages * plan.repeats
    if layers % blocks:
        parts = f"mesh.pipeline={plan.stages} x mesh.pipeline_repeats={plan.repeats}"
        fitting = [size for size in range(1, layers + 1) if layers % size == 0]
        raise ConfigError(f"model.layers={layers} is not divisible by {parts}; the product can be one of {fitting}.")
    per_block = layers // blocks
    order = np.arange(layers).reshape(plan.repeats, plan.stages, per_block).swapaxes(0, 1)
    return tuple(order.reshape(-1).tolist())


def forward(run, stacked, x, context, key, plan, placement, *, remat):
    """Returns x after all layers, microbatch by microbatch; differentiable.

    Args:
      run: `run(block, x, context, key, first) -> x`: a block of layers (leading axis of every leaf), the first of which is
        layer number `first`.
      stacked: all layers in `layer_order`. x, context: trees with rows leading; context may be None. key: or None.
      remat: whether the backward pass keeps nothing of a tick but its inputs.

    Microbatch m gets rows m, m + microbatches, ... and the key folded with m. Raises ConfigError when the rows don't divide.
    """
    rows = jax.tree.leaves(x)[0].shape[0]
    if rows % plan.microbatches:
        raise ConfigError(f"{rows} rows are not divisible by mesh.pipeline_microbatches={plan.microbatches}.")
    blocks, per_block = _split(stacked, plan)
    pieces, contexts = cut(x, plan.microbatches), cut(context, plan.microbatches)

    def stage(index, blocks, x, tick):
        chunk, microbatch, _ = _clock(plan, tick - index)
        folded = None if key is None else jax.random.fold_in(key, microbatch)
        first = (chunk * plan.stages + index) * per_block
        return run(_at(blocks, chunk), x, _at(contexts, microbatch), folded, first)

    stages = jax.vmap(stage, (0, 0, 0, None), spmd_axis_name="pipeline")

    def tick(carry, number):
        chunk, microbatch, _ = _clock(plan, number)
        fresh = _at(pieces, microbatch)
        entering = jax.tree.map(lambda new, old: old.at[0].set(jnp.where(chunk == 0, new, old[0])), fresh, carry)
        leaving = _stage_constrain(placement, stages(jnp.arange(plan.stages), blocks, entering, number))
        last = jax.tree.map(lambda y: _only(y, plan.stages - 1), leaving)
        return _roll(placement, leaving, 1), last

    if remat:
        tick = jax.checkpoint(tick)
    zeros = jax.tree.map(lambda piece: jnp.zeros((plan.stages, *piece.shape[1:]), piece.dtype), pieces)
    _, outputs = lax.scan(tick, _stage_constrain(placement, zeros), jnp.arange(plan.ticks))
    microbatches = np.arange(plan.microbatches)
    group, rank = microbatches // plan.stages, microbatches % plan.stages
    done = group * plan.stages * plan.repeats + (plan.repeats - 1) * plan.stages + rank + plan.stages - 1
    return join(jax.tree.map(lambda y: y[done], outputs), placement)


def one_forward_one_backward(start, run, finish, plan, placement, constrain):
    """Returns `gradient(shared, stacked, pieces, keys) -> (finish's sums, (shared gradient, stacked gradient))`.

    Args:
      start: `start(shared, piece, key) -> (x, context)`: what comes before the layers; context may not depend on `shared`.
      run: as in `forward`, with `context` as `start` returns it and no key of its own: `run(block, x, context, first)`.
      finish: `finish(shared, x, piece, key) -> (total, rest)`: what comes after; gradients are of `total`.
      constrain: `constrain(shared gradient, split stacked gradient)` lays out the accumulators.

    `pieces`: the batch cut into microbatches (see `cut`), `keys`: one each. Sums and gradients are added over microbatches in
    float32. Start and finish are computed by all stages together in every tick, so none idles for them.
    """
    stages, repeats, depth = plan.stages, plan.repeats, plan.stages * plan.repeats
    indices = jnp.arange(stages)

    def gradient(shared, stacked, pieces, keys):
        blocks, per_block = _split(stacked, plan)
        forwards, backwards = _stage_ticks(run, plan, per_block)

        def contexts(since, *, is_backward=False):
            """Returns the contexts of what each stage works on: made anew in every tick, so only so many are alive."""
            microbatches = _clock(plan, since, is_backward=is_backward)[1]
            items = jax.tree.map(lambda x: x[microbatches], (pieces, keys))
            return lax.map(lambda item: start(shared, *item)[1], items)

        def tick(has_forward, has_backward, carry, number):
            x, cotangent, ring, of_blocks, of_shared, sums = carry
            last = jax.tree.map(lambda z: jnp.zeros(z.shape[1:], z.dtype), x)
            if has_forward:
                entering = _clock(plan, number)[1]
                fresh, _ = start(shared, _at(pieces, entering), keys[entering])
                y, ring = forwards(indices, contexts(number - indices), blocks, fresh, x, ring, number)
                y, x = _stage_constrain(placement, y), _roll(placement, y, 1)
            if has_forward and has_backward:
                chunk, leaving, _ = _clock(plan, number - (stages - 1))
                y = jax.tree.map(lambda z: _only(z, stages - 1), y)

                def with_finish(of_shared, sums):
                    piece, key = _at(pieces, leaving), keys[leaving]
                    total, pullback, rest = jax.vjp(lambda s, y: finish(s, y, piece, key), shared, y, has_aux=True)
                    of_this, of_y = pullback(jnp.ones_like(total))
                    return of_y, jax.tree.map(_add, of_shared, of_this), jax.tree.map(_add, sums, (total, rest))

                if repeats == 1:
                    last, of_shared, sums = with_finish(of_shared, sums)
                else:
                    last, of_shared, sums = lax.cond(
                        chunk == repeats - 1, with_finish, lambda *same: (last, *same), of_shared, sums
                    )
            if has_backward:
                context = contexts(_since_backward(plan, indices, number), is_backward=True)
                of_x, of_blocks = backwards(indices, context, blocks, last, cotangent, ring, of_blocks, number)
                chunk, started, is_real = _clock(plan, number - (depth - 1) - (stages - 1), is_backward=True)
                first = jax.tree.map(lambda z: jnp.where(is_real & (chunk == 0), _only(z, 0), 0), of_x)
                piece, key = _at(pieces, started), keys[started]
                of_this = jax.vjp(lambda s: start(s, piece, key)[0], shared)[1](first)[0]
                of_shared = jax.tree.map(_add, of_shared, of_this)
                cotangent = _roll(placement, _stage_constrain(placement, of_x), -1)
            of_shared, of_blocks = constrain(of_shared, of_blocks)
            return (x, cotangent, ring, of_blocks, of_shared, sums), None

        piece, key = _at(pieces, 0), keys[0]
        of_start, _ = jax.eval_shape(start, shared, piece, key)
        of_finish = jax.eval_shape(finish, shared, of_start, piece, key)
        x = _stage_constrain(placement, _zeros(of_start, stages))
        ring = _stage_constrain(placement, _zeros(of_start, stages, _ring_slots(plan)), 2)
        totals = constrain(_zeros(shared, dtype=jnp.float32), _zeros(blocks, dtype=jnp.float32))
        carry = (x, x, ring, *totals[::-1], _zeros(of_finish))
        ends = (0, depth - 1, plan.ticks, plan.ticks + depth - 1)
        for phase, (lo, hi) in zip(
            ((True, False), (True, True), (False, True)), zip(ends, ends[1:], strict=False), strict=True
        ):
            if hi > lo:
                carry, _ = lax.scan(lambda c, t, phase=phase: tick(*phase, c, t), carry, jnp.arange(lo, hi))
        _, _, _, of_blocks, of_shared, sums = carry
        of_stacked = jax.tree.map(lambda g: g.reshape(-1, *g.shape[3:]), of_blocks)
        return sums, (of_shared, of_stacked)

    return gradient


def _ring_slots(plan):
    """Ticks from a block's forward to its backward, at most: so many inputs of a stage are alive."""
    return 2 * plan.stages * plan.repeats - 1


def _since_backward(plan, index, tick):
    """Returns how long before `tick` the first backward of a stage could begin."""
    return tick - (plan.stages * plan.repeats - 1) - (plan.stages - 1 - index)


def _stage_ticks(run, plan, per_block):
    """Returns what all stages do forward and backward in a tick of 1F1B: functions of one stage, vmapped over all."""
    stages, repeats, slots, depth = plan.stages, plan.repeats, _ring_slots(plan), plan.stages * plan.repeats

    def run_chunk(block, x, context, chunk, index):
        return run(block, x, context, (chunk * stages + index) * per_block)

    def forward_stage(index, context, blocks, fresh, x, ring, tick):
        chunk, _, _ = _clock(plan, tick - index)
        x = jax.tree.map(lambda new, old: jnp.where((index == 0) & (chunk == 0), new, old), fresh, x)
        ring = jax.tree.map(lambda r, z: lax.dynamic_update_index_in_dim(r, z, tick % slots, 0), ring, x)
        return run_chunk(_at(blocks, chunk), x, context, chunk, index), ring

    def backward_stage(index, context, blocks, last, cotangent, ring, total, tick):
        since = _since_backward(plan, index, tick)
        chunk, _, is_real = _clock(plan, since, is_backward=True)
        born = (since // depth) * depth + chunk * stages + since % stages + index  # the tick of its forward
        is_last = (index == stages - 1) & (chunk == repeats - 1)
        cotangent = jax.tree.map(lambda new, old: jnp.where(is_last, new, old), last, cotangent)
        _, pullback = jax.vjp(
            lambda block, x: run_chunk(block, x, context, chunk, index), _at(blocks, chunk), _at(ring, born % slots)
        )
        of_block, of_x = pullback(cotangent)
        total = jax.tree.map(lambda sum_, new: sum_.at[chunk].add(jnp.where(is_real, new, 0)), total, of_block)
        return of_x, total

    forwards = jax.vmap(forward_stage, (0, 0, 0, None, 0, 0, None), spmd_axis_name="pipeline")
    return forwards, jax.vmap(backward_stage, (0, 0, 0, None, 0, 0, 0, None), spmd_axis_name="pipeline")


def cut(tree, microbatches):
    """Returns `tree` with leaves [rows, ...] as [microbatches, rows / microbatches, ...].

    Microbatch m holds rows m, m + microbatches, ...: every data shard keeps its own rows.
    """
    return jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), tree)


def join(tree, placement):
    """Returns what `cut` cut as it was."""

    def whole(x):
        x = x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return placement.constrain(x, *_axes(x.ndim))

    return jax.tree.map(whole, tree)


def _clock(plan, since, *, is_backward=False):
    """Returns (chunk, microbatch, whether there is one) of a stage `since` ticks after its first work could begin.

    The microbatch is clipped to those that exist, so that it can be used as an index in any tick.
    """
    chunk = (since // plan.stages) % plan.repeats
    microbatch = (since // (plan.stages * plan.repeats)) * plan.stages + since % plan.stages
    is_real = (since >= 0) & (since < plan.repeats * plan.microbatches)
    chunk = plan.repeats - 1 - chunk if is_backward else chunk
    return chunk, jnp.clip(microbatch, 0, plan.microbatches - 1), is_real


def _split(stacked, plan):
    """Returns leaves [layers, ...] as [stages, repeats, layers per block, ...], and the layers per block."""
    per_block = jax.tree.leaves(stacked)[0].shape[0] // (plan.stages * plan.repeats)
    return jax.tree.map(lambda x: x.reshape(plan.stages, plan.repeats, per_block, *x.shape[1:]), stacked), per_block


def _at(tree, index):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), tree)


def _only(x, stage):
    """Returns what stage `stage` holds, on all stages; a sum, because slicing a sharded axis would gather it."""
    is_it = (jnp.arange(x.shape[0]) == stage).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(is_it, x, 0).sum(0, dtype=x.dtype)


def _add(total, new):
    return total + new.astype(total.dtype)


def _zeros(tree, *lead, dtype=None):
    return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), dtype or x.dtype), tree)


def _roll(placement, tree, by):
    return _stage_constrain(placement, jax.tree.map(lambda x: jnp.roll(x, by, 0), tree))


def _axes(ndim):
    """Logical axes of one leaf of the activations: rows, then positions where it has positions and features."""
    return ("batch", *(["residual_length"] if ndim > 2 else []), *[None] * (ndim - (2 if ndim > 2 else 1)))


def _stage_constrain(placement, tree, lead=1):
    """Lays leaves [stages, ..., rows, ...] out: stages over the pipeline axis, the rest as between two blocks."""

    def place(x):
        return placement.constrain(x, "layers", *[None] * (lead - 1), *_axes(x.ndim - lead))

    return jax.tree.map(place, tree)
