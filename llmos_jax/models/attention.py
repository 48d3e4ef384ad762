"""Attention behind one function: masks as data, kernels by platform, refusals in a sentence. Knows no parameters.

Masks mean the same in every kernel. Causal: position i sees j <= i. Window: i sees i - window < j <= i. Segments: i
sees j of the same id. `reference` is the numeric truth that every other form is tested against.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmos_jax.compute import host
from llmos_jax.compute.sharding import platform_of
from llmos_jax.errors import ConfigError
from llmos_jax.models import few_rows
from llmos_jax.models.attention_context import context_attention
from llmos_jax.models.attention_cpu import HIDDEN, blocked_attention

IMPLEMENTATIONS = ("auto", "reference", "blocked", "xla", "cudnn", "splash")
# What "auto" tries, in this order, where the platform is this.
_PREFERRED = {"cpu": ("blocked",), "gpu": ("cudnn", "xla", "blocked"), "tpu": ("splash", "xla", "blocked")}
# The sides of splash attention's tiles, largest first; a length is a multiple of the last.
_SPLASH_TILES = (512, 384, 256, 128)
# More than weights of at most 1 can add up to; a power of two, which no split of a float32 rounds.
_BEYOND_TOTALS = 2.0**100
# A prompt longer than this is attended to in pieces, which bounds the memory of its scores.
_CACHED_ROWS = 512
# Without vectors of 512 bits XLA:CPU's library packs keys for a product of two heads or more: so few are faster one by one.
_SINGLE_HEADS = 4


def attend(
    query_BLHK,
    key_BMGK,
    value_BMGK,
    *,
    is_causal=True,
    segments_BL=None,
    window=None,
    scale=None,
    softcap=None,
    implementation="auto",
    placement=None,
):
    """Returns softmax(scale x query key^T + mask) value, [B, L, H, K] in the query's dtype.

    H is a multiple of G (grouped-query attention: H / G consecutive query heads share a key-value head). `segments_BL`:
    int32 ids, only equal ids see each other; rows of id 0 (padding) come out finite. `window` needs `is_causal`. L and
    M may differ only without causal mask, window and segments. `scale` is 1 / sqrt(K) unless given. `softcap` c turns scores s
    into c tanh(s / c) before they are masked (Gemma Team 2024, Gemma 2, section 2).

    `implementation`: "reference" (all scores in float32), "blocked" (query blocks, made for XLA:CPU), "xla"
    (`jax.nn.dot_product_attention`), "cudnn" (flash attention, NVIDIA), "splash" (Pallas, TPU), or "auto": blocked on
    CPU, cudnn on GPU and splash on TPU where they support the call, else xla, else blocked. With segments cudnn reads the
    mask as a [B, 1, L, L] bias. `placement` gives `.platform`, `.mesh` and `.spec(*logical axes)`; None is one device of JAX's
    default platform. Where it shards the length, "auto" is `attention_context.context_attention`, positions lie in
    `placement.length_order`, and no kernel can be asked for by name. Raises ConfigError on shapes that do not fit and on
    a kernel asked for by name that does not support the call.
    """
    call = _Call.of(query_BLHK, key_BMGK, value_BMGK, is_causal, segments_BL, window, softcap, placement)
    kernel = _choose(implementation, call)
    scale = float(1 / np.sqrt(call.head_size) if scale is None else scale)
    masks = {"segments_BL": segments_BL, "is_causal": is_causal, "window": window, "scale": scale}
    if kernel == "context":
        return context_attention(query_BLHK, key_BMGK, value_BMGK, placement=placement, **masks)
    if kernel == "splash":
        return _splash(query_BLHK, key_BMGK, value_BMGK, softcap=softcap, placement=placement, **masks)
    capped = {} if softcap is None else {"softcap": softcap}
    return _KERNELS[kernel](query_BLHK, key_BMGK, value_BMGK, **masks, **capped)


def attend_cached(query_BLHK, cached, start_B, end, *, window=None, scale=None, softcap=None):
    """Returns attention [B, L, H, K] of L new tokens to what a cache holds of their rows.

    cached: [(key [G x B, K, M], value [G x B, M, K]), ...], parts of one line of columns, all of it finite. Row b begins in
    column start_B[b] (None: every one in the first); the queries stand in columns end .. end + L - 1 (of each row's own `end`,
    where it is [B]) and see their row up to their own column, the latest `window` if given. Memory: float32 scores of at most
    512 tokens at a time.
    """
    batch, length, heads, size = query_BLHK.shape
    pairs = len(cached[0][0])
    for key, value in cached:
        if key.shape != (pairs, size, value.shape[1]) or value.shape[::2] != (pairs, size) or batch * heads % pairs:
            raise ConfigError(
                f"attention to a cache: queries {query_BLHK.shape} [B, L, H, K] do not fit keys {key.shape} and values "
                f"{value.shape}; expected [G x B, K, M] and [G x B, M, K] with H a multiple of G."
            )
    query_GBRLK = _scaled(query_BLHK, scale).reshape(batch, length, pairs // batch, -1, size).transpose(2, 0, 3, 1, 4)
    columns = sum(value.shape[1] for _, value in cached)
    outputs = []
    for begin in range(0, length, _CACHED_ROWS):
        rows = slice(begin, min(begin + _CACHED_ROWS, length))
        column_BL = jnp.asarray(end).reshape(-1, 1) + jnp.arange(rows.start, rows.stop)
        seen = _seen_in_cache(start_B, column_BL, columns, window)
        outputs.append(_attend_rows(query_GBRLK[:, :, :, rows], cached, seen, softcap))
    output_GBRLK = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, 3)
    return output_GBRLK.transpose(1, 3, 0, 2, 4).reshape(query_BLHK.shape).astype(query_BLHK.dtype)


def attend_blocks(query_BHK, key_NGKW, value_NGWK, owner_N, seen_NW, *, scale=None, softcap=None):
    """Returns attention [B, H, K] of one token of each row to cached tokens, which lie in blocks of W.

    owner_N: the row whose tokens are in a block; seen_NW: which of them it sees. Keys and values are finite, seen or not. A row
    costs what its own blocks do. Who sees nothing gets something finite.
    """
    batch, heads, size = query_BHK.shape
    blocks, groups, _, width = key_NGKW.shape
    if key_NGKW.shape[2] != size or value_NGWK.shape != (blocks, groups, width, size) or heads % groups:
        raise ConfigError(
            f"attention to blocks: queries {query_BHK.shape} [B, H, K] do not fit keys {key_NGKW.shape} and values "
            f"{value_NGWK.shape}; expected [N, G, K, W] and [N, G, W, K] with H a multiple of G."
        )
    query_BGRK = _scaled(query_BHK, scale).reshape(batch, groups, -1, size)
    attend_some = functools.partial(_attend_row if batch == 1 else _attend_blocks, softcap=softcap)
    given, repeats = (query_BGRK, key_NGKW, value_NGWK, owner_N, seen_NW), heads // groups

    def one_by_one(query_BGRK, *given):
        return jnp.concatenate([attend_some(query_BGRK[:, :, head : head + 1], *given) for head in range(repeats)], 2)

    # Without vectors of 512 bits XLA:CPU's products of few heads with a block are slower than those of one head each.
    if batch == 1 or not 1 < repeats <= _SINGLE_HEADS or key_NGKW.dtype != jnp.float32 or host.has_avx512():
        output_BGRK = attend_some(*given)
    else:
        output_BGRK = lax.platform_dependent(*given, cpu=one_by_one, default=attend_some)
    return output_BGRK.reshape(query_BHK.shape).astype(query_BHK.dtype)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What of a call decides which kernel can run it."""

    dtype: str
    query_length: int
    key_length: int
    head_size: int
    is_causal: bool
    has_segments: bool
    window: int | None
    platform: str
    compute_capability: str | None
    length_shards: int
    has_softcap: bool

    @classmethod
    def of(cls, query_BLHK, key_BMGK, value_BMGK, is_causal, segments_BL, window, softcap, placement):
        """Returns the call of these arguments; ConfigError when they do not fit each other."""
        batch, length, heads, size = query_BLHK.shape
        key_length, groups = key_BMGK.shape[1:3]
        if key_BMGK.shape != (batch, key_length, groups, size) or value_BMGK.shape != key_BMGK.shape or heads % groups:
            raise ConfigError(
                f"attention: queries {query_BLHK.shape} [B, L, H, K] do not fit keys {key_BMGK.shape} and values "
                f"{value_BMGK.shape}; expected [B, M, G, K] with H a multiple of G."
            )
        if segments_BL is not None and segments_BL.shape != (batch, length):
            raise ConfigError(f"attention: segments {segments_BL.shape} for queries of [B, L] = {(batch, length)}.")
        if window is not None and (not is_causal or window < 1):
            raise ConfigError(f"attention: window={window} with is_causal={is_causal}; a window is at least 1, and causal.")
        if length != key_length and (is_causal or segments_BL is not None):
            raise ConfigError(
                f"attention: {length} queries and {key_length} keys; lengths may differ only with is_causal=False and "
                f"no segments."
            )
        device = _device(placement)
        return cls(
            dtype=str(jnp.dtype(query_BLHK.dtype)),
            query_length=length,
            key_length=key_length,
            head_size=size,
            is_causal=is_causal,
            has_segments=segments_BL is not None,
            window=window,
            platform=platform_of(placement),
            compute_capability=getattr(device, "compute_capability", None),
            length_shards=1 if placement is None or placement.mesh is None else placement.axis_size("length"),
            has_softcap=softcap is not None,
        )


def _device(placement):
    """Returns one of the devices that the call will run on."""
    mesh = placement.mesh if placement is not None else None
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def _choose(implementation, call):
    """Returns the kernel's name; ConfigError when one asked for by name can't run this call."""
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "auto":
        if call.length_shards > 1:
            if call.has_softcap:
                raise ConfigError("attention with a softcap can't be cut over the context axis: set mesh.context=1.")
            return "context"
        candidates = _PREFERRED.get(call.platform, ("xla",))
        return next((name for name in candidates if _refusal(name, call) is None), candidates[-1])
    refusal = _refusal(implementation, call)
    if refusal is not None:
        raise ConfigError(f"attention implementation {implementation!r} {refusal}; take another one, or 'auto'.")
    return implementation


def _refusal(name, call):
    """Returns why the kernel can't run this call, as the rest of a sentence, or None when it can."""
    if call.length_shards > 1:
        return f"reads whole rows, and their length is cut over the {call.length_shards} shards of the context axis"
    if name in ("cudnn", "xla") and call.has_softcap:
        return "has no softcap of scores"
    if name == "cudnn":
        return _cudnn_refusal(call)
    if name == "splash":
        if call.platform != "tpu":
            return f"runs on tpu, and the devices are {call.platform}"
        multiple = _SPLASH_TILES[-1]
        if call.query_length % multiple or call.key_length % multiple:
            return f"needs lengths that are multiples of {multiple}, not {call.query_length} and {call.key_length}"
        if call.dtype not in ("float32", "bfloat16"):
            return f"takes float32 and bfloat16, not {call.dtype}"
    return None


def _cudnn_refusal(call):
    if call.platform != "gpu":
        return f"runs on gpu, and the devices are {call.platform}"
    if call.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {call.dtype}"
    # A program can be compiled for a GPU that is not here; then the oldest generation that has the kernel is assumed.
    capability = call.compute_capability or "8.0"
    if not capability[:1].isdigit() or float(capability) < 8.0:
        return f"needs an NVIDIA GPU of compute capability 8.0 or newer, not {capability}"
    largest = 256 if float(capability) >= 9.0 else 128
    if call.head_size % 8 or call.head_size > largest:
        return f"needs a head size that is a multiple of 8 and at most {largest}, not {call.head_size}"
    if call.has_segments and call.query_length % 2:
        return f"needs an even length with segments, not {call.query_length}"
    return None


def _visible(query_length, key_length, segments_BL, is_causal, window):
    """Returns which keys each query sees, bool broadcastable to [B, 1, L, M], or None when all see all."""
    visible = None
    if is_causal:
        query_position, key_position = np.arange(query_length)[:, None], np.arange(key_length)
        visible = key_position <= query_position
        if window is not None:
            visible &= key_position > query_position - window
        visible = jnp.asarray(visible)[None, None]
    if segments_BL is not None:
        same = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
        visible = same if visible is None else visible & same
    return visible


def _reference(query_BLHK, key_BMGK, value_BMGK, *, segments_BL, is_causal, window, scale, softcap=None):
    """Returns attention the naive way: every score in float32, hidden ones at a large negative number."""
    repeats = query_BLHK.shape[2] // key_BMGK.shape[2]
    query, key, value = (x.astype(jnp.float32) for x in (query_BLHK, key_BMGK, value_BMGK))
    key_BMHK, value_BMHK = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    scores_BHLM = jnp.einsum("BLHK,BMHK->BHLM", query, key_BMHK, precision=lax.Precision.HIGHEST) * scale
    scores_BHLM = _capped(scores_BHLM, softcap)
    visible = _visible(query.shape[1], key.shape[1], segments_BL, is_causal, window)
    if visible is not None:
        scores_BHLM = jnp.where(visible, scores_BHLM, HIDDEN)
    weights_BHLM = jax.nn.softmax(scores_BHLM)
    output = jnp.einsum("BHLM,BMHK->BLHK", weights_BHLM, value_BMHK, precision=lax.Precision.HIGHEST)
    return output.astype(query_BLHK.dtype)


def _blocked(query_BLHK, key_BMGK, value_BMGK, *, segments_BL, is_causal, window, scale, softcap=None):
    return blocked_attention(query_BLHK, key_BMGK, value_BMGK, segments_BL, is_causal, window, scale, softcap)


def _xla(query_BLHK, key_BMGK, value_BMGK, *, segments_BL, is_causal, window, scale):
    mask = _visible(query_BLHK.shape[1], key_BMGK.shape[1], segments_BL, False, None)
    return jax.nn.dot_product_attention(
        query_BLHK,
        key_BMGK,
        value_BMGK,
        mask=mask,
        is_causal=is_causal,
        local_window_size=None if window is None else (window - 1, 0),
        scale=scale,
        implementation="xla",
    )


def _cudnn(query_BLHK, key_BMGK, value_BMGK, *, segments_BL, is_causal, window, scale):
    # cuDNN takes a sliding window only without a bias, and a mask is a bias: beside segments the window goes into it.
    length = query_BLHK.shape[1]
    mask = None if segments_BL is None else _visible(length, length, segments_BL, is_causal, window)
    return jax.nn.dot_product_attention(
        query_BLHK,
        key_BMGK,
        value_BMGK,
        mask=mask,
        is_causal=is_causal,
        local_window_size=None if window is None or mask is not None else (window - 1, 0),
        scale=scale,
        implementation="cudnn",
    )


def _splash(query_BLHK, key_BMGK, value_BMGK, *, segments_BL, is_causal, window, scale, softcap, placement):
    """Returns attention by JAX's splash kernel, run on each device's own rows and heads."""
    mesh = placement.mesh if placement is not None else None
    query_BLHK = (query_BLHK * scale).astype(query_BLHK.dtype)
    operands = [query_BLHK, key_BMGK, value_BMGK] + ([] if segments_BL is None else [segments_BL])

    def local(query_BLHK, key_BMGK, value_BMGK, segments_BL=None):
        kernel = _splash_kernel(query_BLHK.shape[2], query_BLHK.shape[1], key_BMGK.shape[1], is_causal, window, softcap)
        return _run_splash(kernel, query_BLHK, key_BMGK, value_BMGK, segments_BL)

    if mesh is None or mesh.size == 1:
        return local(*operands)
    heads_spec = placement.spec("batch", None, "heads", None)
    shards = placement.axis_size("heads")
    if key_BMGK.shape[2] % shards:
        # Fewer key-value heads than shards of query heads: every query head gets its own copy.
        operands[1:3] = [jnp.repeat(x, query_BLHK.shape[2] // key_BMGK.shape[2], axis=2) for x in operands[1:3]]
    specs = (heads_spec,) * 3 + (() if segments_BL is None else (placement.spec("batch", None),))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads_spec, check_vma=False)(*operands)


def _splash_kernel(heads, query_length, key_length, is_causal, window, softcap):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (query_length, key_length)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = masks.CausalMask(shape) if is_causal else masks.FullMask(shape)
    rows, keys = (next(tile for tile in _SPLASH_TILES if length % tile == 0) for length in shape)
    tiles = splash.BlockSizes(
        block_q=rows,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=rows,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=rows,
        block_kv_dq=keys,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=tiles, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap
    )


def _run_splash(kernel, query_BLHK, key_BMGK, value_BMGK, segments_BL):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    heads_first = (x.swapaxes(1, 2) for x in (query_BLHK, key_BMGK, value_BMGK))
    if segments_BL is None:
        output_BHLK = jax.vmap(kernel)(*heads_first)
    else:
        output_BHLK = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=SegmentIds(s, s)))(*heads_first, segments_BL)
    return output_BHLK.swapaxes(1, 2)


_KERNELS = {"reference": _reference, "blocked": _blocked, "xla": _xla, "cudnn": _cudnn}


def _seen_in_cache(start_B, column_BL, columns, window):
    """Returns which of the columns each query, which stands in one, sees of its row, bool [B or 1, L, M]."""
    column_M, column_BL1 = jnp.arange(columns), column_BL[..., None]
    seen_BLM = column_M <= column_BL1
    if window is not None:
        seen_BLM &= column_M > column_BL1 - window
    return seen_BLM if start_B is None else seen_BLM & (column_M >= start_B[:, None, None])


def _capped(scores, softcap):
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _attend_rows(query_GBRLK, parts, seen_BLM, softcap):
    """Returns attention [G, B, R, L, K] in float32, with full scores."""
    groups, batch, *rest = query_GBRLK.shape
    query_NRLK = query_GBRLK.reshape(groups * batch, *rest)
    sizes = [value.shape[1] for _, value in parts]
    wide = dict(preferred_element_type=jnp.float32)
    scores = [jnp.einsum("NRLK,NKM->NRLM", query_NRLK, key, **wide) for key, _ in parts]
    scores = _capped(jnp.concatenate(scores, -1) if len(scores) > 1 else scores[0], softcap)
    scores_GBRLM = scores.reshape(groups, batch, *scores.shape[1:])
    weights = jax.nn.softmax(jnp.where(seen_BLM[:, None], scores_GBRLM, HIDDEN)).astype(parts[0][1].dtype)
    weights = jnp.split(weights.reshape(scores.shape), sizes[:-1], -1)
    outputs = (jnp.einsum("NRLM,NMK->NRLK", w, value, **wide) for w, (_, value) in zip(weights, parts, strict=True))
    return sum(outputs).reshape(query_GBRLK.shape)


def _attend_row(query_1GRK, key_NGKW, value_NGWK, _owner_N, seen_NW, softcap):
    """Returns attention [1, G, R, K] in float32 of a row that has all blocks: they are one line of tokens."""
    blocks, groups, width, _ = value_NGWK.shape
    wide = dict(preferred_element_type=jnp.float32)
    query_NGRK = jnp.broadcast_to(query_1GRK, (blocks, *query_1GRK.shape[1:]))
    scores_NGRW = _capped(jnp.einsum("NGRK,NGKW->NGRW", query_NGRK, key_NGKW, **wide), softcap)
    scores_GRM = scores_NGRW.transpose(1, 2, 0, 3).reshape(groups, -1, blocks * width)
    seen_M = seen_NW.reshape(-1)
    # Hidden once more: where all that is seen scores lower than what is hidden, this must not become somebody else's values.
    weights_GRM = jnp.where(seen_M, jax.nn.softmax(jnp.where(seen_M, scores_GRM, HIDDEN)), 0).astype(value_NGWK.dtype)
    weights_NGRW = weights_GRM.reshape(groups, -1, blocks, width).transpose(2, 0, 1, 3)
    # As one line XLA:CPU would have the values in two forms, and write each anew to add a token.
    return jnp.einsum("NGRW,NGWK->NGRK", weights_NGRW, value_NGWK, **wide).sum(0)[None]


def _attend_blocks(query_BGRK, key_NGKW, value_NGWK, owner_N, seen_NW, softcap):
    """Returns attention [B, G, R, K] in float32: each block's share, put together by row.

    The many small sums of the rows are one product, by which what is no number would reach all rows. So a score that is none
    becomes the largest number, a share that is none becomes zero beside a total beyond any: by these their row is known.
    """
    (batch, *of_row), blocks, largest = query_BGRK.shape, len(owner_N), jnp.finfo(jnp.float32).max
    is_owner_BN = owner_N == jnp.arange(batch)[:, None]
    scores_NGRW = _capped(few_rows.products(query_BGRK[owner_N], key_NGKW), softcap)
    scores_NGRW = jnp.where(seen_NW[:, None, None], jnp.where(scores_NGRW < largest, scores_NGRW, largest), -jnp.inf)
    peak_BNGR = jnp.where(is_owner_BN[..., None, None], scores_NGRW.max(-1), -largest)
    peak_BGR = jnp.maximum(peak_BNGR.max(1), -largest)
    weights_NGRW = jnp.exp(scores_NGRW - peak_BGR[owner_N][..., None])
    shares_NGRK = few_rows.products(weights_NGRW.astype(value_NGWK.dtype), value_NGWK)
    # Sums by products: XLA:CPU's own take ten times as long. The mean of shares is a number where all of them are.
    total_NGR = weights_NGRW @ jnp.ones(weights_NGRW.shape[-1])
    mean_NGR = shares_NGRK @ jnp.full(shares_NGRK.shape[-1], 1 / shares_NGRK.shape[-1])
    total_NGR = jnp.where(jnp.abs(mean_NGR) < largest, total_NGR, _BEYOND_TOTALS)

    def of_rows(x_N):
        return jnp.dot(is_owner_BN.astype(jnp.float32), x_N.reshape(blocks, -1), precision=lax.Precision.HIGHEST)

    sums_BGRK = of_rows(jnp.where(jnp.abs(shares_NGRK) < largest, shares_NGRK, 0)).reshape(batch, *of_row)
    total_BGR = of_rows(total_NGR).reshape(batch, *of_row[:-1])
    output_BGRK = sums_BGRK / jnp.maximum(total_BGR, jnp.finfo(jnp.float32).tiny)[..., None]
    return jnp.where(((peak_BGR < largest) & (total_BGR < _BEYOND_TOTALS))[..., None], output_BGRK, jnp.nan)


def _scaled(query, scale):
    """Returns the queries times `scale`; None: one over the root of the heads' size."""
    return query * jnp.asarray(1 / np.sqrt(query.shape[-1]) if scale is None else scale, query.dtype)
