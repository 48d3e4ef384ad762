"""The training state: one frozen tree of sharded arrays, and its sharded birth."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmos_jax.compute.sharding import shard_shapes_divide
from llmos_jax.errors import ConfigError
from llmos_jax.models.stack import find_stack
from llmos_jax.train.guard import initial_guard


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """What the code that built a parameter knows of it: logical axes, kind (matrix, embedding, vector), inputs."""

    axes: tuple[str | None, ...]
    kind: str
    inputs: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes.

    step: updates applied (int32); params, ema: nested dicts of float32 arrays (ema may be None); optimizer: optax's
    state; guard: counters and running mean of `guard.py`.
    """

    step: jax.Array
    params: Any
    optimizer: Any
    ema: Any
    guard: Any

    @property
    def evaluated_params(self):
        """The averaged weights where they are kept, the weights themselves elsewhere."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class ModelHandle:
    """A model taken apart: `merge(params)` gives the module, `infos` describes its parameters, `shapes` their shapes.

    shardings: of the parameters; optimizer_shardings: of what only the update reads (the same, but for ZeRO-1).
    stack: (path, Stack) of the model's one stack of blocks, without values; (None, None) when it has none, or several.
    """

    graphdef: Any
    shapes: Any
    infos: Any
    shardings: Any
    optimizer_shardings: Any
    placement: Any
    stack: Any
    build: Any

    def merge(self, params):
        """Returns the Flax module with these parameters."""
        return nnx.merge(self.graphdef, params)

    @property
    def abstract(self):
        """The parameters as ShapeDtypeStructs with shardings: what a restore needs to know."""
        return jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), self.shapes, self.shardings
        )

    def init(self, key):
        """Returns fresh parameters; call it inside jit with `out_shardings=handle.shardings`."""
        return nnx.to_pure_dict(nnx.state(self.build(rngs=nnx.Rngs(params=key))))


def describe_model(build, placement):
    """Returns the ModelHandle of `build(rngs=...)` without allocating a parameter.

    Raises ConfigError when a parameter's dimension can't be laid over its mesh axis, or the expert axis finds no experts.
    """
    model = jax.eval_shape(lambda: build(rngs=nnx.Rngs(params=0)))
    graphdef, state = nnx.split(model)
    infos = jax.tree.map(_info, state, is_leaf=_is_variable)
    infos = nnx.to_pure_dict(infos) if isinstance(infos, nnx.State) else infos
    shapes = nnx.to_pure_dict(state)
    axes = {axis for info in jax.tree.leaves(infos) for axis in info.axes}
    if placement.mesh.shape["expert"] > 1 and "experts" not in axes:
        raise ConfigError(
            f"mesh.expert={placement.mesh.shape['expert']}, and the model has no experts: set model.experts, or mesh.data "
            "in its place."
        )
    names = jax.tree_util.tree_map_with_path(lambda path, _: leaf_name(path), shapes)
    shardings = []
    for where in (placement, placement.for_optimizer):
        jax.tree.map(
            lambda s, info, name, where=where: shard_shapes_divide(where, s.shape, info.axes, name), shapes, infos, names
        )
        shardings.append(jax.tree.map(lambda info, where=where: where.sharding(*info.axes), infos))
    return ModelHandle(graphdef, shapes, infos, *shardings, placement, find_stack(model), build)


def init_state(handle, optimizer, placement, seed, *, with_ema=False):
    """Returns a fresh TrainState, every array born in its place: none is ever whole on one device when it is sharded."""

    def make(key):
        return _state_of(handle.init(key), optimizer, with_ema)

    key = jax.random.key(seed)
    return jax.jit(make, out_shardings=state_shardings(handle, optimizer, placement, with_ema=with_ema))(key)


def abstract_state(handle, optimizer, placement, *, with_ema=False):
    """Returns the state as ShapeDtypeStructs with shardings: what a restore needs to know."""
    shapes = _state_shapes(handle, optimizer, with_ema)
    shardings = state_shardings(handle, optimizer, placement, with_ema=with_ema)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


def state_shardings(handle, optimizer, placement, *, with_ema=False):
    """Returns the tree of NamedShardings of a TrainState; moments and averages lie by `handle.optimizer_shardings`."""
    shapes = _state_shapes(handle, optimizer, with_ema)
    by_name = {
        leaf_name(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(handle.shapes), jax.tree.leaves(handle.optimizer_shardings), strict=True
        )
    }

    def place(path, leaf):
        # A factored moment (adafactor) has another shape than its parameter: replicated.
        shape, sharding = by_name.get(_parameter_name(path, by_name), (None, None))
        if shape == leaf.shape:
            return sharding
        if shape and leaf.size > 1 and _is_reordered(handle):
            raise ConfigError(
                "mesh.pipeline_repeats above 1 needs an optimizer whose moments have their parameters' shapes: take optim.name="
                "adamw, lion or muon, or mesh.pipeline_repeats=1."
            )
        return placement.sharding()

    return dataclasses.replace(jax.tree_util.tree_map_with_path(place, shapes), params=handle.shardings)


def in_canonical_order(tree, handle):
    """Returns a TrainState, or its parameters, with the stack's layers in their natural order: how they are saved.

    It is the same tree unless pipeline stages hold several blocks each. `in_stored_order` is its inverse.
    """
    return _reorder(tree, handle, np.argsort(handle.stack[1].order)) if _is_reordered(handle) else tree


def in_stored_order(tree, handle):
    """Returns a TrainState, or its parameters, with the stack's layers as this mesh keeps them (see `Stack.order`)."""
    return _reorder(tree, handle, np.array(handle.stack[1].order)) if _is_reordered(handle) else tree


def _is_reordered(handle):
    _, stack = handle.stack
    return stack is not None and stack.order != tuple(sorted(stack.order))


def _reorder(tree, handle, order):
    infos = {leaf_name(path): info for path, info in jax.tree_util.tree_leaves_with_path(handle.infos)}

    def move(path, leaf):
        info = infos.get(_parameter_name(path, infos))
        return jnp.take(leaf, order, axis=0) if info and info.axes[0] == "layers" and leaf.ndim == len(info.axes) else leaf

    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.jit(lambda tree: jax.tree_util.tree_map_with_path(move, tree), out_shardings=shardings)(tree)


def _parameter_name(path, names):
    """Returns which of `names` a leaf of the state belongs to: a moment's path ends with its parameter's. None: to none."""
    parts = leaf_name(path).split("/")
    endings = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((ending for ending in endings if ending in names), None)


def to_tree(state):
    """Returns the state as nested dicts with stable names: the form that is saved."""
    tree = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        *parents, last = leaf_name(path).split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def from_tree(tree, like):
    """Returns a state shaped as `like` with the leaves of `tree` (see `to_tree`)."""

    def find(path, _):
        node = tree
        for name in leaf_name(path).split("/"):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(find, like)


def leaf_name(path):
    """Returns a tree path as text: `params/stack/blocks/up/weight`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _state_of(params, optimizer, with_ema):
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), ema, initial_guard())


def _state_shapes(handle, optimizer, with_ema):
    # From the parameters' shapes: building the model again, which traces its initialisers, takes ten times as long.
    return jax.eval_shape(lambda params: _state_of(params, optimizer, with_ema), handle.shapes)


def _is_variable(value):
    return isinstance(value, nnx.Variable)


def _info(variable):
    known = variable.get_metadata()
    return ParameterInfo(known["axes"], known["kind"], known["inputs"])
