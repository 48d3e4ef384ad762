"""The report of a clean dataset: one HTML page of what each step removed, what is left, and samples of both."""

import collections
import hashlib
import heapq
import html
import json
import math

import numpy as np

from llmos_jax.data.clean import pii_audit
from llmos_jax.evaluate.page import BLUE, bar_chart, figures, printable, table, write_page

REPORT_FILE = "report.html"
_SAMPLES = 4
_SAMPLE_CHARACTERS = 700
_MOST_CHARTS = 40
_MOST_CLUSTERS = 12
_BINS = 24
_MOST_LINEAR = 1000  # counts that reach further are shown on a logarithmic scale
_NO_QUANTITY = ("group", "distance")
_LEGEND = (
    "Green: documents that were kept; orange: removed (of an attribute: by its own step). A bar begins at its label; values "
    "above the 99th percentile stand in the last one."
)


def write_dataset_report(path, version):
    """Writes the report of a `data.clean.dataset.Version`: its files are read once each, so memory does not grow with them.

    Samples are chosen by a hash of their keys: the same dataset gives the same page. All text is escaped.
    """
    kept, removed, cut = _survey(version, "documents"), _survey(version, "removed"), _sample_cuts(version)
    manifest = version.manifest
    funnel = manifest["funnel"]
    title = f"{manifest['name']}, version {version.number}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(', '.join(source['path'] for source in manifest['sources']))}</p>",
        _figures(manifest),
        "<h2>What each step left</h2>",
        _funnel(funnel),
        _reasons(funnel),
        "<h2>Distributions</h2><div class='charts'>",
        bar_chart("Characters of a document", _bars([kept.lengths, removed.lengths], is_logarithmic=True)),
        *(bar_chart(f"{name}, kept", counts.most_common(16), colours=[BLUE]) for name, counts in sorted(kept.words.items())),
        "</div>",
        f"<p class='note'>{_LEGEND}</p>",
        _histograms(kept, removed),
        _clusters(kept),
        _personal_data(version),
        "<h2>Samples of what was kept</h2>",
        *(_sample(key, "", text) for key, text in kept.samples.chosen("")),
        "<h2>Samples of what was removed</h2>",
        *(_sample(key, why, text) for why in sorted(removed.samples.groups) for key, text in removed.samples.chosen(why)),
        "<h2>Samples of what was cut out of texts</h2>" if cut.groups else "",
        *(_sample(key, step, text) for step in sorted(cut.groups) for key, text in cut.chosen(step)),
        _sources(manifest),
        "<h2>Settings</h2><details><summary>resolved settings</summary><pre>",
        html.escape(json.dumps(manifest["settings"], indent=2, sort_keys=True)),
        "</pre></details>",
    ]
    write_page(path, title, body)


class _Survey:
    """What is counted over the documents of one kind."""

    def __init__(self):
        self.lengths, self.samples = _Histogram(), _Samples()
        self.numbers, self.words, self.groups = {}, {}, {}
        self.clusters = []


def _survey(version, kind):
    import pyarrow.compute as compute

    survey = _Survey()
    for file in version.manifest["files"][kind]:
        read = version.read(file)
        survey.lengths.add(np.asarray(compute.utf8_length(read["text"])))
        why = [""] * len(read)
        if kind == "removed":
            steps = read["step"].to_pylist()
            why = [f"{step}: {reason}" for step, reason in zip(steps, read["reason"].to_pylist(), strict=True)]
            _survey_removed(survey, steps, read["attributes"])
        else:
            for name in read.column_names:
                if "/" in name:
                    _survey_attribute(survey, name, read)
        survey.samples.add(read["key"], why, read["text"])
    return survey


def _survey_removed(survey, steps, attributes):
    """Adds what the steps that removed documents had found about them."""
    found = {}
    for step, values in zip(steps, map(json.loads, attributes.to_pylist()), strict=True):
        for name, value in values.items():
            if isinstance(value, (int, float)) and name not in _NO_QUANTITY:
                found.setdefault(f"{step}/{name}", []).append(value)
    for name, values in found.items():
        survey.numbers.setdefault(name, _Histogram()).add(values)


def _survey_attribute(survey, name, read):
    values = np.asarray(read[name])
    short = name.rpartition("/")[2]
    if values.dtype.kind == "O":
        survey.words.setdefault(name, collections.Counter()).update(values.tolist())
    elif short == "group":
        places = np.flatnonzero(values > 1)
        places = places[np.argsort(-values[places], kind="stable")][:_MOST_CLUSTERS]
        survey.clusters += [(int(values[place]), name.partition("/")[0], read["key"][int(place)].as_py()) for place in places]
        survey.groups.setdefault(name, _Histogram()).add(values[values > 1])
    elif short not in _NO_QUANTITY and not short.startswith("pii_"):
        survey.numbers.setdefault(name, _Histogram()).add(values)


class _Histogram:
    """Counts of values, each rounded down to a 128th of itself, so that any range is held in little memory."""

    def __init__(self):
        self._counts = collections.Counter()

    def add(self, values):
        values = np.asarray(values, np.float32)
        # The upper half of a float32: sign, exponent and seven bits.
        keys, counts = np.unique(values[np.isfinite(values)].view(np.uint32) >> 16, return_counts=True)
        self._counts.update(dict(zip(keys.tolist(), counts.tolist(), strict=True)))

    def values(self):
        """Returns (values, counts), rising."""
        keys = np.fromiter(self._counts, np.uint32, len(self._counts))
        values, order = np.unique((keys << 16).view(np.float32), return_index=True)
        return values.astype(np.float64), np.fromiter(self._counts.values(), np.int64, len(keys))[order]


def _bars(histograms, *, is_logarithmic=False):
    """Returns [(label, count in each of the histograms)]; what is above the 99th percentile of all stands in the last bar."""
    pairs = [histogram.values() for histogram in histograms]
    values, order = np.unique(np.concatenate([values for values, _ in pairs]), return_inverse=True)
    if not len(values):
        return []
    share = np.cumsum(np.bincount(order, np.concatenate([counts for _, counts in pairs])))
    low, high = values[0], values[np.searchsorted(share, 0.99 * share[-1])]
    is_whole = (values == np.round(values)).all()
    if is_logarithmic or (is_whole and high > _MOST_LINEAR):
        edges = 10 ** np.linspace(math.log10(max(low, 1)), math.log10(max(high, 2, 2 * low)), _BINS + 1)
    elif is_whole:  # whole numbers have bars of their own, or of as many each
        step = max(1, math.ceil((high - low + 1) / _BINS))
        edges = np.arange(low, high + step + 0.5, step)
    else:
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    columns = [np.histogram(np.clip(v, edges[0], np.nextafter(edges[-1], low)), edges, weights=n)[0] for v, n in pairs]
    return [(f"{edge:.3g}", *map(int, counts)) for edge, *counts in zip(edges, *columns, strict=False)]


class _Samples:
    """Some documents of each group, those whose keys have the smallest hashes."""

    def __init__(self, most=_SAMPLES):
        self._most, self.groups = most, {}

    def add(self, keys, groups, texts):
        for place, (key, group) in enumerate(zip(keys.to_pylist(), groups, strict=True)):
            rank = -int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
            heap = self.groups.setdefault(group, [])
            if len(heap) < self._most or rank > heap[0][0]:
                text = (texts[place].as_py() or "")[:_SAMPLE_CHARACTERS]
                (heapq.heappush if len(heap) < self._most else heapq.heapreplace)(heap, (rank, key, text))

    def chosen(self, group):
        """Returns [(key, text)] of a group."""
        return [(key, text) for _, key, text in sorted(self.groups.get(group, ()), reverse=True)]


def _sample_cuts(version):
    samples = _Samples()
    for file in version.manifest["files"]["cut"]:
        read = version.read(file)
        samples.add(read["key"], read["step"].to_pylist(), read["removed"])
    return samples


def _figures(manifest):
    first, last = manifest["funnel"][0], manifest["funnel"][-1]
    kept = sum(file["bytes"] for file in manifest["files"]["documents"])
    shown = [
        ("documents kept", f"{last['documents']:,}"),
        ("of the documents read", f"{last['documents'] / max(first['documents'], 1):.1%}"),
        ("text kept", f"{last['utf8_bytes'] / 1e6:,.1f} MB"),
        ("of the text read", f"{last['utf8_bytes'] / max(first['utf8_bytes'], 1):.1%}"),
        ("on disk, compressed", f"{kept / 1e6:,.1f} MB"),
        ("bad files and records, left out", f"{manifest['bad']['count']:,}"),
        *((f"passed over: {reason}", f"{count:,}") for reason, count in manifest.get("passed_over", {}).items()),
    ]
    return figures(shown)


def _funnel(funnel):
    whole = max(funnel[0]["utf8_bytes"], 1)
    rows = []
    for entry in funnel:
        share = entry["utf8_bytes"] / whole
        rows.append(
            f"<b>{html.escape(entry['step'])}</b><div style='width:{100 * share:.2f}%'></div>"
            f"<span>{entry['documents']:,} documents, {entry['utf8_bytes'] / 1e6:,.1f} MB ({share:.1%})</span>"
        )
    return f"<div class='funnel'>{''.join(rows)}</div>"


def _reasons(funnel):
    rows = [
        (entry["step"], reason, count, count / max(entry["documents_in"] or 1, 1), size / 1e6)
        for entry in funnel
        for reason, (count, size) in sorted(entry["removed"].items(), key=lambda item: -item[1][0])
    ]
    if not rows:
        return "<p>Nothing was removed.</p>"
    return "<h2>Why documents went</h2>" + table(("step", "reason", "documents", "share of those it saw", "MB"), rows)


def _histograms(kept, removed):
    charts = []
    for name in sorted({*kept.numbers, *removed.numbers}):
        pair = [survey.numbers.get(name, _Histogram()) for survey in (kept, removed)]
        values = np.concatenate([histogram.values()[0] for histogram in pair])
        if len(np.unique(values)) > 1:
            charts.append(bar_chart(f"{name} ({values.min():.3g} to {values.max():.3g})", _bars(pair)))
    if not charts:
        return ""
    return f"<h2>Attributes</h2><p class='note'>{_LEGEND}</p><div class='charts'>{''.join(charts[:_MOST_CHARTS])}</div>"


def _clusters(kept):
    if not kept.clusters:
        return ""
    rows = sorted(kept.clusters, key=lambda row: (-row[0], row[2]))[:_MOST_CLUSTERS]
    charts = [
        bar_chart(f"{name}: documents of a group", _bars([sizes]), colours=[BLUE])
        for name, sizes in sorted(kept.groups.items())
    ]
    heading = f"<h2>Groups of duplicates</h2><div class='charts'>{''.join(charts)}</div>"
    return heading + "<h2>The largest of them</h2>" + table(("documents", "step", "the one that stays"), rows)


def _personal_data(version):
    """Returns what the steps `pii` took out, of documents that later steps removed, too: as `dataset audit` counts it."""
    if not any(step["step"] == "pii" for step in version.manifest["settings"]["steps"]):
        return ""
    rows = [(kind, found["count"], found["documents"]) for kind, found in pii_audit.audit(version)["kinds"].items()]
    return "<h2>Personal data that was taken out</h2>" + table(("kind", "items", "documents"), rows) if rows else ""


def _sources(manifest):
    rows = [
        (source["name"], source["path"], source["licence"] or "not said", source["files"], source["bytes"] / 1e6)
        for source in manifest["sources"]
    ]
    parts = ["<h2>Sources</h2>", table(("source", "path", "licence", "files", "MB as they lie there"), rows)]
    if manifest["bad"]["count"]:
        lines = "\n".join(manifest["bad"]["messages"][:200])
        parts.append(f"<details><summary>{manifest['bad']['count']:,} bad files and records</summary><pre>")
        parts.append(f"{html.escape(printable(lines))}</pre></details>")
    return "".join(parts)


def _sample(key, why, text):
    more = "…" if len(text) >= _SAMPLE_CHARACTERS else ""
    head = html.escape(printable(f"{key}  {why}"))
    return f"<pre><b>{head}</b>\n{html.escape(printable(text))}{more}</pre>"
