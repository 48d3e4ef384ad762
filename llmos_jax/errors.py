"""Every error that reaches a person: one class per kind of cause, each with the exit code of its process.

Exit codes are a contract with supervisors (`scripts/launch.py`): 0 done, 42 preempted (restart at once),
75 retryable (a peer was lost or is stuck), 65 data or checkpoint corrupt, 78 configuration error; the last two are
never restarted.
"""

import pathlib
import traceback

EXIT_DONE = 0
EXIT_PREEMPTED = 42
EXIT_CORRUPT = 65
EXIT_RETRYABLE = 75
EXIT_CONFIG = 78


class LlmosError(Exception):
    """An error whose message is one clear sentence for the user; it ends the process with `exit_code`."""

    exit_code = 1


class ConfigError(LlmosError):
    """A setting, or a combination of settings, that can't work; the message says what to change."""

    exit_code = EXIT_CONFIG


class RunDirectoryError(ConfigError):
    """A run directory that belongs to another experiment or can't be used."""


class RunDirectoryLocked(RunDirectoryError):
    """Another live process is writing to this run directory."""


class DeviceMemoryError(ConfigError):
    """The step does not fit in the memory of a device; the message says what takes it and what lowers it."""


class DataError(LlmosError):
    """Input files or prepared records that are missing, unreadable or damaged; the message names the file."""

    exit_code = EXIT_CORRUPT


class DataIdentityMismatch(DataError):
    """Prepared data, tokenizer or position that do not belong together; the message shows both sides."""


class CheckpointError(LlmosError):
    """A checkpoint that is missing, incomplete, damaged or of another shape; the message names step and leaf."""

    exit_code = EXIT_CORRUPT


class TrainingDiverged(LlmosError):
    """Too many steps in a row had a non-finite or exploding loss or gradient."""

    exit_code = EXIT_CORRUPT


class Preempted(LlmosError):
    """The process was asked to stop (SIGTERM or Ctrl-C); its state is saved."""

    exit_code = EXIT_PREEMPTED


class PeerLost(LlmosError):
    """Another process of the run is gone, frozen or unreachable: all are restarted and go on from the last checkpoint."""

    exit_code = EXIT_RETRYABLE


class Stuck(LlmosError):
    """A phase of the run made no progress within its limit; the message names phase, step and the process behind."""

    exit_code = EXIT_RETRYABLE


class ReplicaMismatch(LlmosError):
    """Copies of a parameter that must be equal differ; the message names leaf and device."""

    exit_code = EXIT_RETRYABLE


_WHAT_TO_DO = {
    EXIT_PREEMPTED: "start all processes again: they go on where they stopped",
    EXIT_CORRUPT: "mend what the message names; starting again does not help",
    EXIT_RETRYABLE: "start all processes again: they go on from the last checkpoint",
    EXIT_CONFIG: "change the setting that the message names; starting again does not help",
}


def describe(error, *, process=0):
    """Returns an error as supervisors read it: a flat dict of JSON values, for one line.

    class, what (the message's first line), where (innermost line of this package that raised it, or ""), what_to_do,
    exit_code, process.
    """
    code = exit_code(error)
    package = pathlib.Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if package in pathlib.Path(f.filename).parents]
    lines = [line for line in str(error).splitlines() if line.strip()]
    return {
        "class": type(error).__name__,
        "what": lines[0] if lines else "",
        "where": f"{pathlib.Path(frames[-1].filename).relative_to(package.parent)}:{frames[-1].lineno}" if frames else "",
        "what_to_do": _WHAT_TO_DO.get(code, "read the log file of this process in the run directory"),
        "exit_code": code,
        "process": process,
    }


def exit_code(error):
    """Returns the exit code of a process that an error ends: its own, or 1 for one that nobody foresaw."""
    return error.exit_code if isinstance(error, LlmosError) else 1
