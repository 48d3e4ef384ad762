"""What comes out of a shard: its clean documents, the removed ones with their reasons, and what was cut out of texts."""

import bisect
import functools
import hashlib
import json
import re

import numpy as np

from llmos_jax.data.clean.objects import SMALL
from llmos_jax.data.clean.steps import parse_steps

# What steps note for the runner's own use.
_INTERNAL = ("covered", "is_blank", "utf8_bytes")
KINDS = ("documents", "removed", "cut")
# Beside a file of documents: where each key stands, so that one is found without reading all files.
INDEXES = {"documents": "index", "removed": "removed-index"}
VERSION = 5
# Numbers of six digits and more are looked at, as floats up to where these no longer hold each whole number of an account.
_SHORTEST, _LONGEST = 10**5, 10**20
# Between words of a field's name that nothing else parts; and how much of the names above a value counts for it.
_WORD_BEGINS, _LONGEST_NAME = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=[0-9])"), 80
_PLACE = np.dtype([("hash", np.uint64), ("row", np.uint32)])


def write_shard(objects, key, shard, source, layers, state, attributes, guards):
    """Writes the clean documents, the removed ones and the cuts of a shard.

    attributes: [[step, name of its arrays]]. guards: settings of the steps that `protect` all that is written.
    Returns {kind: {"name", "documents", "utf8_bytes"} or None where there are none}; indexes are kinds, too.
    """
    documents, files = objects.read_documents(shard), objects.read_table(shard, ["file"])["file"]
    reasons = objects.read_arrays(state)["reasons"] if state else np.full(len(documents), "")
    order = {step: number for number, (step, _) in enumerate(attributes)}
    split = [reason.partition(": ") for reason in reasons.tolist()]
    # The number of the step that removed each document: what later steps once found about it is not shown.
    ended = np.array([order[step] if step else len(order) for step, _, _ in split], np.int64)
    cuts = _apply_layers(objects, documents, files, layers, attributes, ended)
    found = {step: objects.read_arrays(name) for step, name in attributes}
    for guard in parse_steps(guards):
        _protect(guard.protect, documents, ended < len(order), cuts, found)
    is_here = reasons == ""
    result, names = {}, []

    def write(kind, columns, utf8_bytes):
        name = f"output/{key}-{kind}.parquet"
        objects.write_table(name, columns, SMALL)
        result[kind] = {"name": name, "documents": len(columns["key"]), "utf8_bytes": int(np.sum(utf8_bytes))}
        names.append(name)
        if kind in INDEXES:
            places = np.empty(len(columns["key"]), _PLACE)
            places["hash"], places["row"] = [hash_of_key(one) for one in columns["key"]], np.arange(len(places))
            places.sort(order=("hash", "row"))
            name = f"output/{key}-{kind}-index.npy"
            objects.write_records(name, places)
            result[INDEXES[kind]] = {"name": name}
            names.append(name)

    if is_here.any():
        kept = documents.select(is_here)
        columns = _columns(kept, source, files, is_here)
        for step, arrays in found.items():
            for name, values in arrays.items():
                if name not in _INTERNAL:
                    columns[f"{step}/{name}"] = values[is_here] if values.dtype.kind != "U" else values[is_here].tolist()
        write("documents", columns, kept.utf8_bytes)
    if not is_here.all():
        gone = documents.select(~is_here)
        columns = _columns(gone, source, files, ~is_here)
        columns["step"] = [step for step, _, _ in split if step]
        columns["reason"] = [reason for step, _, reason in split if step]
        places = np.flatnonzero(~is_here)
        columns["attributes"] = [_one(found[step], place) for step, place in zip(columns["step"], places, strict=True)]
        write("removed", columns, gone.utf8_bytes)
    if cuts["key"]:
        write("cut", cuts, [len(text.encode()) for text in cuts["removed"]])
    return {kind: result.get(kind) for kind in (*KINDS, *INDEXES.values())} | {"objects": names}


def hash_of_key(key):
    """Returns the hash that an index holds for a document's key, an unsigned number of 64 bits."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def rows_of_key(index, key):
    """Returns the rows that an index file names for a key: some of them, rarely, of other keys. Few of its bytes are read."""
    places, wanted = np.load(index, mmap_mode="r"), hash_of_key(key)
    first = bisect.bisect_left(range(len(places)), wanted, key=lambda place: int(places["hash"][place]))
    last = bisect.bisect_right(range(len(places)), wanted, lo=first, key=lambda place: int(places["hash"][place]))
    return places["row"][first:last].tolist()


def _protect(protect, documents, is_removed, cuts, found):
    """Applies `protect` to what no step saw it in: removed documents, cuts of other steps, metadata, and attributes of text."""
    removed = [documents.texts[place] for place in np.flatnonzero(is_removed)]
    attributes = [values for arrays in found.values() for values in arrays.values() if values.dtype.kind == "U"]
    texts = (removed, cuts["removed"], *(values.tolist() for values in attributes))
    named = dict.fromkeys(("", text) for column in texts for text in column)
    for item in documents.metadata:
        named.update(dict.fromkeys(_named_texts(item)))
    names, values = zip(*named, strict=True) if named else ((), ())
    clean = dict(zip(named, protect(list(values), list(names)), strict=True))
    for place, text in zip(np.flatnonzero(is_removed), removed, strict=True):
        documents.texts[place] = clean["", text]
    cuts["removed"] = [clean["", text] for text in cuts["removed"]]
    documents.metadata = [_replaced(item, clean) for item in documents.metadata]
    for arrays in found.values():
        for name, values in arrays.items():
            if values.dtype.kind == "U":
                arrays[name] = np.array([clean["", value] for value in values.tolist()], np.str_)


def _named_texts(item, name=""):
    """Yields (names above it, text) of all that metadata hold, names of fields too: of a table without a header the first
    record names them."""
    if isinstance(item, dict):
        for key, value in item.items():
            yield name, key
            yield from _named_texts(value, _name_within(name, key))
    elif isinstance(item, list):
        for value in item:
            yield from _named_texts(value, _name_of_one(name))
    elif (text := _as_text(item)) is not None:
        yield name, text


def _replaced(item, clean, name=""):
    """Returns metadata with `clean` {(names above, text): text} in the place of each text, and of numbers that it changes."""
    if isinstance(item, list):
        return [_replaced(value, clean, _name_of_one(name)) for value in item]
    if not isinstance(item, dict):
        text = _as_text(item)
        return item if text is None or clean[name, text] == text else clean[name, text]
    replaced = {}
    for key, value in item.items():
        new = clean[name, key]
        while new in replaced:
            new += "_"
        replaced[new] = _replaced(value, clean, _name_within(name, key))
    return replaced


def _as_text(item):
    """Returns a string, or the decimal digits of a number that is long enough to be somebody's; of all else None."""
    if isinstance(item, str):
        return item
    if isinstance(item, bool) or not isinstance(item, int | float) or not _SHORTEST <= abs(item) < _LONGEST:
        return None
    return format(item, ".0f") if isinstance(item, float) and item.is_integer() else str(item)


@functools.lru_cache(maxsize=4096)
def _name_within(name, key):
    """Returns the name of a field with those above it, its words apart: homePhone2 in contact is contact_home_Phone_2."""
    return f"{name}_{_WORD_BEGINS.sub('_', key[-_LONGEST_NAME:])}".lstrip("_")[-_LONGEST_NAME:]


def _name_of_one(name):
    """Returns the name of one of a list: of phones a phone."""
    return name.removesuffix("s")


def _columns(documents, source, files, chosen):
    metadata = [json.dumps(item, sort_keys=True, ensure_ascii=False) for item in documents.metadata]
    return {
        "key": documents.keys,
        "source": [source] * len(documents),
        "file": [files[place] for place in np.flatnonzero(chosen)],
        "text": documents.texts,
        "metadata": metadata,
    }


def _one(arrays, place):
    values = {name: array[place].item() for name, array in arrays.items() if name not in _INTERNAL}
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _apply_layers(objects, documents, files, layers, attributes, ended):
    """Changes texts as the layers say, each up to the step that removed its document; returns the columns of what was cut."""
    names = [name.removesuffix(".npz") for _, name in attributes]
    rows = []
    for layer in layers:
        number = names.index(layer)
        columns = objects.read_table(f"{layer}.parquet")
        for place, text, cut in sorted(zip(columns["place"], columns["text"], columns["removed"], strict=True), key=_place):
            if cut is not None and ended[place] >= number:
                rows.append((documents.keys[place], files[place], attributes[number][0], cut))
            if text is not None and ended[place] > number:
                documents.texts[place] = text
    return {name: [row[number] for row in rows] for number, name in enumerate(("key", "file", "step", "removed"))}


def _place(row):
    return row[0]
