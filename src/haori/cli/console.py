"""The two consoles of the command line: results on standard output, progress and notes on standard error."""

from functools import cache

from rich.console import Console

__all__ = ["notes", "results"]

_WIDTH_WITHOUT_TERMINAL = 120


@cache
def results() -> Console:
    """Return the console for what a command was asked for."""
    return _console(stderr=False)


@cache
def notes() -> Console:
    """Return the console for progress and remarks."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH_WITHOUT_TERMINAL
    return console
