"""Lists in text files, one entry a line, that steps are given by path."""

import functools
import hashlib
import pathlib

from llmos_jax.errors import ConfigError


@functools.lru_cache(maxsize=16)
def read_list(path):
    """Returns the entries of a file as a frozenset, lower case; blank lines and what follows a `#` are passed over.

    Raises ConfigError when the file can't be read or has no entry.
    """
    try:
        text = pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read as a list, one entry a line: {error}.") from None
    entries = frozenset(entry for line in text.splitlines() if (entry := line.partition("#")[0].strip().lower()))
    if not entries:
        raise ConfigError(f"the list {path} has no entry; leave the setting out instead.")
    return entries


def content_of(path):
    """Returns 16 hex digits that identify the content of a file; ConfigError when it can't be read."""
    try:
        with open(pathlib.Path(path).expanduser(), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error}.") from None
