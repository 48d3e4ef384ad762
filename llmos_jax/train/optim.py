"""Optimizers (optax) and learning-rate schedules.

Optimizers are built with a learning rate of one; the step multiplies their update by the schedule's value. So the rate
is a function of training progress alone, be it counted in steps or in seconds.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import optax

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError

# Settings of the moments that an optimizer has not.
_WITHOUT_EFFECT = {"adafactor": ("beta1", "beta2", "epsilon"), "lion": ("epsilon",)}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule, clipping, weight averaging and the guard against bad steps."""

    name: str = setting("adamw", help="optimizer", choices=("adamw", "lion", "adafactor", "muon"))
    learning_rate: float = setting(6e-4, help="peak learning rate", above=0.0)
    schedule: str = setting("cosine", help="shape after warm-up", choices=("cosine", "linear", "wsd", "constant"))
    warmup: float = setting(0.02, help="share of training spent warming up linearly", at_least=0.0, at_most=1.0)
    decay: float = setting(0.2, help="wsd: share of training spent in the final linear decay", at_least=0.0, at_most=1.0)
    final_share: float = setting(0.1, help="final learning rate as a share of the peak", at_least=0.0, at_most=1.0)
    beta1: float = setting(0.9, help="decay of the first moment", at_least=0.0, below=1.0)
    beta2: float = setting(0.95, help="decay of the second moment", at_least=0.0, below=1.0)
    epsilon: float = setting(1e-8, help="added to the root of the second moment", above=0.0)
    weight_decay: float = setting(0.1, help="decoupled weight decay of matrices and embeddings", at_least=0.0)
    clip_norm: float | None = setting(1.0, help="largest global gradient norm; none: no clipping", above=0.0)
    gradient_dtype: str = setting(
        "float32",
        help="dtype in which gradients of matrices are summed over devices; bfloat16 halves the traffic, and that of gathers",
        choices=("float32", "bfloat16"),
    )
    ema: float | None = setting(None, help="decay of the averaged weights used in evaluation; none: off", above=0.0, below=1.0)
    spike_factor: float | None = setting(
        10.0, help="skip steps whose gradient norm exceeds this many times its running mean; none: never", above=1.0
    )
    spike_warmup_steps: int = setting(20, help="steps before the running mean of gradient norms is trusted", at_least=1)
    max_skipped: int = setting(10, help="stop after this many skipped steps in a row", at_least=1)

    def __post_init__(self):
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ConfigError(f"optim.warmup={self.warmup} + optim.decay={self.decay} exceed the whole training (1.0).")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _WITHOUT_EFFECT.get(self.name, ()):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"optim.{name}={getattr(self, name)} has no effect with optim.name={self.name}: leave it out."
                )


def schedule(config, progress):
    """Returns the learning rate at `progress` in [0, 1] (share of training done), a float32 scalar; jit-safe."""
    progress = jnp.clip(progress, 0.0, 1.0)
    warm = jnp.minimum(1.0, progress / config.warmup) if config.warmup else 1.0
    after = jnp.clip((progress - config.warmup) / max(1.0 - config.warmup, 1e-9), 0.0, 1.0)
    if config.schedule == "cosine":
        share = config.final_share + (1 - config.final_share) * 0.5 * (1 + jnp.cos(jnp.pi * after))
    elif config.schedule == "linear":
        share = 1 - (1 - config.final_share) * after
    elif config.schedule == "wsd":
        falling = jnp.clip((progress - (1 - config.decay)) / max(config.decay, 1e-9), 0.0, 1.0)
        share = 1 - (1 - config.final_share) * falling
    else:
        share = 1.0
    return jnp.asarray(config.learning_rate * warm * share, jnp.float32)


def make_optimizer(config, parameters):
    """Returns the optax transformation of `config` at learning rate one, without clipping.

    `parameters`: a tree of `state.ParameterInfo`, which tells matrices, embeddings and vectors apart. Muon
    (Jordan et al. 2024) orthogonalises matrices, its update scaled to AdamW's RMS (Liu et al. 2025) so that learning
    rates carry over; everything else gets AdamW.
    """
    is_decayed = jax.tree.map(lambda info: info.kind != "vector", parameters)
    if config.name == "adamw":
        return optax.adamw(1.0, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay, mask=is_decayed)
    if config.name == "lion":
        return optax.lion(1.0, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=is_decayed)
    if config.name == "adafactor":
        # The rate is absolute, as for the others, not relative to each parameter's scale.
        return optax.adafactor(
            1.0,
            multiply_by_parameter_scale=False,
            weight_decay_rate=config.weight_decay or None,
            weight_decay_mask=is_decayed,
        )
    return optax.contrib.muon(
        1.0,
        beta=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        adam_weight_decay=config.weight_decay,
        weight_decay_mask=is_decayed,
        muon_weight_dimension_numbers=jax.tree.map(_muon_dimensions, parameters),
        consistent_rms=0.2,
    )


def _muon_dimensions(info):
    if info.kind != "matrix":
        return None
    # Each layer's and each expert's matrix is one of its own.
    first = len(list(itertools.takewhile(("layers", "experts").__contains__, info.axes)))
    split = first + info.inputs
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, len(info.axes))))
