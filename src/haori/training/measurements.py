"""Keeps a run's measurements: `metrics.jsonl` on disk, the same figures for experiment trackers, and the loss plot.

One JSON object a line: `{"kind": "train" | "validation", "step", "epoch", ...}`. On resume the file is cut back
to the checkpoint's step, so that it reads as if the run had never stopped.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from haori.core.events import Event, EventSink, Figures, Measured, Progress
from haori.core.storage import explain_os_errors, write_text

__all__ = ["Measurements", "Tracker", "draw_losses", "track"]


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

    def add(self, event: Progress | Measured) -> None:
        """Record the figures of a step or validation."""
        kind, figures = _figures(event)
        line = {"kind": kind, "step": event.step, **figures}
        self.lines.append(line)
        if self.write:
            with explain_os_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def series(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of one kind, in order."""
        return [line for line in self.lines if line["kind"] == kind]

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
    """Draw training and validation loss against steps, the best validation marked, as a PNG; `label` names the loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, validation = measurements.series("train"), measurements.series("validation")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [line["step"] for line in train]
    losses = [line["loss"] for line in train]
    axes.plot(steps, losses, color="#9db4c8", linewidth=1, label="training, each step")
    if len(losses) >= 10:
        axes.plot(steps, _smooth(losses), color="#2f5d8a", linewidth=2, label="training, smoothed")
    axes.plot(
        [line["step"] for line in validation], [line["loss"] for line in validation],
        color="#c4502e", marker="o", linewidth=2, label="validation",
    )  # fmt: skip
    best = next((line for line in validation if line["step"] == best_step), None)
    if best is not None:
        named = f"best: {best['loss']:.3f} at epoch {best['epoch']:.3g}"
        axes.axvline(best["step"], color="#c4502e", linestyle=":", linewidth=1)
        axes.plot(best["step"], best["loss"], color="#c4502e", marker="*", markersize=15, linestyle="", label=named)
    axes.set(xlabel="optimizer step", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with explain_os_errors(path):
        figure.savefig(path)


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about ten steps, started at the mean of the first few."""
    smoothed = []
    state = sum(values[:3]) / len(values[:3])
    for value in values:
        state = 0.8 * state + 0.2 * value
        smoothed.append(state)
    return smoothed
