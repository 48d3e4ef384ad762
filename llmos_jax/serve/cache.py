"""Keys and values in pages, on the devices: made, gathered for a program's rows, written back. Donated and updated in place.

A program reads what its rows have (the past) gathered from pages, keeps the tokens that it adds (the recent ones) beside it
and writes only these back: whatever a decoding loop does in between touches neither pool nor past. Both parts are attended to
at once (`models.attention.attend_cached`). At its end the loop adds them to the past, too: the next one goes on from it. Where
the platform has a kernel that reads pages where they lie, nothing is gathered: each token is written into its page
(`models.attention_paged`).
"""

import jax
import jax.numpy as jnp
from jax import lax

from llmos_jax.models.attention import attend, attend_cached
from llmos_jax.models.attention_paged import attend_pages


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
    return stages.sharding("heads", None, None, None)


def page_bytes(family, config, page_size, dtype):
    """Returns the bytes of one page, keys and values of all layers."""
    (_, groups, length, size), layers = family.cache_shapes(config, 1, page_size)
    return 2 * layers * groups * length * size * jnp.dtype(dtype).itemsize


def gather(pools, table_BP, past_B):
    """Returns the past of rows, (keys [G, B, K, P x page_size], values [G, B, P x page_size, K]) of each layer.

    table_BP: the pages of each row; zeros from past_B on. What earlier owners left in a page never matters: not even if it is
    not finite. Keys lie as the product with queries reads them: a decoding loop would turn them around in every step.
    """

    def read(pool_GPSK):
        groups, _, page_size, size = pool_GPSK.shape
        rows, pages = table_BP.shape
        past_GBMK = pool_GPSK[:, table_BP].reshape(groups, rows, pages * page_size, size)
        return jnp.where((jnp.arange(pages * page_size) < past_B[:, None])[None, :, :, None], past_GBMK, 0)

    return [(read(key).swapaxes(2, 3), read(value)) for key, value in pools]


def init_recent(pools, rows, length):
    """Returns room for `length` tokens of each row, a (key, value) pair a layer, [G, B, length, K] each."""
    return jax.tree.map(lambda pool: jnp.zeros((pool.shape[0], rows, length, pool.shape[3]), pool.dtype), pools)


def write_tokens(pools, recent, table_BP, past_B, count_B):
    """Returns the pools with the first count_B recent tokens of each row behind its past; the others go to page 0."""
    page_size, pages = pools[0][0].shape[2], table_BP.shape[1]
    step_N = jnp.arange(recent[0][0].shape[2])
    position_BN = past_B[:, None] + step_N
    index_BN = position_BN // page_size
    page_BN = jnp.take_along_axis(table_BP, jnp.minimum(index_BN, pages - 1), 1)
    page_BN = jnp.where((step_N < count_B[:, None]) & (index_BN < pages), page_BN, 0)
    return jax.tree.map(lambda pool, new: pool.at[:, page_BN, position_BN % page_size].set(_finite(new)), pools, recent)


def extend(past, recent, past_B, count_B):
    """Returns the past of `gather` with the first count_B recent tokens of each row behind its first past_B tokens."""
    rows_B1 = jnp.arange(past_B.shape[0])[:, None]
    step_N = jnp.arange(recent[0][0].shape[2])
    # What is nobody's has no place.
    slot_BN = jnp.where(step_N < count_B[:, None], past_B[:, None] + step_N, past[0][1].shape[2])

    def write(past, recent):
        (key_GBKM, value_GBMK), (new_key_GBNK, new_value_GBNK) = past, map(_finite, recent)
        # Dimensions that are indexed together stay where they are if they are neighbours, and come first if not.
        key_GBKM = key_GBKM.at[:, rows_B1, :, slot_BN].set(new_key_GBNK.transpose(1, 2, 0, 3), mode="drop")
        return key_GBKM, value_GBMK.at[:, rows_B1, slot_BN].set(new_value_GBNK, mode="drop")

    return [write(*of_layer) for of_layer in zip(past, recent, strict=True)]


def write_pages(pools, recent, pages_BP):
    """Returns the pools with the recent tokens of each row, which begin on a page's border, in these whole pages."""

    def write(pool, new):
        groups, rows, _, size = new.shape
        return pool.at[:, pages_BP].set(_finite(new).reshape(groups, rows, pages_BP.shape[1], pool.shape[2], size))

    return jax.tree.map(write, pools, recent)


def _finite(new):
    """Returns what may lie in a page: a kernel weighs what is behind a row's end with zero, and that must be finite."""
    return jnp.where(jnp.isfinite(new), new, 0)


def read_step(past_B, step):
    """Returns the `read` of `Block.decode` for entries (past, recent), which writes new tokens into recent from `step` on."""

    def read(entry, query_BLHK, key_BLGK, value_BLGK, **mask):
        past, recent = entry
        new = (x.transpose(2, 0, 1, 3) for x in (key_BLGK, value_BLGK))
        recent = tuple(
            lax.dynamic_update_slice(old, x.astype(old.dtype), (0, 0, step, 0)) for old, x in zip(recent, new, strict=True)
        )
        return attend_cached(query_BLHK, past, recent, past_B, step, **mask), recent

    return read


def read_pages(table_BP, past_B, step, is_anybodys_B, page_size, placement):
    """Returns the `read` of `Block.decode` for entries that are pools: writes one new token of each row, then reads."""
    # A row that has ended goes on while its neighbours need more steps; beyond its table there is nothing to read.
    longest = table_BP.shape[1] * page_size
    length_B = jnp.where(is_anybodys_B, jnp.minimum(past_B + step + 1, longest), 1)

    def read(pools, query_BLHK, key_BLGK, value_BLGK, *, window, **form):
        if window is not None:
            raise ValueError("layers with a window have no kernel that reads pages: `pages_refusal` says so.")
        recent = tuple(x.transpose(2, 0, 1, 3).astype(pools[0].dtype) for x in (key_BLGK, value_BLGK))
        (pools,) = write_tokens([pools], [recent], table_BP, past_B + step, is_anybodys_B.astype(jnp.int32))
        return attend_pages(query_BLHK[:, 0], pools, table_BP, length_B, placement=placement, **form)[:, None], pools

    return read


def read_chunk(past_B, dtype, placement):
    """Returns the `read` of `Block.decode` for entries that are pasts (None: there is none), which keeps all new tokens.

    Without a past it is the attention of training, with its kernels, where rows are whole.
    """

    def read(past, query_BLHK, key_BLGK, value_BLGK, **mask):
        key_BLGK, value_BLGK = (x.astype(dtype) for x in (key_BLGK, value_BLGK))
        recent = tuple(x.transpose(2, 0, 1, 3) for x in (key_BLGK, value_BLGK))
        if past is None and placement.axis_size("length") == 1:
            return attend(query_BLHK, key_BLGK, value_BLGK, placement=placement, **mask), recent
        return attend_cached(query_BLHK, past, recent, past_B, 0, **mask), recent

    return read
