"""Keeps a run's measurements: `metrics.jsonl` on disk, the same figures for experiment trackers, and the loss plot.

One JSON object a line: `{"kind": "train" | "validation", "step", "epoch", ...}`. Where a task measures the same
pictures at each validation, its line has their losses one by one, `losses` of those held out and `train_losses`. On
resume the file is cut back to the checkpoint's step, so that it reads as if the run had never stopped.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from haori.core.events import Event, EventSink, Figures, Measured, Progress
from haori.core.storage import explain_os_errors, write_text
from haori.training.paired import change

__all__ = ["Measurements", "Tracker", "draw_losses", "track"]

_TRAINING, _VALIDATION = "#2f5d8a", "#c4502e"


class Tracker(Protocol):
    """The part of Accelerate's `Accelerator` that is used to report figures."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Report figures of a step."""


class Measurements:
    """Appends figures to `metrics.jsonl`.

    Args:
        path: The file.
        resume_step: Keep the lines up to this step; 0 begins anew.
        write: False in all but the first of several processes: figures are kept in memory alone.
    """

    def __init__(self, path: Path, resume_step: int, *, write: bool = True) -> None:
        self.path = path
        self.write = write
        self.lines = [line for line in read_measurements(path) if line["step"] <= resume_step] if resume_step else []
        if write:
            write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, event: Progress | Measured, losses: Sequence[float] = (), train_losses: Sequence[float] = ()) -> None:
        """Record the figures of a step or validation, and the losses of single pictures where they are measured."""
        kind, figures = _figures(event)
        each = {"losses": list(losses), "train_losses": list(train_losses)}
        line = {"kind": kind, "step": event.step, **figures, **{name: each[name] for name in each if each[name]}}
        self.lines.append(line)
        if self.write:
            with explain_os_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def series(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of one kind, in order."""
        return [line for line in self.lines if line["kind"] == kind]

    def losses_at(self, step: int | None) -> list[float]:
        """Return the losses of single pictures at the validation of a step; none where they are not measured."""
        return next((line.get("losses", []) for line in self.series("validation") if line["step"] == step), [])

    def training_losses(self) -> list[float]:
        """Return the losses of the steps; where training rows are measured at each validation, those instead.

        A step's loss depends on what was drawn for it, noise for a picture above all; what is measured does not.
        """
        validations = self.series("validation")
        if validations and "train_loss" in validations[0]:  # before the first step: it can only have been measured
            return [line["train_loss"] for line in validations]
        return [line["loss"] for line in self.series("train")]


def track(tracker: Tracker) -> EventSink:
    """Return a subscriber that reports the figures of steps and validations to experiment trackers."""

    def log(event: Event) -> None:
        if isinstance(event, Progress | Measured):
            kind, figures = _figures(event)
            tracker.log({f"{kind}/{name}": value for name, value in figures.items()}, step=event.step)

    log.__qualname__ = "The experiment tracker"
    return log


def _figures(event: Progress | Measured) -> tuple[str, Figures]:
    if isinstance(event, Progress):
        return "train", {"epoch": event.epoch, "loss": event.loss, **event.values}
    return "validation", {"epoch": event.epoch, **event.values}


def read_measurements(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a `metrics.jsonl` (a line cut by a crash is left out)."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def draw_losses(measurements: Measurements, path: Path, best_step: int | None, title: str, label: str) -> None:
    """Draw training and validation loss against steps, the best validation marked, as a PNG; `label` names the loss.

    Where training rows are measured at each validation, those stand for training, in place of the steps' losses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    validation = measurements.series("validation")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if any("train_losses" in line for line in validation):
        _draw_paired(figure, validation, best_step, title, label)
    else:
        _draw_steps(figure.subplots(), measurements.series("train"), validation, best_step, title, label)
    with explain_os_errors(path):
        figure.savefig(path)


def _draw_steps(
    axes: Any, train: list[dict[str, Any]], validation: list[dict[str, Any]], best_step: int | None, title: str,
    label: str,
) -> None:  # fmt: skip
    """Draw the loss of each step, which is what was trained on, and that of the validations."""
    steps = [line["step"] for line in train]
    losses = [line["loss"] for line in train]
    axes.plot(steps, losses, color="#9db4c8", linewidth=1, label="training, each step")
    if len(losses) >= 10:
        axes.plot(steps, _smooth(losses), color=_TRAINING, linewidth=2, label="training, smoothed")
    axes.plot(
        [line["step"] for line in validation], [line["loss"] for line in validation],
        color=_VALIDATION, marker="o", linewidth=2, label="validation",
    )  # fmt: skip
    _mark_best(axes, validation, best_step)
    axes.set(xlabel="optimizer step", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _draw_paired(
    figure: Any, validation: list[dict[str, Any]], best_step: int | None, title: str, label: str
) -> None:  # fmt: skip
    """Draw the losses of pictures that each validation measures, and how each changed, with its standard error.

    The loss of a step tells little beside them: it depends on the noise that was drawn for it.
    """
    figure.set_size_inches(10, 4.5)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    steps = [line["step"] for line in validation]
    for name, color, what in (("train_", _TRAINING, "training pictures"), ("", _VALIDATION, "held-out pictures")):
        lines = [line[f"{name}loss"] for line in validation]
        left.plot(steps, lines, color=color, marker="o", linewidth=2, label=what)
        first = validation[0].get(f"{name}losses", [])
        found = [change(first, line.get(f"{name}losses", [])) for line in validation]
        known = [(step, each) for step, each in zip(steps, found, strict=True) if each is not None]
        right.errorbar(
            [step for step, _ in known], [each.mean for _, each in known], yerr=[each.error for _, each in known],
            color=color, marker="o", linewidth=2, capsize=3, label=f"{what} ({len(first)})",
        )  # fmt: skip
    _mark_best(left, validation, best_step)
    left.set(xlabel="optimizer step", ylabel=label, title="same noise and timesteps each time")
    right.set(xlabel="optimizer step", title="change since the start, mean ± standard error")
    right.axhline(0, color="#888888", linewidth=1)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)


def _mark_best(axes: Any, validation: list[dict[str, Any]], best_step: int | None) -> None:
    best = next((line for line in validation if line["step"] == best_step), None)
    if best is not None:
        named = f"best: {best['loss']:.3f} at epoch {best['epoch']:.3g}"
        axes.axvline(best["step"], color=_VALIDATION, linestyle=":", linewidth=1)
        axes.plot(best["step"], best["loss"], color=_VALIDATION, marker="*", markersize=15, linestyle="", label=named)


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about ten steps, started at the mean of the first few."""
    smoothed = []
    state = sum(values[:3]) / len(values[:3])
    for value in values:
        state = 0.8 * state + 0.2 * value
        smoothed.append(state)
    return smoothed
