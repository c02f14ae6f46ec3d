"""Figures of a comparison as inline SVG: score against memory, validation losses, forgetting.

A method has the same colour in all of them: the CSS class `m0`, `m1`, ... of the page. Everything written is a number
or goes through `markupsafe`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from haori.evaluation.plots import svg, ticks

__all__ = ["Bar", "Curve", "Place", "bars", "curves", "scatter"]

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 16, 46
_BAR_ROW = 40
_NAMES = 118


class Place(NamedTuple):
    """A method in the scatter plot, with the ends of its interval."""

    kind: str
    name: str
    x: float
    y: float
    low: float | None
    high: float | None


class Curve(NamedTuple):
    """One run's losses over epochs."""

    kind: str
    name: str
    points: tuple[tuple[float, float], ...]


class Bar(NamedTuple):
    """One method's figure with the ends of its interval."""

    kind: str
    name: str
    value: float
    low: float | None
    high: float | None
    text: str


class _Scale(NamedTuple):
    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        """Return the place of a value on the page."""
        return round(self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first), 1)


def scatter(places: Sequence[Place], label: str, *, x_title: str, y_title: str, level: tuple[str, float]) -> Markup:
    """Draw score against memory, each method a dot with its interval; `level` names a dashed line, the base's score."""
    ends = [end for one in places for end in (one.y, one.low, one.high) if end is not None] + [level[1]]
    x = _scale([0.0, *(one.x for one in places)], _LEFT, _WIDTH - _RIGHT, from_low=True)
    y = _scale(ends, _HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(x, y, x_title, y_title), _level(level, x, y)]
    for one in places:
        across, up = x.at(one.x), y.at(one.y)
        mark = Markup('<g class="{}"><title>{}</title>').format(one.kind, one.name)
        if one.low is not None and one.high is not None:
            mark += Markup('<line x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(across, y.at(one.low), y.at(one.high))
        # No name beside it: dots lie close together, and the legend tells them by colour.
        parts.append(mark + Markup('<circle cx="{}" cy="{}" r="5"/></g>').format(across, up))
    return svg(label, _WIDTH, _HEIGHT, parts)


def curves(series: Sequence[Curve], label: str, *, x_title: str, y_title: str) -> Markup:
    """Draw validation losses over epochs, one line per run, those of a method in one colour."""
    x = _scale([0.0, *(point[0] for one in series for point in one.points)], _LEFT, _WIDTH - _RIGHT, from_low=True)
    y = _scale([point[1] for one in series for point in one.points], _HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(x, y, x_title, y_title)]
    for one in series:
        line = " ".join(f"{x.at(across)},{y.at(up)}" for across, up in one.points)
        mark = Markup('<g class="{}"><title>{}</title><polyline points="{}"/>').format(one.kind, one.name, line)
        for across, up in one.points:
            mark += Markup('<circle cx="{}" cy="{}" r="2.5"/>').format(x.at(across), y.at(up))
        parts.append(mark + Markup("</g>"))
    return svg(label, _WIDTH, _HEIGHT, parts)


def bars(rows: Sequence[Bar], label: str, *, x_title: str) -> Markup:
    """Draw one horizontal bar per method from zero, with its 95% interval."""
    height = _BAR_ROW * len(rows) + _TOP + _BOTTOM
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    x = _scale([0.0, *ends], _NAMES, _WIDTH - _RIGHT)
    bottom = height - _BOTTOM
    parts = [_uprights(x, bottom), _title(x_title, (_NAMES + _WIDTH - _RIGHT) / 2, height - 8)]
    zero = x.at(0.0)
    for place, row in enumerate(rows):
        middle = _TOP + _BAR_ROW * (place + 0.5)
        name = Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>')
        parts.append(name.format(_NAMES - 12, middle + 4, row.name))
        end = x.at(row.value)
        mark = Markup('<g class="{}"><title>{}</title><rect x="{}" y="{}" width="{}" height="18"/>').format(
            row.kind, row.text, min(zero, end), middle - 9, round(max(abs(end - zero), 1.0), 1)
        )
        if row.low is not None and row.high is not None:
            mark += Markup('<line class="whisker" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                x.at(row.low), x.at(row.high), middle, middle
            )
        parts.append(mark + Markup("</g>"))
    parts.append(Markup('<line class="zero" x1="{0}" x2="{0}" y1="4" y2="{1}"/>').format(zero, bottom))
    return svg(label, _WIDTH, height, parts)


def _scale(values: Sequence[float], first: float, last: float, *, from_low: bool = False) -> _Scale:
    """Return a scale that holds all values with a margin; `from_low` keeps the lowest at the very start."""
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return _Scale(low if from_low else low - margin, high + margin, first, last)


def _axes(x: _Scale, y: _Scale, x_title: str, y_title: str) -> Markup:
    lines = _uprights(x, y.first)
    for tick in ticks(y.low, y.high):
        up = y.at(tick)
        lines += Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(x.first, x.last, up, up)
        lines += Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(x.first - 8, up + 4, f"{tick:g}")
    lines += _title(x_title, (x.first + x.last) / 2, _HEIGHT - 8)
    turned = Markup('<text transform="rotate(-90)" x="{}" y="13" text-anchor="middle">{}</text>')
    return lines + turned.format(-(y.first + y.last) / 2, y_title)


def _uprights(x: _Scale, bottom: float) -> Markup:
    lines = Markup("")
    for tick in ticks(x.low, x.high):
        across = x.at(tick)
        lines += Markup('<line class="grid" x1="{0}" x2="{0}" y1="4" y2="{1}"/>').format(across, bottom)
        text = Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
        lines += text.format(across, bottom + 17, f"{tick:g}")
    return lines


def _title(text: str, x: float, y: float) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(x, y, text)


def _level(level: tuple[str, float], x: _Scale, y: _Scale) -> Markup:
    up = y.at(level[1])
    line = Markup('<line class="level" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(x.first, x.last, up, up)
    return line + Markup('<text x="{}" y="{}">{}</text>').format(x.first + 6, up - 6, level[0])
