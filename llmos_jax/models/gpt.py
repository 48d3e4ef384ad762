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
    is_tied: bool = setting(True, help="the head is the embedding")

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(f"model.width={self.width} is not divisible by model.heads={self.heads}.")

    @property
    def learns_positions(self):
        """Whether there is a parameter for every position of the context."""
        return True

    @property
    def head_size(self):
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def hidden(self):
        """Hidden width of the MLP."""
        return self.mlp or 4 * self.width


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
        self.add_mask(config)

    def project(self, x_BLD):
        """Returns query, key and value, each [B, L, H, K]."""
        qkv = self.qkv(x_BLD)
        return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]


class Block(decoder.Block):
    """A block whose MLP is down(gelu(up(x))), or a mixture of experts."""

    def __init__(self, config, placement, *, rngs):
        self.attention_norm = LayerNorm(config.width, rngs=rngs, epsilon=config.norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, rngs=rngs, epsilon=config.norm_epsilon)
        self.is_sparse = config.experts > 0
        if self.is_sparse:
            self.experts = decoder.make_experts(config, placement, is_gated=False, rngs=rngs)
        else:
            axes = (("embed",), ("mlp",))
            self.up = Linear((config.width,), (config.hidden,), *axes, stddev=INITIAL_STDDEV, rngs=rngs)
            self.down = Linear((config.hidden,), (config.width,), *axes[::-1], stddev=residual_stddev(config), rngs=rngs)
        self.dropout, self.placement = config.dropout, placement

    def transform(self, x_BLD):
        """Returns the dense MLP of x."""
        return self.down(self.placement.constrain(gelu(self.up(x_BLD)), "batch", "length", "mlp"))


class GPT(decoder.Decoder):
    """A decoder with learned positions and, unless it is tied, a head of its own."""

    def __init__(self, config, placement, *, rngs):
        self.add_embedding(config, placement, rngs=rngs)
        normal = jax.nn.initializers.normal(INITIAL_STDDEV)
        self.positions = parameter(rngs, (config.context, config.width), ("positions", "embed"), normal, kind="embedding")
        self.add_stack(lambda rngs: Block(config, placement, rngs=rngs), is_sparse=config.experts > 0, rngs=rngs)
        self.norm = LayerNorm(config.width, rngs=rngs, epsilon=config.norm_epsilon)
        self.add_head(rngs=rngs)

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
    decoder.check_shards(placement, heads=(config.heads, "heads"), **decoder.sizes_to_shard(config))
    return GPT(config, placement, rngs=rngs)


def cache_shapes(config, rows, length):
    """Returns the shape of one layer's key (or value) cache, and the number of layers."""
    return (rows, config.heads, length, config.head_size), config.layers


def parameter_count(config):
    """Returns the number of parameters (a tied head is counted once)."""
    width, hidden = config.width, config.hidden
    mlp = 2 * width * hidden + hidden + width
    if config.experts:
        mlp = moe.parameter_count(config)
    block = 4 * width * width + 4 * width + mlp + 4 * width
    embeddings = config.vocab_size * (1 if config.is_tied else 2) + config.context
    return config.layers * block + embeddings * width + 2 * width


def flops_per_token(config, length):
    """Returns training FLOPs (forward and backward) per token of rows of `length` tokens.

    6 per weight that is multiplied (head included, embeddings not) plus 12 x layers x width x length for attention, not
    halved for causality, as in PaLM (Chowdhery et al. 2022, appendix B), so that MFU compares with published figures.
    Of experts only those count that see a token.
    """
    mlp = 2 * config.width * config.hidden
    if config.experts:
        mlp = moe.active_weights(config)
    weights = config.layers * (4 * config.width**2 + mlp) + config.vocab_size * config.width
    return 6 * weights + 12 * config.width * config.attended(length)


# Where each parameter lies in a Hugging Face file, and how: see `interop/layout.py`. GPT-2's matrices are [in, out] there.
_HERE, _THERE = "stack/blocks/", "transformer.h.{n}."
HF_NAMES = {
    "embedding": {"transformer.wte.weight": "V,D -> VD"},
    "positions": {"transformer.wpe.weight": "P,D -> PD"},
    "head": {"lm_head.weight": "V,D -> VD"},
    "norm/scale": {"transformer.ln_f.weight": "D -> D"},
    "norm/bias": {"transformer.ln_f.bias": "D -> D"},
    f"{_HERE}attention_norm/scale": {f"{_THERE}ln_1.weight": "D -> D"},
    f"{_HERE}attention_norm/bias": {f"{_THERE}ln_1.bias": "D -> D"},
    f"{_HERE}attention/qkv/weight": {f"{_THERE}attn.c_attn.weight": "D,3HK -> DH3K"},
    f"{_HERE}attention/qkv/bias": {f"{_THERE}attn.c_attn.bias": "3HK -> H3K"},
    f"{_HERE}attention/output/weight": {f"{_THERE}attn.c_proj.weight": "HK,D -> HKD"},
    f"{_HERE}attention/output/bias": {f"{_THERE}attn.c_proj.bias": "D -> D"},
    f"{_HERE}mlp_norm/scale": {f"{_THERE}ln_2.weight": "D -> D"},
    f"{_HERE}mlp_norm/bias": {f"{_THERE}ln_2.bias": "D -> D"},
    f"{_HERE}up/weight": {f"{_THERE}mlp.c_fc.weight": "D,F -> DF"},
    f"{_HERE}up/bias": {f"{_THERE}mlp.c_fc.bias": "F -> F"},
    f"{_HERE}down/weight": {f"{_THERE}mlp.c_proj.weight": "F,D -> FD"},
    f"{_HERE}down/bias": {f"{_THERE}mlp.c_proj.bias": "D -> D"},
}
