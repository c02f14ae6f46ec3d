"""The two consoles of the command line: results on standard output, progress and notes on standard error."""

from functools import cache

from rich.console import Console

__all__ = ["notes", "results"]


@cache
def results() -> Console:
    """Return the console for what a command was asked for."""
    return Console(highlight=False, soft_wrap=False)


@cache
def notes() -> Console:
    """Return the console for progress and remarks."""
    return Console(stderr=True, highlight=False)
