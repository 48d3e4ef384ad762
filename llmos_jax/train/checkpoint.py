"""Verified checkpoints: Orbax writes sharded arrays asynchronously; fingerprints decide whether they are trusted.

A step is one folder that appears whole or not at all. It holds one Orbax item per top-level key of the state (so that
parameters can be read alone) and a record of names, shapes, fingerprints and metadata. Damage is named, the step renamed
to `quarantine-STEP`, and the step before it tried; a mere mismatch with the settings is reported and nothing is touched.

With many processes each reads and writes its own shards of one folder that all share. Process 0 alone removes, renames and
writes the record; whether a save or a restore went well is agreed upon, so that all go on with the same step.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import time

import jax
from absl import logging

from llmos_jax.compute import distributed, host, memory
from llmos_jax.config import setting
from llmos_jax.errors import CheckpointError
from llmos_jax.train import damage
from llmos_jax.train.fingerprint import fingerprints
from llmos_jax.train.state import leaf_name

_RECORD = "record"
_FORMAT = 1
# Room that is left on the disk beside a save: logs, metrics, the file system's own needs.
_SPARE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int | None = setting(None, help="steps between saves; the end is always saved", at_least=1)
    every_seconds: float | None = setting(600.0, help="seconds between saves", above=0.0)
    keep: int = setting(2, help="newest steps that are kept", at_least=1)
    keep_every_steps: int | None = setting(None, help="steps divisible by this are kept for ever", at_least=1)
    is_async: bool = setting(True, help="write while training goes on")


class _Damaged(Exception):
    """A step whose content can't be trusted."""


class Checkpointer:
    """Saves and restores a state (nested dicts of arrays) in `directory`."""

    def __init__(self, directory, config, *, clock=time.monotonic):
        self.directory, self.config = pathlib.Path(directory).absolute(), config
        self._clock, self._saved_at = clock, clock()
        self._engine, self._reader, self._pending, self._verified, self._newest = None, None, None, None, None
        self.failures = 0

    def should_save(self, step, *, is_time_due=None):
        """Whether a save is due, by step or by time (`is_time_due`, by default what this process's clock says)."""
        if step == 0 or self.has(step):
            return False
        is_step = self.config.every_steps is not None and step % self.config.every_steps == 0
        return is_step or (self.is_time_due() if is_time_due is None else is_time_due)

    def is_time_due(self):
        """Whether a save is due by this process's clock."""
        return self.config.every_seconds is not None and self._clock() - self._saved_at >= self.config.every_seconds

    def steps(self):
        """Returns the complete steps, oldest first."""
        return _steps(self.directory)

    def has(self, step):
        """Whether `step` is the newest one that was restored, saved or is being saved."""
        return step == self._newest

    def save(self, step, tree, metadata):
        """Starts to save `tree` and JSON `metadata` as `step`; returns whether it was started.

        Returns when the arrays are copied off the devices (at once when the last save is written). A failure (disk full,
        folder gone) is logged as an error, counted in `failures` and leaves older steps as they are: training goes on.
        """
        self.poll(wait=True)
        self._saved_at = self._clock()
        refusal = distributed.from_first("save/room", lambda: self._refusal(tree))
        if refusal is not None:
            self._report(step, refusal)
            return False
        record = {
            "format": _FORMAT,
            "step": step,
            "leaves": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _named(tree).items()},
            "fingerprints": fingerprints(tree),
            "metadata": metadata,
        }
        record["digest"] = _digest(record)
        import orbax.checkpoint as ocp

        items = {key: ocp.args.PyTreeSave({key: value}) for key, value in tree.items()}
        failure = None
        try:
            self._open().save(
                self.directory / str(step), args=ocp.args.Composite(**items, **{_RECORD: ocp.args.JsonSave(record)})
            )
        except Exception as error:  # any failure to write must not end the training that it protects
            if distributed.is_peer_loss(error):
                raise
            failure = damage.first_line(error)
        failure = _agreed("save/started", failure)
        if failure is not None:
            self._report(step, failure)
            return False
        self._pending = self._newest = step
        if not self.config.is_async:
            self.poll(wait=True)
        return True

    def poll(self, *, wait=False):
        """Notes the end of the running save, and reports its failure; applies the keep rules after a success."""
        if self._pending is None or (not wait and distributed.count() > 1):
            return  # processes finish at different moments: what each has seen is agreed upon when all wait
        step, failure = self._pending, None
        try:
            if wait:
                self._engine.wait_until_finished()
            else:
                self._engine.check_for_errors()
        except Exception as error:  # see save
            failure = damage.first_line(error)
        is_there = distributed.from_first("save/there", lambda: step in self.steps())
        if failure is None and not is_there and not wait:
            return
        failure = _agreed("save/finished", failure)
        if failure is None and is_there:
            self._pending, self._verified = None, step
            self._prune()
        else:
            self._pending = None
            self._report(step, failure or "its folder is gone")

    def wait(self):
        """Waits for the running save."""
        self.poll(wait=True)

    def close(self):
        """Waits for the running save and lets go of Orbax's threads."""
        self.wait()
        self._drop_engine()

    def abandon(self):
        """Lets go of a running save without waiting for it: what it has written so far is removed at the next start."""
        self._abandoned, self._engine, self._reader, self._pending = self._engine, None, None, None

    def restore(self, step, abstract):
        """Returns (tree, metadata) of `step` placed as `abstract` (ShapeDtypeStructs with shardings) says.

        Raises CheckpointError: with a list of leaves when names, shapes or dtypes differ from `abstract`, or naming the
        damaged leaf when the content is not what was saved.
        """
        try:
            return self._restore(step, abstract)
        except _Damaged as error:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} is damaged: {error}.") from error

    def restore_latest_good(self, abstract):
        """Returns (step, tree, metadata) of the newest step that verifies, or None when there is no step at all.

        Damaged steps are named and renamed to `quarantine-STEP`. CheckpointError when steps exist and none is good (a run
        never silently starts from scratch), or when the machine fails to read one (permissions, open files): nothing is
        moved then, nor when a device runs out of memory, which JAX's own error says.
        """
        distributed.from_first("restore/clean", lambda: _remove_leftovers(self.directory))
        steps, has_quarantined = distributed.from_first("restore/steps", self._found)
        for step in reversed(steps):
            try:
                tree, metadata = self._restore(step, abstract)
            except _Damaged as error:
                target = distributed.from_first("restore/quarantine", lambda step=step: _quarantine(self.directory / str(step)))
                logging.error("checkpoint step %d is damaged (%s): moved to %s", step, error, target)
                self._drop_engine()
                continue
            self._verified = self._newest = step
            return step, tree, metadata
        if steps or has_quarantined:
            raise self._none_intact()
        return None

    def restore_part(self, abstract, *, key, step=None):
        """Returns one top-level part of a state (`key`, for example "params"): the newest good one, or that of `step`."""
        there, has_quarantined = distributed.from_first("restore/steps", self._found)
        if step is not None and step not in there:
            raise CheckpointError(f"{self.directory} has no step {step}; it has {', '.join(map(str, there)) or 'none'}.")
        for candidate in reversed(there if step is None else [step]):
            try:
                return self._restore(candidate, {key: abstract})[0][key]
            except _Damaged as error:
                if step is not None:
                    raise CheckpointError(f"checkpoint {self.directory / str(step)} is damaged: {error}.") from error
                logging.error("checkpoint step %d is damaged (%s): trying the one before", candidate, error)
        if there or has_quarantined:
            raise self._none_intact()
        raise CheckpointError(f"{self.directory} has no checkpoint yet: train it first.")

    def _found(self):
        """Returns [complete steps, whether damaged ones were moved away]."""
        return [self.steps(), any(self.directory.glob("quarantine-*"))]

    def _none_intact(self):
        return CheckpointError(
            f"no checkpoint in {self.directory} is intact (damaged ones are kept as quarantine-STEP): restore one from a "
            "backup, or start anew with another --workdir."
        )

    def _restore(self, step, abstract):
        folder, failure = self.directory / str(step), None
        try:
            tree, record = self._read(folder, abstract)
        except (_Damaged, CheckpointError) as error:
            failure = error
        # Another process may have met damage in its shards, where this one met none.
        told = distributed.exchange("restore/read", failure and [isinstance(failure, _Damaged), str(failure)])
        if failure is not None:
            raise failure
        for is_damage, message in filter(None, told):
            raise (_Damaged if is_damage else CheckpointError)(message)
        for name, value in fingerprints(tree).items():
            if record["fingerprints"][name] != value:
                raise _Damaged(f"leaf {name} has fingerprint {value:08x}, saved was {record['fingerprints'][name]:08x}")
        return tree, record["metadata"]

    def _read(self, folder, abstract):
        import orbax.checkpoint as ocp

        record = _read_record(folder)
        _compare(folder, record, _named(abstract), parts=tuple(abstract))
        items = {key: ocp.args.StandardRestore({key: value}) for key, value in abstract.items()}
        damage.hush_leftovers()
        try:
            restored = self._open_reader().restore(folder, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever Orbax and tensorstore raise on damaged files
            if memory.is_out_of_memory(error):
                raise
            damage.blame_machine(folder, error)
            raise _Damaged(damage.describe(error, record["leaves"])) from error
        return {key: restored[key][key] for key in abstract}, record

    def _open(self):
        if self._engine is None:
            import orbax.checkpoint as ocp

            # Devices with the same values write a share each where it is large: a program of its own cuts out each share.
            arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
            types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
            handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
            handlers.add(None, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(type_handler_registry=types))
            handlers.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
            self._engine = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(handler_registry=handlers))
        return self._engine

    def _open_reader(self):
        if self._reader is None:
            import orbax.checkpoint as ocp

            # Each process reads its shards by itself: one that meets damage must not leave the others waiting for it.
            alone = ocp.options.MultiprocessingOptions(distributed.index(), {distributed.index()}, "read")
            self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)
        return self._reader

    def _drop_engine(self):
        for engine in (self._engine, self._reader):
            if engine is not None:
                engine.close()
        self._engine, self._reader = None, None

    def _refusal(self, tree):
        """Returns why `tree` can't be saved now, or None."""
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + _SPARE_BYTES
        free = host.free_disk_bytes(self.directory)
        if free < need:
            return f"it needs {need / 2**20:.0f} MiB and {free / 2**20:.0f} are free: make room, or lower checkpoint.keep"
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            return damage.first_line(error)
        return None

    def _report(self, step, reason):
        self.failures += 1
        self._newest = None
        logging.error(
            "checkpoint step %d was NOT saved: %s. Training goes on; the next save is tried as planned.", step, reason
        )
        if self._engine is not None:  # after a failure Orbax's own state is not to be trusted
            try:
                if distributed.count() == 1:  # else it may wait for a process whose part has failed
                    self._engine.close()
            except Exception as later:  # the same failure, told again
                logging.debug("closing after a failed save: %s", later)
            self._engine = None

    def _prune(self):
        if distributed.index():
            return
        for step in _superfluous(self.steps(), self.config.keep, self.config.keep_every_steps):
            if step != self._verified:
                shutil.rmtree(self.directory / str(step), ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class CheckpointRow:
    """One step as the `checkpoint` verb shows it."""

    step: int
    size_bytes: int
    age_seconds: float
    is_good: bool
    message: str


def list_checkpoints(directory):
    """Returns a CheckpointRow per step, oldest first; the record is read, the arrays are not."""
    rows, directory = [], pathlib.Path(directory)
    for step in _steps(directory):
        folder = directory / str(step)
        try:
            is_good, message = True, f"{len(_read_record(folder)['leaves'])} arrays"
        except _Damaged as error:
            is_good, message = False, str(error)
        with contextlib.suppress(FileNotFoundError):  # a run that goes on has removed it meanwhile
            rows.append(_row(folder, step, is_good, message))
    for folder in sorted(directory.glob("quarantine-*")):
        rows.append(_row(folder, int(folder.name.split("-")[1]), False, f"quarantined as {folder.name}"))
    return rows


def verify_checkpoints(directory):
    """Returns a CheckpointRow per step after reading every array on one device and comparing fingerprints."""
    checkpointer, rows = Checkpointer(directory, CheckpointConfig()), []
    for step in checkpointer.steps():
        folder = checkpointer.directory / str(step)
        try:
            _verify(checkpointer, step)
            rows.append(_row(folder, step, True, "every array as it was saved"))
        except _Damaged as error:
            rows.append(_row(folder, step, False, str(error)))
    checkpointer.close()
    return rows


def collect_garbage(directory, *, keep):
    """Removes leftovers of unfinished saves, quarantined steps and all but the newest `keep` steps; returns their names.

    The newest step that verifies is never removed (every array of it is read). CheckpointError, with nothing but leftovers
    removed, when there are steps and none verifies.
    """
    directory = pathlib.Path(directory).absolute()
    removed = _remove_leftovers(directory)
    steps, quarantined = _steps(directory), sorted(directory.glob("quarantine-*"))
    good = _newest_good(directory, steps)
    if good is None and (steps or quarantined):
        raise CheckpointError(f"no checkpoint in {directory} is intact: what is there was left as it is.")
    superfluous = [directory / str(step) for step in _superfluous(steps, keep, None) if step != good]
    for folder in [*quarantined, *superfluous]:
        shutil.rmtree(folder)
        removed.append(folder.name)
    return removed


def _newest_good(directory, steps):
    """Returns the newest of `steps` whose arrays are what was saved, or None."""
    checkpointer = Checkpointer(directory, CheckpointConfig())
    try:
        for step in reversed(steps):
            try:
                _verify(checkpointer, step)
            except _Damaged as error:
                logging.error("checkpoint step %d is damaged (%s)", step, error)
            else:
                return step
        return None
    finally:
        checkpointer.close()


def _verify(checkpointer, step):
    """Reads every array of a step on one device; _Damaged when one is not what was saved."""
    where, abstract = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), {}
    for name, (shape, dtype) in _read_record(checkpointer.directory / str(step))["leaves"].items():
        *parents, last = name.split("/")
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=where)
    checkpointer._restore(step, abstract)


def format_rows(rows):
    """Returns CheckpointRows as a table."""
    lines = [f"{'step':>10} {'MiB':>10} {'age':>8}  state"]
    for row in rows:
        state = "ok     " if row.is_good else "DAMAGED"
        lines.append(f"{row.step:>10} {row.size_bytes / 2**20:>10.1f} {row.age_seconds / 60:>6.0f} m  {state} {row.message}")
    return "\n".join(lines)


def _row(folder, step, is_good, message):
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return CheckpointRow(step, size, time.time() - folder.stat().st_mtime, is_good, message)


def _steps(directory):
    """A step's folder is renamed into place when it is whole; an empty one is no step."""
    if not directory.is_dir():
        return []
    names = [entry for entry in directory.iterdir() if entry.name.isdigit() and entry.is_dir()]
    return sorted(int(entry.name) for entry in names if any(entry.iterdir()))


def _agreed(name, failure):
    """Returns the first failure that any process reports, or None: all act on it alike."""
    told = distributed.exchange(name, failure)
    return next((f"process {number}: {text}" if number else text for number, text in enumerate(told) if text), None)


def _superfluous(steps, keep, keep_every):
    kept = set(steps[-keep:]) | {step for step in steps if keep_every and step % keep_every == 0}
    return [step for step in steps if step not in kept]


def _remove_leftovers(directory):
    """Removes what a killed save left behind: temporary folders and empty steps."""
    removed = []
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        is_empty_step = entry.name.isdigit() and entry.is_dir() and not any(entry.iterdir())
        if ".orbax-checkpoint-tmp" in entry.name or is_empty_step:
            shutil.rmtree(entry)
            removed.append(entry.name)
    return removed


def _quarantine(folder):
    target, number = folder.with_name(f"quarantine-{folder.name}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"quarantine-{folder.name}-{number}")
    folder.rename(target)
    return target.name


def _read_record(folder):
    file = folder / _RECORD / "metadata"
    try:
        record = json.loads(file.read_text())
        digest = record.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        damage.blame_machine(folder, error)
        raise _Damaged(f"its record {file.name} can't be read: {damage.first_line(error)}") from error
    if _digest(record) != digest:
        raise _Damaged("its record was changed after it was written")
    if record["format"] != _FORMAT:
        raise CheckpointError(f"{folder} has format {record['format']}; this release reads {_FORMAT}.")
    return record


def _compare(folder, record, wanted, parts):
    """Raises CheckpointError with a diff when the leaves that are wanted are not those that are there."""
    there = {name: (tuple(s), d) for name, (s, d) in record["leaves"].items() if name.split("/")[0] in parts}
    asked = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in wanted.items()}
    lines = [f"{name} is missing" for name in sorted(set(asked) - set(there))]
    lines += [f"{name} is not expected" for name in sorted(set(there) - set(asked))]
    lines += [
        f"{name} is {there[name][1]}{list(there[name][0])}, expected {asked[name][1]}{list(asked[name][0])}"
        for name in sorted(set(asked) & set(there))
        if asked[name] != there[name]
    ]
    if lines:
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise CheckpointError(f"checkpoint {folder} does not fit these settings: {'; '.join(lines[:8])}{more}.")


def _named(tree):
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _digest(record):
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
