"""Flags, typed settings, one dispatch: `python -m llmos_jax.main [VERB] --config=experiments/NAME.py[:options]`."""

import json
import logging as python_logging
import os
import pathlib
import select
import sys
import time
import typing

from absl import flags, logging

from llmos_jax import api, errors
from llmos_jax.compute import distributed
from llmos_jax.config import Override, parse

_USAGE = """usage: llmos [VERB] [flags]

  train       --config=experiments/NAME.py[:option=value,flag] [--config.path.to.setting=value] [--workdir=DIR]
              (the verb when none is given; going on where the run directory stands)
  plan        --config=... --topology=v5p-1024 [--json=FILE]: what a step takes of a machine that need not be here
  prepare     --config=experiments/prepare.py:data=PATH --workdir=DIR: raw text to a clean dataset (going on where it stands)
  dataset     ls | verify | compare | gc | lookup | audit  --workdir=DIR [--version=N --keep=N --drop_cache]
              (lookup: --key=KEY, --text=TEXT, or --records=FOLDER --record=N for a training record)
  generate    --workdir=DIR --prompt=TEXT (repeatable) or --prompt_file=FILE (one prompt a line)
              [--max_tokens=N --temperature=T --top_k=K --top_p=P --seed=S --n=N --stop=TEXT --step=STEP]
  chat        --workdir=DIR [--system=TEXT, and what generate has to say how]: a conversation in the terminal (/help)
  evaluate    --workdir=DIR --text=FILE (perplexity, bits per byte) --choices=FILE.jsonl (multiple choice), both repeatable
              [--stride=N --step=STEP --json=FILE]
  convert     --from=hf:FOLDER --workdir=DIR: a checkpoint of transformers (or hf:OWNER/NAME) as a run directory
  convert     --to=hf:FOLDER --workdir=DIR [--step=STEP --dtype=float32|bfloat16|float16]: a run for transformers
  checkpoint  ls | verify | gc  --workdir=DIR [--keep=N]
"""
# What a shell says of a process that SIGPIPE ended.
_EXIT_NO_READER = 141


def main(argv=None):
    """Runs one command and returns its exit code: those of `errors`, or 141 when whoever read its output is gone."""
    try:
        code = _main(list(sys.argv if argv is None else argv))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        lost = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _has_lost_its_reader(stream)]
        if not lost:  # another pipe
            raise
        for stream in lost:  # the interpreter writes what is left when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return _EXIT_NO_READER


def _main(argv):
    launched = _launch_time()
    _log_plainly()
    try:
        words, values, overrides = _parse(argv)
        if values.help:
            print(_USAGE)
        else:
            _VERBS[words.pop(0) if words else "train"].run(words, values, overrides, launched)
    except errors.LlmosError as error:
        distributed.report(error)
        return _leave(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return _leave(130)
    except Exception as error:
        if distributed.count() == 1 and not os.environ.get(distributed.SUPERVISED):
            raise
        error = distributed.peer_lost(error) if distributed.is_peer_loss(error) else error
        distributed.report(error)
        return _leave(errors.exit_code(error))
    return _leave(errors.EXIT_DONE)


def _leave(code):
    """Returns `code`; in a run of many processes it ends this one with it, at once: nothing may wait for a lost peer."""
    if distributed.count() > 1:
        distributed.leave(code)
    return code


def _has_lost_its_reader(stream):
    poller = select.poll()
    poller.register(stream.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poller.poll(0))


def console():
    """Entry of the `llmos` console script."""
    sys.exit(main())


def _train(words, values, overrides, launched):
    _no_more(words)
    if not values.config:
        raise errors.ConfigError(f"--config is missing.\n\n{_USAGE}")
    settings, default_directory = api.load_settings(values.config, overrides)
    api.run_training(settings, values.workdir or default_directory, launched=launched, is_own_process=True)


def _plan(words, values, overrides, launched):
    from llmos_jax.compute import host, planner

    _no_more(words)
    if not values.config or not values.topology:
        raise errors.ConfigError(f"plan needs --config and --topology.\n\n{_USAGE}")
    report = api.plan(api.load_settings(values.config, overrides)[0], values.topology)
    if values.json:
        host.write_whole(pathlib.Path(values.json), planner.to_json(report))
    print(planner.format_report(report))


def _prepare(words, values, overrides, launched):
    _no_more(words)
    if not values.config:
        raise errors.ConfigError(f"--config is missing.\n\n{_USAGE}")
    settings, default_directory = api.load_prepare_settings(values.config, overrides)
    api.run_preparation(settings, values.workdir or default_directory)


def _dataset(words, values, overrides, launched):
    from llmos_jax.data.clean import dataset
    from llmos_jax.train.lease import RunDirectoryLease

    action = words.pop(0) if words else "ls"
    _no_more(words)
    directory = _workdir(values)
    version = dataset.open_dataset(directory, values.version)
    if action == "ls":
        print(dataset.format_versions(dataset.list_versions(directory) or [version]))
    elif action == "verify":
        damaged = dataset.verify(version)
        print("\n".join(damaged) or f"{version.directory} is whole")
        if damaged:
            raise errors.DataError(f"{len(damaged)} files of {version.directory} are damaged: prepare it again.")
    elif action == "compare":
        older = [other for other in dataset.list_versions(directory) if other.number < version.number]
        if not older:
            raise errors.ConfigError(f"{version.directory} is the oldest version: there is none to compare it with.")
        print("\n".join(dataset.compare(older[-1], version)) or "no difference")
    elif action == "gc":
        with RunDirectoryLease(directory):  # never under the feet of a preparation
            removed = dataset.collect_garbage(directory, keep=values.keep, drop_cache=values.drop_cache)
        print(f"removed {len(removed)} files and folders" if removed else "nothing to remove")
    elif action == "lookup":
        print("\n\n".join(map(dataset.format_place, _looked_up(version, values))) or "not found")
    elif action == "audit":
        from llmos_jax.data.clean import pii_audit

        print(pii_audit.format_audit(pii_audit.audit(version)))
    else:
        raise errors.ConfigError(f"dataset {action!r} is unknown; known: ls, verify, compare, gc, lookup, audit.")


def _looked_up(version, values):
    """Returns what the flags ask for: the places of a document, of a piece of text, or of all that a training record holds."""
    from llmos_jax.data.clean import dataset
    from llmos_jax.data.lineage import documents_of
    from llmos_jax.data.store import Store

    text = values.text[-1] if values.text else None
    asked = [values.key is not None, text is not None, values.records is not None]
    if sum(asked) != 1 or (values.records is None) != (values.record is None):
        raise errors.ConfigError("dataset lookup needs --key=KEY, --text=TEXT, or --records=FOLDER with --record=NUMBER.")
    if values.records is None:
        return list(dataset.lookup(version, key=values.key, text=text))
    store = Store(values.records)
    if not 0 <= values.record < store.count("train"):
        raise errors.ConfigError(f"--record={values.record}: {store.directory} has {store.count('train')} training records.")
    keys = documents_of(store.directory, "train", values.record, store.length)
    return [place for key in keys for place in dataset.lookup(version, key=key)]


def _generate(words, values, overrides, launched):
    _no_more(words)
    prompts = list(values.prompt)
    if values.prompt_file:
        try:
            prompts += pathlib.Path(values.prompt_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise errors.ConfigError(f"--prompt_file={values.prompt_file} can't be read: {error}.") from None
    if not prompts:
        raise errors.ConfigError("there is nothing to continue: give --prompt=TEXT or --prompt_file=FILE.")
    sampling = _sampling(values)
    model = api.load(_workdir(values), step=values.step)
    if len(prompts) == sampling.n == 1:  # stream
        print(prompts[0], end="", flush=True)
        model.generate(prompts, sampling, on_text=lambda row, text: print(text, end="", flush=True))
        print()
        return
    for prompt, found in zip(prompts, model.generate(prompts, sampling), strict=True):
        for done in found if sampling.n > 1 else (found,):
            print(f"{prompt}{done.text}\n---")


def _chat(words, values, overrides, launched):
    from llmos_jax.serve.chat import run_chat

    _no_more(words)
    sampling = _sampling(values)
    run_chat(api.load(_workdir(values), step=values.step), sampling, system=values.system)


def _evaluate(words, values, overrides, launched):
    from llmos_jax.compute import host
    from llmos_jax.evaluate import likelihood

    _no_more(words)
    files = likelihood.read_files(values.text, values.choices)
    figures = likelihood.measure_files(api.load(_workdir(values), step=values.step), files, values.stride)
    if values.json:
        host.write_whole(pathlib.Path(values.json), json.dumps(figures, indent=2) + "\n")
    print(likelihood.format_figures(figures))


def _convert(words, values, overrides, launched):
    _no_more(words)
    if bool(values["from"].value) == bool(values.to):
        raise errors.ConfigError(f"convert needs either --from=hf:FOLDER or --to=hf:FOLDER.\n\n{_USAGE}")
    named = values["from"].value or values.to
    if not named.startswith("hf:"):
        raise errors.ConfigError(f"convert reads and writes checkpoints of transformers: hf:{named}, not {named}.")
    if values.to:
        folder = pathlib.Path(named.removeprefix("hf:")).expanduser()
        api.export_checkpoint(_workdir(values), folder, step=values.step, dtype=values.dtype)
    else:
        api.import_checkpoint(named, _workdir(values))


def _checkpoint(words, values, overrides, launched):
    from llmos_jax.train import checkpoint
    from llmos_jax.train.directory import CHECKPOINTS
    from llmos_jax.train.lease import RunDirectoryLease

    action = words.pop(0) if words else "ls"
    _no_more(words)
    directory = _workdir(values) / CHECKPOINTS
    if not directory.is_dir():
        raise errors.CheckpointError(f"{directory.parent} has no checkpoints.")
    if action == "ls":
        print(checkpoint.format_rows(checkpoint.list_checkpoints(directory)))
    elif action == "verify":
        rows = checkpoint.verify_checkpoints(directory)
        print(checkpoint.format_rows(rows))
        damaged = [str(row.step) for row in rows if not row.is_good]
        if damaged:
            raise errors.CheckpointError(f"damaged: step {', '.join(damaged)}.")
    elif action == "gc":
        with RunDirectoryLease(directory.parent):  # never under the feet of a run
            removed = checkpoint.collect_garbage(directory, keep=values.keep)
        print("\n".join(f"removed {name}" for name in removed) or "nothing to remove")
    else:
        raise errors.ConfigError(f"checkpoint {action!r} is unknown; known: ls, verify, gc.")


class _Verb(typing.NamedTuple):
    """What runs a verb, and the flags that it takes: any other one would be a wish that nobody fulfils."""

    run: typing.Callable
    flags: tuple[str, ...]


_SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "seed", "n")
_VERBS = {
    "train": _Verb(_train, ("config", "workdir")),
    "plan": _Verb(_plan, ("config", "topology", "json")),
    "prepare": _Verb(_prepare, ("config", "workdir")),
    "dataset": _Verb(_dataset, ("workdir", "version", "keep", "drop_cache", "key", "text", "records", "record")),
    "generate": _Verb(_generate, ("workdir", "prompt", "prompt_file", "stop", "step", *_SAMPLING)),
    "chat": _Verb(_chat, ("workdir", "system", "stop", "step", *_SAMPLING)),
    "evaluate": _Verb(_evaluate, ("workdir", "text", "choices", "stride", "step", "json")),
    "convert": _Verb(_convert, ("workdir", "from", "to", "step", "dtype")),
    "checkpoint": _Verb(_checkpoint, ("workdir", "keep")),
}
# What a flag of another verb is called among the settings of a training.
_TRAINING = {"seed": "seed", "keep": "checkpoint.keep", "temperature": "task.temperature", "max_tokens": "task.sample_tokens"}


def _parse(argv):
    """Returns (words, flag values, overrides): `--config.a.b=value` flags are kept apart, typed later by their settings."""
    overrides, rest = [], []
    items = iter(argv[1:])
    for item in items:
        name, has_value, value = item.lstrip("-").partition("=")
        if item.startswith("--") and name.startswith("config."):
            if not has_value:
                value = next(items, None)
                if value is None:
                    raise errors.ConfigError(f"{item} needs a value: {item}=...")
            overrides.append((name.removeprefix("config."), value))
        else:
            rest.append(item)
    values = flags.FlagValues()
    text = dict(flag_values=values)
    flags.DEFINE_string("config", None, "experiments/NAME.py[:option=value,flag]", **text)
    flags.DEFINE_string("workdir", None, "run directory", **text)
    flags.DEFINE_string("topology", None, "machine to plan for, as v5p-1024 or v5p:8x8x8", **text)
    flags.DEFINE_string("json", None, "file for the figures of plan or evaluate", **text)
    flags.DEFINE_string("from", None, "checkpoint of transformers to convert, hf:FOLDER or hf:OWNER/NAME", **text)
    flags.DEFINE_string("to", None, "new folder for transformers, hf:FOLDER", **text)
    flags.DEFINE_string("dtype", None, "of the weights in the files that convert writes", **text)
    flags.DEFINE_multi_string("prompt", [], "text to continue (repeatable)", **text)
    flags.DEFINE_string("prompt_file", None, "file with one prompt a line", **text)
    for name in _SAMPLING:
        flags.DEFINE_string(name, None, "see serve.sample.SamplingConfig", **text)
    flags.DEFINE_string("system", None, "system message of a chat", **text)
    flags.DEFINE_multi_string("stop", [], "text that ends a continuation (repeatable)", **text)
    flags.DEFINE_integer("step", None, "checkpoint to load; none: the newest", **text)
    flags.DEFINE_integer("keep", 1, "newest checkpoints or versions that gc keeps", lower_bound=1, **text)
    flags.DEFINE_bool("drop_cache", False, "whether gc removes what kept versions were made from, with all raw text", **text)
    flags.DEFINE_integer("version", None, "version of a dataset; none: the newest", **text)
    flags.DEFINE_string("key", None, "key of a document to look up", **text)
    flags.DEFINE_multi_string("text", [], "file of text to evaluate on (repeatable); piece of text to look up", **text)
    flags.DEFINE_multi_string("choices", [], "jsonl file of multiple-choice questions (repeatable)", **text)
    flags.DEFINE_integer("stride", None, "tokens that a window scores of a text beyond the context", lower_bound=1, **text)
    flags.DEFINE_string("records", None, "folder of training records, to look up one of them", **text)
    flags.DEFINE_integer("record", None, "number of a training record to look up", **text)
    flags.DEFINE_bool("help", False, "show this", short_name="h", **text)
    try:
        words = values([argv[0], *rest])[1:]
    except flags.Error as error:
        raise errors.ConfigError(f"{error}\n\n{_USAGE}") from None
    if not values.help:
        _check_flags(words[0] if words else "train", values, overrides)
    return words, values, overrides


def _check_flags(verb, values, overrides):
    """Raises ConfigError on a verb that is none, on flags that it does not take, and on texts that are no UTF-8."""
    if verb not in _VERBS:
        raise errors.ConfigError(f"there is no verb {verb!r}; known: {', '.join(_VERBS)}.\n\n{_USAGE}")
    given = [(name, name) for name in values if values[name].present] + [(f"config.{path}", "config") for path, _ in overrides]
    for flag, name in given:
        if name in _VERBS[verb].flags:
            continue
        takers = ", ".join(other for other, known in _VERBS.items() if name in known.flags)
        instead = f"; set --config.{_TRAINING[name]}" if verb == "train" and name in _TRAINING else ""
        raise errors.ConfigError(f"--{flag} is no flag of {verb} (but of {takers}){instead}.")
    for name in ("prompt", "system", "stop", "key", "text"):  # paths may hold any bytes
        value = values[name].value
        for text in value if isinstance(value, list) else [value]:
            if text is not None and (verb, name) != ("evaluate", "text") and not _is_utf8(text):
                raise errors.ConfigError(f"--{name}={text!r} is not UTF-8: write it in that encoding.")


def _is_utf8(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sampling(values):
    from llmos_jax.serve.sample import SamplingConfig

    choices = {name: Override(values[name].value) for name in _SAMPLING if values[name].value is not None}
    return parse(SamplingConfig, choices | {"stop": tuple(values.stop)})


def _workdir(values):
    if not values.workdir:
        raise errors.ConfigError("--workdir is missing: name the run directory, for example --workdir=runs/gpt.")
    return pathlib.Path(values.workdir)


def _no_more(words):
    if words:
        raise errors.ConfigError(f"unexpected argument {words[0]!r}.\n\n{_USAGE}")


def _log_plainly():
    """One plain line per message, on standard error; times and levels go to the run directory's log file."""
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(message)s"))
    handler.addFilter(api.is_worth_reading)
    # Process 0 talks for all; the others' words are in their log files.
    handler.addFilter(lambda record: record.levelno >= python_logging.ERROR or distributed.index() == 0)


def _launch_time():
    """Returns when this process was launched, in `time.time()` seconds."""
    from llmos_jax.compute.host import process_age_seconds

    return time.time() - process_age_seconds()


if __name__ == "__main__":
    console()
