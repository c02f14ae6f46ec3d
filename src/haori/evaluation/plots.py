"""Figures of the report as inline SVG: intervals of metrics, and a histogram of per-row differences.

Colours are the page's CSS variables, so one figure suits light and dark. Everything written into the SVG is a
number or goes through `markupsafe`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

__all__ = ["Dot", "DotRow", "difference_histogram", "dot_plot", "svg", "ticks"]

_DOT_WIDTH = 460
_BAR_WIDTH = 960
_BAR_HEIGHT = 220
_ROW = 52
_BOTTOM = 30
_TAIL_PERCENT = 1
_LETTER = 7  # width of a letter of a row's title, at 13 px


class Dot(NamedTuple):
    """One figure with its interval and its CSS class (`adapter` or `base`)."""

    kind: str
    value: float
    low: float | None
    high: float | None
    text: str


class DotRow(NamedTuple):
    """One line of a dot plot."""

    title: str
    dots: tuple[Dot, ...]


class _Axis(NamedTuple):
    """A horizontal axis from `low` to `high` between the places `left` and `right`, over `bottom`."""

    low: float
    high: float
    left: float
    right: float
    bottom: float

    def x(self, value: float) -> float:
        """Return the place of a value, at the nearer end if it is outside."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.left + share * (self.right - self.left), 1)


def dot_plot(
    rows: Sequence[DotRow], label: str, *, zero: bool = False, limits: tuple[float, float] | None = None
) -> Markup:
    """Draw each row's figures as dots with 95% whiskers on one axis.

    Args:
        rows: What to draw, from the top.
        label: What the figure shows, for screen readers.
        zero: Mark zero with a line and keep it in view.
        limits: Limits that the axis never leaves, such as 0 and 100.
    """
    height = _ROW * len(rows) + _BOTTOM + 8
    left = max(96, 14 + _LETTER * max(len(row.title) for row in rows))
    axis = _Axis(*_ends(rows, zero, limits), left=left, right=_DOT_WIDTH - 20, bottom=height - _BOTTOM)
    parts = [_grid(axis)]
    if zero:
        parts.append(_upright("zero", axis.x(0), axis.bottom))
    for place, row in enumerate(rows):
        middle = 8 + _ROW * (place + 0.5)
        name = Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>')
        parts.append(name.format(axis.left - 14, middle + 4, row.title))
        shifts = (0,) if len(row.dots) == 1 else (-10, 10)
        parts += [_whisker(dot, middle + shift, axis) for dot, shift in zip(row.dots, shifts, strict=True)]
    return svg(label, _DOT_WIDTH, height, parts)


def difference_histogram(differences: Sequence[float], label: str) -> Markup:
    """Draw how many rows have which difference; left of zero the adapter is better.

    The outermost 1% on either side is gathered in the outer bars, so that one odd row does not flatten the rest.
    """
    values = np.asarray(differences, float)
    tails = np.percentile(values, (_TAIL_PERCENT, 100 - _TAIL_PERCENT))
    edge = max(float(np.abs(tails).max()), 1e-6)
    bins = max(6, min(30, 2 * int(math.sqrt(len(values)) / 2 + 1)))  # even, so that zero parts two bars
    counts, edges = np.histogram(np.clip(values, -edge, edge), bins=bins, range=(-edge, edge))
    axis = _Axis(-edge, edge, left=20, right=_BAR_WIDTH - 20, bottom=_BAR_HEIGHT - _BOTTOM)
    scale = (axis.bottom - 28) / max(1, int(counts.max()))
    parts = [_grid(axis)]
    for place, count in enumerate(counts):
        left, right = axis.x(float(edges[place])), axis.x(float(edges[place + 1]))
        tall = round(float(count) * scale, 1)
        kind = "adapter" if place < bins // 2 else "base"
        bar = Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"><title>{} rows</title></rect>')
        parts.append(bar.format(kind, left + 1, axis.bottom - tall, right - left - 2, tall, int(count)))
    middle = axis.x(0)
    parts.append(_upright("zero", middle, axis.bottom))
    for anchor, at, words in (("end", middle - 10, "adapter better"), ("start", middle + 10, "base better")):
        parts.append(Markup('<text x="{}" y="16" text-anchor="{}">{}</text>').format(at, anchor, words))
    return svg(label, _BAR_WIDTH, _BAR_HEIGHT, parts)


def _whisker(dot: Dot, y: float, axis: _Axis) -> Markup:
    mark = Markup('<g class="{}"><title>{}</title>').format(dot.kind, dot.text)
    if dot.low is not None and dot.high is not None:
        left, right = axis.x(dot.low), axis.x(dot.high)
        mark += Markup('<line x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(left, right, y)
        for end in (left, right):
            mark += Markup('<line x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(end, y - 4, y + 4)
    return mark + Markup('<circle cx="{}" cy="{}" r="5"/></g>').format(axis.x(dot.value), y)


def _grid(axis: _Axis) -> Markup:
    lines = Markup("")
    for tick in ticks(axis.low, axis.high):
        x = axis.x(tick)
        lines += _upright("grid", x, axis.bottom)
        lines += Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(x, axis.bottom + 18, f"{tick:g}")
    return lines


def _upright(kind: str, x: float, bottom: float) -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="4" y2="{}"/>').format(kind, x, x, bottom)


def svg(label: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    """Return a figure of these parts, as wide as its place on the page."""
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, round(height), label)
    return head + Markup("").join(parts) + Markup("</svg>")


def _ends(rows: Sequence[DotRow], zero: bool, limits: tuple[float, float] | None) -> tuple[float, float]:
    drawn = [end for row in rows for dot in row.dots for end in (dot.value, dot.low, dot.high) if end is not None]
    finite = [end for end in drawn if math.isfinite(end)] + ([0.0] if zero else [])
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    return (max(low, limits[0]), min(high, limits[1])) if limits else (low, high)


def ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers between the ends."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 10) + 0.0 for place in range(first, last + 1)]
