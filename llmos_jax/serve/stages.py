"""Where the layers of a served model lie: all on every device, or consecutive ones on each stage of the mesh's pipeline.

With stages whatever belongs to a layer (weights, pages, what is read and added in a program) has a leading dimension of stages,
laid over the pipeline axis: list entry p is the p-th layer of every stage. Tokens go through one stage after the other inside
the program; a stage computes in every tick, as a vmapped dimension, and what it computes out of turn is dropped. So a token
takes as long as on one device, and each device holds its own layers only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmos_jax.compute.pipeline import layer_order
from llmos_jax.models.decoder import token_of_row
from llmos_jax.models.stack import unstack


class Stages:
    """The stages of a model's `config` (a DecoderConfig) on a placement; `count` is 1 without a pipeline.

    A stage that holds several blocks (mesh.pipeline_repeats) is passed once for each, in the order of training. kinds: what
    each layer of a stage is called with, or an array of what every stage's is, where layers at the same place differ.
    """

    def __init__(self, placement, config):
        plan = placement.pipeline
        self.placement, self.count, self.repeats = placement, plan.stages if plan else 1, plan.repeats if plan else 1
        self.layers = config.layers // self.count
        stored = layer_order(plan, config.layers) if plan else range(config.layers)
        kinds = np.array(config.kinds or (0,) * config.layers, np.int32)[np.array(stored)].reshape(self.count, self.layers)
        self.kinds = [int(of_stages[0]) if len(set(of_stages.tolist())) == 1 else of_stages for of_stages in kinds.T]

    def split(self, blocks):
        """Returns the parameters of each layer of a stage, of all layers' stacked [layers, ...]."""
        if self.count == 1:
            return unstack(blocks, self.layers)
        parts = jax.tree.map(lambda x: x.reshape(self.count, self.layers, *x.shape[1:]), blocks)
        return [jax.tree.map(lambda x, index=index: x[:, index], parts) for index in range(self.layers)]

    def split_shardings(self, shardings):
        """Returns the layout of what `split` returns: that of the stacked parameters, or of one layer of them."""
        if self.count > 1:
            return [shardings] * self.layers
        of_layer = jax.tree.map(
            lambda s: jax.sharding.NamedSharding(s.mesh, jax.sharding.PartitionSpec(*s.spec[1:])), shardings
        )
        return [of_layer] * self.layers

    def shape(self, *shape):
        """Returns the shape of an array of every stage."""
        return shape if self.count == 1 else (self.count, *shape)

    def sharding(self, *axes):
        """Returns the NamedSharding of an array of every stage whose other dimensions have these logical axes."""
        return self.placement.sharding(*axes) if self.count == 1 else self.placement.sharding("layers", *axes)

    def each(self, function, in_axes):
        """Returns a function of what belongs to a layer, for every stage; in_axes: 0 for that, None for what is everybody's."""
        return function if self.count == 1 else jax.vmap(function, in_axes, spmd_axis_name="pipeline")

    def run(self, stack, layers, entries, read, is_updated=False, only_B=None):
        """Returns what `Decoder.decode` calls for its layers: `(x, rotations) -> (x, what was written)`.

        stack: the model's; layers: of `split`; entries and read: as in `Block.decode`, an entry for each layer of a stage.
        is_updated: `read` returns the entry itself with something written into it, and takes `is_turn`: whether what is to be
        written counts (None: it does). Otherwise it returns what is new. only_B: the one token of each row whose x is wanted.
        """
        fixed = [kind if isinstance(kind, int) else None for kind in self.kinds]
        by_stage = [None if isinstance(kind, int) else kind for kind in self.kinds]

        def in_order(part, layers, kinds, entries, is_turn, x_BLD, rotations, only_B=None):
            read_now = read if is_turn is None else functools.partial(read, is_turn=is_turn)
            written = []
            for block, entry, same, differing in zip(stack.bind(layers), entries, fixed[part], kinds, strict=True):
                wanted = only_B if len(written) == len(entries) - 1 else None  # the last layer computes no more than that
                x_BLD, new = block.decode(x_BLD, entry, read_now, rotations, differing if same is None else same, wanted)
                written.append(new)
            return x_BLD, written

        if self.count == 1:
            given = (slice(None), layers, by_stage, entries, None)
            return lambda x_BLD, rotations: in_order(*given, x_BLD, rotations, only_B)

        def pass_through(x_BLD, rotations):
            written, of_repeat = [], self.layers // self.repeats
            for start in range(0, self.layers, of_repeat):
                part = slice(start, start + of_repeat)
                one = self.each(functools.partial(in_order, part), (0, 0, 0, 0, 0, None))
                one = functools.partial(one, layers[part], by_stage[part])
                x_BLD, new = self._pass_once(one, entries[part], is_updated, x_BLD, rotations)
                written += new
            return (x_BLD if only_B is None else token_of_row(x_BLD, only_B)), written

        return pass_through

    def _pass_once(self, in_stages, entries, is_updated, x_BLD, rotations):
        """Returns (x, what was written) after one block of layers of every stage."""
        x_SBLD = jnp.zeros((self.count, *x_BLD.shape), x_BLD.dtype).at[0].set(x_BLD)
        stages_S = jnp.arange(self.count)

        def tick(carry, number):
            x_SBLD, written = carry
            is_turn_S = stages_S == number
            if is_updated:
                leaving_SBLD, written = in_stages(written, is_turn_S, x_SBLD, rotations)
            else:
                leaving_SBLD, new = in_stages(entries, None, x_SBLD, rotations)
                written = jax.tree.map(functools.partial(self._kept, is_turn_S), new, written)
            rolled_SBLD = self.placement.constrain(jnp.roll(leaving_SBLD, 1, axis=0), "layers", None, None, None)
            return (rolled_SBLD, written), None

        written = entries
        if not is_updated:
            shapes = jax.eval_shape(in_stages, entries, None, x_SBLD, rotations)[1]
            written = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (x_SBLD, written), _ = lax.scan(tick, (x_SBLD, written), stages_S)
        return x_SBLD[0], written

    def _kept(self, is_turn_S, new, old):
        kept = jnp.where(is_turn_S.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        return self.placement.constrain(kept, "layers", "heads", None, None, None)
