"""Where the layers of a served model lie: all on every device, or consecutive ones on each stage of the mesh's pipeline.

With stages whatever belongs to a layer (weights, pages, what is read and added in a program) has a leading dimension of stages,
laid over the pipeline axis: list entry p is the p-th layer of every stage. Tokens go through one stage after the other inside
the program; a stage computes in every tick, as a vmapped dimension, and what it computes out of turn is dropped. So a token
takes as long as on one device, and each device holds its own layers only.
"""

import jax
import jax.numpy as jnp
from jax import lax

from llmos_jax.errors import ConfigError
from llmos_jax.models.stack import unstack


class Stages:
    """The stages of a model's `config` (a DecoderConfig) on a placement; `count` is 1 without a pipeline.

    Raises ConfigError when stages hold several blocks each, or layers at the same place in their stages differ in kind.
    """

    def __init__(self, placement, config):
        plan = placement.pipeline
        self.placement, self.count = placement, plan.stages if plan else 1
        if plan and plan.repeats > 1:
            raise ConfigError(
                f"mesh.pipeline_repeats={plan.repeats}: a stage that serves has one run of layers; leave it at 1 (checkpoints "
                "are the same)."
            )
        kinds, self.layers = config.kinds or (0,) * config.layers, config.layers // self.count
        self.kinds = kinds[: self.layers]
        if self.kinds * self.count != tuple(kinds):
            raise ConfigError(
                f"mesh.pipeline={self.count}: layers at the same place in their stages have to be of one kind (with a window, "
                f"or without), and the kinds of all layers are {kinds}: take a number of stages that cuts their pattern evenly."
            )

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

    def run(self, stack, layers, entries, read):
        """Returns what `Decoder.decode` calls for its layers: `(x, rotations) -> (x, what was written)`.

        stack: the model's; layers: of `split`; entries and read: as in `Block.decode`, an entry for each layer of a stage.
        """

        def in_order(layers, entries, x_BLD, rotations):
            written = []
            for block, entry, kind in zip(stack.bind(layers), entries, self.kinds, strict=True):
                x_BLD, new = block.decode(x_BLD, entry, read, rotations, kind)
                written.append(new)
            return x_BLD, written

        if self.count == 1:
            return lambda x_BLD, rotations: in_order(layers, entries, x_BLD, rotations)
        in_stages = self.each(in_order, (0, 0, 0, None))

        def pass_through(x_BLD, rotations):
            x_SBLD = jnp.zeros((self.count, *x_BLD.shape), x_BLD.dtype).at[0].set(x_BLD)
            shapes = jax.eval_shape(in_stages, layers, entries, x_SBLD, rotations)[1]
            written = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            def tick(carry, number):
                x_SBLD, written = carry
                leaving_SBLD, new = in_stages(layers, entries, x_SBLD, rotations)
                is_its_turn_S = jnp.arange(self.count) == number

                def keep(new, old):
                    kept = jnp.where(is_its_turn_S.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                    return self.placement.constrain(kept, "layers", "heads", None, None, None)

                rolled_SBLD = self.placement.constrain(jnp.roll(leaving_SBLD, 1, axis=0), "layers", None, None, None)
                return (rolled_SBLD, jax.tree.map(keep, new, written)), None

            (x_SBLD, written), _ = lax.scan(tick, (x_SBLD, written), jnp.arange(self.count))
            return x_SBLD[0], written

        return pass_through
