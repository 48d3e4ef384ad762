"""Attention of rows that are cut over devices along their length: ring, and all-gather.

Ring (Liu et al. 2023, "Ring Attention with Blockwise Transformers"): keys and values travel around the devices of the
context axis, and each device folds what passes into an online softmax of its own queries (Milakov & Gimpelshein 2018).
The backward pass is a second journey that computes the probabilities again from the saved log-sum-exp (FlashAttention-2,
Dao 2023); the gradients of keys and values travel with them. Neither pass holds more than a device's own share of the
row plus one tile of scores. All-gather holds the keys and values of whole rows on every device, in one collective each
way instead of a hop a device.

Device i of n holds chunks i and 2n - 1 - i of 2n (`sharding.chunks_of_shard`): under a causal mask an early chunk sees
little and its late partner much, so that every device has the same work (Brandon et al. 2023, "Striped Attention", with
chunks as Llama 3 has them, Dubey et al. 2024, section 3.3.2). Tiles of scores that a mask hides are never computed.

Masks are those of `attention.py`, by the position in the row, whichever device holds it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from llmos_jax.compute.sharding import Placement, chunks_of_shard
from llmos_jax.errors import ConfigError
from llmos_jax.models.attention_cpu import HIDDEN

# Sides of a tile of scores. Larger ones gain nothing on matrix units, smaller ones waste them.
_LARGEST_TILE, _SMALLEST_TILE = 512, 64
# Scores of a tile over all rows and heads of a device: 16 MiB in float32.
_TILE_ELEMENTS = 2**22


@dataclasses.dataclass(frozen=True)
class _Form:
    """What stays the same over a call. axes: the mesh axes of the context; shards: their size, n."""

    placement: Placement
    axes: tuple[str, ...]
    shards: int
    is_ring: bool
    is_causal: bool
    window: int | None
    scale: float


def context_attention(query_BLHK, key_BMGK, value_BMGK, *, segments_BL, is_causal, window, scale, placement):
    """Returns attention [B, L, H, K] in the query's dtype; rows are cut along L and M, in the placement's length order.

    Arithmetic is in the inputs' dtype, with sums, softmax and gradients in float32. The form is
    `placement.context_attention`. Differentiable once, in reverse; what is kept for that is inputs, output and one float32
    a query and head. Raises ConfigError when a length can't be cut into 2 chunks a device, or a chunk into tiles.
    """
    shards = placement.axis_size("length")
    for length in (query_BLHK.shape[1], key_BMGK.shape[1]):
        check_length(length, shards)
    copies = _copies(query_BLHK.shape[2], key_BMGK.shape[2], placement.axis_size("heads"))
    if copies > 1:
        key_BMGK, value_BMGK = (jnp.repeat(x, copies, axis=2) for x in (key_BMGK, value_BMGK))
    is_ring = placement.context_attention == "ring"
    form = _Form(placement, placement.mesh_axes("length"), shards, is_ring, is_causal, window, scale)
    return _attention(query_BLHK, key_BMGK, value_BMGK, segments_BL, form)


def _copies(heads, groups, shards):
    """Returns how often key-value heads are repeated, so that every shard of the query heads holds its own."""
    shared = heads // groups
    return next(copies for copies in range(1, shared + 1) if shared % copies == 0 and groups * copies % shards == 0)


def check_length(length, shards, name="attention: a length"):
    """Raises ConfigError when rows of `length` can't be cut over `shards` devices, two chunks each, and into tiles."""
    if length % (2 * shards):
        nearest = -(-length // (2 * shards)) * 2 * shards
        raise ConfigError(
            f"{name} of {length} can't be cut into 2 chunks for each of the {shards} shards of the context axis; the next "
            f"length that can: {nearest}."
        )
    chunk = length // (2 * shards)
    if chunk > _LARGEST_TILE and _tile(chunk, _LARGEST_TILE) < _SMALLEST_TILE:
        raise ConfigError(
            f"{name} of {length} over {shards} shards gives chunks of {chunk}, which no tile of {_SMALLEST_TILE} to "
            f"{_LARGEST_TILE} positions divides; take a multiple of {2 * shards * _SMALLEST_TILE}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query_BLHK, key_BMGK, value_BMGK, segments_BL, form):
    return _forward(query_BLHK, key_BMGK, value_BMGK, segments_BL, form)[0]


def _forward(query_BLHK, key_BMGK, value_BMGK, segments_BL, form):
    operands = (query_BLHK, key_BMGK, value_BMGK, segments_BL)
    specs, heads = _specs(form.placement, operands)
    output_BLHK, lse_BLH = _on_shards(form, _forward_local, specs, (specs[0], heads), operands)
    return output_BLHK, (*operands, output_BLHK, lse_BLH)


def _backward(form, kept, gradient_BLHK):
    specs, heads = _specs(form.placement, kept[:4])
    in_specs = (*specs, specs[0], heads, specs[0])
    return *_on_shards(form, _backward_local, in_specs, specs[:3], (*kept, gradient_BLHK)), None


_attention.defvjp(_forward, _backward)


def _specs(placement, operands):
    """Returns the specs of query, key, value and segments, and of one number a query and head."""
    batch = "batch" if operands[0].shape[0] % placement.axis_size("batch") == 0 else None
    whole, heads = placement.spec(batch, "length", "heads", None), placement.spec(batch, "length", "heads")
    return (whole, whole, whole, None if operands[3] is None else placement.spec(batch, "length")), heads


def _on_shards(form, function, in_specs, out_specs, operands):
    """Returns `function(form, *operands)` run on every device's own part of the operands."""
    local = functools.partial(function, form)
    run = jax.shard_map(local, mesh=form.placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(*operands)


# ---- One device. Queries are a stack of tiles [S, B, G, R, C, K], keys and values [S, B, G, M, K] with M of a tile.


def _forward_local(form, query_BLHK, key_BMGK, value_BMGK, segments_BL):
    work = _Work.of(form, query_BLHK, key_BMGK)
    query = work.query_tiles(query_BLHK, segments_BL)

    def visit(state, block, source):
        """Folds the keys and values of shard `source` into (peak, total, output) of every query's online softmax."""
        return lax.scan(lambda _, x: (None, work.forward_tile(*x, block, source)), None, (query, state))[1], ()

    shape = query["query"].shape
    start = jnp.full(shape[:-1], HIDDEN, jnp.float32), jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32)
    (peak, total, output), _ = _over_shards(work, visit, start, work.key_tiles(key_BMGK, value_BMGK, segments_BL))
    output_BLHK = work.join_queries(output / total[..., None]).astype(query_BLHK.dtype)
    return output_BLHK, work.join_queries(peak + jnp.log(total))


def _backward_local(form, query_BLHK, key_BMGK, value_BMGK, segments_BL, output_BLHK, lse_BLH, gradient_BLHK):
    work = _Work.of(form, query_BLHK, key_BMGK)
    # The row sums of probability x its gradient, from what is small (FlashAttention-2, section 3.1).
    row_sums_BLH = (gradient_BLHK.astype(jnp.float32) * output_BLHK.astype(jnp.float32)).sum(-1)
    query = work.query_tiles(query_BLHK, segments_BL, gradient=gradient_BLHK, lse=lse_BLH, row_sums=row_sums_BLH)

    def visit(query_gradients, block, source):
        """Adds what the keys and values of shard `source` give to the queries' gradients; returns theirs beside."""

        def step(block_gradients, x):
            return work.backward_tile(*x, block_gradients, block, source)

        nothing = tuple(jnp.zeros(block[name].shape, jnp.float32) for name in ("key", "value"))
        block_gradients, query_gradients = lax.scan(step, nothing, (query, query_gradients))
        return query_gradients, block_gradients

    start = jnp.zeros(query["query"].shape, jnp.float32)
    block = work.key_tiles(key_BMGK, value_BMGK, segments_BL)
    query_gradients, (key_gradients, value_gradients) = _over_shards(work, visit, start, block)
    return (
        (work.join_queries(query_gradients) * form.scale).astype(query_BLHK.dtype),
        (work.join_keys(key_gradients) * form.scale).astype(key_BMGK.dtype),
        work.join_keys(value_gradients).astype(value_BMGK.dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Work:
    """How one device cuts its work. shard: its index; groups: its key-value heads; lengths of chunks and of tiles."""

    form: _Form
    shard: jax.Array
    groups: int
    query_chunk: int
    query_tile: int
    key_chunk: int
    key_tile: int

    @classmethod
    def of(cls, form, query_BLHK, key_BMGK):
        rows, length, heads, _ = query_BLHK.shape
        fits = int((_TILE_ELEMENTS / (rows * heads)) ** 0.5)
        query_chunk, key_chunk = length // 2, key_BMGK.shape[1] // 2
        query_tile, key_tile = _tile(query_chunk, fits), _tile(key_chunk, fits)
        return cls(form, lax.axis_index(form.axes), key_BMGK.shape[2], query_chunk, query_tile, key_chunk, key_tile)

    def query_tiles(self, query_BLHK, segments_BL, **others):
        """Returns the tiles of queries, and of what is given with them, with the position of each tile's first query."""
        tiles = {name: self._split_queries(x) for name, x in {"query": query_BLHK, **others}.items()}
        tiles["segments"] = _split_rows(segments_BL, self.query_tile)
        tiles["start"] = self._starts(self.shard, self.query_chunk, self.query_tile)
        return tiles

    def key_tiles(self, key_BMGK, value_BMGK, segments_BL):
        """Returns the tiles of keys and values: what travels."""
        key, value = (_split_rows(x, self.key_tile).swapaxes(2, 3) for x in (key_BMGK, value_BMGK))
        return {"key": key, "value": value, "segments": _split_rows(segments_BL, self.key_tile)}

    def join_queries(self, tiles):
        """Returns tiles [S, B, G, R, C, ...] as [B, L, H, ...]."""
        x = jnp.moveaxis(tiles, (0, 4), (1, 2))
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])

    def join_keys(self, tiles):
        """Returns tiles [S, B, G, M, K] as [B, M, G, K]."""
        x = jnp.moveaxis(tiles, (0, 3), (1, 2))
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def forward_tile(self, tile, state, block, source):
        """Returns (peak, total, output) of one tile of queries with a block of keys folded in."""

        def fold(number, state):
            peak, total, output = state
            scores = self._scores(tile, block, number, source)
            new_peak = jnp.maximum(peak, scores.max(-1))
            exponentials = jnp.exp(scores - new_peak[..., None])
            decay = jnp.exp(peak - new_peak)
            value_BGMK = _take(block["value"], number)
            mixed = _einsum("BGRCM,BGMK->BGRCK", exponentials.astype(value_BGMK.dtype), value_BGMK)
            return new_peak, total * decay + exponentials.sum(-1), output * decay[..., None] + mixed

        return self._over_seen_tiles(tile["start"], source, fold, state)

    def backward_tile(self, tile, query_gradient, block_gradients, block, source):
        """Returns ((key, value) gradients of the block, gradient of one tile of queries), each with this pair's part added."""

        def add(number, state):
            query_gradient, key_gradients, value_gradients = state
            key_BGMK, value_BGMK = _take(block["key"], number), _take(block["value"], number)
            probabilities = jnp.exp(self._scores(tile, block, number, source) - tile["lse"][..., None])
            products = _einsum("BGRCK,BGMK->BGRCM", tile["gradient"], value_BGMK)
            score_gradients = (probabilities * (products - tile["row_sums"][..., None])).astype(key_BGMK.dtype)
            probabilities = probabilities.astype(value_BGMK.dtype)
            return (
                query_gradient + _einsum("BGRCM,BGMK->BGRCK", score_gradients, key_BGMK),
                _add_at(key_gradients, number, _einsum("BGRCM,BGRCK->BGMK", score_gradients, tile["query"])),
                _add_at(value_gradients, number, _einsum("BGRCM,BGRCK->BGMK", probabilities, tile["gradient"])),
            )

        query_gradient, *block_gradients = self._over_seen_tiles(tile["start"], source, add, (query_gradient, *block_gradients))
        return tuple(block_gradients), query_gradient

    def _over_seen_tiles(self, start, source, function, state):
        """Returns `state` after `state = function(number, state)` for every tile of keys that a tile of queries sees.

        A while loop, whatever is seen: a rematerialisation policy that keeps products can't look for them in here.
        """
        count, masks = self.key_chunk // self.key_tile, (self.form.is_causal, self.form.window)
        bounds = [
            seen_tiles(start, self.query_tile, chunk * self.key_chunk, self.key_tile, count, *masks)
            for chunk in chunks_of_shard(source, self.form.shards)
        ]
        (first_early, stop_early), (first_late, stop_late) = bounds
        early = stop_early - first_early

        def step(carry):
            turn, state = carry
            number = jnp.where(turn < early, first_early + turn, count + first_late + turn - early)
            return turn + 1, function(number, state)

        return lax.while_loop(lambda carry: carry[0] < early + stop_late - first_late, step, (jnp.int32(0), state))[1]

    def _scores(self, tile, block, number, source):
        """Returns scores [B, G, R, C, M] in float32 of a tile of queries and tile `number` of keys, hidden ones `HIDDEN`."""
        scores = _einsum("BGRCK,BGMK->BGRCM", tile["query"], _take(block["key"], number)) * self.form.scale
        if self.form.is_causal:
            key_start = self._starts(source, self.key_chunk, self.key_tile)[number]
            distance = (tile["start"] + jnp.arange(self.query_tile))[:, None] - (key_start + jnp.arange(self.key_tile))
            seen = distance >= 0
            if self.form.window is not None:
                seen &= distance < self.form.window
            scores = jnp.where(seen, scores, HIDDEN)
        if tile["segments"] is not None:
            same = tile["segments"][:, :, None] == _take(block["segments"], number)[:, None, :]
            scores = jnp.where(same[:, None, None], scores, HIDDEN)
        return scores

    def _starts(self, shard, chunk, tile):
        """Returns the position in the row of the first element of each tile that a shard holds, [S]."""
        starts = [index * chunk + jnp.arange(0, chunk, tile) for index in chunks_of_shard(shard, self.form.shards)]
        return jnp.concatenate(starts)

    def _split_queries(self, x):
        """Returns [B, L, H, ...] as tiles [S, B, G, R, C, ...]."""
        tiles = _split_rows(x, self.query_tile)
        tiles = tiles.reshape(*tiles.shape[:3], self.groups, -1, *tiles.shape[4:])
        return jnp.moveaxis(tiles, 2, 4)


def seen_tiles(query_start, query_tile, key_start, key_tile, count, is_causal, window):
    """Returns (first, stop): of a chunk's `count` tiles of keys, those that a tile of queries sees anything of."""
    if not is_causal:
        return 0, count
    stop = (query_start + query_tile - 1 - key_start) // key_tile + 1
    first = 0 if window is None else (query_start - window + 1 - key_start) // key_tile
    return jnp.clip(first, 0, count), jnp.clip(stop, 0, count)


# ---- Between devices.


def _over_shards(work, visit, carry, block):
    """Returns (carry, what the visits returned for this device's own block, summed over the devices visited).

    `carry, parts = visit(carry, block of shard s, s)` runs on every device for every block that it may see.
    """
    form = work.form
    if not form.is_ring:
        blocks = jax.tree.map(lambda x: lax.all_gather(x, form.axes), block)
        carry, parts = lax.scan(lambda carry, x: visit(carry, *x), carry, (blocks, jnp.arange(form.shards)))
        # Tiled: under vmap, JAX 0.10 returns a wrong shape for the form that drops the scattered dimension.
        return carry, jax.tree.map(lambda x: lax.psum_scatter(x, form.axes, tiled=True)[0], parts)
    carry, sums = visit(carry, block, work.shard)
    for direction, hops in routes(form.shards, work.query_chunk, form.window):
        if hops:
            carry, sums = _travel(work, visit, direction, hops, carry, sums, block)
    return carry, sums


def _travel(work, visit, direction, hops, carry, sums, block):
    """Sends every device's block, and `sums` with it, on `hops` hops; returns (carry, sums), the sums at home again.

    Hops do not depend on the visit of the same step, so that they can run at the same time.
    """
    axes, shards = work.form.axes, work.form.shards

    def shift(tree, by):
        return jax.tree.map(lambda x: lax.ppermute(x, axes, [(i, (i + by) % shards) for i in range(shards)]), tree)

    def step(state, hop):
        carry, block, sums = state
        following, sums = shift(block, direction), shift(sums, direction)
        carry, parts = visit(carry, block, (work.shard - direction * hop) % shards)
        return (carry, following, jax.tree.map(jnp.add, sums, parts)), None

    state = carry, shift(block, direction), sums
    (carry, block, sums), _ = lax.scan(step, state, jnp.arange(1, hops)) if hops > 1 else (state, None)
    sums = shift(sums, direction)
    carry, parts = visit(carry, block, (work.shard - direction * hops) % shards)  # of the last, nothing is sent on
    return carry, shift(jax.tree.map(jnp.add, sums, parts), -direction * hops)


def routes(shards, chunk, window):
    """Returns the journeys of a block as (direction, hops): around the ring, or as far either way as a window reaches."""
    whole = ((1, shards - 1),)
    if window is None:
        return whole
    reach = -(-(window - 1) // chunk)
    holder = {index: shard for shard in range(shards) for index in chunks_of_shard(shard, shards)}
    hops = [holder[i] - holder[j] for i in holder for j in range(max(0, i - reach), i + 1)]
    return ((1, max(hops)), (-1, -min(hops))) if max(hops) - min(hops) < shards else whole


def _tile(length, fits):
    """Returns the largest divisor of `length` that is a side of a tile, `fits` at most where there is one."""
    fits = min(max(fits, _SMALLEST_TILE), _LARGEST_TILE)
    return next(side for side in range(min(fits, length), 0, -1) if length % side == 0)


def _split_rows(x, tile):
    """Returns [B, L, ...] as tiles [S, B, tile, ...]; None stays None."""
    return None if x is None else x.reshape(x.shape[0], -1, tile, *x.shape[2:]).swapaxes(0, 1)


def _take(tiles, number):
    return lax.dynamic_index_in_dim(tiles, number, keepdims=False)


def _add_at(tiles, number, x):
    return lax.dynamic_update_index_in_dim(tiles, _take(tiles, number) + x, number, 0)


def _einsum(letters, x, y):
    return jnp.einsum(letters, x, y, preferred_element_type=jnp.float32)
