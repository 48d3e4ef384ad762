"""The report of a clean dataset: one HTML page of what each step removed, what is left, and samples of both."""

import collections
import hashlib
import heapq
import html
import json
import math

import numpy as np

from llmos_jax.evaluate.page import BLUE, GREEN, ORANGE, bar_chart, figures, printable, table, write_page

REPORT_FILE = "report.html"
_SAMPLES = 4
_SAMPLE_CHARACTERS = 700
_MOST_CHARTS = 40
_MOST_CLUSTERS = 12
_BINS = 24


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
        bar_chart("Characters of a document, kept", kept.lengths.bars(), colour=GREEN),
        bar_chart("Characters of a document, removed", removed.lengths.bars(), colour=ORANGE),
        *(bar_chart(f"{name}, kept", counts.most_common(16), colour=BLUE) for name, counts in sorted(kept.words.items())),
        "</div>",
        _histograms(kept),
        _clusters(kept),
        _personal_data(kept),
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
        self.lengths, self.samples = _Histogram(is_logarithmic=True), _Samples()
        self.numbers, self.words = {}, {}
        self.clusters, self.sums = [], collections.Counter()


def _survey(version, kind):
    import pyarrow.compute as compute

    survey = _Survey()
    for file in version.manifest["files"][kind]:
        read = version.read(file)
        survey.lengths.add(np.asarray(compute.utf8_length(read["text"])))
        why = read["step"].to_pylist() if kind == "removed" else [""] * len(read)
        if kind == "removed":
            why = [f"{step}: {reason}" for step, reason in zip(why, read["reason"].to_pylist(), strict=True)]
        survey.samples.add(read["key"], why, read["text"])
        for name in read.column_names if kind == "documents" else ():
            if "/" in name:
                _survey_attribute(survey, name, read)
    return survey


def _survey_attribute(survey, name, read):
    values = np.asarray(read[name])
    short = name.rpartition("/")[2]
    if values.dtype.kind == "O":
        survey.words.setdefault(name, collections.Counter()).update(values.tolist())
    elif short == "group":
        places = np.flatnonzero(values > 1)
        places = places[np.argsort(-values[places], kind="stable")][:_MOST_CLUSTERS]
        survey.clusters += [(int(values[place]), name.partition("/")[0], read["key"][int(place)].as_py()) for place in places]
        survey.numbers.setdefault(name, _Histogram()).add(values[values > 1])
    elif short.startswith("pii_"):
        survey.sums[short.removeprefix("pii_")] += int(values.sum())
    elif short != "duplicate_of":
        survey.numbers.setdefault(name, _Histogram()).add(values)


class _Histogram:
    """Counts in bins that are fixed by the first values; later ones outside go into the outermost."""

    def __init__(self, is_logarithmic=False):
        self._is_logarithmic, self._edges, self._counts = is_logarithmic, None, None
        self.low, self.high = math.inf, -math.inf

    def add(self, values):
        values = np.asarray(values, np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            return
        self.low, self.high = min(self.low, values.min()), max(self.high, values.max())
        scaled = np.log10(np.maximum(values, 1)) if self._is_logarithmic else values
        if self._edges is None:
            low, high = (0, 8) if self._is_logarithmic else np.percentile(scaled, (0, 99))
            self._edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
            self._counts = np.zeros(_BINS, np.int64)
        self._counts += np.histogram(np.clip(scaled, self._edges[0], self._edges[-1]), self._edges)[0]

    def bars(self):
        """Returns [(label, count)], without empty bins at both ends."""
        if self._edges is None:
            return []
        used = np.flatnonzero(self._counts)
        places = range(used[0], used[-1] + 1)
        edges = 10**self._edges if self._is_logarithmic else self._edges
        return [(f"{edges[place]:.3g}", int(self._counts[place])) for place in places]

    @property
    def is_flat(self):
        """Whether there is but one value."""
        return not self.low < self.high


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


def _histograms(kept):
    charts = [
        bar_chart(f"{name} ({histogram.low:.3g} to {histogram.high:.3g})", histogram.bars(), colour=BLUE)
        for name, histogram in sorted(kept.numbers.items())
        if not histogram.is_flat
    ][:_MOST_CHARTS]
    if not charts:
        return ""
    note = "<p class='note'>Of the documents that were kept; values above the 99th percentile stand in the last bar.</p>"
    return f"<h2>Attributes</h2>{note}<div class='charts'>{''.join(charts)}</div>"


def _clusters(kept):
    if not kept.clusters:
        return ""
    rows = sorted(kept.clusters, key=lambda row: (-row[0], row[2]))[:_MOST_CLUSTERS]
    return "<h2>Largest groups of duplicates</h2>" + table(("documents", "step", "the one that stays"), rows)


def _personal_data(kept):
    if not kept.sums:
        return ""
    rows = [(name, count) for name, count in sorted(kept.sums.items(), key=lambda item: -item[1])]
    return "<h2>Personal data that was taken out</h2>" + table(("class", "items"), rows)


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
