"""Decisions by the clock: with many processes, process 0 decides and all others follow at the same step."""

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.compute.distributed import device_rows

# What the compiled step hands back with its metrics.
READING = "clock"


class SharedClock:
    """How far the run is by the clock, and whether a save is due by it, alike on all processes.

    Clocks differ between processes, and a decision that is not taken by all of them at the same step is a deadlock. Each
    process lays its own reading into its devices' rows of a small array; the compiled step takes a row of process 0's, and
    hands it back with its metrics. What the loop acts on is the newest reading that came back: no message and no
    wait of its own, at the price of acting one log window late. A single process acts on its own clock at once.

    share: `share()` of `train.max_seconds` that is used up. is_save_due: `is_save_due()` by this process's clock.
    """

    def __init__(self, share, is_save_due, mesh):
        self._share, self._is_save_due = share, is_save_due
        self._sharding, self._rows = device_rows(mesh), mesh.size
        self._is_alone = jax.process_count() == 1
        self._agreed = np.zeros(2, np.float32)

    @property
    def share(self):
        """The share of the planned time that is used up, in [0, 1]."""
        return self._share() if self._is_alone else float(self._agreed[0])

    @property
    def is_save_due(self):
        """Whether a save is due by the clock."""
        return self._is_save_due() if self._is_alone else bool(self._agreed[1])

    def reading(self):
        """Returns the array that a step is given: float32 [devices, 2], one row a device."""
        row = np.array([[self._share(), self._is_save_due()]], np.float32)
        rows = np.repeat(row, self._rows, axis=0)
        return jax.make_array_from_callback(rows.shape, self._sharding, lambda index: rows[index])

    def came_back(self, reading):
        """Takes the reading that a step handed back."""
        self._agreed = np.asarray(reading)

    def was_saved(self):
        """A save answers what was due before it."""
        self._agreed = self._agreed * np.array([1, 0], np.float32)


def abstract_reading(mesh):
    """Returns the shape of a SharedClock's `reading`, for compilation."""
    return jax.ShapeDtypeStruct((mesh.size, 2), jnp.float32, sharding=device_rows(mesh))


def with_reading(step, mesh):
    """Returns `step(state, batch, clock)` as one that takes a SharedClock's reading and hands process 0's row back."""
    first = next(row for row, device in enumerate(mesh.devices.flat) if device.process_index == 0)

    def run(state, batch, readings):
        state, metrics = step(state, batch, readings[first, 0])
        return state, metrics | {READING: readings[first]}

    return run
