"""Llama 2 and 3 and their relatives: RMSNorm, rotary positions, gated MLPs or experts, grouped queries.

Llama (Touvron et al. 2023; Dubey et al. 2024) is what the defaults give. Mistral, Qwen, Gemma, Phi and Mixtral are other
settings of the same decoder: `interop/architectures.py` has the table of what each of them sets.
"""

import dataclasses

import jax.numpy as jnp

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError
from llmos_jax.models import decoder, moe
from llmos_jax.models.decoder import INITIAL_STDDEV, residual_stddev
from llmos_jax.models.layers import Linear, RMSNorm, geglu, swiglu
from llmos_jax.models.rope import RopeConfig, rotation

# The MLP's width is 8/3 of the model's, so that its three matrices weigh as much as two of 4 x; rounded up to this.
_MLP_MULTIPLE = 256
_GATED = {"silu": swiglu, "gelu": geglu}


@dataclasses.dataclass(frozen=True)
class Config(decoder.DecoderConfig):
    """Architecture and execution of a Llama or a relative of it."""

    name: str = setting("llama", help="model family", choices=("llama",))
    kv_heads: int = setting(0, help="heads of keys and values, each shared by heads / kv_heads queries; 0: heads", at_least=0)
    head_width: int = setting(0, help="width of one attention head; 0: width / heads", at_least=0)
    mlp: int = setting(0, help="hidden width of the MLP; 0: 8/3 x width, rounded up to 256", at_least=0)
    activation: str = setting("silu", help="what the MLP's gate goes through; gelu: its tanh form", choices=tuple(_GATED))
    rope: RopeConfig = setting(RopeConfig(), help="rotary positions")
    window_rope: RopeConfig | None = setting(None, help="rotary positions of layers with a window; none: as the others")
    is_tied: bool = setting(False, help="the head is the embedding")
    has_qkv_bias: bool = setting(False, help="projections to queries, keys and values have biases")
    has_output_bias: bool = setting(False, help="attention's output projection has a bias")
    has_mlp_bias: bool = setting(False, help="the MLP's projections have biases")
    is_qk_normed: bool = setting(False, help="queries and keys are normalised, head by head, before they are turned")
    is_post_normed: bool = setting(False, help="what attention and MLP add is normalised, too")
    is_norm_centered: bool = setting(False, help="norms' parameters are added to a scale of one")
    is_embedding_scaled: bool = setting(False, help="embeddings are multiplied by sqrt(width)")
    query_scale: float | None = setting(None, help="scores are divided by the root of this; none: of the head's width", above=0)
    attention_softcap: float | None = setting(None, help="scores s become c tanh(s / c) with this c", above=0.0)
    logits_softcap: float | None = setting(None, help="logits z become c tanh(z / c) with this c", above=0.0)

    def __post_init__(self):
        super().__post_init__()
        if not self.head_width and self.width % self.heads:
            raise ConfigError(
                f"model.width={self.width} is not divisible by model.heads={self.heads}; or set model.head_width."
            )
        if self.heads % self.groups:
            raise ConfigError(f"model.heads={self.heads} is not divisible by model.kv_heads={self.kv_heads}.")
        if self.window_rope is not None and self.window is None:
            raise ConfigError("model.window_rope without model.window: no layer has a window; set rope.")
        for rope in self.ropes:
            rope.check(self.head_size)
        if self.experts and (self.activation != "silu" or self.has_mlp_bias):
            raise ConfigError("model.experts have silu and no biases: set model.activation=silu, model.has_mlp_bias=false.")

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

    @property
    def ropes(self):
        """The rotary positions of each kind of layer, as in `windows`."""
        of_windows = self.rope if self.window_rope is None else self.window_rope
        return (of_windows, self.rope) if self.global_layers else (of_windows,)

    @property
    def stretched_from(self):
        """Rows longer than this turn every position by their own length; None: no row does."""
        return min((rope.original_context for rope in self.ropes if rope.depends_on_length), default=None)


class Attention(decoder.Attention):
    """Grouped-query attention (Ainslie et al. 2023): keys and values in one projection, heads outermost."""

    def __init__(self, config, *, rngs):
        heads, groups, size = config.heads, config.groups, config.head_size
        given = dict(stddev=INITIAL_STDDEV, has_bias=config.has_qkv_bias, rngs=rngs)
        self.query = Linear((config.width,), (heads, size), ("embed",), ("heads", "head_size"), **given)
        self.key_value = Linear((config.width,), (groups, 2, size), ("embed",), ("heads", None, "head_size"), **given)
        given = dict(stddev=residual_stddev(config), has_bias=config.has_output_bias, rngs=rngs)
        self.output = Linear((heads, size), (config.width,), ("heads", "head_size"), ("embed",), **given)
        self.is_normed = config.is_qk_normed
        if self.is_normed:
            self.query_norm, self.key_norm = (_norm(config, size, rngs) for _ in range(2))
        scale = None if config.query_scale is None else config.query_scale**-0.5
        self.add_mask(config, scale=scale, softcap=config.attention_softcap)

    def project(self, x_BLD):
        """Returns query [B, L, H, K], key and value [B, L, G, K]."""
        query, key_value = self.query(x_BLD), self.key_value(x_BLD)
        key, value = key_value[..., 0, :], key_value[..., 1, :]
        return (self.query_norm(query), self.key_norm(key), value) if self.is_normed else (query, key, value)


class Block(decoder.Block):
    """A block whose MLP is down(silu(gate(x)) * up(x)) (Shazeer 2020), gate and up one projection; or a mixture of such."""

    def __init__(self, config, placement, *, rngs):
        self.attention_norm = _norm(config, config.width, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, config.width, rngs)
        if config.is_post_normed:
            self.attention_post_norm, self.mlp_post_norm = (_norm(config, config.width, rngs) for _ in range(2))
        self.is_sparse = config.experts > 0
        if self.is_sparse:
            self.experts = decoder.make_experts(config, placement, is_gated=True, rngs=rngs)
        else:
            up = dict(stddev=INITIAL_STDDEV, has_bias=config.has_mlp_bias, rngs=rngs)
            self.gate_up = Linear((config.width,), (2, config.hidden), ("embed",), (None, "mlp"), **up)
            down = up | dict(stddev=residual_stddev(config))
            self.down = Linear((config.hidden,), (config.width,), ("mlp",), ("embed",), **down)
        self.dropout, self.placement, self.activation = config.dropout, placement, config.activation

    def transform(self, x_BLD):
        """Returns the MLP of x."""
        hidden_BLF = _GATED[self.activation](self.gate_up(x_BLD))
        return self.down(self.placement.constrain(hidden_BLF, "batch", "length", "mlp"))


class Llama(decoder.Decoder):
    """A decoder with rotary positions and, unless tied, a head of its own."""

    def __init__(self, config, placement, *, rngs):
        self.add_embedding(config, placement, rngs=rngs)
        self.add_stack(lambda rngs: Block(config, placement, rngs=rngs), is_sparse=config.experts > 0, rngs=rngs)
        self.norm = _norm(config, config.width, rngs)
        self.add_head(rngs=rngs)
        self.logits_softcap = config.logits_softcap

    def embed(self, tokens_BL, positions_BL):
        """Returns the embeddings of tokens, [B, L, D]."""
        x_BLD = super().embed(tokens_BL, positions_BL)
        return x_BLD * jnp.asarray(self.config.width**0.5, x_BLD.dtype) if self.config.is_embedding_scaled else x_BLD

    def rotations(self, positions_BL, longest_BL=None):
        """Returns (cosine, sine) of every position's angles for each kind of layer, float32 [B, L, K / 2] each."""
        return tuple(rotation(rope, self.config.head_size, positions_BL, longest_BL) for rope in self.config.ropes)


def build(config, placement, *, rngs):
    """Returns a Llama with parameters drawn from `rngs`; call it under `jax.eval_shape` or jit for sharded placement.

    Raises ConfigError when heads or mlp can't be laid over the model axis, or experts over theirs.
    """
    sizes = dict(heads=(config.heads, "heads"), kv_heads=(config.groups, "heads"))
    decoder.check_shards(placement, **sizes, **decoder.sizes_to_shard(config))
    return Llama(config, placement, rngs=rngs)


def cache_shapes(config, rows, length):
    """Returns the shape of one layer's key (or value) cache, and the number of layers."""
    return (rows, config.groups, length, config.head_size), config.layers


def parameter_count(config):
    """Returns the number of parameters."""
    width, size = config.width, config.head_size
    vectors = width * (4 if config.is_post_normed else 2) + (2 * size if config.is_qk_normed else 0)
    vectors += (config.heads + 2 * config.groups) * size if config.has_qkv_bias else 0
    vectors += width if config.has_output_bias else 0
    vectors += 2 * config.hidden + width if config.has_mlp_bias else 0
    mlp = moe.parameter_count(config, is_gated=True) if config.experts else 3 * width * config.hidden
    embeddings = config.vocab_size * width * (1 if config.is_tied else 2)
    return config.layers * (_attention_weights(config) + mlp + vectors) + embeddings + width


def flops_per_token(config, length):
    """Returns training FLOPs (forward and backward) per token of rows of `length` tokens, counted as in `gpt.py`."""
    mlp = moe.active_weights(config, is_gated=True) if config.experts else 3 * config.width * config.hidden
    weights = config.layers * (_attention_weights(config) + mlp) + config.vocab_size * config.width
    return 6 * weights + 12 * config.heads * config.head_size * config.attended(length)


def _attention_weights(config):
    return 2 * config.width * config.head_size * (config.heads + config.groups)


def _norm(config, size, rngs):
    return RMSNorm(size, rngs=rngs, epsilon=config.norm_epsilon, is_centered=config.is_norm_centered)


# Where each parameter lies in a Hugging Face file, and how: see `interop/layout.py`. `interop/architectures.py` has what
# single families call otherwise.
_HERE, _THERE = "stack/blocks/", "model.layers.{n}."
HF_NAMES = {
    "embedding": {"model.embed_tokens.weight": "V,D -> VD"},
    "head": {"lm_head.weight": "V,D -> VD"},
    "norm/scale": {"model.norm.weight": "D -> D"},
    f"{_HERE}attention_norm/scale": {f"{_THERE}input_layernorm.weight": "D -> D"},
    f"{_HERE}attention/query/weight": {f"{_THERE}self_attn.q_proj.weight": "HK,D -> DHK"},
    f"{_HERE}attention/query/bias": {f"{_THERE}self_attn.q_proj.bias": "HK -> HK"},
    f"{_HERE}attention/key_value/weight": {
        f"{_THERE}self_attn.k_proj.weight": "GK,D -> DG[0]K",
        f"{_THERE}self_attn.v_proj.weight": "GK,D -> DG[1]K",
    },
    f"{_HERE}attention/key_value/bias": {
        f"{_THERE}self_attn.k_proj.bias": "GK -> G[0]K",
        f"{_THERE}self_attn.v_proj.bias": "GK -> G[1]K",
    },
    f"{_HERE}attention/query_norm/scale": {f"{_THERE}self_attn.q_norm.weight": "K -> K"},
    f"{_HERE}attention/key_norm/scale": {f"{_THERE}self_attn.k_norm.weight": "K -> K"},
    f"{_HERE}attention/output/weight": {f"{_THERE}self_attn.o_proj.weight": "D,HK -> HKD"},
    f"{_HERE}attention/output/bias": {f"{_THERE}self_attn.o_proj.bias": "D -> D"},
    f"{_HERE}mlp_norm/scale": {f"{_THERE}post_attention_layernorm.weight": "D -> D"},
    f"{_HERE}gate_up/weight": {
        f"{_THERE}mlp.gate_proj.weight": "F,D -> D[0]F",
        f"{_THERE}mlp.up_proj.weight": "F,D -> D[1]F",
    },
    f"{_HERE}gate_up/bias": {f"{_THERE}mlp.gate_proj.bias": "F -> [0]F", f"{_THERE}mlp.up_proj.bias": "F -> [1]F"},
    f"{_HERE}down/weight": {f"{_THERE}mlp.down_proj.weight": "D,F -> FD"},
    f"{_HERE}down/bias": {f"{_THERE}mlp.down_proj.bias": "D -> D"},
    f"{_HERE}experts/router": {f"{_THERE}mlp.gate.weight": "E,D -> DE"},
    f"{_HERE}experts/gate": {f"{_THERE}mlp.experts.{{e}}.gate_proj.weight": "F,D -> DF"},
    f"{_HERE}experts/up": {f"{_THERE}mlp.experts.{{e}}.up_proj.weight": "F,D -> DF"},
    f"{_HERE}experts/down": {f"{_THERE}mlp.experts.{{e}}.down_proj.weight": "D,F -> FD"},
}
