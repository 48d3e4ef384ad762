"""From sources to a clean dataset folder: what is done in which order, whoever runs the tasks.

    hash files -> read groups of files into shards -> stages of steps -> write

A global step begins a stage. What it looks at was emitted by the last stage before it that read texts, and lies between them
as reduce (each range of hashes) -> finish (once).

Every task's result is kept under a name that tells its inputs, so that going on after a kill, new files, and other
thresholds are the same thing: only what is not there is done.
"""

import collections
import contextlib
import dataclasses
import pathlib
import time

from llmos_jax.compute import host
from llmos_jax.config import fingerprint, setting, to_plain
from llmos_jax.data.clean import exchange, output, stage
from llmos_jax.data.clean.augment import AugmentConfig
from llmos_jax.data.clean.dataset import is_dataset, list_versions, note_needs, open_dataset, write_version
from llmos_jax.data.clean.objects import Objects, Task
from llmos_jax.data.clean.reading import (
    check_bad,
    count_passed_over,
    group_files,
    hash_task,
    read_task,
    shards_of,
    source_names,
)
from llmos_jax.data.clean.runner import ProcessRunner
from llmos_jax.data.clean.steps import Transform, check_order, parse_steps
from llmos_jax.data.sources import SourceConfig, list_files
from llmos_jax.errors import ConfigError, DataError

CACHE = "cache"


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What is cleaned, by which steps, and how the work is cut."""

    sources: tuple[SourceConfig, ...] = setting((SourceConfig(),), help="what to clean; of duplicates the first source's stays")
    steps: tuple = setting((), help="list of steps, each {step: NAME, setting: value, ...}", parser=parse_steps)
    augment: AugmentConfig = setting(AugmentConfig(copies=0), help="copies of documents with noise, or translated back")
    name: str = setting("dataset", help="name of the dataset")
    shard_bytes: int = setting(16 << 20, help="characters of text of a shard; a worker holds one at a time", at_least=1)
    max_document_bytes: int = setting(64 << 20, help="longest document that is read, bytes", at_least=1)
    on_corrupt: str = setting("skip", help="bad files and records: stop, or leave them out", choices=("error", "skip"))
    max_corrupt: int = setting(1000, help="bad files and records that may be left out", at_least=0)
    workers: int | None = setting(None, help="processes; none: one for each core", at_least=1)
    runner: str = setting(
        "processes", help="who runs the tasks: processes of this host, or Apache Beam", choices=("processes", "beam")
    )
    beam_options: tuple[str, ...] = setting((), help="Beam's own options, as --runner=FlinkRunner")

    def __post_init__(self):
        if not self.sources:
            raise ConfigError("sources is empty: name at least one.")
        check_order(self.steps)
        guards = _guards(self.steps)
        if guards and self.augment.is_active:
            raise ConfigError(
                f"augment changes copies of documents before {guards[0].name!r} looks at them, and what it leaves of personal "
                "data may not be known as such any more: prepare without augment, then augment the dataset that comes out."
            )
        names = source_names(self.sources)
        unknown = [name for name in self.augment.sources if name not in names]
        if unknown:
            raise ConfigError(f"augment.sources has {unknown[0]!r}; the sources are {', '.join(names)}.")


def prepare_dataset(config, directory, *, log=print):
    """Cleans the sources of a PrepareConfig into a dataset folder; returns its newest version, a `dataset.Version`.

    What was done before, by this or another version of the settings, is not done again. Raises ConfigError and DataError,
    naming files and records; after either, and after being killed, the same call goes on.
    """
    start = time.perf_counter()
    _check_apart(config, directory)
    list_versions(directory)  # what is there must be of this release: said before the work, not after it
    objects = Objects(directory / CACHE)
    objects.remove_leftovers()
    notes = {step.name: step.notes() for step in config.steps}
    cut_before = _cut_before(config)
    for line in cut_before:
        log(f"WARNING: {line}")
    for guard in _guards(config.steps) if cut_before else ():
        notes[guard.name] = notes[guard.name] | {"cut_before": cut_before}
    with make_runner(config, objects.root) as pool:
        runner = _Noting(pool)
        shards, names, inputs = _read(config, objects, runner, log)
        plan = _Plan(config, objects, runner, shards, names, log)
        stages = _stages(config.steps)
        for steps, following in zip(stages, _emitted_by(stages), strict=True):
            plan.run(steps, following)
        outputs = plan.write(config.steps)
    notes = {name: note for name, note in notes.items() if note}
    version = write_version(directory, config, inputs, plan.funnel, outputs, notes)
    note_needs(objects, version, runner.used)
    log(f"{version.directory}: ready after {time.perf_counter() - start:.1f} s")
    return version


def _check_apart(config, directory):
    """Raises ConfigError for a dataset folder inside a source: the next run would read what this one wrote."""
    for source in config.sources:
        folder = pathlib.Path(source.path)
        if folder.is_dir() and directory.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"the dataset folder {directory} lies in the source {source.path}, which would be read with all that it "
                "holds: name a folder beside it (--workdir)."
            )


def _cut_before(config):
    """Returns a line for each source that is a dataset from which a step cut before any step that protects looked at it."""
    guards, lines = _guards(config.steps), []
    for path in [source.path.partition("#")[0] for source in config.sources] if guards else ():
        if not is_dataset(path):
            continue
        for step in parse_steps(open_dataset(path).manifest["settings"]["steps"], f"steps of {path}"):
            if getattr(step, "protect", None):
                break
            if isinstance(step, Transform) and step.cuts:
                lines.append(
                    f"{step.name!r} cut texts of the dataset {path} before {guards[0].name!r} looked at them: what it left "
                    f"of personal data may not be known as such. Prepare {path} again with {guards[0].name!r} before that."
                )
                break
    return lines


def make_runner(config, root):
    """Returns the runner that the settings name, a context manager with `run(tasks, label)`."""
    if config.runner == "beam":
        from llmos_jax.data.clean.beam import BeamRunner

        return BeamRunner(root, config.beam_options, config.workers or host.cores())
    return ProcessRunner(root, config.workers or host.cores())


class _Noting:
    """A runner that notes all results of tasks and their objects."""

    def __init__(self, runner):
        self._runner, self.used = runner, set()

    def run(self, tasks, label):
        """Returns the results of `tasks` in their order."""
        results = self._runner.run(tasks, label)
        for task, result in zip(tasks, results, strict=True):
            self.used.update([task.result, *result["objects"]])
        return results


def _read(config, objects, runner, log):
    """Returns (Shards, source names, what the manifest says of the inputs)."""
    names = source_names(config.sources)
    listed = [list_files(source) for source in config.sources]
    groups = [(number, group) for number, files in enumerate(listed) for group in group_files(files, config.shard_bytes)]
    hashed = runner.run([hash_task(group) for _, group in groups], "hashing files")
    hashes = [result["hashes"] for result in hashed]
    tasks = [
        read_task(config.sources[number], names[number], group, contents, config)
        for (number, group), contents in zip(groups, hashes, strict=True)
    ]
    with _guarded_errors(config.steps):
        results = runner.run(tasks, "reading")
        bad, messages = check_bad(results, config)
    messages = _guarded(messages, config.steps)
    for message in messages[:3]:
        log(f"left out: {message}")
    if bad:
        log(f"{bad} files or records were bad and are left out (the manifest names them).")
    passed_over = _guarded_counts(count_passed_over(results), config.steps)
    for reason, count in passed_over.items():
        log(f"passed over: {count:,} {reason}")
    shards = shards_of(results, [number for number, _ in groups])
    if not shards:
        raise DataError(f"no source holds any text: {', '.join(source.path for source in config.sources)}.")
    rows = [
        [names[number], file.key, str(file), file.size_bytes, content]
        for (number, group), contents in zip(groups, hashes, strict=True)
        for file, content in zip(group, contents, strict=True)
    ]
    return shards, names, {"names": names, "files": rows, "bad": messages, "bad_count": bad, "passed_over": passed_over}


def _guarded(messages, steps):
    """Returns messages, which may quote what was read, without what steps `protect`: log and manifest are files, too."""
    for step in _guards(steps):
        messages = step.protect(list(messages))
    return messages


def _guarded_counts(counts, steps):
    guarded = collections.Counter()
    for message, count in zip(_guarded(counts, steps), counts.values(), strict=True):
        guarded[message] += count
    return dict(guarded)


@contextlib.contextmanager
def _guarded_errors(steps):
    """Guards the message of a DataError, which ends the log; what led to it quotes what was read as well, and is left out."""
    try:
        yield
    except DataError as error:
        if not _guards(steps):
            raise
        (message,) = _guarded([str(error)], steps)
        raise DataError(message) from None


def _guards(steps):
    return [step for step in steps if getattr(step, "protect", None)]


def _stages(steps):
    """Returns the steps in runs that one shard can go through alone: a global step begins the one that follows it."""
    stages = [[]]
    for step in steps:
        if step.is_global:
            stages.append([])
        stages[-1].append(step)
    return stages if len(stages) > 1 or stages[0] else []


def _emitted_by(stages):
    """Returns for each stage the global steps that it emits for: up to the next stage that reads texts."""
    following, last = [[] for _ in stages], 0
    for number, steps in enumerate(stages[1:], 1):
        following[last].append(steps[0])
        last = number if any(step.reads_texts for step in steps) else last
    return following


class _Plan:
    """The shards on their way through the stages."""

    def __init__(self, config, objects, runner, shards, names, log):
        self.objects, self.runner, self.shards, self.names, self.log = objects, runner, shards, names, log
        self.layers, self.states, self.guards = [[] for _ in shards], [None] * len(shards), []
        self.attributes, self.emitted = [[] for _ in shards], {}
        sizes = {"documents": sum(s.documents for s in shards), "utf8_bytes": sum(s.utf8_bytes for s in shards)}
        self.funnel = [{"step": "read", "documents_in": None, "utf8_bytes_in": None, "removed": {}} | sizes]

    def run(self, steps, following):
        """Takes all shards through a stage; it emits for the global steps `following`."""
        guards = self.guards if any(isinstance(step, Transform) for step in steps) else []
        trees = to_plain(steps)
        is_global = bool(steps) and steps[0].is_global
        findings = self._exchange(steps[0], trees[0]) if is_global else [None] * len(self.shards)
        digests = [found and stage.digest_of_findings(self.objects, *found) for found in findings]
        tasks = []
        for number, shard in enumerate(self.shards):
            arguments = {
                "shard": shard.name,
                "layers": self.layers[number],
                "state": self.states[number],
                "steps": trees,
                "findings": findings[number],
                "following": to_plain(following),
                "guards": to_plain(guards),
            }
            # Findings count by what they say of the shard, not by what all shards together gave.
            inputs = arguments | {"findings": digests[number]}
            key = fingerprint([inputs, [step.fingerprint for step in (*steps, *following, *guards)]])
            tasks.append(Task("stage", f"stages/{key}.json", arguments | {"key": key}, shard.utf8_bytes))
        self.guards = self.guards + _guards(steps)
        results = self.runner.run(tasks, ", ".join(step.name for step in steps) or "looking")
        for number, step in enumerate(following):
            self.emitted[step.name] = [result["emitted"][number] for result in results]
        for number, result in enumerate(results):
            self.layers[number], self.states[number] = result["layers"], result["state"]
            self.attributes[number] += result["attributes"]
        for entries in zip(*(result["funnel"] for result in results), strict=True):
            self.funnel.append(_add(entries))
            self.log(_line(self.funnel[-1]))

    def write(self, steps):
        """Writes what came out of every shard; returns its {kind: file, "source": name} in order."""
        tasks = []
        for number, shard in enumerate(self.shards):
            arguments = {
                "shard": shard.name,
                "source": self.names[shard.source],
                "layers": self.layers[number],
                "state": self.states[number],
                "attributes": self.attributes[number],
                "guards": to_plain(_guards(steps)),
            }
            key = fingerprint([arguments, [step.fingerprint for step in steps], output.VERSION])
            tasks.append(Task("write", f"output/{key}.json", arguments | {"key": key}, shard.utf8_bytes))
        results = self.runner.run(tasks, "writing")
        return [result | {"source": task.arguments["source"]} for result, task in zip(results, tasks, strict=True)]

    def _exchange(self, step, tree):
        """Returns [name, start, stop] of the findings of a global step for every shard."""
        emitted = self.emitted.pop(step.name)
        reducing = exchange.reduce_tasks(self.objects, self.shards, self.states, emitted, tree, step.fingerprint)
        reduced = self.runner.run(reducing, f"{step.name}: comparing")
        count = sum(shard.documents for shard in self.shards)
        (finished,) = self.runner.run([exchange.finish_task(reduced, tree, step.fingerprint, count)], f"{step.name}: joining")
        return [[finished["name"], shard.start, shard.start + shard.documents] for shard in self.shards]


def _add(entries):
    """Returns the sum of the funnel entries of one step over shards."""
    total = {"step": entries[0]["step"], "removed": {}}
    for name in ("documents_in", "utf8_bytes_in", "documents", "utf8_bytes"):
        total[name] = sum(entry[name] for entry in entries)
    for entry in entries:
        for reason, sizes in entry["removed"].items():
            old = total["removed"].get(reason, [0, 0])
            total["removed"][reason] = [a + b for a, b in zip(old, sizes, strict=True)]
    total["removed"] = dict(sorted(total["removed"].items()))
    return total


def _line(entry):
    """Returns one line on what a step left, and why the most went."""
    worst = sorted(entry["removed"].items(), key=lambda item: -item[1][0])[:3]
    why = "".join(f"; {reason} {count:,}" for reason, (count, _) in worst)
    share = entry["documents"] / entry["documents_in"] if entry["documents_in"] else 1.0
    return f"{entry['step']:>24}: {entry['documents']:,} documents ({share:.1%}), {entry['utf8_bytes'] / 1e6:,.1f} MB{why}"
