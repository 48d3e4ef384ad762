"""What decoder-only language models share: settings, pre-norm blocks, embedding, loss, logits, decoding with a cache.

A form (`gpt.py`, `llama.py`) adds its parameters and what it makes of them: `Attention.project`, `Block.transform`, and how
tokens and positions enter. Families of published models are settings of a form.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from llmos_jax.config import setting
from llmos_jax.errors import ConfigError
from llmos_jax.models import head, moe
from llmos_jax.models.attention import IMPLEMENTATIONS, attend
from llmos_jax.models.layers import dropout, fold_key, lookup, parameter, unembed
from llmos_jax.models.rope import rotate
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
    global_layers: tuple[int, ...] = setting((), help="layers (from 0) that attend to all tokens despite window", at_least=0)
    norm_epsilon: float = setting(1e-5, help="added to the variance or mean square in norms", above=0.0)
    experts: int = setting(0, help="routed MLPs per block (mixture of experts); 0: one dense MLP", at_least=0)
    experts_per_token: int = setting(2, help="routed experts that see a token", at_least=1)
    shared_experts: int = setting(0, help="experts beside the routed ones that see every token", at_least=0)
    expert_mlp: int = setting(0, help="hidden width of one expert; 0: that of the dense MLP", at_least=0)
    expert_capacity: float | None = setting(
        None, help="tokens that an expert takes of a row, as a multiple of an equal share; none: all (dropless)", above=0.0
    )
    is_router_normalised: bool = setting(True, help="weights of a token's experts are divided by their sum, if several")
    router_balance: float = setting(0.01, help="weight of the load-balance loss of each layer", at_least=0.0)
    router_z_loss: float = setting(0.001, help="weight of the squared logsumexp of the router's logits", at_least=0.0)
    execution: str = setting("auto", help="blocks scanned or unrolled; auto: the faster", choices=EXECUTIONS)
    remat: str = setting("none", help="what the backward pass recomputes", choices=tuple(REMAT_POLICIES))
    z_loss: float = setting(0.0, help="weight of the squared logsumexp of the logits", at_least=0.0)

    def __post_init__(self):
        if self.remat != "none" and self.execution == "unroll":
            raise ConfigError("model.execution=unroll with model.remat: XLA merges the recomputation away; use scan.")
        if self.global_layers and (self.window is None or max(self.global_layers) >= self.layers):
            raise ConfigError(
                f"model.global_layers={list(self.global_layers)} with model.window={self.window} and "
                f"model.layers={self.layers}: they are exceptions to a window, numbered from 0."
            )
        if self.experts and self.experts_per_token > self.experts:
            raise ConfigError(
                f"model.experts_per_token={self.experts_per_token} is more than the model.experts={self.experts} there are."
            )
        if self.shared_experts and not self.experts:
            raise ConfigError(
                f"model.shared_experts={self.shared_experts} with model.experts=0: set model.experts, or widen model.mlp."
            )

    @property
    def learns_positions(self):
        """Whether there is a parameter for every position of the context."""
        return False

    @property
    def expert_hidden(self):
        """Hidden width of one expert."""
        return self.expert_mlp or self.hidden

    @property
    def windows(self):
        """The window of each kind of layer, None: all tokens."""
        return (self.window, None) if self.global_layers else (self.window,)

    @property
    def kinds(self):
        """Which of `windows` each layer has; None where all have the first."""
        return tuple(int(layer in self.global_layers) for layer in range(self.layers)) if self.global_layers else None

    @property
    def stretched_from(self):
        """Rows longer than this turn every position by their own length (some rotary scalings); None: no row does."""
        return None

    def attended(self, length):
        """Returns how many tokens of a row of `length` the layers attend to, added up."""
        windows = [self.windows[kind] for kind in self.kinds or (0,) * self.layers]
        return sum(min(length, window or length) for window in windows)


class Attention(nnx.Module):
    """Self-attention around a form's `project(x) -> query, key, value` and `output`; [B, L, H or G, K] each.

    A form calls `add_mask`. `kind` is a layer's index into the windows and rotations: a number, or an array where layers that
    differ run as one (scanned, or stages of a pipeline).
    """

    def add_mask(self, config, *, scale=None, softcap=None):
        """Says what scores are made of: each kind's window, their scale (none: 1 / sqrt(K)) and softcap."""
        self.windows, self.implementation, self.scale, self.softcap = config.windows, config.attention, scale, softcap

    def __call__(self, x_BLD, segments_BL, rotations, placement, kind=0):
        """Returns attention of a row's tokens to each other; `rotations`: what `rotate` takes for each kind, or None."""
        projected = (placement.constrain(z, "batch", "length", "heads", None) for z in self.rotated(x_BLD, rotations, kind))

        def attend_in(window):
            return functools.partial(
                attend,
                segments_BL=segments_BL,
                window=window,
                scale=self.scale,
                softcap=self.softcap,
                implementation=self.implementation,
                placement=placement,
            )

        if isinstance(kind, int):
            return self.output(attend_in(self.windows[kind])(*projected))
        return self.output(lax.switch(kind, [attend_in(window) for window in self.windows], *projected))

    def rotated(self, x_BLD, rotations, kind=0):
        """Returns query, key and value, the first two turned by their positions where the form does so."""
        query, key, value = self.project(x_BLD)
        if rotations is None:
            return query, key, value
        if isinstance(kind, int):
            rotation = rotations[kind]
        else:
            rotation = jax.tree.map(lambda *of_kinds: lax.select_n(kind, *of_kinds), *rotations)
        return rotate(query, rotation), rotate(key, rotation), value

    def cached(self, cache, query_BLHK, key_BLGK, value_BLGK, read, kind):
        """Returns (attention of new tokens to a cache and to each other, what is kept of them), before `output`."""

        def read_in(window):
            return functools.partial(read, window=window, scale=self.scale, softcap=self.softcap)

        if isinstance(kind, int):
            return read_in(self.windows[kind])(cache, query_BLHK, key_BLGK, value_BLGK)
        return lax.switch(kind, [read_in(window) for window in self.windows], cache, query_BLHK, key_BLGK, value_BLGK)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + transform(norm(x)).

    A form makes `attention_norm`, `attention`, `mlp_norm`, `dropout`, `placement`, `is_sparse` and the parameters of
    `transform`, or `experts` in its place; also `attention_post_norm` and `mlp_post_norm` where what is added is normalised.
    With experts, input and output are (x, router statistics [B, R] summed over the blocks so far): the router's losses leave
    the stack as the activations do, row by row.
    """

    attention_post_norm = mlp_post_norm = None

    def __call__(self, x, context, key, kind=0):
        x_BLD, router_BR = x if self.is_sparse else (x, None)
        segments_BL, rotations = context
        normalised_BLD = _gather_positions(self.placement, self.attention_norm(x_BLD))
        mixed = self.attention(normalised_BLD, segments_BL, rotations, self.placement, kind)
        x_BLD = self._add(x_BLD, mixed, self.attention_post_norm, fold_key(key, 0))
        if not self.is_sparse:
            return self._add_mlp(x_BLD, self.transform(_gather_positions(self.placement, self.mlp_norm(x_BLD))), key)
        mixed, of_block_BR = self.experts(self.mlp_norm(x_BLD), segments_BL)
        return self._add_mlp(x_BLD, mixed, key), router_BR + of_block_BR

    def _add_mlp(self, x_BLD, mixed_BLD, key=None):
        return self._add(x_BLD, mixed_BLD, self.mlp_post_norm, fold_key(key, 1))

    def _add(self, x_BLD, mixed_BLD, norm, key):
        mixed_BLD = mixed_BLD if norm is None else norm(mixed_BLD)
        return residual(self.placement, x_BLD + dropout(mixed_BLD, self.dropout, key))

    def decode(self, x_BLD, cache, read, rotations, kind=0, only_B=None):
        """Returns (x, written) for L new tokens of every row, whose layer's `cache` is what `read` reads.

        `read(cache, query [B, L, H, K], key, value [B, L, G, K], window=, scale=, softcap=)` returns (attention [B, L, H, K] of
        the new tokens to all that they see, what has to be kept of them): so a block need not know how keys and values are
        stored. Experts take every token whatever their capacity: what that drops depends on the rest of the row, which a token
        that is generated can't know. only_B: the one token of each row whose x is wanted, [B, 1, D]; keys and values are kept
        of all, and `read` gets that token's query alone, and `only_B=`.
        """
        query_BLHK, *projected = self.attention.rotated(self.attention_norm(x_BLD), rotations, kind)
        if only_B is not None:
            x_BLD, query_BLHK = (token_of_row(z, only_B) for z in (x_BLD, query_BLHK))
            read = functools.partial(read, only_B=only_B)
        mixed, written = self.attention.cached(cache, query_BLHK, *projected, read, kind)
        x_BLD = self._add(x_BLD, self.attention.output(mixed), self.attention_post_norm, None)
        h_BLD = self.mlp_norm(x_BLD)
        mixed = self.experts(h_BLD, is_dropless=True)[0] if self.is_sparse else self.transform(h_BLD)
        return self._add_mlp(x_BLD, mixed), written


class Decoder(nnx.Module):
    """A decoder-only language model. Calls are pure; parameters are float32, activations in `dtype`.

    A form's `__init__` calls `add_embedding`, then makes its own parameters, then calls `add_stack`.
    """

    logits_softcap = None

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
            kinds=config.kinds,
        )

    def embed(self, tokens_BL, positions_BL):
        """Returns the embeddings of tokens, [B, L, D]; a form may add positions."""
        return lookup(self.embedding[...], tokens_BL, self.placement, self.dtype)

    def rotations(self, positions_BL, longest_BL=None):
        """Returns what turns queries and keys by their positions (`rope.rotate`), for each kind of layer; or None."""
        return None

    @property
    def head_weight(self):
        """The head's weight [V, D]; the embedding, unless the model has its own."""
        return self.embedding[...] if self.config.is_tied else self.head[...]

    def add_head(self, *, rngs):
        """Makes the head's weight, where it is not the embedding."""
        if not self.config.is_tied:
            shape, normal = (self.config.vocab_size, self.config.width), jax.nn.initializers.normal(INITIAL_STDDEV)
            self.head = parameter(rngs, shape, ("vocab", "embed"), normal, kind="embedding")

    def hidden(self, tokens_BL, positions_BL, segments_BL=None, key=None):
        """Returns the normalised last hidden states [B, L, D]; `key` turns dropout on.

        Where the placement shards the length, rows are given and returned in `placement.length_order`.
        """
        return self._run(tokens_BL, positions_BL, segments_BL, key)[0]

    def _run(self, tokens_BL, positions_BL, segments_BL, key):
        """Returns (hidden states [B, L, D], router statistics [B, R] summed over blocks or None)."""
        x_BLD = dropout(self.embed(tokens_BL, positions_BL), self.config.dropout, fold_key(key, self.config.layers))
        context, router_BR = (segments_BL, self.rotations(positions_BL)), None
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
            softcap=self.logits_softcap,
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
        return head.capped(unembed(hidden_BLD, self.head_weight, self.placement), self.logits_softcap)

    def decode(self, tokens_BL, positions_BL, rotations, layers):
        """Returns (hidden [B, L, D], written): L new tokens of every row, at these positions with these `rotations`.

        `layers(x, rotations)` returns (x after all layers, what these wrote), by the blocks' `decode`: so the model need not
        know where its layers lie (`serve/stages.py`).
        """
        x_BLD, written = layers(self.embed(tokens_BL, positions_BL), rotations)
        return self.norm(x_BLD), written


def token_of_row(x_BL, index_B):
    """Returns [B, 1, ...]: of each row the token with this index."""
    return jnp.take_along_axis(x_BL, index_B.reshape(-1, *[1] * (x_BL.ndim - 1)), 1)


def check_shards(placement, **sizes):
    """Raises ConfigError when a size ({setting: (size, logical axis)}) can't be laid over its mesh axis."""
    for name, (size, axis) in sizes.items():
        shards = placement.axis_size(axis)
        if size % shards:
            over = "expert" if axis == "experts" else "model"
            raise ConfigError(f"model.{name}={size} is not divisible by mesh.{over}={shards}: change one of them.")


def sizes_to_shard(config):
    """Returns what `check_shards` takes of the MLP, dense or of experts."""
    if config.experts:
        return dict(experts=(config.experts, "experts"), expert_mlp=(config.expert_hidden, "mlp"))
    return dict(mlp=(config.hidden, "mlp"))


def make_experts(config, placement, *, is_gated, rngs):
    """Returns the mixture of experts that the settings say."""
    return moe.MixtureOfExperts(
        config.width,
        config.expert_hidden,
        experts=config.experts,
        per_token=config.experts_per_token,
        shared=config.shared_experts,
        capacity=config.expert_capacity,
        is_gated=is_gated,
        is_normalised=config.is_router_normalised,
        stddev=INITIAL_STDDEV,
        output_stddev=residual_stddev(config),
        placement=placement,
        rngs=rngs,
    )


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
