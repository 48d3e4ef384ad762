"""Pieces of self-contained HTML pages: style, figures, line and bar charts, tables. No script, nothing loaded."""

import html
import math

from llmos_jax.compute.host import write_whole

BLUE, ORANGE, GREEN = "var(--blue)", "var(--orange)", "var(--green)"
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
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 500; } .right { text-align: right; font-variant-numeric: tabular-nums; }
.funnel { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr max-content; gap: .3rem .8rem; font-size: .86rem;
  align-items: center; } .funnel div { height: 1.1rem; border-radius: .25rem; background: var(--green); min-width: 1px; }
.funnel span { color: var(--soft); font-variant-numeric: tabular-nums; }
.note { color: var(--soft); font-size: .82rem; }
"""


def write_page(path, title, body):
    """Writes a page of parts of HTML, whole or not at all; the title is escaped, the parts are not."""
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    write_whole(path, page)


def figures(shown):
    """Returns a grid of (name, value) pairs of text."""
    cells = "".join(f"<div class='figure'><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in shown)
    return f"<div class='figures'>{cells}</div>"


def table(heads, rows):
    """Returns a table of text; all columns but the first are aligned to the right where every entry is a number."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(heads)
    sides = ["right" if all(isinstance(x, (int, float)) for x in column) and column else "left" for column in columns]
    shown = [[f"{x:,}" if isinstance(x, int) else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    head = "".join(f"<th class='{side}'>{html.escape(name)}</th>" for name, side in zip(heads, sides, strict=True))
    lines = ["".join(f"<td class='{s}'>{html.escape(x)}</td>" for x, s in zip(row, sides, strict=True)) for row in shown]
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def bar_chart(title, bars, *, width=500, height=220, colours=(GREEN, ORANGE)):
    """Returns an SVG of bars (label, value, ...), upright, values on top of each other; of many labels some are written."""
    if not bars:
        return ""
    left, right, top, bottom = 58, 14, 34, 28
    ticks = _ticks([0, *(sum(values) for _, *values in bars)], 4)
    high, slot = max(ticks), (width - left - right) / len(bars)
    parts = [f"<text class='title' x='{left}' y='20'>{html.escape(title)}</text>"]
    for tick in ticks:
        y = height - bottom - tick / high * (height - top - bottom)
        parts.append(f"<line x1='{left}' x2='{width - right}' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--line)'/>")
        parts.append(f"<text x='{left - 6}' y='{y + 4:.1f}' text-anchor='end'>{_number(tick)}</text>")
    every = math.ceil(len(bars) * 7 * max(len(label) for label, *_ in bars) / (width - left - right) + 0.2)
    for number, (label, *values) in enumerate(bars):
        x, y = left + number * slot, height - bottom
        for value, colour in zip(values, colours, strict=False):
            tall = value / high * (height - top - bottom)
            y -= tall
            parts.append(
                f"<rect x='{x + 1:.1f}' y='{y:.1f}' width='{max(slot - 2, 0.5):.1f}' height='{tall:.1f}' fill='{colour}'>"
                f"<title>{html.escape(label)}: {value:,}</title></rect>"
            )
        if number % every == 0:
            middle = x + slot / 2
            parts.append(f"<text x='{middle:.1f}' y='{height - 9}' text-anchor='middle'>{html.escape(label)}</text>")
    return f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{html.escape(title)}'>{''.join(parts)}</svg>"


def line_chart(title, series, *, width, height):
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


def printable(text):
    """Returns text without characters that a page can't show."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
