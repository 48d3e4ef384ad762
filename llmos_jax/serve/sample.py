"""Choosing the next token from logits: greedy, temperature, top-k, top-p; reproducible per row."""

import dataclasses

import jax
import jax.numpy as jnp

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    max_tokens: int = setting(256, help="longest continuation, tokens", at_least=1)
    temperature: float = setting(0.8, help="0: always the likeliest token; 1: the model's own distribution", at_least=0.0)
    top_k: int | None = setting(None, help="draw from this many likeliest tokens; none: all", at_least=1)
    top_p: float | None = setting(None, help="draw from the smallest set with this much probability", above=0.0, at_most=1.0)
    seed: int = setting(0, help="of the draws", at_least=0, at_most=2**32 - 1)
    stop: tuple[str, ...] = setting((), help="texts that end a continuation (not part of it)")

    def __post_init__(self):
        if "" in self.stop:
            raise ConfigError("stop: an empty text would end every continuation before it begins.")


def choose(logits_BV, keys_B, config):
    """Returns the next tokens [B], int32; `keys_B` is one random key a row, so rows don't depend on each other."""
    if config.temperature == 0.0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / config.temperature
    if config.top_k is not None or config.top_p is not None:
        logits_BV = jnp.where(logits_BV >= threshold(logits_BV, config.top_k, config.top_p), logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def threshold(logits_BV, top_k=None, top_p=None):
    """Returns the smallest logit [B, 1] that top-k and top-p (Holtzman et al. 2020) keep; the likeliest always stays."""
    falling = -jnp.sort(-logits_BV, axis=-1)
    kept = jnp.ones(falling.shape, bool)
    if top_k is not None:
        kept &= jnp.arange(falling.shape[-1]) < top_k
    if top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(kept, falling, -jnp.inf), axis=-1)
        kept &= jnp.cumsum(probabilities, -1) - probabilities < top_p
    return jnp.where(kept, falling, jnp.inf).min(-1, keepdims=True)
