"""Mixture of experts: every token is sent to a few of many MLPs by a learned router (Shazeer et al. 2017).

Two forms. Dropless (Gale et al. 2022, MegaBlocks): tokens are sorted by expert and multiplied group by group. Capacity
(Lepikhin et al. 2020, GShard; Fedus et al. 2021, Switch): an expert takes a fixed number of a row's tokens, so that all
shapes are known; what is over goes past it by the residual. In both the result is that of one device on every mesh.

On a mesh the part between router and sum runs on each device's own tokens (`jax.shard_map`): they are exchanged over the
axis of `experts`, which shards the rows elsewhere, and the hidden width is cut over that of `mlp`. The dropless exchange is
`ragged_all_to_all`: it sends every token's copies and nothing else, into a buffer for the worst case (all tokens choose one
device's experts), so none is ever lost. XLA:CPU lacks it; there the same is done by an all-gather. A dense all-to-all would
send the worst case to each device, which is never less than that.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from llmos_jax.errors import ConfigError
from llmos_jax.models.grouped_matmul import Product, grouped_matmul
from llmos_jax.models.layers import Linear, gelu, parameter

# What the router tells of each row, in the order of the dimension R: load-balance loss, z-loss, share of the busiest
# expert, share of copies that were dropped; means over the row's tokens (padding excepted).
ROUTER_STATISTICS = ("balance", "z", "busiest_share", "dropped_share")


class MixtureOfExperts(nnx.Module):
    """`experts` MLPs of width `hidden`, `per_token` of which see a token, and `shared` more that see all.

    capacity: None is dropless; a number c lets every expert take at most ceil(c x L x per_token / experts) copies of a row
    of L tokens: the first choices of all tokens before the second ones, in the order of positions. is_gated: SwiGLU in place of
    GELU (Shazeer 2020). is_normalised: see `route`. The experts have no biases, as in Switch, Mixtral and DeepSeek. Raises
    ConfigError when the mesh's rules lay experts where tokens can't be exchanged.
    """

    def __init__(
        self, width, hidden, *, experts, per_token, stddev, output_stddev, placement, rngs,
        shared=0, capacity=None, is_gated=False, is_normalised=True,
    ):  # fmt: skip
        _check_rules(placement)
        normal, out = jax.nn.initializers.normal(stddev), jax.nn.initializers.normal(output_stddev)
        up, down = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
        self.router = parameter(rngs, (width, experts), ("embed", None), normal, kind="matrix", inputs=1)
        self.up = parameter(rngs, (experts, width, hidden), up, normal, kind="matrix", inputs=1)
        self.gate = parameter(rngs, (experts, width, hidden), up, normal, kind="matrix", inputs=1) if is_gated else None
        self.down = parameter(rngs, (experts, hidden, width), down, out, kind="matrix", inputs=1)
        self.shared = Shared(width, shared * hidden, is_gated, stddev, output_stddev, placement, rngs) if shared else None
        self.experts, self.per_token, self.capacity = experts, per_token, capacity
        self.is_normalised = is_normalised
        self.placement = placement

    def __call__(self, x_BLD, segments_BL=None, *, is_dropless=False):
        """Returns (y [B, L, D] in x's dtype, router statistics [B, R] in float32).

        Tokens of segment 0 (padding) are sent to no routed expert and not counted. `is_dropless`: without capacity,
        whatever the layer was made with.
        """
        is_real_BL = jnp.ones(x_BLD.shape[:2], bool) if segments_BL is None else segments_BL > 0
        logits_BLE = router_logits(x_BLD, self.router[...])
        gates_BLJ, chosen_BLJ = route(logits_BLE, self.per_token, is_real_BL, self.is_normalised)
        kept_BLJ, capacity = chosen_BLJ, None
        if self.capacity is not None and not is_dropless:
            capacity = math.ceil(self.capacity * x_BLD.shape[1] * self.per_token / self.experts)
            ranks_BLJ = self._ranks_by_position(chosen_BLJ)
            kept_BLJ = jnp.where(ranks_BLJ < capacity, chosen_BLJ, self.experts)
        weights = tuple(w[...] for w in (self.up, self.gate, self.down) if w is not None)
        y_BLD = _mix(x_BLD, gates_BLJ, kept_BLJ, weights, capacity, self.placement)
        if self.shared is not None:
            y_BLD = y_BLD + self.shared(x_BLD)
        return y_BLD, statistics(logits_BLE, chosen_BLJ, kept_BLJ, is_real_BL)

    def _ranks_by_position(self, chosen_BLJ):
        """Returns `ranks` by positions in the row, in whichever order a sharded length holds them."""
        order = self.placement.length_order(chosen_BLJ.shape[1])
        if order is None:
            return ranks(chosen_BLJ, self.experts)
        return ranks(chosen_BLJ[:, np.argsort(order)], self.experts)[:, order]


class Shared(nnx.Module):
    """The experts that see every token (Dai et al. 2024, DeepSeekMoE): one MLP as wide as all of them together."""

    def __init__(self, width, hidden, is_gated, stddev, output_stddev, placement, rngs):
        self.up = Linear((width,), (hidden,), ("embed",), ("mlp",), stddev=stddev, rngs=rngs)
        self.gate = Linear((width,), (hidden,), ("embed",), ("mlp",), stddev=stddev, rngs=rngs) if is_gated else None
        self.down = Linear((hidden,), (width,), ("mlp",), ("embed",), stddev=output_stddev, rngs=rngs)
        self.placement = placement

    def __call__(self, x_BLD):
        gate_BLF = None if self.gate is None else self.gate(x_BLD)
        hidden_BLF = self.placement.constrain(_activate(self.up(x_BLD), gate_BLF), "batch", "length", "mlp")
        return self.down(hidden_BLF)


def parameter_count(config, *, is_gated=False):
    """Returns the number of parameters of a layer, of a DecoderConfig's `width`, `experts`, `expert_hidden` ..."""
    matrices, width, hidden = 3 if is_gated else 2, config.width, config.expert_hidden
    shared = config.shared_experts * hidden
    of_shared = matrices * width * shared + (matrices - 1) * shared + width if shared else 0
    return width * config.experts + config.experts * matrices * width * hidden + of_shared


def active_weights(config, *, is_gated=False):
    """Returns how many weights a token is multiplied with in a layer: what its FLOPs are counted from."""
    seen = config.experts_per_token + config.shared_experts
    return config.width * config.experts + seen * (3 if is_gated else 2) * config.width * config.expert_hidden


# ---- The router.


def router_logits(x_BLD, weight_DE):
    """Returns the router's logits [B, L, E], in float32 throughout: rounding would change choices (Switch, section 2.4)."""
    x_BLD, weight_DE = x_BLD.astype(jnp.float32), weight_DE.astype(jnp.float32)
    return jnp.einsum("BLD,DE->BLE", x_BLD, weight_DE, precision=lax.Precision.HIGHEST)


def route(logits_BLE, per_token, is_real_BL, is_normalised=True):
    """Returns (gates [B, L, J], experts [B, L, J]): the J most probable experts of each token, the first choice first.

    Gates are the chosen experts' probabilities, over their sum if `is_normalised`; one alone keeps its probability (Switch),
    else the router would have no gradient. Tokens that aren't real choose expert E, which doesn't exist.
    """
    gates_BLJ, chosen_BLJ = lax.top_k(jax.nn.softmax(logits_BLE), per_token)
    if is_normalised and per_token > 1:
        gates_BLJ = gates_BLJ / gates_BLJ.sum(-1, keepdims=True)
    return gates_BLJ, jnp.where(is_real_BL[..., None], chosen_BLJ, logits_BLE.shape[-1])


def ranks(chosen_BLJ, experts):
    """Returns how many copies of the same row come before each copy at its expert: first choices first, then positions."""
    batch, length, choices = chosen_BLJ.shape
    chosen_BT = chosen_BLJ.swapaxes(1, 2).reshape(batch, choices * length)
    is_here_BTE = (chosen_BT[..., None] == jnp.arange(experts)).astype(jnp.int32)
    before_BT = ((jnp.cumsum(is_here_BTE, 1) - 1) * is_here_BTE).sum(-1)
    return before_BT.reshape(batch, choices, length).swapaxes(1, 2)


def statistics(logits_BLE, chosen_BLJ, kept_BLJ, is_real_BL):
    """Returns [B, R] in the order of `ROUTER_STATISTICS`, each a mean over the real tokens of a row.

    balance: sum over experts of (share of the row's copies x experts) x mean probability, 1 when all are equal (Switch,
    equation 4; per row as in DeepSeek-V3, equation 17, so that no number depends on how rows are cut over devices and
    microbatches). z: squared logsumexp of the logits (Zoph et al. 2022, ST-MoE, equation 5).
    """
    experts, choices = logits_BLE.shape[-1], chosen_BLJ.shape[-1]
    real_BL1 = is_real_BL[..., None].astype(jnp.float32)
    tokens_B1 = jnp.maximum(real_BL1.sum(1), 1.0)
    probability_BE = (jax.nn.softmax(logits_BLE) * real_BL1).sum(1) / tokens_B1
    share_BE = (chosen_BLJ[..., None] == jnp.arange(experts)).sum((1, 2)) / (choices * tokens_B1)
    z_B1 = (jnp.square(jax.nn.logsumexp(logits_BLE, -1, keepdims=True)) * real_BL1).sum(1) / tokens_B1
    dropped_B1 = (kept_BLJ != chosen_BLJ).sum((1, 2))[:, None] / (choices * tokens_B1)
    balance_B1 = experts * (share_BE * probability_BE).sum(-1, keepdims=True)
    return jnp.concatenate([balance_B1, z_B1, share_BE.max(-1, keepdims=True), dropped_B1], -1)


# ---- From tokens to experts and back.


@dataclasses.dataclass(frozen=True)
class _Local:
    """How one device does its part: `experts` of its own, `shards` devices that exchange tokens.

    expert_axes, hidden_axes, gather_axes, length_axes: mesh axes over which experts, their hidden width, their weights'
    `expert_embed` dimension and (beside the context) the positions are cut. is_exchanged: tokens differ along expert_axes;
    else every device has all, does those of its own experts, and results are added up. capacity: of a row and expert, or None.
    """

    experts: int
    shards: int = 1
    expert_axes: tuple[str, ...] = ()
    hidden_axes: tuple[str, ...] = ()
    gather_axes: tuple[str, ...] = ()
    length_axes: tuple[str, ...] = ()
    is_exchanged: bool = False
    capacity: int | None = None
    platform: str = "cpu"


def _mix(x_BLD, gates_BLJ, chosen_BLJ, weights, capacity, placement):
    """Returns the sum over each token's chosen experts of gate x expert(x); expert E counts as none."""
    experts = weights[0].shape[0]
    if placement.mesh.size == 1:
        local = _Local(experts, capacity=capacity, platform=placement.platform)
        return _mix_local(x_BLD, gates_BLJ, chosen_BLJ, weights, local)
    axes = _wide_axes(placement)
    rows, length = x_BLD.shape[:2]
    is_sharded = rows % placement.axis_size("batch") == 0 and length % placement.axis_size("length") == 0
    row_axes = ("batch", "length") if is_sharded else (None, None)
    beside = tuple(name for name in axes["residual_length"] if name not in axes["length"])
    # Sequence-sharded residuals: positions are gathered here and partial sums scattered, instead of summed everywhere.
    is_scattered = is_sharded and beside and beside == axes["mlp"] and length % placement.axis_size("residual_length") == 0
    local = _Local(
        experts=experts // placement.axis_size("experts"),
        shards=placement.axis_size("experts"),
        expert_axes=axes["experts"],
        hidden_axes=axes["mlp"],
        gather_axes=axes["expert_embed"],
        length_axes=beside if is_scattered else (),
        is_exchanged=is_sharded and bool(axes["experts"]),
        capacity=capacity,
        platform=placement.platform,
    )
    x_spec = placement.spec("batch", "residual_length", None) if is_scattered else placement.spec(*row_axes, None)
    up, down = placement.spec("experts", "expert_embed", "mlp"), placement.spec("experts", "mlp", "expert_embed")
    specs = (x_spec, placement.spec(*row_axes, None), placement.spec(*row_axes, None), (up,) * (len(weights) - 1) + (down,))
    return jax.shard_map(
        functools.partial(_mix_local, local=local), mesh=placement.mesh, in_specs=specs, out_specs=x_spec, check_vma=False
    )(x_BLD, gates_BLJ, chosen_BLJ, weights)


def _wide_axes(placement):
    """Returns {logical axis: mesh axes of more than one device that it is laid over}."""
    logical = ("batch", "length", "residual_length", "experts", "mlp", "expert_embed")
    return {axis: tuple(name for name in placement.mesh_axes(axis) if placement.mesh.shape[name] > 1) for axis in logical}


def _check_rules(placement):
    axes = _wide_axes(placement)
    if not set(axes["experts"]) <= set(axes["batch"]):
        raise ConfigError(
            f"mesh.rules lay experts over {axes['experts']} and batch over {axes['batch']}: tokens are exchanged between "
            "shards of the batch, so every axis of experts must be one of batch, too."
        )
    if set(axes["mlp"]) & set(axes["batch"] + axes["length"]):
        raise ConfigError(
            f"mesh.rules lay mlp over {axes['mlp']}, batch over {axes['batch']} and length over {axes['length']}: the experts' "
            "hidden width can't be cut over an axis that cuts tokens."
        )


def _mix_local(x_BLD, gates_BLJ, chosen_BLJ, weights, local):
    """The part of one device: all of it where there is one."""
    if local.length_axes:
        x_BLD = lax.all_gather(x_BLD, local.length_axes, axis=1, tiled=True)
    if local.expert_axes and not local.is_exchanged:
        mine_BLJ = chosen_BLJ - lax.axis_index(local.expert_axes) * local.experts
        chosen_BLJ = jnp.where((mine_BLJ >= 0) & (mine_BLJ < local.experts), mine_BLJ, local.experts)
    if local.capacity is None:
        y_BLD = _dropless(x_BLD, gates_BLJ, chosen_BLJ, weights, local)
    else:
        y_BLD = _with_capacity(x_BLD, gates_BLJ, chosen_BLJ, weights, local)
    if local.length_axes:
        return lax.psum_scatter(y_BLD, local.length_axes, scatter_dimension=1, tiled=True)
    partial = local.hidden_axes + (() if local.is_exchanged else local.expert_axes)
    return lax.psum(y_BLD, partial) if partial else y_BLD


def _dropless(x_BLD, gates_BLJ, chosen_BLJ, weights, local):
    """Copies sorted by expert, exchanged if need be, multiplied group by group."""
    batch, length, width = x_BLD.shape
    tokens, choices = batch * length, gates_BLJ.shape[-1]
    experts = local.experts * (local.shards if local.is_exchanged else 1)
    chosen_T = chosen_BLJ.reshape(tokens * choices)
    counts_E = (chosen_T[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    product = Product.of_ragged_groups(local.platform, chosen_T.size // experts, local.gather_axes)
    block = product.block
    # Sorted copies are handed to the products where they lie, or sent on: only the former need groups of whole blocks.
    aligned = 1 if local.is_exchanged else block
    starts_E = _sum_before(_round_up(counts_E, aligned))
    order_T = jnp.argsort(chosen_T, stable=True)
    rank_T = jnp.zeros_like(order_T).at[order_T].set(jnp.arange(chosen_T.size, dtype=order_T.dtype))
    slots = chosen_T.size if aligned == 1 else _round_up(chosen_T.size, block) + experts * block
    # `mode="fill"`: the expert that doesn't exist has a slot that doesn't either.
    shift_T = (starts_E - _sum_before(counts_E)).at[chosen_T].get(mode="fill", fill_value=slots)
    slots_TJ = (rank_T + shift_T).reshape(tokens, choices)
    copies_S = _inverse(slots_TJ, slots)
    rows_SD = dispatch(x_BLD.reshape(tokens, width), slots_TJ, copies_S)
    if local.is_exchanged:
        there, back, sizes_E, received = _exchange_plan(counts_E, tokens, choices, block, local)
        rows_SD = exchange(rows_SD, there, back, received, local.expert_axes, local.platform)
        rows_SD = expert_mlp(rows_SD, weights, sizes_E, product)
        rows_SD = exchange(rows_SD, back, there, slots, local.expert_axes, local.platform)
    else:
        rows_SD = expert_mlp(rows_SD, weights, _round_up(counts_E, aligned), product)
    y_TD = combine(rows_SD, gates_BLJ.reshape(tokens, choices), slots_TJ, copies_S)
    return y_TD.reshape(batch, length, width)


def _with_capacity(x_BLD, gates_BLJ, chosen_BLJ, weights, local):
    """Every expert has the same number of slots for each row; slots of other devices' experts are exchanged for own ones."""
    batch, length, width = x_BLD.shape
    tokens, choices = batch * length, gates_BLJ.shape[-1]
    experts = local.experts * (local.shards if local.is_exchanged else 1)
    # A device that has part of a row only (context parallelism) ranks the copies that it has among themselves.
    capacity = min(local.capacity, length)
    row_B11 = jnp.arange(batch)[:, None, None]
    slots_BLJ = (row_B11 * experts + chosen_BLJ) * capacity + ranks(chosen_BLJ, experts)
    slots = batch * experts * capacity
    slots_TJ = jnp.where(chosen_BLJ < experts, slots_BLJ, slots).reshape(tokens, choices)
    copies_S = _inverse(slots_TJ, slots)
    rows_SD = dispatch(x_BLD.reshape(tokens, width), slots_TJ, copies_S)
    rows_BECD = rows_SD.reshape(batch, experts, capacity, width)
    if local.is_exchanged:
        rows_BECD = lax.all_to_all(rows_BECD, local.expert_axes, 1, 0, tiled=True)
    of_each = rows_BECD.shape[0] * capacity
    rows_SD = rows_BECD.swapaxes(0, 1).reshape(local.experts * of_each, width)
    product = Product.of_equal_groups(local.platform, of_each, local.gather_axes)
    rows_SD = expert_mlp(rows_SD, weights, jnp.full((local.experts,), of_each, jnp.int32), product)
    rows_BECD = rows_SD.reshape(local.experts, -1, capacity, width).swapaxes(0, 1)
    if local.is_exchanged:
        rows_BECD = lax.all_to_all(rows_BECD, local.expert_axes, 0, 1, tiled=True)
    y_TD = combine(rows_BECD.reshape(slots, width), gates_BLJ.reshape(tokens, choices), slots_TJ, copies_S)
    return y_TD.reshape(batch, length, width)


def expert_mlp(rows_SD, weights, sizes_E, product):
    """Returns [S, D]: the MLP of each group's expert, groups of `sizes_E` rows one after the other; rows beyond are undefined.

    weights: (up [E, D, F], down [E, F, D]), with (up, gate [E, D, F], down) gated.
    """
    up, *gate, down = weights
    groups = product.groups(sizes_E, rows_SD.shape[0])
    gate_SF = grouped_matmul(rows_SD, gate[0], groups, product, 1) if gate else None
    hidden_SF = _activate(grouped_matmul(rows_SD, up, groups, product, 1), gate_SF)
    return grouped_matmul(hidden_SF, down, groups, product, 2)


def _activate(up, gate):
    return gelu(up) if gate is None else jax.nn.silu(gate) * up


def _round_up(number, multiple):
    return -(-number // multiple) * multiple


def _sum_before(x, axis=0):
    return jnp.cumsum(x, axis) - x


def _inverse(slots_TJ, slots):
    """Returns which copy (token x J + choice) lies in each slot; a slot that is empty has the first that doesn't exist."""
    copies = jnp.arange(slots_TJ.size, dtype=jnp.int32)
    return jnp.full((slots,), slots_TJ.size, jnp.int32).at[slots_TJ.reshape(-1)].set(copies, mode="drop")


def _take(x, index):
    """Returns rows of x; zeros for an index that doesn't exist."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x_TD, slots_TJ, copies_S):
    """Returns [S, D]: the token of the copy in each slot, zero in empty ones; both passes are gathers, none scatters."""
    return _take(x_TD, copies_S // slots_TJ.shape[1])


def _dispatch_backward(slots_TJ, g_SD):
    return _take(g_SD, slots_TJ).sum(1, dtype=jnp.float32).astype(g_SD.dtype), None, None


dispatch.defvjp(lambda x, slots, copies: (dispatch(x, slots, copies), slots), _dispatch_backward)


@jax.custom_vjp
def combine(y_SD, gates_TJ, slots_TJ, copies_S):
    """Returns [T, D]: the sum of each token's copies, weighted by their gates, added in float32."""
    mixed_TD = jnp.einsum("TJD,TJ->TD", _take(y_SD, slots_TJ), gates_TJ, preferred_element_type=jnp.float32)
    return mixed_TD.astype(y_SD.dtype)


def _combine_forward(y_SD, gates_TJ, slots_TJ, copies_S):
    return combine(y_SD, gates_TJ, slots_TJ, copies_S), (y_SD, gates_TJ, slots_TJ, copies_S)


def _combine_backward(residuals, g_TD):
    y_SD, gates_TJ, slots_TJ, copies_S = residuals
    of_gates_TJ = jnp.einsum("TD,TJD->TJ", g_TD, _take(y_SD, slots_TJ), preferred_element_type=jnp.float32)
    g_SD = _take(g_TD, copies_S // slots_TJ.shape[1]) * _take(gates_TJ.reshape(-1), copies_S)[:, None]
    return g_SD.astype(y_SD.dtype), of_gates_TJ.astype(gates_TJ.dtype), None, None


combine.defvjp(_combine_forward, _combine_backward)


# ---- The exchange of copies between the devices of the expert axis.


def _exchange_plan(counts_E, tokens, choices, block, local):
    """Returns (there, back, sizes_E, received): the slices that go to the experts and back, rows per own expert, and slots.

    A slice is what one device sends to one expert; it lands right where its expert's group is. Each direction is
    (input_offsets, send_sizes, output_offsets, recv_sizes) as `jax.lax.ragged_all_to_all` wants them.
    """
    here = lax.axis_index(local.expert_axes)
    counts_NE = lax.all_gather(counts_E, local.expert_axes)
    sizes_NE = _round_up(counts_NE.sum(0), block).reshape(local.shards, local.experts)
    starts_E = _sum_before(sizes_NE, 1).reshape(-1)  # where an expert's group begins on its device
    arrives_NE = starts_E + _sum_before(counts_NE, 0)  # where the slice of device N begins in it
    leaves_NE = _sum_before(counts_NE, 1)  # where it begins among the sorted copies of device N

    def own(x_NE):
        return lax.dynamic_slice_in_dim(x_NE, here * local.experts, local.experts, 1).reshape(-1)

    there = (leaves_NE[here], counts_E, arrives_NE[here], own(counts_NE))
    back = (own(arrives_NE), own(counts_NE), own(leaves_NE), counts_E)
    # A token's choices differ, so at most `experts` of them are of one device: the bound that nothing can exceed.
    received = local.shards * tokens * min(choices, local.experts) + local.experts * (block - 1)
    return there, back, sizes_NE[here], _round_up(received, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def exchange(rows_SD, there, back, slots, axes, platform):
    """Returns [slots, D]: the slices of rows that the other devices of `axes` send here by the plan `there`, else zeros.

    The plan `back` is its inverse, and what the gradient takes.
    """
    output_SD = jnp.zeros((slots, rows_SD.shape[1]), rows_SD.dtype)
    send = _gathered_all_to_all if platform == "cpu" else lax.ragged_all_to_all
    return send(rows_SD, output_SD, *there, axis_name=axes)


def _exchange_forward(rows_SD, there, back, slots, axes, platform):
    return exchange(rows_SD, there, back, slots, axes, platform), (there, back, rows_SD.shape[0])


def _exchange_backward(slots, axes, platform, residuals, g_SD):
    there, back, rows = residuals
    return exchange(g_SD, back, there, rows, axes, platform), None, None


exchange.defvjp(_exchange_forward, _exchange_backward)


def _gathered_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Returns what `lax.ragged_all_to_all` returns, for platforms without it: all send all, and each takes what is its own."""
    shards = lax.axis_size(axis_name)
    begin, arrive = (lax.all_to_all(x, axis_name, 0, 0, tiled=True) for x in (input_offsets, output_offsets))
    everything = lax.all_gather(operand, axis_name)
    position = jnp.arange(output.shape[0])[:, None]
    is_inside = (position >= arrive) & (position < arrive + recv_sizes)
    slice_of = jnp.argmax(is_inside, 1)
    sender = slice_of // (recv_sizes.shape[0] // shards)
    row = begin[slice_of] + position[:, 0] - arrive[slice_of]
    return jnp.where(is_inside.any(1, keepdims=True), everything[sender, row], output)
