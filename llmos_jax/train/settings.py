"""The settings of a whole training run, typed: what an experiment file and its overrides become."""

import dataclasses
from typing import Any

from llmos_jax.compute.distributed import DistributedConfig
from llmos_jax.compute.mesh import MeshConfig
from llmos_jax.compute.watchdog import WatchdogConfig
from llmos_jax.config import setting
from llmos_jax.data.prepare import DataConfig
from llmos_jax.errors import ConfigError
from llmos_jax.models.attention_context import check_length
from llmos_jax.train.checkpoint import CheckpointConfig
from llmos_jax.train.optim import OptimConfig
from llmos_jax.train.privacy import PrivacyConfig, batch_rows, check_private


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, on how much at a time, and what to do on the way."""

    steps: int | None = setting(1000, help="batches to train on; none: until max_seconds", at_least=1)
    max_seconds: float | None = setting(None, help="wall time of training; the schedule follows the clock", above=0.0)
    batch_size: int = setting(16, help="rows of the global batch, over all devices", at_least=1)
    microbatches: int = setting(1, help="slices of the batch whose gradients are accumulated", at_least=1)
    log_every_steps: int = setting(10, help="steps between reads of the device's metrics", at_least=1)
    evaluate_every_steps: int | None = setting(None, help="steps between evaluations; none: only at the end", at_least=1)
    sample_every_steps: int | None = setting(None, help="steps between samples; none: only at the end", at_least=1)
    compare_replicas_every_steps: int | None = setting(
        None, help="steps between comparisons of the devices' copies of the state, also before saves; none: never", at_least=1
    )
    profile_steps: tuple[int, ...] = setting((), help="first and last step of a profiler trace", at_least=1)
    init_from: str | None = setting(None, help="run directory, or hf:FOLDER, whose parameters are the start")
    compiler_options: dict[str, str] = setting({}, help="of XLA, over those that compute/xla.py has for the device; none: not")
    privacy: PrivacyConfig | None = setting(None, help="differential privacy (epsilon, noise_multiplier, ...); none: off")
    keep_heap: bool = setting(True, help="on CPU with glibc: keep freed memory (1.7 times faster steps)")

    def __post_init__(self):
        if self.steps is None and self.max_seconds is None:
            raise ConfigError("train.steps and train.max_seconds are both none: training would never end; set one.")
        if self.batch_size % self.microbatches:
            raise ConfigError(f"train.batch_size={self.batch_size} is not divisible by train.microbatches={self.microbatches}.")
        if self.profile_steps and len(self.profile_steps) != 2:
            raise ConfigError(f"train.profile_steps={list(self.profile_steps)} must be two steps: first, last.")
        if self.init_from == "":
            raise ConfigError("train.init_from is empty: name a run directory or hf:FOLDER, or set it to none.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """One experiment, resolved."""

    name: str = setting(help="of the experiment")
    model: Any = setting(help="the network", units="llmos_jax.models")
    seed: int = setting(0, help="of initial weights, order of data, dropout", at_least=0, at_most=2**32 - 1)
    task: Any = setting({"name": "language"}, help="what to optimise", units="llmos_jax.tasks")
    data: DataConfig = setting(DataConfig(), help="sources and records")
    mesh: MeshConfig = setting(MeshConfig(), help="devices and rules")
    optim: OptimConfig = setting(OptimConfig(), help="optimizer")
    train: TrainConfig = setting(TrainConfig(), help="length and rhythm")
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), help="what is saved when")
    distributed: DistributedConfig = setting(DistributedConfig(), help="processes")
    watchdog: WatchdogConfig = setting(WatchdogConfig(), help="limits on phases without progress")


# A run directory belongs to what these decide; the rest (mesh, rhythm, checkpoints) may change when a run continues.
IDENTITY = ("name", "seed", "model", "task", "data", "optim")


def check_positions(settings):
    """Raises ConfigError when records are too short to train all learned positions; a warm start may bring them trained."""
    context, length = settings.model.context, settings.data.length
    if settings.model.learns_positions and context > length and settings.train.init_from is None:
        raise ConfigError(
            f"model.context={context} is longer than the records' data.length={length}: the positions from {length} on would "
            "never be trained; lower one or raise the other."
        )


def check_batch(settings, placement):
    """Raises ConfigError when the batch can't be cut: rows into data shards x microbatches, length into its shards."""
    shards, train, plan = placement.axis_size("batch"), settings.train, placement.pipeline
    if train.privacy is not None:
        check_private(settings, placement)
    rows = batch_rows(settings, placement)[0]
    multiple, parts = shards * train.microbatches, f"{shards} data shards x train.microbatches={train.microbatches}"
    if plan is not None:
        multiple, parts = multiple * plan.microbatches, f"{parts} x mesh.pipeline_microbatches={plan.microbatches}"
    if rows % multiple:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not divisible by {parts}; the next size that is: "
            f"{-(-train.batch_size // multiple) * multiple}."
        )
    length, shards = settings.data.length, placement.axis_size("length")
    if shards > 1:
        check_length(length, shards, "data.length")
    shards = placement.axis_size("residual_length")
    if length % shards:
        raise ConfigError(
            f"data.length={length} is not divisible by the {shards} shards of mesh axis "
            f"{' x '.join(placement.mesh_axes('residual_length'))}; the next length that is: {-(-length // shards) * shards}, "
            f"or set mesh.is_sequence_sharded=false."
        )
