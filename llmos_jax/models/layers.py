"""Layers shared by every model family: linear maps, norms, activations, dropout.

Parameters carry the logical axes of their dimensions as metadata (`axes`), which `compute/sharding.py` turns into a
layout. Parameters are float32; layers compute in the dtype of their input. Several backward passes are written by hand
because the automatic ones keep more activations, or on XLA:CPU miss the fast matrix library.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from llmos_jax.models import few_rows


def parameter(rngs, shape, axes, initializer, *, kind="vector", inputs=0):
    """Returns a float32 `nnx.Param` of `shape` with logical `axes`, drawn from `rngs.params` by `initializer`.

    `kind` tells the optimizer what it is: a "matrix" (its first `inputs` dimensions, after one of experts, are contracted with
    activations), an "embedding" or a "vector" (biases and norms: no weight decay).
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(axes)} axes for a parameter of shape {shape}.")
    return nnx.Param(initializer(rngs.params(), shape, jnp.float32), axes=tuple(axes), kind=kind, inputs=inputs)


def lookup(table_VD, tokens_BL, placement, dtype):
    """Returns the rows of an embedding table for tokens, [B, L, D] in `dtype`, positions sharded as the residual stream.

    Where the vocabulary is sharded, every device looks up what its own rows of the table hold, and a reduce-scatter (of
    sums of which one term is not zero: exact in any dtype) brings every position home. The compiler's own choice is to
    gather the whole table, and to sum its whole gradient over all devices. Features that FSDP shards are gathered.
    """
    table_VD = placement.constrain(table_VD, "vocab", None)
    shards = placement.axis_size("vocab")
    if shards == 1 or table_VD.shape[0] % shards:
        rows_BLD = jnp.take(table_VD, tokens_BL, axis=0).astype(dtype)
        return placement.constrain(rows_BLD, "batch", "residual_length", None)
    batch, length, residual = (
        axis if size % placement.axis_size(axis) == 0 else None
        for axis, size in zip(("batch", "length", "residual_length"), (*tokens_BL.shape, tokens_BL.shape[1]), strict=True)
    )
    summed = placement.mesh_axes("vocab")
    scattered = [axis for axis in placement.mesh_axes(residual) if axis in summed and axis not in placement.mesh_axes(length)]
    if set(placement.mesh_axes(residual)) != set(placement.mesh_axes(length)) | set(scattered):
        scattered, residual = [], length  # positions would have to be cut over an axis along which nothing is summed
    whole = [axis for axis in summed if axis not in scattered]

    def local(table_VD, tokens_BL):
        rows = table_VD.shape[0]
        index_BL = tokens_BL - rows * lax.axis_index(summed)
        is_here = (index_BL >= 0) & (index_BL < rows)
        found_BLD = jnp.take(table_VD, jnp.clip(index_BL, 0, rows - 1), axis=0).astype(dtype)
        found_BLD = jnp.where(is_here[..., None], found_BLD, 0)
        for axis in scattered:
            found_BLD = lax.psum_scatter(found_BLD, axis, scatter_dimension=1, tiled=True)
        return lax.psum(found_BLD, whole) if whole else found_BLD

    specs = placement.spec("vocab", None), placement.spec(batch, length)
    summed_lookup = jax.shard_map(local, mesh=placement.mesh, in_specs=specs, out_specs=placement.spec(batch, residual, None))
    return summed_lookup(table_VD, tokens_BL)


class Linear(nnx.Module):
    """Affine map from the last `len(in_shape)` dimensions of its input to `out_shape`.

    `weight` is [*in_shape, *out_shape], `bias`, if any, [*out_shape]. Multi-dimensional shapes keep heads a dimension of their
    own, so that they can be sharded by name.
    """

    def __init__(self, in_shape, out_shape, in_axes, out_axes, *, stddev, rngs, has_bias=True):
        normal = jax.nn.initializers.normal(stddev)
        shape, axes = (*in_shape, *out_shape), (*in_axes, *out_axes)
        self.weight = parameter(rngs, shape, axes, normal, kind="matrix", inputs=len(in_shape))
        if has_bias:
            self.bias = parameter(rngs, tuple(out_shape), out_axes, jax.nn.initializers.zeros)
        self.contracted, self.has_bias = len(in_shape), has_bias

    def __call__(self, x):
        y = matmul(x, self.weight[...], self.contracted)
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension (Ba et al. 2016), statistics in float32."""

    def __init__(self, size, *, rngs, epsilon=1e-5):
        self.scale = parameter(rngs, (size,), ("norm",), jax.nn.initializers.ones)
        self.bias = parameter(rngs, (size,), ("norm",), jax.nn.initializers.zeros)
        self.epsilon = epsilon

    def __call__(self, x):
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last dimension (Zhang & Sennrich 2019), statistics in float32.

    is_centered: the parameter is what is added to a scale of one, so that weight decay pulls towards that (as in Gemma).
    """

    def __init__(self, size, *, rngs, epsilon=1e-5, is_centered=False):
        initial = jax.nn.initializers.zeros if is_centered else jax.nn.initializers.ones
        self.scale = parameter(rngs, (size,), ("norm",), initial)
        self.epsilon, self.is_centered = epsilon, is_centered

    def __call__(self, x):
        scale = self.scale[...].astype(jnp.float32)
        return rms_norm(x, 1 + scale if self.is_centered else scale, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x, weight, contracted=1):
    """Returns x [..., *in] times weight [*in, *out] -> [..., *out] in x's dtype; `contracted` = len(in).

    The weight's gradient is made in the weight's own dtype (float32), whatever the dtype of the activations.
    """
    weight = weight.astype(x.dtype)
    if math.prod(x.shape[:-contracted]) > few_rows.MOST_ROWS or weight.size < few_rows.LEAST_SIZE:
        return _contract(x, weight, contracted)
    return lax.platform_dependent(
        x,
        weight,
        cpu=functools.partial(_contract_few, contracted=contracted),
        default=functools.partial(_contract, contracted=contracted),
    )


def unembed(x_BLD, table_VD, placement):
    """Returns the products [B, L, V], float32, of hidden states with the rows of an embedding table."""

    def whole(x_BLD, table_VD):
        return jnp.einsum("BLD,VD->BLV", x_BLD, table_VD, preferred_element_type=jnp.float32)

    def few(x_BLD, table_VD):
        y_BV = few_rows.product_with_table(x_BLD.reshape(-1, x_BLD.shape[-1]), table_VD)
        return y_BV.reshape(*x_BLD.shape[:-1], -1)

    table_VD = table_VD.astype(x_BLD.dtype)
    if math.prod(x_BLD.shape[:-1]) > few_rows.MOST_ROWS or placement.axis_size("vocab") > 1:
        return whole(x_BLD, table_VD)
    return lax.platform_dependent(x_BLD, table_VD, cpu=few, default=whole)


def _contract_few(x, weight, contracted):
    inputs = math.prod(weight.shape[:contracted])
    y = few_rows.product(x.reshape(-1, inputs), weight.reshape(inputs, -1))
    return y.reshape(*x.shape[: x.ndim - contracted], *weight.shape[contracted:])


def _contract(x, weight, contracted):
    lead = x.ndim - contracted
    dims = (tuple(range(lead, x.ndim)), tuple(range(contracted)))
    return lax.dot_general(x, weight, (dims, ((), ())))


def _matmul_forward(x, weight, contracted):
    # Not by `matmul`: rematerialisation policies look for the product itself.
    return _contract(x, weight.astype(x.dtype), contracted), (x, weight)


def _matmul_backward(contracted, residuals, g):
    x, weight = residuals
    outputs = weight.ndim - contracted
    dims = (tuple(range(g.ndim - outputs, g.ndim)), tuple(range(contracted, weight.ndim)))
    dx = lax.dot_general(g, weight.astype(g.dtype), (dims, ((), ())))
    dw = lax.platform_dependent(
        x,
        g,
        cpu=functools.partial(_weight_gradient_cpu, lead=x.ndim - contracted, dtype=weight.dtype),
        default=functools.partial(_weight_gradient, lead=x.ndim - contracted, dtype=weight.dtype),
    )
    return dx, dw


matmul.defvjp(_matmul_forward, _matmul_backward)


def _weight_gradient(x, g, *, lead, dtype):
    dims = (tuple(range(lead)), tuple(range(lead)))
    return lax.dot_general(x, g, (dims, ((), ())), preferred_element_type=dtype)


def _weight_gradient_cpu(x, g, *, lead, dtype):
    """The same product in the form that XLA:CPU hands to its fast library.

    A product that contracts the first dimension of both sides misses it; transposing the smaller operand first (behind a
    barrier, or it is fused away) made whole training steps 1.2 times faster.
    """
    x_TI = x.reshape(math.prod(x.shape[:lead]), -1)
    g_TO = g.reshape(math.prod(g.shape[:lead]), -1)
    if x_TI.shape[1] <= g_TO.shape[1]:
        dw = lax.dot(lax.optimization_barrier(x_TI.T), g_TO, preferred_element_type=dtype)
    else:
        dw = lax.optimization_barrier(lax.dot(lax.optimization_barrier(g_TO.T), x_TI, preferred_element_type=dtype)).T
    return dw.reshape(*x.shape[lead:], *g.shape[lead:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, epsilon):
    """Returns x normalised over its last dimension, in x's dtype; keeps x, mean and 1/std for the backward pass."""
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.mean(wide * wide, -1, keepdims=True) - mean * mean, 0.0)  # one pass over x
    inverse = lax.rsqrt(variance + epsilon)
    return ((wide - mean) * inverse * scale + bias).astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_backward(epsilon, residuals, g):
    x, scale, mean, inverse = residuals
    g = g.astype(jnp.float32)
    normalised = (x.astype(jnp.float32) - mean) * inverse
    scaled = g * scale
    along = scaled.mean(-1, keepdims=True)
    across = (scaled * normalised).mean(-1, keepdims=True)
    rows = tuple(range(g.ndim - 1))
    dx = inverse * (scaled - along - normalised * across)
    return dx.astype(x.dtype), (g * normalised).sum(rows), g.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, epsilon):
    """Returns x / rms(x) * scale over its last dimension, in x's dtype; keeps x and 1/rms for the backward pass."""
    return _rms_norm_forward(x, scale, epsilon)[0]


def _rms_norm_forward(x, scale, epsilon):
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(epsilon, residuals, g):
    x, scale, inverse = residuals
    g = g.astype(jnp.float32)
    normalised = x.astype(jnp.float32) * inverse
    scaled = g * scale
    dx = inverse * (scaled - normalised * (scaled * normalised).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (g * normalised).sum(tuple(range(g.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


@jax.custom_vjp
def gelu(x):
    """Returns GELU in its tanh form (Hendrycks & Gimpel 2016, as in GPT-2); keeps only x for the backward pass."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_backward(x, g):
    tanh = jnp.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x * x * x))
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * x * x)
    return (g * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def swiglu(x):
    """Returns silu(x[..., 0, :]) * x[..., 1, :] (Shazeer 2020); keeps only x for the backward pass."""
    return jax.nn.silu(x[..., 0, :]) * x[..., 1, :]


def _swiglu_backward(x, g):
    gate, up = x[..., 0, :], x[..., 1, :]
    sigmoid = jax.nn.sigmoid(gate)
    dgate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    return (jnp.stack([dgate, g * gate * sigmoid], -2),)


swiglu.defvjp(lambda x: (swiglu(x), x), _swiglu_backward)


@jax.custom_vjp
def geglu(x):
    """Returns gelu(x[..., 0, :]) * x[..., 1, :] (Shazeer 2020), GELU in its tanh form; keeps only x for the backward pass."""
    return jax.nn.gelu(x[..., 0, :], approximate=True) * x[..., 1, :]


def _geglu_backward(x, g):
    return jax.vjp(lambda x: gelu(x[..., 0, :]) * x[..., 1, :], x)[1](g)


geglu.defvjp(lambda x: (geglu(x), x), _geglu_backward)


def dropout(x, rate, key):
    """Returns x with a fraction `rate` of its elements set to zero and the rest scaled up; x itself when key is None."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


def fold_key(key, number):
    """Returns a key that depends on `key` and `number`; None stays None (no dropout)."""
    return None if key is None else jax.random.fold_in(key, number)
