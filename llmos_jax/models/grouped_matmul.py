"""Products of groups of rows, each group with a weight of its own: the work of a mixture of experts.

XLA multiplies ragged groups by `lax.ragged_dot` on accelerators. XLA:CPU makes it a product of every row with every weight,
10 times slower with 8 groups; there groups are padded to whole blocks, which are multiplied one after the other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

# Rows of a block, least and most. Small groups (decoding) take small ones; products with one row miss the fast library.
_BLOCK_ROWS = (2, 64)


@dataclasses.dataclass(frozen=True)
class Product:
    """How rows are multiplied with their groups' weights.

    kernel: `ragged` (`lax.ragged_dot`), `batched` (groups of `block` rows each) or `blocked` (groups of whole blocks, one after
    the other). block: groups are multiples of it. gather_axes: mesh axes over which a dimension of the weights is cut (FSDP):
    they are gathered for each product and gradients scattered, so that no whole weight is kept for the backward pass.
    """

    kernel: str
    block: int
    gather_axes: tuple[str, ...] = ()

    @classmethod
    def of_ragged_groups(cls, platform, rows, gather_axes=()):
        """Returns the Product for groups of any size, `rows` on average."""
        if platform != "cpu":
            return cls("ragged", 1, gather_axes)
        least, most = _BLOCK_ROWS
        return cls("blocked", min(most, max(least, 1 << max(rows - 1, 0).bit_length())), gather_axes)

    @classmethod
    def of_equal_groups(cls, platform, rows, gather_axes=()):
        """Returns the Product for groups of `rows` rows each; XLA:CPU would run a batched one on a single thread."""
        return cls("blocked" if platform == "cpu" else "batched", rows, gather_axes)

    def groups(self, sizes_E, rows):
        """Returns what `grouped_matmul` takes for groups of these sizes among `rows` rows; computed once for all products."""
        if self.kernel != "blocked":
            return sizes_E
        ends_E = jnp.cumsum(sizes_E // self.block)
        owner_C = (jnp.arange(rows // self.block)[:, None] >= ends_E).sum(1)
        return jnp.minimum(owner_C, sizes_E.shape[0] - 1), ends_E[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x_SI, weight_EIO, groups, product, gathered):
    """Returns [S, O] in x's dtype: rows [S, I] of group e times weight e.

    groups: `product.groups(sizes, rows)`; what follows the last group is undefined. gathered: the weight's dimension that
    `product.gather_axes` cut. The gradient of the weight has the weight's own dtype.
    """
    return _multiply(x_SI, _gathered(weight_EIO, x_SI.dtype, product, gathered), groups, product, is_transposed=False)


def _grouped_forward(x_SI, weight_EIO, groups, product, gathered):
    return grouped_matmul(x_SI, weight_EIO, groups, product, gathered), (x_SI, weight_EIO, groups)


def _grouped_backward(product, gathered, residuals, g_SO):
    x_SI, weight_EIO, groups = residuals
    of_x = _multiply(g_SO, _gathered(weight_EIO, g_SO.dtype, product, gathered), groups, product, is_transposed=True)
    of_weight = _weight_gradient(x_SI, g_SO, groups, weight_EIO.shape[0], product, weight_EIO.dtype)
    if product.gather_axes:
        of_weight = lax.psum_scatter(of_weight, product.gather_axes, scatter_dimension=gathered, tiled=True)
    return of_x, of_weight, None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def _gathered(weight, dtype, product, dimension):
    weight = weight.astype(dtype)
    return lax.all_gather(weight, product.gather_axes, axis=dimension, tiled=True) if product.gather_axes else weight


def _multiply(x_SI, weight, groups, product, *, is_transposed):
    """Returns rows times their group's weight [E, I, O], or its transpose."""
    contracted = 2 if is_transposed else 1
    if product.kernel == "batched":
        x_ECI = x_SI.reshape(weight.shape[0], product.block, -1)
        y_ECO = lax.dot_general(x_ECI, weight, (((2,), (contracted,)), ((0,), (0,))))
        return y_ECO.reshape(x_SI.shape[0], -1)
    kernel = _blocked_product if product.kernel == "blocked" else _ragged_product
    # A pipeline's stages are a batch dimension, of size one on each device: no kernel has to know of it.
    multiply = functools.partial(kernel, block=product.block, contracted=contracted)
    return jax.custom_batching.sequential_vmap(multiply)(x_SI, weight, groups)


def _weight_gradient(x_SI, g_SO, groups, experts, product, dtype):
    """Returns [E, I, O] in `dtype`: the sum over each group's rows of x times g."""
    if product.kernel == "batched":
        x_ECI, g_ECO = (z.reshape(experts, product.block, -1) for z in (x_SI, g_SO))
        return lax.dot_general(x_ECI, g_ECO, (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
    kernel = _blocked_weight_gradient if product.kernel == "blocked" else _ragged_weight_gradient
    multiply = functools.partial(kernel, block=product.block, experts=experts, dtype=dtype)
    return jax.custom_batching.sequential_vmap(multiply)(x_SI, g_SO, groups)


def _ragged_product(x_SI, weight, sizes_E, *, block, contracted):
    dims = lax.RaggedDotDimensionNumbers((((1,), (contracted,)), ((), ())), (0,), (0,))
    return lax.ragged_dot_general(x_SI, weight, sizes_E, dims)


def _ragged_weight_gradient(x_SI, g_SO, sizes_E, *, block, experts, dtype):
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return lax.ragged_dot_general(x_SI, g_SO, sizes_E, dims, preferred_element_type=dtype)


def _blocked_product(x_SI, weight, owners, *, block, contracted):
    x_CI, (owner_C, used) = x_SI.reshape(-1, block, x_SI.shape[1]), owners

    def multiply(index, y):
        own = lax.dynamic_index_in_dim(weight, owner_C[index], 0, keepdims=False)
        return y.at[index].set(lax.dot_general(x_CI[index], own, (((1,), (contracted - 1,)), ((), ()))))

    y = jnp.zeros((*x_CI.shape[:2], weight.shape[3 - contracted]), x_SI.dtype)
    return lax.fori_loop(0, used, multiply, y).reshape(x_SI.shape[0], -1)


def _blocked_weight_gradient(x_SI, g_SO, owners, *, block, experts, dtype):
    x_CI, g_CO = (z.reshape(-1, block, z.shape[1]) for z in (x_SI, g_SO))
    owner_C, used = owners

    def add(index, total):
        product = lax.dot_general(x_CI[index], g_CO[index], (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return total.at[owner_C[index]].add(product)

    return lax.fori_loop(0, used, add, jnp.zeros((experts, x_SI.shape[1], g_SO.shape[1]), dtype))
