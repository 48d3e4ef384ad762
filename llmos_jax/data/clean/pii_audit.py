"""The audit of a clean dataset: what personal data was taken out, how often, with masked samples."""

import collections
import hashlib

from llmos_jax.errors import ConfigError

_SAMPLES = 4


def audit(version):
    """Returns what the `pii` steps of a dataset.Version found, from the files of the version alone.

    {"documents": kept and removed ones that were searched, "with_findings": of these, "kinds": {kind: {"count", "documents",
    "samples": masked}}, "warnings": lines on sources that were cut before they were searched}. Kinds are the classes, and of
    national ids the countries' names for them. Samples are those with the smallest hash: the same for every run.

    Raises ConfigError when no step looked for personal data.
    """
    names = {step["label"] or step["step"] for step in version.manifest["settings"]["steps"] if step["step"] == "pii"}
    if not names:
        raise ConfigError(f"{version.directory} was prepared without the step pii: nobody looked for personal data.")
    counts, documents, samples, found = collections.Counter(), collections.Counter(), collections.defaultdict(dict), 0
    for row in version.iterate("cut"):
        if row["step"] not in names:
            continue
        found += 1
        lines = [line.partition(": ")[::2] for line in row["removed"].split("\n")]
        counts.update(kind for kind, _ in lines)
        documents.update({kind for kind, _ in lines})
        for kind, masked in lines:
            place = hashlib.sha256(f"{row['key']}/{masked}".encode("utf-8", "surrogatepass")).digest()
            samples[kind][place] = masked
            for extra in sorted(samples[kind])[_SAMPLES:]:
                del samples[kind][extra]
    funnel = {entry["step"]: entry for entry in version.manifest["funnel"]}
    kinds = {
        kind: {"count": count, "documents": documents[kind], "samples": [m for _, m in sorted(samples[kind].items())]}
        for kind, count in counts.most_common()
    }
    notes = version.manifest["notes"]
    warnings = sorted({line for name in names for line in notes.get(name, {}).get("cut_before", ())})
    documents_in = max(funnel[name]["documents_in"] for name in names)
    return {"documents": documents_in, "with_findings": found, "kinds": kinds, "warnings": warnings}


def format_audit(report):
    """Returns what `audit` found as a table for people."""
    lines = [
        f"{report['with_findings']:,} of {report['documents']:,} documents held personal data",
        f"{'kind':<20} {'found':>10} {'documents':>10}  masked samples",
    ]
    for kind, entry in report["kinds"].items():
        lines.append(f"{kind:<20} {entry['count']:>10,} {entry['documents']:>10,}  {', '.join(entry['samples'])}")
    return "\n".join([*lines, *(f"WARNING: {line}" for line in report["warnings"])])
