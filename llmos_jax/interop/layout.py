"""How parameters lie in a file's tensors, as data: a table of names and dimension letters, read in both directions.

A table (`HF_NAMES` beside each model) is {parameter: {tensor: "dimensions there -> dimensions here"}}. `{n}` in a tensor's
name is the layer, `{e}` the expert: the parameter has these as leading dimensions. Dimensions are the letters of `types.py`
(and digits, for themselves): on the left a comma between the tensor's dimensions, each a product of letters; on the right one
letter a dimension, `[0]` for an index into one that several tensors share. `HK|*GK|GK,D` is a tensor that several parameters
share: parts one after the other along a dimension, of which this is the starred one.
"""

import dataclasses
import math
import re

import numpy as np

_RIGHT = re.compile(r"\[(\d)\]|([A-Z])|(\d)")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One part of a tensor that is one part of a parameter.

    parameter, lead: which, and its leading indices (layer, expert). tensor: the name in the file. shape: the whole tensor's.
    window: the slices of the tensor. split: the tensor's part as single letters; order: those in the parameter's order.
    fixed: {dimension of the parameter after the leading ones: index}.
    """

    parameter: str
    lead: tuple[int, ...]
    tensor: str
    shape: tuple[int, ...]
    window: tuple[slice, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    fixed: tuple[tuple[int, int], ...]

    @property
    def start(self):
        """Where the part begins in the parameter, an index a dimension."""
        starts = [0] * (len(self.order) + len(self.fixed))
        for dimension, index in self.fixed:
            starts[dimension] = index
        return (*self.lead, *starts)

    def here(self, tensor):
        """Returns the part of a whole tensor in the parameter's dimensions (a view); fixed and leading ones are 1 long."""
        part = tensor[self.window].reshape(self.split).transpose(self.order)
        return np.expand_dims(part, (*range(len(self.lead)), *(len(self.lead) + dimension for dimension, _ in self.fixed)))

    def there(self, part):
        """Returns what `here` returned in the tensor's dimensions."""
        inverse = np.argsort(self.order)
        extents = [range(*window.indices(size)) for window, size in zip(self.window, self.shape, strict=True)]
        squeezed = part.reshape([self.split[index] for index in self.order])
        return squeezed.transpose(inverse).reshape([len(extent) for extent in extents])


def pieces(table, parameters, sizes):
    """Returns every Piece of the `parameters` (names that the model has).

    sizes: {letter: size}, with N and E the counts of layers and experts. KeyError when the table lacks a parameter.
    """
    found = []
    for name in parameters:
        for template, spec in table[name].items():
            leads = [()]
            for letter, place in (("N", "{n}"), ("E", "{e}")):
                if place in template:
                    leads = [(*lead, index) for lead in leads for index in range(sizes[letter])]
            form = _parse(spec, sizes)
            for lead in leads:
                indices = dict(zip([key for key in "ne" if f"{{{key}}}" in template], lead, strict=True))
                found.append(Piece(name, lead, template.format(**indices), *form))
    return found


def _parse(spec, sizes):
    """Returns (shape, window, split, order, fixed) of one specification."""
    left, right = (side.strip() for side in spec.split("->"))
    shape, window, letters = [], [], []
    for dimension in left.split(","):
        start, total = 0, 0
        for part in dimension.split("|"):
            size = math.prod(_size(letter, sizes) for letter in part.strip("*"))
            if "|" not in dimension or part.startswith("*"):
                start, stop, chosen = total, total + size, part.strip("*")
            total += size
        shape.append(total)
        window.append(slice(start, stop))
        letters += chosen
    here, fixed = [], []
    for dimension, match in enumerate(_RIGHT.finditer(right)):
        index, letter, digit = match.groups()
        if index is not None:
            fixed.append((dimension, int(index)))
        else:
            here.append(letter or digit)
    split = tuple(_size(letter, sizes) for letter in letters)
    return tuple(shape), tuple(window), split, tuple(letters.index(letter) for letter in here), tuple(fixed)


def _size(letter, sizes):
    return int(letter) if letter.isdigit() else sizes[letter]
