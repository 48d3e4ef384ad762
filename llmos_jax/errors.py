"""Every error that reaches a person: one class per kind of cause, each with the exit code of its process.

Exit codes are a contract with supervisors (`compute/distributed.py`): 0 done, 42 preempted (restart at once),
75 retryable (a peer was lost or is stuck), 65 data or checkpoint corrupt, 78 configuration error; the last two are
never restarted.
"""

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
