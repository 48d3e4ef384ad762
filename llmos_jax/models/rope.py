"""Rotary positions (Su et al. 2021): wave lengths, how they are stretched beyond the trained context, and the turning."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError

SCALINGS = ("none", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: base of the wave lengths, and how they are stretched beyond the trained context.

    linear: every wave `factor` times as long (Chen et al. 2023). dynamic: a base that grows with the row's longest position
    beyond the original context (bloc97 2023, "dynamic NTK"). yarn: waves that turn less than `beta_slow` times in the original
    context are stretched, those that turn more than `beta_fast` times are not, and attention is sharpened (Peng et al. 2023).
    longrope: every wave by its own factor, `long_factors` in rows longer than the original context, `short_factors` in
    others (Ding et al. 2024). llama3: waves longer than `original_context / low_factor` are stretched, those shorter than
    `original_context / high_factor` are not, those between in part (Dubey et al. 2024).
    """

    base: float = setting(10_000.0, help="the longest wave is about this many positions x 2 pi", above=1.0)
    share: float = setting(1.0, help="share of a head's features that is turned, the first ones", above=0.0, at_most=1.0)
    scaling: str = setting("none", help="stretching of wave lengths", choices=SCALINGS)
    factor: float = setting(8.0, help="of the stretching", at_least=1.0)
    original_context: int = setting(8192, help="context before the stretching, tokens", at_least=1)
    low_factor: float = setting(1.0, help="llama3: waves of the original context / this and longer are stretched", above=0.0)
    high_factor: float = setting(4.0, help="llama3: waves of the original context / this and shorter are not", above=0.0)
    beta_fast: float = setting(32.0, help="yarn: waves with more turns in the original context are not stretched", above=0.0)
    beta_slow: float = setting(1.0, help="yarn: waves with fewer turns in the original context are stretched", above=0.0)
    is_truncated: bool = setting(True, help="yarn: the borders of the ramp between are whole numbers")
    attention_factor: float | None = setting(None, help="yarn, longrope: sine and cosine x this; none: by factor", above=0.0)
    short_factors: tuple[float, ...] = setting((), help="longrope: of each wave, in rows of the original context", above=0.0)
    long_factors: tuple[float, ...] = setting((), help="longrope: of each wave, in longer rows", above=0.0)

    def __post_init__(self):
        if self.low_factor >= self.high_factor:
            raise ConfigError(f"rope.low_factor={self.low_factor} must be below rope.high_factor={self.high_factor}.")
        if self.beta_slow >= self.beta_fast:
            raise ConfigError(f"rope.beta_slow={self.beta_slow} must be below rope.beta_fast={self.beta_fast}.")

    @property
    def depends_on_length(self):
        """Whether a position's angles depend on how long its row is."""
        return self.scaling in ("dynamic", "longrope")

    def turned(self, head_size):
        """Returns how many of a head's features are turned."""
        return int(head_size * self.share)

    def check(self, head_size):
        """Raises ConfigError when heads of this size can't be turned so."""
        turned = self.turned(head_size)
        if turned % 2 or turned < 2 or (self.scaling == "dynamic" and turned == 2):
            raise ConfigError(
                f"heads are {head_size} wide, of which rope.share={self.share} is {turned}, and rotary positions turn pairs: "
                "set an even model.head_width."
            )
        factors = {"short_factors": self.short_factors, "long_factors": self.long_factors}
        for name, values in factors.items() if self.scaling == "longrope" else ():
            if len(values) != turned // 2:
                raise ConfigError(
                    f"rope.{name} has {len(values)} numbers, and {turned} features turn {turned // 2} waves: give one a wave."
                )


def rotation(config, head_size, positions_BL, longest_BL=None):
    """Returns (cosine, sine) of every position's angles, float32 [B, L, pairs] each: what `rotate` takes.

    longest_BL: the length of the row that each token sees, where that decides (`depends_on_length`); by default the row's
    largest position + 1. Tokens that come one by one see a longer row each; those of a prompt see all of it.
    """
    frequencies = jnp.asarray(rope_frequencies(config, head_size), jnp.float32)
    if config.depends_on_length:
        longest = positions_BL.max(-1, keepdims=True) + 1 if longest_BL is None else longest_BL
        frequencies = _by_length(config, head_size, frequencies, longest[..., None])
    angles_BLK = positions_BL[..., None].astype(jnp.float32) * frequencies
    scale = _attention_factor(config)
    return jnp.cos(angles_BLK) * scale, jnp.sin(angles_BLK) * scale


def rope_frequencies(config, head_size):
    """Returns the angle per position of each pair of a head's features, float64 [pairs], in rows of the original context."""
    turned = config.turned(head_size)
    frequencies = config.base ** (-np.arange(0, turned, 2) / turned)
    if config.scaling == "linear":
        return frequencies / config.factor
    if config.scaling == "longrope":
        return frequencies / np.array(config.short_factors)
    if config.scaling == "llama3":
        waves_in_context = config.original_context * frequencies / (2 * np.pi)
        kept = (waves_in_context - config.low_factor) / (config.high_factor - config.low_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / config.factor)
    if config.scaling == "yarn":
        return _yarn(config, turned, frequencies)
    return frequencies


def rotate(x_BLHK, rotation):
    """Returns x with the pairs (k, k + R / 2) of every head's first R features turned by (cosine, sine) [B, L, R / 2]."""
    cosine, sine = (part[:, :, None] for part in rotation)
    turned = 2 * cosine.shape[-1]
    first, second = jnp.split(x_BLHK[..., :turned].astype(jnp.float32), 2, axis=-1)
    parts = [(first * cosine - second * sine).astype(x_BLHK.dtype), (second * cosine + first * sine).astype(x_BLHK.dtype)]
    return jnp.concatenate(parts if turned == x_BLHK.shape[-1] else [*parts, x_BLHK[..., turned:]], -1)


def _by_length(config, head_size, frequencies, longest_BL1):
    """Returns the frequencies [B, L or 1, pairs] of rows that differ in length; what a row sees depends on it alone."""
    turned, original = config.turned(head_size), config.original_context
    exponents = -jnp.arange(0, turned, 2, dtype=jnp.float32) / turned
    if config.scaling == "longrope":
        stretched = jnp.asarray(config.base ** (-np.arange(0, turned, 2) / turned) / np.array(config.long_factors), jnp.float32)
        return jnp.where(longest_BL1 > original, stretched, frequencies)
    growth = config.factor * jnp.maximum(longest_BL1, original) / original - (config.factor - 1)
    return (config.base * growth ** (turned / (turned - 2))) ** exponents


def _yarn(config, turned, frequencies):
    def pair_of(turns):
        """The pair of features that turns so many times in the original context, as a real number."""
        return turned * math.log(config.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.base))

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    ramp = np.clip((np.arange(turned // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return frequencies * (1 - ramp) + frequencies / config.factor * ramp


def _attention_factor(config):
    if config.scaling not in ("yarn", "longrope") or config.factor == 1.0:
        return config.attention_factor or 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.scaling == "yarn":
        return 0.1 * math.log(config.factor) + 1.0
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_context))
