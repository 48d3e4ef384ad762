"""How often the filters of `llmos_jax.data.clean` decide as datatrove's do, on documents of a jsonl file.

    python3 -m venv /tmp/datatrove && /tmp/datatrove/bin/pip install datatrove==0.10.1 spacy==3.8.18 nltk
    /tmp/datatrove/bin/python scripts/agreement.py record DOCUMENTS.jsonl EXPECTED.jsonl
    python scripts/agreement.py compare DOCUMENTS.jsonl EXPECTED.jsonl

`record` needs datatrove only, `compare` this package only: their requirements need not fit. Documents have an "id" and a
"text", in the normal form of the step `normalise`.
"""

import argparse
import collections
import json
import pathlib


def read(path):
    """Returns the records of a jsonl file."""
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def record(documents, expected):
    """Writes what datatrove's filters say of each document: "" or the reason for removal."""
    from datatrove.data import Document
    from datatrove.pipeline import filters

    chains = {
        "gopher_quality": filters.GopherQualityFilter(),
        "gopher_repetition": filters.GopherRepetitionFilter(),
        "fineweb_quality": filters.FineWebQualityFilter(),
        "c4": filters.C4QualityFilter(),
    }
    with open(expected, "w") as stream:
        for item in read(documents):
            row = {"id": item["id"]}
            for name, chain in chains.items():
                verdict = chain.filter(Document(text=item["text"], id=item["id"]))
                row[name] = "" if verdict is True else verdict[1]
            stream.write(json.dumps(row) + "\n")


def decisions(texts):
    """Returns {name as in `record`: reasons [n]} of this package for a list of texts."""
    import numpy as np

    from llmos_jax.data.clean.documents import Documents
    from llmos_jax.data.clean.steps import apply_step, parse_steps

    documents, found = Documents.of(texts), {}
    for step in parse_steps([{"step": name} for name in ("gopher_quality", "gopher_repetition", "fineweb_quality")]):
        found[step.name] = apply_step(step, [documents])[0][1]
    lines, quality = parse_steps([{"step": "c4_lines"}, {"step": "c4_quality"}])
    kept = Documents.of(apply_step(lines, [documents])[0][0])
    reasons = apply_step(quality, [kept])[0][1]
    found["c4"] = np.where([not text for text in kept.texts], "emptied", reasons)
    return found


def compare(documents, expected):
    """Prints the share of documents that both keep or both remove, by filter, and the kinds of disagreement."""
    rows, items = read(expected), read(documents)
    for name, ours in decisions([item["text"] for item in items[: len(rows)]]).items():
        theirs = [row[name] for row in rows]
        differ = [pair for pair in zip(theirs, map(str, ours), strict=True) if bool(pair[0]) != bool(pair[1])]
        removed = sum(map(bool, theirs))
        print(f"{name}: {1 - len(differ) / len(rows):.2%} of {len(rows)} alike; datatrove removes {removed / len(rows):.1%}")
        for (their, our), count in collections.Counter(differ).most_common(12):
            print(f"    {count:4d}  datatrove: {their or 'keeps':32s} here: {our or 'keeps'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("documents")
    parser.add_argument("expected")
    arguments = parser.parse_args()
    (record if arguments.action == "record" else compare)(arguments.documents, arguments.expected)


if __name__ == "__main__":
    main()
