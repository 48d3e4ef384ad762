"""Global steps on disk: from records sorted by hash in each shard (`stage.emit`) to findings by document.

A range is as much as fits in the memory that is given; so the memory a worker takes does not grow with the corpus. All that
`finish` gets is in memory at once, in one process: some bytes for each duplicate.
"""

import bisect

import numpy as np

from llmos_jax.config import fingerprint
from llmos_jax.data.clean.objects import Task
from llmos_jax.data.clean.steps import parse_steps, sort_records

# What a worker sorts at a time; sorting takes about three times as much.
_RANGE_BYTES = 64 << 20


def reduce_tasks(objects, shards, states, emitted, step, fingerprint_of_step):
    """Returns the Tasks that reduce all ranges of hashes, in their order."""
    inputs = [[result["name"], state, shard.start] for result, state, shard in zip(emitted, states, shards, strict=True)]
    total = sum(result["bytes"] for result in emitted)
    ranges = max(1, -(-total // _RANGE_BYTES))
    key = fingerprint([inputs, ranges, fingerprint_of_step])
    listed = f"ranges/{key}.json"
    objects.write_json(listed, inputs)
    arguments = {"key": key, "inputs": listed, "step": step, "ranges": ranges}
    return [
        Task("reduce", f"reduce/{key}-{number}.json", arguments | {"number": number}, total // ranges)
        for number in range(ranges)
    ]


def reduce(objects, key, inputs, step, ranges, number):
    """Reduces one of `ranges` equal ranges of hashes over all shards; returns {"name"}."""
    (step,) = parse_steps([step])
    low, high = number * 2**64 // ranges, (number + 1) * 2**64 // ranges
    parts = []
    for name, state, start in objects.read_json(inputs):
        records = objects.map_records(name)
        part = np.array(records[_first(records, low) : _first(records, high)])
        part = part[(objects.read_arrays(state)["reasons"] == "")[part["document"]]]
        part["document"] += start
        parts.append(part)
    name = f"reduced/{key}-{number}.npy"
    objects.write_records(name, step.reduce(sort_records(np.concatenate(parts))))
    return {"name": name, "objects": [name]}


def finish_task(reduced, step, fingerprint_of_step, count):
    """Returns the Task that turns what all ranges gave into findings."""
    names = [result["name"] for result in reduced]
    key = fingerprint([names, count, fingerprint_of_step])
    return Task("finish", f"finish/{key}.json", {"key": key, "names": names, "step": step, "count": count})


def finish(objects, key, names, step, count):
    """Writes the findings of all documents, sorted by document; returns {"name"}."""
    (step,) = parse_steps([step])
    results = np.concatenate([objects.map_records(name) for name in names])
    findings = step.finish(results, count)
    name = f"findings/{key}.npy"
    objects.write_records(name, findings[np.argsort(findings["document"], kind="stable")])
    return {"name": name, "objects": [name]}


def _first(records, value):
    """Returns the place of the first record whose hash is `value` or more, looking at few of them."""
    return bisect.bisect_left(range(len(records)), value, key=lambda place: int(records["hash"][place]))
