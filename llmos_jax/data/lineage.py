"""Which documents a training record was cut from: kept beside the records, a line for each document."""

import gzip
import io
import json

from llmos_jax.errors import ConfigError, DataError


def lineage_file(split):
    """Returns the name of the file that holds the lineage of a split."""
    return f"documents-{split}.jsonl.gz"


class Lineage:
    """Collects the keys of documents and where their tokens lie in the stream that is cut into records.

    The stream is END document END document ... (`text.Packer`); record r holds its tokens r x length ... (r + 1) x length.
    """

    def __init__(self):
        self._sink = io.BytesIO()
        self._file = gzip.GzipFile(fileobj=self._sink, mode="wb", mtime=0)
        self._waiting, self._placed, self._tokens = [], 0, 0

    def add(self, key):
        """Notes a document that is going to be tokenised; tokenizers take many at a time."""
        self._waiting.append(key)

    def place(self, tokens):
        """Notes that the next of these documents ends after so many tokens of documents in all."""
        start = self._placed + self._tokens  # an END stands before this and every earlier one
        line = json.dumps([start, self._waiting.pop(0)], ensure_ascii=False)
        self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
        self._placed, self._tokens = self._placed + 1, tokens

    def finish(self):
        """Returns the content of the file."""
        self._file.close()
        return self._sink.getvalue()


def documents_of(directory, split, record, length):
    """Returns the keys of the documents that a record of a folder of prepared records holds tokens of, in order.

    Raises DataError when the folder does not say, ConfigError when it has no such record.
    """
    file = directory / lineage_file(split)
    first, last = record * length, (record + 1) * length
    keys, before = [], None
    try:
        with gzip.open(file, "rt", encoding="utf-8", errors="surrogatepass") as stream:
            for start, key in map(json.loads, stream):
                if start >= last:
                    break
                if start > first and before is not None:
                    keys.append(before)
                before = key
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{file} can't be read ({error}): prepare {directory} again.") from None
    if before is None:
        raise ConfigError(f"{directory} has no {split} documents.")
    return [*keys, before]
