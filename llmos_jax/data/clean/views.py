"""What steps look at in a shard's texts, as arrays: found once for all steps that look at the same, and only what they ask for.

A view is a frozen dataclass of arrays over the parts (words, lines) of documents in order; `first` [n + 1] says that document d
has the parts first[d] .. first[d + 1]. Its method `find(batch)` finds it in a `characters.Batch` of n texts.
"""

import dataclasses
import threading

import numpy as np

from llmos_jax.data.clean.characters import Batch, batches


@dataclasses.dataclass(frozen=True)
class View:
    """Arrays over the parts of n documents; first: [n + 1], where the parts of each begin."""

    first: np.ndarray

    def totals(self, values):
        """Returns the sums over the parts of each document of `values`, one for each part, as numbers [n]."""
        sums = np.zeros(len(self.first) - 1, np.int64)
        some = np.flatnonzero(self.first[1:] > self.first[:-1])
        if len(some):
            sums[some] = np.add.reduceat(values, self.first[some], dtype=np.int64)
        return sums

    @property
    def documents(self):
        """Number of the document of each part, int64."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))


class Views(threading.local):
    """Views of lists of texts, kept for the texts asked for last: many steps look at the same ones, or at some of them.

    Each thread has its own: runners of Beam's run bundles side by side.
    """

    def __init__(self):
        self._held = {}

    def __call__(self, texts, *kinds):
        """Returns the view of a list of texts of each of `kinds`, subclasses of View, in their order."""
        self._held = {kind: held for kind, held in self._held.items() if all(text in held[0] for text in texts)}
        if wanted := [kind for kind in dict.fromkeys(kinds) if kind not in self._held]:
            distinct = list(dict.fromkeys(texts))
            places = {text: place for place, text in enumerate(distinct)}
            self._held |= {kind: (places, view) for kind, view in _found(distinct, wanted).items()}
        return [_select(*self._held[kind], texts) for kind in kinds]


def _found(texts, kinds):
    """Returns {kind: view}; a batch is looked at for all kinds while it is in the processor's cache."""
    parts = {kind: [] for kind in kinds}
    for part in batches(texts) if texts else [slice(0)]:
        batch = Batch(texts[part])
        for kind, found in parts.items():
            found.append(kind.find(batch))
    return {kind: concatenate(found) for kind, found in parts.items()}


def concatenate(parts):
    """Returns one view from those of consecutive batches of documents."""
    shifts = np.cumsum([0, *(part.first[-1] for part in parts)])
    first = [part.first[:-1] + shift for part, shift in zip(parts, shifts, strict=False)]
    columns = [_columns(part) for part in parts]
    joined = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    return type(parts[0])(first=np.concatenate([*first, shifts[-1:]]), **joined)


def _select(places, view, texts):
    """Returns what `view`, of the texts {text: number} `places`, holds for some of these, in their order."""
    documents = np.fromiter(map(places.get, texts), np.int64, len(texts))
    if len(documents) == len(places) and (documents == np.arange(len(documents))).all():
        return view
    counts = np.diff(view.first)[documents]
    first = np.concatenate([[0], np.cumsum(counts)])
    rows = np.repeat(view.first[documents] - first[:-1], counts) + np.arange(first[-1])
    return type(view)(first=first, **{name: values[rows] for name, values in _columns(view).items()})


def _columns(view):
    return {field.name: getattr(view, field.name) for field in dataclasses.fields(view) if field.name != "first"}


# One for the process: steps are told of each other by nothing but the texts.
view_of = Views()
