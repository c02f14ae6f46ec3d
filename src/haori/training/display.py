"""Shows a training run: a progress bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from haori.training.loop import Progress as StepProgress

__all__ = ["TrainingDisplay"]

_LINE_EVERY_S = 20.0


class TrainingDisplay:
    """Receives the loop's progress; use as a context manager and pass `update` to the loop."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._loss: float | None = None
        self._validation: float | None = None
        self._rate: float | None = None
        self._last_line = time.monotonic()
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("[bold]training[/]"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Self:
        """Start the bar."""
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self.console.is_terminal:
            self._bar.stop()

    def update(self, progress: StepProgress) -> None:
        """Show a step or a validation."""
        if progress.validation_loss is not None:
            self._validation = progress.validation_loss
            self.console.print(
                f"  epoch {progress.epoch:.3g}, step {progress.step}: validation loss {progress.validation_loss:.4f}",
                highlight=False,
            )
        if progress.loss is not None:
            self._loss = progress.loss if self._loss is None else 0.8 * self._loss + 0.2 * progress.loss
            self._rate = progress.rate if self._rate is None else 0.8 * self._rate + 0.2 * progress.rate
        if self.console.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("training", total=progress.total_steps, figures="")
            self._bar.update(self._task, completed=progress.step, figures=self._figures(progress))
        elif time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.console.print(
                f"  step {progress.step}/{progress.total_steps}: {self._figures(progress)}", highlight=False
            )

    def _figures(self, progress: StepProgress) -> str:
        parts = [f"{progress.peak_memory_bytes / 1e9:.2f} GB peak"]
        if self._loss is not None and self._rate is not None:
            parts = [f"loss {self._loss:.4f}", f"{self._rate:,.0f} {progress.unit}/s", *parts]
        if self._validation is not None:
            parts.append(f"validation {self._validation:.4f}")
        return " · ".join(parts)
