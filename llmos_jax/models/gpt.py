"""GPT-2 (Radford et al. 2019) and GPT-3's sizes (Brown et al. 2020): learned positions, pre-norm blocks, tied head."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError
from llmos_jax.models import head
from llmos_jax.models.attention import attend, attend_cached
from llmos_jax.models.layers import LayerNorm, Linear, dropout, fold_key, gelu, parameter
from llmos_jax.models.stack import EXECUTIONS, REMAT_POLICIES, Stack

# GPT-2's initial standard deviation; residual projections are divided by sqrt(2 x layers).
_INITIAL_STDDEV = 0.02


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture and execution of a GPT."""

    name: str = setting("gpt", help="model family", choices=("gpt",))
    vocab_size: int = setting(0, help="rows of the embedding; 0: the tokenizer's, rounded up to 128", at_least=0)
    context: int = setting(1024, help="longest sequence, tokens", at_least=1)
    width: int = setting(768, help="model width", at_least=1)
    layers: int = setting(12, help="blocks", at_least=1)
    heads: int = setting(12, help="attention heads", at_least=1)
    mlp: int = setting(0, help="hidden width of the MLP; 0: 4 x width", at_least=0)
    dropout: float = setting(0.0, help="share of activations dropped in training", at_least=0.0, below=1.0)
    dtype: str = setting(
        "auto",
        help="compute dtype; auto: bfloat16 on accelerators, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = setting(
        "auto",
        help="attention kernel; auto: by platform",
        choices=("auto", "reference", "blocked", "xla", "cudnn", "splash"),
    )
    window: int | None = setting(None, help="attend to this many latest tokens; none: all", at_least=1)
    execution: str = setting("auto", help="blocks scanned or unrolled; auto: the faster", choices=EXECUTIONS)
    remat: str = setting("none", help="what the backward pass recomputes", choices=tuple(REMAT_POLICIES))
    z_loss: float = setting(0.0, help="weight of the squared logsumexp of the logits", at_least=0.0)

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(f"model.width={self.width} is not divisible by model.heads={self.heads}.")
        if self.remat != "none" and self.execution == "unroll":
            raise ConfigError("model.execution=unroll with model.remat: XLA merges the recomputation away; use scan.")

    @property
    def head_size(self):
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def hidden(self):
        """Hidden width of the MLP."""
        return self.mlp or 4 * self.width


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection, heads outermost so that they can be sharded."""

    def __init__(self, config, *, rngs):
        heads, size = config.heads, config.head_size
        self.qkv = Linear(
            (config.width,),
            (heads, 3, size),
            ("embed",),
            ("heads", None, "head_size"),
            stddev=_INITIAL_STDDEV,
            rngs=rngs,
        )
        self.output = Linear(
            (heads, size),
            (config.width,),
            ("heads", "head_size"),
            ("embed",),
            stddev=_residual_stddev(config),
            rngs=rngs,
        )
        self.window, self.implementation = config.window, config.attention

    def project(self, x_BLD):
        """Returns query, key and value, each [B, L, H, K]."""
        qkv = self.qkv(x_BLD)
        return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]

    def __call__(self, x_BLD, segments_BL, placement):
        query, key, value = (placement.constrain(z, "batch", "length", "heads", None) for z in self.project(x_BLD))
        mixed_BLHK = attend(
            query,
            key,
            value,
            segments_BL=segments_BL,
            window=self.window,
            implementation=self.implementation,
            placement=placement,
        )
        return self.output(mixed_BLHK)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, placement, *, rngs):
        self.attention_norm = LayerNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, rngs=rngs)
        axes = (("embed",), ("mlp",))
        self.up = Linear((config.width,), (config.hidden,), *axes, stddev=_INITIAL_STDDEV, rngs=rngs)
        self.down = Linear((config.hidden,), (config.width,), *axes[::-1], stddev=_residual_stddev(config), rngs=rngs)
        self.dropout, self.placement = config.dropout, placement

    def __call__(self, x_BLD, segments_BL, key):
        mixed = self.attention(self.attention_norm(x_BLD), segments_BL, self.placement)
        x_BLD = _residual(self.placement, x_BLD + dropout(mixed, self.dropout, fold_key(key, 0)))
        return self._mlp(x_BLD, key)

    def _mlp(self, x_BLD, key=None):
        hidden_BLF = self.placement.constrain(gelu(self.up(self.mlp_norm(x_BLD))), "batch", "length", "mlp")
        return _residual(self.placement, x_BLD + dropout(self.down(hidden_BLF), self.dropout, fold_key(key, 1)))

    def decode(self, x_BLD, cache, start_B, first_B):
        """Returns (x, cache) for L new tokens at positions start..start+L-1; cache is (key, value), [B, H, M, K] each."""
        query, key, value = self.attention.project(self.attention_norm(x_BLD))
        cache = tuple(_write(old, new, start_B) for old, new in zip(cache, (key, value), strict=True))
        mixed = attend_cached(query, *cache, start_B, first_B=first_B, window=self.attention.window)
        return self._mlp(x_BLD + self.attention.output(mixed)), cache


class GPT(nnx.Module):
    """A decoder-only language model. Calls are pure; parameters are float32, activations in `dtype`."""

    def __init__(self, config, placement, *, rngs):
        normal = jax.nn.initializers.normal(_INITIAL_STDDEV)
        self.embedding = parameter(rngs, (config.vocab_size, config.width), ("vocab", "embed"), normal, kind="embedding")
        self.positions = parameter(rngs, (config.context, config.width), ("positions", "embed"), normal, kind="embedding")
        self.stack = Stack(
            lambda rngs: Block(config, placement, rngs=rngs),
            config.layers,
            rngs=rngs,
            placement=placement,
            execution=config.execution,
            remat=config.remat,
        )
        self.norm = LayerNorm(config.width, rngs=rngs)
        self.config, self.placement = config, placement
        self.dtype = _dtype(config, placement)

    def embed(self, tokens_BL, positions_BL):
        """Returns the embeddings of tokens at their positions, [B, L, D]."""
        # Tables that FSDP shards by features are gathered first: else every device would look up everybody's tokens.
        embedding_VD = self.placement.constrain(self.embedding[...], "vocab", None)
        positions_PD = self.placement.constrain(self.positions[...], "positions", None)
        x_BLD = jnp.take(embedding_VD, tokens_BL, axis=0) + jnp.take(positions_PD, positions_BL, axis=0)
        return _residual(self.placement, x_BLD.astype(self.dtype))

    def hidden(self, tokens_BL, positions_BL, segments_BL=None, key=None):
        """Returns the normalised last hidden states [B, L, D]; `key` turns dropout on.

        Where the placement shards the length, rows are given and returned in `placement.length_order`.
        """
        x_BLD = dropout(self.embed(tokens_BL, positions_BL), self.config.dropout, fold_key(key, self.config.layers))
        x_BLD = self.norm(self.stack(x_BLD, segments_BL, key))
        return self.placement.constrain(x_BLD, "batch", "length", None)

    def loss(self, batch, key=None):
        """Returns (loss_sum, nll_sum, correct_sum) over the weighted targets of a batch (see `head.cross_entropy`)."""
        hidden_BLD = self.hidden(batch["tokens"], batch["positions"], batch.get("segments"), key)
        return head.cross_entropy(
            hidden_BLD,
            self.embedding[...],
            batch["targets"],
            batch["weights"],
            z_loss=self.config.z_loss,
            placement=self.placement,
        )

    def logits(self, hidden_BLD):
        """Returns the logits [B, L, V] of hidden states, float32."""
        weight_VD = self.embedding[...].astype(hidden_BLD.dtype)
        return jnp.einsum("BLD,VD->BLV", hidden_BLD, weight_VD, preferred_element_type=jnp.float32)

    def decode(self, tokens_BL, blocks, cache, start_B, first_B):
        """Returns (hidden [B, L, D], cache): L new tokens in cache slots start..start+L-1 of every row.

        `blocks`: `stack.bind(layers)`; `cache`: one (key, value) pair a layer; first_B: the first slot that holds a token of
        the row (rows are padded on the left), so positions count from there.
        """
        slots_BL = start_B[:, None] + jnp.arange(tokens_BL.shape[1])
        x_BLD = self.embed(tokens_BL, jnp.maximum(slots_BL - first_B[:, None], 0))
        written = []
        for block, layer_cache in zip(blocks, cache, strict=True):
            x_BLD, layer_cache = block.decode(x_BLD, layer_cache, start_B, first_B)
            written.append(layer_cache)
        return self.norm(x_BLD), written


def build(config, placement, *, rngs):
    """Returns a GPT with parameters drawn from `rngs`; call it under `jax.eval_shape` or jit for sharded placement.

    Raises ConfigError when heads or mlp can't be laid over the model axis.
    """
    for name, size, axis in (("heads", config.heads, "heads"), ("mlp", config.hidden, "mlp")):
        shards = placement.axis_size(axis)
        if size % shards:
            raise ConfigError(f"model.{name}={size} is not divisible by mesh.model={shards}: change one of them.")
    return GPT(config, placement, rngs=rngs)


def cache_shapes(config, rows, length):
    """Returns the shape of one layer's key (or value) cache, and the number of layers."""
    return (rows, config.heads, length, config.head_size), config.layers


def parameter_count(config):
    """Returns the number of parameters (the tied head is counted once)."""
    width, hidden = config.width, config.hidden
    block = 4 * width * width + 4 * width + 2 * width * hidden + hidden + width + 4 * width
    return config.layers * block + (config.vocab_size + config.context) * width + 2 * width


def flops_per_token(config, length):
    """Returns training FLOPs (forward and backward) per token of rows of `length` tokens.

    6 per weight that is multiplied (head included, embeddings not) plus 12 x layers x width x length for attention, not
    halved for causality, as in PaLM (Chowdhery et al. 2022, appendix B), so that MFU compares with published figures.
    """
    weights = config.layers * (4 * config.width**2 + 2 * config.width * config.hidden) + config.vocab_size * config.width
    return 6 * weights + 12 * config.layers * config.width * min(length, config.window or length)


def _residual(placement, x_BLD):
    return placement.constrain(x_BLD, "batch", "residual_length", None)


def _residual_stddev(config):
    return _INITIAL_STDDEV / (2 * config.layers) ** 0.5


def _dtype(config, placement):
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if placement.platform == "cpu" else jnp.bfloat16)


def _write(cache_BHMK, new_BLHK, start_B):
    new_BHLK = new_BLHK.swapaxes(1, 2).astype(cache_BHMK.dtype)
    if new_BHLK.shape[2] == cache_BHMK.shape[2]:
        return new_BHLK
    return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (0, start, 0)))(
        cache_BHMK, new_BHLK, start_B
    )
