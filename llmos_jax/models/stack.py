"""N equal blocks in a row: parameters stacked on a leading axis, run scanned or unrolled, rematerialised by policy.

The stacked form is the canonical one: it is what is initialised, trained, saved and exchanged. Unrolled execution takes
the stack apart inside the compiled step, so no other layout exists on the training path.
"""

import jax
from flax import nnx
from jax import lax

from llmos_jax.models.layers import fold_key

# What the backward pass may keep; everything else is computed again. "none" keeps all (no rematerialisation).
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.dots_saveable,
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
EXECUTIONS = ("auto", "scan", "unroll")
# Below this many layers an unrolled stack runs faster (XLA:CPU: 1.37x at 4 layers) and still compiles quickly; from here
# on scanning costs nothing, compiles in constant time and needs less memory.
SCAN_FROM_LAYERS = 8


class Stack(nnx.Module):
    """`count` blocks made by `make_block(rngs)`, each called as `block(x, context, key) -> x`.

    Every parameter of the block gets a leading dimension `count` with the logical axis `layers`. Rematerialisation is
    applied inside a scan, where XLA can't merge the recomputation away.
    """

    def __init__(self, make_block, count, *, rngs, execution="auto", remat="none"):
        def parameters(key):
            return nnx.state(make_block(nnx.Rngs(params=key)))

        graphdef = nnx.graphdef(jax.eval_shape(lambda: make_block(nnx.Rngs(params=0))))
        stacked = jax.vmap(parameters)(jax.random.split(rngs.params(), count))
        self.blocks = nnx.merge(graphdef, jax.tree.map(_with_layers_axis, stacked, is_leaf=_is_parameter))
        self.count = count
        self.is_scanned = execution == "scan" or (execution == "auto" and count >= SCAN_FROM_LAYERS) or remat != "none"
        self.remat = remat

    def __call__(self, x, context, key=None):
        """Returns x after all blocks; `context` (any pytree) is the same for each, `key` is folded with its index."""
        graphdef, stacked = nnx.split(self.blocks)

        def run(x, layer):
            parameters, index = layer
            return nnx.merge(graphdef, parameters)(x, context, fold_key(key, index))

        if not self.is_scanned:
            for index, parameters in enumerate(unstack(stacked, self.count)):
                x = run(x, (parameters, index))
            return x
        if self.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat])
        return lax.scan(lambda x, layer: (run(x, layer), None), x, (stacked, jax.numpy.arange(self.count)))[0]

    def bind(self, layers):
        """Returns the blocks as modules with the parameters of `layers` (see `unstack`): how a served model runs."""
        graphdef = nnx.graphdef(self.blocks)
        return [nnx.merge(graphdef, parameters) for parameters in layers]


def unstack(tree, count):
    """Returns `count` trees without the leading axis of every leaf; its gradient is one concatenation per leaf."""
    leaves, structure = jax.tree.flatten(tree)
    columns = [[part[0] for part in lax.split(leaf, [1] * count)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*columns, strict=True)]


def _is_parameter(value):
    return isinstance(value, nnx.Variable)


def _with_layers_axis(parameter):
    known = parameter.get_metadata()
    return nnx.Param(parameter[...], axes=("layers", *known["axes"]), kind=known["kind"], inputs=known["inputs"])
