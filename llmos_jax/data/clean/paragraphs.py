"""Removal of text that other documents have as well: paragraphs, lines, sentences or passages, wherever they stand.

Exact, by hashes met on disk, not by a Bloom filter: that one keeps whichever copy it sees first, so that what is removed would
depend on the order of shards and on the number of workers, and it removes a share of unique text by mistake. The price
is 24 bytes on disk for each paragraph.
"""

import dataclasses
import re
import zlib

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.dedup import text_hashes
from llmos_jax.data.clean.steps import Global, Transform, register

# What parts the units; it is kept, as every second element of what `split` gives.
_BORDERS = {
    "paragraph": re.compile(r"(\n(?:[ \t]*\n)+)"),
    "line": re.compile(r"(\n+)"),
    "sentence": re.compile(r"((?:(?<=[.!?])[ \t]+|\n+|(?<=[。！？])))"),
}
_BLANKS = re.compile(r"(\s+)")
# One word in so many ends a passage, on average.
_PASSAGE_WORDS = 32
_RECORD = np.dtype([("hash", np.uint64), ("document", np.int64), ("place", np.int32)])
_FINDING = np.dtype([("document", np.int64), ("place", np.int32)])


@register
@dataclasses.dataclass(frozen=True)
class RepeatedParagraphs(Global, Transform):
    """Cuts out all but the first copies of paragraphs that stand in many places of a corpus: licences, menus, boilerplate."""

    step: str = setting("repeated_paragraphs", help="step", choices=("repeated_paragraphs",))
    unit: str = setting("paragraph", help="what is compared and cut out", choices=(*_BORDERS, "passage"))
    min_characters: int = setting(80, help="shorter ones are left alone", at_least=1)
    copies: int = setting(1, help="how many stay, the first ones", at_least=1)

    version = 2

    def emit(self, documents):
        """Returns a record for each unit that is long enough: its hash, document and place."""
        places, texts, owners = [], [], []
        for number, text in enumerate(documents.texts):
            for place, part in enumerate(split(text, self.unit)[::2]):
                if len(part) >= self.min_characters:
                    places.append(place)
                    texts.append(part)
                    owners.append(number)
        records = np.empty(len(texts), _RECORD)
        records["hash"] = text_hashes(texts, is_folded=True)[:, 0]
        records["document"], records["place"] = owners, places
        return records

    def reduce(self, records):
        """Returns (document, place) of all copies but the first."""
        order = np.lexsort((records["place"], records["document"], records["hash"]))
        hashes = records["hash"][order]
        begins = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.zeros(0, int)
        rank = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
        surplus = order[rank >= self.copies]
        results = np.empty(len(surplus), _FINDING)
        results["document"], results["place"] = records["document"][surplus], records["place"][surplus]
        return results

    def finish(self, results, count):
        """Returns the places to cut out, sorted by document."""
        return np.sort(results, order=("document", "place"))

    def transform(self, documents, findings=None):
        """Returns (texts, {"repeats": how many were cut out of each, int32 [n]}, what was)."""
        texts, removed = list(documents.texts), [None] * len(documents)
        counts = np.bincount(findings["document"], minlength=len(texts)).astype(np.int32)
        borders = np.concatenate([[0], np.cumsum(counts)])
        for number in np.flatnonzero(counts):
            cut = set(findings["place"][borders[number] : borders[number + 1]].tolist())
            parts = split(texts[number], self.unit)
            kept = [
                part + "".join(parts[2 * place + 1 : 2 * place + 2])
                for place, part in enumerate(parts[::2])
                if place not in cut
            ]
            removed[number] = "\n".join(part for place, part in enumerate(parts[::2]) if place in cut)
            texts[number] = "".join(kept).lstrip("\n").rstrip()
        return texts, {"repeats": counts}, removed


def split(text, unit):
    """Returns a text in pieces: units at even places, what parts them at odd ones.

    A passage ends at a word that its hash chooses, so that what is copied falls into the same passages wherever it is put.
    """
    if unit != "passage":
        return _BORDERS[unit].split(text)
    words, pieces, start = _BLANKS.split(text), [], 0
    for place in range(0, len(words) - 1, 2):
        if zlib.crc32(words[place].lower().encode("utf-8", "surrogatepass")) % _PASSAGE_WORDS == 0:
            pieces += ["".join(words[start : place + 1]), words[place + 1]]
            start = place + 2
    return [*pieces, "".join(words[start:])]
