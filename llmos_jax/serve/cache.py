"""Keys and values in pages, on the devices: made, gathered for a program's rows, written back. Donated and updated in place.

A decoding loop reads blocks of tokens, each of one row, that were gathered from pages once: it writes each token into its row's
latest block, and the next loop goes on from there; only what was added is written back to pages. Rows have as many blocks as
they need, so a row costs what its own context does. A chunk of several tokens attends to its past, gathered into columns that
end together, and to itself side by side (`models.attention.attend_cached`). Where the platform has a kernel that reads pages
where they lie, nothing is gathered: each token is written into its page (`models.attention_paged`).
"""

import jax
import jax.numpy as jnp
from jax import lax

from llmos_jax.models.attention import attend, attend_blocks, attend_cached
from llmos_jax.models.attention_paged import attend_pages

# Tokens of a block, as far as pages allow it. On a CPU 32 and 128 are slower: more pieces; more that is read for nothing.
BLOCK = 64
# The first token of a block that is nobody's: behind all that a row can see.
NOBODYS = 2**30


def init_pools(family, config, pages, page_size, dtype, stages):
    """Returns zeroed pools: a (key, value) pair a layer, [G, pages + 1, page_size, K] each, heads laid over the model axis.

    `stages` (a `stages.Stages`) says where layers lie. Page 0 takes what is written for nobody.
    """
    (rows, groups, length, size), _ = family.cache_shapes(config, pages + 1, page_size)
    shape, sharding = stages.shape(groups, rows, length, size), pool_sharding(stages)

    def make():
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(stages.layers)]

    return jax.jit(make, out_shardings=sharding)()


def pool_sharding(stages):
    """Returns how every pool is laid out."""
    return stages.sharding("heads")


def block_sharding(stages):
    """Returns how every array of blocks is laid out."""
    return stages.sharding(None, "heads")


def page_bytes(family, config, page_size, dtype):
    """Returns the bytes of one page, keys and values of all layers."""
    (_, groups, length, size), layers = family.cache_shapes(config, 1, page_size)
    return 2 * layers * groups * length * size * jnp.dtype(dtype).itemsize


def pages_of_block(page_size):
    """Returns how many pages a block holds."""
    return max(1, BLOCK // page_size)


def gather(pools, table_BP, past_B, end):
    """Returns the past of rows, (keys [G x B, K, M], values [G x B, M, K]) of each layer; M = P x page_size columns.

    table_BP: the pages of each row, whose past_B[b] tokens are to end before column `end`. Other columns are zero: what earlier
    owners left in a page never matters, not even if it is not finite.
    """
    page_size, pages = pools[0][0].shape[2], table_BP.shape[1]
    token_BM = jnp.arange(pages * page_size) - (end - past_B)[:, None]
    page_BM = jnp.take_along_axis(table_BP, jnp.clip(token_BM // page_size, 0, pages - 1), 1)
    is_there_BM = (token_BM >= 0) & (token_BM < past_B[:, None])

    def read(pool_GPSK):
        return _pairs(jnp.where(is_there_BM[None, :, :, None], pool_GPSK[:, page_BM, token_BM % page_size], 0))

    return [(read(key).swapaxes(1, 2), read(value)) for key, value in pools]


def gather_blocks(pools, pages_NP, count_N):
    """Returns (keys [N, G, K, W], values [N, G, W, K]) of each layer: the first count_N tokens of pages; others are zero.

    Keys lie as their product with queries reads them: a decoding loop would turn them around in every step.
    """
    blocks, pages = pages_NP.shape
    is_there_NW = jnp.arange(pages * pools[0][0].shape[2]) < count_N[:, None]

    def read(pool_GPSK):
        groups, _, _, size = pool_GPSK.shape
        value_NGWK = pool_GPSK[:, pages_NP].swapaxes(0, 1).reshape(blocks, groups, -1, size)
        return jnp.where(is_there_NW[:, None, :, None], value_NGWK, 0)

    return [(read(key).swapaxes(2, 3), read(value)) for key, value in pools]


def gather_some(pools, blocks, pages_NP, count_N, index_N, count):
    """Returns the blocks with the first `count` of those in index_N gathered anew."""

    def fill(at, blocks):
        index = index_N[at]
        new = gather_blocks(pools, *(lax.dynamic_slice_in_dim(x, index, 1) for x in (pages_NP, count_N)))
        return jax.tree.map(lambda old, new: lax.dynamic_update_slice_in_dim(old, new, index, 0), blocks, new)

    return lax.fori_loop(0, count, fill, blocks)


def cut(blocks, place_BL, position_BL):
    """Returns the keys and values [G, B, L, K] of each layer that lie in these blocks, where the tokens' positions say."""

    def of_layer(key_NGKW, value_NGWK):
        offset_BL = position_BL % key_NGKW.shape[-1]
        key_BLGK = key_NGKW.at[place_BL, :, :, offset_BL].get(mode="clip")
        value_BLGK = value_NGWK.at[place_BL, :, offset_BL].get(mode="clip")
        return key_BLGK.transpose(2, 0, 1, 3), value_BLGK.transpose(2, 0, 1, 3)

    return [of_layer(*pair) for pair in blocks]


def _pairs(x_GB):
    """Returns an array whose first dimensions, groups and rows, are one."""
    return x_GB.reshape(-1, *x_GB.shape[2:])


def pages_of(table_BP, past_B, length, page_size):
    """Returns the page [B, length] of each token behind the past; 0 beyond the table."""
    index_BL, pages = (past_B[:, None] + jnp.arange(length)) // page_size, table_BP.shape[1]
    return jnp.where(index_BL < pages, jnp.take_along_axis(table_BP, jnp.minimum(index_BL, pages - 1), 1), 0)


def write_tokens(pools, recent, page_BL, past_B, count_B):
    """Returns the pools with the first count_B recent tokens of each row in these pages, behind its past; others in page 0."""
    step_L = jnp.arange(page_BL.shape[1])
    offset_BL = (past_B[:, None] + step_L) % pools[0][0].shape[2]
    page_BL = jnp.where(step_L < count_B[:, None], page_BL, 0)
    return jax.tree.map(lambda pool, new: pool.at[:, page_BL, offset_BL].set(_finite(new)), pools, recent)


def write_pages(pools, recent, pages_BP):
    """Returns the pools with the recent tokens of each row, which begin on a page's border, in these whole pages."""

    def write(pool, new):
        groups, rows, _, size = new.shape
        return pool.at[:, pages_BP].set(_finite(new).reshape(groups, rows, pages_BP.shape[1], pool.shape[2], size))

    return jax.tree.map(write, pools, recent)


def _finite(new):
    """Returns what may lie in a page: a kernel weighs what is behind a row's end with zero, and that must be finite."""
    return jnp.where(jnp.isfinite(new), new, 0)


def read_step(owner_N, first_N, place_B, position_B):
    """Returns the `read` of `Block.decode` for blocks, which writes a new token of each row into its block, then reads.

    owner_N: the row of each block; first_N: the position of its first token. place_B: the block of each row's new token, whose
    position is position_B; out of range: it is not written. is_turn: what is to be written counts (`Stages.run`).
    """
    latest_N1 = position_B[owner_N][:, None]

    def read(blocks, query_BLHK, key_BLGK, value_BLGK, is_turn=None, *, window=None, **form):
        key_NGKW, value_NGWK = blocks
        width = key_NGKW.shape[-1]
        given = place_B, position_B % width, is_turn
        key_NGKW = _written(key_NGKW, key_BLGK.astype(key_NGKW.dtype)[:, 0], *given, axis=3)
        value_NGWK = _written(value_NGWK, value_BLGK.astype(key_NGKW.dtype)[:, 0], *given, axis=2)
        position_NW = first_N[:, None] + jnp.arange(width)
        seen_NW = position_NW <= latest_N1
        if window is not None:
            seen_NW &= position_NW > latest_N1 - window
        given = query_BLHK[:, 0], key_NGKW, value_NGWK, owner_N, seen_NW
        return attend_blocks(*given, **form)[:, None], (key_NGKW, value_NGWK)

    return read


def _written(blocks_NGXY, new_BGK, place_B, offset_B, is_turn, axis):
    """Returns blocks with one token of each row in its place along `axis`; none where no such block is."""
    new_BGK = _finite(new_BGK)
    if len(place_B) == 1 and is_turn is None:
        # XLA:CPU makes a loop of what is below. Out of range is only who has ended: it has all blocks for itself.
        start = [place_B[0], 0, 0, 0]
        start[axis] = offset_B[0]
        return lax.dynamic_update_slice(blocks_NGXY, jnp.expand_dims(new_BGK, axis), start)
    to_B = place_B if is_turn is None else jnp.where(is_turn, place_B, len(blocks_NGXY))
    place = blocks_NGXY.at[to_B, :, offset_B] if axis == 2 else blocks_NGXY.at[to_B, :, :, offset_B]
    return place.set(new_BGK, mode="drop")


def read_pages(table_BP, past_B, step, is_anybodys_B, page_size, placement):
    """Returns the `read` of `Block.decode` for entries that are pools: writes one new token of each row, then reads."""
    # A row that has ended goes on while its neighbours need more steps; beyond its table there is nothing to read.
    longest = table_BP.shape[1] * page_size
    length_B = jnp.where(is_anybodys_B, jnp.minimum(past_B + step + 1, longest), 1)

    def read(pools, query_BLHK, key_BLGK, value_BLGK, *, window, is_turn=True, **form):
        if window is not None:
            raise ValueError("layers with a window have no kernel that reads pages: `pages_refusal` says so.")
        recent = tuple(x.transpose(2, 0, 1, 3).astype(pools[0].dtype) for x in (key_BLGK, value_BLGK))
        page_B1 = pages_of(table_BP, past_B + step, 1, page_size)
        (pools,) = write_tokens([pools], [recent], page_B1, past_B + step, (is_anybodys_B & is_turn).astype(jnp.int32))
        return attend_pages(query_BLHK[:, 0], pools, table_BP, length_B, placement=placement, **form)[:, None], pools

    return read


def read_chunk(past_B, dtype, placement):
    """Returns the `read` of `Block.decode` for entries that are pasts (None: there is none), which keeps all new tokens.

    A past ends with its last column. Without one it is the attention of training, with its kernels, where rows are whole. With
    `only_B` there is one query a row: that of this new token.
    """

    def read(past, query_BLHK, key_BLGK, value_BLGK, only_B=None, **mask):
        key_BLGK, value_BLGK = (x.astype(dtype) for x in (key_BLGK, value_BLGK))
        recent = tuple(x.transpose(2, 0, 1, 3) for x in (key_BLGK, value_BLGK))
        if past is None and only_B is None and placement.axis_size("length") == 1:
            return attend(query_BLHK, key_BLGK, value_BLGK, placement=placement, **mask), recent
        own = (_pairs(recent[0]).swapaxes(1, 2), _pairs(recent[1]))
        end, first_B = 0 if past is None else past[1].shape[1], 0 if only_B is None else only_B
        cached, start_B = ([own], None) if past is None else ([past, own], end - past_B)
        return attend_cached(query_BLHK, cached, start_B, end + first_B, **mask), recent

    return read
