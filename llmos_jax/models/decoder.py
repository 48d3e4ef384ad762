"""What decoder-only language models share: settings, pre-norm blocks, embedding, loss, logits, decoding with a cache.

A family (`gpt.py`, `llama.py`) adds its parameters and what it makes of them: `Attention.project`, `Block.transform`, and how
tokens and positions enter.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError
from llmos_jax.models import head, moe
from llmos_jax.models.attention import IMPLEMENTATIONS, attend, attend_cached
from llmos_jax.models.layers import dropout, fold_key, lookup, parameter, rotate
from llmos_jax.models.stack import EXECUTIONS, REMAT_POLICIES, Stack

# GPT-2's initial standard deviation; residual projections are divided by sqrt(2 x layers).
INITIAL_STDDEV = 0.02


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture and execution that every decoder has."""

    vocab_size: int = setting(0, help="rows of the embedding; 0: the tokenizer's, rounded up to 128", at_least=0)
    context: int = setting(1024, help="longest sequence, tokens", at_least=1)
    width: int = setting(768, help="model width", at_least=1)
    layers: int = setting(12, help="blocks", at_least=1)
    heads: int = setting(12, help="attention heads", at_least=1)
    dropout: float = setting(0.0, help="share of activations dropped in training", at_least=0.0, below=1.0)
    dtype: str = setting(
        "auto",
        help="compute dtype; auto: bfloat16 on accelerators, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = setting("auto", help="attention kernel; auto: by platform", choices=IMPLEMENTATIONS)
    window: int | None = setting(None, help="attend to this many latest tokens; none: all", at_least=1)
    execution: str = setting("auto", help="blocks scanned or unrolled; auto: the faster", choices=EXECUTIONS)
    remat: str = setting("none", help="what the backward pass recomputes", choices=tuple(REMAT_POLICIES))
    z_loss: float = setting(0.0, help="weight of the squared logsumexp of the logits", at_least=0.0)

    def __post_init__(self):
        if self.remat != "none" and self.execution == "unroll":
            raise ConfigError("model.execution=unroll with model.remat: XLA merges the recomputation away; use scan.")


class Attention(nnx.Module):
    """Self-attention around a family's `project(x) -> query, key, value` and `output`; [B, L, H or G, K] each."""

    def __call__(self, x_BLD, segments_BL, rotation, placement):
        """Returns attention of a row's tokens to each other; `rotation`: what `layers.rotate` takes, or None."""
        projected = (placement.constrain(z, "batch", "length", "heads", None) for z in self.rotated(x_BLD, rotation))
        query_BLHK, key_BLGK, value_BLGK = projected
        mixed_BLHK = attend(
            query_BLHK,
            key_BLGK,
            value_BLGK,
            segments_BL=segments_BL,
            window=self.window,
            implementation=self.implementation,
            placement=placement,
        )
        return self.output(mixed_BLHK)

    def rotated(self, x_BLD, rotation):
        """Returns query, key and value, the first two turned by their positions where the family does so."""
        query, key, value = self.project(x_BLD)
        return (query, key, value) if rotation is None else (rotate(query, rotation), rotate(key, rotation), value)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + transform(norm(x)).

    A family makes `attention_norm`, `attention`, `mlp_norm`, `dropout`, `placement`, `is_sparse` and the parameters of
    `transform`, or `experts` in its place. With experts, input and output are (x, router statistics [B, R] summed over the
    blocks so far): the router's losses leave the stack as the activations do, row by row.
    """

    def __call__(self, x, context, key):
        x_BLD, router_BR = x if self.is_sparse else (x, None)
        segments_BL, rotation = context
        normalised_BLD = _gather_positions(self.placement, self.attention_norm(x_BLD))
        mixed = self.attention(normalised_BLD, segments_BL, rotation, self.placement)
        x_BLD = residual(self.placement, x_BLD + dropout(mixed, self.dropout, fold_key(key, 0)))
        if not self.is_sparse:
            return self._add_mlp(x_BLD, self.transform(_gather_positions(self.placement, self.mlp_norm(x_BLD))), key)
        mixed, of_block_BR = self.experts(self.mlp_norm(x_BLD), segments_BL)
        return self._add_mlp(x_BLD, mixed, key), router_BR + of_block_BR

    def _add_mlp(self, x_BLD, mixed_BLD, key=None):
        return residual(self.placement, x_BLD + dropout(mixed_BLD, self.dropout, fold_key(key, 1)))

    def decode(self, x_BLD, cache, start_B, first_B, rotation):
        """Returns (x, cache) for L new tokens at positions start..start+L-1; cache is (key, value), [B, G, M, K] each.

        Experts take every token whatever their capacity: what that drops depends on the rest of the row, which a token that
        is generated can't know.
        """
        query, key, value = self.attention.rotated(self.attention_norm(x_BLD), rotation)
        cache = tuple(_write(old, new, start_B) for old, new in zip(cache, (key, value), strict=True))
        mixed = attend_cached(query, *cache, start_B, first_B=first_B, window=self.attention.window)
        x_BLD = x_BLD + self.attention.output(mixed)
        h_BLD = self.mlp_norm(x_BLD)
        mixed = self.experts(h_BLD, is_dropless=True)[0] if self.is_sparse else self.transform(h_BLD)
        return self._add_mlp(x_BLD, mixed), cache


class Decoder(nnx.Module):
    """A decoder-only language model. Calls are pure; parameters are float32, activations in `dtype`.

    A family's `__init__` calls `add_embedding`, then makes its own parameters, then calls `add_stack`.
    """

    def add_embedding(self, config, placement, *, rngs):
        """Makes the token embedding, and what a model knows of itself."""
        shape, normal = (config.vocab_size, config.width), jax.nn.initializers.normal(INITIAL_STDDEV)
        self.embedding = parameter(rngs, shape, ("vocab", "embed"), normal, kind="embedding")
        self.config, self.placement = config, placement
        self.dtype = compute_dtype(config, placement)

    def add_stack(self, make_block, *, is_sparse=False, rngs):
        """Makes the blocks, by `make_block(rngs)`, as the settings say that they are executed."""
        config, self.is_sparse = self.config, is_sparse
        self.stack = Stack(
            make_block,
            config.layers,
            rngs=rngs,
            placement=self.placement,
            execution=config.execution,
            remat=config.remat,
        )

    def embed(self, tokens_BL, positions_BL):
        """Returns the embeddings of tokens, [B, L, D]; a family may add positions."""
        return lookup(self.embedding[...], tokens_BL, self.placement, self.dtype)

    def rotation(self, positions_BL):
        """Returns what turns queries and keys by their positions (`layers.rotate`), or None."""
        return None

    @property
    def head_weight(self):
        """The head's weight [V, D]; the embedding, unless a family has its own."""
        return self.embedding[...]

    def hidden(self, tokens_BL, positions_BL, segments_BL=None, key=None):
        """Returns the normalised last hidden states [B, L, D]; `key` turns dropout on.

        Where the placement shards the length, rows are given and returned in `placement.length_order`.
        """
        return self._run(tokens_BL, positions_BL, segments_BL, key)[0]

    def _run(self, tokens_BL, positions_BL, segments_BL, key):
        """Returns (hidden states [B, L, D], router statistics [B, R] summed over blocks or None)."""
        x_BLD = dropout(self.embed(tokens_BL, positions_BL), self.config.dropout, fold_key(key, self.config.layers))
        context, router_BR = (segments_BL, self.rotation(positions_BL)), None
        if self.is_sparse:
            router_BR = jnp.zeros((x_BLD.shape[0], len(moe.ROUTER_STATISTICS)), jnp.float32)
            x_BLD, router_BR = self.stack((x_BLD, router_BR), context, key)
        else:
            x_BLD = self.stack(x_BLD, context, key)
        return residual(self.placement, self.norm(x_BLD)), router_BR

    def loss(self, batch, key=None):
        """Returns (loss_sum, {name: sum}) over the weighted targets of a batch (see `head.cross_entropy`).

        Sums: nll, accuracy, and with experts the router's statistics (`moe.ROUTER_STATISTICS`), means over blocks that
        count a row by the weight of its targets. The router's losses are added in the same way, those of all blocks.
        """
        hidden_BLD, router_BR = self._run(batch["tokens"], batch["positions"], batch.get("segments"), key)
        total, nll, correct = head.cross_entropy(
            hidden_BLD,
            self.head_weight,
            batch["targets"],
            batch["weights"],
            z_loss=self.config.z_loss,
            placement=self.placement,
        )
        sums = {"nll": nll, "accuracy": correct}
        if router_BR is None:
            return total, sums
        router_R = (router_BR * batch["weights"].sum(1, keepdims=True)).sum(0)
        router = dict(zip(moe.ROUTER_STATISTICS, router_R, strict=True))
        total += self.config.router_balance * router["balance"] + self.config.router_z_loss * router["z"]
        return total, sums | {f"router_{name}": value / self.config.layers for name, value in router.items()}

    def logits(self, hidden_BLD):
        """Returns the logits [B, L, V] of hidden states, float32."""
        weight_VD = self.head_weight.astype(hidden_BLD.dtype)
        return jnp.einsum("BLD,VD->BLV", hidden_BLD, weight_VD, preferred_element_type=jnp.float32)

    def decode(self, tokens_BL, blocks, cache, start_B, first_B):
        """Returns (hidden [B, L, D], cache): L new tokens in cache slots start..start+L-1 of every row.

        `blocks`: `stack.bind(layers)`; `cache`: one (key, value) pair a layer; first_B: the first slot that holds a token of
        the row (rows are padded on the left), so positions count from there.
        """
        slots_BL = start_B[:, None] + jnp.arange(tokens_BL.shape[1])
        positions_BL = jnp.maximum(slots_BL - first_B[:, None], 0)
        x_BLD, rotation = self.embed(tokens_BL, positions_BL), self.rotation(positions_BL)
        written = []
        for block, layer_cache in zip(blocks, cache, strict=True):
            x_BLD, layer_cache = block.decode(x_BLD, layer_cache, start_B, first_B, rotation)
            written.append(layer_cache)
        return self.norm(x_BLD), written


def check_shards(placement, **sizes):
    """Raises ConfigError when a size ({setting: (size, logical axis)}) can't be laid over its mesh axis."""
    for name, (size, axis) in sizes.items():
        shards = placement.axis_size(axis)
        if size % shards:
            over = "expert" if axis == "experts" else "model"
            raise ConfigError(f"model.{name}={size} is not divisible by mesh.{over}={shards}: change one of them.")


def residual(placement, x_BLD):
    """Lays the residual stream out: positions sharded as the rules say."""
    return placement.constrain(x_BLD, "batch", "residual_length", None)


def residual_stddev(config):
    """Returns the initial standard deviation of what is added to the residual stream."""
    return INITIAL_STDDEV / (2 * config.layers) ** 0.5


def compute_dtype(config, placement):
    """Returns the dtype of activations."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if placement.platform == "cpu" else jnp.bfloat16)


def _gather_positions(placement, x_BLD):
    """Gathers positions that the residual stream shards over the model axis, before a product whose outputs that shards.

    Left to itself the compiler may gather the weight instead, over data and model axes, and move the product's outputs.
    """
    return placement.constrain(x_BLD, "batch", "length", None)


def _write(cache_BGMK, new_BLGK, start_B):
    new_BGLK = new_BLGK.swapaxes(1, 2).astype(cache_BGMK.dtype)
    if new_BGLK.shape[2] == cache_BGMK.shape[2]:
        return new_BGLK
    return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (0, start, 0)))(
        cache_BGMK, new_BGLK, start_B
    )
