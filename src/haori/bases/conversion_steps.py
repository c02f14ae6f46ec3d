"""The bar that shows the steps of a conversion to a model folder, on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["conversion_steps"]


@contextmanager
def conversion_steps(label: str, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Show steps with a bar and the time so far on standard error; yield what begins a step, and what says a line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("Converting " + label), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    # The stream is fixed now: what transformers prints meanwhile goes elsewhere.
    console = Console(file=sys.stderr)
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("", total=total)
        done = 0

        def begin(what: str) -> None:
            nonlocal done
            progress.update(task, description=what, completed=done)
            done += 1

        yield begin, lambda line: console.print(line, markup=False, soft_wrap=True)
        progress.update(task, description="", completed=total)
