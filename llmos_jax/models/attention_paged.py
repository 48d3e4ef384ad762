"""Attention of one new token of each row to a cache that lies in pages, read where it lies: the kernels of GPU and TPU.

A kernel reads the pages that a row has and no others, whatever its neighbours need. They are JAX's (Pallas; paged attention:
Kwon et al. 2023, https://arxiv.org/abs/2309.06180); what is here chooses their blocks and says what they can't do.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

# Tokens that a kernel takes at once.
_GPU_BLOCK, _TPU_BLOCK = 128, 512
# The TPU's kernel holds the table of pages in its scalar memory, of which half is left for it.
_TPU_TABLE_ENTRIES = 2**17


def attend_pages(query_BHK, pools, table_BP, length_B, *, scale=None, softcap=None, placement):
    """Returns attention [B, H, K] of one token of each row to the first length_B[b] >= 1 tokens of its row, itself the last.

    pools: (key, value), [G, pages, page_size, K] each, finite; table_BP: the pages of each row, any beyond its length. H is a
    multiple of G. The call must be one that `pages_refusal` has nothing against.
    """
    kernel, size = KERNELS[placement.platform], query_BHK.shape[-1]
    query_BHK = query_BHK * jnp.asarray(1 / np.sqrt(size) if scale is None else scale, query_BHK.dtype)

    def local(query_BHK, key, value, table_BP, length_B):
        return kernel.run(query_BHK.astype(key.dtype), key, value, table_BP, length_B, softcap)

    operands = (query_BHK, *pools, table_BP, length_B)
    if placement.mesh.size == 1:
        return local(*operands).astype(query_BHK.dtype)
    heads, pages = placement.spec(None, "heads", None), placement.spec("heads", None, None, None)
    whole = (placement.spec(None, None), placement.spec(None))
    run = jax.shard_map(local, mesh=placement.mesh, in_specs=(heads, pages, pages, *whole), out_specs=heads, check_vma=False)
    return run(*operands).astype(query_BHK.dtype)


def pages_refusal(placement, dtype, head_size, page_size, windows, table_entries):
    """Returns why no kernel can read these pages, as the rest of a sentence, or None when one can.

    windows: of the model's layers (None: all tokens), as in `DecoderConfig.windows`. table_entries: rows x pages of the largest
    table.
    """
    kernel = KERNELS.get(placement.platform)
    if kernel is None:
        return f"runs on {' and '.join(KERNELS)}, and the devices are {placement.platform}"
    if placement.pipeline is not None:
        return "is not made for layers that lie on stages of a pipeline"
    if any(windows):
        return f"has no sliding window, and layers have one of {next(filter(None, windows))}"
    if str(jnp.dtype(dtype)) not in kernel.dtypes:
        return f"takes {' and '.join(kernel.dtypes)} on {placement.platform}, not {jnp.dtype(dtype)}"
    if head_size % kernel.head_multiple or head_size & (head_size - 1):
        return f"needs a head size that is a power of two from {kernel.head_multiple} on, not {head_size}"
    if not kernel.page_sizes[0] <= page_size <= kernel.page_sizes[1] or page_size & (page_size - 1):
        least, most = kernel.page_sizes
        return f"needs a page_size that is a power of two from {least} to {most}, not {page_size}"
    if kernel.table_entries is not None and table_entries > kernel.table_entries:
        return f"holds tables of {kernel.table_entries:,} pages, not {table_entries:,}: raise page_size, or lower rows"
    return None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A platform's kernel: `run(query, key, value, table, length, softcap)`, and what it takes."""

    run: typing.Callable
    dtypes: tuple[str, ...]
    head_multiple: int
    page_sizes: tuple[int, int]
    table_entries: int | None = None


def _gpu(query_BHK, key, value, table_BP, length_B, softcap, **choices):
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    block = _GPU_BLOCK // key.shape[2]
    table_BP = _padded(table_BP, block)
    # Every block is a part of its own: so a row's parts, and how their sums are rounded, are not its neighbours' affair.
    sizes = dict(pages_per_compute_block=block, k_splits=table_BP.shape[1] // block)
    return paged_attention(query_BHK, key, value, table_BP, length_B, attn_logits_soft_cap=softcap, **sizes, **choices)


def _tpu(query_BHK, key, value, table_BP, length_B, softcap):
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    block = min(_TPU_BLOCK // key.shape[2], table_BP.shape[1])
    table_BP = _padded(table_BP, block)
    sizes = dict(pages_per_compute_block=block)
    return paged_attention(query_BHK, key, value, length_B, table_BP, attn_logits_soft_cap=softcap, **sizes)


def _padded(table_BP, multiple):
    return jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % multiple)))


KERNELS = {
    # Triton multiplies float32 as TF32; the sums of parts would overflow float16.
    "gpu": Kernel(_gpu, ("bfloat16",), head_multiple=16, page_sizes=(1, _GPU_BLOCK)),
    # Whatever the pages hold, this kernel makes bfloat16 of it.
    "tpu": Kernel(_tpu, ("bfloat16",), head_multiple=128, page_sizes=(16, _TPU_BLOCK), table_entries=_TPU_TABLE_ENTRIES),
}
