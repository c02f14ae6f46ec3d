"""Classification: one label or several for a text or a pair of texts, or a label for each word of a text."""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.tasks.classification.recipe import RECIPE
    from haori.tasks.classification.task import TASK

__all__ = ["RECIPE", "TASK"]

__getattr__ = lazy_exports(__name__, {"recipe": ("RECIPE",), "task": ("TASK",)})
