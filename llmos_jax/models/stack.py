"""N equal blocks in a row: parameters stacked on a leading axis, run scanned or unrolled, rematerialised by policy.

The stacked form is the canonical one: it is what is initialised, trained, saved and exchanged. Unrolled execution takes
the stack apart inside the compiled step, so no other layout exists on the training path.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from llmos_jax.compute import pipeline
from llmos_jax.compute.sharding import platform_of
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
# on scanning costs nothing, compiles in constant time and needs less memory. On GPUs scanning always costs (H200, GPT-2 small
# with 12 layers: unrolled is 1.18x, compiled in 10 s), and what bounds it is the patience for the compiler.
SCAN_FROM_LAYERS, SCAN_FROM_LAYERS_GPU = 8, 33


class Stack(nnx.Module):
    """`count` blocks made by `make_block(rngs)`, each called as `block(x, context, key) -> x`.

    x: a tree of arrays with rows leading. Every parameter of the block gets a leading dimension `count` with the logical
    axis `layers`. Rematerialisation is applied inside a scan, where XLA can't merge the recomputation away. On a mesh with
    pipeline stages the blocks run as the placement's schedule says, and are stored in `order` (the layer at each position).

    kinds: a number for each layer, where blocks with the same parameters compute in several ways; a block is then called as
    `block(x, context, key, kind)`. The kind is an int where blocks are unrolled, else an array of one int32.
    """

    def __init__(self, make_block, count, *, rngs, placement=None, execution="auto", remat="none", kinds=None):
        def parameters(key):
            return nnx.state(make_block(nnx.Rngs(params=key)))

        graphdef = nnx.graphdef(jax.eval_shape(lambda: make_block(nnx.Rngs(params=0))))
        self.placement, self.plan = placement, placement.pipeline if placement else None
        self.order = pipeline.layer_order(self.plan, count) if self.plan else tuple(range(count))
        keys = jax.random.split(rngs.params(), count)
        stacked = jax.vmap(parameters)(keys[jnp.array(self.order)] if self.plan else keys)
        self.blocks = nnx.merge(graphdef, jax.tree.map(_with_layers_axis, stacked, is_leaf=_is_parameter))
        self.count = count
        self.execution, self.remat, self.kinds = execution, remat, kinds
        self.replacement = None

    def __call__(self, x, context, key=None):
        """Returns x after all blocks; `context` (any tree with rows leading) is the same for each.

        `key` is folded with a block's index. Where `replacement` is set, it is called instead: so a schedule that
        differentiates by itself (`train/step.py`) takes a model apart at its stack.
        """
        if self.replacement is not None:
            return self.replacement(x, context, key)
        stacked = nnx.state(self.blocks)
        if self.plan:
            # Other policies keep what they say of every layer; keeping a tick's inputs alone would repeat all of it.
            keeps_inputs_only = self.remat == "full"
            return pipeline.forward(self.run, stacked, x, context, key, self.plan, self.placement, remat=keeps_inputs_only)
        return self.run(stacked, x, context, key, 0)

    def run(self, layers, x, context, key, first):
        """Returns x after the blocks whose parameters `layers` stack; the first is block number `first`."""
        graphdef, count = nnx.graphdef(self.blocks), jax.tree.leaves(layers)[0].shape[0]

        def run(x, layer):
            parameters, index, *kind = layer
            return nnx.merge(graphdef, parameters)(x, context, fold_key(key, index), *kind)

        limit = SCAN_FROM_LAYERS_GPU if platform_of(self.placement) == "gpu" else SCAN_FROM_LAYERS
        is_scanned = self.execution == "scan" or (self.execution == "auto" and count >= limit)
        if not is_scanned and self.remat == "none":
            for index, parameters in enumerate(unstack(layers, count)):
                x = run(x, (parameters, first + index, *self._kind(first + index)))
            return x
        if self.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat])
        indices = first + jnp.arange(count)
        return lax.scan(lambda x, layer: (run(x, layer), None), x, (layers, indices, *self._kind(indices)))[0]

    def _kind(self, index):
        """Returns what the blocks are called with beside the rest: () or (kind,)."""
        if self.kinds is None:
            return ()
        return (self.kinds[index] if isinstance(index, int) else jnp.asarray(self.kinds, jnp.int32)[index],)

    def bind(self, layers):
        """Returns blocks as modules, one with each of the parameters in `layers` (see `unstack`): how a model is served."""
        graphdef = nnx.graphdef(self.blocks)
        return [nnx.merge(graphdef, layer) for layer in layers]


def find_stack(model):
    """Returns (path, Stack) of the one stack of a model; (None, None) when it has none, or several."""
    found = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, Stack)]
    return found[0] if len(found) == 1 else (None, None)


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
