"""What an evaluation found: metrics, samples, rows, and how each line of a metrics table reads.

Plain data without tensors; the report and the terminal read the same lines.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from haori.core.records import BaseReference, DataReference, Evaluation, Metric, now
from haori.evaluation.pictures.result import MeasuredPictures
from haori.metrics.kinds import KINDS, Kind, in_order, kind_of
from haori.tasks.examination import Answer, Counts, Sample

__all__ = [
    "Confusion",
    "EvaluationResult",
    "MetricLine",
    "RowResult",
    "figure",
    "headline",
    "interval_of",
    "metric_lines",
]


@dataclass(frozen=True)
class RowResult:
    """One row of data and both answers to it."""

    index: int
    origin: str
    reference: str | None
    tokens: int
    adapter: Answer
    base: Answer | None


@dataclass(frozen=True)
class Confusion:
    """Rows by reference (down) and answer (across), in the order of the labels."""

    adapter: Counts
    base: Counts | None


@dataclass(frozen=True)
class EvaluationResult:
    """The measured quality of an adapter on one dataset, whole.

    Attributes:
        adapter: Name of the adapter.
        against: Name of the base it was compared with, if it was.
        base: Identity of the base, if the caller gave it.
        data: The dataset.
        metrics: Metrics by name; `haori.metrics.kinds.kind_of` says how each is read.
        base_intervals: 95% interval of the base's own figure, where it was compared.
        labels: The label set of a label task, else empty.
        confusion: Confusion matrices of a label task.
        samples: Side-by-side answers.
        rows: Every measured row.
        notes: How the figures were made, in plain sentences.
        seconds: Time taken.
        time: When it ended.
        pictures: What was drawn, of an adapter for pictures.
    """

    adapter: str
    against: str | None
    base: BaseReference | None
    data: DataReference
    metrics: dict[str, Metric]
    base_intervals: dict[str, tuple[float, float]]
    labels: tuple[str, ...]
    confusion: Confusion | None
    samples: tuple[Sample, ...]
    rows: tuple[RowResult, ...]
    notes: tuple[str, ...]
    seconds: float
    time: str = field(default_factory=now)
    pictures: MeasuredPictures | None = None

    @property
    def measured_on(self) -> str:
        """Return how much was measured, such as `400 rows`."""
        if self.pictures is None:
            return f"{len(self.rows):,} rows"
        count = sum(not pair.unrelated for pair in self.pictures.pairs)
        return f"{count:,} pictures, and {len(self.pictures.pairs) - count:,} of unrelated prompts"

    def to_record(self) -> Evaluation:
        """Return the record that goes on the adapter's card."""
        return Evaluation(data=self.data, against=self.against, metrics=self.metrics, notes=self.notes, time=self.time)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-like data."""
        plain = {name: value for name, value in vars(self).items() if name not in {"base", "data", "metrics"}}
        for name in ("samples", "rows"):
            plain[name] = [asdict(item) for item in getattr(self, name)]
        for sample, found in zip(plain["samples"], self.samples, strict=True):
            sample["prompt"] = [turn._asdict() for turn in found.prompt]
        plain["confusion"] = asdict(self.confusion) if self.confusion else None
        plain["pictures"] = asdict(self.pictures) if self.pictures else None
        plain["base"] = self.base.model_dump() if self.base else None
        plain["data"] = self.data.model_dump()
        plain["metrics"] = {name: metric.model_dump() for name, metric in self.metrics.items()}
        return plain


class MetricLine(NamedTuple):
    """A metric as people read it.

    Attributes:
        kind: Title, direction and scale.
        name: Its key.
        base: The base's figure, or empty.
        base_interval: The 95% interval of the base's figure, or empty.
        adapter: The adapter's figure.
        adapter_interval: The 95% interval of the adapter's figure, or empty.
        difference: Signed difference to the base, or empty.
        difference_interval: Its 95% interval, or empty.
        verdict: `better`, `worse` or `no clear difference` (the interval holds 0); None when not compared.
    """

    kind: Kind
    name: str
    base: str
    base_interval: str
    adapter: str
    adapter_interval: str
    difference: str
    difference_interval: str
    verdict: Literal["better", "worse", "no clear difference"] | None


def metric_lines(result: EvaluationResult) -> list[MetricLine]:
    """Return one readable line per metric, in the order of `KINDS`, those of single labels last."""
    return [_line(result, name) for name in in_order(result.metrics)]


def headline(result: EvaluationResult) -> str:
    """Return the main finding as one sentence."""
    name = next(name for name in ("accuracy", "perplexity", *KINDS) if name in result.metrics)
    line = _line(result, name)
    sentence = f"{line.kind.title} {line.adapter}"
    if line.base:
        sentence += f" with the adapter, {line.base} without: {line.difference}"
        if line.difference_interval:
            sentence += f" (95% interval {line.difference_interval}), {line.verdict}"
    elif line.adapter_interval:
        sentence += f" (95% interval {line.adapter_interval})"
    return f"{sentence}."


def _line(result: EvaluationResult, name: str) -> MetricLine:
    kind, metric = kind_of(name), result.metrics[name]
    return MetricLine(
        kind=kind,
        name=name,
        base=figure(kind, metric.base),
        base_interval=interval_of(kind, *result.base_intervals.get(name, (None, None))),
        adapter=figure(kind, metric.value),
        adapter_interval=interval_of(kind, metric.low, metric.high),
        difference=figure(kind, metric.difference, signed=True),
        difference_interval=interval_of(kind, metric.difference_low, metric.difference_high, signed=True),
        verdict=_verdict(kind, metric),
    )


def figure(kind: Kind, value: float | None, *, signed: bool = False) -> str:
    """Return a figure of a metric as people read it, with its unit; nothing for None."""
    if value is None:
        return ""
    shown = 100 * value if kind.scale == "share" else value
    unit = "" if kind.scale != "share" else " points" if signed else "%"
    return f"{_number(kind, shown, signed)}{unit}"


def interval_of(kind: Kind, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """Return an interval of a metric as people read it; nothing where there is none."""
    if low is None or high is None:
        return ""
    factor = 100 if kind.scale == "share" else 1
    return f"{_number(kind, factor * low, signed)} to {_number(kind, factor * high, signed)}"


def _number(kind: Kind, value: float, signed: bool) -> str:
    digits = 1 if kind.scale in ("share", "score") else 3 if abs(value) < 10 else 2
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    # No signed nothing: "-0.0" says less than "0.0".
    return text if any(digit in text for digit in "123456789") or "n" in text else text.lstrip("+-")


def _verdict(kind: Kind, metric: Metric) -> Literal["better", "worse", "no clear difference"] | None:
    if metric.difference_low is None or metric.difference_high is None:
        return None
    if metric.difference_low > 0:
        return "better" if kind.better == "higher" else "worse"
    if metric.difference_high < 0:
        return "better" if kind.better == "lower" else "worse"
    return "no clear difference"
