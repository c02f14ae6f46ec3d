"""The tasks there are, by the name that a recipe gives in `task`: one folder each, found here and nowhere else."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from haori.tasks.recipe import Recipe
    from haori.tasks.task import Task

__all__ = ["TASKS", "recipe_class", "task_of"]

TASKS = {
    "causal_lm": "haori.tasks.causal_lm",
    "preference": "haori.tasks.preference",
}
"""The package of each task; it gives `RECIPE`, the class of its recipes, and `TASK`."""


def recipe_class(kind: str) -> "type[Recipe]":
    """Return the class of a task's recipes; importing it loads neither torch nor numpy."""
    found: type[Recipe] = import_module(TASKS[kind]).RECIPE
    return found


def task_of(kind: str) -> "Task":
    """Return what a task does."""
    found: Task = import_module(TASKS[kind]).TASK
    return found
