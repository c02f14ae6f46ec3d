"""The progress bar of a drawing, which begins with its first step."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from haori.core.progress_bar import Advance, progress_bar

if TYPE_CHECKING:
    from haori.images.generation import StepsDone

__all__ = ["drawing_bar"]


@contextmanager
def drawing_bar() -> "Iterator[Callable[[StepsDone], None]]":
    """Yield what a drawing calls after each step."""
    with ExitStack() as stack:
        bars: list[Advance] = []
        seen = 0

        def on_step(steps: "StepsDone") -> None:
            nonlocal seen
            if not bars:
                bars.append(stack.enter_context(progress_bar("drawing", steps.total, "steps")))
            bars[0](steps.done - seen)
            seen = steps.done

        yield on_step
