"""Llama 2 and 3 (Touvron et al. 2023; Dubey et al. 2024): RMSNorm, rotary positions, SwiGLU, grouped queries, no biases."""

import dataclasses

import jax
import jax.numpy as jnp

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError
from llmos_jax.models import decoder
from llmos_jax.models.decoder import INITIAL_STDDEV, residual_stddev
from llmos_jax.models.layers import Linear, RMSNorm, RopeConfig, parameter, rope_frequencies, swiglu

# The MLP's width is 8/3 of the model's, so that its three matrices weigh as much as two of 4 x; rounded up to this.
_MLP_MULTIPLE = 256


@dataclasses.dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Architecture and execution of a Llama."""

    name: str = setting("llama", help="model family", choices=("llama",))
    kv_heads: int = setting(0, help="heads of keys and values, each shared by heads / kv_heads queries; 0: heads", at_least=0)
    head_width: int = setting(0, help="width of one attention head; 0: width / heads", at_least=0)
    mlp: int = setting(0, help="hidden width of the MLP; 0: 8/3 x width, rounded up to 256", at_least=0)
    norm_epsilon: float = setting(1e-5, help="added to the mean square in norms", above=0.0)
    rope: RopeConfig = setting(RopeConfig(), help="rotary positions")
    is_tied: bool = setting(False, help="the head is the embedding")

    def __post_init__(self):
        super().__post_init__()
        if not self.head_width and self.width % self.heads:
            raise ConfigError(
                f"model.width={self.width} is not divisible by model.heads={self.heads}; or set model.head_width."
            )
        if self.heads % self.groups:
            raise ConfigError(f"model.heads={self.heads} is not divisible by model.kv_heads={self.kv_heads}.")
        if self.head_size % 2:
            raise ConfigError(
                f"heads are {self.head_size} wide, and rotary positions turn pairs: set an even model.head_width."
            )

    @property
    def groups(self):
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def head_size(self):
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def hidden(self):
        """Hidden width of the MLP."""
        return self.mlp or -(-8 * self.width // (3 * _MLP_MULTIPLE)) * _MLP_MULTIPLE


class Attention(decoder.Attention):
    """Grouped-query attention (Ainslie et al. 2023): keys and values in one projection, heads outermost."""

    def __init__(self, config, *, rngs):
        heads, groups, size = config.heads, config.groups, config.head_size
        given = dict(stddev=INITIAL_STDDEV, has_bias=False, rngs=rngs)
        self.query = Linear((config.width,), (heads, size), ("embed",), ("heads", "head_size"), **given)
        self.key_value = Linear((config.width,), (groups, 2, size), ("embed",), ("heads", None, "head_size"), **given)
        given["stddev"] = residual_stddev(config)
        self.output = Linear((heads, size), (config.width,), ("heads", "head_size"), ("embed",), **given)
        self.window, self.implementation = config.window, config.attention

    def project(self, x_BLD):
        """Returns query [B, L, H, K], key and value [B, L, G, K]."""
        key_value = self.key_value(x_BLD)
        return self.query(x_BLD), key_value[..., 0, :], key_value[..., 1, :]


class Block(decoder.Block):
    """A block whose MLP is down(silu(gate(x)) * up(x)) (Shazeer 2020); gate and up are one projection."""

    def __init__(self, config, placement, *, rngs):
        self.attention_norm = RMSNorm(config.width, rngs=rngs, epsilon=config.norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, rngs=rngs, epsilon=config.norm_epsilon)
        given = dict(has_bias=False, rngs=rngs)
        self.gate_up = Linear((config.width,), (2, config.hidden), ("embed",), (None, "mlp"), stddev=INITIAL_STDDEV, **given)
        self.down = Linear((config.hidden,), (config.width,), ("mlp",), ("embed",), stddev=residual_stddev(config), **given)
        self.dropout, self.placement, self.is_sparse = config.dropout, placement, False

    def transform(self, x_BLD):
        """Returns the MLP of x."""
        return self.down(self.placement.constrain(swiglu(self.gate_up(x_BLD)), "batch", "length", "mlp"))


class Llama(decoder.Decoder):
    """A decoder with rotary positions and, unless tied, a head of its own."""

    def __init__(self, config, placement, *, rngs):
        self.add_embedding(config, placement, rngs=rngs)
        self.add_stack(lambda rngs: Block(config, placement, rngs=rngs), rngs=rngs)
        self.norm = RMSNorm(config.width, rngs=rngs, epsilon=config.norm_epsilon)
        if not config.is_tied:
            shape, normal = (config.vocab_size, config.width), jax.nn.initializers.normal(INITIAL_STDDEV)
            self.head = parameter(rngs, shape, ("vocab", "embed"), normal, kind="embedding")

    @property
    def head_weight(self):
        """The head's weight [V, D]."""
        return self.embedding[...] if self.config.is_tied else self.head[...]

    def rotation(self, positions_BL):
        """Returns (cosine, sine) of every position's angles, float32 [B, L, K / 2] each."""
        frequencies_K = jnp.asarray(rope_frequencies(self.config.rope, self.config.head_size), jnp.float32)
        angles_BLK = positions_BL[..., None].astype(jnp.float32) * frequencies_K
        return jnp.cos(angles_BLK), jnp.sin(angles_BLK)


def build(config, placement, *, rngs):
    """Returns a Llama with parameters drawn from `rngs`; call it under `jax.eval_shape` or jit for sharded placement.

    Raises ConfigError when heads or mlp can't be laid over the model axis.
    """
    sizes = dict(heads=(config.heads, "heads"), kv_heads=(config.groups, "heads"), mlp=(config.hidden, "mlp"))
    decoder.check_shards(placement, **sizes)
    return Llama(config, placement, rngs=rngs)


def cache_shapes(config, rows, length):
    """Returns the shape of one layer's key (or value) cache, and the number of layers."""
    return (rows, config.groups, length, config.head_size), config.layers


def parameter_count(config):
    """Returns the number of parameters."""
    embeddings = config.vocab_size * config.width * (1 if config.is_tied else 2)
    return config.layers * (_block_weights(config) + 2 * config.width) + embeddings + config.width


def flops_per_token(config, length):
    """Returns training FLOPs (forward and backward) per token of rows of `length` tokens, counted as in `gpt.py`."""
    weights = config.layers * _block_weights(config) + config.vocab_size * config.width
    attention = 12 * config.layers * config.heads * config.head_size * min(length, config.window or length)
    return 6 * weights + attention


def _block_weights(config):
    attention = 2 * config.width * config.head_size * (config.heads + config.groups)
    return attention + 3 * config.width * config.hidden
