"""A figure over strengths as inline SVG: one line for each epoch, with whiskers; everything in it is escaped."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from haori.evaluation.plots import svg, ticks

__all__ = ["Line", "Point", "line_plot"]

_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 20, 14, 44
_APART = 5  # pixels between the whiskers of two lines at one strength


class Point(NamedTuple):
    """A strength, the figure there, and the ends of its interval."""

    x: float
    y: float
    low: float | None
    high: float | None


class Line(NamedTuple):
    """What one epoch's line is called, and its points."""

    name: str
    points: tuple[Point, ...]


def line_plot(
    lines: Sequence[Line], label: str, *, y_title: str, level: float | None, recommended: tuple[int, float] | None
) -> Markup:
    """Draw lines in the page's colours `c0`, `c1`, ...

    Args:
        lines: One for each epoch.
        label: What the figure shows, for screen readers.
        y_title: Name of the figure.
        level: The base's own figure, as a dashed line.
        recommended: Line and strength to ring.
    """
    points = [point for line in lines for point in line.points]
    ends = [end for one in points for end in (one.y, one.low, one.high) if end is not None]
    ends += [] if level is None else [level]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 0.1
    low, high = low - margin, high + margin
    xs = sorted({point.x for point in points})
    side = 0.12 * (xs[-1] - xs[0]) or 0.2

    def across(value: float, line: int = 0) -> float:
        shift = (line - (len(lines) - 1) / 2) * _APART
        share = (value - xs[0] + side) / (xs[-1] - xs[0] + 2 * side)
        return round(_LEFT + share * (_WIDTH - _RIGHT - _LEFT) + shift, 1)

    def up(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP), 1)

    parts = [_frame(low, high, up, y_title)]
    middle = (len(lines) - 1) / 2 * _APART
    for x in xs:
        text = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
        parts.append(text.format(across(x) + middle, _HEIGHT - _BOTTOM + 18, f"{x:g}"))
    if level is not None:
        dashed = Markup('<line class="level" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        parts.append(dashed.format(_LEFT, _WIDTH - _RIGHT, up(level), up(level)))
    for number, line in enumerate(lines):
        parts.append(Markup('<g class="c{}">').format(number % 6))
        path = " ".join(f"{across(point.x, number)},{up(point.y)}" for point in line.points)
        parts.append(Markup('<polyline points="{}"/>').format(path))
        for point in line.points:
            x = across(point.x, number)
            if point.low is not None and point.high is not None:
                whisker = Markup('<line x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>')
                parts.append(whisker.format(x, up(point.low), up(point.high)))
            parts.append(Markup('<circle cx="{}" cy="{}" r="4"><title>{}</title></circle>').format(
                x, up(point.y), f"{line.name}, strength {point.x:g}: {point.y:.3g}"
            ))  # fmt: skip
            if recommended == (number, point.x):
                parts.append(Markup('<circle class="ring" cx="{}" cy="{}" r="9"/>').format(x, up(point.y)))
        parts.append(Markup("</g>"))
    return svg(label, _WIDTH, _HEIGHT, parts)


def _frame(low: float, high: float, up: Callable[[float], float], y_title: str) -> Markup:
    parts = Markup("")
    for tick in ticks(low, high):
        y = up(tick)
        parts += Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
        parts += Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(_LEFT - 8, y + 4, f"{tick:g}")
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    parts += Markup('<text x="12" y="{0}" text-anchor="middle" transform="rotate(-90 12 {0})">{1}</text>').format(
        middle, y_title
    )
    return parts + Markup('<text x="{}" y="{}" text-anchor="middle">strength</text>').format(
        (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6
    )
