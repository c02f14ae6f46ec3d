"""The tasks there are, by the name that a recipe gives in `task`: one folder each, found here and nowhere else."""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from haori.core.errors import BaseError

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.tasks.recipe import Recipe
    from haori.tasks.task import Task

__all__ = ["DEFAULT_TASK", "TASKS", "check_components", "recipe_class", "task_of"]

TASKS = {
    "causal_lm": "haori.tasks.causal_lm",
    "classification": "haori.tasks.classification",
    "preference": "haori.tasks.preference",
    "text_to_image": "haori.tasks.text_to_image",
}
"""The package of each task; it gives `RECIPE`, the class of its recipes, and `TASK`."""

DEFAULT_TASK = "causal_lm"
"""What a recipe that names no task is for: what recipes of version 0.1 were for."""


def recipe_class(kind: str) -> "type[Recipe]":
    """Return the class of a task's recipes; importing it loads neither torch nor numpy."""
    found: type[Recipe] = import_module(TASKS[kind]).RECIPE
    return found


def task_of(kind: str) -> "Task":
    """Return what a task does."""
    found: Task = import_module(TASKS[kind]).TASK
    return found


def check_components(base: "Base", needed: Sequence[str], purpose: str, example: str = "smollm2-135m-instruct") -> None:
    """Refuse a base that does not have the components that something works with.

    Args:
        base: The base.
        needed: Names of components.
        purpose: What needs them, as the subject of a sentence.
        example: A base that has them.

    Raises:
        BaseError: It lacks one; the sentence names its components and the tasks that can learn on them.
    """
    if set(needed) <= set(base.components):
        return
    fitting = [kind for kind in TASKS if set(task_of(kind).components) <= set(base.components)]
    what = f"a {base.pipeline} with" if base.pipeline else "one with"
    can = f"what can learn on it is {', '.join(fitting)}" if fitting else "no task can learn on it yet"
    raise BaseError(
        f"The base {base.name!r} is {what} the components {', '.join(base.components)}; {purpose} needs a base with "
        f"the component {', '.join(needed)}, such as {example}. Of the tasks there are "
        f"({', '.join(TASKS)}), {can}."
    )
