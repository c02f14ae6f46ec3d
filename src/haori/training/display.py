"""Shows on a console what training reports: a progress bar on a terminal, a line now and then elsewhere.

One display serves a single run and a command that trains in child processes, one after another.
"""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from haori.core.events import Event, Failed, Finished, Measured, Progress, Said, Started, Warned

__all__ = ["TrainingDisplay"]

_LINE_EVERY_S = 20.0
_NEWEST = 0.2  # share of the newest step in the smoothed figures


class TrainingDisplay:
    """Subscribes to events by `update`; use as a context manager.

    Args:
        console: Where to.
        between_jobs: What the bar says while no job trains, of a command that runs several; None for a single run.
        lines_of_jobs: Whether lines that jobs report are printed, beside those of the command itself.
        indent: What lines begin with.
    """

    def __init__(
        self, console: Console, *, between_jobs: str | None = None, lines_of_jobs: bool = True, indent: str = ""
    ) -> None:
        self.console = console
        self.between_jobs, self.lines_of_jobs, self.indent = between_jobs, lines_of_jobs, indent
        self._last_line = time.monotonic()
        self._loss: float | None = None
        self._rate_per_s: float | None = None
        self._validation: float | None = None
        self._bar = Bar(
            TextColumn("[bold]{task.description}[/]"),
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
            self._wait()
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self.console.is_terminal:
            self._bar.stop()

    def update(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Started(work="run"):
                self._begin(event)
            case Progress():
                self._show_step(event)
            case Measured() if "loss" in event.values:
                self._show_validation(event)
            case Warned(text=text) if self._prints(event):
                self._print(f"Warning: {text}")
            case Said(text=text) if self._prints(event):
                self._print(text)
            case Finished() | Failed() if event.job is not None:
                self._wait()

    def _prints(self, event: Event) -> bool:
        return event.job is None or self.lines_of_jobs

    def _print(self, text: str) -> None:
        self.console.print(f"{self.indent}{text}", markup=False)

    def _show_only(self, description: str, completed: int, total: int | None) -> None:
        """Make this the one task of the bar."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(description, completed=completed, total=total, figures="")

    def _wait(self) -> None:
        """Let the bar say what the command does while no job trains."""
        if self.between_jobs is not None:
            self._show_only(self.between_jobs, 0, None)

    def _begin(self, event: Started) -> None:
        self._loss = self._rate_per_s = self._validation = None
        self._show_only(event.job or "training", event.step, event.total_steps)

    def _show_step(self, event: Progress) -> None:
        self._loss = _smooth(self._loss, event.loss)
        self._rate_per_s = _smooth(self._rate_per_s, event.rate_per_s)
        figures = f"loss {self._loss:.4f} · {self._rate_per_s:,.0f} {event.unit}/s"
        figures += f" · {event.peak_memory_bytes / 1e9:.2f} GB peak"
        if self._validation is not None:
            figures += f" · validation {self._validation:.4f}"
        for task in self._bar.task_ids:
            self._bar.update(task, completed=event.step, figures=figures)
        alone = event.job is None and not self.console.is_terminal
        if alone and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.console.print(f"  step {event.step}/{event.total_steps}: {figures}", highlight=False)

    def _show_validation(self, event: Measured) -> None:
        self._validation = event.values["loss"]
        if event.job is None:
            text = f"epoch {event.epoch:.3g}, step {event.step}: validation loss {self._validation:.4f}"
            self.console.print(f"  {text}", highlight=False)


def _smooth(before: float | None, newest: float) -> float:
    return newest if before is None else (1 - _NEWEST) * before + _NEWEST * newest
