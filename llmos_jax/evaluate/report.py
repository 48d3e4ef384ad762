"""The report of a run: one HTML page with its figures, curves, samples and settings, readable anywhere, offline."""

import html
import json
import math

from llmos_jax.compute.host import write_whole

_COLOURS = {"loss": "var(--blue)", "validation": "var(--orange)", "other": "var(--green)"}
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
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --paper: #ffffff; --panel: #f5f7fa; --line: #d8dee8;
  --blue: #2563eb; --orange: #ea580c; --green: #0d9488; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --paper: #11151c; --panel: #1a202b;
  --line: #303949; --blue: #6ea8fe; --orange: #fb923c; --green: #2dd4bf; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
p { margin: .2rem 0; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .7rem; margin-top: 1.2rem; }
.figure { background: var(--panel); border-radius: .6rem; padding: .7rem .9rem; }
.figure b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: .82rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.charts .wide { grid-column: 1 / -1; }
svg { width: 100%; height: auto; background: var(--panel); border-radius: .6rem; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg .title { fill: var(--ink); font-weight: 600; }
pre { background: var(--panel); border-radius: .6rem; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, monospace; margin: .4rem 0 1rem; } pre b { color: var(--blue); }
.bar { display: flex; height: 1.6rem; border-radius: .4rem; overflow: hidden; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: .5rem; font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: .15rem; margin-right: .35rem; }
summary { cursor: pointer; color: var(--soft); }
"""


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
        _chart(
            "Loss, nats per token",
            [("training", losses, _COLOURS["loss"], .3), ("training, smoothed", _smooth(losses), _COLOURS["loss"], 1.0),
             ("validation", _series(metrics, "validation/loss"), _COLOURS["validation"], 1.0)],
            width=800, height=320,
        ),
        "</div>",
        *[
            _chart(label, [("", points, _COLOURS["other"], 1.0)], width=500, height=220)
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
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    write_whole(path, page)


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
    cells = "".join(f"<div class='figure'><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in shown)
    return f"<div class='figures'>{cells}</div>"


def _samples(metrics):
    entries = [entry for entry in metrics if "samples" in entry]
    if not entries:
        return ""
    parts = ["<h2>Samples</h2>"]
    for entry in entries[-3:]:
        parts.append(f"<p>after step {entry['step']:,}</p>")
        for sample in entry["samples"]:
            parts.append(f"<pre><b>{html.escape(sample['prompt'])}</b>{html.escape(_printable(sample['text']))}</pre>")
    return "".join(parts)


def _time_bar(seconds):
    total = sum(seconds.values()) or 1.0
    coloured = [(name, value, colour) for (name, value), colour in zip(seconds.items(), _CATEGORY_COLOURS, strict=False)]
    shown = [(name.replace("_", " "), value, colour) for name, value, colour in coloured if value / total >= 0.001]
    blocks = "".join(f"<div style='width:{100 * v / total:.2f}%;background:{c}' title='{n}'></div>" for n, v, c in shown)
    legend = "".join(f"<span><i style='background:{c}'></i>{n} {v:.1f} s ({v / total:.0%})</span>" for n, v, c in shown)
    return f"<div class='bar'>{blocks}</div><div class='legend'>{legend}</div>"


def _chart(title, series, *, width, height):
    """Returns an SVG line chart of series (label, [(x, y)], colour, opacity), with axes, ticks and a legend."""
    points = [point for _, values, _, _ in series for point in values]
    if not points:
        return ""
    left, right, top, bottom = 58, 14, 34, 28
    x_ticks, y_ticks = _ticks([x for x, _ in points], 6), _ticks([y for _, y in points], 5)
    x_low, x_high = min(x for x, _ in points), max(max(x for x, _ in points), min(x for x, _ in points) + 1)
    y_low, y_high = min(y_ticks), max(y_ticks)

    def place(x, y):
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return across, height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = [f"<text class='title' x='{left}' y='20'>{html.escape(title)}</text>"]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f"<line x1='{left}' x2='{width - right}' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--line)'/>")
        parts.append(f"<text x='{left - 6}' y='{y + 4:.1f}' text-anchor='end'>{_number(tick)}</text>")
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(f"<text x='{x:.1f}' y='{height - 9}' text-anchor='middle'>{_number(tick)}</text>")
    legend = width - right
    for label, values, colour, opacity in series:
        if not values:
            continue
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in _thin(values))
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.8' opacity='{opacity}'/>")
        if len(values) <= 40:
            dots = [place(x, y) for x, y in values]
            parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.6' fill='{colour}' opacity='{opacity}'/>" for x, y in dots]
        if label:
            style = f"text-anchor='end' style='fill:{colour}' opacity='{0.5 + opacity / 2}'"
            parts.append(f"<text x='{legend}' y='20' {style}>{html.escape(label)}</text>")
            legend -= 7 * len(label) + 14
    return f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{html.escape(title)}'>{''.join(parts)}</svg>"


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


def _thin(points, most=1500):
    step = max(1, len(points) // most)
    return points[::step] + ([points[-1]] if (len(points) - 1) % step else [])


def _ticks(values, count):
    """About `count` round numbers that cover the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / count
    scale = 10 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * number for number in range(first, last + 1)]


def _number(value):
    if value != 0 and (abs(value) < 0.001):
        return f"{value:.0e}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"


def _printable(text):
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
