"""Runs a task's evaluations: one compiled program per evaluation, sums kept on the device until the end."""

import jax
import jax.numpy as jnp

from llmos_jax.data.loader import Prefetcher
from llmos_jax.tasks.base import make_batch


def make_evaluator(task, handle, placement):
    """Returns `evaluate(params, poll) -> {"validation/loss": ...}`, compiled at its first call.

    `poll()` is called between batches: it may raise to leave early (preemption).
    """
    compiled = {spec.name: _compile(spec, handle) for spec in task.evaluations}

    def evaluate(params, poll=lambda: None):
        metrics = {}
        for spec in task.evaluations:
            sums = None
            source = Prefetcher(lambda index, spec=spec: make_batch(task, placement, spec.rows, index), 0)
            try:
                for _ in range(spec.batches):
                    poll()
                    part = compiled[spec.name](params, source.get())
                    sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
            finally:
                source.close()
            totals = {name: float(value) for name, value in jax.device_get(sums).items()}
            metrics |= {f"{spec.name}/{name}": value for name, value in spec.summarise(totals).items()}
        return metrics

    return evaluate


def _compile(spec, handle):
    return jax.jit(lambda params, batch: spec.measure(handle.merge(params), batch))
