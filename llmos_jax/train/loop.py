"""THE training loop: one for every task, read from top to bottom like a recipe.

Fixed order within a step: evaluate the old state, save it, fetch the batch, dispatch the step, read the metrics of the
step before. The device is never waited for between log steps. It knows nothing of text, images or sound.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from llmos_jax.compute import devices, distributed, host, memory, xla
from llmos_jax.compute.faults import Faults
from llmos_jax.compute.watchdog import Watchdog
from llmos_jax.config import to_plain
from llmos_jax.data.loader import Prefetcher
from llmos_jax.errors import CheckpointError, DeviceMemoryError, Preempted
from llmos_jax.tasks.base import make_batch
from llmos_jax.train import directory as run_directory
from llmos_jax.train import guard, optim
from llmos_jax.train import state as states
from llmos_jax.train.checkpoint import Checkpointer
from llmos_jax.train.clock import READING, SharedClock
from llmos_jax.train.compile import state_parts, trace_step
from llmos_jax.train.fingerprint import ReplicaCheck
from llmos_jax.train.metrics import MetricsWriter, Progress, ThroughputMeter, TimeAccount
from llmos_jax.train.preemption import Preemption
from llmos_jax.train.settings import check_batch

# What a category of time is for whoever runs out of memory in it.
_DOING = {
    "compile": "while the training step was compiled",
    "restore": "before the first step, where the state is made",
    "step": "in a training step",
    "evaluate": "in an evaluation",
    "sample": "while samples were drawn",
    "save_block": "while a checkpoint was saved",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    step: batches seen. evaluation: the last one's metrics. goodput: share of the time spent in training steps. seconds: by
    category. throughput: figures of the last log window. elapsed_seconds: in the loop, over all its processes.
    """

    step: int
    evaluation: dict[str, float]
    goodput: float
    seconds: dict[str, float]
    throughput: dict[str, float]
    elapsed_seconds: float


@dataclasses.dataclass
class _Run:
    """What the phases of one run share."""

    settings: Any
    task: Any
    placement: Any
    directory: pathlib.Path
    handle: Any
    optimizer: Any
    account: TimeAccount
    checkpointer: Checkpointer
    preemption: Preemption
    watchdog: Watchdog
    clock: SharedClock | None = None
    need: dict | None = None  # bytes per device of the compiled step
    elapsed_before: float = 0.0
    evaluation: dict = dataclasses.field(default_factory=dict)
    evaluated_at: int | None = None
    sampled_at: int | None = None
    started: float | None = None

    def elapsed_seconds(self):
        return self.elapsed_before + (0.0 if self.started is None else time.perf_counter() - self.started)

    def is_over(self, position):
        """Whether training is done, by steps or by the clock."""
        steps = self.settings.train.steps
        return (steps is not None and position >= steps) or self.clock.share >= 1.0

    def time_share(self):
        """The share of `train.max_seconds` that is used up by this process's clock."""
        limit = self.settings.train.max_seconds
        return 0.0 if limit is None else min(1.0, self.elapsed_seconds() / limit)

    def poll(self):
        """Says that the run lives; raises Preempted when it was asked to stop."""
        self.watchdog.mark()
        self.preemption.poll()


def train(
    settings,
    task,
    placement,
    directory,
    *,
    evaluate: Callable[..., dict[str, float]],
    sample: Callable[..., list[dict]],
    watchdog: Watchdog,
    preemption: Preemption,
    initial_params: Callable[[Any], Any] | None = None,
    launched: float | None = None,
) -> Result:
    """Trains `task` as `settings` say, in run directory `directory`, from its newest good checkpoint if there is one.

    Args:
      settings: Settings. task: tasks.base.Task. placement: compute.sharding.Placement.
      evaluate: `evaluate(handle)(params, poll) -> {metric: value}`. sample: `sample(handle)(params) -> [{"prompt", "text"}]`.
      watchdog, preemption: entered by the caller.
      initial_params: `initial_params(abstract params) -> params`, instead of random ones (warm start).
      launched: `time.time()` when the process was launched, to report the time to the first step.

    Raises Preempted (state saved) on SIGTERM or Ctrl-C, TrainingDiverged, DeviceMemoryError, CheckpointError, and PeerLost
    when another process of the run is gone.
    """
    directory = pathlib.Path(directory)
    handle = states.describe_model(lambda *, rngs: task.model(placement, rngs=rngs), placement)
    check_batch(settings, placement)
    optimizer = optim.make_optimizer(settings.optim, handle.infos)
    account = TimeAccount(on_change=watchdog.mark)
    if launched is not None:
        account.merge({"init": time.time() - launched})
    checkpointer = Checkpointer(directory / run_directory.CHECKPOINTS, settings.checkpoint)
    run = _Run(settings, task, placement, directory, handle, optimizer, account, checkpointer, preemption, watchdog)
    run.clock = SharedClock(run.time_share, checkpointer.is_time_due, placement.mesh)
    try:
        return _train(run, evaluate(handle), sample(handle), initial_params, launched)
    except Exception as error:
        if memory.is_out_of_memory(error):
            parts = state_parts(_abstract(run))
            limit = memory.device_limit_bytes(jax.local_devices()[0])
            doing = _DOING.get(account.failed_in, "while training")
            raise DeviceMemoryError(memory.explain_failure(error, doing, run.need, parts, limit)) from error
        if distributed.count() > 1 and not isinstance(error, Preempted):
            checkpointer.abandon()  # its running save may wait for a process that is gone, or that this one leaves alone
        if distributed.is_peer_loss(error):
            raise distributed.peer_lost(error) from error
        raise
    finally:
        checkpointer.close()


def _train(run, evaluate, sample, initial_params, launched):
    settings, task, account, watchdog = run.settings, run.task, run.account, run.watchdog
    config, faults = settings.train, Faults(run.directory, distributed.index())

    # ---- Compile before anything is allocated: a step that does not fit is refused with its reasons.
    with account.spend("compile"):
        compiled = _compile(run)

    # ---- State: the newest checkpoint that verifies, else a warm start, else fresh.
    with account.spend("restore"):
        state, position = _restore_or_init(run, initial_params)
        # The first collective connects the processes, and gives up on one that compiles much longer than the others.
        distributed.barrier("ready")
        # Nothing was refused: only now is what another command left there overwritten.
        distributed.from_first("record", lambda: run_directory.record(run.directory, settings, task.artifacts))
    run.preemption.begin()
    host.return_free_memory()  # what compilation left, before the first step takes its temporaries
    logging.info("training from step %d to %s", position, config.steps or f"{config.max_seconds:g} s")
    is_first = jax.process_index() == 0
    writer = MetricsWriter(run.directory, is_writer=is_first, step=position)
    account.merge({"redo": writer.lost_seconds})
    meter = ThroughputMeter(
        tokens_per_step=config.batch_size * task.tokens_per_row,
        flops_per_token=task.flops_per_token,
        peak_flops=devices.peak_flops(run.placement.mesh.devices.flat, _dtype_name(run)),
    )
    progress = Progress(total=config.steps, start=position, fraction=run.time_share, is_shown=is_first)
    leaf_names = [states.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(run.handle.shapes)]
    is_compared = config.compare_replicas_every_steps is not None
    replicas = ReplicaCheck(states.to_tree(_abstract(run)), run.placement.mesh) if is_compared else None
    batches = Prefetcher(lambda index: make_batch(task, run.placement, task.rows, index), position)
    profile = _Profile(config.profile_steps, run.directory)
    pending = []
    run.started, stepped = time.perf_counter(), account.totals()["step"]

    def flush(entries):
        """Reads the metrics of finished steps: the only place where the host waits for the device."""
        nonlocal stepped
        if not entries:
            return
        with account.spend("step"):
            read = jax.device_get([metrics for _, metrics in entries])
        stepped_before, stepped = stepped, account.totals()["step"]
        watchdog.measured(stepped - stepped_before, steps=len(entries))
        mean_loss = float(np.mean([values["train/loss"] for values in read]))
        for (step, _), values in zip(entries, read, strict=True):
            verdict = values.pop("guard")
            run.clock.came_back(values.pop(READING))
            figures = {name: float(value) for name, value in values.items()}
            if step == entries[-1][0]:
                # A CPU computes a step while it is dispatched: the time taken is that of all steps so far, read or not.
                timed = position if run.placement.platform == "cpu" else step
                meter.update(timed, account.totals(), jax.local_devices())
                progress.update(step, figures | {"train/loss": mean_loss} | meter.figures() | run.evaluation)
                figures |= meter.figures() | {"throughput/goodput": account.goodput()}
            writer.write(step, figures)
            guard.check(settings.optim, verdict, leaf_names)

    def evaluate_state():
        if run.evaluated_at == position:  # by the process before this one
            return
        with account.spend("evaluate"):
            run.evaluation, run.evaluated_at = evaluate(state.evaluated_params, run.poll), position
        writer.write(position, run.evaluation)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in run.evaluation.items())
        progress.message(f"step {position}  {shown}")

    def sample_state():
        if run.sampled_at == position:
            return
        with account.spend("sample"):
            texts, run.sampled_at = sample(state.evaluated_params), position
        writer.write_samples(position, texts)
        for text in texts:
            progress.message(f"sample  {text['prompt']!r} -> {text['text']!r}")

    def compare_replicas(is_due):
        if replicas is not None and is_due:
            with account.spend("step"):
                replicas(states.to_tree(state))

    try:
        while not run.is_over(position):
            watchdog.step = position
            run.poll()

            # ---- Evaluate the old state, then save it: what was measured is what is kept.
            if _is_due(config.evaluate_every_steps, position):
                flush(pending)
                pending = []
                evaluate_state()
            if _is_due(config.sample_every_steps, position):
                sample_state()
            is_saved = run.checkpointer.should_save(position, is_time_due=run.clock.is_save_due)
            compare_replicas(is_saved or _is_due(config.compare_replicas_every_steps, position))
            if is_saved:
                flush(pending)  # what is saved is also written: a kill after this save loses no line of metrics
                pending = []
                with account.spend("save_block"):
                    _save(run, state, position)
            run.checkpointer.poll()

            # ---- Fetch the batch, dispatch the step; read the metrics of the steps before it: in `flush` and nowhere else.
            with jax.transfer_guard_device_to_host("disallow"):
                profile.before(position)
                with account.spend("data_wait"):
                    batch = batches.get()
                faults.strike(position + 1)
                reading = run.clock.reading()
                with account.spend("step"), jax.transfer_guard("disallow"):
                    state, metrics = compiled(state, batch, reading)
                position += 1
                pending.append((position, metrics))
                if launched is not None:
                    jax.block_until_ready(metrics)
                    writer.write(position, {"start/first_step_seconds": time.time() - launched})
                    progress.message(f"first step done {time.time() - launched:.1f} s after launch")
                    launched = None
                if len(pending) > config.log_every_steps:
                    flush(pending[:-1])
                    pending = pending[-1:]
            profile.after(position, state)

        # ---- The end: last metrics, evaluation, samples, checkpoint.
        flush(pending)
        pending = []
        compare_replicas(True)
        # An error in what follows must not cost what was trained; but processes save together, and one may fail alone.
        is_alone = distributed.count() == 1
        if not is_alone:
            with account.spend("save_block"):
                _save(run, state, position)
                _require_saved(run, position)
        try:
            faults.strike(position, is_end=True)
            evaluate_state()
            sample_state()
        except Exception as error:
            if is_alone and not isinstance(error, Preempted):
                _save(run, state, position)
                _require_saved(run, position)
            raise
        with account.spend("save_block"):
            _save(run, state, position)
    except Preempted:
        flush(pending)
        with account.spend("save_block"):
            _save(run, state, position)
            _require_saved(run, position)
        progress.message(f"saved step {position}")
        raise
    finally:
        batches.close()
        progress.close()
        profile.close()
        writer.close()
    with account.spend("save_block"):
        _require_saved(run, position)
    return Result(
        step=position,
        evaluation={name.partition("/")[2]: value for name, value in run.evaluation.items()},
        goodput=account.goodput(),
        seconds=account.totals(),
        throughput=meter.figures(),
        elapsed_seconds=run.elapsed_seconds(),
    )


def _is_due(every, position):
    return every is not None and position > 0 and position % every == 0


def _compile(run):
    """Returns the compiled step, having checked that it fits the device."""
    traced, state = trace_step(run.settings, run.task, run.handle, run.optimizer, run.placement)
    device = jax.local_devices()[0]
    compiled = xla.compile_lowered(traced.lower(), xla.compiler_options(device, run.settings.train.compiler_options))
    run.need = memory.compiled_bytes(compiled)
    memory.check_fit(run.need, state_parts(state), memory.device_limit_bytes(device))
    return compiled


def _restore_or_init(run, initial_params):
    """Returns (state, position): the newest verified checkpoint, or a start."""
    abstract = _abstract(run)
    restored = run.checkpointer.restore_latest_good(states.to_tree(abstract))
    if restored is not None:
        step, tree, metadata = restored
        run.task.check_identity(metadata["data"])
        run.elapsed_before = metadata["elapsed_seconds"]
        run.evaluation, run.evaluated_at = metadata["evaluation"], metadata["evaluated_at"]
        run.sampled_at = metadata["sampled_at"]
        run.account.merge(metadata["seconds"])
        logging.info("restored step %d from %s", step, run.directory)
        return states.in_stored_order(states.from_tree(tree, abstract), run.handle), metadata["position"]
    state = states.init_state(
        run.handle, run.optimizer, run.placement, run.settings.seed, with_ema=run.settings.optim.ema is not None
    )
    if initial_params is not None:
        params = states.in_stored_order(initial_params(abstract.params), run.handle)
        ema = None if state.ema is None else jax.tree.map(lambda x: x.copy(), params)
        state = dataclasses.replace(state, params=params, ema=ema)
    return state, 0


def _save(run, state, position):
    if run.checkpointer.has(position):
        return
    metadata = {
        "position": position,
        "data": dict(run.task.identity),
        "settings": to_plain(run.settings),
        "elapsed_seconds": run.elapsed_seconds(),
        "seconds": run.account.totals(),
        "evaluation": run.evaluation,
        "evaluated_at": run.evaluated_at,
        "sampled_at": run.sampled_at,
        "artifacts": dict(run.task.artifacts),
    }
    run.checkpointer.save(position, states.to_tree(states.in_canonical_order(state, run.handle)), metadata)
    run.clock.was_saved()


def _require_saved(run, position):
    """Waits for the last save; CheckpointError when what was trained is not on the disk."""
    run.checkpointer.wait()
    if position and not run.checkpointer.has(position):
        raise CheckpointError(
            f"step {position} could not be saved in {run.checkpointer.directory} (the reason is above): mend it and run the "
            "same command again."
        )


def _abstract(run):
    return states.abstract_state(run.handle, run.optimizer, run.placement, with_ema=run.settings.optim.ema is not None)


def _dtype_name(run):
    return run.handle.merge(run.handle.shapes).dtype.name


class _Profile:
    """A profiler trace of a range of steps, written for TensorBoard's profile plugin and Perfetto."""

    def __init__(self, steps, directory):
        self.first, self.last = steps or (None, None)
        self.directory, self.is_on = directory / "profile", False

    def before(self, position):
        if position + 1 == self.first:
            jax.profiler.start_trace(self.directory)
            self.is_on = True

    def after(self, position, state):
        if self.is_on and position >= self.last:
            jax.block_until_ready(state)
            self.close()

    def close(self):
        if self.is_on:
            jax.profiler.stop_trace()
            self.is_on = False
            logging.info("profiler trace written to %s", self.directory)
