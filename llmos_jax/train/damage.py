"""What a failed read of a checkpoint means: whose failure it is, one line that names the leaf, and silence about the rest."""

import errno
import logging
import os
import re
import sys
import traceback

from llmos_jax.errors import CheckpointError

# Part of the path of every module of Orbax.
_ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"
# What asyncio's log says of a read that nobody waits for: who defines it, or what tensorstore said to it.
_MARKS = (_ORBAX, "OCDBT database", "tensorstore_spec")
_LONGEST = 300
# A read that fails for these says nothing about the checkpoint: it is neither blamed nor moved.
_MACHINE_ERRORS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def causes(error):
    """Returns an exception and those that led to it, the first one last: tensorstore's own is wrapped by Orbax."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def first_line(error):
    """Returns an exception as one line: its type and the first line of its text."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:_LONGEST] if lines else 'no message'}"


def blame_machine(folder, error):
    """Raises CheckpointError when a failed read is the machine's failure, not the checkpoint's."""
    # Tensorstore's errors carry the system's words only.
    words = [os.strerror(code) for code in _MACHINE_ERRORS]
    for cause in causes(error):
        if isinstance(cause, MemoryError) or any(word in str(cause) for word in words):
            reason = first_line(cause)
            raise CheckpointError(f"checkpoint {folder} can't be read now ({reason}): mend that, and try again.") from error


def describe(error, leaves):
    """Returns one line on a failed read: which of `leaves` (names of arrays) it met, if it tells, and why in short."""
    found = causes(error)
    leaf = next(filter(None, (_leaf_in(str(cause), leaves) for cause in reversed(found))), None)
    if leaf is None:  # what Orbax notes beside the arrays
        return f"its arrays can't be read: {first_line(error)}"
    # `CODE: Error reading "NAME/0.0" in OCDBT database at local file "PATH": REASON [tensorstore_spec=...]`
    code, _, text = str(found[-1]).partition("\n")[0].partition(" [tensorstore_spec")[0].partition(": ")
    reason = text.rpartition('": ')[2]
    return f"leaf {leaf} can't be read ({code}: {reason[:_LONGEST]})"


def hush_leftovers():
    """Silences, from now on, what a failed read of Orbax's leaves behind; whatever else is said is said as before.

    Orbax closes the event loop at the first error. Of every other read tensorstore's threads then find no loop to tell, and
    its task is thrown away: a traceback with pages of specification for each, now or when garbage is collected.
    """
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
    logger = logging.getLogger("asyncio")
    if _is_no_leftover not in logger.filters:
        logger.addFilter(_is_no_leftover)


class _Hook:
    """An unraisable hook that passes on to `before` what is no leftover."""

    def __init__(self, before):
        self.before = before

    def __call__(self, unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        is_task = code is not None and _ORBAX in code.co_filename
        is_thread = unraisable.object is None and isinstance(unraisable.exc_value, RuntimeError)
        if not is_task and not (is_thread and str(unraisable.exc_value) == "Event loop is closed"):
            self.before(unraisable)


def _is_no_leftover(record):
    """Whether a record of asyncio's log is of others than Orbax's tasks and tensorstore's reads."""
    trace = traceback.extract_tb(record.exc_info[2]) if record.exc_info else ()
    words = [record.getMessage(), *(frame.filename for frame in trace)]
    return not any(mark in word for mark in _MARKS for word in words)


def _leaf_in(text, leaves):
    """Returns the first of `leaves` that stands in `text` as tensorstore's path of it (`params.stack.weight/`), or None."""
    stored = {name.replace("/", "."): name for name in leaves}
    return next((stored[word] for word in re.findall(r"[\w.-]+(?=/)", text) if word in stored), None)
