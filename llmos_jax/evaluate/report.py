"""The report of a run: one HTML page with its figures, curves, samples and settings, readable anywhere, offline."""

import html
import json
import math

from llmos_jax.evaluate.page import BLUE, GREEN, ORANGE, figures, line_chart, printable, write_page

_CATEGORY_COLOURS = (
    "#8a8f98",
    "#b084cc",
    "#5ab4ac",
    "#e6ab02",
    "#3b82f6",
    "#f97316",
    "#ec4899",
    "#64748b",
    "#cbd5e1",
    "#94a3b8",
)


def write_report(path, *, title, settings, metrics, summary):
    """Writes the report of a run as one self-contained page (no script, nothing loaded).

    settings: plain resolved settings. metrics: entries of metrics.jsonl. summary: the dict that `api.run_training` returns.
    Everything that is text is escaped: samples and settings can hold anything.
    """
    losses = _series(metrics, "train/loss")
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{summary['step']:,} steps on {html.escape(summary['machine'])}</p>",
        _figures(summary),
        "<h2>Learning</h2><div class='charts'><div class='wide'>",
        line_chart(
            "Loss, nats per token",
            [("training", losses, BLUE, .3), ("training, smoothed", _smooth(losses), BLUE, 1.0),
             ("validation", _series(metrics, "validation/loss"), ORANGE, 1.0)],
            width=800, height=320,
        ),
        "</div>",
        *[
            line_chart(label, [("", points, GREEN, 1.0)], width=500, height=220)
            for label, name in (
                ("Validation bits per byte", "validation/bits_per_byte"),
                ("Learning rate", "train/learning_rate"),
                ("Gradient norm", "train/gradient_norm"),
                ("Tokens per second", "throughput/tokens_per_second"),
            )
            if (points := _series(metrics, name))
        ],
        "</div>",
        "<h2>Where the time went</h2>",
        _time_bar(summary["seconds"]),
        _samples(metrics),
        f"<h2>Settings</h2><details><summary>resolved settings</summary><pre>"
        f"{html.escape(json.dumps(settings, indent=2, sort_keys=True))}</pre></details>",
    ]  # fmt: skip
    write_page(path, title, body)


def _figures(summary):
    evaluation, throughput = summary["evaluation"], summary["throughput"]
    shown = [(name.replace("_", " "), f"{value:.4g}") for name, value in evaluation.items()]
    shown = [(f"validation {name}", value) for name, value in shown]
    shown += [(name, f"{value:.4g}") for name, value in summary["baselines"].items()]
    if "throughput/tokens_per_second" in throughput:
        shown.append(("tokens per second", f"{throughput['throughput/tokens_per_second']:,.0f}"))
    if "throughput/mfu" in throughput:
        shown.append(("of the machine's peak (MFU)", f"{throughput['throughput/mfu']:.0%}"))
    shown.append(("goodput: share of time in steps", f"{summary['goodput']:.0%}"))
    return figures(shown)


def _samples(metrics):
    entries = [entry for entry in metrics if "samples" in entry]
    if not entries:
        return ""
    parts = ["<h2>Samples</h2>"]
    for entry in entries[-3:]:
        parts.append(f"<p>after step {entry['step']:,}</p>")
        for sample in entry["samples"]:
            parts.append(f"<pre><b>{html.escape(sample['prompt'])}</b>{html.escape(printable(sample['text']))}</pre>")
    return "".join(parts)


def _time_bar(seconds):
    total = sum(seconds.values()) or 1.0
    coloured = [(name, value, colour) for (name, value), colour in zip(seconds.items(), _CATEGORY_COLOURS, strict=False)]
    shown = [(name.replace("_", " "), value, colour) for name, value, colour in coloured if value / total >= 0.001]
    blocks = "".join(f"<div style='width:{100 * v / total:.2f}%;background:{c}' title='{n}'></div>" for n, v, c in shown)
    legend = "".join(f"<span><i style='background:{c}'></i>{n} {v:.1f} s ({v / total:.0%})</span>" for n, v, c in shown)
    return f"<div class='bar'>{blocks}</div><div class='legend'>{legend}</div>"


def _series(metrics, name):
    """The points of a metric that can be drawn; a metric that is not finite stands in the file as text."""
    points = [(entry["step"], entry[name]) for entry in metrics if isinstance(entry.get(name), (int, float))]
    return [(x, y) for x, y in points if math.isfinite(y)]


def _smooth(points, weight=0.95):
    """Exponential mean, corrected for its start."""
    smoothed, mean, total = [], 0.0, 0.0
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        smoothed.append((x, mean / total))
    return smoothed
