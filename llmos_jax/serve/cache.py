"""Keys and values in pages, on the devices: made, gathered for a program's rows, written back. Donated and updated in place.

What a program reads of its rows is gathered from pages into columns that all rows have in common: every past ends in the same
column, wherever it begins, so that what comes next has one place for all rows. A decoding loop goes on in these columns, one
further for each token, and the next one goes on from there; only what was added is written back to pages. A chunk of several
tokens attends to the past and to itself side by side (`models.attention.attend_cached`). Where the platform has a kernel that
reads pages where they lie, nothing is gathered: each token is written into its page (`models.attention_paged`).
"""

import jax
import jax.numpy as jnp
from jax import lax

from llmos_jax.models.attention import attend, attend_cached
from llmos_jax.models.attention_paged import attend_pages

# On a CPU the keys of so many columns lie side by side: a fourth less time for their products with the queries.
KEY_BLOCK = 64


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
    """Returns how every pool, and what was gathered of it, is laid out."""
    return stages.sharding("heads")


def page_bytes(family, config, page_size, dtype):
    """Returns the bytes of one page, keys and values of all layers."""
    (_, groups, length, size), layers = family.cache_shapes(config, 1, page_size)
    return 2 * layers * groups * length * size * jnp.dtype(dtype).itemsize


def gather(pools, table_BP, past_B, end, blocks=1):
    """Returns the past of rows, (keys [G x B, C, K, M / C], values [G x B, M, K]) of each layer; M = P x page_size columns.

    table_BP: the pages of each row, whose past_B[b] tokens are to end before column `end`. Other columns are zero: what earlier
    owners left in a page never matters, not even if it is not finite. Keys lie in C `blocks`, as the product with queries
    reads them: a decoding loop would turn them around in every step, and would copy groups and rows that are two dimensions.
    """
    page_size, pages = pools[0][0].shape[2], table_BP.shape[1]
    token_BM = jnp.arange(pages * page_size) - (end - past_B)[:, None]
    page_BM = jnp.take_along_axis(table_BP, jnp.clip(token_BM // page_size, 0, pages - 1), 1)
    is_there_BM = (token_BM >= 0) & (token_BM < past_B[:, None])

    def read(pool_GPSK):
        read_GBMK = jnp.where(is_there_BM[None, :, :, None], pool_GPSK[:, page_BM, token_BM % page_size], 0)
        return _pairs(read_GBMK)

    return [(_in_blocks(read(key), blocks), read(value)) for key, value in pools]


def _in_blocks(key_NMK, blocks):
    pairs, columns, size = key_NMK.shape
    return key_NMK.reshape(pairs, blocks, columns // blocks, size).swapaxes(2, 3)


def init_columns(pools, rows, pages, blocks=1):
    """Returns zeroed columns as `gather` fills them, of `pages` pages for each row."""

    def make(pool):
        groups, _, page_size, size = pool.shape
        return jnp.zeros((groups * rows, pages * page_size, size), pool.dtype)

    return [(_in_blocks(make(key), blocks), make(value)) for key, value in pools]


def gather_some(pools, columns, table_BP, past_B, end, row_B, count):
    """Returns the columns with the first `count` of these rows gathered anew."""
    groups, rows, blocks = pools[0][0].shape[0], table_BP.shape[0], columns[0][0].shape[1]

    def fill(index, columns):
        row = row_B[index]
        new = gather(pools, *(lax.dynamic_slice_in_dim(x, row, 1) for x in (table_BP, past_B)), end, blocks)
        return jax.tree.map(lambda old, new: lax.dynamic_update_slice_in_dim(old, new[:, None], row, 1), columns, new)

    columns = jax.tree.map(lambda x: x.reshape(groups, rows, *x.shape[1:]), columns)
    return jax.tree.map(_pairs, lax.fori_loop(0, count, fill, columns))


def cut(columns, rows, end, length):
    """Returns the keys and values [G, B, length, K] of each layer from column `end` on."""

    def key_at(key_NCKM, column):
        pairs, _, size, width = key_NCKM.shape
        return lax.dynamic_slice(key_NCKM, (0, column // width, 0, column % width), (pairs, 1, size, 1))[..., 0]

    def recent(x_NMK):
        return x_NMK.reshape(-1, rows, *x_NMK.shape[1:])

    return [
        (
            recent(jnp.concatenate([key_at(key, end + step) for step in range(length)], 1)),
            recent(lax.dynamic_slice_in_dim(value, end, length, 1)),
        )
        for key, value in columns
    ]


def _pairs(x_GB):
    """Returns an array whose first dimensions, groups and rows, are one."""
    return x_GB.reshape(-1, *x_GB.shape[2:])


def write_tokens(pools, recent, table_BP, past_B, count_B):
    """Returns the pools with the first count_B recent tokens of each row behind its past; the others go to page 0."""
    page_size, pages = pools[0][0].shape[2], table_BP.shape[1]
    step_N = jnp.arange(recent[0][0].shape[2])
    position_BN = past_B[:, None] + step_N
    index_BN = position_BN // page_size
    page_BN = jnp.take_along_axis(table_BP, jnp.minimum(index_BN, pages - 1), 1)
    page_BN = jnp.where((step_N < count_B[:, None]) & (index_BN < pages), page_BN, 0)
    return jax.tree.map(lambda pool, new: pool.at[:, page_BN, position_BN % page_size].set(_finite(new)), pools, recent)


def write_pages(pools, recent, pages_BP):
    """Returns the pools with the recent tokens of each row, which begin on a page's border, in these whole pages."""

    def write(pool, new):
        groups, rows, _, size = new.shape
        return pool.at[:, pages_BP].set(_finite(new).reshape(groups, rows, pages_BP.shape[1], pool.shape[2], size))

    return jax.tree.map(write, pools, recent)


def _finite(new):
    """Returns what may lie in a page: a kernel weighs what is behind a row's end with zero, and that must be finite."""
    return jnp.where(jnp.isfinite(new), new, 0)


def read_step(start_B, column):
    """Returns the `read` of `Block.decode` for columns, which writes a new token of each row into this one.

    is_turn: what is to be written counts (`Stages.run`).
    """

    def read(columns, query_BLHK, key_BLGK, value_BLGK, is_turn=None, **mask):
        key_NCKM, value_NMK = columns
        pairs, _, size, width = key_NCKM.shape
        new_N1K1 = _finite(key_BLGK[:, 0].astype(key_NCKM.dtype)).swapaxes(0, 1).reshape(pairs, 1, size, 1)
        key_NCKM = _written(key_NCKM, new_N1K1, (0, column // width, 0, column % width), is_turn)
        new_N1K = _finite(value_BLGK[:, 0].astype(value_NMK.dtype)).swapaxes(0, 1).reshape(pairs, 1, size)
        columns = key_NCKM, _written(value_NMK, new_N1K, (0, column, 0), is_turn)
        return attend_cached(query_BLHK, [columns], start_B, column, **mask), columns

    return read


def _written(old, new, place, is_turn):
    if is_turn is not None:
        new = jnp.where(is_turn, new, lax.dynamic_slice(old, place, new.shape))
    return lax.dynamic_update_slice(old, new, place)


def read_pages(table_BP, past_B, step, is_anybodys_B, page_size, placement):
    """Returns the `read` of `Block.decode` for entries that are pools: writes one new token of each row, then reads."""
    # A row that has ended goes on while its neighbours need more steps; beyond its table there is nothing to read.
    longest = table_BP.shape[1] * page_size
    length_B = jnp.where(is_anybodys_B, jnp.minimum(past_B + step + 1, longest), 1)

    def read(pools, query_BLHK, key_BLGK, value_BLGK, *, window, is_turn=True, **form):
        if window is not None:
            raise ValueError("layers with a window have no kernel that reads pages: `pages_refusal` says so.")
        recent = tuple(x.transpose(2, 0, 1, 3).astype(pools[0].dtype) for x in (key_BLGK, value_BLGK))
        (pools,) = write_tokens([pools], [recent], table_BP, past_B + step, (is_anybodys_B & is_turn).astype(jnp.int32))
        return attend_pages(query_BLHK[:, 0], pools, table_BP, length_B, placement=placement, **form)[:, None], pools

    return read


def read_chunk(past_B, dtype, placement):
    """Returns the `read` of `Block.decode` for entries that are pasts (None: there is none), which keeps all new tokens.

    A past ends with its last column. Without one it is the attention of training, with its kernels, where rows are whole.
    """

    def read(past, query_BLHK, key_BLGK, value_BLGK, **mask):
        key_BLGK, value_BLGK = (x.astype(dtype) for x in (key_BLGK, value_BLGK))
        recent = tuple(x.transpose(2, 0, 1, 3) for x in (key_BLGK, value_BLGK))
        if past is None and placement.axis_size("length") == 1:
            return attend(query_BLHK, key_BLGK, value_BLGK, placement=placement, **mask), recent
        own = [(_in_blocks(_pairs(recent[0]), 1), _pairs(recent[1]))]
        if past is None:
            return attend_cached(query_BLHK, own, None, 0, **mask), recent
        end = past[1].shape[1]
        return attend_cached(query_BLHK, [past, *own], end - past_B, end, **mask), recent

    return read
