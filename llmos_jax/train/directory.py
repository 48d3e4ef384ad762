"""The run directory: whose it is, and whether its run has ended."""

import json
import pathlib

from llmos_jax.compute.host import write_whole
from llmos_jax.config import differences, to_json, to_plain
from llmos_jax.errors import RunDirectoryError
from llmos_jax.train.settings import IDENTITY

SETTINGS_FILE = "settings.json"
DONE_FILE = "DONE.json"
LOG_FILE = "log.txt"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
REPORT_FILE = "report.html"
# Of what decides whose a directory is: how it is computed, where it is kept, how it is watched. What lowers memory is here.
_MAY_CHANGE = (
    "task.",
    "data.cache_dir",
    "data.on_corrupt",
    "data.max_corrupt",
    "train.privacy.delta",
    "train.privacy.epsilon",
    "train.privacy.rows_at_once",
    "model.attention",
    "model.execution",
    "model.remat",
)
# What is read of saved settings without parsing them: others may be those of another release.
_SAVED = ("model.name", "optim.ema", "train.batch_size")
_MISSING = object()


def log_file(process):
    """Returns the name of a process's log: log.txt for the first, log-3.txt for number 3."""
    return LOG_FILE if process == 0 else f"log-{process}.txt"


def prepare_directory(directory):
    """Returns `directory` as a Path, made if missing; RunDirectoryError when it can't be a directory or be written."""
    directory = pathlib.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunDirectoryError(f"--workdir={directory} can't be used ({error.strerror}): name another directory.") from None
    return directory


def check(directory, settings):
    """Compares resolved settings with those of the run that a directory holds, if it holds one.

    A run may go on with another mesh, rhythm or length; RunDirectoryError names what else differs. One that took no step yet
    is nobody's: whoever was told to lower a size must be able to.
    """
    saved = read_settings(directory) if _has_begun(directory) else None
    if saved is not None:
        changed = _identity_differences(saved, _fitted(settings, saved))
        if changed:
            raise RunDirectoryError(
                f"{directory} holds another experiment ({'; '.join(changed[:5])}{'; ...' if len(changed) > 5 else ''}): "
                "name another --workdir, or restore those settings."
            )


def record(directory, settings, artifacts):
    """Writes the resolved settings and the task's files ({name: text}) into a run directory, the settings last.

    RunDirectoryError when there is no room for them.
    """
    for name, text in {**artifacts, SETTINGS_FILE: to_json(settings)}.items():
        try:
            write_whole(directory / name, text)
        except OSError as error:
            raise RunDirectoryError(
                f"{directory / name} could not be written ({error.strerror}): make room, or name another --workdir."
            ) from error


def _has_begun(directory):
    """Whether a run has left more in a directory than its settings."""
    metrics = directory / METRICS_FILE
    return any((directory / CHECKPOINTS).glob("*")) or (metrics.is_file() and metrics.stat().st_size > 0)


def read_settings(directory):
    """Returns the plain settings of a run directory, or None when it has none; RunDirectoryError when they are damaged."""
    file = pathlib.Path(directory) / SETTINGS_FILE
    saved = read_json(file)
    for path in _SAVED if saved is not None else ():
        node = saved
        for name in path.split("."):
            node = node.get(name, _MISSING) if isinstance(node, dict) else _MISSING
        if node is _MISSING:
            raise RunDirectoryError(f"{file} lacks {path}: restore it, or name another --workdir.")
    return saved


def read_json(file):
    """Returns the object of a JSON file, None when it is missing; RunDirectoryError when it can't be read or is damaged."""
    try:
        tree = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunDirectoryError(f"{file} can't be read ({error.strerror}): mend that, or name another --workdir.") from None
    except ValueError as error:
        raise RunDirectoryError(f"{file} is not JSON ({error}): restore it, or name another --workdir.") from None
    if not isinstance(tree, dict):
        raise RunDirectoryError(f"{file} holds {json.dumps(tree)[:40]}, not an object: restore it, or name another --workdir.")
    return tree


def finished(directory, settings):
    """Returns the summary of a run that has ended and that `settings` don't prolong, else None."""
    summary, saved = read_json(directory / DONE_FILE), read_settings(directory)
    if summary is None or saved is None:
        return None
    for name in ("step", "elapsed_seconds"):
        if not isinstance(summary.get(name), (int, float)):
            file = directory / DONE_FILE
            raise RunDirectoryError(f"{file} has {name}={summary.get(name)!r}, not a number: remove it, and start again.")
    if _identity_differences(saved, _fitted(settings, saved)):
        return None
    train = settings.train
    is_past_steps = train.steps is not None and summary["step"] >= train.steps
    is_past_clock = train.max_seconds is not None and summary["elapsed_seconds"] >= train.max_seconds
    return summary if is_past_steps or is_past_clock else None


def mark_done(directory, summary):
    """Writes the marker of a run that has ended, with its summary."""
    write_whole(directory / DONE_FILE, json.dumps(summary, indent=2) + "\n")


def _fitted(settings, saved):
    """Returns plain settings; what follows from others once data are there is what it became in the saved ones."""
    asked = to_plain(settings)
    if asked["model"].get("vocab_size") == 0:  # fitted to the tokenizer
        asked["model"]["vocab_size"] = saved["model"].get("vocab_size")
    if asked["train"]["privacy"] and asked["train"]["privacy"]["noise_multiplier"] is None:  # follows from the budget
        asked["train"]["privacy"]["noise_multiplier"] = (saved["train"].get("privacy") or {}).get("noise_multiplier")
    return asked


def _identity_differences(saved, asked):
    changed = [line for key in IDENTITY for line in differences(saved.get(key), asked.get(key), key)]
    changed += differences(saved["train"].get("privacy"), asked["train"]["privacy"], "train.privacy")
    changed = [line for line in changed if not line.startswith(_MAY_CHANGE)]
    # Part of the data's position: found out by the checkpoint only after the settings here were written.
    rows = [tree["train"]["batch_size"] for tree in (saved, asked)]
    return changed + differences(*rows, "train.batch_size")
