"""The guard against bad steps, inside jit: a skipped step leaves no trace, as if its batch had never been seen."""

import jax.numpy as jnp

from llmos_jax.errors import TrainingDiverged

# Weight of the newest gradient norm in the running mean.
_NORM_UPDATE = 0.1


def initial_guard():
    """Returns the guard's state: counters and the running mean of gradient norms, all on the device."""
    zero = jnp.int32(0)
    return {
        "skipped": zero,  # steps skipped since the start
        "skipped_in_a_row": zero,
        "norm_mean": jnp.float32(0),
        "seen": zero,  # batches seen since the start, skipped ones included
        "bad_leaf": jnp.int32(-1),  # first leaf (in tree order) with a non-finite gradient, of the latest skipped step
        "bad_batch": jnp.int32(-1),  # index of the latest skipped batch
    }


def judge(config, guard, step, loss, square_norms):
    """Returns (is_good, norm, new guard): whether to apply this step, and the global gradient norm.

    Bad is a non-finite loss or gradient norm, or a norm above `spike_factor` x the running mean once
    `spike_warmup_steps` updates were applied. `square_norms`: one squared norm per gradient leaf. Nothing is read by the
    host.
    """
    square_norms = jnp.stack(square_norms)
    norm = jnp.sqrt(square_norms.sum())
    is_good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike_factor is not None:
        is_trusted = step >= config.spike_warmup_steps
        is_good &= ~is_trusted | (norm <= config.spike_factor * guard["norm_mean"])
    is_finite = jnp.isfinite(square_norms)
    bad_leaf = jnp.where(is_finite.all(), -1, jnp.argmin(is_finite)).astype(jnp.int32)
    first = guard["norm_mean"] == 0
    mean = jnp.where(first, norm, guard["norm_mean"] + _NORM_UPDATE * (norm - guard["norm_mean"]))
    skipped = (~is_good).astype(jnp.int32)
    return (
        is_good,
        norm,
        {
            "skipped": guard["skipped"] + skipped,
            "skipped_in_a_row": jnp.where(is_good, 0, guard["skipped_in_a_row"] + 1).astype(jnp.int32),
            "norm_mean": jnp.where(is_good, mean, guard["norm_mean"]),
            "bad_leaf": jnp.where(is_good, guard["bad_leaf"], bad_leaf),
            "bad_batch": jnp.where(is_good, guard["bad_batch"], guard["seen"]).astype(jnp.int32),
            "seen": guard["seen"] + 1,
        },
    )


def check(config, guard, leaf_names):
    """Raises TrainingDiverged, naming batch and leaf, when too many steps in a row were skipped (host side)."""
    in_a_row = int(guard["skipped_in_a_row"])
    if in_a_row < config.max_skipped:
        return
    leaf, batch = int(guard["bad_leaf"]), int(guard["bad_batch"])
    cause = f"the first non-finite gradient is {leaf_names[leaf]}" if leaf >= 0 else "the gradient norm exploded"
    raise TrainingDiverged(
        f"{in_a_row} steps in a row were skipped, the last at batch {batch}: {cause}. Lower optim.learning_rate or look "
        "at the data of that batch; the newest checkpoint is from before."
    )
