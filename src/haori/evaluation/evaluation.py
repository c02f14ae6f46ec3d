"""Measure an adapter against its base on rows of its task: one result, with an interval to every figure.

Reading files, attaching adapters and storing the result are other modules' work; what is measured is the task's.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from haori.core.records import BaseReference, DataReference, Metric
from haori.evaluation.bootstrap import RESAMPLES, as_metric, intervals, mcnemar
from haori.evaluation.result import Confusion, EvaluationResult, RowResult
from haori.evaluation.samples import make_samples
from haori.evaluation.systems import Pair, Systems
from haori.metrics.kinds import KINDS
from haori.tasks.examination import USUAL, Examination, MeasureOptions, Scores
from haori.tasks.task import Task

__all__ = ["evaluate_adapter"]

_FEW_ROWS = 30


def evaluate_adapter(
    task: Task,
    model: Any,
    processor: Any,
    rows: Sequence[Any],
    *,
    data_reference: DataReference,
    options: MeasureOptions = USUAL,
    against_base: bool = True,
    samples: int = 3, seed: int = 0, adapter: str = "adapter",
    base: BaseReference | None = None,
    base_model: nn.Module | None = None,
) -> EvaluationResult:  # fmt: skip
    """Measure an adapter, and its base beside it, on the same rows.

    Args:
        task: What the adapter was trained for.
        model: A PeftModel with the adapter active, or with `against_base=False` any model of the task.
        processor: The task's, with the adapter's chat template where it has one.
        rows: As the task reads them to be measured on.
        data_reference: Identity of the rows.
        options: What to measure.
        against_base: Measure the base too, on the same model with the adapter off.
        samples: Side-by-side answers to show.
        seed: Seed of the bootstrap. Nothing else is random.
        adapter: The adapter's name, for the report.
        base: The base's identity, for the report.
        base_model: The base alone, for adapters that cannot be switched off (trained biases, PiSSA).

    Raises:
        InputError: No row can be measured, what is asked for does not fit the rows, or the base cannot be had.
        VerificationError: A score is not a number.
    """
    started = time.perf_counter()
    systems = Systems(model, against_base=against_base, base_model=base_model)
    examination = task.examine(model, processor, rows, options)
    scores = systems.on_both(examination.score)
    shown, sample_notes = make_samples(examination, systems, scores, samples)
    metrics, base_intervals = _figures(scores, seed)
    confusion = scores.adapter.confusion
    return EvaluationResult(
        adapter=adapter,
        against=None if not against_base else base.name if base else "base",
        base=base,
        data=data_reference,
        metrics=metrics,
        base_intervals=base_intervals,
        labels=examination.labels,
        confusion=Confusion(confusion, scores.base.confusion if scores.base else None) if confusion else None,
        samples=shown,
        rows=_rows(examination, scores),
        notes=(
            *examination.notes(scores.adapter, scores.base),
            *_right_notes(scores),
            *sample_notes,
            *_interval_notes(len(examination.rows), against_base, seed),
        ),
        seconds=time.perf_counter() - started,
    )


def _figures(scores: Pair[Scores], seed: int) -> tuple[dict[str, Metric], dict[str, tuple[float, float]]]:
    """Return the metrics with their intervals, and the intervals of the base's own figures."""
    metrics: dict[str, Metric] = {}
    of_base: dict[str, tuple[float, float]] = {}
    for name, own in scores.adapter.metrics.items():
        base = scores.base.metrics[name] if scores.base else None
        found = intervals(own.statistic, base.statistic if base else None, resamples=RESAMPLES, seed=seed)
        metrics[name] = as_metric(own.value, base.value if base else None, found)
        if found and found.base:
            of_base[name] = (found.base.low, found.base.high)
    return metrics, of_base


def _right_notes(scores: Pair[Scores]) -> list[str]:
    """Test whether two systems are right equally often, and warn where all rows came out alike."""
    notes = []
    for name, right in scores.adapter.right.items():
        title = KINDS[name].title
        if scores.base is not None and name in scores.base.right:
            test = mcnemar(right, scores.base.right[name])
            notes.append(
                f"{title}, McNemar's exact test: {test.only_first} rows only the adapter got right, "
                f"{test.only_second} only the base; p = {_p_value(test.p_value)} if both were equally good."
            )
        if np.all(right) or not np.any(right):
            points = 100 * min(1.0, 3 / len(right))
            notes.append(
                f"All rows came out alike, so the bootstrap interval of the adapter's {title.lower()} has no width; by "
                f"the rule of three the true figure may still be {points:.1f} points away."
            )
    return notes


def _p_value(value: float) -> str:
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _rows(examination: Examination, scores: Pair[Scores]) -> tuple[RowResult, ...]:
    """Return the per-row table."""
    return tuple(
        RowResult(
            index=row.index,
            origin=row.origin,
            reference=row.reference,
            tokens=row.trained_tokens,
            adapter=scores.adapter.answers[row.index],
            base=scores.base.answers[row.index] if scores.base else None,
        )
        for row in examination.rows
    )


def _interval_notes(rows: int, against_base: bool, seed: int) -> list[str]:
    if rows < 2:
        return ["One row was measured: there are no intervals."]
    notes = [f"Intervals are 95% percentile bootstrap over rows, {RESAMPLES} resamples, seed {seed}."]
    if against_base:
        notes[0] += " A difference is adapter minus base on the same resampled rows; an interval without 0 is clear."
    if rows < _FEW_ROWS:
        notes.append(f"Only {rows} rows were measured: intervals from so few rows are too narrow; use 100 or more.")
    return notes
