"""The public functions: what `main` dispatches to and notebooks call. They join the layers below, and add nothing."""

import contextlib
import dataclasses
import functools
import logging as python_logging
import pathlib
import re

from absl import logging

from llmos_jax import config
from llmos_jax.errors import CheckpointError, DataError, DataIdentityMismatch, RunDirectoryError


def load_settings(spec, overrides=()):
    """Returns (Settings, default run directory) of the experiment `NAME.py[:ARG]` with (path, text) overrides.

    Raises ConfigError naming any setting that is unknown, mistyped, out of range or contradictory.
    """
    from llmos_jax import convert
    from llmos_jax.train.settings import Settings

    tree, path, arg = config.load_experiment(spec)
    settings = config.parse(Settings, config.apply_overrides(tree, overrides))
    return convert.adopt(settings), default_directory(path, arg)


def load_prepare_settings(spec, overrides=()):
    """Returns (PrepareConfig, default dataset folder) of the experiment `NAME.py[:ARG]` with (path, text) overrides."""
    from llmos_jax.data.clean.pipeline import PrepareConfig

    tree, path, arg = config.load_experiment(spec)
    settings = config.parse(PrepareConfig, config.apply_overrides(tree, overrides))
    return settings, default_directory(path, arg)


def run_preparation(settings, directory):
    """Cleans the sources of a PrepareConfig into the dataset folder `directory`; returns its newest Version.

    Going on where it was stopped, by whatever. Raises RunDirectoryLocked when another process is preparing it, and what
    `data.clean.pipeline.prepare_dataset` does.
    """
    from llmos_jax.data.clean.pipeline import prepare_dataset
    from llmos_jax.evaluate.dataset_report import REPORT_FILE, write_dataset_report
    from llmos_jax.train.directory import prepare_directory
    from llmos_jax.train.lease import RunDirectoryLease

    directory = pathlib.Path(directory)
    prepare_directory(directory)
    with RunDirectoryLease(directory), _log_file(directory / "log.txt"):
        version = prepare_dataset(settings, directory, log=logging.info)
        report = version.directory / REPORT_FILE
        for leftover in version.directory.glob(f".{REPORT_FILE}.*"):  # of a process that was killed
            leftover.unlink()
        if not report.is_file():
            try:
                write_dataset_report(report, version)
            except OSError as error:
                reason = error.strerror or str(error)
                raise DataError(f"{report} could not be written ({reason}): make room, and start again.") from error
        logging.info("report: %s", report)
        return version


def default_directory(path, arg=""):
    """Returns the run directory of the experiment file `path` with options `arg`, when none is named."""
    slug = re.sub(r"[^A-Za-z0-9._=-]+", "_", arg).strip("_")
    return pathlib.Path("runs") / (f"{pathlib.Path(path).stem}-{slug}" if slug else pathlib.Path(path).stem)


def run_training(settings, directory, *, launched=None, is_own_process=False):
    """Trains as `settings` say in run directory `directory`, going on from where it stands; returns its summary.

    The summary is a dict: step, evaluation {metric: value}, baselines, goodput, seconds {category: seconds},
    throughput, elapsed_seconds. A finished run is not trained again. `launched`: `time.time()` of the process's start,
    to report the time to the first step. `is_own_process`: whether the watchdog may end the process (not a notebook's).

    With many processes (`compute/distributed.py`) all call it alike; process 0 writes metrics, report and the log of the
    run, every other one a log of its own. Raises RunDirectoryLocked when another run writes there, RunDirectoryError when
    it holds another experiment, Preempted (state saved) on SIGTERM or Ctrl-C, PeerLost when a process of the run is gone,
    and what else `llmos_jax.errors` lists.
    """
    from llmos_jax.compute import distributed
    from llmos_jax.compute.watchdog import Watchdog
    from llmos_jax.train import directory as run_directory
    from llmos_jax.train.preemption import Preemption

    directory, first = pathlib.Path(directory), distributed.from_first
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(Preemption())
        is_many = distributed.start(settings.distributed)
        watchdog = Watchdog(
            settings.watchdog,
            directory / run_directory.log_file(distributed.index()),
            heartbeat_seconds=settings.distributed.heartbeat_seconds,
            is_hard=is_own_process or is_many,
        )
        stack.enter_context(watchdog)
        distributed.check_same(settings)
        first("directory", lambda: run_directory.prepare_directory(directory) and None)
        distributed.check_shared(directory)
        stack.enter_context(_sole_writer(directory))
        stack.enter_context(_log_file(directory / run_directory.log_file(distributed.index())))
        summary = first("finished", lambda: run_directory.finished(directory, settings))
        if summary is None:
            return _run_training(settings, directory, launched, watchdog, preemption)
        logging.info("%s is finished: %s.", directory, headline(summary))
        logging.info("To go on, raise train.steps (or train.max_seconds); to start anew, name another --workdir.")
        return summary


def plan(settings, topology):
    """Returns the `compute.planner.Report` of the training step of `settings`, compiled for a machine that need not be here.

    `topology`: its name, as in `compute.topology.topology_devices`. No data is read and nothing is allocated: the batch is
    known by its shape, the vocabulary by the model's settings or the tokenizer's. Needs the machine's compiler (libtpu).

    Raises ConfigError on a mesh or batch that the machine can't run, DeviceMemoryError on a step that does not fit.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left to those who use it
    from llmos_jax.compute import xla
    from llmos_jax.compute.planner import make_report
    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.compute.topology import topology_devices
    from llmos_jax.train import compile as step_compile
    from llmos_jax.train import optim
    from llmos_jax.train.settings import check_batch
    from llmos_jax.train.state import describe_model

    placement = make_placement(settings.mesh, topology_devices(topology))
    task_unit = config.unit("llmos_jax.tasks", settings.task.name)
    task = task_unit.outline(settings.task, model=settings.model, data=settings.data)
    settings = dataclasses.replace(settings, model=task.model_config)
    handle = describe_model(lambda *, rngs: task.model(placement, rngs=rngs), placement)
    check_batch(settings, placement)
    optimizer = optim.make_optimizer(settings.optim, handle.infos)
    traced, _ = step_compile.trace_step(settings, task, handle, optimizer, placement)
    slices = settings.train.microbatches
    if placement.pipeline and placement.pipeline.schedule == "1f1b":  # the others join their microbatches before the head
        slices *= placement.pipeline.microbatches
    rows = settings.train.batch_size // slices
    wholes, unchecked = step_compile.whole_arrays(handle, placement, rows, task.tokens_per_row)
    return make_report(
        traced,
        placement.mesh,
        model_flops=task.flops_per_token * task.tokens_per_row * settings.train.batch_size,
        wholes=wholes,
        unchecked=unchecked,
        bubble=placement.pipeline.bubble if placement.pipeline else 0.0,
        compiler_options=xla.compiler_options(placement.mesh.devices.flat[0], settings.train.compiler_options),
    )


def load(directory, *, step=None, mesh=None, dtype=None):
    """Returns the LanguageModel of a run directory: its newest verified checkpoint, or that of `step`.

    Or of a checkpoint of transformers, `hf:FOLDER` or `hf:OWNER/NAME`; its weights become `dtype`: as they are in its files on
    accelerators, float32 on CPU, unless given. mesh: a MeshConfig; none: every device has all parameters.

    Raises RunDirectoryError when the directory holds no run, CheckpointError when no checkpoint is intact, and what
    `interop.huggingface` says of a checkpoint that can't be read.
    """
    from llmos_jax import convert
    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.data.tokenizer import load_tokenizer
    from llmos_jax.interop import huggingface
    from llmos_jax.serve.generate import Generator
    from llmos_jax.serve.model import LanguageModel
    from llmos_jax.train import directory as run_directory
    from llmos_jax.train.settings import Settings, TrainConfig
    from llmos_jax.train.state import describe_model, in_stored_order

    if huggingface.is_source(directory):
        prepare_platform(TrainConfig())
        settings, handle, params, tokenizer = convert.load_model(directory, mesh, dtype)
        params = in_stored_order(params, handle)
        family = config.unit("llmos_jax.models", settings.model.name)
        return LanguageModel(settings, params, Generator(handle, family, settings.model, tokenizer, handle.placement))
    directory = pathlib.Path(directory)
    saved = run_directory.read_settings(directory)
    if saved is None:
        raise RunDirectoryError(f"--workdir={directory} holds no run: there is no {run_directory.SETTINGS_FILE}.")
    settings = config.parse(Settings, saved)
    prepare_platform(settings.train)
    placement = make_placement(mesh)
    family = config.unit("llmos_jax.models", settings.model.name)
    model = dataclasses.replace(settings.model, expert_capacity=None)  # what it drops depends on tokens yet to come
    handle = describe_model(functools.partial(family.build, model, placement), placement)
    key = "params" if settings.optim.ema is None else "ema"
    params = in_stored_order(_restore_params(directory, handle.abstract, step=step, key=key), handle)
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    return LanguageModel(settings, params, Generator(handle, family, settings.model, tokenizer, placement))


def import_checkpoint(source, directory):
    """Writes a checkpoint of transformers (`hf:FOLDER`, `hf:OWNER/NAME`) as a new run directory (see `convert`)."""
    from llmos_jax import convert
    from llmos_jax.train import directory as run_directory
    from llmos_jax.train.settings import TrainConfig

    prepare_platform(TrainConfig())
    is_new = not pathlib.Path(directory).exists()
    directory = run_directory.prepare_directory(directory)
    try:
        with _sole_writer(directory):
            convert.import_checkpoint(source, directory)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # what was written stays
                directory.rmdir()
        raise


def export_checkpoint(directory, folder, *, step=None, dtype=None):
    """Writes the model of a run directory for transformers (see `convert`): of its newest good checkpoint, or of `step`.

    The run may go on meanwhile: nothing of it is written.
    """
    from llmos_jax import convert
    from llmos_jax.train.settings import TrainConfig

    def restore(settings, abstract):
        return _restore_params(directory, abstract, step=step, key="params" if settings.optim.ema is None else "ema")

    prepare_platform(TrainConfig())
    convert.export_checkpoint(directory, folder, restore, dtype=dtype)


def headline(summary):
    """Returns one line on a run's summary: its validation figures and the baselines they are held against."""
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in summary["evaluation"].items())
    against = "".join(f"; {name} {value:.4f}" for name, value in summary["baselines"].items())
    return f"step {summary['step']}, {figures}{against}"


def is_worth_reading(record):
    """Whether a log record is the project's own, or a library's warning: libraries tell everything they do as INFO."""
    return record.levelno >= python_logging.WARNING or pathlib.Path(__file__).parent in pathlib.Path(record.pathname).parents


def prepare_platform(train):
    """Applies what must be set before JAX makes its first array: heap (by a TrainConfig), dispatch, compile cache.

    Raises ConfigError when JAX would compute on the CPU beside an accelerator that it has no support for.
    """
    import jax

    from llmos_jax.compute import devices, host

    # Steps then run on the calling thread, whose heap is the one that is kept, one step's temporaries at a time: they are
    # reused, never faulted in again. It counts only before the CPU backend starts, so before a device is asked for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_compilation_cache_dir", str(host.cache_directory("compile")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if jax.default_backend() == "cpu":
        devices.refuse_idle_accelerator()
        has_kept_heap = train.keep_heap and host.keep_heap()
        logging.info("freed memory is kept for reuse: %s", has_kept_heap)


@contextlib.contextmanager
def _sole_writer(directory):
    """Holds the run directory's lease: process 0 does, for all."""
    from llmos_jax.compute import distributed
    from llmos_jax.train.lease import RunDirectoryLease

    lease = RunDirectoryLease(directory)
    distributed.from_first("lease", lambda: lease.__enter__() and None)
    try:
        yield
    finally:
        if distributed.index() == 0:
            lease.__exit__(None, None, None)


def _run_training(settings, directory, launched, watchdog, preemption):
    from llmos_jax.compute import devices, distributed
    from llmos_jax.compute.sharding import make_placement
    from llmos_jax.data.prepare import records_directory
    from llmos_jax.evaluate.evaluator import make_evaluator
    from llmos_jax.train import directory as run_directory
    from llmos_jax.train import loop, privacy
    from llmos_jax.train.settings import check_batch, check_positions

    prepare_platform(settings.train)
    distributed.check_count()
    placement = make_placement(settings.mesh)
    if settings.train.privacy is None:
        check_batch(settings, placement)  # what can't be cut is said before the data are prepared
    check_positions(settings)
    distributed.from_first("check", lambda: run_directory.check(directory, settings))
    build = functools.partial(
        config.unit("llmos_jax.tasks", settings.task.name).build,
        settings.task,
        model=settings.model,
        data=settings.data,
        batch_size=settings.train.batch_size,
        seed=settings.seed,
        log=logging.info,
    )
    watchdog.mark("prepare")  # takes as long as the data does
    task = distributed.leaders_first(records_directory(settings.data), build)
    watchdog.mark("init")
    settings = dataclasses.replace(settings, model=task.model_config)
    trained = task  # with privacy, batches are drawn otherwise than those of evaluations
    if settings.train.privacy is not None:
        settings, trained = privacy.make_private(settings, task, placement)
    distributed.check_same(settings, data=trained.identity)
    distributed.from_first("check fitted", lambda: run_directory.check(directory, settings))
    machine = devices.describe_devices(placement.mesh.devices.flat)
    tokens = settings.train.batch_size * task.tokens_per_row
    logging.info("%s on %s, mesh %s", settings.name, machine, dict(placement.mesh.shape))
    logging.info("%s parameters; a step is %s tokens, %.3g FLOPs", f"{task.parameter_count:,}", f"{tokens:,}",
                 task.flops_per_token * tokens)  # fmt: skip
    result = loop.train(
        settings,
        trained,
        placement,
        directory,
        evaluate=lambda handle: make_evaluator(task, handle, placement),
        sample=lambda handle: _sampler(task, settings, handle, placement),
        watchdog=watchdog,
        preemption=preemption,
        initial_params=settings.train.init_from and functools.partial(_warm_start, settings, task.artifacts),
        launched=launched,
    )
    summary = dataclasses.asdict(result) | {"baselines": dict(task.baselines), "machine": machine}
    logging.info("%s", headline(summary))
    if settings.train.privacy is not None:
        summary["privacy"] = privacy.spent(settings, privacy.sampling_probability(settings, task), result.step)
        logging.info("%s", privacy.describe(summary["privacy"]))
    if distributed.index():
        return summary
    _report(settings, task, directory, summary)
    run_directory.mark_done(directory, summary)  # the last thing: until it stands, the same command does what is missing
    return summary


def _report(settings, task, directory, summary):
    """Writes the run's page; a disk that has no room for it is told of, and takes nothing else with it."""
    from llmos_jax.evaluate.report import write_report
    from llmos_jax.train import directory as run_directory
    from llmos_jax.train.metrics import read_metrics

    report = directory / run_directory.REPORT_FILE
    try:
        write_report(
            report,
            title=f"{settings.name}: {task.parameter_count:,} parameters on {summary['machine']}",
            settings=config.to_plain(settings),
            metrics=read_metrics(directory / run_directory.METRICS_FILE),
            summary=summary,
        )
    except OSError as error:
        logging.error("report %s could not be written (%s); the checkpoint and the metrics are whole.", report, error.strerror)
        return
    logging.info("report: %s", report)


def _sampler(task, settings, handle, placement):
    """Returns `sample(params) -> [{"prompt", "text"}]` for the samples that are shown while training."""
    from llmos_jax.serve.generate import Generator
    from llmos_jax.serve.sample import SamplingConfig

    family = config.unit("llmos_jax.models", settings.model.name)
    generator = Generator(handle, family, settings.model, task.tokenizer, placement)
    sampling = SamplingConfig(max_tokens=task.sample_tokens, temperature=task.temperature, seed=settings.seed)

    def sample(params):
        texts = generator.generate(params, task.prompts, sampling)
        generator.release()  # training goes on: it needs the memory
        return [{"prompt": prompt, "text": done.text} for prompt, done in zip(task.prompts, texts, strict=True)]

    return sample


def _warm_start(settings, artifacts, abstract):
    """Returns the parameters of the run that `train.init_from` names, placed as this run's.

    Raises DataIdentityMismatch when that run's tokenizer is another one: its embeddings would mean other texts.
    """
    from llmos_jax import convert
    from llmos_jax.interop import huggingface
    from llmos_jax.train import directory as run_directory

    if huggingface.is_source(settings.train.init_from):
        return convert.warm_start(settings, artifacts, abstract)
    source = pathlib.Path(settings.train.init_from)
    saved = run_directory.read_settings(source)
    if saved is None:
        raise RunDirectoryError(f"train.init_from={source} is no run directory: it has no {run_directory.SETTINGS_FILE}.")
    for name, text in artifacts.items():
        if not (source / name).is_file() or (source / name).read_text("utf-8") != text:
            raise DataIdentityMismatch(
                f"train.init_from={source} has another {name} than this run: take the same data.tokenizer, or another run."
            )
    logging.info("warm start from %s", source)
    return _restore_params(source, abstract, key="params" if saved["optim"]["ema"] is None else "ema")


def _restore_params(directory, abstract, *, step=None, key="params"):
    from llmos_jax.compute import memory
    from llmos_jax.train.checkpoint import CheckpointConfig, Checkpointer
    from llmos_jax.train.directory import CHECKPOINTS

    checkpoints = pathlib.Path(directory) / CHECKPOINTS
    if not checkpoints.is_dir():
        raise CheckpointError(f"{directory} has no checkpoint yet: train it first.")
    checkpointer = Checkpointer(checkpoints, CheckpointConfig())
    try:
        weights, advice = memory.bytes_per_device(abstract), "lay the weights over more devices (mesh.model, mesh.pipeline)"
        with memory.explained("while weights were loaded", lambda: {"weights": weights}, advice):
            return checkpointer.restore_part(abstract, key=key, step=step)
    finally:
        checkpointer.close()


@contextlib.contextmanager
def _log_file(path):
    """Adds everything that is logged, and the trace of an error that ends the run, to a file of the run directory."""
    handler = python_logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(is_worth_reading)
    handler.handleError = lambda record: None  # on a full disk: what ends the run is said on standard error, too
    logger = logging.get_absl_logger()
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        trace = (type(error), error, error.__traceback__)
        handler.handle(logger.makeRecord("llmos", python_logging.ERROR, "", 0, "the run ended with an error", (), trace))
        raise
    finally:
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
