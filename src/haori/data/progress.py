"""A progress line for long readings: shown on a terminal once two seconds have passed, gone when done."""

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["PATIENCE_S", "tracked"]

PATIENCE_S = 2.0
_EVERY = 64
_Row = TypeVar("_Row")


def tracked(
    rows: Iterable[_Row],
    what: str,
    *,
    total: float | None,
    size: str | None = None,
    console: Any = None,
    every: int = _EVERY,
) -> Iterator[_Row]:
    """Yield the rows, with rows/s and time left on standard error when it takes longer than two seconds.

    Args:
        rows: What is gone through.
        what: Shown in front of the bar.
        total: Where the bar ends: bytes when `size` is given, else rows; None when it is not known.
        size: Name of the rows' attribute that says how far the reading is.
        console: Rich console to draw on, instead of standard error.
        every: Look at the clock after so many rows; fewer for rows that take long.
    """
    start = time.monotonic()
    display: Progress | None = None
    task: Any = None
    try:
        for count, row in enumerate(rows, start=1):
            yield row
            if count % every:
                continue
            elapsed = time.monotonic() - start
            if display is None and elapsed > PATIENCE_S:
                display = _display(console)
                task = display.add_task(what, total=total, speed="")
                display.start()
            if display is not None:
                done = getattr(row, size) if size is not None else count
                display.update(task, completed=done, speed=f"{count / elapsed:,.0f} rows/s")
    finally:
        if display is not None:
            display.stop()


def _display(console: Any) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
