"""Removal of duplicate documents: equal ones by a hash, similar ones by MinHash and locality-sensitive hashing.

Of a group of duplicates the document with the smallest number stays, which is the first of the source named first. What is
found depends on the set of documents only: groups are the connected components of "have a hash in common".
"""

import dataclasses
import hashlib

import numpy as np

from llmos_jax.config import setting
from llmos_jax.data.clean.characters import mixed
from llmos_jax.data.clean.repeats import ngram_hashes
from llmos_jax.data.clean.steps import Filter, Global, register
from llmos_jax.data.clean.views import view_of
from llmos_jax.data.clean.words import FoldedHashes, Words
from llmos_jax.errors import ConfigError

_EDGE = np.dtype([("document", np.int64), ("kept", np.int64)])
_FINDING = np.dtype([("document", np.int64), ("distance", np.int64), ("group", np.int32)])
_SCOPES = ("all", "source")
_BLANKS = b" \t\n\v\f\r"


def text_hashes(texts, *, is_folded):
    """Returns 128-bit hashes of texts as uint64 [n, 2]; folded: of what is left of them without capitals and blanks."""
    digests = bytearray()
    for text in texts:
        content = (text.lower() if is_folded else text).encode("utf-8", "surrogatepass")
        if is_folded:
            content = content.translate(None, _BLANKS)
        digests += hashlib.blake2b(content, digest_size=16).digest()
    return np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2)


def _source_salt(keys, scope):
    """Returns a uint64 for each document that is the same within its source only; 0 where all sources are one."""
    if scope == "all":
        return np.zeros(len(keys), np.uint64)
    return text_hashes([key.partition("/")[0] for key in keys], is_folded=False)[:, 0]


def first_of_equal(records, fields):
    """Returns for records sorted by document within equal `fields` (arrays [N]) the edges from later ones to the first."""
    order = np.lexsort((records["document"], *fields))
    is_new = np.ones(len(records), bool)
    is_new[1:] = np.any([field[order[1:]] != field[order[:-1]] for field in fields], axis=0)
    firsts = np.flatnonzero(is_new)
    group = np.cumsum(is_new) - 1
    edges = np.empty(len(records) - len(firsts), _EDGE)
    edges["document"] = records["document"][order[~is_new]]
    edges["kept"] = records["document"][order[firsts[group[~is_new]]]]
    return edges[edges["document"] != edges["kept"]]


def components(edges):
    """Returns findings (document, distance, group) of the documents of all connected components of `edges`.

    distance: how many documents before it the smallest one of the component stands, which stays; a difference is the same
    wherever new documents come before both. group: how many documents the component has.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes, ends = np.unique(np.concatenate([edges["document"], edges["kept"]]), return_inverse=True)
    start, stop = ends[: len(edges)], ends[len(edges) :]
    graph = coo_array((np.ones(len(edges), bool), (start, stop)), shape=(len(nodes), len(nodes)))
    _, label = connected_components(graph, directed=False)
    # Nodes rise: the first of a label is its smallest.
    _, first, number, size = np.unique(label, return_index=True, return_inverse=True, return_counts=True)
    findings = np.empty(len(nodes), _FINDING)
    findings["document"], findings["distance"], findings["group"] = nodes, nodes - nodes[first[number]], size[number]
    return findings


class _Duplicates(Global, Filter):
    """What the two steps share: from edges between documents to decisions."""

    reads_texts = False

    def finish(self, results, count):
        """Returns a finding for each document that has a duplicate."""
        return components(results) if len(results) else np.empty(0, _FINDING)

    def annotate(self, documents, findings=None):
        """Returns {"distance": how far before it the document stands that stays, int64 [n]; "group": size, int32 [n]}.

        Distance 0: this one stays. Group 0: a document without duplicates.
        """
        distance, group = np.zeros(len(documents), np.int64), np.zeros(len(documents), np.int32)
        distance[findings["document"]], group[findings["document"]] = findings["distance"], findings["group"]
        return {"distance": distance, "group": group}

    def decide(self, attributes):
        """Returns why duplicates go."""
        return np.where(attributes["distance"] > 0, "duplicate", "")


@register
@dataclasses.dataclass(frozen=True)
class ExactDuplicates(_Duplicates):
    """Removes documents whose text is that of an earlier one."""

    step: str = setting("exact_duplicates", help="step", choices=("exact_duplicates",))
    ignore_case_and_blanks: bool = setting(True, help="take texts for equal that differ only in case and blanks")
    scope: str = setting("all", help="within and across sources, or within each source", choices=_SCOPES)

    version = 3

    def emit(self, documents):
        """Returns one record for each document."""
        hashes = text_hashes(documents.texts, is_folded=self.ignore_case_and_blanks)
        records = np.empty(len(documents), [("hash", np.uint64), ("check", np.uint64), ("document", np.int64)])
        records["hash"], records["check"] = hashes[:, 0] ^ _source_salt(documents.keys, self.scope), hashes[:, 1]
        records["document"] = np.arange(len(documents))
        return records

    def reduce(self, records):
        """Returns edges from every document to the first with the same text."""
        return first_of_equal(records, (records["check"], records["hash"]))


@register
@dataclasses.dataclass(frozen=True)
class MinhashDuplicates(_Duplicates):
    """Removes documents that share most of their n-grams of words with an earlier one.

    Two documents of Jaccard similarity s meet with probability 1 - (1 - s ** rows) ** bands: one half at s = 0.72 with 14 bands
    of 8 rows (FineWeb's choice). Words are taken in lower case, without punctuation. Needs rensa.
    """

    step: str = setting("minhash_duplicates", help="step", choices=("minhash_duplicates",))
    ngram: int = setting(5, help="words of an n-gram; a shorter text is one n-gram", at_least=1)
    bands: int = setting(14, help="groups of rows; documents meet when all rows of any band are equal", at_least=1)
    rows: int = setting(8, help="minima in a band", at_least=1)
    seed: int = setting(1, help="seed of the hash functions", at_least=0)
    scope: str = setting("all", help="within and across sources, or within each source", choices=_SCOPES)

    libraries = ("rensa",)
    version = 3

    def emit(self, documents):
        """Returns `bands` records for each document that has words."""
        rensa = _rensa()
        hashes, offsets, chosen = self.shingles(documents.texts)
        digest = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, self.bands * self.rows, self.seed)
        minima = np.array(digest.to_rows(), np.uint64).reshape(len(chosen), self.bands, self.rows)
        salt = mixed(np.arange(self.bands)) ^ _source_salt(documents.keys, self.scope)[chosen][:, None]
        total = mixed(salt)
        for row in range(self.rows):
            total = mixed(total ^ minima[:, :, row])
        records = np.empty(total.size, [("hash", np.uint64), ("document", np.int64)])
        records["hash"], records["document"] = total.reshape(-1), np.repeat(chosen, self.bands)
        return records

    def shingles(self, texts):
        """Returns (hashes of n-grams, borders uint64 [c + 1], numbers of the c documents that have words)."""
        words, folded = view_of(texts, Words, FoldedHashes)
        real = np.flatnonzero(~words.is_sign)
        borders = np.searchsorted(real, words.first)
        counts = np.diff(borders)
        chosen = np.flatnonzero(counts)
        n = np.minimum(counts[chosen], self.ngram)
        folded = folded.values[real]
        sizes = counts[chosen] - n + 1
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        start = np.repeat(borders[chosen] - offsets[:-1], sizes) + np.arange(offsets[-1])
        hashes = np.empty(offsets[-1], np.uint64)
        of_place = np.repeat(n, sizes)
        for length in np.unique(n).tolist():
            # Short texts have n-grams of their own length.
            places = of_place == length
            hashes[places] = ngram_hashes(folded, length)[start[places]]
        return hashes, offsets.astype(np.uint64), chosen

    def reduce(self, records):
        """Returns edges from every document to the first that has the same hash of a band."""
        return np.unique(first_of_equal(records, (records["hash"],)))


def curve(similarity, bands, rows):
    """Returns the probability that two documents of a Jaccard similarity share a band."""
    return 1 - (1 - similarity**rows) ** bands


def _rensa():
    try:
        import rensa
    except ImportError:
        raise ConfigError("step 'minhash_duplicates' needs rensa: pip install 'llmos-jax[data]'.") from None
    return rensa
