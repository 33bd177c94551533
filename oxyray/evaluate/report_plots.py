"""Charts as inline SVG and HTML: no script, no font, no network; colours come from the page's style, so they follow light and dark.

A chart is drawn in a box of 420 x 250 units and scales with its card, which keeps its lettering readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 250, 56, 12, 10, 46


@dataclass(frozen=True)
class Line:
    """One curve: `colour` is the name of a style variable."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "policy"


@dataclass(frozen=True)
class Bar:
    """One bar: `strong` stands out, `interval` draws a whisker, `best` a mark on the track."""

    name: str
    value: float
    colour: str = "policy"
    strong: bool = False
    interval: tuple[float, float] | None = None
    best: float | None = None


def line_chart(lines: Sequence[Line], x_label: str, from_zero: bool = False) -> str:
    """Curves over whole numbers with axes and, for more than one, a legend. Points that are not finite are left out; empty without any."""
    points = [[(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)] for line in lines]
    every = [point for curve in points for point in curve]
    if not every:
        return ""
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every), 5, least=1)
    low = 0.0 if from_zero else min(y for _, y in every)
    y_ticks = ticks(low, max(y for _, y in every), 5)
    x_span, y_span = (min(x_ticks[0], min(x for x, _ in every)), max(x_ticks[-1], max(x for x, _ in every))), (y_ticks[0], y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_span[0]) / ((x_span[1] - x_span[0]) or 1) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_span[0]) / ((y_span[1] - y_span[0]) or 1) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_axes(x_ticks, y_ticks, at, x_label)]
    for line, curve in zip(lines, points, strict=True):
        if not curve:
            continue
        placed = [at(x, y) for x, y in thinned(curve)]
        path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<path class="series" stroke="var(--{line.colour})" d="{path}"/>')
        if len(placed) <= 20:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="var(--{line.colour})"/>' for x, y in placed]
    label = escape(", ".join(line.name for line in lines))
    chart = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return chart + (legend([(line.name, line.colour) for line in lines]) if len(lines) > 1 else "")


def profile_chart(levels: Sequence[Sequence[float]], names: Sequence[str], x_label: str, even: float) -> str:
    """Sorted sizes (largest first) as curves over the share of codes, with a line at the `even` size."""
    colours = ("policy", "knn", "sasrec", "optimum")
    lines = [
        Line(name, [100 * (i + 0.5) / len(sizes) for i in range(len(sizes))], sorted(sizes, reverse=True), colours[n % len(colours)])
        for n, (name, sizes) in enumerate(zip(names, levels, strict=True))
    ]
    return line_chart([*lines, Line("even", [0, 100], [even, even], "faint")], x_label, from_zero=True)


def bars(rows: Sequence[Bar], top: float, form: str = ".4f") -> str:
    """Horizontal bars on a common scale that ends at `top`; values are written in `form`."""
    scale = 100 / top if top > 0 else 0
    parts = []
    for row in rows:
        strong = " strong" if row.strong else ""
        inside = f'<div class="bar" style="width:{row.value * scale:.2f}%;background:var(--{row.colour})"></div>'
        if row.interval:
            low, high = row.interval
            inside += f'<div class="whisker" style="left:{low * scale:.2f}%;width:{max(high - low, 0) * scale:.2f}%"></div>'
        if row.best is not None:
            inside += f'<div class="best" style="left:{row.best * scale:.2f}%"></div>'
        parts.append(f'<div class="name{strong}">{escape(row.name)}</div><div class="track">{inside}</div>')
        parts.append(f'<div class="value">{row.value:{form}}</div>')
    return f'<div class="bars plot">{"".join(parts)}</div>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="legend">'
        + "".join(f'<span><i style="background:var(--{colour})"></i>{escape(name)}</span>' for name, colour in entries)
        + "</div>"
    )


def ticks(low: float, high: float, count: int, least: float = 0) -> list[float]:
    """Round values that enclose low..high, about `count` of them, at least `least` apart."""
    if not high > low:
        low, high = (low - abs(low) * 0.5 - 0.5, high + abs(high) * 0.5 + 0.5) if low else (0.0, 1.0)
    raw = max((high - low) / max(count - 1, 1), least)
    unit = 10 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if least else (1, 2, 2.5, 5, 10)
    step = next(unit * factor for factor in factors if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def thinned(curve: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` points: means of neighbouring ones."""
    size = -(-len(curve) // most)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _axes(x_ticks: list[float], y_ticks: list[float], place: Callable[[float, float], tuple[float, float]], x_label: str) -> str:
    parts = []
    for value in y_ticks:
        _, y = place(x_ticks[0], value)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x_ticks:
        x, _ = place(value, y_ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def short(value: float) -> str:
    """A tick's label."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}" if abs(value) >= 1e-12 else "0"
