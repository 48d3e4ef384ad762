"""What steps do to one shard: attributes found once, decisions taken anew, texts changed in layers.

Filters write attributes for the documents that are still there when their turn comes, and keep them by (text, step): another
threshold before or in them leads to no new work but for documents that were gone before. A transform keeps the texts that it
changed, as a layer over those below.
"""

import hashlib

import numpy as np

from llmos_jax.config import fingerprint
from llmos_jax.data.clean.documents import Documents, check_attributes
from llmos_jax.data.clean.steps import Filter, findings_of, parse_steps, sort_records

EMPTIED = "emptied"


class ShardTexts:
    """The documents of a shard under layers of changed texts, read when they are first needed."""

    def __init__(self, objects, shard, layers):
        self._objects, self._shard, self.layers = objects, shard, list(layers)
        self._documents = None
        self.utf8_bytes = np.array(objects.read_table(shard, ["utf8_bytes"])["utf8_bytes"], np.int64)
        for layer in self.layers:
            self._resize(layer)

    @property
    def base(self):
        """Names the texts as they are now."""
        return fingerprint([self._shard, self.layers])

    @property
    def documents(self):
        """The Documents as they are now; a text that a layer did not reach is that of the layer below."""
        if self._documents is None:
            self._documents = self._objects.read_documents(self._shard)
            for layer in self.layers:
                self._change(layer)
        return self._documents

    def push(self, layer):
        """Puts a layer on top."""
        if self._documents is not None:
            self._change(layer)
        self.layers.append(layer)
        self._resize(layer)

    def _change(self, layer):
        columns = self._objects.read_table(f"{layer}.parquet", ["place", "text"])
        for place, text in zip(columns["place"], columns["text"], strict=True):
            if text is not None:
                self._documents.texts[place] = text

    def _resize(self, layer):
        arrays = self._objects.read_arrays(f"{layer}.npz")
        covered = arrays["covered"]
        self.utf8_bytes[covered] = arrays["utf8_bytes"][covered]


def run_stage(objects, shard, layers, state, steps, findings, following, guards, key):
    """Runs steps on a shard up to the next one that needs all shards, and emits what that one looks at.

    shard: name of its documents. layers: names of changed texts so far. state: name of the reasons so far, or None.
    steps: settings. findings: [name, start, stop] of the records of the first step, where that is global, or None.
    following: settings of the global steps to emit for. guards: settings of the earlier steps that `protect`.
    Returns {"layers", "state", "attributes": [[step, name]], "funnel": [an entry per step], "emitted": {"name", "bytes"} for
    each of these}.
    """
    texts = ShardTexts(objects, shard, layers)
    reasons = objects.read_arrays(state)["reasons"].astype(object) if state else np.full(len(texts.utf8_bytes), "", object)
    attributes, funnel, seen, guards = [], [], [], [*parse_steps(guards)]
    for number, step in enumerate(parse_steps(steps)):
        found = None
        if findings and number == 0:
            name, start, stop = findings
            found = findings_of(objects.map_records(name), start, stop)
        before = _total(texts, reasons)
        earlier = list(seen) if step.reads_attributes else []
        name = f"attributes/{fingerprint([texts.base, step.fingerprint, earlier, _digest(found)])}"
        if isinstance(step, Filter):
            values = _annotate(objects, name, step, texts, reasons, found, attributes)
            _decide(step, values, reasons)
        else:
            own = [] if step.protect else guards
            name = f"layers/{fingerprint([name, *(guard.fingerprint for guard in own)])}"
            _transform(objects, name, step, texts, reasons, found, attributes, own)
            guards += [step] if step.protect else []
        attributes.append([step.name, f"{name}.npz"])
        seen.append(step.fingerprint)
        funnel.append(_funnel_entry(step, texts, reasons, before))
    state = f"states/{key}.npz"
    objects.write_arrays(state, {"reasons": reasons.astype(str)})
    emitted = [emit(objects, step, texts, reasons) for step in parse_steps(following)]
    own = texts.layers[len(layers) :]  # those below were made, and are looked after, by earlier stages
    names = [state, *(name for _, name in attributes), *(f"{layer}.parquet" for layer in own)]
    return {
        "layers": texts.layers,
        "state": state,
        "attributes": attributes,
        "funnel": funnel,
        "emitted": emitted,
        "objects": names + [name for records in emitted for name in (records["name"], f"{records['name'][:-4]}.npz")],
    }


def emit(objects, step, texts, reasons):
    """Writes the records of a shard for a global step, sorted by hash; returns {"name", "bytes"}.

    Those that are held from other thresholds are not made again; `exchange.reduce` leaves out documents that are gone.
    """
    name = f"records/{fingerprint([texts.base, step.fingerprint])}"
    held, places = missing(objects, f"{name}.npz", reasons, f"{name}.npy")
    if len(places) or held is None:
        is_chosen = np.zeros(len(reasons), bool)
        is_chosen[places] = True
        records = step.emit(texts.documents.select(is_chosen))
        records["document"] = places[records["document"]]
        if held is not None:
            old = np.array(objects.map_records(f"{name}.npy"))
            records = np.concatenate([old[~is_chosen[old["document"]]], records])
        objects.write_records(f"{name}.npy", sort_records(records))
        covered = is_chosen if held is None else held["covered"] | is_chosen
        objects.write_arrays(f"{name}.npz", {"covered": covered}, f"{name}.npy")
    return {"name": f"{name}.npy", "bytes": int(objects.map_records(f"{name}.npy").nbytes)}


def missing(objects, name, reasons, beside=None):
    """Returns (arrays that an object holds or None, places of documents that are still there and that it lacks).

    beside: the object that belongs to it. What is damaged is made again from nothing.
    """
    held = objects.held_arrays(name, beside)
    is_here = reasons == ""
    return held, np.flatnonzero(is_here if held is None else is_here & ~held["covered"])


def spread(held, found, places, count):
    """Returns arrays for all `count` documents: those that were held, with those found at `places`."""
    total = {} if held is None else dict(held)
    if held is None:
        total["covered"] = np.zeros(count, bool)
    total["covered"][places] = True
    for name, values in found.items():
        old = total.get(name)
        dtype = values.dtype if old is None else np.promote_types(old.dtype, values.dtype)
        new = np.zeros(count, dtype) if old is None else old.astype(dtype)
        new[places] = values
        total[name] = new
    return total


def _annotate(objects, name, step, texts, reasons, found, earlier):
    name = f"{name}.npz"
    held, places = missing(objects, name, reasons)
    if not len(places) and held is not None:
        return held
    documents = _chosen(objects, texts, places, step, earlier)
    values = step.annotate(documents, *_own(found, places))
    values = check_attributes(values, len(places), step.name)
    total = spread(held, values, places, len(reasons))
    objects.write_arrays(name, total)
    return total


def _decide(step, values, reasons):
    here = np.flatnonzero(reasons == "")
    own = {name: array[here] for name, array in values.items() if name != "covered"}
    for place, reason in zip(here, np.asarray(step.decide(own)), strict=True):
        if reason:
            reasons[place] = f"{step.name}: {reason}"


def _transform(objects, name, step, texts, reasons, found, earlier, guards):
    held, places = missing(objects, f"{name}.npz", reasons, f"{name}.parquet")
    if len(places) or held is None:
        documents = _chosen(objects, texts, places, step, earlier)
        new, values, removed = step.transform(documents, *_own(found, places))
        new = _protected(new, documents.texts, guards)
        changed = [None if a == b else a for a, b in zip(new, documents.texts, strict=True)]
        columns = {"place": places.astype(np.int32), "text": changed, "removed": list(removed)}
        if held is not None:
            columns = _joined(objects.read_table(f"{name}.parquet"), columns)
        documents.texts = new
        values = check_attributes(values, len(places), step.name) | {"utf8_bytes": documents.utf8_bytes}
        values["is_blank"] = np.array([not text.strip() for text in new], bool)
        objects.write_table(f"{name}.parquet", columns)
        held = spread(held, values, places, len(reasons))
        objects.write_arrays(f"{name}.npz", held, f"{name}.parquet")
    texts.push(name)
    reasons[(reasons == "") & held["is_blank"]] = f"{step.name}: {EMPTIED}"


def _protected(new, old, guards):
    """Returns the texts that a step made, those that it changed without what guards find: what it joined may be a datum."""
    places = [place for place, (a, b) in enumerate(zip(new, old, strict=True)) if a is not b and a != b]
    chosen = [new[place] for place in places]
    for guard in guards:
        chosen = guard.protect(chosen)
    new = list(new)
    for place, text in zip(places, chosen, strict=True):
        new[place] = text
    return new


def _joined(old, new):
    """Returns the columns of a layer with those of other documents, each document once."""
    again = set(new["place"].tolist())
    kept = [number for number, place in enumerate(old["place"]) if place not in again]
    joined = {key: [old[key][number] for number in kept] + list(new[key]) for key in ("text", "removed")}
    places = [old["place"][number] for number in kept]
    return {"place": np.append(np.array(places, np.int32), new["place"])} | joined


def _chosen(objects, texts, places, step, earlier):
    """Returns the Documents at `places`: blank for a step that reads no texts, with attributes for one that reads these."""
    if not step.reads_texts:
        return Documents.of([""] * len(places))
    documents = texts.documents
    is_chosen = np.zeros(len(documents), bool)
    is_chosen[places] = True
    chosen = documents.select(is_chosen)
    if step.reads_attributes:
        for label, name in earlier:
            for key, values in objects.read_arrays(name).items():
                chosen.attributes[f"{label}/{key}"] = values[places]
    return chosen


def _own(found, places):
    """Returns the findings of the documents at `places`, numbered among these; nothing for a step without any."""
    if found is None:
        return ()
    own = found[np.isin(found["document"], places)]
    own["document"] = np.searchsorted(places, own["document"])
    return (own,)


def digest_of_findings(objects, name, start, stop):
    """Returns a hash of what the findings of that name say of documents start..stop."""
    return _digest(findings_of(objects.map_records(name), start, stop))


def _digest(found):
    return None if found is None else hashlib.sha256(found.tobytes()).hexdigest()


def _total(texts, reasons):
    is_here = reasons == ""
    return int(is_here.sum()), int(texts.utf8_bytes[is_here].sum())


def _funnel_entry(step, texts, reasons, before):
    """What a step did to a shard: documents and bytes that came in and that stayed, and what went for which reason."""
    documents, utf8_bytes = _total(texts, reasons)
    removed = {}
    for place in np.flatnonzero(reasons != ""):
        label, _, reason = reasons[place].partition(": ")
        if label == step.name:
            count, size = removed.get(reason, (0, 0))
            removed[reason] = (count + 1, size + int(texts.utf8_bytes[place]))
    return {
        "step": step.name,
        "documents_in": before[0],
        "utf8_bytes_in": before[1],
        "documents": documents,
        "utf8_bytes": utf8_bytes,
        "removed": {reason: list(sizes) for reason, sizes in sorted(removed.items())},
    }
