"""GPT-2 (Radford et al. 2019) and GPT-3's sizes (Brown et al. 2020): learned positions, pre-norm blocks, tied head."""

import dataclasses

import jax
import jax.numpy as jnp

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError
from llmos_jax.models import decoder, moe
from llmos_jax.models.decoder import INITIAL_STDDEV, residual_stddev
from llmos_jax.models.layers import LayerNorm, Linear, gelu, parameter


@dataclasses.dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Architecture and execution of a GPT."""

    name: str = setting("gpt", help="model family", choices=("gpt",))
    mlp: int = setting(0, help="hidden width of the MLP; 0: 4 x width", at_least=0)
    experts: int = setting(0, help="routed MLPs per block (mixture of experts); 0: one dense MLP", at_least=0)
    experts_per_token: int = setting(2, help="routed experts that see a token", at_least=1)
    shared_experts: int = setting(0, help="experts beside the routed ones that see every token", at_least=0)
    expert_mlp: int = setting(0, help="hidden width of one expert; 0: that of the dense MLP", at_least=0)
    expert_capacity: float | None = setting(
        None, help="tokens that an expert takes of a row, as a multiple of an equal share; none: all (dropless)", above=0.0
    )
    router_balance: float = setting(0.01, help="weight of the load-balance loss of each layer", at_least=0.0)
    router_z_loss: float = setting(0.001, help="weight of the squared logsumexp of the router's logits", at_least=0.0)

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(f"model.width={self.width} is not divisible by model.heads={self.heads}.")
        if self.experts and self.experts_per_token > self.experts:
            raise ConfigError(
                f"model.experts_per_token={self.experts_per_token} is more than the model.experts={self.experts} there are."
            )
        if self.shared_experts and not self.experts:
            raise ConfigError(
                f"model.shared_experts={self.shared_experts} with model.experts=0: set model.experts, or widen model.mlp."
            )

    @property
    def head_size(self):
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def hidden(self):
        """Hidden width of the MLP."""
        return self.mlp or 4 * self.width

    @property
    def expert_hidden(self):
        """Hidden width of one expert."""
        return self.expert_mlp or self.hidden


class Attention(decoder.Attention):
    """Multi-head self-attention with one fused projection, heads outermost so that they can be sharded."""

    def __init__(self, config, *, rngs):
        heads, size = config.heads, config.head_size
        self.qkv = Linear(
            (config.width,),
            (heads, 3, size),
            ("embed",),
            ("heads", None, "head_size"),
            stddev=INITIAL_STDDEV,
            rngs=rngs,
        )
        self.output = Linear(
            (heads, size),
            (config.width,),
            ("heads", "head_size"),
            ("embed",),
            stddev=residual_stddev(config),
            rngs=rngs,
        )
        self.window, self.implementation = config.window, config.attention

    def project(self, x_BLD):
        """Returns query, key and value, each [B, L, H, K]."""
        qkv = self.qkv(x_BLD)
        return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]


class Block(decoder.Block):
    """A block whose MLP is down(gelu(up(x))), or a mixture of experts."""

    def __init__(self, config, placement, *, rngs):
        self.attention_norm = LayerNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, rngs=rngs)
        self.is_sparse = config.experts > 0
        if self.is_sparse:
            self.experts = _experts(config, placement, rngs)
        else:
            axes = (("embed",), ("mlp",))
            self.up = Linear((config.width,), (config.hidden,), *axes, stddev=INITIAL_STDDEV, rngs=rngs)
            self.down = Linear((config.hidden,), (config.width,), *axes[::-1], stddev=residual_stddev(config), rngs=rngs)
        self.dropout, self.placement = config.dropout, placement

    def transform(self, x_BLD):
        """Returns the dense MLP of x."""
        return self.down(self.placement.constrain(gelu(self.up(x_BLD)), "batch", "length", "mlp"))


class GPT(decoder.Decoder):
    """A decoder with learned positions and a tied head."""

    def __init__(self, config, placement, *, rngs):
        self.add_embedding(config, placement, rngs=rngs)
        normal = jax.nn.initializers.normal(INITIAL_STDDEV)
        self.positions = parameter(rngs, (config.context, config.width), ("positions", "embed"), normal, kind="embedding")
        self.add_stack(lambda rngs: Block(config, placement, rngs=rngs), is_sparse=config.experts > 0, rngs=rngs)
        self.norm = LayerNorm(config.width, rngs=rngs)

    def embed(self, tokens_BL, positions_BL):
        """Returns the embeddings of tokens at their positions, [B, L, D]."""
        # Gathered first, or every device would look up everybody's positions; but where the length is sharded, a whole table
        # is longer than what a device holds: there it looks up some features of all positions, and exchanges them.
        positions_PD = self.placement.constrain(self.positions[...], "positions", "length")
        rows_BLD = self.placement.constrain(jnp.take(positions_PD, positions_BL, axis=0), "batch", None, "length")
        rows_BLD = self.placement.constrain(rows_BLD, "batch", "length", None)
        x_BLD = super().embed(tokens_BL, positions_BL).astype(jnp.float32) + rows_BLD
        return decoder.residual(self.placement, x_BLD.astype(self.dtype))


def build(config, placement, *, rngs):
    """Returns a GPT with parameters drawn from `rngs`; call it under `jax.eval_shape` or jit for sharded placement.

    Raises ConfigError when heads or mlp can't be laid over the model axis, or experts over theirs.
    """
    sizes = dict(heads=(config.heads, "heads"))
    if config.experts:
        sizes |= dict(experts=(config.experts, "experts"), expert_mlp=(config.expert_hidden, "mlp"))
    else:
        sizes |= dict(mlp=(config.hidden, "mlp"))
    decoder.check_shards(placement, **sizes)
    return GPT(config, placement, rngs=rngs)


def cache_shapes(config, rows, length):
    """Returns the shape of one layer's key (or value) cache, and the number of layers."""
    return (rows, config.heads, length, config.head_size), config.layers


def parameter_count(config):
    """Returns the number of parameters (the tied head is counted once)."""
    width, hidden = config.width, config.hidden
    mlp = 2 * width * hidden + hidden + width
    if config.experts:
        mlp = moe.parameter_count(width, config.expert_hidden, config.experts, config.shared_experts)
    block = 4 * width * width + 4 * width + mlp + 4 * width
    return config.layers * block + (config.vocab_size + config.context) * width + 2 * width


def flops_per_token(config, length):
    """Returns training FLOPs (forward and backward) per token of rows of `length` tokens.

    6 per weight that is multiplied (head included, embeddings not) plus 12 x layers x width x length for attention, not
    halved for causality, as in PaLM (Chowdhery et al. 2022, appendix B), so that MFU compares with published figures.
    Of experts only those count that see a token.
    """
    mlp = 2 * config.width * config.hidden
    if config.experts:
        mlp = moe.active_weights(
            config.width, config.expert_hidden, config.experts, config.experts_per_token, config.shared_experts
        )
    weights = config.layers * (4 * config.width**2 + mlp) + config.vocab_size * config.width
    return 6 * weights + 12 * config.layers * config.width * min(length, config.window or length)


def _experts(config, placement, rngs):
    return moe.MixtureOfExperts(
        config.width,
        config.expert_hidden,
        experts=config.experts,
        per_token=config.experts_per_token,
        shared=config.shared_experts,
        capacity=config.expert_capacity,
        stddev=INITIAL_STDDEV,
        output_stddev=residual_stddev(config),
        placement=placement,
        rngs=rngs,
    )
