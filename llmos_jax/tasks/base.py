"""The Task contract: all that the training loop and the evaluator know of what they optimise.

A task is a module of this package with a `Config` dataclass, `build(config, *, model, data, batch_size, seed)` that
returns a `Task`, and `outline(config, *, model, data)` that returns what of it is known without any data. The loop knows
nothing of text, images or sound; a task knows nothing of devices or optimizers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llmos_jax.compute.sharding import global_array


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch: dtype, shape without the row dimension, logical axes with it."""

    dtype: Any
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation, as data.

    name: prefix of its metrics. batches: how many. rows(index, start, stop): rows of the global batch `index` as numpy
    arrays. measure(model, batch) -> {name: sum}, jitted by the evaluator, float32 scalars that are added over all
    batches. summarise(sums) -> {metric: value}, on the host. batch_size: rows of a global batch.
    """

    name: str
    batch_size: int
    batches: int
    rows: Callable[[int, int, int], Mapping[str, Any]]
    measure: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    summarise: Callable[[Mapping[str, float]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Outline:
    """What of a Task is known before its data is there: enough to compile its training step (fields as in `Task`)."""

    model: Callable[..., Any]
    model_config: Any
    fields: Mapping[str, Field]
    loss: Callable[[Any, Mapping[str, Any], Any], tuple]
    tokens_per_row: int
    flops_per_token: float
    parameter_count: int


@dataclasses.dataclass(frozen=True)
class Task:
    """What to optimise.

    model: `model(placement, *, rngs)` builds the Flax module. model_config: its resolved settings. fields: the arrays of
    a batch. rows(step, start, stop): rows of the global training batch of `step`, a pure function of its arguments.
    loss(model, batch, key) -> (sum, weight, {name: sum}); only the step divides. tokens_per_row, flops_per_token,
    parameter_count: for throughput and MFU. loader: `data.loader.Loader` that rows are read with, where batches may be drawn
    otherwise (differential privacy). identity: of the data, saved with every checkpoint; check_identity(saved)
    raises DataIdentityMismatch. artifacts: {file name: text} that a trained model needs (its tokenizer). prompts,
    sample_tokens, temperature: what to sample during training. baselines: {label: value} printed beside the result.
    """

    model: Callable[..., Any]
    model_config: Any
    fields: Mapping[str, Field]
    batch_size: int
    rows: Callable[[int, int, int], Mapping[str, Any]]
    loss: Callable[[Any, Mapping[str, Any], Any], tuple]
    evaluations: tuple[Evaluation, ...]
    tokens_per_row: int
    flops_per_token: float
    parameter_count: int
    identity: Mapping[str, Any]
    check_identity: Callable[[Mapping[str, Any]], None]
    artifacts: Mapping[str, str]
    loader: Any = None
    tokenizer: Any = None
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 0
    temperature: float = 1.0
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)


def make_batch(task, placement, rows, index):
    """Returns the global batch `index` on the devices; each process reads only the rows that its devices hold.

    Where the length is sharded, every field lies along it in `placement.length_order`, which attention expects.
    """
    read = {}

    def field_rows(name, start, stop):
        if (start, stop) not in read:
            read[start, stop] = rows(index, start, stop)
        values, field = read[start, stop][name], task.fields[name]
        for dimension, axis in enumerate(field.axes):
            order = placement.length_order(values.shape[dimension]) if axis == "length" else None
            values = values if order is None else values.take(order, dimension)
        return values

    return {
        name: global_array(
            lambda start, stop, name=name: field_rows(name, start, stop),
            (task.batch_size, *field.shape),
            field.dtype,
            placement.sharding(*field.axes),
        )
        for name, field in task.fields.items()
    }
